"""Runs beside each other: fronts beside an oracle, what differs, what is refused, and a page that stands alone."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from oracles import pareto
from test_report import Page, dense, moe
from typer.testing import CliRunner

from compress import compare, plots
from compress.cli import app
from compress.compare import ABSENT, Run, differences, front
from compress.errors import InputError
from compress.report import SCHEMA, comparison, write

HASH = "48bae52eb7f1c02e17d86e50614b5626a2057778262eb0d97de469d094cf0a44"


def report(**changes: Any) -> dict[str, Any]:
    """A report of a run of one and the same model."""
    named = {"schema": SCHEMA, "source": {"name": "demo:dense", "sha256": {"model.safetensors": HASH}}, "command": "compress run w4 demo:dense"}
    return dense(**named, **changes)


def measured(after: float | None, bits: float | None, ratio: float | None, kl: float | None, **changes: Any) -> dict[str, Any]:
    found = report(**changes)
    found["size"] |= {"after_bytes": after, "bits_per_weight": bits}
    found["evaluation"] = deepcopy(found["evaluation"])
    for name, value in (("perplexity_ratio", ratio), ("kl", kl)):
        found["evaluation"]["figures"][name] = value
        found["evaluation"]["intervals"][name] = [None, None] if value is None else [value * 0.99, value * 1.01]
    return found


def saved(folder: Path, result: dict[str, Any]) -> Path:
    folder.mkdir()
    write(result, folder)
    return folder


def page(runs: list[Run]) -> Page:
    return Page(comparison.page(compare.compare(runs)))


VALUES = st.one_of(st.none(), st.sampled_from([0.0, 1.0, 2.0]), st.floats(-10, 10))


@given(st.lists(st.tuples(VALUES, VALUES), max_size=12))
@example([])
@example([(1.0, 1.0), (1.0, 1.0)])
@example([(1.0, 2.0), (1.0, 1.0), (2.0, 1.0)])
@example([(None, None)])
def test_the_front_is_what_comparing_all_pairs_finds(points: list[tuple[float | None, float | None]]) -> None:
    assert front(points) == pareto.front(points)


def test_runs_that_are_beaten_are_told_by_which() -> None:
    runs = [Run("small", measured(1e6, 2.0, 1.5, 0.5)), Run("worse", measured(2e6, 4.0, 1.6, 0.4)), Run("best", measured(2e6, 4.0, 1.01, 0.01))]
    result = compare.compare(runs)
    assert result["fronts"]["after_bytes"] == {"perplexity_ratio": ["small", "best"], "kl": ["small", "best"]}
    assert result["beaten"]["after_bytes"]["kl"] == {"worse": {"by": "best", "noise": False}}
    assert [comparison.worth(name, result) for name in ("small", "worse")] == [("on the front", "good"), ("beaten by best", "plain")]


def test_runs_whose_intervals_overlap_are_within_noise() -> None:
    runs = [Run("a", measured(1e6, 2.0, 1.5, 0.5)), Run("b", measured(1e6, 2.0, 1.501, 0.501))]
    result = compare.compare(runs)
    assert result["beaten"]["after_bytes"]["kl"] == {"b": {"by": "a", "noise": True}}
    assert comparison.worth("b", result) == ("beaten by a, within noise", "noise")


def test_fronts_that_disagree_are_told_apart() -> None:
    result = compare.compare([Run("a", measured(1e6, 2.0, 1.5, 0.9)), Run("b", measured(1e6, 2.0, 1.7, 0.5))])
    assert comparison.worth("a", result) == ("on the front by perplexity; else beaten by b", "noise")


def test_equal_runs_are_both_on_the_front() -> None:
    result = compare.compare([Run("a", measured(1e6, 2.0, 1.5, 0.9)), Run("b", measured(1e6, 2.0, 1.5, 0.9))])
    assert result["fronts"]["bits_per_weight"]["kl"] == ["a", "b"] and result["recipes"] == []


SIZES, LOST = st.one_of(st.none(), st.just(1.0), st.floats(1e-6, 1e12)), st.one_of(st.none(), st.floats(1e-9, 1e9))


@given(st.lists(st.tuples(SIZES, SIZES, LOST, LOST), min_size=1, max_size=5))
@example([(None, None, None, None)])
@example([(1e6, 4.0, 1.0, 0.0)])
@example([(1e6, 4.0, 0.99, 1e-12), (1e6, 4.0, 1.5, 0.5)])
def test_odd_figures_still_make_a_page(rows: list[tuple[float | None, float | None, float | None, float | None]]) -> None:
    runs = [Run(f"run {index}", measured(*row, accepted=None if index == 1 else index == 2)) for index, row in enumerate(rows)]
    found = page(runs)
    assert "None" not in found.text and not re.search(r"\bnan\b|\binf\b", found.text)
    assert "NaN" not in json.dumps(compare.compare(runs), allow_nan=False)


def test_options_that_differ_are_told_and_others_not() -> None:
    one = {"calibration": {"seed": 0, "samples": 8}, "passes": [{"gptq": {"bits": 4, "qep": 0.0, "exclude": []}}]}
    other = {"calibration": {"seed": 0, "samples": 16}, "passes": [{"smooth": {"alpha": 0.5, "clip": False}}, {"gptq": {"bits": 3, "qep": 0.0}}]}
    recipes = [one | {"gates": {"kl": {"max": 1, "min": None}}}, other]
    assert {row["key"]: row["values"] for row in differences(recipes)} == {
        "passes": ["gptq", "smooth, gptq"],
        "calibration.samples": ["8", "16"],
        "gates.kl.max": ["1", ABSENT],
        "gptq.bits": ["4", "3"],
        "gptq.exclude": ["[]", ABSENT],
        "smooth": [ABSENT, "alpha: 0.5"],
    }
    assert differences([recipes[0]]) == differences([recipes[0], recipes[0]]) == differences([{}, {}]) == []


def test_two_passes_of_a_name_are_compared_in_order() -> None:
    recipes = [{"passes": [{"smooth": {"alpha": 0.5}}, {"smooth": {"alpha": value}}]} for value in (0.1, 0.2)]
    assert differences(recipes) == [{"key": "smooth (2).alpha", "values": ["0.1", "0.2"]}]


def test_errors_of_weights_and_of_outputs_are_kept_apart() -> None:
    rounded = report()
    for record in rounded["linears"]:
        record["pass"] = "rtn"
    errors = compare.compare([Run("gptq", report()), Run("rtn", rounded)])["errors"]
    assert {what: list(runs) for what, runs in errors.items()} == {"outputs, on calibration data": ["gptq"], "weights": ["rtn"]}
    assert errors["weights"]["rtn"] == pytest.approx({0: 0.001, 1: 0.002, 2: 0.003, 3: 0.004})


def test_the_page_has_every_section_and_needs_nothing() -> None:
    failed = measured(3e6, 3.0, 1.2, 0.3, accepted=False, recipe={"passes": [{"rtn": {"bits": 3}}]})
    html = comparison.page(compare.compare([Run("good", report()), Run("<bad>", failed)]))
    found = Page(html)
    for section in ("runs", "front", "recipes", "gates", "errors", "engines", "costs", "origins"):
        assert ("h2", "id", section) in found.attributes and ("a", "href", f"#{section}") in found.attributes
    assert not re.search(r"https?:|//[a-z]|@import|url\(", html) and "<bad>" not in html and "default-src 'none'" in html
    assert "not accepted" in found.text and "compress run w4 demo:dense" in found.text and HASH in found.text
    drawn = [[value for tag, name, value in found.attributes if tag == "svg" and name == key] for key in ("role", "aria-label")]
    assert len(drawn[0]) == len(drawn[1]) == html.count("<svg") and all(drawn[1])
    assert found.titles[:4] == ["Perplexity against size", "Perplexity against bits", "KL divergence against size", "KL divergence against bits"]
    assert not {tag for tag, name, _ in found.attributes if name.startswith("on") or name in ("src", "srcset")}


def test_one_run_and_runs_without_evaluation_make_a_page() -> None:
    assert "1 run of one model" in " ".join(page([Run("alone", report())]).text.split())
    bare = [Run(name, report(evaluation=None, gates=[]) | {"linears": []}) for name in ("a", "b")]
    found = page(bare)
    assert "none of them evaluated" in found.text and found.titles == [] and found.text.count("not measured") >= 8


def test_experts_and_many_blocks_are_drawn() -> None:
    many = moe(12, 4) | {"schema": SCHEMA, "source": {"name": "m", "sha256": {"a": HASH}}}
    assert "Relative error of outputs" in page([Run("a", many), Run("b", many)]).titles


def test_a_run_has_one_colour_wherever_it_is_drawn() -> None:
    """Errors of outputs and of weights are in plots of their own, of fewer runs than the plots of the frontier."""
    runs = [Run(f"run{index}", report()) for index in range(14)]
    for run in runs[::2]:
        for record in run.report["linears"]:
            record["pass"] = "rtn"
    html = comparison.page(compare.compare(runs))
    for index, run in enumerate(runs):
        shade = plots.shade_of(index)
        assert html.count(f'<i class="{shade}"></i>{run.name}<') == 3, "in the table and in two keys"
    outputs = html[html.index("<h3>Relative error of outputs") :]
    drawn = re.findall(r'<path class="line (c\d(?: again)?)"', outputs[: outputs.index("</svg>")])
    assert drawn == [plots.shade_of(index) for index in range(1, 14, 2)]
    assert len({plots.shade_of(index) for index in range(12)}) == 12


def test_many_lines_are_named_in_the_key_alone() -> None:
    many, few = ([Run(f"run{index}", report()) for index in range(count)] for count in (plots.MOST_NAMES + 1, plots.MOST_NAMES))
    for runs, expected in ((many, 0), (few, len(few))):
        drawn = comparison.page(compare.compare(runs)).partition("<h3>Relative error of")[2].partition("</svg>")[0]
        assert drawn.count('class="name"') == expected


@given(st.lists(st.tuples(st.floats(0, 1e3), st.floats(1e-6, 1e3), st.booleans()), min_size=1, max_size=8))
def test_points_lie_within_the_plot_and_names_do_not_touch(places: list[tuple[float, float, bool]]) -> None:
    points = [plots.Point(f"run{index}", x, y, (y * 0.9, y * 1.1), index, best) for index, (x, y, best) in enumerate(places)]
    svg = str(plots.scatter(points, ("size", "loss"), (str, str), "a plot"))
    found = re.findall(r'<rect class="point c\d(?: again)? (?:best|beaten)" x="([-\d.]+)" y="([-\d.]+)" width="10" height="10" rx="[05]"/>', svg)
    circles = [(float(x) + 5, float(y) + 5) for x, y in found]
    assert len(circles) == len(points)
    assert all(60 <= x <= plots.WIDTH and plots.TOP - 1 <= y <= plots.BASE + 1 for x, y in circles)
    names = [(float(x), float(y), len(name) * plots.LETTER) for x, y, name in re.findall(r'class="name" x="([-\d.]+)" y="([-\d.]+)">([^<]+)<', svg)]
    for index, (x, y, width) in enumerate(names):
        assert x >= 60 and x + width <= plots.WIDTH
        assert all(x + width <= left + 0.2 or left + wide <= x + 0.2 or abs(y - up) >= plots.LINE - 0.2 for left, up, wide in names[:index])


# What is read and what is refused -------------------------------------------------------------------------------------------


def test_folders_and_files_are_read_and_named_apart(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    one, two = saved(tmp_path / "w4", report()), saved(tmp_path / "x" / "w4", report())
    loose = tmp_path / "loose.json"
    loose.write_text((one / "report.json").read_text())
    assert [run.name for run in compare.read([one, two / "report.json"])] == [f"{tmp_path.name}/w4", "x/w4"]
    assert [run.name for run in compare.read([one, loose])] == ["w4", "loose.json"]


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    good = saved(tmp_path / "good", report())
    other = report()
    other["source"] = {"name": "else", "sha256": {"model.safetensors": "ab" * 32}}
    protocol = report(model="demo:dense")
    protocol["evaluation"] = deepcopy(protocol["evaluation"])
    protocol["evaluation"]["protocol"] |= {"context": 256, "tokens_sha256": "cd" * 32}
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.json").write_text("no JSON")
    (tmp_path / "list.json").write_text("[]")
    places = [
        good, saved(tmp_path / "other", other), saved(tmp_path / "protocol", protocol), saved(tmp_path / "blind", report(evaluation=None)),
        saved(tmp_path / "old", report() | {"schema": 0}), tmp_path / "empty", tmp_path / "none", tmp_path / "text.json", tmp_path / "list.json",
        good / "report.json",
    ]  # fmt: skip
    with pytest.raises(InputError) as caught:
        compare.read(places)
    told = {problem.place.removeprefix(f"{tmp_path}/"): problem.what for problem in caught.value.problems}
    assert told == {
        "other": "compressed demo:dense (sha256 abababababab), good demo:dense (sha256 48bae52eb7f1)",
        "protocol": "was evaluated otherwise than good: context 256 instead of 512, tokens_sha256 cdcdcdcdcdcd instead of none",
        "blind": "was not evaluated, good was",
        "old/report.json": f"has schema 0, this version reads {SCHEMA}",
        "empty": "has no report.json",
        "none": "is no file or folder",
        "text.json": "is not JSON",
        "list.json": "is no report of compress run",
        "good/report.json": f"is listed twice, first as {good}",
    }


def test_retrieval_measured_otherwise_is_another_protocol(tmp_path: Path) -> None:
    reports = []
    for seed in (0, 1):
        each = report()
        each["evaluation"] = each["evaluation"] | {"retrieval": {"task": "lines", "cases": 2, "seed": seed, "tokens_sha256": "ab" * 32}}
        reports.append(saved(tmp_path / f"run{seed}", each))
    with pytest.raises(InputError, match="retrieval seed 1 instead of 0"):
        compare.read(reports)


def test_the_command_prints_and_writes(tmp_path: Path) -> None:
    runs = [str(saved(tmp_path / name, measured(size, bits, 1.02, 0.02, accepted=accepted)))
            for name, size, bits, accepted in (("w4", 4e6, 4.125, True), ("w8", 8e6, 8.25, False))]  # fmt: skip
    out = tmp_path / "all.html"
    done = CliRunner().invoke(app, ["compare", *runs, "--html", str(out)])
    assert done.exit_code == 0, done.output
    assert "NOT ACCEPTED" in done.stdout and "on the front" in done.stdout and "1.0200 [1.0098, 1.0302]" in done.stdout
    assert "beaten by w4, within noise" in " ".join(done.stdout.split()) and Page(out.read_text()).titles
    again = CliRunner().invoke(app, ["compare", *runs, "--html", str(out)])
    assert again.exit_code == 2 and "exists already; choose another --html" in again.stderr
    plain = CliRunner().invoke(app, ["compare", *runs, "--json"])
    assert [run["name"] for run in json.loads(plain.stdout)["runs"]] == ["w4", "w8"]


def test_bad_runs_exit_with_two_and_write_nothing(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--html", str(tmp_path / "out.html")])
    assert done.exit_code == 2 and done.stderr.count("is no file or folder") == 2 and not list(tmp_path.iterdir())
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "a"), "--json"])
    assert done.exit_code == 2 and json.loads(done.stdout)["errors"][0]["what"] == "is no file or folder"


def test_runs_without_figures_print_too(tmp_path: Path) -> None:
    bare = saved(tmp_path / "bare", measured(None, None, None, None, seconds=None, peak_bytes=None, accepted=None, gates=None, engines=None))
    done = CliRunner().invoke(app, ["compare", str(bare)])
    assert done.exit_code == 0, done.output
    assert "not measured" in done.stdout and "not judged" in done.stdout
