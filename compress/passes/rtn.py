"""Round to nearest: no data, no feedback. The baseline every other pass must beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.passes.base import Quantize

if TYPE_CHECKING:
    from compress.calibrate import Workspace
    from compress.data import Samples
    from compress.model import Model


class Pass(Quantize):
    """Round every weight to the nearest point of its group's grid."""

    needs_data: ClassVar[bool] = False

    scales: Literal["minmax", "mse"] = Field(
        default="minmax", description="`minmax`: the group's range; `mse`: the range with the least squared rounding error"
    )

    def run(self, model: Model, samples: Samples, workspace: Workspace) -> None:
        from compress.calibrate import walk
        from compress.numerics.grid import Grid, minmax_scales, quantized, round_to_nearest, search_scales

        grid = Grid(self.bits, self.symmetric)
        find_scales = minmax_scales if self.scales == "minmax" else search_scales
        chosen = self.takes(model.layout)
        for block in walk(model, workspace):
            for linear in block.layout.linears:
                if linear.name in chosen:
                    weight, stored = block.weight(linear.name), block.stored_dtype(linear.name)
                    scales = find_scales(weight, grid, self.group_of(linear), stored)
                    result = quantized(round_to_nearest(weight, scales, grid), scales, grid, stored)
                    change = (result.dequantize().float() - weight).norm() / weight.norm().clamp_min(1e-30)
                    block.set_quantized(linear.name, result, {"pass": "rtn", "error": float(change) ** 2})
