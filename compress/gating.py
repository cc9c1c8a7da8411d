"""Learn which units of a model can go, with all weights as they are (DDP, arXiv 2603.08065).

One gate per unit scales what the unit gives on. Gates are trained so that the gated model stays near the model as it was and to the text, while
the share of the units that are still there comes down to what it is to be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from compress.block import Block
from compress.calibrate import Progress
from compress.data import Samples
from compress.expert_forward import Change
from compress.layout import Units
from compress.model import Model
from compress.numerics.gates import LOWEST, Multipliers, gate, in_order, middle, retention
from compress.whole import Distillation, Training, Whole, draw, opened, rate, scored

SAVED_EVERY = 25
"""Steps after which a killed run starts again."""
SETTLING = 4
"""One in so many steps is kept for the scales of the units that stay."""


@dataclass(frozen=True)
class Options:
    """How gates are trained: so many steps on so many samples each; ``divergence`` weighs the KL divergence from the model as it was."""

    steps: int
    batch: int
    learning_rate: float
    divergence: float
    seed: int


@dataclass(frozen=True)
class Scope:
    """Units that are to be brought down together to the share ``keep``."""

    units: tuple[Units, ...]
    keep: float


def learn(
    model: Model,
    samples: Samples,
    scopes: Mapping[str, Scope],
    options: Options,
    path: Path,
    progress: Progress,
    worth: Mapping[str, Tensor],
    means: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """The gates of all units after training, [count] float32, zero or more, by name of the units. What is needed to go on lies at `path`.

    They begin around one, in the order of what units are ``worth`` [count] by some other score; the paper leaves that to chance, which takes more
    data to make good. Where ``means`` [columns] has what units give on average, by their name, they give that in so far as they are gone, as a
    bias will.
    """
    every = [units for scope in scopes.values() for units in scope.units]
    z = {units.name: in_order(worth[units.name]).to(model.device).requires_grad_() for units in every}
    multipliers = Multipliers(torch.tensor([scope.keep for scope in scopes.values()], device=model.device))
    held = {"linear": multipliers.linear, "square": multipliers.square, "binary": multipliers.binary}
    optimizers = [_optimizer(z, options), multipliers.optimizer(options.learning_rate)]
    steps = options.steps - options.steps // SETTLING

    def penalty(done: float) -> None:
        halfway = middle(done)
        retained = [torch.cat([retention(z[units.name], halfway) for units in scope.units]) for scope in scopes.values()]
        torch.autograd.backward(multipliers.penalty(retained))

    def changes(block: Block, done: float) -> dict[str, Change]:
        there = {name: retention(each, middle(done)) for name, each in z.items()}
        return _changes(block, {name: gate(each) for name, each in z.items()}, there, means)

    _train(model, samples, Training(path, {**z, **held}, optimizers), steps, 0, options, changes, penalty, progress)
    return {name: each.detach().clamp_min(0).cpu() for name, each in z.items()}


def settle(
    model: Model,
    samples: Samples,
    kept: Mapping[str, Tensor],
    counts: Mapping[str, int],
    options: Options,
    path: Path,
    progress: Progress,
    means: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """Scales of the units at the indices ``kept`` [n] int64, by name of the units of which there are so many, once all others are gone, [n] float32.

    They begin at one: what gates were when it was still open which of them would close is no scale for those that did not.
    """
    scales = {name: torch.ones(len(indices), device=model.device, requires_grad=True) for name, indices in kept.items()}
    steps = options.steps // SETTLING

    def changes(block: Block, done: float) -> dict[str, Change]:
        there = {name: scale.new_zeros(counts[name]).index_fill(0, kept[name].to(scale.device), 1.0) for name, scale in scales.items()}
        gates = {name: torch.zeros_like(there[name]).index_copy(0, kept[name].to(scale.device), scale) for name, scale in scales.items()}
        return _changes(block, gates, there, means)

    training = Training(path, scales, [_optimizer(scales, options)])
    _train(model, samples, training, steps, options.steps - steps, options, changes, lambda done: None, progress)
    return {name: scale.detach().clamp_min(0).cpu() for name, scale in scales.items()}


def _optimizer(parameters: Mapping[str, Tensor], options: Options) -> torch.optim.Optimizer:
    return torch.optim.AdamW(list(parameters.values()), lr=options.learning_rate, weight_decay=0.0)


def _train(
    model: Model,
    samples: Samples,
    training: Training,
    steps: int,
    before: int,
    options: Options,
    changes: Callable[..., dict[str, Change]],
    penalty: Callable[[float], None],
    progress: Progress,
) -> None:
    """Take so many `steps`, `before` which others were taken, with blocks changed as ``changes`` says and what `penalty` adds to the gradients."""
    distillation = Distillation(model, model, options.divergence)
    with opened(model) as whole:
        while training.step < steps:
            done = training.step / steps
            chosen = draw(samples, options.batch, options.seed, before + training.step)
            _step(whole, chosen, distillation, partial(changes, done=done))
            with torch.enable_grad():
                penalty(done)
            training.advance(rate(done))
            training.floor(LOWEST)
            if training.step % SAVED_EVERY == 0 or training.step == steps:
                training.save()
            progress.blocks(len(model.blocks) * (before + training.step) // options.steps, len(model.blocks))
    model.release()


def _step(whole: Whole, chosen: Samples, distillation: Distillation, changes: Callable[[Block], dict[str, Change]]) -> None:
    """Add up the gradients of one step."""
    tokens = scored(chosen)
    for batch in chosen.batches():
        hidden, kwargs = whole.embed(batch)
        with torch.no_grad():
            wanted = whole.forward(hidden, kwargs)
        with torch.enable_grad(), ExitStack() as gated:
            for block in whole.blocks:
                gated.enter_context(block.scaling(changes(block)))
            distillation.learn(batch, whole.forward(hidden, kwargs), wanted, tokens)


def _changes(block: Block, gates: Mapping[str, Tensor], there: Mapping[str, Tensor], means: Mapping[str, Tensor]) -> dict[str, Change]:
    """What the readers of a block's units are given: each unit times its gate, and its mean in so far as it is not there."""
    columns = {linear.name: linear.columns for linear in block.layout.linears}
    changes: dict[str, Change] = {}
    for units in block.layout.units:
        if units.name in gates:
            run = columns[units.columns] // units.count
            shift = (1 - there[units.name]).repeat_interleave(run) * means[units.name] if units.name in means else None
            changes[units.columns] = gates[units.name].repeat_interleave(run), shift
    return changes
