"""Divergences of rounded models and influences of rounding errors are those of whole models, computed plainly."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from oracles import divergence, gradients
from torch import Tensor

from compress import data, demo, sensitivity
from compress.block import Block
from compress.checkpoint import Checkpoint
from compress.data import Samples, Tokenizer, calibration
from compress.errors import InputError
from compress.layout import Layout, Linear
from compress.model import Model
from compress.numerics.grid import Integer, minmax_scales, quantized, round_to_nearest
from compress.numerics.knapsack import Knapsack
from compress.sensitivity import Variant, divergences, influences

KINDS = ("llama", "llama-tied", "qwen2-sliding", "qwen3_moe", "mixtral", "llava")


def open_model(folder: Path) -> Model:
    return Model(Layout(Checkpoint(folder)))


def coarse(weight: Tensor, bits: int) -> Tensor:
    """The weight on a grid of so many bits, one scale for all."""
    step = weight.abs().max() / 2 ** (bits - 1)
    return (weight / step).round() * step


def rounded(block: Block, linear: Linear, bits: int) -> Tensor:
    return coarse(block.weight(linear.name), bits)


def partly_scored(image: bool) -> Samples:
    """Sequences of which the first third is not scored."""
    whole = tiny.samples(image=image)
    return Samples("random", tuple(replace(item, scored=torch.arange(len(item.ids)) >= len(item.ids) // 3) for item in whole.items))


def diverged(*arguments: Any) -> dict[int, float]:
    """Each divergence by the number of its variant."""
    return {number: value for turn in divergences(*arguments) for number, value in turn.items()}


def variants_of(model: Model) -> list[Variant]:
    """Everything; the last block's MLP; one linear of the first block."""
    names = list(model.layout.linears)
    return [dict.fromkeys(names, 3), dict.fromkeys([name for name in names if ".layers.1." in name and "attn" not in name], 2), {names[3]: 2}]


@pytest.mark.parametrize("kind", KINDS)
def test_divergences_are_those_of_the_whole_rounded_model(kind: str, checkpoint: Callable[..., Path]) -> None:
    folder, samples = checkpoint(kind), partly_scored(image=kind == "llava")
    model, meant = open_model(folder), tiny.plain(folder)
    variants = variants_of(model)
    found = diverged(model, samples, variants, rounded, {})
    assert sorted(found) == [0, 1, 2]
    for number, variant in enumerate(variants):
        given = tiny.plain(folder)
        with torch.no_grad():
            for name, weight in gradients.weights(given, model.layout).items():
                if name in variant:
                    weight.copy_(coarse(weight, variant[name]))
        assert found[number] == pytest.approx(divergence.between(meant, given, samples), rel=1e-4)


@pytest.mark.parametrize("kind", ["llama-3-blocks", "qwen3_moe"])
def test_what_is_common_to_variants_changes_nothing(kind: str, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = open_model(checkpoint(kind)), tiny.samples()
    base = dict.fromkeys(model.layout.linears, 3)
    down = [name for name in base if name.endswith("down_proj")]
    variants = [base | {name: bits} for name in down[::5] for bits in (2, 4)] + [base]
    apart = diverged(model, samples, variants, rounded, {})
    (together,) = divergences(model, samples, variants, rounded, base)
    monkeypatch.setattr(sensitivity, "STREAMS_BYTES", 1)
    one_by_one = list(divergences(model, samples, variants, rounded, base))
    assert together == apart == {number: value for turn in one_by_one for number, value in turn.items()} and len(one_by_one) == len(variants)
    first = [next((int(name.split(".")[2]) for name in base if variant[name] != base[name]), 0) for variant in variants]
    assert [first[number] for turn in one_by_one for number in turn] == sorted(first)


def test_divergences_do_not_depend_on_the_batch(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, variants = open_model(checkpoint("llama")), [dict.fromkeys(["model.layers.0.mlp.down_proj"], 2)]
    whole = diverged(model, tiny.samples(), variants, rounded, {})
    monkeypatch.setattr(data, "TOKENS_PER_BATCH", 1)
    monkeypatch.setattr(sensitivity, "LOGITS_AT_ONCE", 7)
    assert diverged(model, tiny.samples(), variants, rounded, {}) == pytest.approx(whole, rel=1e-5)


def test_an_unchanged_model_does_not_diverge(checkpoint: Callable[..., Path]) -> None:
    assert diverged(open_model(checkpoint("llama")), tiny.samples(), [{}], rounded, {}) == {0: 0.0}


def test_sequences_without_a_scored_token_are_refused(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="random: has no token whose prediction counts"):
        diverged(open_model(checkpoint("llama")), tiny.samples((1, 1)), [{}], rounded, {})


@pytest.mark.parametrize("along", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_influences_are_gradients_along_the_way_times_the_errors(along: float, kind: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder, samples = checkpoint(kind), tiny.samples()
    model = open_model(folder)
    variants = [dict.fromkeys(model.layout.linears, bits) for bits in (3, 5)]
    for found, variant in zip(influences(model, samples, variants, rounded, along=along, folder=tmp_path), variants, strict=True):
        plain, changes = tiny.plain(folder), {}
        with torch.no_grad():
            for name, weight in gradients.weights(plain, model.layout).items():
                changes[name] = coarse(weight, variant[name]) - weight
                weight += along * changes[name]
        at = gradients.of_weights(plain, model.layout, samples)
        assert found == pytest.approx({name: float((at[name] * changes[name]).abs().sum()) for name in changes}, rel=1e-3)
    assert not list(tmp_path.iterdir())


# On a trained model -----------------------------------------------------------------------------------------------------------------

OPTIONS = (2, 3, 4)


class Trained:
    """The demonstration model with a little text, plain rounding that remembers, and what one unit in other bits than 3 changes."""

    def __init__(self) -> None:
        self.model = open_model(demo.path("dense"))
        self.samples = calibration("demo:text", 4, 64, 0, Tokenizer(demo.path("dense")))
        self.units = [[linear.name for group in stage.groups for linear in group.linears] for block in self.model.blocks for stage in block.stages]
        self._known: dict[tuple[str, int], Tensor] = {}
        base = self.variant([3] * len(self.units))
        single = [base | dict.fromkeys(names, bits) for names in self.units for bits in OPTIONS]
        found = diverged(self.model, self.samples, single, self.rounded, base)
        self.costs = [[found[3 * place + option] - found[1] for option in range(3)] for place in range(len(self.units))]

    def variant(self, choice: Sequence[int]) -> Variant:
        return {name: bits for bits, names in zip(choice, self.units, strict=True) for name in names}

    def rounded(self, block: Block, linear: Linear, bits: int) -> Tensor:
        if (linear.name, bits) not in self._known:
            weight, grid = block.weight(linear.name), Integer(bits, False)
            scales = minmax_scales(weight, grid, 64, torch.float32)
            self._known[linear.name, bits] = quantized(round_to_nearest(weight, scales, grid), scales, grid, torch.float32).dequantize()
        return self._known[linear.name, bits]

    def measured(self, choices: Sequence[Sequence[int]]) -> list[float]:
        found = diverged(self.model, self.samples, [self.variant(choice) for choice in choices], self.rounded, {})
        return [found[number] for number in range(len(choices))]

    def chosen(self, costs: list[list[float]], average_bits: float) -> list[int]:
        linears = self.model.layout.linears
        weights = [sum(linears[name].rows * linears[name].columns for name in names) for names in self.units]
        solver = Knapsack([[count * bits for bits in OPTIONS] for count in weights], costs)
        return [OPTIONS[option] for option in solver.choose(int(average_bits * sum(weights)))]


@pytest.fixture(scope="module")
def trained() -> Trained:
    return Trained()


def spearman(one: list[float], other: list[float]) -> float:
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def test_the_sum_of_single_divergences_ranks_random_allocations(trained: Trained) -> None:
    rng = random.Random(0)
    choices = [[rng.choice(OPTIONS) for _ in trained.units] for _ in range(12)]
    predicted = [sum(costs[bits - 2] for bits, costs in zip(choice, trained.costs, strict=True)) for choice in choices]
    assert spearman(predicted, trained.measured(choices)) >= 0.6


def test_divergences_allocate_better_than_squared_errors_of_weights(trained: Trained) -> None:
    errors = {}
    for layout in trained.model.blocks:
        with trained.model.block(layout.index) as block:
            for linear in layout.linears:
                weight = block.weight(linear.name)
                errors[linear.name] = [float((trained.rounded(block, linear, bits) - weight).square().sum()) for bits in OPTIONS]
    squared = [[sum(errors[name][option] for name in names) for option in range(3)] for names in trained.units]
    ours, theirs, uniform = trained.measured([trained.chosen(trained.costs, 2.5), trained.chosen(squared, 2.5), [2] * len(trained.units)])
    assert ours < 0.8 * theirs and ours < uniform
