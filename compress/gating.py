"""Learn which units of a model can go, with all weights as they are (DDP, arXiv 2603.08065).

One gate per unit scales what the unit gives on. Gates are trained so that the gated model stays near the model as it was and to the text, while
the share of the units that are still there comes down to what it is to be.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress.calibrate import Progress
from compress.data import Samples
from compress.layout import Units
from compress.model import Model
from compress.numerics.gates import LOWEST, Multipliers, gate, middle, retention
from compress.whole import Distillation, Training, Whole, draw, opened, rate, scored

SAVED_EVERY = 25
"""Steps after which a killed run starts again."""


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


def learn(model: Model, samples: Samples, scopes: Mapping[str, Scope], options: Options, path: Path, progress: Progress) -> dict[str, Tensor]:
    """The gates of all units after training, [count] float32, zero or more, by name of the units. What is needed to go on lies at `path`."""
    generator = torch.Generator().manual_seed(options.seed)
    every = [units for scope in scopes.values() for units in scope.units]
    z = {units.name: (1 + 0.01 * torch.randn(units.count, generator=generator)).to(model.device).requires_grad_() for units in every}
    multipliers = Multipliers(torch.tensor([scope.keep for scope in scopes.values()], device=model.device))
    held = {"linear": multipliers.linear, "square": multipliers.square, "binary": multipliers.binary}
    gates = torch.optim.AdamW(list(z.values()), lr=options.learning_rate, weight_decay=0.0)
    training = Training(path, {**z, **held}, [gates, multipliers.optimizer(options.learning_rate)])
    distillation = Distillation(model, model, options.divergence)
    with opened(model) as whole:
        while training.step < options.steps:
            _step(whole, samples, scopes, z, multipliers, distillation, training, options)
            training.advance(rate(training.step / options.steps))
            with torch.no_grad():
                for each in z.values():
                    each.clamp_(min=LOWEST)
            if training.step % SAVED_EVERY == 0 or training.step == options.steps:
                training.save()
            progress.blocks(len(model.blocks) * training.step // options.steps, len(model.blocks))
    model.release()
    return {name: each.detach().clamp_min(0).cpu() for name, each in z.items()}


def _step(
    whole: Whole,
    samples: Samples,
    scopes: Mapping[str, Scope],
    z: dict[str, Tensor],
    multipliers: Multipliers,
    distillation: Distillation,
    training: Training,
    options: Options,
) -> None:
    """Add up the gradients of one step."""
    chosen = draw(samples, options.batch, options.seed, training.step)
    tokens = scored(chosen)
    for batch in chosen.batches():
        hidden, kwargs = whole.embed(batch)
        with torch.no_grad():
            wanted = whole.forward(hidden, kwargs)
        with torch.enable_grad(), ExitStack() as gated:
            for block in whole.blocks:
                mine = {units.columns: units for units in block.layout.units if units.name in z}
                columns = {linear: next(each.columns for each in block.layout.linears if each.name == linear) for linear in mine}
                factors = {linear: gate(z[units.name]).repeat_interleave(columns[linear] // units.count) for linear, units in mine.items()}
                gated.enter_context(block.scaling(factors))
            given = whole.forward(hidden, kwargs)
            distillation.learn(batch, given, wanted, tokens)
    with torch.enable_grad():
        halfway = middle(training.step / options.steps)
        penalty = multipliers.penalty([torch.cat([retention(z[units.name], halfway) for units in scope.units]) for scope in scopes.values()])
        torch.autograd.backward(penalty)
