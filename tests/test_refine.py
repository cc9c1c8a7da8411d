"""Refining codes that other passes have found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_run import QUICK, compress, weights

from compress import recipe
from compress.calibrate import Workspace, train
from compress.checkpoint import Checkpoint
from compress.errors import InputError
from compress.layout import Layout
from compress.model import Model
from compress.numerics.grid import Integer, minmax_scales, quantized, round_to_nearest

BASE = {"gptq": {"bits": 2, "group_size": 32, "min_tokens": 0}}


def refined(steps: int, base: dict[str, Any] = BASE, **options: Any) -> dict[str, Any]:
    return QUICK | {"passes": [base, {"refine": {"steps": steps, **options}}]}


def test_no_steps_change_no_byte(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(refined(0), checkpoint("llama"), tmp_path / "refined")
    compress(QUICK | {"passes": [BASE]}, checkpoint("llama"), tmp_path / "base")
    one, other = weights(tmp_path / "refined"), weights(tmp_path / "base")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "mixtral"])
def test_blocks_come_closer_to_what_they_gave_before_quantising(kind: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    result = compress(refined(20) | {"verify": "full"}, checkpoint(kind), tmp_path / "out")
    losses = {tuple(record["block_loss"]) for record in result["linears"]}
    assert len(losses) == 2 and all(after < before for before, after in losses)
    assert {record["pass"] for record in result["linears"]} == {"gptq + refine"} and {record["bits"] for record in result["linears"]} == {2}


def test_the_target_is_the_model_before_quantising(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder, samples = checkpoint("llama"), tiny.samples()
    model = Model(Layout(Checkpoint(folder)))
    for index in range(2):
        with model.block(index) as block:
            for linear in block.layout.linears:
                block.set_dense(f"{linear.name}.weight", torch.zeros(linear.rows, linear.columns))  # a transform that only a fool would write
                weight = block.weight(linear.name)
                grid = Integer(4, True)
                scales = minmax_scales(weight, grid, 32, torch.float32)
                block.set_quantized(linear.name, quantized(round_to_nearest(weight + 1, scales, grid), scales, grid, torch.float32), {})
            block.save(tmp_path / f"{index}")
        model.adopt(tmp_path / f"{index}")
    exact = model.before_quantizing()
    name = next(iter(model.layout.linears))
    assert exact.quantized(name) is None and not exact.dense(name).any() and model.dense(name).any()
    trainables = train(model, samples, Workspace(tmp_path, tiny.Silent()), exact=True)
    first = next(trainables)
    # With all linears at zero a block gives what it is given.
    assert all(torch.equal(given, target) for given, target in zip(first.inputs, first.targets, strict=True))


@pytest.mark.parametrize(
    "base",
    [
        {"rtn": {"bits": 8, "group_size": "channel", "activations": "dynamic"}},
        {"rtn": {"bits": 3, "group_size": 32, "symmetric": False}},
        {"rtn": {"format": "nvfp4"}},
        {"rtn": {"format": "mxfp4"}},
        {"rtn": {"format": "fp8", "activations": "static"}},
    ],
    ids=str,
)
def test_every_scheme_can_be_refined(base: dict[str, Any], checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    result = compress(refined(10, base) | {"verify": "full"}, checkpoint("llama"), tmp_path / "out")
    assert result["verification"]["logits_max_difference"] < 1e-3


def test_the_seed_decides_the_batches_and_the_same_seed_gives_the_same_bytes(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        plain = refined(10, seed=seed, batches=1) | {"calibration": {"samples": 24, "length": 128}}
        compress(plain, checkpoint("llama"), tmp_path / name)
    one, same, other = (weights(tmp_path / name) for name in ("one", "same", "other"))
    assert all(torch.equal(one[name], same[name]) for name in one) and not all(torch.equal(one[name], other[name]) for name in one)


def test_there_must_be_codes_to_refine(checkpoint: Callable[..., Path]) -> None:
    chosen = recipe.validate({"passes": [{"refine": {}}, BASE]}, "r.yaml")
    with pytest.raises(InputError, match=r"passes\[0\]\.refine: no linear is quantised before it"):
        recipe.check(chosen, Layout(Checkpoint(checkpoint("llama"))), "r.yaml")
