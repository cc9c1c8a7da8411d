"""Paired tests against loops, enumeration and maximised likelihoods; their level by trying; and what is true of any."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import paired

from compress.evaluate import statistics


def sequences(count: int, seed: int = 0, mean: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    weights = generator.integers(5, 60, count).astype(float)
    return weights * mean + np.sqrt(weights) * generator.standard_t(5, count), weights


@pytest.mark.parametrize("margin", [0.0, -0.03])
def test_the_bootstrap_is_that_of_a_loop(margin: float) -> None:
    totals, weights = sequences(25, mean=0.03)
    found = statistics.bootstrap(totals, weights, margin, resamples=4000)
    assert found.value == pytest.approx(paired.ratio(list(totals), list(weights)))
    assert found.error == pytest.approx(paired.standard_error(list(totals), list(weights)))
    slow = paired.bootstrap_p(list(totals), list(weights), margin, 4000, seed=1)
    assert found.p == pytest.approx(slow, abs=4 * math.sqrt(2 * slow * (1 - slow) / 4000) + 1e-3)
    assert 0.001 < slow < 0.5  # neither end would tell much


@pytest.mark.parametrize("sign", [1, -1])
def test_few_skewed_sequences_are_tested_as_by_all_their_resamples(sign: int) -> None:
    """Eight sequences of which one moved much: here it is dividing by each resample's own standard error that decides."""
    weights = np.array([12.0, 20.0, 9.0, 31.0, 16.0, 25.0, 11.0, 18.0])
    totals = sign * np.array([0.4, 1.1, 0.1, 0.9, 0.3, 1.6, 0.2, 14.0])
    margin = -0.03 if sign > 0 else -0.28
    exact, *ends = paired.bootstrap_exact(list(totals), list(weights), margin)
    plain, *plain_ends = paired.bootstrap_exact(list(totals), list(weights), margin, studentised=False)
    found = statistics.bootstrap(totals, weights, margin, resamples=40_000)
    assert found.p == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 40_000) + 1e-4)
    assert found.interval == pytest.approx(ends, rel=0.05)
    assert abs(plain - exact) > 0.02 and abs(plain_ends[0] / ends[0] - 1) > 0.2  # or nothing would be told apart


def test_the_bootstrap_does_not_depend_on_how_much_is_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    totals, weights = sequences(30)
    whole = statistics.bootstrap(totals, weights, resamples=999)
    monkeypatch.setattr(statistics, "AT_ONCE", 70)
    parts = statistics.bootstrap(totals, weights, resamples=999)
    assert parts.p == whole.p and parts.interval == pytest.approx(whole.interval)


@pytest.mark.parametrize("count", [8, 40])
def test_the_bootstrap_keeps_its_level_where_nothing_changed(count: int) -> None:
    """400 texts without a change: at 5 % at most 20 are expected, and 33 are three standard deviations more."""
    refused = sum(statistics.bootstrap(*sequences(count, seed), resamples=499, seed=seed).p <= 0.05 for seed in range(400))
    assert 5 <= refused <= 33


def test_a_change_is_found_as_often_as_the_detectable_one_says() -> None:
    error = float(np.mean([statistics.bootstrap(*sequences(200, seed), resamples=9).error for seed in range(50)]))
    size = statistics.detectable(error, 0.05)
    found = sum(statistics.bootstrap(*sequences(200, seed, mean=size), resamples=299, seed=seed).p <= 0.05 for seed in range(200))
    assert 0.7 <= found / 200 <= 0.9


@given(st.integers(2, 40), st.integers(0, 100))
@settings(max_examples=30)
def test_identical_models_pass_with_certainty_and_swapping_them_negates(count: int, seed: int) -> None:
    totals, weights = sequences(count, seed)
    same = statistics.bootstrap(np.zeros(count), weights, resamples=99)
    assert (same.value, same.p, same.interval, same.error) == (0.0, 1.0, (0.0, 0.0), 0.0)
    one, other = (statistics.bootstrap(sign * totals, weights, resamples=199, seed=seed) for sign in (1, -1))
    assert one.value == -other.value and one.error == pytest.approx(other.error)
    assert one.interval == pytest.approx((-other.interval[1], -other.interval[0]))
    assert one.p + other.p >= 1.0  # both count themselves


def test_a_change_that_is_the_same_everywhere_is_certain() -> None:
    weights = np.full(10, 4.0)
    assert statistics.bootstrap(weights * 0.5, weights, 0.25, resamples=99).p == 0.01
    assert statistics.bootstrap(weights * 0.5, weights, 0.5, resamples=99).p == 1.0


def test_what_is_no_number_fails() -> None:
    totals = np.full(10, 0.1)
    totals[3] = np.nan
    assert statistics.bootstrap(totals, np.full(10, 4.0), 1.0, resamples=999).p == 0.001


@pytest.mark.parametrize(("worse", "better"), [(0, 0), (1, 0), (0, 3), (5, 0), (7, 2), (6, 6), (9, 4)])
def test_mcnemar_is_that_of_all_ways_counted(worse: int, better: int) -> None:
    assert statistics.net(worse, better, 50).p == pytest.approx(paired.mcnemar_p(worse, better))


@pytest.mark.parametrize(
    ("worse", "better", "items", "difference"), [(12, 5, 80, 0.02), (0, 0, 40, 0.05), (9, 0, 60, 0.1), (3, 11, 70, -0.05), (30, 2, 90, 0.2)]
)
def test_tango_is_that_of_the_likeliest_share(worse: int, better: int, items: int, difference: float) -> None:
    assert statistics.tango(worse, better, items, difference) == pytest.approx(paired.tango_z(worse, better, items, difference), abs=2e-3)


def test_tango_without_a_difference_is_mcnemar_without_exactness() -> None:
    assert statistics.tango(12, 5, 80, 0.0) == pytest.approx(7 / math.sqrt(17))


def test_tango_keeps_its_level_at_the_margin() -> None:
    generator = np.random.default_rng(0)
    drawn = generator.multinomial(300, [0.08, 0.05, 0.87], size=2000)
    refused = np.mean([statistics.net(int(worse), int(better), 300, 0.03).p <= 0.05 for worse, better, _ in drawn])
    assert 0.03 <= refused <= 0.065


@given(st.integers(0, 20), st.integers(0, 20), st.integers(40, 200))
def test_items_swapped_negate_and_intervals_hold_the_value(worse: int, better: int, items: int) -> None:
    one, other = statistics.net(worse, better, items), statistics.net(better, worse, items)
    assert one.value == -other.value and one.error == other.error
    assert one.interval == pytest.approx((-other.interval[1], -other.interval[0]), abs=1e-9)
    assert -1 <= one.interval[0] <= one.value <= one.interval[1] <= 1
    assert statistics.net(0, 0, items, 0.01).p > 0.5 and statistics.net(0, 0, items).p == 1.0


@given(st.integers(0, 30), st.integers(30, 60), st.floats(0.01, 0.9))
def test_shares_are_tested_by_summing_chances(count: int, items: int, margin: float) -> None:
    found = statistics.share(count, items, margin)
    assert found.p == pytest.approx(paired.binomial_p(count, items, margin), abs=1e-9)
    assert found.interval[0] <= found.value <= found.interval[1]


def test_no_change_passes_a_margin_of_nothing() -> None:
    assert statistics.share(0, 20, 0.0).p == 1.0 and statistics.share(1, 20, 0.0).p == 0.0


@given(st.lists(st.floats(0, 1), max_size=12), st.sampled_from([0.01, 0.05, 0.2]))
def test_holm_refuses_what_its_steps_refuse(values: list[float], alpha: float) -> None:
    adjusted = statistics.holm(values)
    assert [each <= alpha for each in adjusted] == paired.holm(values, alpha)
    assert all(one >= other for one, other in zip(adjusted, values, strict=True))


@pytest.mark.parametrize("level", [0.05, 0.01, 0.5])
def test_the_fewest_items_are_just_enough(level: float) -> None:
    fewest = statistics.fewest(level)
    assert statistics.net(fewest, 0, 100).p <= level < statistics.net(fewest - 1, 0, 100).p
