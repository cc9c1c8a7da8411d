"""Plans: budgets mean what they say, files are read without trust, and another budget needs neither the model nor torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner

from compress import allocation
from compress.allocation import Allocation, Budget, Origin, Rest, Unit
from compress.cli import app
from compress.errors import Exit, InputError


def unit(place: int, weights: int, costs: dict[int, float], read: float = 1.0) -> Unit:
    """A unit whose scales take 100 bytes."""
    stored = {bits: weights * bits // 8 + 100 for bits in costs}
    return Unit(
        name=f"model.layers.{place}.qkv", bits=min(costs), linears=(f"q{place}",), weights=weights, read=read, bytes=stored, scores={"kl": costs}
    )


def plan(*units: Unit) -> Allocation:
    units = units or (
        unit(0, 800, {2: 9.0, 3: 3.0, 4: 1.0}),
        unit(1, 1600, {2: 2.0, 3: 1.0, 4: 0.5}),
        unit(2, 800, {2: 1.0, 3: 0.25, 4: 0.125}, read=0.25),
    )
    return Allocation(
        options=tuple(units[0].bytes),
        budget=Budget(average_bits=2.0),
        score="kl",
        offsets={"kl": 0.5},
        measured={"kl": 0.75},
        origin=Origin(source={"model.safetensors": "ab"}, calibration="cd", sequences=16),
        rest=Rest(bytes=1000, read=500.0),
        units=units,
    )


@pytest.mark.parametrize(
    ("text", "count"),
    [("500MB", 500_000_000), ("12GiB", 12 << 30), ("1.5kB", 1500), ("1 TiB", 1 << 40), ("7B", 7), (9, 9), ("0.1KiB", 0), ("0.0000000011GB", 1)],
)
def test_sizes_are_read_with_their_units(text: object, count: int) -> None:
    if count and text != "0.1KiB":
        assert Budget.model_validate({"budget": text}).budget == count
    else:
        with pytest.raises(ValidationError):
            Budget.model_validate({"budget": text})


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "two": ({"average_bits": 3, "budget": "1GB"}, "average_bits and budget are two budgets"),
    "no unit": ({"budget": "500"}, "must be a size such as 500MB or 12GiB"),
    "an unknown unit": ({"budget": "5XB"}, "must be a size such as 500MB or 12GiB"),
    "nothing": ({}, "has no budget"),
    "less than nothing": ({"average_bits": -1}, "greater than 0"),
    "speed without bandwidth": ({"tokens_per_second": 10}, "tokens_per_second and bandwidth belong together"),
    "bandwidth alone": ({"bandwidth": "1GB"}, "tokens_per_second and bandwidth belong together"),
}


@pytest.mark.parametrize("which", WRONG)
def test_what_is_no_budget_is_refused(which: str) -> None:
    plain, message = WRONG[which]
    with pytest.raises(InputError, match=message):
        allocation.budget(plain, "allocate")


@pytest.mark.parametrize(
    ("budget", "chosen"),
    [
        (Budget(average_bits=2.5), (4, 2, 2)),
        (Budget(average_bits=3.0), (4, 3, 2)),
        (Budget(average_bits=9.0), (4, 4, 4)),
        (Budget(bits_per_weight=8 * 1200 / 3200), (3, 2, 2)),
        (Budget(budget=2200), (3, 2, 2)),
        (Budget(budget=2199), (2, 2, 2)),
        (Budget(budget=2100), (2, 2, 2)),
        # Read for a token: 500 of the rest, 300 and 500 of the first two units at 2 bits, 75 of the third.
        (Budget(tokens_per_second=1000, bandwidth=1000 * (500 + 300 + 500 + 75)), (2, 2, 2)),
        (Budget(tokens_per_second=1000, bandwidth=1000 * (500 + 300 + 500 + 100)), (2, 2, 3)),
    ],
    ids=str,
)
def test_a_budget_is_used_and_not_exceeded(budget: Budget, chosen: tuple[int, ...]) -> None:
    found = plan().solved(budget, None, "allocate")
    assert found.chosen == chosen and found.fits(budget, chosen)
    figures = found.figures(chosen, budget.bandwidth)
    limit = getattr(budget, budget.kind or "")
    assert figures[budget.kind or ""] >= limit if budget.kind == "tokens_per_second" else figures[budget.kind or ""] <= limit


@given(st.integers(200, 400), st.integers(200, 400))
def test_a_larger_budget_never_predicts_more(one: int, other: int) -> None:
    low, high = (plan().solved(Budget(average_bits=bits / 100), None, "allocate") for bits in sorted((one, other)))
    assert low.predicted(low.chosen, "kl") >= high.predicted(high.chosen, "kl")


def test_decimals_mean_what_is_written() -> None:
    hundred = plan(unit(0, 30, {2: 1.0, 3: 0.5, 4: 0.25}), unit(1, 70, {2: 1.0, 3: 0.9, 4: 0.8}))
    assert 2.3 * 100 < 230  # in binary
    assert hundred.solved(Budget(average_bits=2.3), None, "allocate").chosen == (3, 2)
    assert not hundred.fits(Budget(average_bits=2.29), (3, 2))


def test_one_option_is_uniform() -> None:
    single = plan(unit(0, 8, {3: 1.0}), unit(1, 8, {3: 2.0}))
    assert single.solved(Budget(average_bits=3.0), None, "allocate").chosen == (3, 3)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(average_bits=1.9), r"average_bits: 1\.9 cannot be reached; with 2 bits everywhere the least is 2;"),
        (Budget(bits_per_weight=2.7), r"bits_per_weight: 2\.7 cannot be reached; with 2 bits everywhere the least is 2\.75;"),
        (Budget(budget=1), "budget: 1 cannot be reached; with 2 bits everywhere the least is 2,100;"),
        (Budget(tokens_per_second=9.0, bandwidth=1375), "tokens_per_second: 9.0 cannot be reached; with 2 bits everywhere the most is 1;"),
    ],
    ids=str,
)
def test_a_budget_that_nothing_fits_into_is_refused_with_the_least_there_is(budget: Budget, message: str) -> None:
    with pytest.raises(InputError, match=f"^allocate: {message} change it, or allow fewer bits$"):
        plan().solved(budget, None, "allocate")


def test_uniform_bits_are_found_around_a_budget() -> None:
    assert plan().largest_uniform(Budget(average_bits=3.9)) == (3, 3, 3) and plan().nearest_uniform(Budget(average_bits=3.9)) == (4, 4, 4)
    assert plan().nearest_uniform(Budget(average_bits=2.5)) == (3, 3, 3)
    assert plan().largest_uniform(Budget(budget=2000)) is None


def test_the_curve_holds_every_solution_and_the_cheapest_uniform_bits() -> None:
    curve = plan().curve("kl")
    assert curve[0] == (2.75, 12.5) and curve[-1] == (4.75, 0.5 + 1.625)
    for bits in range(20, 41):
        chosen = plan().solved(Budget(bits_per_weight=2.75 + (bits - 20) / 10), None, "allocate")
        size, cost = chosen.figures(chosen.chosen)["bits_per_weight"], chosen.predicted(chosen.chosen, "kl")
        assert (size, cost) in curve


def test_a_long_curve_is_thinned_to_its_ends_and_what_lies_between() -> None:
    many = plan(*(unit(place, 8 * (1 << place), {2: 3.0, 3: 2.0 - place / 100, 4: 1.0}) for place in range(9)))
    curve = many.curve("kl")
    assert len(curve) <= allocation.POINTS and curve[0][1] == 0.5 + 27 and curve[-1][1] == 0.5 + 9


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    allocation.write(plan(), tmp_path / "plan.json")
    assert allocation.read(tmp_path / "plan.json") == plan()


def test_bits_edited_by_hand_are_taken_as_they_are(tmp_path: Path) -> None:
    allocation.write(plan(), tmp_path / "plan.json")
    plain = json.loads((tmp_path / "plan.json").read_text())
    plain["units"][1]["bits"] = 4
    (tmp_path / "plan.json").write_text(json.dumps(plain))
    edited = allocation.read(tmp_path / "plan.json")
    assert edited.bits() == {"q0": 2, "q1": 4, "q2": 2} and edited.figures(edited.chosen)["average_bits"] == 3.0


FAULTS: dict[str, tuple[Any, str]] = {
    "bits that are no option": (("units", 0, "bits", 5), r"model\.layers\.0\.qkv: bits must be one of \[2, 3, 4\], got 5"),
    "a size that is missing": (
        ("units", 1, "bytes", {"2": 1, "3": 2}),
        r"model\.layers\.1\.qkv: bytes must name the options \[2, 3, 4\], got \[2, 3\]",
    ),
    "a score that is missing": (("units", 0, "scores", {"kl": {"2": 1}}), r"model\.layers\.0\.qkv: scores\.kl must name the options"),
    "a kind of score that is missing": (("units", 0, "scores", {}), r"model\.layers\.0\.qkv: must have the scores \['kl'\], got \[\]"),
    "options out of order": (("options", [4, 3, 2]), r"options must ascend"),
    "an unknown key": (("unit", 1), "unit: Extra inputs are not permitted"),
    "no units": (("units", []), "units: Tuple should have at least 1 item"),
}


@pytest.mark.parametrize("which", FAULTS)
def test_a_faulty_plan_is_refused_by_place(which: str, tmp_path: Path) -> None:
    (*keys, last, value), message = FAULTS[which]
    path = tmp_path / "plan.json"
    allocation.write(plan(), path)
    plain = json.loads(path.read_text())
    place = plain
    for key in keys:
        place = place[key]
    place[last] = value
    path.write_text(json.dumps(plain))
    with pytest.raises(InputError, match=f"plan.json: is no plan .*{message}"):
        allocation.read(path)


@pytest.mark.parametrize(("text", "message"), [(None, "cannot be read"), ("{", "is not JSON"), ("[]", "is no plan"), ('"\xff"', "is no plan")])
def test_what_is_no_plan_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "plan.json").write_text(text)
    with pytest.raises(InputError, match=f"plan.json: {message}"):
        allocation.read(tmp_path / "plan.json")


# On the command line ----------------------------------------------------------------------------------------------------------------


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["allocate", *words])


def test_the_command_writes_the_plan_for_another_budget(tmp_path: Path) -> None:
    allocation.write(plan(), tmp_path / "plan.json")
    result = run(str(tmp_path / "plan.json"), "--average-bits", "3", "--out", str(tmp_path / "new.json"))
    assert result.exit_code == 0 and "qkv          4 3 2" in result.output
    assert "3.000 bits on average, 3.750 per weight as stored, 2.5 kB in all" in result.output
    assert "kl predicts 3.5; 12.5 with 2 bits everywhere, 4.75 with 3 bits everywhere, 2.125 with 4 bits everywhere" in result.output
    assert allocation.read(tmp_path / "new.json") == plan().solved(Budget(average_bits=3.0), None, "allocate")


def test_the_command_prints_json(tmp_path: Path) -> None:
    allocation.write(plan(), tmp_path / "plan.json")
    result = run(str(tmp_path / "plan.json"), "--tokens-per-second", "500", "--bandwidth", "1MB", "--json")
    assert [each["bits"] for each in json.loads(result.output)["units"]] == [4, 4, 3]
    assert json.loads(result.output)["figures"]["tokens_per_second"] == 1e6 / (500 + 500 + 900 + 100)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "error: allocate: has no budget; give one of average_bits, bits_per_weight, budget, tokens_per_second"),
        (["--budget", "many"], "error: allocate: must be a size such as 500MB or 12GiB"),
        (["--average-bits", "1"], "error: allocate: average_bits: 1.0 cannot be reached"),
        (["--average-bits", "3", "--score", "taylor"], "error: allocate: score: the plan has no scores 'taylor'; it has kl"),
        (["--average-bits", "3", "--out", "plan.json"], "error: plan.json: exists already; choose another --out"),
    ],
)
def test_the_command_says_what_is_wrong(words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    allocation.write(plan(), tmp_path / "plan.json")
    result = run("plan.json", *words)
    assert result.exit_code == Exit.BAD_INPUT and result.output.startswith(message)


def test_the_command_loads_no_torch(tmp_path: Path) -> None:
    allocation.write(plan(), tmp_path / "plan.json")
    code = (
        "import sys; from typer.testing import CliRunner; from compress.cli import app; "
        f"result = CliRunner().invoke(app, ['allocate', {str(tmp_path / 'plan.json')!r}, '--average-bits', '2.5']); "
        "print(result.exit_code, [name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0 []"
