"""`int-quantized` of compressed-tensors: 8-bit integers, one per byte, as W8A8 kernels read them.

====================  ======================  =============================
tensor                dtype, shape            content
====================  ======================  =============================
``X.weight``          int8 [out, in]          codes
``X.weight_scale``    model dtype [out, 1]    multiply
====================  ======================  =============================
"""

from __future__ import annotations

from torch import Tensor

from compress.numerics.grid import Integer, Quantized

NAME = "int-quantized"


def holds(dtypes: dict[str, str]) -> bool:
    """Whether parts of these dtypes, by name, are a linear in this layout."""
    return dtypes.get("weight") == "I8"


def pack(linear: str, weight: Quantized) -> dict[str, Tensor]:
    """The tensors of one linear under their names on disk."""
    return {f"{linear}.weight": weight.codes.contiguous(), f"{linear}.weight_scale": weight.scale.contiguous()}


def unpack(linear: str, tensors: dict[str, Tensor]) -> Quantized:
    """The inverse of `pack`."""
    return Quantized(tensors[f"{linear}.weight"], tensors[f"{linear}.weight_scale"], None, Integer(8, True))
