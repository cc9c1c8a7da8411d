"""`float-quantized` of compressed-tensors: E4M3 weights with a scale per output, or per block of 128 x 128.

====================  ================================================  =============================
tensor                dtype, shape                                      content
====================  ================================================  =============================
``X.weight``          float8_e4m3fn [out, in]                           codes
``X.weight_scale``    model dtype [out, 1] or [ceil(out/128), in/128]   multiply
====================  ================================================  =============================

A weight of one row of blocks with one output is read as one with a scale per output: both say the same.
"""

from __future__ import annotations

from torch import Tensor

from compress.errors import InputError
from compress.numerics.grid import E4M3, Quantized

NAME = "float-quantized"
BLOCK = 128


def holds(dtypes: dict[str, str]) -> bool:
    """Whether parts of these dtypes, by name, are a linear in this layout."""
    return dtypes.get("weight") == "F8_E4M3" and dtypes.get("weight_scale") != "U8"


def pack(linear: str, weight: Quantized) -> dict[str, Tensor]:
    """The tensors of one linear under their names on disk."""
    return {f"{linear}.weight": weight.codes.contiguous(), f"{linear}.weight_scale": weight.scale.contiguous()}


def unpack(linear: str, tensors: dict[str, Tensor]) -> Quantized:
    """The inverse of `pack`. Raises `InputError` if the shapes contradict each other."""
    codes, scale = tensors[f"{linear}.weight"], tensors[f"{linear}.weight_scale"]
    rows, columns = codes.shape
    if scale.ndim == 2 and scale.shape[0] == rows and columns % scale.shape[1] == 0:
        return Quantized(codes, scale, None, E4M3())
    if scale.ndim == 2 and scale.shape == (-(-rows // BLOCK), columns / BLOCK):
        return Quantized(codes, scale, None, E4M3(BLOCK))
    raise InputError.one(linear, f"a scale of {list(scale.shape)} does not fit a weight of {[rows, columns]}")
