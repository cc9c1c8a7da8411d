"""Weights for which there is no kernel: kept as they are stored, unpacked some rows at a time and multiplied by torch.

For `e2m1` and `e4m3` `small` has a kernel for some tokens on a CPU, and comes here for all else.

====================  ==============================  =========================================================
coding                ``codes``                       of
====================  ==============================  =========================================================
``int2`` to ``int8``  int32 [out, words]              integers, the stream of `pack-quantized`; `ROUNDED` may follow
``e2m1``              uint8 [out, in / 2]             MXFP4 and NVFP4, two to a byte
``e4m3``              float8_e4m3fn [out, in]         FP8 and MXFP8
====================  ==============================  =========================================================

``scales`` [out, groups] are as stored, those of blocks of 128 x 128 once per output; ``zeros`` int8 alike or None; ``units`` float32 [1] is
what scales were multiplied by, or None. A kernel for one of these is another subclass of `Packed`, in a file of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compress.formats.mxfp4_pack_quantized import pack_nibbles, unpack_nibbles
from compress.formats.pack_quantized import pack_stream, unpack_stream
from compress.kernels.packed import NOTHING, Extras, Packed, described
from compress.numerics.grid import E2M1, E4M3, Grid, Integer, Quantized

AT_ONCE = 1 << 20
"""Weights unpacked at a time."""
ROUNDED = "-rounded"
"""What codings end with whose weights are rounded to the dtype of their scales."""

_library: Any = torch.library.Library("compress", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("unpacked_linear(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? units, str coding) -> Tensor")


def coding_of(grid: Grid) -> str:
    """The name of the layout that codes of a grid are kept in."""
    if isinstance(grid, Integer):
        return f"int{grid.bits}"
    return {E2M1: "e2m1", E4M3: "e4m3"}[type(grid)]


def stored(codes: Tensor, coding: str) -> Tensor:
    """Codes [out, in], as `Quantized` has them, as they are kept."""
    if coding.startswith("int"):
        return pack_stream(codes, _bits(coding))
    return pack_nibbles(codes) if coding == "e2m1" else codes.contiguous()


def _bits(coding: str) -> int:
    return int(coding.removeprefix("int").removesuffix(ROUNDED))


def unpacked(codes: Tensor, scales: Tensor, zeros: Tensor | None, units: Tensor | None, coding: str, columns: int) -> Tensor:
    """The weight [rows, in] float32."""
    if coding.startswith("int"):
        codes = unpack_stream(codes, _bits(coding), columns)
    elif coding == "e2m1":
        codes = unpack_nibbles(codes)
    scale = scales.float() if units is None else scales.float() / units
    values = torch.unflatten(codes.float(), 1, (scale.shape[1], -1))
    if zeros is not None:
        values -= zeros.float()[..., None]
    weight = values.mul_(scale[..., None]).flatten(1)
    return weight.to(scales.dtype).float() if coding.endswith(ROUNDED) else weight


def by_rows(x: Tensor, rows: int, weight: Callable[[slice], Tensor]) -> Tensor:
    """``x`` [..., in] times a weight [out, in] of which ``weight`` gives some rows, float32, in the dtype of ``x``."""
    given = x.reshape(-1, x.shape[-1]).float()
    some = max(1, AT_ONCE // x.shape[-1])
    outputs = torch.cat([given @ weight(slice(start, start + some)).T for start in range(0, rows, some)], 1)
    return outputs.to(x.dtype).view(*x.shape[:-1], rows)


def _product(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, units: Tensor | None, coding: str) -> Tensor:
    def weight(part: slice) -> Tensor:
        return unpacked(codes[part], scales[part], None if zeros is None else zeros[part], units, coding, x.shape[-1])

    return by_rows(x, codes.shape[0], weight)


def _fake(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, units: Tensor | None, coding: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


_library.impl("unpacked_linear", _product, "CompositeExplicitAutograd")
torch.library.register_fake("compress::unpacked_linear", _fake, lib=_library)


class UnpackedLinear(Packed):
    """A linear whose weight stays as it is stored and is unpacked for each product."""

    digits = 0

    def __init__(self, weight: Quantized, extras: Extras = NOTHING) -> None:
        super().__init__(weight.codes.shape, described(weight), extras)
        self.coding = coding_of(weight.grid)
        self.register_buffer("codes", stored(weight.codes, self.coding))
        self.register_buffer("scales", weight.by_output().contiguous())
        self.register_buffer("zeros", weight.zero_point)
        self.register_buffer("units", torch.tensor([weight.grid.unit]) if weight.scale.dtype == torch.float8_e4m3fn else None)

    def product(self, x: Tensor) -> Tensor:
        given = x if self.inputs is None else self.inputs.round(x)
        outputs: Tensor = torch.ops.compress.unpacked_linear(given, self.codes, self.scales, self.zeros, self.units, self.coding)
        return outputs

    @staticmethod
    def why_unpacked(stored: str, device: torch.device) -> str | None:
        return f"no kernel for {stored}"


class ExactLinear(UnpackedLinear):
    """One whose inputs are to stay as they are, whether or not a kernel could multiply it."""

    def __init__(self, weight: Quantized, extras: Extras = NOTHING, *, rounded: bool = False) -> None:
        """With `rounded`, weights of integers are rounded to the dtype of their scales."""
        super().__init__(weight, extras)
        if rounded and isinstance(weight.grid, Integer):
            self.coding += ROUNDED

    @staticmethod
    def why_unpacked(stored: str, device: torch.device) -> str | None:
        return "inputs are to stay as they are"
