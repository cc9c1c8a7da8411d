"""Scores of units, and which stay, against the definitions written out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.numerics.saliency import Choice, Moments, best, first_order, fluctuation, magnitude, share_out, standardised, wanda


def columns_and_inputs(seed: int, count: int = 4, run: int = 3, rows: int = 5, tokens: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, count * run, generator=generator), torch.randn(tokens, count * run, generator=generator) * 2 + 1


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 99))
def test_moments_do_not_depend_on_how_tokens_come(parts: list[int], seed: int) -> None:
    rows = torch.randn(sum(parts), 3, generator=torch.Generator().manual_seed(seed)) * 3 + 7
    moments = Moments(3, torch.device("cpu"))
    for part in torch.split(rows, parts):
        moments.add(part[None])
    assert moments.tokens == len(rows)
    if len(rows):
        assert np.allclose(moments.mean, rows.double().numpy().mean(0)) and np.allclose(moments.variance(), rows.double().numpy().var(0))
        assert np.allclose(moments.norm(), np.sqrt((rows.double().numpy() ** 2).mean(0)))


@pytest.mark.parametrize("run", [1, 3])
def test_fluctuation_is_the_variance_of_inputs_times_the_squared_norm_of_their_weights(run: int) -> None:
    columns, inputs = columns_and_inputs(0, run=run)
    each = inputs.double().numpy().var(0) * (columns.double().numpy() ** 2).sum(0)
    expected = each if run == 1 else (each.reshape(4, run) ** 2).mean(1)
    moments = Moments(4 * run, torch.device("cpu"))
    moments.add(inputs)
    assert np.allclose(fluctuation(columns, moments.variance(), 4), expected)


def test_magnitude_wanda_and_first_order_sum_over_a_unit() -> None:
    columns, inputs = columns_and_inputs(1)
    rows = torch.randn(12, 7)
    norm = inputs.double().square().mean(0).sqrt()
    gradient, of_columns = torch.randn(12, 7), torch.randn(5, 12)
    for unit in range(4):
        mine = slice(3 * unit, 3 * unit + 3)
        assert torch.isclose(magnitude([rows], columns, 4)[unit], (columns[:, mine].abs().sum() + rows[mine].abs().sum()).double(), rtol=1e-5)
        assert torch.isclose(wanda(columns, norm, 4)[unit], (columns.abs().double().mean(0) * norm)[mine].sum())
        expected = (rows * gradient)[mine].abs().sum() + (columns * of_columns)[:, mine].abs().sum()
        assert torch.isclose(first_order([rows, columns], [gradient, of_columns], 4)[unit], expected.double(), rtol=1e-5)


def test_equal_scores_are_standardised_to_zero() -> None:
    assert torch.equal(standardised(torch.full((4,), 3.0, dtype=torch.float64)), torch.zeros(4, dtype=torch.float64))
    other = standardised(torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64))
    assert abs(float(other.mean())) < 1e-12 and abs(float(other.square().mean()) - 1) < 1e-12


def test_the_best_stay_in_order_and_ties_go_to_the_first() -> None:
    assert best(torch.tensor([1.0, 3.0, 2.0, 3.0]), 2).tolist() == [1, 3]
    assert best(torch.tensor([2.0, 2.0, 2.0]), 2).tolist() == [0, 1]
    assert best(torch.tensor([9.0, 8.0, 1.0, 2.0]), 2, parts=2).tolist() == [0, 3]  # one of each half


def affordable(choices: dict[str, Choice], kept: dict[str, int]) -> int:
    return sum((len(choice.scores) - kept[name]) * choice.cost for name, choice in choices.items())


@given(st.integers(0, 200), st.integers(0, 60))
def test_sharing_out_takes_the_least_valuable_first_and_never_too_much(seed: int, remove: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(size, generator=generator, dtype=torch.float64) for size in (4, 6, 3)]
    choices = {str(index): Choice(each, cost, step, step) for index, (each, cost, step) in enumerate(zip(scores, (3, 2, 5), (1, 2, 1), strict=True))}
    kept = share_out(choices, remove)
    removed = affordable(choices, kept)
    assert removed <= remove
    for name, choice in choices.items():
        assert choice.least <= kept[name] <= len(choice.scores) and (len(choice.scores) - kept[name]) % choice.step == 0
    # What costs the same everywhere is taken exactly in the order of scores, which is the best there is: compare with every other way.
    equal = {name: Choice(each, 1, 1, 0) for name, each in zip("abc", scores, strict=True)}
    chosen = share_out(equal, min(remove, 13))

    def lost(kept: dict[str, int]) -> float:
        return sum(float(choice.scores.sort().values[: len(choice.scores) - kept[name]].sum()) for name, choice in equal.items())

    every = (dict(zip("abc", counts, strict=True)) for counts in itertools.product(range(5), range(7), range(4)))
    assert lost(chosen) == pytest.approx(min(lost(one) for one in every if affordable(equal, one) == min(remove, 13)))
