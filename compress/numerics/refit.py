"""The values that weights should have once it is known which of them are kept: least squares on the inputs, by conjugate gradients.

Each output is a problem of its own with its own matrix, ``H`` at the inputs it keeps; all of them take their steps together, so that a step is one
product with ``H`` (the second stage of ALPS, arXiv 2406.07831, section 3.3).
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 32


def refit(weight: Tensor, start: Tensor, kept: Tensor, hessian: Tensor, steps: int = STEPS) -> Tensor:
    """``start`` [..., out, in], which is zero where not ``kept`` (bool), after so many steps towards the outputs of ``weight`` [..., out, in].

    ``hessian`` [..., in, in] is the mean of ``x x^T``, damped. An output whose error did not shrink stays as it was at the start.
    """
    inverse = hessian.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(hessian.dtype).tiny).reciprocal()[..., None, :]
    found = start.clone()
    residual = ((weight - start) @ hessian) * kept
    scaled = residual * inverse
    direction, size = scaled, (residual * scaled).sum(-1, keepdim=True)
    for _ in range(steps):
        curved = (direction @ hessian) * kept
        step = _ratio(size, (direction * curved).sum(-1, keepdim=True))
        found += step * direction
        residual = residual - step * curved
        scaled = residual * inverse
        before, size = size, (residual * scaled).sum(-1, keepdim=True)
        direction = scaled + _ratio(size, before) * direction
    better = cost(weight - found, hessian) < cost(weight - start, hessian)
    return torch.where(better[..., None], found, start)


def cost(error: Tensor, hessian: Tensor) -> Tensor:
    """``e H e^T`` of each row of ``error`` [..., out, in], [..., out]: the mean squared error of each output."""
    return ((error @ hessian) * error).sum(-1)


def _ratio(one: Tensor, other: Tensor) -> Tensor:
    """``one / other``, 0 where there is nothing left to gain."""
    return torch.where(other > 0, one / other, 0.0)
