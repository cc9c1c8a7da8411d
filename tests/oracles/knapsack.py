"""One option per unit within a budget, by trying every combination."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product


def least_cost(sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], budget: int) -> float | None:
    """The least sum of costs among all choices whose sizes sum to at most `budget`; None if there is none."""
    best = None
    for choice in product(*(range(len(each)) for each in sizes)):
        size = sum(each[option] for each, option in zip(sizes, choice, strict=True))
        cost = sum(each[option] for each, option in zip(costs, choice, strict=True))
        if size <= budget and (best is None or cost < best):
            best = cost
    return best
