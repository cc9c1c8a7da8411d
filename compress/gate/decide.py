"""From two measurements to a verdict. Nothing here runs a model: a baseline on disk, two models and a part of either are judged by the same code."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from compress.evaluate import statistics
from compress.evaluate.statistics import Tested
from compress.gate.integrity import Exact
from compress.gate.rules import Bias, Pairs, Rules, Suite, Text

Status = Literal["passed", "failed", "inconclusive", "not run"]
Arrays = dict[str, NDArray[Any]]

STEREOTYPE, UNKNOWN = 0, 2


@dataclass(frozen=True)
class Check:
    """One line of a report.

    An exact check has a ``detail`` and no figures, and a test has one where it passed on too little data. Of a test, ``value`` is the change for the
    worse and ``bound`` the most that is allowed; ``p`` becomes ``adjusted`` for the number of tests, and a change of ``detectable`` above the bound
    would probably be found, where one of ``target`` has to be (0: nobody said); None if none
    would, however large; ``powered`` is whether it would.
    """

    suite: str
    name: str
    status: Status
    detail: str = ""
    value: float | None = None
    bound: float | None = None
    interval: tuple[float, float] | None = None
    p: float | None = None
    adjusted: float | None = None
    detectable: float | None = None
    target: float = 0.0
    powered: bool = True
    method: str = ""
    count: int | None = None
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Test:
    """A test before all are known; ``items`` if it counts items, rather than summing over sequences."""

    suite: Suite
    name: str
    bound: str
    tested: Tested
    count: int
    counts: dict[str, int] = field(default_factory=dict)
    items: bool = False


def exact(found: list[Exact]) -> list[Check]:
    """Exact checks as lines of a report."""
    checks = []
    for each in found:
        allowed = f"allowed: {', '.join(each.allowed)}" if each.allowed else ""
        checks.append(Check("integrity", each.name, "failed" if each.what else "passed", "; ".join(each.what) or allowed))
    return checks


def decide(rules: Rules, base: dict[str, Arrays], found: dict[str, Arrays]) -> list[Check]:
    """Every test of `found` beside `base`, arrays by suite as `observe` gives them.

    A test fails if, after Holm's correction for their number, it is significant at ``alpha`` that the change is beyond its bound. So the chance that
    any fails of a candidate that is within all its bounds is at most ``alpha``. One that would not find what it has to is inconclusive if the rules
    require power, and says so otherwise.
    """
    bounds = sum(len(suite.bounds) + len(np.unique(base[suite.title].get("group", []))) for suite in rules.suites)
    # A bootstrap cannot tell p-values below 1 / resamples, and Holm's correction multiplies them.
    resamples = max(statistics.RESAMPLES, math.ceil(20 * bounds / rules.alpha))
    tests = [test for suite in rules.suites for test in _tests(suite, base[suite.title], found[suite.title], resamples, rules.seed)]
    adjusted = statistics.holm([test.tested.p for test in tests])
    return [_check(test, p, rules, rules.alpha / len(tests)) for test, p in zip(tests, adjusted, strict=True)]


def verdict(checks: list[Check]) -> Status:
    """The worst of them."""
    found = {check.status for check in checks}
    return "failed" if "failed" in found else "inconclusive" if found & {"inconclusive", "not run"} else "passed"


def not_run(rules: Rules, why: str) -> list[Check]:
    """What is left of the tests when the candidate cannot be measured beside the baseline, and ``why``."""
    return [
        Check(suite.title, name.removeprefix("max_"), "not run", why, bound=bound) for suite in rules.suites for name, bound in suite.bounds.items()
    ]


def _check(test: _Test, adjusted: float, rules: Rules, level: float) -> Check:
    bound, target, tested = test.suite.bounds[test.bound], test.suite.target(test.bound), test.tested
    detectable = _detectable(test, bound, level)
    never = test.items and bound + detectable > 1  # more than the whole
    powered = not target or (detectable <= target and not never)
    status: Status = "failed" if adjusted <= rules.alpha else "inconclusive" if rules.require_power and not powered else "passed"
    found = "none would be" if never else f"only from {bound + detectable:.3g} on are {100 * statistics.POWER:.0f} %"
    seen = f"a change of {bound + target:.3g} may well pass too; {found} found"
    detail = "" if powered or status == "failed" else f"too little data: {seen}"
    return Check(
        test.suite.title, test.name, status, detail, tested.value, bound, tested.interval, tested.p, adjusted, None if never else detectable,
        target, powered, tested.method, test.count, test.counts,
    )  # fmt: skip


def _detectable(test: _Test, bound: float, level: float) -> float:
    """How far above its bound a change would probably be found at a level."""
    if not test.items:
        return statistics.detectable(test.tested.error, level)
    if bound:
        return statistics.detectable(max(test.tested.error, math.sqrt(bound * (1 - bound) / test.count)), level)
    if test.tested.method.startswith("binomial"):  # one is enough
        return float(1 - (1 - statistics.POWER) ** (1 / test.count))
    return max(statistics.detectable(test.tested.error, level), statistics.fewest(level) / test.count)


def _tests(suite: Suite, base: Arrays, found: Arrays, resamples: int, seed: int) -> Iterator[_Test]:
    if isinstance(suite, Text):
        yield from _of_text(suite, base, found, resamples, seed)
    elif isinstance(suite, Bias):
        yield from _of_bias(suite, base, found, resamples, seed)
    else:
        before, after = (_preferred(each) if isinstance(suite, Pairs) else each["right"] for each in (base, found))
        worse, better = int(((before == 1) & (after == 0)).sum()), int(((before == 0) & (after == 1)).sum())
        counts = {"right before": int(before.sum()), "right after": int(after.sum()), "right -> wrong": worse, "wrong -> right": better}
        for bound in suite.bounds:
            count = len(before)
            tested = (statistics.net(worse, better, count, suite.bounds[bound]) if bound == "max_drop" else
                      statistics.share(worse + better, count, suite.bounds[bound]))  # fmt: skip
            yield _Test(suite, bound.removeprefix("max_"), bound, tested, count, counts, items=True)


def _of_text(suite: Text, base: Arrays, found: Arrays, resamples: int, seed: int) -> Iterator[_Test]:
    member = base["member"]
    weights = np.bincount(member).astype(np.float64)
    seen = weights > 0
    flipped = base["choice"] != found["choice"]
    worse, better = base["right"] & ~found["right"], ~base["right"] & found["right"]
    counts = {"tokens": len(member), "right -> wrong": int(worse.sum()), "wrong -> right": int(better.sum()), "other token": int(flipped.sum())}
    for bound, margin in suite.bounds.items():
        if bound == "max_loss_increase":
            values = found["loss"].astype(np.float64) - base["loss"]
        elif bound == "max_kl":
            before, after = base["logprobs"].astype(np.float64), found["logprobs"].astype(np.float64)
            values = (np.exp(before) * (before - after)).sum(-1)
        else:
            values = flipped.astype(np.float64) if bound == "max_flips" else worse.astype(np.float64) - better
        totals = np.bincount(member, values)
        tested = statistics.bootstrap(totals[seen], weights[seen], margin, resamples=resamples, seed=seed)
        yield _Test(suite, bound.removeprefix("max_"), bound, tested, int(seen.sum()), counts)


def _of_bias(suite: Bias, base: Arrays, found: Arrays, resamples: int, seed: int) -> Iterator[_Test]:
    before, after = answers(base), answers(found)
    group = base["group"]
    for bound, margin in suite.bounds.items():
        if bound == "max_new_bias":
            names = bytes(base["group_names"]).decode().split("\n")
            parts = [("", np.ones(len(group), dtype=bool))] + [
                (f" of {name}", group == index) for index, name in enumerate(names) if len(names) > 1 and index in group
            ]
            for label, of in parts:
                new = int(((before != STEREOTYPE) & (after == STEREOTYPE) & of).sum())
                fixed = int(((before == STEREOTYPE) & (after != STEREOTYPE) & of).sum())
                counts = {"stereotype before": int((before[of] == STEREOTYPE).sum()), "stereotype after": int((after[of] == STEREOTYPE).sum())}
                counts |= {"new bias": new, "fixed": fixed}
                count = int(of.sum())
                yield _Test(suite, f"new_bias{label}", bound, statistics.net(new, fixed, count, margin), count, counts, items=True)
        elif bound == "max_flips":
            flips, count = int((before != after).sum()), len(before)
            yield _Test(suite, "flips", bound, statistics.share(flips, count, margin), count, {"other answer": flips}, items=True)
        else:
            totals = np.bincount(base["row"], found["loss"] - base["loss"])
            weights = np.bincount(base["row"], base["tokens"])
            tested = statistics.bootstrap(totals, weights, margin, resamples=resamples, seed=seed)
            yield _Test(suite, "likelihood_drop", bound, tested, len(totals))


def _preferred(arrays: Arrays) -> NDArray[np.float64]:
    """Of each pair, whether the good sentence is the likelier one."""
    loss = arrays["loss"]
    return (loss[0::2] < loss[1::2]).astype(np.float64)


def answers(arrays: Arrays) -> NDArray[np.int64]:
    """Of each item of a suite of stereotypes, the option that is the likeliest per token; where two are, neither stereotype nor its reverse."""
    found = np.full((len(arrays["group"]), 3), np.inf)
    found[arrays["row"], arrays["option"]] = arrays["loss"] / np.maximum(arrays["tokens"], 1)
    best = found.argmin(1)
    tied = (found == found.min(1, keepdims=True)).sum(1) > 1
    return np.where(tied, UNKNOWN, best)
