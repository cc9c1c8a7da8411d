"""Rounding with error feedback against its oracle and against what must be true of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import gptq as oracle
from torch import Tensor

from compress.numerics.feedback import Factor, factorize, round_with_feedback
from compress.numerics.grid import Grid, Integer, Scales, minmax_scales, round_to_nearest

GROUP = 8
DAMP = 0.01


def problem(seed: int, rows: int = 5, columns: int = 24, batch: int = 1, tokens: int = 48, grid: Grid | None = None) -> tuple[Tensor, Tensor, Scales]:
    """Weights, correlated second moments and scales, all float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(batch, rows, columns, generator=generator, dtype=torch.float64)
    mix = torch.randn(batch, columns, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(batch, tokens, columns, generator=generator, dtype=torch.float64) @ mix
    return weight, inputs.transpose(1, 2) @ inputs / tokens, minmax_scales(weight.float(), grid or Integer(3, True), GROUP, torch.float32)


def damped(hessian: Tensor, factor: Factor) -> Tensor:
    return hessian + torch.diag_embed((factor.damp * hessian.diagonal(dim1=1, dim2=2).mean(1))[:, None].expand(-1, hessian.shape[1]))


def dequantize(codes: Tensor, scales: Scales) -> Tensor:
    per_weight = scales.scale.double().repeat_interleave(GROUP, -1), scales.zero.double().repeat_interleave(GROUP, -1)
    return (codes.double() - per_weight[1]) * per_weight[0]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_equal_those_of_solving_for_the_free_columns_after_each(bits: int, act_order: bool, symmetric: bool) -> None:
    grid = Integer(bits, symmetric)
    weight, hessian, scales = problem(bits, grid=grid)
    factor = factorize(hessian, DAMP, act_order)
    codes, _ = round_with_feedback(weight, factor, scales, grid)
    order = hessian[0].diagonal().argsort(descending=True, stable=True).tolist() if act_order else list(range(weight.shape[2]))
    scale, zero = (each[0].double().repeat_interleave(GROUP, -1) for each in (scales.scale, scales.zero))
    expected = oracle.round_column_by_column(weight[0], damped(hessian, factor)[0], scale, zero, grid.low, grid.high, order)
    assert torch.equal(codes[0].double(), expected)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_a_removed_weight_stays_so_and_what_it_cannot_make_good_goes_on(act_order: bool, symmetric: bool) -> None:
    grid = Integer(3, symmetric)
    weight, hessian, _ = problem(13, batch=2)
    kept = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    weight *= kept
    scales = minmax_scales(weight.float(), grid, GROUP, torch.float32)
    factor = factorize(hessian, DAMP, act_order)
    codes, found = round_with_feedback(weight, factor, scales, grid, 5, kept)
    assert not dequantize(codes, scales)[~kept].any()
    for member in range(2):
        order = factor.order[member].tolist()
        scale, zero = (each[member].double().repeat_interleave(GROUP, -1) for each in (scales.scale, scales.zero))
        matrix = damped(hessian, factor)[member]
        expected = oracle.round_column_by_column(weight[member], matrix, scale, zero, grid.low, grid.high, order, kept[member])
        assert torch.equal(codes[member].double(), expected)
        assert float(found[member].sum()) == pytest.approx(oracle.cost(weight[member], dequantize(codes, scales)[member], matrix), rel=1e-9)


@pytest.mark.parametrize("act_order", [True, False])
def test_a_diagonal_hessian_is_plain_rounding(act_order: bool) -> None:
    grid = Integer(3, False)
    weight, hessian, scales = problem(1, grid=grid)
    codes, _ = round_with_feedback(weight, factorize(torch.diag_embed(hessian.diagonal(dim1=1, dim2=2)), DAMP, act_order), scales, grid)
    assert torch.equal(codes, round_to_nearest(weight, scales, grid))


@pytest.mark.parametrize("constant", [1e-6, 0.37, 2.0, 1e6])
def test_the_scale_of_the_hessian_does_not_matter(constant: float) -> None:
    weight, hessian, scales = problem(2)
    codes, scaled = (round_with_feedback(weight, factorize(each, DAMP, True), scales, Integer(3, True))[0] for each in (hessian, constant * hessian))
    assert torch.equal(codes, scaled)


@pytest.mark.parametrize("panel", [1, 7, 23, 1000])
def test_the_panel_does_not_change_the_codes(panel: int) -> None:
    weight, hessian, scales = problem(3, columns=80)
    factor = factorize(hessian, DAMP, True)
    assert torch.equal(
        round_with_feedback(weight, factor, scales, Integer(3, True), panel)[0], round_with_feedback(weight, factor, scales, Integer(3, True), 64)[0]
    )


@pytest.mark.parametrize("member", range(3))
def test_each_member_of_a_batch_is_rounded_as_if_alone(member: int) -> None:
    weight, hessian, scales = problem(4, batch=3)
    together = round_with_feedback(weight, factorize(hessian, DAMP, True), scales, Integer(3, True))[0]
    only = slice(member, member + 1)
    own = Scales(scales.scale[only], scales.zero[only])
    alone = round_with_feedback(weight[only], factorize(hessian[only], DAMP, True), own, Integer(3, True))[0]
    assert torch.equal(together[only], alone)


def test_members_of_a_factor_are_the_factors_of_those_members() -> None:
    weight, hessian, scales = problem(5, batch=3)
    factor = factorize(hessian, DAMP, True).members([2, 0])
    chosen = Scales(scales.scale[[2, 0]], scales.zero[[2, 0]])
    expected = round_with_feedback(weight, factorize(hessian, DAMP, True), scales, Integer(3, True))[0][[2, 0]]
    assert torch.equal(round_with_feedback(weight[[2, 0]], factor, chosen, Integer(3, True))[0], expected)


@pytest.mark.parametrize("act_order", [True, False])
def test_the_cost_is_the_quadratic_form_of_what_was_lost(act_order: bool) -> None:
    weight, hessian, scales = problem(6, rows=2, columns=16)
    factor = factorize(hessian, DAMP, act_order)
    codes, cost = round_with_feedback(weight, factor, scales, Integer(3, True))
    assert float(cost.sum()) == pytest.approx(oracle.cost(weight[0], dequantize(codes, scales)[0], damped(hessian, factor)[0]), rel=1e-9)


def test_the_factor_multiplies_out_to_the_damped_hessian() -> None:
    _, hessian, _ = problem(7)
    factor = factorize(hessian, DAMP, True)
    order = factor.order[0]
    product = factor.upper[0] @ torch.diag(factor.diagonal[0]) @ factor.upper[0].T
    assert torch.allclose(product, damped(hessian, factor)[0][order][:, order], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("act_order", [True, False])
def test_a_factor_that_takes_the_memory_of_its_hessian_is_the_same(act_order: bool) -> None:
    _, hessian, _ = problem(9, batch=3)
    hessian[1] = 0
    before = hessian.clone()
    kept = factorize(hessian, DAMP, act_order)
    assert torch.equal(hessian, before)
    taken = factorize(hessian, DAMP, act_order, overwrite=True)
    assert taken.upper.data_ptr() == hessian.data_ptr()
    assert all(torch.equal(getattr(kept, name), getattr(taken, name)) for name in ("upper", "diagonal", "order"))
    assert torch.equal(kept.damp.isnan(), torch.tensor([False, True, False]))


def test_energy_is_the_mean_square_of_each_output() -> None:
    weight, hessian, _ = problem(10)
    factor = factorize(hessian, DAMP, True)
    expected = torch.einsum("ri,ij,rj->r", weight[0], damped(hessian, factor)[0], weight[0])
    assert torch.allclose(factor.energy(0, weight[0]), expected, rtol=1e-10)


def test_solving_by_the_factor_is_solving_by_the_damped_hessian() -> None:
    weight, hessian, _ = problem(11, batch=2)
    factor = factorize(hessian, DAMP, True)
    expected = torch.linalg.solve(damped(hessian, factor)[1], weight[1], left=False)
    assert torch.allclose(factor.solve(1, weight[1]), expected, rtol=1e-8)


def test_what_is_corrected_beforehand_leaves_nothing_that_the_inputs_could_explain() -> None:
    generator = torch.Generator().manual_seed(12)
    before, weight = (torch.randn(rows, 16, generator=generator, dtype=torch.float64) for rows in (64, 4))
    now = before + 0.1 * torch.randn(64, 16, generator=generator, dtype=torch.float64)
    factor = factorize((now.T @ now / 64)[None], 1e-12, True)
    corrected = weight + factor.solve(0, weight @ ((before - now).T @ now / 64))
    assert float(((before @ weight.T - now @ corrected.T).T @ now).abs().max()) < 1e-8


def test_importance_is_the_diagonal_in_the_original_order() -> None:
    _, hessian, _ = problem(8)
    factor = factorize(hessian, DAMP, True)
    assert torch.equal(factor.importance()[0][factor.order[0]], factor.diagonal[0])


@given(st.integers(0, 10_000), st.integers(2, 4))
def test_feedback_costs_no_more_than_plain_rounding_on_average(seed: int, bits: int) -> None:
    grid = Integer(bits, True)
    weight, hessian, scales = problem(seed, rows=32, grid=grid)
    factor = factorize(hessian, DAMP, True)
    lost = weight - dequantize(round_to_nearest(weight, scales, grid), scales)
    plain = torch.einsum("bri,bij,brj->", lost, damped(hessian, factor), lost)
    assert float(round_with_feedback(weight, factor, scales, grid)[1].sum()) < float(plain)


def indefinite(least: float, size: int = 8) -> Tensor:
    """Mean diagonal 1 and one eigenvalue of `least`."""
    values = torch.ones(size, dtype=torch.float64)
    values[0], values[1] = least, 2 - least
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
    return (basis @ torch.diag(values) @ basis.T)[None]


@pytest.mark.parametrize(("least", "damp"), [(0.5, 0.01), (-0.05, 0.1), (-0.5, 1.0)])
def test_damping_grows_until_the_factorisation_succeeds(least: float, damp: float) -> None:
    assert float(factorize(indefinite(least), 0.01, True).damp) == pytest.approx(damp)


HOPELESS = {
    "very indefinite": indefinite(-3.0),
    "NaN": torch.full((1, 8, 8), torch.nan),
    "infinite": torch.full((1, 8, 8), torch.inf),
    "zero": torch.zeros(1, 8, 8),
}


@pytest.mark.parametrize("kind", HOPELESS)
def test_what_no_damping_mends_is_reported_as_nan(kind: str) -> None:
    assert bool(factorize(HOPELESS[kind], 0.01, True).damp.isnan())


def test_one_hopeless_member_leaves_the_others_alone() -> None:
    weight, hessian, scales = problem(9, batch=2)
    alone = round_with_feedback(weight, factorize(hessian, DAMP, True), scales, Integer(3, True))[0]
    hessian[1] = torch.nan
    assert torch.equal(round_with_feedback(weight, factorize(hessian, DAMP, True), scales, Integer(3, True))[0][0], alone[0])


def test_inputs_that_are_always_zero_are_rounded_plainly() -> None:
    weight, hessian, scales = problem(10)
    dead = [3, 11]
    hessian[:, dead] = 0
    hessian[:, :, dead] = 0
    codes, _ = round_with_feedback(weight, factorize(hessian, DAMP, True), scales, Integer(3, True))
    assert torch.equal(codes[..., dead], round_to_nearest(weight, scales, Integer(3, True))[..., dead])


def test_float32_reaches_the_cost_of_float64() -> None:
    weight, hessian, scales = problem(11, rows=32, columns=64, tokens=256)
    costs = [
        float(round_with_feedback(weight.to(kind), factorize(hessian.to(kind), DAMP, True), scales, Integer(4, True))[1].sum())
        for kind in (torch.float32, torch.float64)
    ]
    assert costs[0] == pytest.approx(costs[1], rel=0.02)
