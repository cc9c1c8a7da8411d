"""Blocks of GGML: byte for byte as the oracle, and value for value as the reader of the gguf package."""

from __future__ import annotations

import gguf
import pytest
import torch
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st
from oracles import gguf_blocks as oracle
from torch import Tensor

from compress.errors import InputError
from compress.formats import gguf_blocks
from compress.formats.gguf_blocks import TYPES, Fields, choose, fields, pack
from compress.numerics.grid import E2M1, E4M3, Grid, Integer, Quantized, minmax_scales, quantized, round_to_nearest


def weight_of(rows: int, columns: int, group: int, grid: Integer, dtype: torch.dtype, seed: int = 0) -> Quantized:
    generator = torch.Generator().manual_seed(seed)

    def whole(*shape: int) -> Tensor:
        return torch.randint(int(grid.low), int(grid.high) + 1, shape, generator=generator, dtype=torch.int8)

    scale = torch.rand(rows, columns // group, generator=generator).add(0.01).mul(0.05)
    if grid.symmetric:
        scale *= torch.where(torch.rand(scale.shape, generator=generator) < 0.3, -1.0, 1.0)  # a search tries both signs
    return Quantized(whole(rows, columns), scale.to(dtype), None if grid.symmetric else whole(rows, columns // group), grid)


def read(packed: Tensor, name: str) -> Tensor:
    """What the gguf package makes of rows of blocks."""
    return torch.from_numpy(dequantize(packed.numpy(), gguf.GGMLQuantizationType[name]))


def values(found: Fields) -> Tensor:
    """The weights by the formulas of the module's table."""
    kind, (rows, blocks) = found.kind, found.d.shape
    each = found.d[..., None] if found.s is None else found.d[..., None] * found.s
    q = found.q.view(rows, blocks, each.shape[2], -1).float()
    if found.e is None:
        assert kind.offset is not None
        return (each[..., None] * (q - kind.offset)).view(rows, -1)
    lowest = found.e[..., None] if found.t is None else found.e[..., None] * found.t
    return (each[..., None] * q - lowest[..., None]).view(rows, -1)


def by_oracle(found: Fields) -> list[list[int]]:
    kind = found.kind
    rows = []
    for row in range(len(found.q)):
        out: list[int] = []
        for block in range(found.d.shape[1]):
            q = found.q[row, block * kind.width : (block + 1) * kind.width].tolist()
            s, t = (() if part is None else part[row, block].tolist() for part in (found.s, found.t))
            out += oracle.block(kind.name, q, float(found.d[row, block]), s, 0.0 if found.e is None else float(found.e[row, block]), t)
        rows.append(out)
    return rows


@pytest.mark.parametrize("name", TYPES)
def test_bytes_are_those_written_field_by_field(name: str) -> None:
    """Multipliers that no weight of ours needs, too: every bit of every field is in its place."""
    kind = TYPES[name]
    generator = torch.Generator().manual_seed(3)
    rows, blocks = 3, 2
    q = torch.randint(0, 1 << kind.bits, (rows, blocks * kind.width), generator=generator, dtype=torch.uint8)
    d = torch.rand(rows, blocks, generator=generator).half().float()
    e = None if kind.offset is not None else torch.rand(rows, blocks, generator=generator).half().float()
    s = t = None
    if kind.limits:
        s = torch.randint(kind.limits[0], kind.limits[1] + 1, (rows, blocks, kind.width // kind.each), generator=generator)
        t = None if e is None else torch.randint(0, kind.limits[1] + 1, s.shape, generator=generator)
    found = Fields(kind, q, d, s, e, t)
    packed = gguf_blocks._packed(found)
    assert packed.shape == (rows, blocks * kind.nbytes)
    assert packed.tolist() == by_oracle(found)
    assert torch.equal(read(packed, name), values(found))


EXPECTED = {
    # bits, symmetric, group of 128: what its scales need not share a block of 256 for
    (2, True, 128): "Q4_0",
    (2, False, 128): "Q4_0",
    (3, True, 128): "Q4_0",
    (3, False, 128): "Q4_0",
    (4, True, 128): "Q4_0",
    (4, False, 128): "Q5_0",
    (5, True, 128): "Q5_0",
    (5, False, 128): "Q8_0",
    (6, True, 128): "Q8_0",
    (7, False, 128): "Q8_0",
    (8, True, 128): "Q8_0",
    # and of 256, with one scale for a block
    (2, True, 256): "Q2_K",
    (2, False, 256): "Q2_K",
    (3, True, 256): "Q3_K",
    (3, False, 256): "Q4_0",
    (4, True, 512): "Q4_0",
    (4, False, 512): "Q4_K",
    (5, True, 512): "Q5_0",
    (5, False, 512): "Q5_K",
    (6, True, 512): "Q6_K",
    (8, True, 512): "Q8_0",
}


@pytest.mark.parametrize(("bits", "symmetric", "group"), EXPECTED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_smallest_exact_type_is_chosen_and_is_exact(bits: int, symmetric: bool, group: int, dtype: torch.dtype) -> None:
    weight = weight_of(4, 512, group, Integer(bits, symmetric), dtype)
    name = choose([weight])
    assert name == EXPECTED[bits, symmetric, group]
    packed = pack(weight, name)
    assert torch.equal(read(packed, name), weight.dequantize(torch.float32))
    assert packed.tolist() == by_oracle(fields(weight, TYPES[name]))


@given(
    st.integers(2, 8), st.booleans(), st.sampled_from([32, 64, 96, 128, 256, 512, 768]), st.integers(1, 4),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), st.integers(0, 1000),
)  # fmt: skip
def test_what_is_called_exact_is_exact_and_the_rest_is_close(
    bits: int, symmetric: bool, group: int, rows: int, dtype: torch.dtype, seed: int
) -> None:
    weight = weight_of(rows, 768, group if 768 % group == 0 else 768, Integer(bits, symmetric), dtype, seed)
    if bits == 8 and not symmetric and weight.zero_point.any():  # type: ignore[union-attr]
        with pytest.raises(InputError, match="no type holds codes of 8 bits with a zero point"):
            choose([weight])
        return
    meant = weight.dequantize(torch.float32)
    for name, kind in TYPES.items():
        if gguf_blocks._exact(weight, kind):
            assert torch.equal(read(pack(weight, name), name), meant)
    name = choose([weight])
    found = read(pack(weight, name), name)
    assert bool(((found - meant).abs() <= meant.abs() * 2.0**-11).all())
    assert torch.equal(found, meant) == gguf_blocks._exact(weight, TYPES[name])
    assert torch.equal(found, meant) or dtype == torch.float32


def test_scales_that_are_multiples_share_a_block() -> None:
    """The sub-blocks of a K-quant may differ in scale where one number divides them all."""
    weight = weight_of(2, 512, 64, Integer(2, False), torch.float32)
    weight.scale[:] = 0.0625 * torch.tensor([1.0, 2.0, 3.0, 5.0, 4.0, 4.0, 2.0, 1.0])
    weight.zero_point[:] = weight.zero_point.clamp_max(0)  # type: ignore[index, union-attr]
    assert choose([weight]) == "Q2_K"
    assert torch.equal(read(pack(weight, "Q2_K"), "Q2_K"), weight.dequantize(torch.float32))
    weight.scale[0, 1] = 0.0625 * 17  # no multiplier of 4 bits, but one of 6
    assert choose([weight]) == "Q3_K"
    weight.scale[0, 1] = 0.0625 * 37
    assert choose([weight]) == "Q4_0"
    odd = weight_of(2, 512, 16, Integer(3, True), torch.float32)
    odd.scale[:] = 0.25 * torch.randint(-31, 32, odd.scale.shape)
    assert gguf_blocks._exact(odd, TYPES["Q3_K"])
    assert torch.equal(read(pack(odd, "Q3_K"), "Q3_K"), odd.dequantize(torch.float32))


def test_a_minimum_that_float16_holds_saves_half_a_bit() -> None:
    weight = weight_of(3, 64, 32, Integer(4, False), torch.bfloat16)
    weight.scale[:] = torch.tensor([0.5, 0.75])
    assert choose([weight]) == "Q4_1"
    assert torch.equal(read(pack(weight, "Q4_1"), "Q4_1"), weight.dequantize(torch.float32))


@pytest.mark.parametrize(("zeros", "fits"), [((0, 0), True), ((0, 1), False), ((-1, 0), False), ((1, 1), False), ((-1, -1), False)])
def test_zero_points_move_the_range_that_a_type_must_hold(zeros: tuple[int, int], fits: bool) -> None:
    weight = weight_of(1, 64, 32, Integer(4, False), torch.bfloat16)
    weight.zero_point[:] = torch.tensor(zeros)  # type: ignore[index]
    found = choose([weight])
    assert (found == "Q4_0") == fits
    assert torch.equal(read(pack(weight, found), found), weight.dequantize(torch.float32))


def test_one_type_for_all_that_share_a_tensor() -> None:
    four, three, five = (weight_of(2, 256, 128, Integer(bits, True), torch.bfloat16) for bits in (4, 3, 5))
    assert choose(iter([four, three])) == "Q4_0" and choose([four, five, three]) == "Q5_0"
    coarse = weight_of(2, 256, 256, Integer(3, True), torch.bfloat16)
    assert choose([coarse]) == "Q3_K" and choose([coarse, three]) == "Q4_0"


def test_rounded_weights_are_carried_over_as_they_are() -> None:
    """From a weight to a file: what the passes of this program make, not only random codes."""
    weight, grid = torch.randn(16, 256) * 0.02, Integer(4, True)
    scales = minmax_scales(weight, grid, 128, torch.bfloat16)
    made = quantized(round_to_nearest(weight, scales, grid), scales, grid, torch.bfloat16)
    assert choose([made]) == "Q4_0"
    assert torch.equal(read(pack(made, "Q4_0"), "Q4_0"), made.dequantize(torch.float32))


def test_mxfp4_only_moves_bits() -> None:
    grid = E2M1()
    weight = torch.randn(8, 96)
    scales = minmax_scales(weight, grid, 32, torch.float8_e8m0fnu)
    made = quantized(round_to_nearest(weight, scales, grid), scales, grid, torch.float8_e8m0fnu)
    assert choose([made]) == "MXFP4"
    packed = pack(made, "MXFP4")
    assert packed.shape == (8, 3 * 17)
    assert torch.equal(read(packed, "MXFP4"), made.dequantize(torch.float32))


def other(grid: Grid, scale: torch.dtype, group: int) -> Quantized:
    weight = torch.randn(8, 96)
    scales = minmax_scales(weight, grid, group, scale)
    return quantized(round_to_nearest(weight, scales, grid), scales, grid, scale)


def test_what_no_block_holds_is_refused() -> None:
    for made in (other(E4M3(), torch.bfloat16, 96), other(E2M1(2.0**6), torch.float8_e4m3fn, 32)):
        with pytest.raises(InputError, match="holds no floats"):
            choose([made])
    with pytest.raises(InputError, match="rows of 40 weights are no whole number of GGML's blocks of 32"):
        choose([weight_of(1, 40, 40, Integer(4, True), torch.bfloat16)])
    with pytest.raises(InputError, match="groups of 48 do not end"):
        choose([weight_of(1, 96, 48, Integer(4, True), torch.bfloat16)])
    high = weight_of(1, 32, 32, Integer(4, True), torch.bfloat16)
    high.scale[:] = 1e6
    with pytest.raises(InputError, match="float16"):
        pack(high, "Q4_0")


@pytest.mark.parametrize("name", gguf_blocks.BYTES)
def test_sizes_are_those_of_the_gguf_package(name: str) -> None:
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == gguf_blocks.BYTES[name]


def test_zero_scales_stay_zero() -> None:
    weight = weight_of(2, 512, 256, Integer(2, True), torch.bfloat16)
    weight.scale[0] = 0
    assert choose([weight]) == "Q2_K"
    assert torch.equal(read(pack(weight, "Q2_K"), "Q2_K"), weight.dequantize(torch.float32))
