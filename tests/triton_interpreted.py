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
SHAPES = {
    8: [(16, 32, 32), (37, 96, 24), (1, 20, 20)],
    4: [(16, 32, 32), (37, 192, 48), (1, 40, 40)],
    3: [(16, 32, 32), (37, 192, 96), (1, 80, 80)],
    2: [(16, 32, 32), (37, 192, 48), (1, 48, 48)],
}
"""Outputs, inputs and group by bits: one step; several, more than fill a tile, in groups of one or two, in blocks that are not whole; one row."""


def by_kernel(module: PackedLinear, x: Tensor, cut: Tile, device: Device = DEVICE) -> Tensor:
    return gpu.multiply(
        x, module.codes, module.scales, module.zeros, bits=module.bits, rows=module.out_features, digits=module.digits, device=device, cut=cut
    )


def wrong(found: Tensor, x: Tensor, weight: Quantized) -> float:
    return float((found.double() - exact(x, weight)).norm() / magnitude(x, weight))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_products_are_those_of_float64_and_of_the_other_kernels(bits: int, symmetric: bool) -> None:
    cuts = [(1, 1, Tile(False, 1, 1, 1, 1)), (2, 3, Tile(False, 2, 1, 1, 2)), (2, 1, Tile(False, 1, 1, 1, 1)), (1, 2, Tile(False, 2, 1, 2, 1))]
    for number, (shape, stored) in enumerate(zip(SHAPES[bits], (torch.bfloat16, torch.float16, torch.float32), strict=True)):
        weight = quantized(*shape, bits, symmetric, stored)
        for digits, tokens, cut in (cuts[number], cuts[3 if number == 1 else 2]):
            module, x = PackedLinear(weight, digits=digits), torch.randn(tokens, shape[1])
            found = by_kernel(module, x, cut)
            assert found.shape == (tokens, shape[0]) and wrong(found, x, weight) < TOLERANCE[digits]
            if native.tier() != "torch":
                assert torch.allclose(found, module(x), rtol=1e-4, atol=1e-5 * float(magnitude(x, weight)))


@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_products_of_many_tokens_are_too(bits: int, symmetric: bool, digits: int) -> None:
    for (rows, columns, group), tokens, cut in (
        ((37, 192, 96), 3, Tile(True, 8, 2, 4, 1)),
        ((16, 256, 128), 9, Tile(True, 8, 1, 4, 2)),
        ((70, 64, 32), 64, Tile(True, 64, 4, 4, 1)),
    ):
        weight, x = quantized(rows, columns, group, bits, symmetric), torch.randn(tokens, columns)
        module = PackedLinear(weight, digits=digits)
        found = by_kernel(module, x, cut)
        assert wrong(found, x, weight) < TOLERANCE[digits]
        if native.tier() != "torch" and tokens <= 9:
            assert torch.allclose(found, module(x), rtol=1e-4, atol=1e-5 * float(magnitude(x, weight)))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("cut", [Tile(False, 1, 1, 1, 1), Tile(False, 3, 1, 1, 1), Tile(True, 8, 1, 4, 1)], ids=str)
def test_the_largest_codes_and_inputs_do_not_overflow(bits: int, cut: Tile) -> None:
    codes = torch.full((16, 256), (1 << (bits - 1)) - 1, dtype=torch.int8)
    codes[8:] = -(1 << (bits - 1))
    weight = Quantized(codes, torch.ones(16, 2), torch.full((16, 2), -(1 << (bits - 1)), dtype=torch.int8), Integer(bits, False))
    x = torch.stack([torch.ones(256), -torch.ones(256), torch.tensor([1.0, -1.0]).repeat(128)])
    assert torch.allclose(by_kernel(PackedLinear(weight), x, cut).double(), exact(x, weight), rtol=1e-5, atol=1e-3)


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
    weight, x = quantized(20, 320, 32, 4, False), torch.randn(3, 320)
    module = PackedLinear(weight)
    cuts = [Tile(False, 3, 1, 1, 1), Tile(False, 2, 1, 2, 2), Tile(False, 3, 1, 1, 4), Tile(True, 8, 1, 4, 4)]
    found = [by_kernel(module, x, cut) for cut in cuts]
    assert all(torch.allclose(each, found[0], rtol=1e-5, atol=1e-5) for each in found)
    assert by_kernel(module, x, cuts[2]).equal(found[2])


def test_inputs_in_bfloat16() -> None:
    weight, x = quantized(20, 64, 32, 3, True), torch.randn(2, 64).bfloat16()
    for cut in (Tile(False, 2, 1, 1, 1), Tile(True, 8, 1, 4, 1)):
        assert relative(by_kernel(PackedLinear(weight), x, cut), exact(x.float(), weight)) < 2e-4


def test_the_rule_covers_what_it_is_asked() -> None:
    weight, x = quantized(33, 96, 32, 2, False), torch.randn(5, 96)
    module = PackedLinear(weight, digits=1)
    assert wrong(gpu.multiply(x, module.codes, module.scales, module.zeros, bits=2, rows=33, digits=1, device=DEVICE), x, weight) < TOLERANCE[1]
