"""The integral of a gradient along the straight path from one set of weights to another.

For any smooth loss ``F``, ``F(after) - F(before)`` is the sum over all weights of ``(after - before) * mean gradient on the path``: each
weight's change is charged with its part of the whole, whatever its size (PQI, arXiv 2503.01901). The paper takes 32 equal steps; the
loss is so smooth along the path that two points of Gauss and Legendre are nearer to it than eight midpoints (docs/log.md).
"""

from __future__ import annotations

import torch
from torch import Tensor


def gauss_legendre(points: int) -> list[tuple[float, float]]:
    """Places in (0, 1) and weights that add up to one; the integral is exact for polynomials of degree ``2 * points - 1``.

    By the eigenvalues of the Jacobi matrix (Golub and Welsch, 1969).
    """
    order = torch.arange(1, points, dtype=torch.float64)
    beside = order / (4 * order.square() - 1).sqrt()
    places, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return [((1 + float(place)) / 2, float(first) ** 2) for place, first in zip(places, vectors[0], strict=True)]


def between(before: Tensor, after: Tensor, place: float) -> Tensor:
    """The weights at `place` on the path, 0 being ``before`` and 1 ``after``."""
    return before + place * (after - before)


def contributions(mean_gradient: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """What each weight's change does to the loss; signed, the sum over all weights of a model being the loss's whole change."""
    return mean_gradient * (after - before)
