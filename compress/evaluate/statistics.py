"""Paired tests of two models on the same items: is the second worse by more than a margin, or is it noise?

Every test is one-sided: a p-value is the chance of what was measured, or worse, if the true change were the margin. Differences that are all zero
have p = 1, so that a model never fails beside itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

CONFIDENCE = 0.95
"""Of intervals, which are two-sided and of one figure at a time."""
POWER = 0.8
"""How likely a change of the size `detectable` says is to be found."""
RESAMPLES = 9999
AT_ONCE = 1 << 22
"""Counts of a bootstrap that are held at once."""

Array = NDArray[Any]


@dataclass(frozen=True)
class Tested:
    """The ``value`` of a figure with its `CONFIDENCE` ``interval``, how likely it or a larger one is if the true one is the margin (``p``), its
    standard ``error``, and the ``method`` of the test."""

    value: float
    interval: tuple[float, float]
    p: float
    error: float
    method: str


def bootstrap(totals: Array, weights: Array, margin: float = 0.0, *, resamples: int = RESAMPLES, seed: int = 0) -> Tested:
    """Whether ``sum(totals) / sum(weights)`` is above `margin`, by the studentised bootstrap over sequences (Davison and Hinkley 1997, 4.4.1 and
    5.2.1): `totals` [sequences] are sums over the tokens of each, `weights` how many these are.

    Resampling whole sequences keeps what tokens of one sequence have in common. Dividing by the standard error of each resample makes the level hold
    where sequences are few or some differ much more than others.
    """
    count, size = len(totals), float(weights.sum())
    value = float(totals.sum()) / size
    centred = totals - value * weights
    error = _error(float((centred**2).sum()), count, size)
    if error == 0.0:
        return Tested(value, (value, value), 1.0 if value <= margin else 1 / (resamples + 1), 0.0, "paired bootstrap over sequences")
    generator = np.random.Generator(np.random.PCG64(seed))
    powers = np.stack([centred, weights, centred**2, centred * weights, weights**2])
    drawn = []
    for start in range(0, resamples, step := max(1, AT_ONCE // count)):
        chosen = generator.multinomial(count, np.full(count, 1 / count), size=min(step, resamples - start))
        centre, size_, square, cross, weight = powers @ chosen.T
        shift = centre / size_
        # What `_error` says of each resample; rounding can leave less than nothing where all its sequences are one.
        spread = np.sqrt(np.maximum(square - 2 * shift * cross + shift**2 * weight, 0.0) * count / (count - 1)) / size_
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn.append(np.nan_to_num(shift / spread, nan=0.0))
    ratios = np.concatenate(drawn)
    observed = (value - margin) / error
    p = (1 + int((ratios >= observed).sum())) / (resamples + 1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.clip(ratios, -1e6, 1e6), [tail, 1 - tail])
    return Tested(value, (value - float(high) * error, value - float(low) * error), p, error, "paired bootstrap over sequences")


def _error(squares: float, count: int, size: float) -> float:
    """The standard error of a ratio of sums from the sum of squares of its residuals (linearised)."""
    return math.sqrt(squares * count / (count - 1)) / size


def net(worse: int, better: int, items: int, margin: float = 0.0) -> Tested:
    """Whether the share of `items` that became ``worse``, less the share that became ``better``, is above `margin`.

    Without a margin this is McNemar's exact test: of those that changed, half should have become worse by chance. With one it is Tango's score test
    (Statistics in Medicine 17, 1998, 891-908), which is asymptotic. The interval is Tango's.
    """
    value = (worse - better) / items
    changed = (worse + better) / items
    error = math.sqrt(max(changed - value**2, 0.0) / items)
    if margin == 0.0:
        p = float(stats.binom.sf(worse - 1, worse + better, 0.5)) if worse else 1.0
        return Tested(value, _tango_interval(worse, better, items), p, error, "McNemar, exact")
    p = float(stats.norm.sf(tango(worse, better, items, margin)))
    return Tested(value, _tango_interval(worse, better, items), p, error, "Tango's score test")


def tango(worse: int, better: int, items: int, difference: float) -> float:
    """How many standard errors ``(worse - better) / items`` is above `difference`, the error being the likeliest one if that is true."""
    # The share that becomes better, given the difference, solves a x^2 + b x + c = 0.
    a = 2 * items
    b = (2 * items - worse + better) * difference - worse - better
    c = -better * difference * (1 - difference)
    share = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = items * (2 * share + difference * (1 - difference))
    above = worse - better - items * difference
    return above / math.sqrt(variance) if variance > 1e-12 else math.copysign(math.inf, above) if abs(above) > 1e-12 else 0.0


def _tango_interval(worse: int, better: int, items: int) -> tuple[float, float]:
    """The differences that a two-sided test of level 1 - `CONFIDENCE` does not refuse."""
    limit, value = float(stats.norm.isf((1 - CONFIDENCE) / 2)), (worse - better) / items
    edge = 1 - 1e-9

    def crossing(target: float, end: float) -> float:
        def excess(difference: float) -> float:
            return max(-1e6, min(1e6, tango(worse, better, items, difference))) - target

        return float(optimize.brentq(excess, end, value)) if excess(end) * excess(value) < 0 else end

    return crossing(limit, -edge), crossing(-limit, edge)


def share(count: int, items: int, margin: float) -> Tested:
    """Whether the true share that `count` of `items` is of is above `margin`: the exact binomial test, with Clopper and Pearson's interval."""
    test = stats.binomtest(count, items, margin, alternative="greater")
    interval = stats.binomtest(count, items).proportion_ci(CONFIDENCE, "exact")
    value = count / items
    p = 1.0 if count == 0 else float(test.pvalue)
    return Tested(value, (float(interval.low), float(interval.high)), p, math.sqrt(value * (1 - value) / items), "binomial, exact")


def holm(values: Sequence[float]) -> list[float]:
    """P-values adjusted for being several (Holm 1979): refusing those up to alpha refuses a true hypothesis at all with a chance of at most alpha."""
    order = sorted(range(len(values)), key=values.__getitem__)
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = highest
    return adjusted


def detectable(error: float, level: float) -> float:
    """How far above its margin a figure of this standard `error` must truly be for a test at `level` to find it with a chance of `POWER`."""
    return float(stats.norm.isf(level) + stats.norm.isf(1 - POWER)) * error


def fewest(level: float) -> int:
    """How many items must become worse, and none better, before McNemar's exact test is significant at `level`."""
    return math.ceil(-math.log2(level) - 1e-9)
