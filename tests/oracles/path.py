"""The integral of a quadratic's gradient in closed form, and midpoints as the paper has them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def quadratic(matrix: Tensor, slope: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Contributions to the change of ``w' A w / 2 + b' w``, element by element: its gradient is linear, so half of the way is the mean."""
    result = torch.zeros_like(before)
    for row in range(len(before)):
        mean = slope[row] + sum(matrix[row, column] * (before[column] + after[column]) / 2 for column in range(len(before)))
        result[row] = (after[row] - before[row]) * mean
    return result


def midpoints(gradient: Callable[[Tensor], Tensor], before: Tensor, after: Tensor, points: int) -> Tensor:
    """Mean gradient over so many midpoints of equal steps."""
    total = torch.zeros_like(before)
    for number in range(points):
        total += gradient(before + (number + 0.5) / points * (after - before))
    return total / points
