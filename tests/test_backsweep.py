"""Gradients of one block at a time are those of the whole model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from oracles import gradients as oracle
from torch import Tensor

from compress import backsweep as module
from compress import data
from compress.backsweep import backsweep, mean_loss
from compress.block import Block
from compress.checkpoint import Checkpoint
from compress.data import Sample, Samples
from compress.errors import InputError
from compress.layout import Layout
from compress.model import Model

KINDS = tiny.KINDS


def open_model(folder: Path) -> Model:
    return Model(Layout(Checkpoint(folder)))


def swept(model: Model, samples: Samples, folder: Path, **options: Any) -> dict[str, Tensor]:
    return {name: weight.clone() for found in backsweep(model, samples, folder, **options) for name, weight in found.weights.items()}


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


def partly_scored(image: bool = False) -> Samples:
    """Sequences of which the first third is not scored."""
    whole = tiny.samples(image=image)
    return Samples("random", tuple(replace(item, scored=torch.arange(len(item.ids)) >= len(item.ids) // 3) for item in whole.items))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_autograd_through_the_whole_model(kind: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder, samples = checkpoint(kind), partly_scored(image=kind == "llava")
    model, plain = open_model(folder), tiny.plain(folder)
    expected_loss = oracle.loss(plain, samples).item()
    losses = set()
    found = {}
    for each in backsweep(model, samples, tmp_path):
        losses.add(each.loss)
        found |= each.weights
    expected = oracle.of_weights(plain, model.layout, samples)
    assert list(found) == [linear.name for block in reversed(model.blocks) for linear in block.linears]
    assert all(near(found[name], expected[name]) for name in expected)
    assert losses == {mean_loss(model, samples)} and losses.pop() == pytest.approx(expected_loss, rel=1e-6)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_gradients_are_taken_at_the_weights_put_in(kind: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder, samples = checkpoint(kind), tiny.samples()
    model, plain = open_model(folder), tiny.plain(folder)
    changes = {
        name: 0.1 * torch.randn(linear.rows, linear.columns)
        for name, linear in model.layout.linears.items()
        if not name.endswith(("k_proj", ".3.up_proj"))
    }
    with torch.no_grad():
        for name, weight in oracle.weights(plain, model.layout).items():
            if name in changes:
                weight += changes[name]

    def changed(block: Block) -> dict[str, Tensor]:
        return {linear.name: block.weight(linear.name) + changes[linear.name] for linear in block.layout.linears if linear.name in changes}

    found = swept(model, samples, tmp_path, weights=changed)
    assert mean_loss(model, samples, changed) == pytest.approx(oracle.loss(plain, samples).item(), rel=1e-6)
    expected = oracle.of_weights(plain, model.layout, samples)
    assert found.keys() == changes.keys() and all(near(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("kind", ["llama", "mixtral", "llava"])
def test_gradients_in_outputs_are_those_of_autograd(kind: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder, samples = checkpoint(kind), partly_scored(image=kind == "llava")
    model, plain = open_model(folder), tiny.plain(folder)
    heard: dict[str, dict[int, Tensor]] = {}

    def listen(linear: str, batch: int, gradient: Tensor) -> None:
        heard.setdefault(linear, {})[batch] = gradient

    list(backsweep(model, samples, tmp_path, weights=module.none, outputs=listen))
    assert heard.keys() == {name for name in model.layout.linears if ".experts." not in name}
    for name in heard:
        expected = oracle.of_output(plain, name.replace(model.layout.arch.blocks, model.layout.arch.module_blocks, 1), samples)
        for number, batch in enumerate(samples.batches()):
            assert near(heard[name][number], torch.stack([expected[member] for member in batch.members])), name


@pytest.mark.parametrize("per_batch", [1, 30])
@pytest.mark.parametrize("kind", ["mistral", "qwen3_moe"])
def test_gradients_do_not_depend_on_the_batch_nor_on_how_many_logits_are_held(
    kind: str, per_batch: int, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = swept(open_model(checkpoint(kind)), tiny.samples(), tmp_path)
    monkeypatch.setattr(data, "TOKENS_PER_BATCH", per_batch)
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 7)
    parts = swept(open_model(checkpoint(kind)), tiny.samples(), tmp_path)
    assert all(near(parts[name], gradient) for name, gradient in whole.items())


def test_tokens_after_the_last_scored_one_change_nothing(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    plain = tiny.samples()
    padded = []
    for length, item in enumerate(plain.items):
        tail = torch.full((length,), 5)
        padded.append(Sample(torch.cat([item.ids, tail]), torch.cat([item.scored, tail < 0])))
    whole = swept(open_model(checkpoint("llama")), plain, tmp_path)
    found = swept(open_model(checkpoint("llama")), Samples("padded", tuple(padded)), tmp_path)
    assert all(near(found[name], gradient) for name, gradient in whole.items())


def test_sequences_without_a_scored_token_are_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="random: has no token whose prediction counts"):
        mean_loss(open_model(checkpoint("llama")), tiny.samples((1, 1)))


def test_a_gradient_that_overflows_is_refused_by_name(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    def huge(block: Block) -> dict[str, Tensor]:
        return {name: weight * 1e38 for name, weight in module.all_linears(block).items() if name.endswith("1.mlp.down_proj")}

    with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj: has a gradient that is not finite"):
        list(backsweep(open_model(checkpoint("llama")), tiny.samples(), tmp_path, weights=huge))
