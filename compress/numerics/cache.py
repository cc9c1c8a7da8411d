"""FP8 E4M3 as KV caches hold it: one scale for all tokens, fixed beforehand, of all heads or of each.

Keys and values are [rows, heads, tokens, head size], keys after rotation. What is kept is ``x / scale`` rounded to E4M3, saturated at its
ends, and what attention reads is that times ``scale``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.numerics.activations import Activations
from compress.numerics.grid import E4M3_MAX

SMALLEST_SCALE = 2.0**-14
"""The least that float16 holds without loss. Engines take a scale of zero for none; larger than needed costs next to nothing in a float."""


def ranges(states: Tensor) -> Tensor:
    """Largest magnitude in each head of ``states``, float32 [heads]."""
    return states.abs().amax((0, 2, 3)).float()


def scale_for(largest: Tensor) -> Tensor:
    """The least scale under which ``largest`` is not cut off; float32, of the same shape.

    Rounded up to a bfloat16, so that it stays the same number in whichever dtype a reader keeps it.
    """
    exact = (largest.float() / E4M3_MAX).clamp_min(SMALLEST_SCALE)
    # The lower half of a float32 is what bfloat16 lacks; adding to it carries over into the upper half.
    return ((exact.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)


def as_cached(states: Tensor, scale: Tensor) -> Tensor:
    """``states`` as read back from a cache, in their dtype; ``scale`` float32, [1] or [heads, 1, 1]."""
    return Activations("fp8", scale=scale).round(states)


def squares(states: Tensor) -> Tensor:
    """Sum of squares, float64 []."""
    return states.double().square().sum()


def errors(states: Tensor, scale: Tensor) -> Tensor:
    """Squares of what `as_cached` changes, summed, float64 []."""
    return squares(as_cached(states, scale).float() - states.float())
