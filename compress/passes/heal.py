"""Train a pruned model for a while to say again what the model it came from says (distillation), zeros staying zeros.

The teacher is the source of the run. All linears of the blocks are trained, or adapters of low rank that are added to them in the end (LoRA,
arXiv 2106.09685). Weights that are zero stay so, which keeps an N:M pattern; or, with ``mask: moving``, which of them are is decided anew from
their magnitudes while the others are pulled towards zero ever harder (AST, arXiv 2407.20584 section 3). What is best on a part of the
calibration data that is not trained on is what is kept. With ``branch``, linears with an N:M pattern get one weight more for each run of inputs,
which starts where least squares on the data put it and is trained with the others (SLoRB, ibid.); in the end it stays beside the weight or is added
to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from compress.errors import Problems
from compress.layout import Layout
from compress.passes.base import Rewrite
from compress.scheme import dense_bytes

if TYPE_CHECKING:
    from compress.calibrate import Workspace
    from compress.data import Samples
    from compress.model import Model

RUN_BYTES = 4
"""Of the number that says how many inputs a branch of a linear adds up."""


class Pass(Rewrite):
    """Distil the source into what passes before have left of it."""

    stage: ClassVar[str] = "sparsify"
    verb: ClassVar[str] = "healed"
    needs_data: ClassVar[bool] = True

    tokens: int | None = Field(default=None, ge=1, description="how many tokens to train on, some of them more than once; or `minutes`")
    minutes: float | None = Field(default=None, gt=0, description="how long to train; two such runs are not the same. Or `tokens`")
    train: Literal["all", "lora"] = Field(default="all", description="`all` weights of linears in blocks, or adapters of low rank, merged in the end")
    rank: int = Field(default=8, ge=1, description="of adapters")
    batch: int = Field(default=8, ge=1, description="calibration samples per step")
    learning_rate: float = Field(default=1e-4, gt=0, description="at its highest; small models want more, adapters about ten times as much")
    divergence: float = Field(default=2.0, ge=0, description="weight of the KL divergence from the source, beside the loss of the text")
    samples: int | None = Field(
        default=None, ge=1, description="how many to draw for it from the calibration data; by default those that all passes are given"
    )
    held_out: float = Field(default=0.1, gt=0, lt=1, description="share of the samples that are only judged by")
    mask: Literal["fixed", "moving"] = Field(
        default="fixed", description="`fixed`: zeros stay; `moving`: linears with an N:M pattern keep their largest weights as they change"
    )
    decay: float = Field(default=1e-4, ge=0, description="`moving`: pull of weights that are left out towards zero, reached in a quarter of the time")
    branch: int | None = Field(
        default=None,
        ge=1,
        description="a branch beside each linear with an N:M pattern, which reads the sum of so many neighbouring inputs (16: a sixteenth of the "
        "weights more); none by default",
    )
    branch_after: Literal["keep", "merge"] = Field(
        default="keep",
        description="what becomes of it: it stays beside the weight, for `compress` alone, or is added to it, which gives the pattern up",
    )
    seed: int = Field(default=0, ge=0, description="of the order of samples, and of adapters")
    copies: int = Field(
        default=1,
        ge=1,
        description="how many times to train, each with another seed and the whole budget; of the best, as many as help are averaged (2306.16788)",
    )

    @model_validator(mode="after")
    def _one_budget(self) -> Pass:
        if (self.tokens is None) == (self.minutes is None):
            raise ValueError("give either tokens or minutes")
        return self

    def check(self, place: str, layout: Layout, problems: Problems) -> None:
        for name, wanted, reader in (
            ("rank", self.train == "lora", "train: lora"),
            ("decay", self.mask == "moving", "mask: moving"),
            ("branch_after", self.branch is not None, "branch: 16"),
        ):
            if name in self.model_fields_set and not wanted:
                problems.add(f"{place}: {name}", f"is read only with {reader}", f"leave it out, or set {reader}")
        if self.branch and self.train == "lora":
            problems.add(f"{place}: branch", "is trained together with all weights, not with adapters", "set train: all, or leave branch out")
        if self.keeps_branches and layout.of_experts:
            problems.add(f"{place}: branch_after", "branches cannot stay beside experts, which are computed all at once", "set branch_after: merge")
        if self.copies > 1 and self.mask == "moving":
            problems.add(f"{place}: copies", "end up with different zeros, so their average would have too few", "set mask: fixed, or copies: 1")
        if self.train == "lora" and self.mask == "moving":
            problems.add(f"{place}: mask", "adapters of low rank cannot say which weights are to be zero", "set mask: fixed, or train: all")

    @property
    def keeps_branches(self) -> bool:
        return self.branch is not None and self.branch_after == "keep"

    @property
    def own_samples(self) -> int | None:
        return self.samples

    def added_bytes(self, layout: Layout) -> int:
        """Of branches beside all linears, if not all of which may be pruned."""
        if not self.keeps_branches or self.branch is None:
            return 0
        sizes = (dense_bytes(layout, name) * linear.rows * -(-linear.columns // self.branch) + RUN_BYTES for name, linear in layout.linears.items())
        return sum(sizes)

    def sweeps(self, samples: int, length: int) -> float:
        return 0.0 if self.tokens is None else 4.0 * self.copies * self.tokens / (samples * length)

    @property
    def seconds(self) -> float:
        return 60 * self.copies * (self.minutes or 0.0)

    def resident_bytes(self, layout: Layout) -> int:
        """The source, the model, and weights, gradients and two moments in float32."""
        parameters = sum(linear.rows * linear.columns for linear in layout.linears.values())
        return 4 * layout.checkpoint.nbytes + 16 * parameters

    def run(self, model: Model, samples: Samples, workspace: Workspace) -> None:
        from compress.calibrate import walk
        from compress.checkpoint import Checkpoint
        from compress.healing import Options, best, heal, together
        from compress.model import Model

        options = Options(**self.model_dump(exclude={"branch_after", "samples"}))
        source = Model(Layout(Checkpoint(model.checkpoint.folder)))
        outcome = heal(model, source, samples, options, workspace.folder, workspace.progress)
        for block in walk(model, workspace):
            for linear in block.layout.linears:
                weight, branch = best(workspace.folder, linear.name, model.device)
                if branch is not None and self.branch and self.keeps_branches:
                    block.set_branch(linear.name, branch, self.branch)
                elif branch is not None:
                    whole = together(weight, branch, self.branch)
                    block.set_filled(linear.name, whole, {"pass": "heal", "method": "branch merged", "permuted": False})
                    continue
                if self.mask == "moving" and (pattern := model.patterns.get(linear.name)):
                    block.set_pruned(linear.name, weight, pattern, {"pass": "heal", "method": "moving mask", "permuted": False})
                else:
                    block.set_dense(f"{linear.name}.weight", weight)
            of_branches = {"branch": self.branch, "branch_after": self.branch_after} if self.branch else {}
            block.add_record(block.layout.prefix, {"pass": "heal", "kind": "linears", **of_branches, **outcome})
