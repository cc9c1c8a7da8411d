"""Scales and codes: loops agree, searches never lose, and stored scales are what was measured with."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import rounding as oracle
from torch import Tensor

from compress.numerics.grid import COARSE, SMALLEST_SHRINK, Grid, Integer, Scales, minmax_scales, quantized, round_to_nearest, search_scales

STORED = (torch.bfloat16, torch.float16, torch.float32)
BITS = range(2, 9)
grids = st.builds(Integer, st.integers(2, 8), st.booleans())
stored_dtypes = st.sampled_from(STORED)


def weights(seed: int, rows: int = 4, columns: int = 64, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator).add(0.1)


def squared_error(weight: Tensor, scales: Scales, grid: Grid, group: int, stored: torch.dtype, importance: Tensor | None = None) -> Tensor:
    """Per group, through the same road a weight takes to disk but for the last rounding of the product."""
    codes = round_to_nearest(weight, scales, grid).double().unflatten(1, (-1, group))
    rounded = (codes - scales.zero.double()[..., None]) * scales.scale.double()[..., None]
    error = (rounded - weight.double().unflatten(1, (-1, group))).square()
    return (error if importance is None else error * importance.double().view(-1, group)).sum(-1)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_minmax_codes_equal_those_of_loops(bits: int, symmetric: bool, stored: torch.dtype) -> None:
    grid, weight = Integer(bits, symmetric), weights(bits)
    codes = round_to_nearest(weight, minmax_scales(weight, grid, 16, stored), grid)
    expected = []
    for row in weight.tolist():
        for start in range(0, 64, 16):
            values = row[start : start + 16]
            expected += oracle.round_group(values, *oracle.minmax_group(values, bits, symmetric, stored), bits)
    assert codes.flatten().tolist() == expected


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_the_search_finds_what_loops_find(bits: int, symmetric: bool, weighted: bool) -> None:
    grid, weight = Integer(bits, symmetric), weights(bits, rows=3)
    importance = torch.rand(64) if weighted else None
    found = squared_error(weight, search_scales(weight, grid, 16, torch.bfloat16, importance), grid, 16, torch.bfloat16, importance)
    per_input = (torch.ones(64) if importance is None else importance).tolist()
    expected = [
        oracle.best_group(row[start : start + 16], bits, symmetric, torch.bfloat16, per_input[start : start + 16], COARSE, SMALLEST_SHRINK)
        for row in weight.tolist() for start in range(0, 64, 16)
    ]  # fmt: skip
    assert found.flatten().tolist() == pytest.approx(expected, rel=1e-4)


@given(st.integers(0, 10_000), grids, stored_dtypes, st.booleans(), st.sampled_from([16, 32, 64]))
def test_the_search_is_never_worse_than_minmax_in_any_group(seed: int, grid: Grid, stored: torch.dtype, weighted: bool, group: int) -> None:
    weight = weights(seed)
    importance = torch.rand(64, generator=torch.Generator().manual_seed(seed)) if weighted else None
    searched, plain = (
        squared_error(weight, scales, grid, group, stored, importance)
        for scales in (search_scales(weight, grid, group, stored, importance), minmax_scales(weight, grid, group, stored))
    )
    assert bool((searched <= plain * (1 + 1e-5)).all())


def test_tiles_do_not_change_what_a_search_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights(1, rows=33)
    whole = search_scales(weight, Integer(3, False), 16, torch.bfloat16)
    monkeypatch.setattr("compress.numerics.grid.TILE", 64)
    assert torch.equal(search_scales(weight, Integer(3, False), 16, torch.bfloat16).scale, whole.scale)


@given(st.integers(0, 10_000), grids, stored_dtypes, st.sampled_from([1e-6, 1e-3, 1.0, 100.0]), st.booleans())
def test_scales_are_exactly_representable_in_the_stored_dtype(seed: int, grid: Grid, stored: torch.dtype, spread: float, search: bool) -> None:
    scale = (search_scales if search else minmax_scales)(weights(seed, spread=spread), grid, 32, stored).scale
    assert torch.equal(scale.to(stored).float(), scale)


@given(st.integers(0, 10_000), grids, st.booleans())
def test_a_weight_within_the_grid_moves_by_at_most_half_a_step(seed: int, grid: Grid, search: bool) -> None:
    weight = weights(seed)
    scales = (search_scales if search else minmax_scales)(weight, grid, 16, torch.float32)
    scale, zero = (each.double().repeat_interleave(16, -1) for each in (scales.scale, scales.zero))
    codes = round_to_nearest(weight, scales, grid)
    exact = weight.double() / scale + zero
    inside = (exact >= grid.low) & (exact <= grid.high)
    moved = ((codes.double() - zero) * scale - weight.double()).abs()
    assert bool((moved <= scale.abs() / 2 * (1 + 1e-4))[inside].all())


@given(st.integers(0, 10_000), st.integers(2, 8), stored_dtypes, st.booleans(), st.sampled_from([-1.0, 0.0, 1.0]))
def test_zero_stays_exactly_zero_on_an_asymmetric_grid(seed: int, bits: int, stored: torch.dtype, search: bool, shift: float) -> None:
    grid, weight = Integer(bits, False), weights(seed) + 3 * shift
    weight[:, ::5] = 0
    scales = (search_scales if search else minmax_scales)(weight, grid, 16, stored)
    assert not quantized(round_to_nearest(weight, scales, grid), scales, grid, stored).dequantize()[:, ::5].any()


@pytest.mark.parametrize("search", [minmax_scales, search_scales])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_of_nothing_but_zeros_stay_zero(symmetric: bool, stored: torch.dtype, search: object) -> None:
    grid, weight = Integer(4, symmetric), weights(0)
    weight[:, 16:32] = 0
    scales = search(weight, grid, 16, stored)  # type: ignore[operator]
    result = quantized(round_to_nearest(weight, scales, grid), scales, grid, stored).dequantize()
    assert bool(result.isfinite().all()) and not result[:, 16:32].any()


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("tiny", [1e-7, 1e-12, 1e-30])
def test_no_scale_is_ever_zero(tiny: float, stored: torch.dtype) -> None:
    assert bool((minmax_scales(torch.full((1, 32), tiny), Integer(4, True), 32, stored).scale > 0).all())


@given(st.integers(0, 10_000), grids)
def test_codes_stay_on_the_grid(seed: int, grid: Grid) -> None:
    weight = weights(seed)
    codes = round_to_nearest(weight, search_scales(weight, grid, 16, torch.bfloat16), grid)
    assert grid.low <= int(codes.min()) and int(codes.max()) <= grid.high


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("symmetric", [True, False])
def test_dequantised_weights_are_the_stored_product_rounded_once(symmetric: bool, stored: torch.dtype) -> None:
    grid, weight = Integer(4, symmetric), weights(2)
    scales = minmax_scales(weight, grid, 16, stored)
    whole = quantized(round_to_nearest(weight, scales, grid), scales, grid, stored)
    zero = torch.zeros(4, 4) if whole.zero_point is None else whole.zero_point.float()
    exact = (whole.codes.float() - zero.repeat_interleave(16, -1)) * whole.scale.float().repeat_interleave(16, -1)
    assert torch.equal(whole.dequantize(), exact.to(stored))


def test_rounding_what_was_rounded_changes_nothing() -> None:
    grid, weight = Integer(4, True), weights(3)
    scales = minmax_scales(weight, grid, 16, torch.float32)
    codes = round_to_nearest(weight, scales, grid)
    assert torch.equal(round_to_nearest(quantized(codes, scales, grid, torch.float32).dequantize(), scales, grid), codes)
