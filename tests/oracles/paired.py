"""Paired tests by the slowest, clearest means: loops, enumeration and maximised likelihoods."""

from __future__ import annotations

import itertools
import math
import random


def ratio(totals: list[float], weights: list[float]) -> float:
    return sum(totals) / sum(weights)


def standard_error(totals: list[float], weights: list[float]) -> float:
    """Of a ratio of sums, by its linearisation, one sequence after the other."""
    value, count = ratio(totals, weights), len(totals)
    squares = sum((total - value * weight) ** 2 for total, weight in zip(totals, weights, strict=True))
    return math.sqrt(squares * count / (count - 1)) / sum(weights)


def bootstrap_p(totals: list[float], weights: list[float], margin: float, resamples: int, seed: int) -> float:
    """Studentised, one resample after the other, each as a list of its own."""
    generator, value, error = random.Random(seed), ratio(totals, weights), standard_error(totals, weights)
    observed, beyond = (value - margin) / error, 0
    for _ in range(resamples):
        chosen = [generator.randrange(len(totals)) for _ in totals]
        some, many = [totals[index] for index in chosen], [weights[index] for index in chosen]
        spread, shift = standard_error(some, many), ratio(some, many) - value
        beyond += (shift / spread if spread else math.copysign(math.inf, shift) if shift else 0.0) >= observed
    return (1 + beyond) / (resamples + 1)


def bootstrap_exact(totals: list[float], weights: list[float], margin: float, studentised: bool = True) -> tuple[float, float, float]:
    """The p-value, and the ends of the interval, that endless resamples tend to: every multiset of the sequences with its chance.

    Not `studentised`, each shift is divided by the one standard error of the data, as the plain bootstrap does.
    """
    count, value, error = len(totals), ratio(totals, weights), standard_error(totals, weights)
    found = []
    for chosen in itertools.combinations_with_replacement(range(count), count):
        some, many = [totals[index] for index in chosen], [weights[index] for index in chosen]
        shift, spread = ratio(some, many) - value, standard_error(some, many) if studentised else error
        ways = math.factorial(count) / math.prod(math.factorial(chosen.count(index)) for index in set(chosen))
        found.append((shift / spread if spread > 1e-12 else math.copysign(math.inf, shift) if shift else 0.0, ways / count**count))
    found.sort()
    beyond = sum(chance for ratio_, chance in found if ratio_ >= (value - margin) / error)
    ends = []
    for tail in (0.025, 0.975):
        below, index = 0.0, -1
        while below < tail:
            index += 1
            below += found[index][1]
        ends.append(found[index][0])
    return beyond, value - ends[1] * error, value - ends[0] * error


def mcnemar_p(worse: int, better: int) -> float:
    """Every way in which those that changed could have done so, counted."""
    ways = list(itertools.product((0, 1), repeat=worse + better))
    return sum(sum(way) >= worse for way in ways) / len(ways)


def tango_z(worse: int, better: int, items: int, difference: float, steps: int = 200_000) -> float:
    """The likelihood of each share that became better is tried, the other share being that plus `difference`."""
    best, found = -math.inf, 0.0
    for step in range(1, steps):
        share = max(0.0, -difference) + step / steps * (1 - abs(difference)) / 2
        counts = ((worse, share + difference), (better, share), (items - worse - better, 1 - 2 * share - difference))
        if any(chance <= 0 and count for count, chance in counts):
            continue
        likelihood = sum(count * math.log(chance) for count, chance in counts if count)
        if likelihood > best:
            best, found = likelihood, share
    return ((worse - better) / items - difference) / math.sqrt((2 * found + difference - difference**2) / items)


def binomial_p(count: int, items: int, chance: float) -> float:
    return sum(math.comb(items, each) * chance**each * (1 - chance) ** (items - each) for each in range(count, items + 1))


def holm(values: list[float], alpha: float) -> list[bool]:
    """Which hypotheses are refused, step by step as Holm wrote it: the smallest first, until one is not."""
    refused = [False] * len(values)
    left = list(range(len(values)))
    while left:
        least = min(left, key=lambda index: values[index])
        if values[least] > alpha / len(left):
            break
        refused[least] = True
        left.remove(least)
    return refused


def kl(before: list[float], after: list[float]) -> float:
    """Divergence of a distribution from another, both as log-probabilities, in nats."""
    return sum(math.exp(one) * (one - other) for one, other in zip(before, after, strict=True))
