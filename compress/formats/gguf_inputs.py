"""What llama.cpp multiplies by on a CPU where it is given float32: inputs rounded as the type of the weight has it (``vec_dot_type`` of ggml).

=========================================  ==================  =====================================================================
weights                                    inputs              a block of them
=========================================  ==================  =====================================================================
F32                                        as they are
F16, BF16                                  the same            each number
Q4_0, Q5_0, Q8_0, MXFP4                    Q8_0                32 integers to 127, a scale rounded to float16 after it divided
Q4_1, Q5_1                                 Q8_1                the same, and for the minimum of a weight the sum of a block in float16
Q2_K, Q3_K, Q4_K, Q5_K, Q6_K               Q8_K                256 integers to 127, a scale in float32
=========================================  ==================  =====================================================================

Halves go to the even integer, as in its kernels for AVX2; those of its plain C go away from zero, which is another integer for exact halves alone.
Q8_K takes the sign of the largest number into the scale, which changes no product.
"""

from __future__ import annotations

import torch
from torch import Tensor

PEAK = torch.tensor(127.0)
"""A tensor, because torch divides a number by one as a product with what it is the inverse of, which is another float now and then."""
WIDTHS = {"Q8_0": 32, "Q8_1": 32, "Q8_K": 256}
"""Inputs that share a scale."""
HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}
INPUTS = (
    {kind: kind for kind in ("F32", *HALVES)}
    | dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "MXFP4"), "Q8_0")
    | dict.fromkeys(("Q4_1", "Q5_1"), "Q8_1")
    | dict.fromkeys(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"), "Q8_K")
)
"""The type of inputs by the type of the weight."""


def rounded(inputs: Tensor, kind: str) -> Tensor:
    """``inputs`` float32 [..., in] in the type ``kind``, one of `INPUTS`, alike: the numbers that they then are."""
    if kind == "F32":
        return inputs
    if kind in HALVES:
        return inputs.to(HALVES[kind]).float()
    codes, scale = _blocks(inputs, kind)
    return (codes * (scale if kind == "Q8_K" else scale.half().float())).flatten(-2)


def sums_off(inputs: Tensor) -> Tensor:
    """By how much the sums in Q8_1 differ from those of the `rounded` numbers, float32 [..., in / 32]."""
    codes, scale = _blocks(inputs, "Q8_1")
    whole, scale = codes.sum(-1), scale[..., 0]
    return (scale * whole).half().float() - scale.half().float() * whole


def _blocks(inputs: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Integers [..., blocks, width] and the scale of each block [..., blocks, 1], both float32, before that is rounded."""
    blocks = torch.unflatten(inputs, -1, (-1, WIDTHS[kind]))
    peak = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.where(peak > 0, PEAK / peak, 0)
    scale = torch.where(peak > 0, 1 / inverse, 0) if kind == "Q8_K" else peak / PEAK
    return (blocks * inverse).round(), scale
