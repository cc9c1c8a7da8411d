"""The calibration walk backwards: exact gradients of the model's loss, one block at a time.

The data runs forward once, and only what each block is given is kept, on disk. Then, from the last block to the first, a block is run again
with gradients and turns the gradient of what it gave into those of its weights and of what it was given. That is the gradient of the whole
model, for the memory of one block and one boundary between blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.block import Block
from compress.checkpoint import entry, read_header, read_tensor, write_safetensors
from compress.data import Batch, Samples
from compress.errors import InputError
from compress.hardware import widened
from compress.layout import DOWN, EXPERTS_IN, EXPERTS_OUT
from compress.model import Model

LOGITS_AT_ONCE = 1024
"""Positions whose logits and their gradients are held at once; a vocabulary of 128k in float32 makes that a gigabyte."""

Weights = Callable[[Block], dict[str, Tensor]]
"""The weights [out, in] float32 that a block is to compute with in place of its own, by the name of the linear."""
Listener = Callable[[str, int, Tensor], None]
"""Is told the name of a linear, the number of a batch and the gradient of the mean loss in what the linear gives, [rows, tokens, out]."""


Watcher = Callable[[str, Tensor, Tensor], None]
"""Is told the name of a linear that ends an MLP or an expert, what it is given and the gradient of the sum of losses in that, [tokens, in]."""


@dataclass(frozen=True)
class Gradients:
    """What `backsweep` found of one block.

    ``weights`` [out, in] float32: the gradient of the mean loss in each of the weights the block computed with, by linear, the receiver's to
    overwrite; ``loss`` of the whole model, nats per token.
    """

    block: Block
    weights: dict[str, Tensor]
    loss: float


def all_linears(block: Block) -> dict[str, Tensor]:
    """The weights of every linear as they are."""
    return {linear.name: block.weight(linear.name) for linear in block.layout.linears}


def none(block: Block) -> dict[str, Tensor]:
    """No weights but the block's own."""
    return {}


@torch.no_grad()
def mean_loss(model: Model, samples: Samples, weights: Weights = none, advance: Callable[[], None] = lambda: None) -> float:
    """Mean cross-entropy of the next token over all scored tokens of `samples`, nats; `advance` is told of each block passed."""
    hidden, kwargs = model.embed_all(batch.inputs for batch in samples.batches())
    model.release()
    for layout in model.blocks:
        with model.block(layout.index) as block:
            _forward(block, weights(block), hidden, kwargs)
        advance()
    total = sum(summed_loss(model, batch, each) for batch, each in zip(samples.batches(), hidden, strict=True))
    model.release()
    return total / _scored(samples)


@torch.no_grad()
def backsweep(
    model: Model,
    samples: Samples,
    folder: Path,
    weights: Weights = all_linears,
    outputs: Listener | None = None,
    advance: Callable[[], None] = lambda: None,
    inner: Watcher | None = None,
) -> Iterator[Gradients]:
    """The gradient of the loss that `mean_loss` gives in each of `weights`, at those weights, from the last block to the first.

    `weights` is called twice per block, on the way there and on the way back, and must give the same both times. `outputs` is told the
    gradient in what each linear gives, if asked for; those of routed experts, which have no output of their own, are left out. `inner` is told of
    what lies inside MLPs and experts. What the blocks are given is kept in `folder` until it has been used. `advance` is told of each block
    passed, there and back.

    Raises `InputError` if no token is scored or a gradient overflows.
    """
    count = _scored(samples)
    hidden, kwargs = model.embed_all(batch.inputs for batch in samples.batches())
    model.release()
    for layout in model.blocks:
        write_safetensors(_boundary(folder, layout.index), [entry(str(number), each) for number, each in enumerate(hidden)], {})
        with model.block(layout.index) as block:
            _forward(block, weights(block), hidden, kwargs)
        advance()
    upstream = [torch.zeros_like(each) for each in hidden]
    batches = zip(samples.batches(), hidden, upstream, strict=True)
    loss = sum(summed_loss(model, batch, each, gradient) for batch, each, gradient in batches) / count
    del hidden
    model.release()
    for layout in reversed(model.blocks):
        path = _boundary(folder, layout.index)
        given, _ = read_header(path)
        with model.block(layout.index) as block, ExitStack() as listening:
            leaves = {name: weight.detach().requires_grad_() for name, weight in weights(block).items()}
            place = listening.enter_context(_listening(block, outputs, count)) if outputs else _Place()
            if inner:
                listening.enter_context(_inside(block, inner))
            for number in range(len(upstream)):
                place.batch = number
                inputs = read_tensor(given[str(number)]).to(model.device).requires_grad_()
                with torch.enable_grad():
                    torch.autograd.backward(block.forward_with(leaves, inputs, kwargs[number][layout.index]), upstream[number])
                assert inputs.grad is not None
                upstream[number] = inputs.grad
            # The sum over tokens was differentiated: the mean's gradients are so small that float16 would lose them.
            gradients = {name: _finite(name, leaf.grad).div_(count) for name, leaf in leaves.items()}
            yield Gradients(block, gradients, loss)
        path.unlink()
        advance()


def _scored(samples: Samples) -> int:
    count = sum(int(batch.scored[:, 1:].sum()) for batch in samples.batches())
    if not count:
        raise InputError.one(samples.source, "has no token whose prediction counts", "give sequences of at least two tokens")
    return count


def _boundary(folder: Path, index: int) -> Path:
    """Where what block `index` is given is kept."""
    return folder / f"given-{index:05d}.scratch"


def _forward(block: Block, weights: dict[str, Tensor], hidden: list[Tensor], kwargs: list[list[dict[str, Any]]]) -> None:
    """Replace what `block` is given, by batch, by what it gives with `weights`."""
    for number, each in enumerate(hidden):
        hidden[number] = block.forward_with(weights, each, kwargs[number][block.layout.index])


def summed_loss(model: Model, batch: Batch, hidden: Tensor, gradient: Tensor | None = None) -> float:
    """Sum of the losses for ``hidden`` [rows, tokens, hidden] after the last block; ``gradient``, of zeros, receives its gradient in that."""
    labels = batch.inputs["input_ids"].to(model.device)
    total = 0.0
    for part in torch.split(torch.nonzero(batch.scored[:, 1:].to(model.device)), LOGITS_AT_ONCE):
        row, place = part.unbind(1)
        label = labels[row, place + 1]
        states = hidden[row, place].requires_grad_(gradient is not None)
        with torch.set_grad_enabled(gradient is not None):
            loss = nn.functional.cross_entropy(model.logits(states), label, reduction="sum")
        if gradient is not None:
            (gradient[row, place],) = torch.autograd.grad(loss, states)
        total += float(loss)
    return total


class _Place:
    """Which batch is running."""

    batch = 0


@contextmanager
def _listening(block: Block, listener: Listener, count: int) -> Iterator[_Place]:
    """While inside, `listener` is told the gradients in what the linears of `block` give, which are of the sum over `count` tokens."""
    place = _Place()

    def watch(name: str) -> Any:
        def note(module: Any, arguments: Any, output: Any) -> None:
            if output.requires_grad:
                output.register_hook(lambda gradient: listener(name, place.batch, widened(gradient) / count))

        return block.submodule(name).register_forward_hook(note)

    stages = (stage for stage in block.layout.stages if stage.name not in (EXPERTS_IN, EXPERTS_OUT))
    handles = [watch(linear.name) for stage in stages for group in stage.groups for linear in group.linears]
    try:
        yield place
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _inside(block: Block, watcher: Watcher) -> Iterator[None]:
    """While inside, `watcher` is told what the linears that end MLPs and experts of `block` are given, and the gradients in that."""

    def watch(name: str, given: Tensor) -> None:
        if given.requires_grad:
            rows = given.detach().flatten(0, -2)
            given.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: watcher(name, rows, gradient.flatten(0, -2))
            )

    def around(name: str) -> Any:
        return block.submodule(name).register_forward_pre_hook(lambda _, arguments: watch(name, arguments[0]))

    dense = [linear.name for stage in block.layout.stages if stage.name == DOWN for group in stage.groups for linear in group.linears]
    handles = [around(name) for name in dense]
    try:
        with block.watching(watch) if block.layout.experts else nullcontext():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _finite(name: str, gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    if not bool(torch.isfinite(gradient).all()):
        raise InputError.one(name, "has a gradient that is not finite", "a model in float16 may need to be saved in bfloat16 or float32 first")
    return gradient
