"""One option per unit at the least total cost within a budget: the multiple-choice knapsack, solved for every budget at once.

Dynamic programming over the whole range of sizes. Plain numpy, so that a plan can be solved again without loading torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

CELLS = 1 << 17
"""Most sizes told apart: a hundred units of six options take a few tenths of a second and 13 MB."""


class Knapsack:
    """Units with options: ``sizes[unit][option]`` whole numbers, ``costs[unit][option]`` finite, lower is better.

    Sizes are counted in steps above the smallest choice, the step being their greatest common divisor. Where that would take more than
    `CELLS` steps, a longer one is used and sizes are rounded up to it, so that no budget is ever exceeded; `exact` is False then, and a
    budget may go unused by one step per unit at most. Among equal costs the last units get the smaller options. Raises ValueError if a
    unit has no option or a cost is not finite.
    """

    def __init__(self, sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]]) -> None:
        if not all(sizes) or not all(math.isfinite(cost) for each in costs for cost in each):
            raise ValueError("every unit needs an option and every cost must be finite")
        self._sizes, self._costs = sizes, costs
        self.smallest = sum(map(min, sizes))
        self.largest = sum(map(max, sizes))
        above = [[size - min(each) for size in each] for each in sizes]
        divisor = math.gcd(*(size for each in above for size in each)) or 1
        self._step = max(divisor, -(-(self.largest - self.smallest) // CELLS))
        self.exact = self._step == divisor
        self._steps = [[-(-size // self._step) for size in each] for each in above]
        self._solve()

    def _solve(self) -> None:
        """Fill ``_best[k]``, the least cost within ``k`` steps, and for each unit the option taken there."""
        count = sum(map(max, self._steps)) + 1
        best = np.zeros(count)
        self._taken: list[NDArray[np.int16]] = []
        for steps, costs in zip(self._steps, self._costs, strict=True):
            found = np.full(count, np.inf)
            taken = np.zeros(count, np.int16)
            for option in sorted(range(len(steps)), key=steps.__getitem__):
                candidate = best[: count - steps[option]] + costs[option]
                place = slice(steps[option], None)
                better = candidate < found[place]
                np.copyto(found[place], candidate, where=better)
                np.copyto(taken[place], option, where=better)
            best = found
            self._taken.append(taken)
        self._best = best

    def choose(self, budget: int) -> tuple[int, ...]:
        """The option of each unit at the least cost with sizes that sum to at most ``budget``. Raises ValueError if nothing is that small."""
        if budget < self.smallest:
            raise ValueError(f"the smallest choice takes {self.smallest}, more than {budget}")
        left = min((budget - self.smallest) // self._step, len(self._best) - 1)
        chosen = []
        for steps, taken in zip(reversed(self._steps), reversed(self._taken), strict=True):
            option = int(taken[left])
            chosen.append(option)
            left -= steps[option]
        return tuple(reversed(chosen))

    def size(self, chosen: Sequence[int]) -> int:
        """Sum of the sizes of a choice."""
        return sum(each[option] for each, option in zip(self._sizes, chosen, strict=True))

    def cost(self, chosen: Sequence[int]) -> float:
        """Sum of the costs of a choice."""
        return sum(each[option] for each, option in zip(self._costs, chosen, strict=True))

    def front(self) -> list[tuple[int, float]]:
        """The Pareto front: budgets at which the least cost falls, and what it falls to; ascending."""
        falls = np.flatnonzero(np.diff(self._best, prepend=np.inf) < 0)
        return [(self.smallest + int(place) * self._step, float(self._best[place])) for place in falls]
