"""`nvfp4-pack-quantized` of compressed-tensors: E2M1 weights, an E4M3 scale for every 16 inputs, one more for the whole.

==========================  ==============================  =================================================================
tensor                      dtype, shape                    content
==========================  ==============================  =================================================================
``X.weight_packed``         uint8 [out, in/2]               as in `mxfp4-pack-quantized`
``X.weight_scale``          float8_e4m3fn [out, in/16]      scale times the global scale
``X.weight_global_scale``   float32 [1]                     what scales were multiplied by; the same for linears that are fused
==========================  ==============================  =================================================================

A weight is ``code * weight_scale / weight_global_scale``. Ours are powers of two, so that no engine loses a bit, whatever it multiplies in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.formats.mxfp4_pack_quantized import pack_nibbles, unpack_nibbles
from compress.numerics.grid import E2M1, Quantized

NAME = "nvfp4-pack-quantized"


def holds(dtypes: dict[str, str]) -> bool:
    """Whether parts of these dtypes, by name, are a linear in this layout."""
    return dtypes.get("weight_packed") == "U8" and dtypes.get("weight_scale") == "F8_E4M3"


def pack(linear: str, weight: Quantized) -> dict[str, Tensor]:
    """The tensors of one linear under their names on disk."""
    return {
        f"{linear}.weight_packed": pack_nibbles(weight.codes),
        f"{linear}.weight_scale": weight.scale.contiguous(),
        f"{linear}.weight_global_scale": torch.tensor([weight.grid.unit]),
    }


def unpack(linear: str, tensors: dict[str, Tensor]) -> Quantized:
    """The inverse of `pack`."""
    unit = float(tensors[f"{linear}.weight_global_scale"])
    return Quantized(unpack_nibbles(tensors[f"{linear}.weight_packed"]), tensors[f"{linear}.weight_scale"], None, E2M1(unit))
