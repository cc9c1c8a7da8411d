"""What is kept of a finished submodule changes nothing but the time a sweep takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from compress import replay
from compress.calibrate import Workspace, sweep
from compress.checkpoint import Checkpoint
from compress.layout import Layout
from compress.model import Model
from compress.numerics.grid import Integer, minmax_scales, quantized, round_to_nearest

KINDS = ("llama", "llama-bias", "mistral", "qwen2-sliding", "qwen3", "qwen3_moe-dense-first", "mixtral", "qwen2_moe", "olmoe", "deepseek_v3")
GRID = Integer(3, False)


def rounded(folder: Path, work: Path, note: Callable[[Any], None] = lambda inputs: None) -> dict[str, Tensor]:
    """Round every linear as a sweep passes it; Hessians by group."""
    work.mkdir()
    model, seen = Model(Layout(Checkpoint(folder))), {}
    for inputs in sweep(model, tiny.samples(), Workspace(work, tiny.Silent()), lambda group: True):
        note(inputs)
        for group, hessian in zip(inputs.groups, inputs.hessian, strict=True):
            seen[group.name] = hessian.clone()
            for linear in group.linears:
                weight, stored = inputs.block.weight(linear.name), inputs.block.stored_dtype(linear.name)
                scales = minmax_scales(weight, GRID, 16, stored)
                inputs.block.set_quantized(linear.name, quantized(round_to_nearest(weight, scales, GRID), scales, GRID, stored), {})
    return seen


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sweep_that_keeps_sees_what_one_that_computes_anew_sees(
    kind: str, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(kind)
    kept = rounded(folder, tmp_path / "kept")
    monkeypatch.setattr(replay, "KEPT_BYTES", 0)
    assert equal(kept, rounded(folder, tmp_path / "anew"))


def test_a_finished_submodule_is_not_computed_again(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    freed = {}

    def note(inputs: Any) -> None:
        freed[inputs.groups[0].name] = inputs.block.submodule("model.layers.1.self_attn.q_proj").weight.is_meta

    rounded(checkpoint("llama"), tmp_path / "work", lambda inputs: note(inputs) if inputs.block.layout.index else None)
    assert freed == {f"model.layers.1.{name}": done for name, done in (("qkv", False), ("o", True), ("gate_up", True), ("down", True))}


@pytest.mark.parametrize("parent", ["LlamaMLP", "LlamaAttention"])
def test_a_submodule_that_does_more_than_its_projection_is_computed_anew(
    parent: str, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    module = getattr(modeling_llama, parent)
    forward = module.forward

    def doubled(self: Any, *arguments: Any, **named: Any) -> Any:
        given = forward(self, *arguments, **named)
        return (given[0] * 2, given[1]) if isinstance(given, tuple) else given * 2

    monkeypatch.setattr(module, "forward", doubled)
    folder = checkpoint("llama")
    kept = rounded(folder, tmp_path / "kept")
    monkeypatch.setattr(replay, "KEPT_BYTES", 0)
    assert equal(kept, rounded(folder, tmp_path / "anew"))
