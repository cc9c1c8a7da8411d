"""Modality-balanced quantisation (MBQ, arXiv 2412.19509): scales searched for a model that sees, then rounding to nearest.

As `smooth` by `awq`, but errors count by their magnitude, and those at vision tokens by how much the loss depends on them, beside text. Where inputs
are rounded too, candidates are judged with both rounded. To have weights rounded by another pass, write `smooth: {loss: mae, balance: modality}`
before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.errors import Problems
from compress.layout import Layout
from compress.passes import rtn, smooth
from compress.passes.base import GRADIENT, Quantize, Transform, split

if TYPE_CHECKING:
    from compress.block import Block
    from compress.calibrate import Workspace
    from compress.data import Samples
    from compress.model import Model


class Pass(Quantize, Transform):
    """Fold factors that are best for both modalities, each as much as it counts, and round."""

    needs_data: ClassVar[bool] = True
    verb: ClassVar[str] = "folded"

    loss: Literal["mse", "mae"] = Field(default="mae", description="errors count by their magnitude, or by its square")
    edges: tuple[smooth.Kind, ...] | None = Field(
        default=None, min_length=1, description="where, by the linears that read: qkv, o, gate_up, down; `null`: all"
    )
    clip: bool = Field(default=False, description="then cut the range of each group of weights, but of queries and keys, as `smooth` does")

    def check(self, place: str, layout: Layout, problems: Problems) -> None:
        Quantize.check(self, place, layout, problems)
        Transform.check(self, place, layout, problems)
        self._search().check_balance(place, layout, problems)
        if self.activations == "static":
            problems.add(f"{place}: activations", "fixed scales are measured once everything is folded", "set dynamic, or write smooth and rtn")

    @property
    def balances(self) -> bool:
        """As `Balancing`."""
        return True

    @property
    def forwards(self) -> float:
        """As `Differentiating`."""
        return GRADIENT

    def _search(self) -> smooth.Pass:
        return smooth.Pass(edges=self.edges, clip=self.clip, loss=self.loss, balance="modality")

    def run(self, model: Model, samples: Samples, workspace: Workspace) -> None:
        from compress.calibrate import visit

        chosen = self.takes(model.layout)
        search = self._search()
        rounding = rtn.Pass(**{key: getattr(self, key) for key in Quantize.model_fields}).given(self._allocated)

        def finish(block: Block) -> None:
            for stage in block.layout.stages:
                for group in stage.groups:
                    rounding.round_group(block, split(group, chosen), None, None, "mbq")

        balance = search.measured_balance(model, samples, workspace)
        for probe in visit(model, samples, workspace, finish):
            smooth.Smoothing(search, model, probe, samples, balance, "mbq").run()
