"""`mxfp8-quantized` of compressed-tensors: E4M3 weights, a power of two for every 32 inputs (OCP MX 1.0, section 5.1).

====================  =========================  =================================
tensor                dtype, shape               content
====================  =========================  =================================
``X.weight``          float8_e4m3fn [out, in]    codes
``X.weight_scale``    uint8 [out, in/32]         exponent of the scale, plus 127
====================  =========================  =================================
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.numerics.grid import E4M3, Quantized

NAME = "mxfp8-quantized"


def holds(dtypes: dict[str, str]) -> bool:
    """Whether parts of these dtypes, by name, are a linear in this layout."""
    return dtypes.get("weight") == "F8_E4M3" and dtypes.get("weight_scale") == "U8"


def pack(linear: str, weight: Quantized) -> dict[str, Tensor]:
    """The tensors of one linear under their names on disk."""
    return {f"{linear}.weight": weight.codes.contiguous(), f"{linear}.weight_scale": weight.scale.contiguous().view(torch.uint8)}


def unpack(linear: str, tensors: dict[str, Tensor]) -> Quantized:
    """The inverse of `pack`."""
    return Quantized(tensors[f"{linear}.weight"], tensors[f"{linear}.weight_scale"].view(torch.float8_e8m0fnu), None, E4M3())
