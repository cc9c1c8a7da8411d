"""Healing: what is zero stays zero, what is kept is the best seen, and a killed training goes on to the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_run import compress, contents, weights

from compress import data, healing, recipe
from compress.checkpoint import Checkpoint, read_tensor
from compress.data import Sample, Samples
from compress.errors import InputError
from compress.layout import Layout
from compress.numerics.pattern import Pattern
from compress.numerics.sparsity import violations
from compress.whole import draw, rate

DATA: dict[str, Any] = {"calibration": {"samples": 12, "length": 32}, "evaluate": None}
NM = {"prune_nm": {"method": "magnitude"}}


def healed(before: list[Any], **options: Any) -> dict[str, Any]:
    return DATA | {"passes": [*before, {"heal": {"tokens": 800, "batch": 4, "learning_rate": 0.003} | options}]}


def outcome(out: Path) -> dict[str, Any]:
    report = json.loads((out / "report.json").read_text())
    return next(record for record in report["transforms"] if record["pass"] == "heal" and "loss" in record)


def linears(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights(folder).items() if name.endswith("proj.weight")}


@pytest.mark.parametrize("model", ["llama", "qwen3_moe", "mixtral"])
@pytest.mark.parametrize("options", [{}, {"train": "lora", "rank": 4, "learning_rate": 0.005, "tokens": 3000}], ids=["all", "lora"])
def test_zeros_stay_and_everything_else_learns(model: str, options: dict[str, Any], checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(DATA | {"passes": [NM]}, checkpoint(model), tmp_path / "pruned")
    compress(healed([NM], **options), checkpoint(model), tmp_path / "out")
    before, after = linears(tmp_path / "pruned"), linears(tmp_path / "out")
    changed = 0
    for name, weight in before.items():
        assert torch.equal(weight == 0, after[name] == 0)
        changed += not torch.equal(weight, after[name])
    assert changed > 0.5 * len(before)  # experts that nothing reached stay as they are
    first, best = outcome(tmp_path / "out")["loss"]
    assert best < first


def test_a_moving_mask_moves_and_keeps_the_pattern(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(DATA | {"passes": [NM]}, checkpoint("llama"), tmp_path / "pruned")
    compress(healed([NM], mask="moving", tokens=3000, decay=1.0), checkpoint("llama"), tmp_path / "out")
    before, after = linears(tmp_path / "pruned"), linears(tmp_path / "out")
    assert all(violations(weight, Pattern(2, 4)) == 0 for weight in after.values())
    assert any(not torch.equal(before[name] == 0, after[name] == 0) for name in before)


@pytest.mark.parametrize("mask", ["fixed", "moving"])
def test_a_branch_learns_beside_weights_that_keep_their_pattern(mask: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    start = {"tokens": 1, "learning_rate": 1e-9}
    found = {}
    for name, options in (("start", start), ("out", {"tokens": 3000})):
        compress(healed([NM], mask=mask, branch=16, **options), checkpoint("llama"), tmp_path / name)
        found[name] = Checkpoint(tmp_path / name).tensors
    assert all(violations(weight, Pattern(2, 4)) == 0 for weight in linears(tmp_path / "out").values())
    names = [name for name in found["out"] if name.endswith("branch_weight")]
    assert len(names) == 14 and all(not torch.equal(read_tensor(found["start"][name]), read_tensor(found["out"][name])) for name in names)
    assert outcome(tmp_path / "out")["loss"][1] < outcome(tmp_path / "start")["loss"][1]


def test_a_branch_that_does_no_good_is_left_at_zero(checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bad(removed: torch.Tensor, moment: torch.Tensor, size: int) -> torch.Tensor:
        return torch.full((len(removed), moment.shape[1]), 3.0)

    monkeypatch.setattr("compress.branching.least_squares", bad)
    compress(healed([NM], branch=16, tokens=1, learning_rate=1e-9), "demo:dense", tmp_path / "out")
    branches = [read_tensor(info) for name, info in Checkpoint(tmp_path / "out").tensors.items() if name.endswith("branch_weight")]
    assert branches and not any(bool(branch.any()) for branch in branches)
    first, best = outcome(tmp_path / "out")["loss"]
    assert first == best


def test_what_is_smaller_is_healed_too(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    cut = {"prune_structured": {"method": "magnitude", "keep": 0.5, "multiple_of": 16}}
    compress(healed([cut]), checkpoint("llama"), tmp_path / "out")
    first, best = outcome(tmp_path / "out")["loss"]
    assert best < first


def test_nothing_is_made_worse(tmp_path: Path) -> None:
    """At an absurd rate the best that was seen is where it began."""
    compress(DATA | {"passes": [NM]}, "demo:dense", tmp_path / "pruned")
    compress(healed([NM], learning_rate=50.0), "demo:dense", tmp_path / "out")
    before, after = linears(tmp_path / "pruned"), linears(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)
    first, best = outcome(tmp_path / "out")["loss"]
    assert best == first


@pytest.mark.parametrize(
    "options",
    [{}, {"mask": "moving"}, {"train": "lora"}, {"copies": 2}, {"branch": 16}, {"branch": 5, "mask": "moving", "branch_after": "merge"}],
    ids=["all", "moving", "lora", "copies", "branch", "merged"],
)
def test_a_killed_training_goes_on_to_the_same_weights(
    options: dict[str, Any], checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = healed([NM], tokens=1600, **options)
    compress(plain, checkpoint("llama"), tmp_path / "one")
    real, steps = healing._Healing._step, [0]

    def dies(self: Any, done: float) -> None:
        steps[0] += 1
        if steps[0] == 9:
            raise KeyboardInterrupt
        real(self, done)

    monkeypatch.setattr(healing._Healing, "_step", dies)
    with pytest.raises(KeyboardInterrupt):
        compress(plain, checkpoint("llama"), tmp_path / "out")
    compress(plain, checkpoint("llama"), tmp_path / "out")
    whole = outcome(tmp_path / "one")["steps"] * options.get("copies", 1)
    assert steps[0] < whole + 8  # it did not begin from the start
    assert contents(tmp_path / "out") == contents(tmp_path / "one") and outcome(tmp_path / "out") == outcome(tmp_path / "one")


def test_an_average_is_taken_only_where_it_helps(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(healed([NM], copies=3), checkpoint("llama"), tmp_path / "out")
    found = outcome(tmp_path / "out")
    assert len(found["copies"]) == 3 and found["loss"][1] <= min(found["copies"]) and 1 <= found["averaged"] <= 3
    assert all(violations(weight, Pattern(2, 4)) == 0 for weight in linears(tmp_path / "out").values())


def test_time_is_a_budget_too(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(healed([NM], tokens=None, minutes=0.02), checkpoint("llama"), tmp_path / "out")
    assert outcome(tmp_path / "out")["steps"] >= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": None}, "give either tokens or minutes"),
        ({"minutes": 1.0}, "give either tokens or minutes"),
        ({"rank": 4}, "rank: is read only with train: lora"),
        ({"decay": 0.1}, "decay: is read only with mask: moving"),
        ({"train": "lora", "mask": "moving"}, "adapters of low rank cannot say"),
        ({"copies": 2, "mask": "moving"}, "end up with different zeros"),
    ],
)
def test_what_does_not_fit_together_is_refused(options: dict[str, Any], message: str, checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(InputError) as caught:
        recipe.check(recipe.validate(healed([NM], **options), "r.yaml"), Layout(Checkpoint(checkpoint("llama"))), "r.yaml")
    assert message in str(caught.value)


def test_a_moving_mask_needs_a_pattern(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no linear has an N:M pattern"):
        compress(healed([], mask="moving"), checkpoint("llama"), tmp_path / "out")


@given(starts=st.lists(st.integers(0, 400), min_size=2, max_size=12), length=st.integers(8, 90), share=st.floats(0.05, 0.6))
def test_no_passage_is_trained_on_that_is_in_part_held_out(starts: list[int], length: int, share: float) -> None:
    samples = Samples("text", tuple(Sample.of(list(range(start, start + length))) for start in starts))
    held_out = starts[: max(1, round(share * len(starts)))]
    # numbers in a row overlap in as many tokens as their starts are apart from their length
    apart = [start for start in starts[len(held_out) :] if all(length - abs(start - other) < min(data.RUN, length) for other in held_out)]
    if not apart:
        with pytest.raises(InputError, match="leave none to train on that is not in part held out"):
            data.divided(samples, share, "heal")
        return
    learning, held = data.divided(samples, share, "heal")
    assert [int(item.ids[0]) for item in held.items] == held_out
    assert [int(item.ids[0]) for item in learning.items] == apart


def test_samples_are_drawn_for_it_alone_and_counted(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(healed([NM], samples=40), checkpoint("llama"), tmp_path / "out")
    counts = outcome(tmp_path / "out")["samples"]
    assert counts["held_out"] == 4 and counts["trained_on"] + counts["left_out"] == 36
    assert json.loads((tmp_path / "out" / "report.json").read_text())["calibration"]["sequences"] == 12


def test_every_sample_comes_once_before_any_comes_again() -> None:
    import tiny

    samples = tiny.samples((8,) * 7)
    seen: list[int] = []
    for step in range(2):
        chosen: Samples = draw(samples, 3, 0, step)
        seen += [next(index for index, item in enumerate(samples.items) if item is mine) for mine in chosen.items]
    assert len(set(seen)) == 6
    assert draw(samples, 99, 0, 0).tokens == samples.tokens


def test_the_rate_rises_then_falls() -> None:
    shares = [rate(step / 100) for step in range(101)]
    assert shares[0] == 0.01 and max(shares) == shares[10] == 1.0 and shares[100] == pytest.approx(0.01)
    assert all(one <= other for one, other in pairwise(shares[:11]))
    assert all(one >= other for one, other in pairwise(shares[10:]))
