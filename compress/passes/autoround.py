"""AutoRound (arXiv 2309.05516): learn by the sign of the gradient which way each weight is rounded and how far each group's range reaches.

A block is trained to give, for what it is given now, what it gave before the pass began, so it also makes good what the blocks before it lost.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from pydantic import Field

from compress.passes.base import Calibrated
from compress.scheme import Scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from compress.block import Block
    from compress.calibrate import Trainable, Workspace
    from compress.data import Samples
    from compress.errors import Problems
    from compress.layout import Layout, Linear
    from compress.model import Model
    from compress.numerics.grid import Grid
    from compress.numerics.learned import Rounding


class Pass(Calibrated):
    """Round as learned on calibration data, block by block."""

    steps: int = Field(default=200, ge=0, description="steps of training per block: 50 is light, 200 usual, 1000 for 2 bits")
    rate: float | None = Field(default=None, gt=0, le=1, description="step size at first, falling to zero; `null`: 1 / steps, double up to 3 bits")
    batches: int = Field(default=2, ge=1, description="batches of 2,048 tokens per step")
    trim: float | None = Field(
        default=None, ge=0, lt=1, description="share of the largest squared differences left out of the loss; `null`: 0.001 below 4 bits, else 0"
    )
    seed: int = Field(default=0, ge=0, description="which batches come when")

    def check(self, place: str, layout: Layout, problems: Problems) -> None:
        super().check(place, layout, problems)
        if self.activations == "static":
            problems.add(f"{place}: activations", "this pass does not measure inputs", "set activations: dynamic, or use gptq")

    def run(self, model: Model, samples: Samples, workspace: Workspace) -> None:
        from compress.calibrate import train

        chosen = self.takes(model.layout)
        for trainable in train(model, samples, workspace):
            linears = [linear for linear in trainable.block.layout.linears if linear.name in chosen]
            if linears:
                self._learn(trainable, linears)

    def _learn(self, trainable: Trainable, linears: list[Linear]) -> None:
        import torch

        from compress.numerics.grid import Scales, quantized
        from compress.numerics.learned import Rounding, descend

        block, counts = trainable.block, trainable.tokens()
        tokens = {linear.name: counts.get(linear.name, trainable.seen) for linear in linears}
        reasons = {linear.name: self.starved(linear.columns, tokens[linear.name], trainable.seen) for linear in linears}
        for name, reason in reasons.items():
            if reason:
                self.refuse(name, reason)
        stacks: dict[tuple[Scheme, Grid, int, int, torch.dtype], list[Linear]] = {}
        widest = self._widest(block, {linear.name for linear in linears})
        for linear in linears:
            scheme = self.scheme(linear)
            key = (scheme, scheme.grid(widest[linear.name]), linear.rows, linear.columns, scheme.stored(block.stored_dtype(linear.name)))
            stacks.setdefault(key, []).append(linear)
        learned: list[tuple[list[Linear], Rounding]] = []
        for (scheme, grid, _, _, stored), members in stacks.items():
            weight = torch.stack([block.weight(linear.name) for linear in members])
            pruned = any(block.is_pruned(linear.name) for linear in members)
            kept = torch.stack([block.kept(linear.name) for linear in members]) if pruned else None
            learned.append((members, Rounding(weight, grid, scheme.group_size, stored, kept)))
        fewest = min(rounding.grid.bits for _, rounding in learned)
        trim = self.trim if self.trim is not None else (0.001 if fewest < 4 else 0.0)

        def loss(batch: int) -> Tensor:
            weights = {linear.name: value for members, rounding in learned for linear, value in zip(members, rounding.values(), strict=True)}
            return trainable.loss(weights, batch, trim)

        at_start, at_end = descend(
            [rounding for _, rounding in learned],
            loss,
            len(trainable.inputs),
            steps=self.steps,
            rate=self.rate or (2.0 if fewest <= 3 else 1.0) / max(1, self.steps),
            at_once=self.batches,
            chooser=random.Random(f"{self.seed} {block.layout.index}"),
        )
        for members, rounding in learned:
            for place, linear in enumerate(members):
                if reasons[linear.name]:
                    rounding.forget(place)
            with torch.no_grad():
                scales = rounding.scales()
                codes = rounding.codes(scales).to(rounding.grid.codes).flatten(-2)
            for place, linear in enumerate(members):
                part = Scales(scales.scale[place], scales.zero[place])
                result = quantized(codes[place], part, rounding.grid, rounding.stored)
                weight = block.weight(linear.name)
                record = {
                    "pass": "autoround",
                    "tokens": tokens[linear.name],
                    "error": float((result.dequantize().float() - weight).square().sum() / weight.square().sum().clamp_min(1e-30)),
                    "block_loss": [at_start, at_end],
                    "fallback": reasons[linear.name],
                }
                self.commit(block, linear, result, record)

    def _widest(self, block: Block, chosen: set[str]) -> dict[str, float]:
        """By linear, the largest magnitude of a weight in what is fused with it: its input group, or those of all experts."""
        found: dict[str, float] = {}
        for stage in block.layout.stages:
            names = [linear.name for group in stage.groups for linear in group.linears if linear.name in chosen]
            peak = max((float(block.weight(name).abs().max()) for name in names), default=0.0)
            found |= dict.fromkeys(names, peak)
        return found
