"""`mxfp4-pack-quantized` of compressed-tensors: E2M1 weights, a power of two for every 32 inputs (OCP MX 1.0, section 5.1).

=====================  ======================  ====================================================================
tensor                 dtype, shape            content
=====================  ======================  ====================================================================
``X.weight_packed``    uint8 [out, in/2]       two codes: the even input in the low four bits; the sign is bit 3,
                                               below it the place in 0, .5, 1, 1.5, 2, 3, 4, 6
``X.weight_scale``     uint8 [out, in/32]      exponent of the scale, plus 127
=====================  ======================  ====================================================================
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.numerics.grid import E2M1, Quantized

NAME = "mxfp4-pack-quantized"
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def holds(dtypes: dict[str, str]) -> bool:
    """Whether parts of these dtypes, by name, are a linear in this layout."""
    return dtypes.get("weight_packed") == "U8" and dtypes.get("weight_scale") == "U8"


def pack_nibbles(codes: Tensor) -> Tensor:
    """E2M1 values float8_e4m3fn [out, in] to uint8 [out, in/2]; minus zero is stored as zero."""
    values = codes.float()
    place = torch.bucketize(values.abs(), torch.tensor(VALUES, device=codes.device)).to(torch.uint8)
    nibbles = place | (values < 0).to(torch.uint8) << 3
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    values = torch.tensor([*VALUES, *(-value for value in VALUES)], device=packed.device)
    nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten(1)
    return values[nibbles.int()].to(torch.float8_e4m3fn)


def pack(linear: str, weight: Quantized) -> dict[str, Tensor]:
    """The tensors of one linear under their names on disk."""
    return {f"{linear}.weight_packed": pack_nibbles(weight.codes), f"{linear}.weight_scale": weight.scale.contiguous().view(torch.uint8)}


def unpack(linear: str, tensors: dict[str, Tensor]) -> Quantized:
    """The inverse of `pack`."""
    scale = tensors[f"{linear}.weight_scale"].view(torch.float8_e8m0fnu)
    return Quantized(unpack_nibbles(tensors[f"{linear}.weight_packed"]), scale, None, E2M1())
