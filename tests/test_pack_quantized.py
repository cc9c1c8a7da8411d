"""The packed layout: bit by bit as the oracle, and bit for bit as compressed-tensors."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationScheme
from hypothesis import given
from hypothesis import strategies as st
from oracles import bitstream as oracle
from torch import Tensor

from compress.errors import InputError
from compress.formats import pack_quantized
from compress.formats.sizes import stored_bytes
from compress.numerics.grid import Grid, Integer, Quantized

bits_strategy = st.integers(2, 8)


def codes_of(rows: int, columns: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), generator=generator, dtype=torch.int8)


def weight_of(rows: int, columns: int, group: int, grid: Grid, dtype: torch.dtype, seed: int = 0) -> Quantized:
    generator = torch.Generator().manual_seed(seed + 1)
    scale = torch.rand(rows, columns // group, generator=generator).add(0.01).to(dtype)
    zero = None if grid.symmetric else codes_of(rows, columns // group, grid.bits, seed + 2)
    return Quantized(codes_of(rows, columns, grid.bits, seed), scale, zero, grid)


@given(st.integers(1, 5), st.integers(1, 70), bits_strategy, st.integers(0, 1000))
def test_packing_equals_writing_bit_by_bit(rows: int, columns: int, bits: int, seed: int) -> None:
    codes = codes_of(rows, columns, bits, seed)
    assert pack_quantized.pack_stream(codes, bits).tolist() == [oracle.write(row, bits) for row in codes.tolist()]


@given(st.integers(1, 5), st.integers(1, 70), bits_strategy, st.integers(0, 1000))
def test_unpacking_equals_reading_bit_by_bit(rows: int, columns: int, bits: int, seed: int) -> None:
    words = torch.randint(-(2**31), 2**31, (rows, -(-columns * bits // 32)), generator=torch.Generator().manual_seed(seed)).to(torch.int32)
    assert pack_quantized.unpack_stream(words, bits, columns).tolist() == [oracle.read(row, bits, columns) for row in words.tolist()]


@given(st.integers(1, 9), st.integers(1, 200), bits_strategy)
def test_codes_come_back_from_the_stream(rows: int, columns: int, bits: int) -> None:
    codes = codes_of(rows, columns, bits)
    assert torch.equal(pack_quantized.unpack_stream(pack_quantized.pack_stream(codes, bits), bits, columns), codes)


@given(st.integers(1, 9), st.integers(1, 200), bits_strategy)
def test_the_stream_is_that_of_compressed_tensors(rows: int, columns: int, bits: int) -> None:
    codes = codes_of(rows, columns, bits)
    assert torch.equal(pack_quantized.pack_stream(codes, bits), pack_to_int32(codes, bits))


@given(st.integers(1, 9), st.integers(1, 200), bits_strategy)
def test_compressed_tensors_unpacks_the_stream(rows: int, columns: int, bits: int) -> None:
    codes = codes_of(rows, columns, bits)
    assert torch.equal(unpack_from_int32(pack_quantized.pack_stream(codes, bits), bits, torch.Size(codes.shape)).to(torch.int8), codes)


@given(st.integers(1, 40), st.integers(2, 9), st.sampled_from([16, 24, 40]), bits_strategy, st.booleans())
def test_a_weight_comes_back_from_its_tensors(rows: int, groups: int, group: int, bits: int, symmetric: bool) -> None:
    weight = weight_of(rows, groups * group, group, Integer(bits, symmetric), torch.bfloat16)
    back = pack_quantized.unpack("x", pack_quantized.pack("x", weight))
    same_zero = (
        back.zero_point is None if weight.zero_point is None else back.zero_point is not None and torch.equal(back.zero_point, weight.zero_point)
    )
    assert torch.equal(back.codes, weight.codes) and torch.equal(back.scale, weight.scale) and same_zero and back.bits == bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("group", [16, 96])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_compressed_tensors_computes_the_same_weights_bit_for_bit(bits: int, symmetric: bool, group: int, dtype: torch.dtype) -> None:
    weight = weight_of(40, 96, group, Integer(bits, symmetric), dtype)
    state = {name.removeprefix("x."): tensor for name, tensor in pack_quantized.pack("x", weight).items()}
    strategy = {"strategy": "channel"} if group == 96 else {"strategy": "group", "group_size": group}
    scheme = QuantizationScheme(targets=["Linear"], weights={"num_bits": bits, "symmetric": symmetric, **strategy})
    assert torch.equal(PackedQuantizationCompressor.decompress(state, scheme)["weight"], weight.dequantize())


@given(
    st.integers(1, 70),
    st.integers(1, 5),
    st.sampled_from([16, 24, 40]),
    bits_strategy,
    st.booleans(),
    st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_predicted_bytes_are_the_real_ones(rows: int, groups: int, group: int, bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    tensors = pack_quantized.pack("x", weight_of(rows, groups * group, group, Integer(bits, symmetric), dtype))
    predicted = stored_bytes("pack-quantized", rows, groups * group, bits, group, symmetric=symmetric, scale_bytes=dtype.itemsize)
    assert predicted == sum(tensor.nbytes for tensor in tensors.values())


def _without_a_row(tensors: dict[str, Tensor]) -> None:
    tensors["x.weight_packed"] = tensors["x.weight_packed"][1:]


def _odd_groups(tensors: dict[str, Tensor]) -> None:
    tensors["x.weight_scale"] = torch.ones(4, 5)


def _other_shape(tensors: dict[str, Tensor]) -> None:
    tensors["x.weight_shape"] = torch.tensor([4, 640])


@pytest.mark.parametrize("damage", [_without_a_row, _odd_groups, _other_shape])
def test_tensors_that_contradict_each_other_are_refused_by_name(damage: object) -> None:
    tensors = pack_quantized.pack("x", weight_of(4, 64, 16, Integer(4, True), torch.float32))
    damage(tensors)  # type: ignore[operator]
    with pytest.raises(InputError, match=r"^x: packed"):
        pack_quantized.unpack("x", tensors)
