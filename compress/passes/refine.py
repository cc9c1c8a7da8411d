"""Learn, block by block, a better rounding around codes that passes before have found.

Sign descent (AutoRound, arXiv 2309.05516) starts from plain rounding; from codes that GPTQ has already made to fit, the same steps go further.
A block is trained to give, for what it is given now, what it gives in the model before quantising, so it also makes good what the blocks
before it lost. Codes move by one at most.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from compress.errors import Problems
from compress.layout import Layout
from compress.scheme import Scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from compress.calibrate import Trainable, Workspace
    from compress.data import Samples
    from compress.model import Model
    from compress.numerics.grid import Grid, Quantized


class Pass(BaseModel):
    """Learn a better rounding around the codes found so far."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    stage: ClassVar[str] = "quantize"

    steps: int = Field(default=200, ge=0, description="steps of training per block")
    rate: float | None = Field(default=None, gt=0, le=1, description="step size at first, falling to zero; `null`: 1 / steps")
    batches: int = Field(default=2, ge=1, description="batches of 2,048 tokens per step")
    seed: int = Field(default=0, ge=0, description="which batches come when")

    @property
    def needs_data(self) -> bool:
        return True

    def check(self, place: str, layout: Layout, problems: Problems) -> None:
        """Nothing can be wrong with the layout alone."""

    def plan(self, layout: Layout) -> dict[str, Scheme]:
        return {}

    def refine(self, place: str, schemes: dict[str, Scheme], problems: Problems) -> dict[str, Scheme]:
        if not schemes:
            problems.add(place, "no linear is quantised before it", "put it behind the passes that quantise")
        if any(scheme.residuals for scheme in schemes.values()):
            problems.add(place, "residuals belong to the codes they were found for", "put it before detach")
        return {}

    def run(self, model: Model, samples: Samples, workspace: Workspace) -> None:
        from compress.calibrate import train

        for trainable in train(model, samples, workspace, exact=True):
            self._learn(trainable)

    def _learn(self, trainable: Trainable) -> None:
        import torch

        from compress.numerics.grid import Scales, quantized
        from compress.numerics.learned import Rounding, descend

        block = trainable.block
        stacks: dict[tuple[Grid, torch.dtype, torch.Size], list[tuple[str, Quantized]]] = {}
        for linear in block.layout.linears:
            if (coded := block.coded(linear.name)) is not None:
                stacks.setdefault((coded.grid, coded.scale.dtype, coded.scale.shape + coded.codes.shape), []).append((linear.name, coded))
        learned = [
            ([name for name, _ in members], Rounding.around(torch.stack([block.exact(name) for name, _ in members]), [coded for _, coded in members]))
            for members in stacks.values()
        ]
        if not learned:
            return

        def loss(batch: int) -> Tensor:
            return trainable.loss({name: value for names, rounding in learned for name, value in zip(names, rounding.values(), strict=True)}, batch)

        at_start, at_end = descend(
            [rounding for _, rounding in learned],
            loss,
            len(trainable.inputs),
            steps=self.steps,
            rate=self.rate or 1.0 / max(1, self.steps),
            at_once=self.batches,
            chooser=random.Random(f"{self.seed} {block.layout.index}"),
        )
        for names, rounding in learned:
            with torch.no_grad():
                scales = rounding.scales()
                codes = rounding.codes(scales).to(rounding.grid.codes).flatten(-2)
            for place, name in enumerate(names):
                result = quantized(codes[place], Scales(scales.scale[place], scales.zero[place]), rounding.grid, rounding.stored)
                block.set_codes(name, result, {"pass": "refine", "error": None, "block_loss": [at_start, at_end]})
