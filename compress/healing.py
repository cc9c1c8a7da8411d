"""Distil one model into another that was made of it, within a budget, keeping what is best on text that is not trained on."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.backsweep import summed_loss
from compress.block import Block
from compress.branching import starts
from compress.calibrate import Progress
from compress.checkpoint import entry, read_header, read_tensor
from compress.data import Samples, divided
from compress.errors import InputError
from compress.formats.branch import WEIGHT
from compress.model import Model
from compress.numerics.branch import expanded
from compress.numerics.sparsity import keep
from compress.state import write_state, write_state_text
from compress.whole import Distillation, Training, Whole, draw, opened, rate, scored

BEST = "best.safetensors"
JUDGED = 10
"""How often the model is judged on what is held out, beside before and after."""
MASK_EVERY = 10
"""Steps between two looks at which weights are the largest (arXiv 2407.20584)."""
RAMP = 0.25
"""Share of the training in which the decay of masked weights grows to its full size."""


@dataclass(frozen=True)
class Options:
    """As `compress.passes.heal` describes them."""

    tokens: int | None
    minutes: float | None
    train: str
    rank: int
    batch: int
    learning_rate: float
    divergence: float
    held_out: float
    mask: str
    decay: float
    seed: int
    copies: int
    branch: int | None


def heal(model: Model, source: Model, samples: Samples, options: Options, folder: Path, progress: Progress) -> dict[str, Any]:
    """Train ``model`` towards ``source``. What was reached is returned; the best lies in the file `BEST`.

    That is the weight of every linear, [out, in] float32 under its name, and with ``options.branch`` what lies beside those with a pattern,
    [out, runs] float32 under `linear.branch_weight`.
    """
    done = folder / "outcome.json"
    if not done.exists():
        learning, held = divided(samples, options.held_out, "heal")
        branches = starts(model, learning, options.branch, folder / "branches.safetensors", progress) if options.branch else {}
        with opened(source) as teacher, opened(model) as student:
            copies = []
            for number in range(options.copies):
                kept = folder / f"copy-{number}"
                kept.mkdir(exist_ok=True)
                seeded = replace(options, seed=options.seed + number)
                copies.append((_Healing(student, teacher, learning, held, branches, seeded, kept, progress).go(), kept / BEST))
            outcome = _soup(student, held, copies, options.branch, folder / BEST)
        outcome["samples"] = {
            "trained_on": len(learning.items),
            "held_out": len(held.items),
            "left_out": len(samples.items) - len(learning.items) - len(held.items),
        }
        model.release()
        source.release()
        write_state_text(done, json.dumps(outcome))
    found: dict[str, Any] = json.loads(done.read_text())
    return found


def _soup(student: Whole, held: Samples, copies: list[tuple[dict[str, Any], Path]], run: int | None, best: Path) -> dict[str, Any]:
    """Average the best copy with as many others, in order, as make it better on what is held out (arXiv 2306.16788 section 3)."""
    order = sorted(copies, key=lambda copy: copy[0]["loss"][1])
    outcome, first = order[0]
    weights, count = _read(first, student), 1
    for _, path in order[1:]:
        other = _read(path, student)
        mixed = {name: (weight * count + other[name]) / (count + 1) for name, weight in weights.items()}
        if (loss := judge(student, held, mixed, run)) < outcome["loss"][1]:
            weights, count, outcome = mixed, count + 1, outcome | {"loss": [outcome["loss"][0], loss]}
    write_state(best, [entry(name, weight) for name, weight in weights.items()], {})
    return outcome | {"copies": [copy["loss"][1] for copy, _ in copies], "averaged": count}


def _read(path: Path, student: Whole) -> dict[str, Tensor]:
    return {name: read_tensor(info).to(student.model.device) for name, info in read_header(path)[0].items()}


@torch.no_grad()
def judge(student: Whole, held: Samples, weights: Mapping[str, Tensor], run: int | None = None) -> float:
    """Mean cross-entropy of the model with ``weights`` [out, in] by linear and branches of so many inputs a `run` beside them, nats per token."""
    names = [[linear.name for linear in block.layout.linears] for block in student.blocks]
    by_block = [{name: together(weights[name], weights.get(f"{name}.{WEIGHT}"), run) for name in linears} for linears in names]
    total = 0.0
    for batch in held.batches():
        hidden, kwargs = student.embed(batch)
        total += summed_loss(student.model, batch, student.forward(hidden, kwargs, by_block))
    return total / scored(held)


def together(weight: Tensor, branch: Tensor | None, run: int | None) -> Tensor:
    """What a linear with this ``weight`` [out, in] computes with, and with a ``branch`` [out, runs] beside it, if there is one."""
    return weight if branch is None or run is None else weight + expanded(branch, run, weight.shape[1])


def best(folder: Path, linear: str, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Of what `heal` left in ``folder``, the weight of a linear, [out, in], and the branch beside it, [out, runs], or None, float32."""
    infos = read_header(folder / BEST)[0]
    branch = infos.get(f"{linear}.{WEIGHT}")
    return read_tensor(infos[linear]).to(device), None if branch is None else read_tensor(branch).to(device)


class _Healing:
    """One training: what its steps share."""

    def __init__(
        self,
        student: Whole,
        teacher: Whole,
        learning: Samples,
        held: Samples,
        branches: Mapping[str, Tensor],
        options: Options,
        folder: Path,
        progress: Progress,
    ) -> None:
        self._student, self._teacher, self._options, self._progress = student, teacher, options, progress
        self._learning, self._held, self._branches = learning, held, branches
        self._best_file = folder / BEST
        self._start = {linear.name: block.weight(linear.name) for block in student.blocks for linear in block.layout.linears}
        self._moving = {name: pattern for name, pattern in student.model.patterns.items() if options.mask == "moving" and name in self._start}
        if options.mask == "moving" and not self._moving:
            raise InputError.one("heal: mask", "moving, but no linear has an N:M pattern", "put prune_nm before it, or set mask: fixed")
        self._masks = {name: weight != 0 for name, weight in self._start.items() if name in self._moving or bool((weight == 0).any())}
        self._parameters = self._trained()
        optimizer = torch.optim.AdamW(list(self._parameters.values()), lr=options.learning_rate, weight_decay=0.0, betas=(0.9, 0.95))
        self._training = Training(folder / "training.safetensors", self._parameters, [optimizer])
        self._distillation = Distillation(student.model, teacher.model, options.divergence)
        if self._training.step:
            self._move_masks()
        self._steps = None if options.tokens is None else max(1, math.ceil(options.tokens / self._tokens_per_step()))
        self._begun = time.monotonic()

    def _tokens_per_step(self) -> float:
        return self._options.batch * self._learning.tokens / len(self._learning.items)

    def _trained(self) -> dict[str, Tensor]:
        """Weights and branches, or the two factors of what is added to each weight, [rank, in] and [out, rank], the second of zeros."""
        if self._options.train == "all":
            return {name: weight.clone().requires_grad_() for name, weight in (*self._start.items(), *self._branches.items())}
        generator = torch.Generator().manual_seed(self._options.seed)
        found: dict[str, Tensor] = {}
        for name, weight in self._start.items():
            rank = min(self._options.rank, *weight.shape)
            found[f"{name}.down"] = (
                (torch.randn(rank, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5).to(weight.device).requires_grad_()
            )
            found[f"{name}.up"] = torch.zeros(weight.shape[0], rank, device=weight.device, requires_grad=True)
        return found

    def _weights(self, block: Block) -> dict[str, Tensor]:
        """The weights of the block as they are now, [out, in] float32 by linear, differentiable in what is trained."""
        found: dict[str, Tensor] = {}
        for linear in block.layout.linears:
            if self._options.train == "all":
                weight = self._parameters[linear.name]
            else:
                weight = self._start[linear.name] + self._parameters[f"{linear.name}.up"] @ self._parameters[f"{linear.name}.down"]
            mask = self._masks.get(linear.name)
            if mask is not None and linear.name in self._moving:
                weight = weight + (weight * mask - weight).detach()  # what is left out is told what it would have been good for
            elif mask is not None:
                weight = weight * mask
            found[linear.name] = weight
        return found

    def _computed(self, block: Block) -> dict[str, Tensor]:
        """What the block computes with now: its weights and what branches add to them."""
        return {
            name: together(weight, self._parameters.get(f"{name}.{WEIGHT}"), self._options.branch) for name, weight in self._weights(block).items()
        }

    def go(self) -> dict[str, Any]:
        """Train until the budget is spent."""
        if not self._best_file.exists():
            self._keep_start()
        first, best = self._kept_losses()
        judged = int(JUDGED * self._done())
        while (done := self._done()) < 1:
            self._step(done)
            if int(JUDGED * self._done()) > judged or self._done() >= 1:
                judged = int(JUDGED * self._done())
                weights = self._now()
                loss = self._judge(weights)
                if loss < best:
                    best = loss
                    self._keep(first, best, weights)
                self._training.save(self._seconds())
                self._move_masks()  # as a run does that begins here
            self._progress.blocks(int(len(self._student.blocks) * min(1.0, self._done())), len(self._student.blocks))
        return {"steps": self._training.step, "loss": [first, best], "tokens": round(self._training.step * self._tokens_per_step())}

    def _done(self) -> float:
        """Share of the budget that is spent."""
        if self._steps is not None:
            return self._training.step / self._steps
        assert self._options.minutes is not None
        return self._seconds() / (60 * self._options.minutes)

    def _seconds(self) -> float:
        return self._training.seconds + time.monotonic() - self._begun

    def _step(self, done: float) -> None:
        chosen = draw(self._learning, self._options.batch, self._options.seed, self._training.step)
        tokens = scored(chosen)
        if self._moving and self._training.step % MASK_EVERY == 0:
            self._move_masks()
        for batch in chosen.batches():
            with torch.no_grad():
                wanted = self._teacher.forward(*self._teacher.embed(batch))
            hidden, kwargs = self._student.embed(batch)
            with torch.enable_grad():
                given = self._student.forward(hidden, kwargs, [self._computed(block) for block in self._student.blocks])
                self._distillation.learn(batch, given, wanted, tokens)
        share = rate(done)
        self._training.advance(share)
        self._decay(share * self._options.learning_rate * self._options.decay * min(1.0, done / RAMP))

    def _move_masks(self) -> None:
        for name, pattern in self._moving.items():
            self._masks[name] = keep(self._parameters[name].detach().abs(), pattern)

    def _decay(self, size: float) -> None:
        """Pull what is left out towards zero (section 3.2 of arXiv 2407.20584)."""
        with torch.no_grad():
            for name in self._moving:
                self._parameters[name].sub_(size * self._parameters[name] * ~self._masks[name])

    def _judge(self, weights: Mapping[str, Tensor]) -> float:
        return judge(self._student, self._held, weights, self._options.branch)

    @torch.no_grad()
    def _now(self) -> dict[str, Tensor]:
        weights = {name: weight for block in self._student.blocks for name, weight in self._weights(block).items()}
        return weights | {name: self._parameters[name].detach() for name in self._branches}

    def _keep_start(self) -> None:
        """Write what training begins with, branches of zeros where those of the start are no better."""
        now = self._now()
        bare = now | {name: torch.zeros_like(branch) for name, branch in self._branches.items()}
        first = self._judge(bare)
        best = self._judge(now) if self._branches else first
        self._keep(first, min(first, best), now if best < first else bare)

    def _keep(self, first: float, best: float, weights: Mapping[str, Tensor]) -> None:
        """Write ``weights``, which are the best, with the losses before anything was done and with them."""
        write_state(self._best_file, [entry(name, weight) for name, weight in weights.items()], {"first": repr(first), "best": repr(best)})

    def _kept_losses(self) -> tuple[float, float]:
        metadata = read_header(self._best_file)[1]
        return float(metadata["first"]), float(metadata["best"])
