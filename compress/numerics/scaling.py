"""How far to scale channels before rounding, from how large inputs and weights are. A channel that is never used keeps the factor 1."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_SCALE = 1e-4
LEAST_MAGNITUDE = 1e-5


def salient(inputs: Tensor, alpha: float, weights: Tensor | None = None, beta: float = 0.0) -> Tensor:
    """AWQ: ``inputs^alpha / weights^beta``, of the mean magnitudes [channels] of both, spread evenly around 1; without ``weights``, of inputs alone.

    arXiv 2306.00978, section 3.2, takes inputs alone, its first version weights too.
    """
    scale, used = inputs.pow(alpha), inputs > 0
    if weights is not None:
        scale, used = scale / weights.pow(beta), used & (weights > 0)
    if not used.any():
        return torch.ones_like(scale)
    scale = scale.clamp_min(LEAST_SCALE)
    lowest, highest = scale[used].aminmax()
    return torch.where(used, scale / (lowest * highest).sqrt(), 1.0)


def shared_out(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """SmoothQuant (arXiv 2211.10438, section 4): ``inputs^alpha / weights^(1 - alpha)`` of the largest magnitudes [channels] of both."""
    scale = inputs.clamp_min(LEAST_MAGNITUDE).pow(alpha) / weights.clamp_min(LEAST_MAGNITUDE).pow(1 - alpha)
    return torch.where((inputs > 0) & (weights > 0), scale, 1.0)


def tied(largest: Tensor, strength: float) -> Tensor:
    """SmoothAttention (arXiv 2405.04532, section 4.2): ``largest^strength`` of the largest magnitudes [heads, d] of keys, spread evenly around 1 in
    each head, alike in the two channels that rotary embedding turns together, rounded to powers of two."""
    pairs = torch.unflatten(largest, 1, (2, -1)).amax(1)
    factors = torch.stack([salient(head, strength) for head in pairs]).log2().round().exp2()
    return torch.cat([factors, factors], 1)
