"""AWQ's layout for matrix products (`gemm`), as AutoAWQ wrote it and GPTQModel, vLLM, SGLang and transformers read it. Four bits alone.

========================  ======================================  ========================================================
tensor                    dtype, shape                            content
========================  ======================================  ========================================================
``X.qweight``             int32 [in, out / 8]                     ``q + 8``, eight outputs in a word, in the order of `ORDER`
``X.qzeros``              int32 [groups, out / 8]                 zero points ``+ 8``, likewise
``X.scales``              float16 [groups, out]                   multiply
========================  ======================================  ========================================================
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.numerics.grid import Quantized

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs lies in each nibble of a word, the lowest first."""


def pack(linear: str, weight: Quantized) -> dict[str, Tensor]:
    """The tensors of one linear; outputs come in multiples of eight."""
    zeros = torch.zeros(weight.codes.shape[0], weight.scale.shape[1], dtype=torch.int8) if weight.zero_point is None else weight.zero_point
    return {
        f"{linear}.qweight": _words(weight.codes),
        f"{linear}.qzeros": _words(zeros),
        f"{linear}.scales": weight.scale.T.to(torch.float16).contiguous(),
    }


def unpack(linear: str, tensors: dict[str, Tensor]) -> Tensor:
    """The weight that the tensors mean, [out, in] float32."""
    codes, zeros, scales = (tensors[f"{linear}.{part}"] for part in ("qweight", "qzeros", "scales"))
    size = len(codes) // len(scales)
    centred = _codes(codes) - _codes(zeros).repeat_interleave(size, 0)
    return (centred * scales.float().repeat_interleave(size, 0)).T.contiguous()


def _words(codes: Tensor) -> Tensor:
    """Signed codes int8 [out, n] to int32 [n, out / 8]."""
    outputs = (codes.T.to(torch.int32) + 8).view(codes.shape[1], -1, 8)
    shifts = torch.arange(0, 32, BITS, dtype=torch.int32)
    return (outputs[..., list(ORDER)] << shifts).sum(-1, dtype=torch.int32)


def _codes(words: Tensor) -> Tensor:
    """The inverse of `_words`, with the offset: float32 [n, out]."""
    nibbles = words[..., None] >> torch.arange(0, 32, BITS, dtype=torch.int32) & 15
    outputs = torch.empty_like(nibbles)
    outputs[..., list(ORDER)] = nibbles
    return outputs.flatten(1).float()
