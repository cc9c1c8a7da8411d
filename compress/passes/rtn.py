"""Round to nearest, without feedback: the baseline every other pass must beat. Needs data only for `imatrix` and fixed scales of inputs.

Of a model that sees it rounds the vision tower and the projector too, where `include` has a pattern that begins with their names, such as
`vision_tower.*`; without one they stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from compress.errors import InputError
from compress.passes.base import Quantize, split

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from compress.block import Block
    from compress.calibrate import Workspace
    from compress.data import Samples
    from compress.layout import Linear
    from compress.model import Model
    from compress.numerics.grid import Quantized


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

    def keeps_to_blocks(self) -> str | None:
        if self.bits == "allocated":
            return "has its bits allocated, which is done for decoder blocks alone"
        return super().keeps_to_blocks() if self.needs_data else None

    def run(self, model: Model, samples: Samples, workspace: Workspace) -> None:
        from compress.calibrate import sweep, walk

        chosen, outside = self.takes(model.layout), self.reaches(model.layout)
        if outside and not workspace.outside_file.exists():
            self._round_outside(model, outside.values(), workspace)
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

    def _round_outside(self, model: Model, linears: Iterable[Linear], workspace: Workspace) -> None:
        import torch

        rounded = []
        for linear in linears:
            weight, dense = model.dense(linear.name).to(model.device, torch.float32), model.dense_dtype(linear.name)
            result, error = self._rounded(linear, weight, float(weight.abs().max()), dense, None)
            scheme = self.scheme(linear)
            record = {"name": linear.name, "format": scheme.format, "pass": "rtn", "error": error}
            rounded.append((result, scheme.layout, scheme.input_rounding(None, dense), record))
        model.write_quantized_outside(workspace.outside_file, rounded)

    def round_group(self, block: Block, linears: tuple[Linear, ...], peak: float | None, importance: Tensor | None, by: str = "rtn") -> None:
        """Round ``linears`` that share an input, of magnitude up to ``peak``; errors count ``importance`` [in]; ``by`` is the pass in records."""
        weighted = importance if self.scales == "imatrix" else None
        if weighted is not None and linears and not weighted.any():
            raise InputError.one(linears[0].name, "saw no calibration token, so nothing weighs its errors", "give more data, or set scales: mse")
        weights = [block.weight(linear.name) for linear in linears]
        widest = max((float(weight.abs().max()) for weight in weights), default=0.0)
        for linear, weight in zip(linears, weights, strict=True):
            result, error = self._rounded(linear, weight, widest, block.stored_dtype(linear.name), weighted)
            self.commit(block, linear, result, {"pass": by, "error": error}, peak)

    def _rounded(self, linear: Linear, weight: Tensor, widest: float, dense: torch.dtype, weighted: Tensor | None) -> tuple[Quantized, float]:
        """``weight`` [out, in] float32 on its grid, and the squared error as a share of its squares.

        ``widest`` is the largest magnitude among linears that are fused with it, ``dense`` the dtype of the source, ``weighted`` [in] what errors
        count.
        """
        from compress.numerics.grid import minmax_scales, quantized, round_to_nearest, search_scales

        scheme = self.scheme(linear)
        grid, stored = scheme.grid(widest), scheme.stored(dense)
        if self.scales == "minmax":
            scales = minmax_scales(weight, grid, scheme.group_size, stored)
        else:
            scales = search_scales(weight, grid, scheme.group_size, stored, weighted)
        result = quantized(round_to_nearest(weight, scales, grid), scales, grid, stored)
        change = (result.dequantize().float() - weight).norm() / weight.norm().clamp_min(1e-30)
        return result, float(change) ** 2
