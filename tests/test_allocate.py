"""Runs that allocate bits: what is chosen is what is stored, within the budget; a killed run measures nothing twice; faults are told early."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from test_run import KillAfter, Killed, compress, contents, weights
from torch import Tensor
from typer.testing import CliRunner

from compress import allocation, planning, recipe, sensitivity
from compress.checkpoint import Checkpoint
from compress.cli import app
from compress.errors import InputError
from compress.layout import Layout
from compress.model import Model
from compress.passes.allocate import Pass

QUICK: dict[str, Any] = {"calibration": {"samples": 4, "length": 24}, "evaluate": None}
ALLOCATE: dict[str, Any] = {"options": [2, 3, 8], "average_bits": 4, "samples": 2, "rounds": 0}
ALSO: dict[str, dict[str, Any]] = {
    "rtn": {"scales": "mse"},
    "gptq": {"min_tokens": 0, "fallback": "round"},
    "autoround": {"min_tokens": 0, "fallback": "round", "steps": 2},
}


def with_bits(name: str = "rtn", allocate: dict[str, Any] = ALLOCATE, **options: Any) -> dict[str, Any]:
    return QUICK | {"passes": [{"allocate": allocate}, {name: {"bits": "allocated", "group_size": 16} | ALSO[name] | options}]}


def checked(plain: dict[str, Any], folder: Path) -> list[str]:
    """What is wrong with a recipe for a model, as text."""
    with pytest.raises(InputError) as caught:
        recipe.check(recipe.validate(plain, "r.yaml"), Layout(Checkpoint(folder)), "r.yaml")
    return [str(problem) for problem in caught.value.problems]


def bits_of(result: dict[str, Any]) -> dict[str, int]:
    return {record["name"]: record["bits"] for record in result["linears"]}


@pytest.fixture(scope="module")
def made(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[dict[str, Any], Path]]:
    """Report and artifact by kind of model; each made once."""
    known: dict[str, tuple[dict[str, Any], Path]] = {}

    def make(kind: str = "llama") -> tuple[dict[str, Any], Path]:
        if kind not in known:
            out = tmp_path_factory.mktemp(kind) / "out"
            known[kind] = compress(with_bits(), checkpoint(kind), out), out
        return known[kind]

    return make


Made = Callable[..., tuple[dict[str, Any], Path]]


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "mixtral", "llava"])
def test_what_is_chosen_is_what_is_stored(kind: str, made: Made) -> None:
    result, out = made(kind)
    plan = allocation.read(out / "plan.json")
    assert bits_of(result) == plan.bits() and len(set(plan.chosen)) > 1
    assert result["verification"]["mode"] == "full"  # plain transformers computes the same logits
    assert json.loads((out / "manifest.json").read_text())["files"]["plan.json"]


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "llava"])
def test_the_sizes_of_a_plan_are_those_of_the_files(kind: str, made: Made) -> None:
    result, out = made(kind)
    plan = allocation.read(out / "plan.json")
    figures = plan.figures(plan.chosen)
    assert figures["average_bits"] <= 4 and figures["bits_per_weight"] == pytest.approx(result["size"]["bits_per_weight"], rel=1e-12)
    assert figures["budget"] == result["size"]["after_bytes"] == sum(tensor.nbytes for tensor in weights(out).values())


@pytest.mark.parametrize("name", ["gptq", "autoround"])
def test_every_pass_that_quantises_takes_allocated_bits(name: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    result = compress(with_bits(name), checkpoint("llama"), tmp_path / "out")
    assert bits_of(result) == allocation.read(tmp_path / "out" / "plan.json").bits() and {record["pass"] for record in result["linears"]} == {name}


def test_the_choice_diverges_no_more_than_any_candidate(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    steps = ALLOCATE | {"options": [2, 4, 6], "score": ["kl", "taylor", "pqi", "deltaloss"], "rounds": 2}
    compress(with_bits(allocate=steps), checkpoint("llama"), tmp_path / "out")
    plan = allocation.read(tmp_path / "out" / "plan.json")
    assert list(plan.measured) == ["uniform", "kl", "taylor", "pqi", "deltaloss", "round 1", "round 2"]
    assert plan.measured[plan.score] == min(plan.measured.values())
    assert set(plan.offsets) == set(plan.measured) - {"uniform"}


def test_one_option_is_uniform(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    options = {"options": [4], "average_bits": 4, "samples": 1, "rounds": 0}
    compress(with_bits(allocate=options), checkpoint("llama"), tmp_path / "one")
    compress(QUICK | {"passes": [{"rtn": {"bits": 4, "group_size": 16, "scales": "mse"}}]}, checkpoint("llama"), tmp_path / "other")
    one, other = weights(tmp_path / "one"), weights(tmp_path / "other")
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_passes_share_what_is_allocated(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    common = {"group_size": 16}
    steps: list[dict[str, dict[str, Any]]] = [
        {"allocate": {"options": [2, 4], "budget": 10**6, "samples": 1, "rounds": 0}},
        {"rtn": common | {"bits": "allocated", "include": ["*self_attn*"]}},
        {"gptq": common | {"bits": "allocated", "include": ["*0.mlp*"], "min_tokens": 0}},
        {"rtn": common | {"bits": 6, "include": ["*1.mlp*"]}},
    ]
    folder = checkpoint("llama")
    (message,) = checked(QUICK | {"passes": [{"allocate": {"options": [2, 4], "budget": 1}}, *steps[1:]]}, folder)
    smallest = int(re.search(r"the least is ([\d,]+);", message)[1].replace(",", ""))  # type: ignore[index]
    steps[0]["allocate"]["budget"] = smallest + 1000
    result = compress(QUICK | {"passes": steps}, folder, tmp_path / "out")
    plan = allocation.read(tmp_path / "out" / "plan.json")
    bits = bits_of(result)
    assert plan.bits().items() <= bits.items() and {name for name in bits if bits[name] == 6} == {name for name in bits if "1.mlp" in name}
    assert result["size"]["after_bytes"] == plan.figures(plan.chosen)["budget"] <= smallest + 1000


@pytest.mark.parametrize("rounding", ["recipe", "nearest"])
def test_what_is_measured_is_what_will_be_stored_or_plain_rounding(
    rounding: str, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded: dict[tuple[str, int], Tensor] = {}
    divergences = sensitivity.divergences

    def noting(model: Model, samples: Any, variants: Any, rounder: sensitivity.Rounder, base: Any) -> Any:
        with model.block(0) as block:
            rounded.update({(linear.name, bits): rounder(block, linear, bits).clone() for linear in block.layout.linears for bits in (2, 3, 8)})
        return divergences(model, samples, variants, rounder, base)

    monkeypatch.setattr(sensitivity, "divergences", noting)
    compress(with_bits("gptq", ALLOCATE | {"rounding": rounding}, qep=1.0), checkpoint("llama"), tmp_path / "out")
    for bits in (2, 3, 8):
        # GPTQ by itself: what it would make good for other linears depends on their bits.
        name, options = ("gptq", ALSO["gptq"]) if rounding == "recipe" else ("rtn", ALSO["rtn"])
        compress(QUICK | {"passes": [{name: {"bits": bits, "group_size": 16} | options}]}, checkpoint("llama"), tmp_path / str(bits))
        stored = Model(Layout(Checkpoint(tmp_path / str(bits))))
        names = [name for name, each in rounded if each == bits]
        assert names and all(stored.dense(name).float().equal(rounded[name, bits]) for name in names)


# Again ------------------------------------------------------------------------------------------------------------------------------


def test_a_second_run_gives_the_same_bytes(made: Made, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(with_bits(), checkpoint("llama"), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(made()[1])


TRIALS = 6
"""Reports of progress before anything is measured: two blocks in each of three options."""


@pytest.mark.parametrize("reports", [1, 4, TRIALS, TRIALS + 2, TRIALS + 3, TRIALS + 5])
def test_a_run_killed_while_it_measures_continues_to_the_same_bytes(
    reports: int, made: Made, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    note = sensitivity.Measurements._note

    def noting(self: Any, found: dict[str, list[float]]) -> None:
        measured.extend(found)
        note(self, found)

    monkeypatch.setattr(sensitivity.Measurements, "_note", noting)
    monkeypatch.setattr(sensitivity, "STREAMS_BYTES", 6 * 2 * 24 * 64 * 4)  # so that six variants go through the model together
    with pytest.raises(Killed):
        compress(with_bits(), checkpoint("llama"), tmp_path / "out", KillAfter(reports))
    assert bool(measured) == (reports >= TRIALS)
    compress(with_bits(), checkpoint("llama"), tmp_path / "out")
    assert len(measured) == len(set(measured))
    assert contents(tmp_path / "out") == contents(made()[1])


def test_a_plan_is_reused_without_measuring(made: Made, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "divergences", None)
    plain = with_bits(allocate={"reuse": str(made()[1] / "plan.json")}) | {"calibration": {"data": "no.txt"}}
    compress(plain, checkpoint("llama"), tmp_path / "out")
    one, other = weights(tmp_path / "out"), weights(made()[1])
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_a_plan_is_solved_again_as_the_command_solves_it(made: Made, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = str(made()[1] / "plan.json")
    assert CliRunner().invoke(app, ["allocate", path, "--average-bits", "2.5", "--out", str(tmp_path / "new.json")]).exit_code == 0
    compress(with_bits(allocate={"reuse": path, "average_bits": 2.5, "score": "kl"}), checkpoint("llama"), tmp_path / "one")
    compress(with_bits(allocate={"reuse": str(tmp_path / "new.json")}), checkpoint("llama"), tmp_path / "other")
    assert allocation.read(tmp_path / "one" / "plan.json").chosen == allocation.read(tmp_path / "other" / "plan.json").chosen
    assert allocation.read(tmp_path / "one" / "plan.json").figures(allocation.read(tmp_path / "one" / "plan.json").chosen)["average_bits"] <= 2.5


def test_an_edited_plan_does_not_continue_the_work_of_the_one_before(made: Made, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    plain = json.loads((made()[1] / "plan.json").read_text())
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plain))
    recipe_of = with_bits(allocate={"reuse": str(path)})
    with pytest.raises(Killed):
        compress(recipe_of, checkpoint("llama"), tmp_path / "out", KillAfter(1))
    for unit in plain["units"]:
        unit["bits"] = 8
    path.write_text(json.dumps(plain))
    result = compress(recipe_of, checkpoint("llama"), tmp_path / "out")
    assert set(bits_of(result).values()) == {8}


def test_a_plan_of_another_model_is_noted(made: Made, copy: Callable[..., Path], tmp_path: Path) -> None:
    notes: list[str] = []

    class Noting(tiny.Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    plain = json.loads((made()[1] / "plan.json").read_text())
    plain["origin"]["source"] = {"model.safetensors": "0"}
    (tmp_path / "plan.json").write_text(json.dumps(plain))
    folder = copy("llama")
    result = compress(with_bits(allocate={"reuse": str(tmp_path / "plan.json")}), folder, tmp_path / "out", Noting())
    assert notes == ["allocate: the scores of the plan were measured on another model"] and result["allocation"]["other_model"]


# Faults ------------------------------------------------------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no options": ({"average_bits": 3}, "passes[0].allocate: needs options, the bits to choose among, such as [2, 3, 4]"),
    "no budget": ({"options": [2, 4]}, "passes[0].allocate: needs a budget: one of average_bits, bits_per_weight, budget, tokens_per_second"),
    "two budgets": (ALLOCATE | {"budget": "1GB"}, "passes[0].allocate: average_bits and budget are two budgets; give one of"),
    "too few bits": (ALLOCATE | {"options": [1]}, "passes[0].allocate: options.0: input should be greater than or equal to 2"),
    "no option at all": (ALLOCATE | {"options": []}, "passes[0].allocate: options: list should have at least 1 item"),
    "an unknown score": (ALLOCATE | {"score": "mse"}, "passes[0].allocate: scores are kl, taylor, pqi, deltaloss, got {"),
    "options beside a plan": ({"reuse": "p", "options": [2]}, "passes[0].allocate: options cannot be given with reuse: they are those of the plan"),
    "two scores of a plan": ({"reuse": "p", "score": ["kl", "pqi"]}, "passes[0].allocate: takes one score with reuse, since nothing is measured"),
}


@pytest.mark.parametrize("which", MISTAKES)
def test_a_mistake_is_told_with_its_place(which: str) -> None:
    options, message = MISTAKES[which]
    with pytest.raises(InputError) as caught:
        recipe.validate(with_bits(allocate=options), "r.yaml")
    assert str(caught.value.problems[0]).startswith(f"r.yaml: {message}")


def test_bits_that_nobody_allocates_are_refused(checkpoint: Callable[..., Path]) -> None:
    plain = QUICK | {"passes": [{"rtn": {"bits": "allocated", "group_size": 16}}]}
    assert checked(plain, checkpoint("llama")) == [
        "r.yaml: passes[0].rtn: bits: no pass before it allocates any; put an allocate pass before it, or give a number"
    ]


def test_bits_that_nobody_takes_are_refused(checkpoint: Callable[..., Path]) -> None:
    plain = QUICK | {"passes": [{"allocate": ALLOCATE}, {"rtn": {"group_size": 16}}]}
    message = "r.yaml: passes[0].allocate: chooses bits that no pass behind it takes; set bits: allocated in a pass that quantises"
    assert checked(plain, checkpoint("llama")) == [message]


def test_two_allocations_are_refused(checkpoint: Callable[..., Path]) -> None:
    plain = with_bits()
    message = "r.yaml: passes[1].allocate: is the second pass that allocates bits; let one allocate them for all passes behind it"
    assert checked(plain | {"passes": [plain["passes"][0], *plain["passes"]]}, checkpoint("llama")) == [message]


def test_an_allocation_behind_a_pass_that_quantises_is_refused() -> None:
    with pytest.raises(InputError, match="allocate belongs to stage allocate, but comes after a pass of stage quantize"):
        recipe.validate(QUICK | {"passes": list(reversed(with_bits()["passes"]))}, "r.yaml")


def test_a_format_that_fixes_its_bits_takes_no_others() -> None:
    with pytest.raises(InputError, match="format nvfp4 fixes bits at 4, but bits is 'allocated'"):
        recipe.validate(with_bits(format="nvfp4"), "r.yaml")


def test_what_cannot_be_exported_mixed_is_refused_before_weights_load(checkpoint: Callable[..., Path]) -> None:
    message = "r.yaml: export: transformers opens asymmetric weights only where all linears share one scheme; set symmetric: true"
    assert checked(with_bits(symmetric=False), checkpoint("llama")) == [message]


@pytest.mark.parametrize(
    "budget", [{"average_bits": 1.5}, {"bits_per_weight": 2.9}, {"budget": "1MB"}, {"tokens_per_second": 1e6, "bandwidth": "1GB"}]
)
def test_a_budget_that_nothing_fits_into_is_refused_before_weights_load(budget: dict[str, Any], checkpoint: Callable[..., Path]) -> None:
    (message,) = checked(with_bits(allocate={"options": [2, 4]} | budget), checkpoint("llama"))
    assert message.startswith(f"r.yaml: passes[0].allocate: {next(iter(budget))}: ") and "cannot be reached" in message


def test_a_plan_that_does_not_fit_the_model_is_refused_before_weights_load(made: Made, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = made()[1] / "plan.json"
    (message,) = checked(with_bits(allocate={"reuse": str(path)}), checkpoint("llama-3-blocks"))
    assert f"{path} does not plan model.layers.2.down, model.layers.2.gate_up, model.layers.2.o as they are in" in message
    (message,) = checked(with_bits(allocate={"reuse": str(path)}, exclude=["*1.*.down_proj"]), checkpoint("llama"))
    assert f"{path} plans model.layers.1.down, which is no unit in" in message
    (message,) = checked(with_bits(allocate={"reuse": str(tmp_path / "no.json")}), checkpoint("llama"))
    assert message.endswith("no.json: cannot be read (No such file or directory); give the plan.json of an artifact")


def test_a_model_that_overflows_is_named(checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "_divergences", lambda model, samples, unchanged, streams: [float("nan")] * len(streams))
    with pytest.raises(InputError, match="allocate: the model overflows with 2 3 3 3 3 3 3 3 bits; leave the fewest bits out of options"):
        compress(with_bits(allocate={"options": [2, 3], "average_bits": 3}), checkpoint("llama"), tmp_path / "out")


# Before a run, and after ------------------------------------------------------------------------------------------------------------


def test_what_a_run_will_take_is_planned_for_the_most_bits_and_judged_for_a_mix(checkpoint: Callable[..., Path]) -> None:
    layout, chosen = Layout(Checkpoint(checkpoint("llama"))), recipe.validate(with_bits(), "r.yaml")
    planned = planning.plan(chosen, layout, recipe.check(chosen, layout, "r.yaml"))
    assert planned["size"]["bits_per_weight"] == 8 + 32 / 16 and planned["size"]["at_most"]
    assert planned["engines"]["vLLM"].startswith("GPU only: 2/3-bit")
    assert planned["passes"][0]["seconds"] > planned["passes"][1]["seconds"]


def test_rounding_each_option_beforehand_is_planned_for(checkpoint: Callable[..., Path]) -> None:
    layout = Layout(Checkpoint(checkpoint("llama")))
    own, nearest = (recipe.validate(with_bits("gptq", ALLOCATE | {"rounding": rounding}), "r.yaml") for rounding in ("recipe", "nearest"))
    with_trials, without = (planning.plan(each, layout, recipe.check(each, layout, "r.yaml"))["passes"] for each in (own, nearest))
    for what in ("seconds", "disk_bytes"):
        assert with_trials[0][what] - without[0][what] == pytest.approx(3 * without[1][what]) and with_trials[1] == without[1]


def test_decoding_reads_experts_that_are_routed_to_and_a_row_of_an_embedding(checkpoint: Callable[..., Path]) -> None:
    def draft(kind: str) -> tuple[allocation.Allocation, dict[str, int]]:
        layout = Layout(Checkpoint(checkpoint(kind)))
        step = recipe.validate(with_bits(), "r.yaml").instances()[0][1]
        assert isinstance(step, Pass)
        return step._draft(layout), {name: info.nbytes for name, info in layout.checkpoint.tensors.items()}

    plan, _ = draft("qwen3_moe")
    assert {unit.name: unit.read for unit in plan.units if unit.read < 1} == {"experts": 2 / 8}
    for kind, left_out in (("llama", "model.embed_tokens.weight"), ("llama-tied", None), ("llava", "language_model.model.embed_tokens.weight")):
        plan, sizes = draft(kind)
        unread = sum(count for name, count in sizes.items() if name == left_out or "vision" in name or "projector" in name)
        assert plan.rest.bytes - plan.rest.read == unread and (unread > 0) == (kind != "llama-tied")


def test_the_report_shows_the_front_and_the_units(made: Made) -> None:
    result, out = made()
    page = (out / "report.html").read_text()
    assert "Bits against predicted loss" in page and "Allocated bits: 8 units, and what" in page
    assert result["allocation"]["curve"][0][0] == 2 + 32 / 16 and page.count("<code>model.layers.1.gate_up</code>") == 1
