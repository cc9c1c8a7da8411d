"""Learned rounding against plain rounding, brute force and what must be true of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from compress.calibrate import Workspace, train
from compress.checkpoint import Checkpoint
from compress.layout import Layout
from compress.model import Model
from compress.numerics.grid import Integer, round_to_nearest, search_scales
from compress.numerics.learned import Rounding
from compress.passes.autoround import Pass

GROUP = 8


def weights(seed: int = 0, count: int = 2, rows: int = 5, columns: int = 24) -> Tensor:
    return torch.randn(count, rows, columns, generator=torch.Generator().manual_seed(seed))


def learn(rounding: Rounding, loss: Callable[[Tensor], Tensor], steps: int) -> float:
    """The least loss seen."""
    best = float(loss(rounding.values().detach()))
    for step in range(steps):
        loss(rounding.values()).backward()
        rounding.step((1 - step / steps) / steps * 4)
        best = min(best, float(loss(rounding.values().detach())))
    return best


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_nothing_learned_is_plain_rounding_with_searched_scales(bits: int, symmetric: bool, stored: torch.dtype) -> None:
    weight, grid = weights(), Integer(bits, symmetric)
    rounding = Rounding(weight, grid, GROUP, stored)
    scales = rounding.scales()
    for place, each in enumerate(weight):
        found = search_scales(each, grid, GROUP, stored)
        assert torch.equal(scales.scale[place], found.scale) and torch.equal(scales.zero[place], found.zero)
        assert torch.equal(rounding.codes(scales)[place].to(torch.int8).flatten(-2), round_to_nearest(each, found, grid))


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_move_by_at_most_one_while_the_reach_stays(symmetric: bool) -> None:
    rounding = Rounding(weights(), Integer(3, symmetric), GROUP, torch.float32)
    before = rounding.codes(rounding.scales()).detach()
    for seed in range(20):
        rounding.offset.grad = torch.randn(rounding.offset.shape, generator=torch.Generator().manual_seed(seed))
        rounding.step(0.3)
    moved = (rounding.codes(rounding.scales()) - before).abs()
    assert float(moved.detach().max()) == 1


def test_uncorrelated_inputs_leave_plain_rounding_the_best() -> None:
    weight = weights(3, count=1)
    rounding = Rounding(weight, Integer(3, True), GROUP, torch.float32)
    rounding.reach.requires_grad_(False)

    def loss(values: Tensor) -> Tensor:
        return (values - weight).square().sum()

    at_start = float(loss(rounding.values().detach()))
    assert learn(rounding, loss, 50) == pytest.approx(at_start, rel=1e-6)


def gap_closed(seed: int) -> float:
    """On inputs so correlated that plain rounding is far from the best of all 4,096 ways to round: how much of the way there is made."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, 2, 6, generator=generator)
    inputs = torch.randn(40, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    rounding = Rounding(weight, Integer(2, True), 6, torch.float32)
    rounding.reach.requires_grad_(False)

    def loss(values: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        return (inputs[rows] @ (values - weight)[0].T).square().sum()

    scales = rounding.scales()
    ways = [round_.clamp(-2, 1) for round_ in (torch.floor(weight / scales.scale), torch.ceil(weight / scales.scale))]
    choices = (torch.tensor(way, dtype=torch.bool).view(1, 2, 6) for way in itertools.product((False, True), repeat=12))
    best = min(float(loss(torch.where(up, ways[1], ways[0]) * scales.scale)) for up in choices)
    start = reached = float(loss(rounding.values().detach()))
    for step in range(steps := 200):
        loss(rounding.values(), torch.randperm(40, generator=generator)[:8]).backward()
        rounding.step((1 - step / steps) * 2 / steps)
        reached = min(reached, float(loss(rounding.values().detach())))
    return 1.0 if start == best else (start - reached) / (start - best)


def test_what_is_learned_comes_near_the_best_of_all_ways_to_round() -> None:
    assert sum(map(gap_closed, range(6))) / 6 > 0.7


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_removed_weight_stays_zero_whatever_is_learned(symmetric: bool) -> None:
    kept = torch.rand(2, 5, 24) > 0.5
    weight, target = weights() * kept, weights(1)
    for mask in (kept, None):
        rounding = Rounding(weight, Integer(2, symmetric), GROUP, torch.float32, mask)
        for _ in range(20):
            (rounding.values() - target).square().sum().backward()
            rounding.step(0.3)
        learned = rounding.values().detach()
        assert not torch.equal(learned, Rounding(weight, Integer(2, symmetric), GROUP, torch.float32).values().detach())
        if mask is not None or symmetric:  # half a step takes a zero nowhere, unless it is a zero point that is odd
            assert not learned[~kept].any()
        else:
            assert learned[~kept].any()


def test_a_stored_scale_is_what_is_learned() -> None:
    rounding = Rounding(weights(), Integer(4, True), GROUP, torch.bfloat16)
    rounding.reach.grad = torch.ones_like(rounding.reach)
    rounding.step(0.013)
    scale = rounding.scales().scale
    assert torch.equal(scale, scale.to(torch.bfloat16).float())


def test_one_linear_can_be_made_plain_again() -> None:
    rounding = Rounding(weights(), Integer(3, False), GROUP, torch.float32)
    before = rounding.values().detach()
    rounding.offset.grad, rounding.reach.grad = torch.ones_like(rounding.offset), torch.ones_like(rounding.reach)
    rounding.step(0.4)
    rounding.forget(1)
    assert torch.equal(rounding.values()[1], before[1]) and not torch.equal(rounding.values()[0], before[0])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3_moe", "mixtral", "llava"])
def test_a_block_with_weights_put_in_is_the_block_that_has_them(kind: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model = Model(Layout(Checkpoint(checkpoint(kind))))
    samples = tiny.samples(image=kind == "llava")
    for trainable in train(model, samples, Workspace(tmp_path, tiny.Silent())):
        block, hidden, kwargs = trainable.block, trainable.inputs[0], trainable.kwargs[0]
        linears = list(block.layout.linears)[::2]
        expected = block.forward(hidden, kwargs)
        same = {linear.name: block.weight(linear.name) for linear in linears}
        assert torch.equal(block.forward_with(same, hidden, kwargs), expected)
        halved = {name: (weight / 2).requires_grad_() for name, weight in same.items()}
        given = block.forward_with(halved, hidden, kwargs)
        given.square().sum().backward()
        assert not torch.equal(given, expected) and all(weight.grad is not None for weight in halved.values())


def test_targets_are_what_the_unchanged_model_gives(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder, samples = checkpoint("llama"), tiny.samples()
    plain = tiny.plain(folder)
    step = Pass(bits=2, group_size=32, steps=2, min_tokens=0)
    for trainable in train(Model(Layout(Checkpoint(folder))), samples, Workspace(tmp_path, tiny.Silent())):
        step._learn(trainable, list(trainable.block.layout.linears))
        for batch, targets in zip(samples.batches(), trainable.targets, strict=True):
            with torch.no_grad():
                expected = plain.model(**batch.inputs, output_hidden_states=True, use_cache=False).hidden_states
            index = trainable.block.layout.index + 1
            if index < len(expected) - 1:  # the last is given after the final norm
                assert torch.allclose(targets, expected[index], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_training_lowers_the_loss_of_a_block(kind: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    step = Pass(bits=2, group_size=32, steps=20, rate=0.02, min_tokens=0)
    step.run(model := Model(Layout(Checkpoint(checkpoint(kind)))), tiny.samples(), Workspace(tmp_path, tiny.Silent()))
    for layout in model.blocks:
        records = model.adopt(tmp_path / f"block-{layout.index:05d}.safetensors")
        assert all(record["block_loss"][1] < record["block_loss"][0] for record in records)
