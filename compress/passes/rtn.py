"""Round to nearest, without feedback: the baseline every other pass must beat. Needs data only for `imatrix` and fixed scales of inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from compress.errors import InputError
from compress.passes.base import Quantize, split

if TYPE_CHECKING:
    from torch import Tensor

    from compress.block import Block
    from compress.calibrate import Workspace
    from compress.data import Samples
    from compress.layout import Linear
    from compress.model import Model


class Pass(Quantize):
    """Round every weight to the nearest point of its group's grid."""

    scales: Literal["minmax", "mse", "imatrix"] = Field(
        default="minmax",
        description="`minmax`: the group's range; `mse`: the range with the least squared rounding error; `imatrix`: the same with each error "
        "weighted by the mean square of its input, measured",
    )

    @property
    def needs_data(self) -> bool:
        return self.activations == "static" or self.scales == "imatrix"

    def run(self, model: Model, samples: Samples, workspace: Workspace) -> None:
        from compress.calibrate import sweep, walk

        chosen = self.takes(model.layout)
        if self.needs_data:
            for inputs in sweep(model, samples, workspace, lambda group: bool(split(group, chosen)), peaks=True):
                importance = inputs.hessian.diagonal(dim1=1, dim2=2)
                for group, peak, weights in zip(inputs.groups, inputs.peaks, importance, strict=True):
                    self.round_group(inputs.block, split(group, chosen), peak, weights)
            return
        for block in walk(model, workspace):
            for stage in block.layout.stages:
                for group in stage.groups:
                    self.round_group(block, split(group, chosen), None, None)

    def round_group(self, block: Block, linears: tuple[Linear, ...], peak: float | None, importance: Tensor | None) -> None:
        from compress.numerics.grid import minmax_scales, quantized, round_to_nearest, search_scales

        weighted = importance if self.scales == "imatrix" else None
        if weighted is not None and linears and not weighted.any():
            raise InputError.one(linears[0].name, "saw no calibration token, so nothing weighs its errors", "give more data, or set scales: mse")
        weights = [block.weight(linear.name) for linear in linears]
        widest = max((float(weight.abs().max()) for weight in weights), default=0.0)
        for linear, weight in zip(linears, weights, strict=True):
            scheme, dense = self.scheme(linear), block.stored_dtype(linear.name)
            grid, stored = scheme.grid(widest), scheme.stored(dense)
            if self.scales == "minmax":
                scales = minmax_scales(weight, grid, scheme.group_size, stored)
            else:
                scales = search_scales(weight, grid, scheme.group_size, stored, weighted)
            result = quantized(round_to_nearest(weight, scales, grid), scales, grid, stored)
            change = (result.dequantize().float() - weight).norm() / weight.norm().clamp_min(1e-30)
            self.commit(block, linear, result, {"pass": "rtn", "error": float(change) ** 2}, peak)
