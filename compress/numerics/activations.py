"""Rounding what a linear is given, as engines do it before they multiply: the same operations in the same order as compressed-tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from compress.numerics.grid import E4M3, Grid, Integer

GRIDS: dict[str, Grid] = {"int8": Integer(8, True), "fp8": E4M3()}


@dataclass(frozen=True)
class Activations:
    """Symmetric 8-bit rounding of inputs [..., in].

    One scale per token or, with ``group_size``, per so many inputs of a token, found while running; or ``scale`` [1], fixed beforehand
    for all tokens.
    """

    kind: Literal["int8", "fp8"]
    group_size: int | None = None
    scale: Tensor | None = None

    @staticmethod
    def static_scale(kind: str, peak: float, stored: torch.dtype) -> Tensor:
        """[1] in `stored`: the scale whose ends are at the largest magnitude seen."""
        grid = GRIDS[kind]
        return torch.tensor([max(peak, 1e-12) * 2 / (grid.high - grid.low)]).to(stored)

    def round(self, inputs: Tensor) -> Tensor:
        """``inputs`` as the engine sees them, in their own dtype."""
        if not inputs.numel():
            return inputs
        rounded, scale = self._rounded(inputs)
        return (rounded * scale).view(inputs.shape)

    def codes(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """What `round` makes of them as codes int8 [..., in] and what those count, [..., 1] or [1], in the dtype of ``inputs``. For int8 alone."""
        rounded, scale = self._rounded(inputs)
        return rounded.to(torch.int8), scale

    def _rounded(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        grid = GRIDS[self.kind]
        grouped = inputs if self.group_size is None else torch.unflatten(inputs, -1, (-1, self.group_size))
        if self.scale is not None:
            scale = self.scale.to(inputs.dtype)
        else:
            scale = grouped.abs().amax(-1, keepdim=True) / ((grid.high - grid.low) / 2)
            scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
        rounded = (grouped / scale).clamp_(grid.low, grid.high)
        return grid.round_(rounded, grid.low, grid.high), scale

    def arguments(self) -> dict[str, Any]:
        """`input_activations` of compressed-tensors."""
        strategy = "tensor" if self.scale is not None else "group" if self.group_size else "token"
        return {
            "num_bits": 8,
            "type": "int" if self.kind == "int8" else "float",
            "symmetric": True,
            "strategy": strategy,
            "group_size": self.group_size,
            "dynamic": self.scale is None,
        }

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any], scale: Tensor | None) -> Activations:
        """The inverse of `arguments`; ``scale`` is the linear's `input_scale`, if it has one."""
        return cls("int8" if arguments["type"] == "int" else "fp8", arguments.get("group_size"), scale)
