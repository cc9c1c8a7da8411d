"""MLX's affine layout: a weight is ``q * scale + bias`` with ``q`` from zero on.

========================  ======================================  ========================================================
tensor                    dtype, shape                            content
========================  ======================================  ========================================================
``X.weight``              uint32 [out, in * bits / 32]            ``q + 2^(b-1)``, a little-endian stream of bits along ``in``
``X.scales``              the scale's dtype [out, groups]         multiply
``X.biases``              the same                                add: ``-(zero_point + 2^(b-1)) * scale``
========================  ======================================  ========================================================

Of a symmetric weight the bias is the scale times a power of two, so nothing is rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.formats.pack_quantized import pack_stream, unpack_stream
from compress.numerics.grid import Quantized


def pack(linear: str, weight: Quantized, group_size: int) -> dict[str, Tensor]:
    """The tensors of one linear with a scale per ``group_size`` inputs, which divides that of the weight; inputs come in multiples of 32."""
    lowest = torch.full(weight.scale.shape, -(1 << weight.bits - 1)) - (0 if weight.zero_point is None else weight.zero_point)
    times = weight.group_size // group_size
    return {
        f"{linear}.weight": pack_stream(weight.codes, weight.bits).view(torch.uint32),
        f"{linear}.scales": weight.scale.repeat_interleave(times, 1),
        f"{linear}.biases": (lowest * weight.scale.float()).to(weight.scale.dtype).repeat_interleave(times, 1),
    }


def unpack(linear: str, tensors: dict[str, Tensor], bits: int, group_size: int) -> Tensor:
    """The weight that the tensors mean, [out, in] float32."""
    packed, scales, biases = (tensors[f"{linear}.{part}"] for part in ("weight", "scales", "biases"))
    codes = unpack_stream(packed.view(torch.int32), bits, scales.shape[1] * group_size).float() + (1 << bits - 1)
    return codes * scales.float().repeat_interleave(group_size, 1) + biases.float().repeat_interleave(group_size, 1)
