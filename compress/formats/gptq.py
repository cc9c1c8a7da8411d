"""GPTQ's layout, as AutoGPTQ wrote it and GPTQModel, its successor, vLLM, SGLang and transformers read it.

========================  ======================================  ========================================================
tensor                    dtype, shape                            content
========================  ======================================  ========================================================
``X.qweight``             int32 [in * bits / 32, out]             ``q + 2^(b-1)``, a little-endian stream of bits along ``in``
``X.qzeros``              int32 [groups, out * bits / 32]         zero points ``+ 2^(b-1)``, in version 1 less one; along ``out``
``X.scales``              float16 [groups, out]                   multiply
``X.g_idx``               int32 [in]                              the group of each input
========================  ======================================  ========================================================

The stream of codes is that of `pack_quantized`, transposed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.formats.pack_quantized import pack_stream, unpack_stream
from compress.numerics.grid import Quantized


def pack(linear: str, weight: Quantized, version: int) -> dict[str, Tensor]:
    """The tensors of one linear. Version 1 stores zero points less one, so it has no place for the lowest."""
    rows, groups = weight.codes.shape[0], weight.scale.shape[1]
    zeros = torch.zeros(rows, groups, dtype=torch.int8) if weight.zero_point is None else weight.zero_point
    return {
        f"{linear}.qweight": pack_stream(weight.codes, weight.bits).T.contiguous(),
        f"{linear}.qzeros": pack_stream((zeros - int(version == 1)).T.contiguous(), weight.bits),
        f"{linear}.scales": weight.scale.T.to(torch.float16).contiguous(),
        f"{linear}.g_idx": (torch.arange(weight.codes.shape[1]) // weight.group_size).to(torch.int32),
    }


def unpack(linear: str, tensors: dict[str, Tensor], bits: int, version: int) -> Tensor:
    """The weight that the tensors mean, [out, in] float32."""
    packed, zeros, scales, index = (tensors[f"{linear}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx"))
    codes = unpack_stream(packed.T.contiguous(), bits, len(index)).T.float()
    points = unpack_stream(zeros, bits, scales.shape[1]).float() + int(version == 1)
    return ((codes - points[index]) * scales.float()[index]).T.contiguous()
