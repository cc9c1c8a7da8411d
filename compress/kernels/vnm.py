"""Weights of V:N:M that are not quantised: a block of V outputs is multiplied by the inputs it reads and by no others (arXiv 2410.16135, section 3).

Inputs are gathered once for a block, so that what is read of a weight is 4 / M of it. The zeros that N:M leaves among these are multiplied: they lie
at other places in every output, and to skip them costs a processor more than it saves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.formats.nm_packed import Compact
from compress.kernels import native
from compress.kernels.packed import NOTHING, Extras, Packed
from compress.kernels.unpacked import by_rows

FEW = 32
"""Tokens from which on a dense product of torch, whose weight is written anew for it, costs less."""

_library: Any = torch.library.Library("compress", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("vnm_linear(Tensor x, Tensor values, Tensor columns) -> Tensor")


def unpacked(values: Tensor, columns: Tensor, rows: slice, width: int) -> Tensor:
    """Some rows of the weight, [rows, in] float32."""
    some = values.flatten(0, 1)[rows].float()
    blocks = torch.arange(len(values), device=values.device).repeat_interleave(values.shape[1])[rows]
    return some.new_zeros(len(some), width).scatter_(1, columns[blocks].long(), some)


def _product(x: Tensor, values: Tensor, columns: Tensor) -> Tensor:
    return by_rows(x, values.shape[0] * values.shape[1], lambda rows: unpacked(values, columns, rows, x.shape[-1]))


def _on_cpu(x: Tensor, values: Tensor, columns: Tensor) -> Tensor:
    tier, given = native.tier(), x.reshape(-1, x.shape[-1])
    if tier == "torch" or len(given) > FEW:
        return _product(x, values, columns)
    return native.vnm(given.float().contiguous(), values, columns, tier).to(x.dtype).view(*x.shape[:-1], values.shape[0] * values.shape[1])


def _fake(x: Tensor, values: Tensor, columns: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0] * values.shape[1])


_library.impl("vnm_linear", _on_cpu, "CPU")
_library.impl("vnm_linear", _product, "CUDA")
torch.library.register_fake("compress::vnm_linear", _fake, lib=_library)


class VNMLinear(Packed):
    """A linear of V:N:M that is not quantised: ``codes`` [out / V, V, kept] and ``columns`` are those of `Compact`."""

    columns: Tensor
    coding, digits = "vnm", 0

    def __init__(self, weight: Compact, extras: Extras = NOTHING) -> None:
        blocks, height, _ = weight.values.shape
        dtype = str(weight.values.dtype).removeprefix("torch.")
        super().__init__((blocks * height, weight.width), f"{dtype}, {weight.pattern}", extras)
        self.register_buffer("codes", weight.values)
        self.register_buffer("columns", weight.columns)
        for name in ("scales", "zeros", "units"):
            self.register_buffer(name, None)

    def product(self, x: Tensor) -> Tensor:
        outputs: Tensor = torch.ops.compress.vnm_linear(x, self.codes, self.columns)
        return outputs

    @staticmethod
    def why_unpacked(stored: str, device: torch.device) -> str | None:
        return native.missing_why() if device.type == "cpu" else f"no kernel for V:N:M on {device.type}"
