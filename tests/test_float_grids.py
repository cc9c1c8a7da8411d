"""Grids of small floats, against tables of all their points, and their layouts on disk, against compressed-tensors."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from hypothesis import given
from hypothesis import strategies as st
from oracles import floats as oracle
from torch import Tensor

from compress.errors import InputError
from compress.export.compressed_tensors import _arguments
from compress.formats import base, float_quantized
from compress.formats.mxfp4_pack_quantized import pack_nibbles, unpack_nibbles
from compress.layout import Linear
from compress.numerics.feedback import factorize, round_with_feedback
from compress.numerics.grid import E2M1, E4M3, Grid, Quantized, Scales, minmax_scales, quantized, round_to_nearest, search_scales
from compress.numerics.learned import Rounding
from compress.scheme import FLOAT_FORMATS, Scheme

GRIDS = [(E2M1(), oracle.E2M1), (E4M3(), oracle.E4M3)]
E8M0, SCALE8 = torch.float8_e8m0fnu, torch.float8_e4m3fn


def scheme(format_: str, columns: int = 256) -> Scheme:
    fixed = FLOAT_FORMATS[format_]
    group = columns if fixed["group_size"] == "channel" else fixed["group_size"]
    return Scheme(format=format_, bits=fixed["bits"], group_size=group, symmetric=True)


def round_as(format_: str, weight: Tensor, search: bool = False) -> tuple[Quantized, Scheme]:
    chosen = scheme(format_, weight.shape[1])
    grid, stored = chosen.grid(float(weight.abs().max())), chosen.stored(torch.bfloat16)
    scales = (search_scales if search else minmax_scales)(weight, grid, chosen.group_size, stored)
    return quantized(round_to_nearest(weight, scales, grid), scales, grid, stored), chosen


def weight_of(rows: int, columns: int, seed: int = 0, size: float = 0.02) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size


# Points -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "table"), GRIDS, ids=["E2M1", "E4M3"])
def test_every_middle_and_its_neighbours_round_as_the_table_says(grid: Grid, table: list[tuple[float, int]]) -> None:
    exact = torch.tensor([0.0, *oracle.middles(table), *(value for value, _ in table), 1e4])
    values = torch.cat([exact, exact.nextafter(torch.tensor(1e9)), exact.nextafter(torch.tensor(-1.0))])
    values = torch.cat([values, -values])
    expected = [oracle.nearest(value, table) for value in values.tolist()]
    assert grid.round_(values.clone(), grid.low, grid.high).tolist() == expected


@given(st.floats(-1000, 1000, width=32), st.sampled_from(GRIDS))
def test_any_value_rounds_as_the_table_says(value: float, pair: tuple[Grid, list[tuple[float, int]]]) -> None:
    grid, table = pair
    assert float(grid.round_(torch.tensor([value]), grid.low, grid.high)) == oracle.nearest(value, table)


@pytest.mark.parametrize(("grid", "table"), GRIDS, ids=["E2M1", "E4M3"])
def test_spacing_is_the_distance_to_the_next_point(grid: Grid, table: list[tuple[float, int]]) -> None:
    values = [value for value, _ in table]
    expected = [high - low for low, high in pairwise(values)]
    assert grid.spacing(torch.tensor(values[:-1])).tolist() == expected  # type: ignore[union-attr]


def test_codes_hold_every_point_exactly() -> None:
    for grid, table in GRIDS:
        values = torch.tensor([value for value, _ in table])
        assert torch.equal(values.to(grid.codes).float(), values)


# Scales -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "largest"), [(E2M1(), 6.0), (E4M3(), 448.0)])
@given(st.lists(st.floats(-100, 100, width=32).filter(lambda value: abs(value) > 1e-6), min_size=32, max_size=32))
def test_a_block_of_mx_has_the_exponent_of_its_largest_weight(grid: Grid, largest: float, values: list[float]) -> None:
    scales = minmax_scales(torch.tensor([values]), grid, 32, E8M0)
    assert float(scales.scale) == 2.0 ** oracle.shared_exponent(values, largest)


@pytest.mark.parametrize("format_", ["mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("power", [-3, 1, 6])
@pytest.mark.parametrize("search", [False, True])
def test_a_weight_times_a_power_of_two_has_the_same_codes(format_: str, power: int, search: bool) -> None:
    weight = weight_of(24, 64)
    one, other = round_as(format_, weight, search)[0], round_as(format_, weight * 2.0**power, search)[0]
    assert torch.equal(one.codes.float(), other.codes.float())
    assert torch.equal(one.dequantize().float() * 2.0**power, other.dequantize().float())


@given(st.floats(1e-3, 1e3))
def test_nvfp4_is_the_same_but_for_the_rounding_of_scales_whatever_a_weight_is_multiplied_by(factor: float) -> None:
    weight = weight_of(8, 64)
    one, other = round_as("nvfp4", weight)[0], round_as("nvfp4", weight * factor)[0]
    assert (one.dequantize().float() * factor - other.dequantize().float()).norm() <= 0.1 * (weight * factor).norm()


@pytest.mark.parametrize("format_", FLOAT_FORMATS)
def test_nothing_but_zeros_stays_zero_and_outliers_stay_finite(format_: str) -> None:
    weight = torch.zeros(130, 256)
    assert not round_as(format_, weight)[0].dequantize().any()
    weight[3, 7], weight[129, 255] = 3e4, -1e-7
    assert round_as(format_, weight)[0].dequantize().isfinite().all()


@pytest.mark.parametrize("format_", ["fp8", "mxfp8", "mxfp4", "nvfp4"])
def test_a_search_is_never_worse_in_any_group(format_: str) -> None:
    weight = weight_of(33, 256, seed=3)
    errors = [torch.unflatten((round_as(format_, weight, search)[0].dequantize().float() - weight).square(), 1, (-1, 16)) for search in (False, True)]
    group = scheme(format_).group_size // 16
    plain, searched = (error.sum(-1).unflatten(1, (-1, group)).sum(-1) for error in errors)
    # What is compared was rounded to bfloat16 where scales are, the search was not.
    assert (searched <= plain * (1 + 1e-2)).all() and searched.sum() < plain.sum()


def test_every_block_of_fp8_ends_where_its_largest_weight_is() -> None:
    weight = weight_of(200, 256)
    result = round_as("fp8-block", weight)[0]
    assert result.scale.shape == (2, 2)
    peaks = torch.stack([torch.stack([part.abs().max() for part in rows.split(128, 1)]) for rows in weight.split(128)])
    assert torch.equal(result.scale, (peaks / 448).to(torch.bfloat16))


def test_scales_that_outputs_share_are_not_searched() -> None:
    with pytest.raises(ValueError, match="share"):
        search_scales(weight_of(128, 128), E4M3(128), 128, torch.bfloat16)


# Rounding on them -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", FLOAT_FORMATS)
def test_without_correlation_feedback_is_plain_rounding(format_: str) -> None:
    weight = weight_of(128, 256)
    chosen = scheme(format_)
    grid, stored = chosen.grid(float(weight.abs().max())), chosen.stored(torch.bfloat16)
    scales = minmax_scales(weight, grid, chosen.group_size, stored)
    factor = factorize(torch.diag(torch.rand(256) + 0.5)[None], 0.01, True)
    codes, _ = round_with_feedback(weight[None], factor, Scales(scales.scale[None], scales.zero[None]), grid)
    assert torch.equal(codes[0].float(), round_to_nearest(weight, scales, grid).float())


@pytest.mark.parametrize("format_", FLOAT_FORMATS)
def test_nothing_learned_is_plain_rounding_and_what_is_learned_stays_on_the_grid(format_: str) -> None:
    weight = weight_of(128, 256)
    chosen = scheme(format_)
    grid, stored = chosen.grid(float(weight.abs().max())), chosen.stored(torch.bfloat16)
    rounding = Rounding(weight[None], grid, chosen.group_size, stored)
    scales = rounding.scales()
    plain = round_to_nearest(weight, Scales(scales.scale[0], scales.zero[0]), grid)
    assert torch.equal(rounding.codes(scales)[0].flatten(-2), plain.float())
    (rounding.values() * torch.randn(1, 128, 256)).sum().backward()  # type: ignore[no-untyped-call]
    rounding.step(0.4)
    moved = rounding.codes(rounding.scales())
    assert torch.equal(grid.round_(moved.detach().clone(), grid.low, grid.high), moved) and (moved[0].flatten(-2) != plain.float()).any()
    if grid.rows > 1:
        assert torch.equal(rounding.scales().scale, scales.scale)


# Layouts ----------------------------------------------------------------------------------------------------------------------------


def test_every_nibble_comes_back() -> None:
    packed = torch.arange(256, dtype=torch.uint8)[None]
    values = unpack_nibbles(packed)
    assert values.shape == (1, 512)
    minus_zero = (packed & 15 == 8) | (packed >> 4 == 8)
    assert torch.equal(pack_nibbles(values)[~minus_zero], packed[~minus_zero])
    assert torch.equal(unpack_nibbles(pack_nibbles(values)).float(), values.float())


@pytest.mark.parametrize("format_", FLOAT_FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 256), (5, 128), (129, 384)])
def test_compressed_tensors_reads_the_same_weights_bit_for_bit(format_: str, rows: int, columns: int) -> None:
    result, chosen = round_as(format_, weight_of(rows, columns, size=1.0))
    layout = base.called(chosen.layout)
    packed = layout.pack("x", result)
    arguments = _arguments(chosen, per_channel=format_ == "fp8")
    state = {name.removeprefix("x."): tensor for name, tensor in packed.items()}
    theirs = BaseCompressor.get_value_from_registry(chosen.layout).decompress(state, QuantizationScheme(targets=["Linear"], weights=arguments))
    assert torch.equal(theirs["weight"].float(), result.dequantize().float())
    back: Any = layout.unpack("x", packed)
    assert torch.equal(back.dequantize(), result.dequantize()) and torch.equal(back.codes.float(), result.codes.float())
    names = {torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3", torch.bfloat16: "BF16", torch.float32: "F32"}
    assert base.find({name: names[tensor.dtype] for name, tensor in state.items()}) is layout
    assert sum(tensor.nbytes for tensor in packed.values()) == chosen.stored_bytes(Linear("x", rows, columns), 2)


def test_a_dense_weight_has_no_layout() -> None:
    assert base.find({"weight": "BF16"}) is None


def test_a_scale_that_fits_no_weight_is_named() -> None:
    with pytest.raises(InputError, match=r"a scale of \[3, 2\] does not fit a weight of \[4, 256\]"):
        float_quantized.unpack("x", {"x.weight": torch.zeros(4, 256).to(SCALE8), "x.weight_scale": torch.ones(3, 2)})
