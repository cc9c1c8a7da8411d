"""Products with weights in small floats are those of float64, for any codes, groups and scales; what is no number is refused or shows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress.kernels import native, small
from compress.kernels.packed import Extras
from compress.kernels.small import SmallLinear
from compress.kernels.unpacked import UnpackedLinear
from compress.numerics.grid import E2M1, E4M3, Grid, Quantized

E8M0, E4M3_SCALE = torch.float8_e8m0fnu, torch.float8_e4m3fn
KINDS: dict[str, tuple[Grid, torch.dtype]] = {
    "channel": (E4M3(), torch.bfloat16), "float16": (E4M3(), torch.float16), "float32": (E4M3(), torch.float32), "mxfp8": (E4M3(), E8M0),
    "block": (E4M3(128), torch.bfloat16), "mxfp4": (E2M1(), E8M0), "nvfp4": (E2M1(64.0), E4M3_SCALE),
}  # fmt: skip
SHAPES = [(1, 2, 2), (1, 16, 16), (7, 38, 38), (33, 96, 32), (64, 256, 16), (131, 256, 128), (5, 114, 38), (4, 688, 688)]
"""Outputs, inputs and group: fewer than four rows, one too many, groups of no whole register."""


def any_codes(grid: Grid, rows: int, columns: int) -> Tensor:
    """Every code there is, the NaN apart, denormal ones and both zeros among them."""
    if isinstance(grid, E2M1):
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6])
        return values[torch.randint(0, 15, (rows, columns))].to(torch.float8_e4m3fn)
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    return torch.where(codes & 127 == 127, 0, codes).view(torch.float8_e4m3fn)


def any_weight(kind: str, rows: int, columns: int, group: int) -> Quantized:
    grid, stored = KINDS[kind]
    shape = -(-rows // grid.rows), columns // group
    scale = torch.ldexp(torch.ones(shape), torch.randint(-6, 6, shape)) if stored == E8M0 else torch.rand(shape) + 0.1
    return Quantized(any_codes(grid, rows, columns), scale.to(stored), None, grid)


def weights(weight: Quantized) -> Tensor:
    """[out, in] float64."""
    scale = weight.by_output().double() / weight.grid.unit
    return (weight.codes.double().unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1)


def error(found: Tensor, x: Tensor, weight: Quantized) -> float:
    """Of each output, as a share of what it would be if nothing cancelled; the largest."""
    expected, most = x.double() @ weights(weight).T, x.double().abs() @ weights(weight).abs().T
    return float(((found.double() - expected).abs() / most.clamp_min(1e-300)).nan_to_num(torch.inf).max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_float64(kind: str, shape: tuple[int, int, int], tier: str) -> None:
    weight = any_weight(kind, *shape)
    module = SmallLinear(weight)
    for tokens in (1, 3, 4, 7, 32, 33):
        x = torch.randn(tokens, shape[1])
        assert error(module(x), x, weight) < 1e-6
    assert module(x[:0]).shape == (0, shape[0])


def test_the_kernel_is_asked_for_some_tokens_and_torch_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.tier() == "torch":
        pytest.skip("needs the compiled kernels: python -m compress.kernels.build; ran with those for AVX2 on 2026-11-22")
    asked: list[int] = []
    multiply = native.small_floats

    def counted(inputs: Tensor, *more: object) -> Tensor:
        asked.append(len(inputs))
        return multiply(inputs, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(native, "small_floats", counted)
    module = SmallLinear(any_weight("channel", 8, 32, 32))
    for tokens in (1, small.FEW, small.FEW + 1):
        module(torch.randn(tokens, 32))
    assert asked == [1, small.FEW] and module(torch.randn(2, 3, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16 and asked[2:] == [6]


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 999), rows=st.integers(1, 9), groups=st.integers(1, 5), half=st.integers(1, 40), tokens=st.integers(1, 9))
def test_any_shape_agrees_with_unpacking(kind: str, seed: int, rows: int, groups: int, half: int, tokens: int) -> None:
    torch.manual_seed(seed)
    weight, x = any_weight(kind, rows, 2 * half * groups, 2 * half), torch.randn(tokens, 2 * half * groups)
    bias = torch.randn(rows)
    assert torch.allclose(SmallLinear(weight, Extras(bias))(x), UnpackedLinear(weight, Extras(bias))(x), rtol=1e-4, atol=1e-3 * float(x.norm()))


@pytest.mark.parametrize("scale", [2.0**-126, 1e-30, 1e-4, 1e4, 1e30])
@pytest.mark.parametrize("code", [0.0, 2.0**-9, 2.0**-6, 1.0, 448.0])
def test_weights_of_any_size(code: float, scale: float, tier: str) -> None:
    weight = Quantized(torch.full((5, 40), code).to(torch.float8_e4m3fn), torch.full((5, 1), scale), None, E4M3())
    for size in (1 / scale, 1e-3 / scale, 1.0):
        x = torch.randn(3, 40) * min(size, 1e33)  # sums of a group are scaled afterwards
        found, expected = SmallLinear(weight)(x), x.double() @ weights(weight).T
        # Below 2^-126 numbers lose digits, and some processors and libraries take them for zero.
        assert bool(((found.double() - expected).abs() <= 1e-5 * (x.double().abs() @ weights(weight).T) + 1e-35).all())


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_inputs_that_are_no_numbers_show(number: float, tier: str) -> None:
    x = torch.randn(3, 64)
    x[1, 7] = number
    found = SmallLinear(Quantized(torch.ones(9, 64).to(torch.float8_e4m3fn), torch.ones(9, 1), None, E4M3()))(x)
    assert not found[1].isfinite().any() and found[[0, 2]].isfinite().all()


def test_scales_that_are_no_numbers_show(tier: str) -> None:
    for scale in (torch.tensor([[float("nan")]]), torch.tensor([[255]], dtype=torch.uint8).view(E8M0)):
        assert bool(SmallLinear(Quantized(torch.ones(1, 32).to(torch.float8_e4m3fn), scale, None, E4M3()))(torch.ones(1, 32)).isnan().all())
    least = torch.zeros(1, 1, dtype=torch.uint8).view(E8M0)
    x = torch.full((1, 32), 1e30)
    weight = Quantized(torch.ones(1, 32).to(torch.float8_e4m3fn), least, None, E4M3())
    assert error(SmallLinear(weight)(x), x, weight) < 1e-6  # 2^-127, no normal number


def test_memory_is_that_of_codes_and_scales() -> None:
    for kind, group in (("channel", 256), ("mxfp8", 32), ("mxfp4", 32), ("nvfp4", 16)):
        weight = any_weight(kind, 64, 256, group)
        units = 4 if kind == "nvfp4" else 0
        assert sum(buffer.nbytes for buffer in SmallLinear(weight).buffers()) == 64 * 256 * weight.bits // 8 + weight.scale.nbytes + units


def test_what_the_kernel_does_not_read_is_left_to_torch() -> None:
    odd = Quantized(any_codes(E2M1(), 4, 30), torch.ones(4, 2), None, E2M1())
    double = Quantized(any_codes(E4M3(), 4, 30), torch.ones(4, 2, dtype=torch.float64), None, E4M3())
    for weight in (odd, double):
        assert not SmallLinear.takes(weight)
        x = torch.randn(2, 30)
        assert error(SmallLinear(weight)(x), x, weight) < 1e-6


def test_the_operator_keeps_torchs_rules() -> None:
    module = SmallLinear(any_weight("mxfp4", 20, 64, 32))
    x = torch.randn(2, 64)
    exported = torch.export.export(module, (x,))
    assert exported.module()(x).equal(module(x))
    assert module.why_unpacked(module.stored, torch.device("cuda")) == "no kernel for E2M1, group 32 on cuda"
