"""The kernels for GPUs run by Triton's interpreter; `test_triton` starts these tests in a process where $TRITON_INTERPRET is set."""

from __future__ import annotations

import pytest
import torch
from test_kernels import TOLERANCE, WIDTHS, exact, magnitude, quantized, relative
from torch import Tensor

from compress.kernels import gpu, native
from compress.kernels.gpu import Device, Tile
from compress.kernels.linear import PackedLinear
from compress.numerics.grid import Integer, Quantized

DEVICE = Device("any", 32, 4)
CASES = [
    ({8: (16, 32, 32), 4: (16, 32, 32), 3: (16, 32, 32), 2: (16, 32, 32)}, torch.bfloat16, 1, 1, Tile(False, 1, 1, 1, 1)),
    ({8: (20, 120, 24), 4: (20, 240, 48), 3: (20, 576, 64), 2: (20, 432, 48)}, torch.float16, 2, 1, Tile(False, 1, 1, 1, 2)),
    ({8: (1, 20, 20), 4: (1, 40, 40), 3: (1, 80, 80), 2: (1, 40, 40)}, torch.float32, 1, 2, Tile(False, 3, 1, 1, 1)),
]
"""Outputs, inputs and group by bits, with scales, digits, tokens and tile. One step; more than fill a tile, shared by two programs, in blocks that
are not whole; one row, whose inputs fill no whole unit, and fewer tokens than a program takes. The interpreter takes about 15 ms for each field
of each unit of a program, so they are small."""


def by_kernel(module: PackedLinear, x: Tensor, cut: Tile, device: Device = DEVICE) -> Tensor:
    return gpu.multiply(
        x, module.codes, module.scales, module.zeros, bits=module.bits, rows=module.out_features, digits=module.digits, device=device, cut=cut
    )


def wrong(found: Tensor, x: Tensor, weight: Quantized) -> float:
    return float((found.double() - exact(x, weight)).norm() / magnitude(x, weight))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_products_are_those_of_float64_and_of_the_other_kernels(bits: int, symmetric: bool) -> None:
    for shapes, stored, digits, tokens, cut in CASES:
        rows, columns, group = shapes[bits]
        weight, x = quantized(rows, columns, group, bits, symmetric, stored), torch.randn(tokens, columns)
        module = PackedLinear(weight, digits=digits)
        found = by_kernel(module, x, cut)
        assert found.shape == (tokens, rows) and wrong(found, x, weight) < TOLERANCE[digits]
        if native.tier() != "torch":
            assert torch.allclose(found, module(x), rtol=1e-4, atol=1e-5 * float(magnitude(x, weight)))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_products_of_many_tokens_are_too(bits: int, symmetric: bool) -> None:
    for (rows, columns, group), digits, tokens, cut in (
        ((37, 192, 96), 2, 3, Tile(True, 4, 2, 4, 1)),
        ((16, 256, 128), 1, 5, Tile(True, 4, 1, 4, 2)),
        ((70, 64, 32), 2, 8, Tile(True, 8, 4, 4, 1)),
    ):
        weight, x = quantized(rows, columns, group, bits, symmetric), torch.randn(tokens, columns)
        module = PackedLinear(weight, digits=digits)
        found = by_kernel(module, x, cut)
        assert wrong(found, x, weight) < TOLERANCE[digits]
        if native.tier() != "torch":
            assert torch.allclose(found, module(x), rtol=1e-4, atol=1e-5 * float(magnitude(x, weight)))


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_largest_codes_and_inputs_do_not_overflow(bits: int) -> None:
    codes = torch.full((16, 128), (1 << (bits - 1)) - 1, dtype=torch.int8)
    codes[8:] = -(1 << (bits - 1))
    weight = Quantized(codes, torch.ones(16, 1), torch.full((16, 1), -(1 << (bits - 1)), dtype=torch.int8), Integer(bits, False))
    x = torch.stack([torch.ones(128), -torch.ones(128), torch.tensor([1.0, -1.0]).repeat(64)])
    for given, cut in ((x[:1], Tile(False, 1, 1, 1, 1)), (x, Tile(True, 8, 1, 4, 1))):
        assert torch.allclose(by_kernel(PackedLinear(weight), given, cut).double(), exact(given, weight), rtol=1e-5, atol=1e-3)


def test_inputs_of_any_size_and_kind() -> None:
    weight = Quantized(torch.ones(16, 64, dtype=torch.int8), torch.full((16, 1), 2.0**-6), None, Integer(4, True))
    sizes = torch.tensor([0.0, 1e-45, 1e-20, 1e36, float("nan"), float("inf")])
    x = torch.full((6, 64), 0.5)
    x[:, 3] = sizes
    x[:4] = sizes[:4, None]
    for cut in (Tile(False, 1, 1, 1, 1), Tile(True, 8, 1, 4, 1)):
        found = by_kernel(PackedLinear(weight), x, cut)
        assert torch.allclose(found[:4].double(), exact(x[:4], weight), rtol=1e-4, atol=1e-37)
        assert not bool(found[4:].isfinite().any())


def test_results_do_not_depend_on_the_tile_nor_vary() -> None:
    weight, x = quantized(16, 320, 32, 4, False), torch.randn(3, 320)
    module = PackedLinear(weight, digits=1)
    cuts = [Tile(False, 3, 1, 1, 1), Tile(False, 2, 1, 2, 2), Tile(False, 3, 1, 1, 4), Tile(True, 8, 1, 4, 4)]
    found = [by_kernel(module, x, cut) for cut in cuts]
    assert all(torch.allclose(each, found[0], rtol=1e-5, atol=1e-5) for each in found)
    assert by_kernel(module, x, cuts[2]).equal(found[2])


def test_inputs_in_bfloat16() -> None:
    weight, x = quantized(16, 64, 32, 3, True), torch.randn(2, 64).bfloat16()
    for cut in (Tile(False, 2, 1, 1, 1), Tile(True, 8, 1, 4, 1)):
        assert relative(by_kernel(PackedLinear(weight), x, cut), exact(x.float(), weight)) < 2e-4


def test_the_rule_covers_what_it_is_asked() -> None:
    weight, x = quantized(33, 96, 32, 2, False), torch.randn(5, 96)
    module = PackedLinear(weight, digits=1)
    assert wrong(gpu.multiply(x, module.codes, module.scales, module.zeros, bits=2, rows=33, digits=1, device=DEVICE), x, weight) < TOLERANCE[1]
