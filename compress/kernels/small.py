"""Weights in small floats, E4M3 and E2M1: a kernel for some tokens that widens codes in registers, torch for many, some rows at a time.

Codes and scales lie as `unpacked` says. Products are of float32, and inputs are not rounded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.kernels import native
from compress.kernels.unpacked import UnpackedLinear, coding_of
from compress.numerics.grid import Integer, Quantized

FEW = 32
"""Tokens up to which the kernel is asked: a product of torch widens a weight once, the kernel once for every four."""
CODINGS = tuple(native.CODES)

_library: Any = torch.library.Library("compress", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("small_linear(Tensor x, Tensor codes, Tensor scales, Tensor? units, str coding) -> Tensor")


def _product(x: Tensor, codes: Tensor, scales: Tensor, units: Tensor | None, coding: str) -> Tensor:
    outputs: Tensor = torch.ops.compress.unpacked_linear(x, codes, scales, None, units, coding)
    return outputs


def _reads(coding: str, scale: torch.dtype, group: int) -> bool:
    return scale in native.SCALES and (coding == "e4m3" or group % 2 == 0)


def _on_cpu(x: Tensor, codes: Tensor, scales: Tensor, units: Tensor | None, coding: str) -> Tensor:
    tier, given = native.tier(), x.reshape(-1, x.shape[-1])
    if tier == "torch" or len(given) > FEW or not _reads(coding, scales.dtype, x.shape[-1] // scales.shape[1]):
        return _product(x, codes, scales, units, coding)
    outputs = native.small_floats(given.float().contiguous(), codes, scales, units, coding, tier)
    return outputs.to(x.dtype).view(*x.shape[:-1], len(codes))


def _fake(x: Tensor, codes: Tensor, scales: Tensor, units: Tensor | None, coding: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


_library.impl("small_linear", _on_cpu, "CPU")
_library.impl("small_linear", _product, "CUDA")
torch.library.register_fake("compress::small_linear", _fake, lib=_library)


class SmallLinear(UnpackedLinear):
    """A linear of small floats that a kernel multiplies where they lie."""

    @staticmethod
    def takes(weight: Quantized) -> bool:
        """Whether the kernel reads it: small floats, scales of a dtype it knows, and groups of whole bytes."""
        return not isinstance(weight.grid, Integer) and _reads(coding_of(weight.grid), weight.scale.dtype, weight.group_size)

    def product(self, x: Tensor) -> Tensor:
        given = x if self.inputs is None else self.inputs.round(x)
        outputs: Tensor = torch.ops.compress.small_linear(given, self.codes, self.scales, self.units, self.coding)
        return outputs

    @staticmethod
    def why_unpacked(stored: str, device: torch.device) -> str | None:
        return native.missing_why() if device.type == "cpu" else f"no kernel for {stored} on {device.type}"
