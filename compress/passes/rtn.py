"""Round to nearest: no feedback, and no data unless inputs are rounded with scales fixed beforehand. The baseline every other pass must beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from compress.passes.base import Quantize, split

if TYPE_CHECKING:
    from compress.calibrate import Workspace
    from compress.data import Samples
    from compress.layout import Linear
    from compress.model import Block, Model


class Pass(Quantize):
    """Round every weight to the nearest point of its group's grid."""

    scales: Literal["minmax", "mse"] = Field(
        default="minmax", description="`minmax`: the group's range; `mse`: the range with the least squared rounding error"
    )

    @property
    def needs_data(self) -> bool:
        return self.activations == "static"

    def run(self, model: Model, samples: Samples, workspace: Workspace) -> None:
        from compress.calibrate import sweep, walk

        chosen = self.takes(model.layout)
        if self.needs_data:
            for inputs in sweep(model, samples, workspace, lambda group: bool(split(group, chosen)), peaks=True):
                for group, peak in zip(inputs.groups, inputs.peaks, strict=True):
                    self._round(inputs.block, split(group, chosen), peak)
            return
        for block in walk(model, workspace):
            for stage in block.layout.stages:
                for group in stage.groups:
                    self._round(block, split(group, chosen), None)

    def _round(self, block: Block, linears: tuple[Linear, ...], peak: float | None) -> None:
        from compress.numerics.grid import minmax_scales, quantized, round_to_nearest, search_scales

        find_scales = minmax_scales if self.scales == "minmax" else search_scales
        weights = [block.weight(linear.name) for linear in linears]
        widest = max((float(weight.abs().max()) for weight in weights), default=0.0)
        for linear, weight in zip(linears, weights, strict=True):
            scheme, dense = self.scheme(linear), block.stored_dtype(linear.name)
            grid, stored = scheme.grid(widest), scheme.stored(dense)
            scales = find_scales(weight, grid, scheme.group_size, stored)
            result = quantized(round_to_nearest(weight, scales, grid), scales, grid, stored)
            change = (result.dequantize().float() - weight).norm() / weight.norm().clamp_min(1e-30)
            self.commit(block, linear, result, {"pass": "rtn", "error": float(change) ** 2}, peak)
