"""N:M pruning against its oracles and against what must be true of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import sparsity as oracle
from torch import Tensor

from compress.numerics import permutation, sparsity
from compress.numerics.alps import alps
from compress.numerics.feedback import factorize
from compress.numerics.pattern import Pattern
from compress.numerics.refit import cost, refit
from compress.numerics.sparsegpt import prune_with_feedback

DAMP = 0.01
TWO_FOUR = Pattern(2, 4)
PATTERNS = ["2:4", "1:4", "4:8", "3:5", "1:2", "7:8", "4:2:5", "2:2:8", "1:2:4", "4:1:6"]


def problem(seed: int, rows: int = 8, columns: int = 24, batch: int = 1, tokens: int = 64) -> tuple[Tensor, Tensor]:
    """Weights and correlated, damped second moments, float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(batch, rows, columns, generator=generator, dtype=torch.float64)
    mix = torch.randn(batch, columns, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(batch, tokens, columns, generator=generator, dtype=torch.float64) @ mix
    hessian = inputs.mT @ inputs / tokens
    return weight, hessian + DAMP * torch.diag_embed(hessian.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).expand(-1, columns))


def sparsegpt(weight: Tensor, hessian: Tensor, pattern: Pattern, panel: int = 128, dead: Tensor | None = None) -> tuple[Tensor, Tensor]:
    none = torch.zeros(hessian.shape[:2], dtype=torch.bool)
    return prune_with_feedback(weight, factorize(hessian, 1e-12, False), none if dead is None else dead, pattern, panel)


# Patterns ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", PATTERNS)
def test_a_pattern_is_written_as_it_is_read(text: str) -> None:
    assert str(Pattern.parse(text)) == text


@pytest.mark.parametrize("text", ["", "2", "2:", "4:4", "0:4", "2:65", "64:4:8", "64:2:3", "0:2:4", "1:2:3:4", "two:four", "-2:4", "2 : 4", "1:70"])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be N:M or V:N:M|is not possible"):
        Pattern.parse(text)


@pytest.mark.parametrize(
    ("text", "rows", "columns"), [("2:4", 1, 8), ("1:3", 2, 3), ("1:2:4", 1, 4), ("1:2:5", 2, 5), ("2:2:5", 4, 5), ("3:1:6", 3, 6), ("1:3:8", 1, 16)]
)
def test_mask_diversity_counts_the_ways_to_choose(text: str, rows: int, columns: int) -> None:
    pattern = Pattern.parse(text)
    assert math.isclose(pattern.diversity * rows * columns, math.log2(len(oracle.masks(pattern, rows, columns))))


def test_ways_to_choose_are_nearly_all_different_once_enough_outputs_share_inputs() -> None:
    shares = []
    for v in (1, 2, 3, 4, 5):
        masks = oracle.masks(Pattern(2, 5, v), v, 5)
        shares.append(len(set(masks)) / len(masks))
    assert shares == sorted(shares) and shares[0] == 1 / 3 and shares[-1] > 0.8
    plain = oracle.masks(TWO_FOUR, 1, 8)
    assert len(set(plain)) == len(plain)


@pytest.mark.parametrize(("text", "density"), [("2:4", 0.5), ("1:4", 0.25), ("64:2:5", 0.4), ("8:2:16", 0.125)])
def test_density_is_the_share_that_is_kept(text: str, density: float) -> None:
    pattern = Pattern.parse(text)
    assert pattern.density == density
    assert float(sparsity.keep(torch.rand(64, 80), pattern).double().mean()) == density


# Masks ------------------------------------------------------------------------------------------------------------------------------


@given(st.sampled_from(PATTERNS), st.integers(1, 3), st.integers(0, 20), st.integers(0, 1000))
def test_kept_are_those_that_sorting_lists_keeps(text: str, blocks: int, columns: int, seed: int) -> None:
    pattern = Pattern.parse(text)
    # Few different scores, so that many are equal; whole numbers, so that sums are exact.
    scores = torch.randint(0, 4, (blocks * (pattern.v or 1), columns), generator=torch.Generator().manual_seed(seed)).double()
    assert torch.equal(sparsity.keep(scores, pattern), oracle.keep(scores, pattern))


def test_a_block_of_four_inputs_is_two_of_four() -> None:
    scores = torch.rand(3, 32, 40)
    assert torch.equal(sparsity.keep(scores, Pattern.parse("16:2:4")), sparsity.keep(scores, TWO_FOUR))


@given(st.sampled_from(PATTERNS), st.integers(1, 21), st.integers(0, 1000))
def test_what_is_kept_breaks_no_promise_and_one_more_does(text: str, columns: int, seed: int) -> None:
    pattern = Pattern.parse(text)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(8, columns, generator=generator) + 0.1
    kept = sparsity.keep(torch.rand(8, columns, generator=generator), pattern)
    assert sparsity.violations(weight * kept, pattern) == 0
    for row, column in (~kept).nonzero()[:3].tolist():
        spoiled = weight * kept
        spoiled[row, column] = 1
        assert sparsity.violations(spoiled, pattern) > 0


def test_a_fifth_input_of_a_block_breaks_its_promise_though_no_row_does() -> None:
    weight = torch.zeros(4, 8)
    for row in range(4):
        weight[row, [2 * row, 2 * row + 1]] = 1
    assert (sparsity.violations(weight, Pattern(2, 8)), sparsity.violations(weight, Pattern(2, 8, 4))) == (0, 1)


@pytest.mark.parametrize("name", ["wanda", "ria"])
def test_scores_are_those_of_the_definition(name: str) -> None:
    weight, inputs = torch.randn(6, 11, dtype=torch.float64), torch.randn(30, 11, dtype=torch.float64)
    found = getattr(sparsity, name)(weight, inputs.square().mean(0))
    assert np.allclose(found.numpy(), getattr(oracle, name)(weight, inputs), rtol=1e-12)


def test_an_input_that_no_weight_reads_has_no_importance() -> None:
    weight = torch.randn(3, 5)
    weight[:, 2] = 0
    assert torch.equal(sparsity.ria(weight, torch.ones(5))[:, 2], torch.zeros(3))


# SparseGPT --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [24, 7, 4, 3, 25])
@pytest.mark.parametrize("text", PATTERNS)
def test_sparsegpt_is_optimal_brain_surgery_from_left_to_right(text: str, columns: int) -> None:
    pattern = Pattern.parse(text)
    weight, hessian = problem(1, columns=columns)
    found, kept = sparsegpt(weight, hessian, pattern)
    expected, expected_kept = oracle.prune_column_by_column(weight[0], hessian[0], pattern)
    assert torch.equal(kept[0], expected_kept)
    assert torch.allclose(found[0], expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("panel", [1, 4, 8, 20, 1000])
def test_the_panel_does_not_change_what_is_pruned(panel: int) -> None:
    weight, hessian = problem(2, columns=80)
    found, kept = sparsegpt(weight, hessian, TWO_FOUR, panel)
    expected, expected_kept = sparsegpt(weight, hessian, TWO_FOUR, 16)
    assert torch.equal(kept, expected_kept) and torch.allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("member", range(3))
def test_each_member_of_a_batch_is_pruned_as_if_alone(member: int) -> None:
    weight, hessian = problem(3, batch=3)
    only = slice(member, member + 1)
    together, alone = sparsegpt(weight, hessian, TWO_FOUR), sparsegpt(weight[only], hessian[only], TWO_FOUR)
    assert torch.equal(together[1][only], alone[1]) and torch.allclose(together[0][only], alone[0], rtol=1e-12)


def test_it_is_exact_least_squares_where_all_that_goes_stands_first() -> None:
    weight, hessian = problem(4, columns=8)
    found, kept = sparsegpt(weight * torch.tensor([1e-6] * 4 + [1.0] * 4, dtype=torch.float64), hessian, Pattern(4, 8))
    small = weight[0] * torch.tensor([1e-6] * 4 + [1.0] * 4, dtype=torch.float64)
    assert torch.equal(kept[0], torch.tensor([[False] * 4 + [True] * 4]).expand(8, 8))
    assert torch.allclose(found[0], oracle.least_squares(small, kept[0], hessian[0]), rtol=1e-9, atol=1e-12)


def test_nothing_makes_good_for_the_last_input() -> None:
    weight, hessian = problem(5, columns=4)
    weight[..., 3] = 1e-9
    found, kept = sparsegpt(weight, hessian, Pattern(3, 4))
    assert not kept[..., 3].any() and torch.equal(found[..., :3], weight[..., :3])


def test_inputs_without_correlation_are_pruned_as_wanda_does_and_equal_ones_by_magnitude() -> None:
    weight, hessian = problem(6)
    diagonal = torch.diag_embed(hessian.diagonal(dim1=1, dim2=2))
    found, kept = sparsegpt(weight, diagonal, TWO_FOUR)
    assert torch.equal(kept, sparsity.keep(sparsity.wanda(weight, diagonal.diagonal(dim1=1, dim2=2)), TWO_FOUR))
    assert torch.equal(found, weight * kept)
    found, kept = sparsegpt(weight, 0.3 * torch.eye(24, dtype=torch.float64)[None], TWO_FOUR)
    assert torch.equal(kept, sparsity.keep(sparsity.magnitude(weight), TWO_FOUR)) and torch.equal(found, weight * kept)


def test_inputs_that_are_always_zero_go_first_and_move_nothing() -> None:
    weight, hessian = problem(7)
    hessian[:, 5], hessian[:, :, 5] = 0, 0
    hessian[:, 5, 5] = 1e-6
    weight[:, :, 5] = 1e9
    dead = torch.zeros(1, 24, dtype=torch.bool)
    dead[:, 5] = True
    found, kept = sparsegpt(weight, hessian, TWO_FOUR, dead=dead)
    assert not kept[:, :, 5].any() and float(found.abs().max()) < 1e3


# Values on a support ------------------------------------------------------------------------------------------------------------------


@given(st.sampled_from(["2:4", "3:5", "4:2:6"]), st.integers(0, 1000))
def test_refitting_finds_the_least_squares_of_every_row(text: str, seed: int) -> None:
    pattern = Pattern.parse(text)
    weight, hessian = problem(seed, columns=17)
    kept = sparsity.keep(weight.abs(), pattern)
    found = refit(weight, weight * kept, kept, hessian, 200)
    assert torch.equal(found != 0, kept)
    expected = oracle.least_squares(weight[0], kept[0], hessian[0])
    assert torch.allclose(cost(weight[0] - found[0], hessian[0]), cost(weight[0] - expected, hessian[0]), rtol=1e-6, atol=1e-12)


@given(st.integers(0, 1000), st.integers(0, 6))
def test_no_row_is_worse_after_any_number_of_steps(seed: int, steps: int) -> None:
    weight, hessian = problem(seed)
    kept = sparsity.keep(weight.abs(), TWO_FOUR)
    start = (weight * kept).float()
    found = refit(weight.float(), start, kept, hessian.float(), steps)
    assert (cost(weight - found, hessian) <= cost(weight - start, hessian) * (1 + 1e-5)).all()


def test_a_row_that_is_exact_already_stays_as_it_is() -> None:
    weight, hessian = problem(8)
    assert torch.equal(refit(weight, weight, torch.ones_like(weight, dtype=torch.bool), hessian), weight)


@pytest.mark.parametrize("seed", range(5))
def test_least_squares_beats_sparsegpt_beats_leaving_values_alone(seed: int) -> None:
    weight, hessian = problem(seed, rows=32)
    found, kept = sparsegpt(weight, hessian, TWO_FOUR)
    fitted = refit(weight, found, kept, hessian)
    costs = [float(cost(weight - each, hessian).sum()) for each in (fitted, found, weight * kept)]
    assert costs[0] < costs[1] < costs[2]


# ALPS ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["2:4", "1:4", "3:5", "4:2:6"])
@pytest.mark.parametrize("seed", range(3))
def test_alps_keeps_the_pattern_and_never_loses_to_what_it_started_from(text: str, seed: int) -> None:
    pattern = Pattern.parse(text)
    weight, hessian = problem(seed, columns=25)
    start, kept = sparsegpt(weight, hessian, pattern)
    found = alps(weight[0], hessian[0], pattern, start[0])
    fitted = refit(weight[0], start[0], kept[0], hessian[0])
    assert sparsity.violations(found, pattern) == 0
    before, after = cost(weight[0] - fitted, hessian[0]), cost(weight[0] - found, hessian[0])
    if pattern.v is None:
        assert (after <= before * (1 + 1e-9)).all()
    assert float(after.sum()) <= float(before.sum()) * (1 + 1e-9)


def test_alps_finds_better_masks_than_sparsegpt_and_none_is_better_than_the_best() -> None:
    weight, hessian = problem(9, rows=16, columns=12)
    start, kept = sparsegpt(weight, hessian, TWO_FOUR)
    best = oracle.best_of_all_masks(weight[0], hessian[0], TWO_FOUR)
    theirs = cost(weight[0] - refit(weight[0], start[0], kept[0], hessian[0]), hessian[0])
    mine = cost(weight[0] - alps(weight[0], hessian[0], TWO_FOUR, start[0]), hessian[0])
    assert (best <= mine * (1 + 1e-9)).all() and float(best.sum()) < float(mine.sum()) < float(theirs.sum())


# Permutation --------------------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(0, 1000))
def test_an_assignment_is_the_cheapest_of_all(size: int, seed: int) -> None:
    cost = np.random.default_rng(seed).integers(-5, 6, (size, size)).astype(np.float64)
    found = permutation.assignment(cost)
    assert sorted(found) == list(range(size)) and cost[np.arange(size), found].sum() == oracle.least_sum(cost)


@given(st.sampled_from(["2:4", "1:4", "3:5", "4:8"]), st.integers(1, 30), st.integers(0, 1000))
def test_an_order_keeps_at_least_as_much_and_leaves_the_tail(text: str, columns: int, seed: int) -> None:
    pattern = Pattern.parse(text)
    scores = torch.rand(5, columns, generator=torch.Generator().manual_seed(seed))
    order = permutation.spread(scores, pattern)
    tail = columns - pattern.pruned_columns(columns)
    assert order.sort().values.tolist() == list(range(columns)) and order[columns - tail :].tolist() == list(range(columns - tail, columns))
    assert permutation.retained(scores[:, order], pattern) >= permutation.retained(scores, pattern)


def test_large_inputs_that_crowd_one_group_are_spread() -> None:
    scores = torch.full((3, 8), 0.01)
    scores[:, :4] = 1
    order = permutation.spread(scores, TWO_FOUR)
    assert permutation.retained(scores[:, order], TWO_FOUR) == pytest.approx(12)


def test_groups_beyond_one_assignment_are_spread_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permutation, "AT_ONCE", 3)
    monkeypatch.setattr(permutation, "ELEMENTS", 20)
    scores = torch.rand(6, 40) * torch.rand(40).square()
    order = permutation.spread(scores, TWO_FOUR)
    assert order.sort().values.tolist() == list(range(40))
    assert permutation.retained(scores[:, order], TWO_FOUR) > permutation.retained(scores, TWO_FOUR)
