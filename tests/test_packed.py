"""Modules of packed weights compute what the dequantised weight computes, in every format, for experts, with residuals and rounded inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from compress.formats.sparse_residual import Residual, none
from compress.kernels import dense, native, residuals, unpacked
from compress.kernels.dense import DenseLinear
from compress.kernels.experts import PackedExperts, Stack
from compress.kernels.linear import PackedLinear
from compress.kernels.packed import Extras, Packed
from compress.kernels.residuals import Residuals
from compress.kernels.small import SmallLinear
from compress.kernels.unpacked import UnpackedLinear
from compress.numerics.activations import Activations
from compress.numerics.grid import E2M1, E4M3, Grid, Integer, Quantized, below, minmax_scales, quantized, round_to_nearest

BF16, E8M0 = torch.bfloat16, torch.float8_e8m0fnu
GRIDS: dict[str, tuple[Grid, int, torch.dtype]] = {
    "fp8": (E4M3(), 256, BF16),
    "fp8-block": (E4M3(128), 128, BF16),
    "mxfp8": (E4M3(), 32, E8M0),
    "mxfp4": (E2M1(), 32, E8M0),
    "nvfp4": (E2M1(64.0), 16, torch.float8_e4m3fn),
    "w3 in groups that straddle": (Integer(3, True), 16, torch.float16),
} | {f"w{bits}{'' if symmetric else ' asymmetric'}": (Integer(bits, symmetric), 32, BF16) for bits in (5, 6, 7) for symmetric in (True, False)}


def rounded(weight: Tensor, grid: Grid, group: int, stored: torch.dtype) -> Quantized:
    scales = minmax_scales(weight, grid, group, stored)
    return quantized(round_to_nearest(weight, scales, grid), scales, grid, stored)


def any_weight(name: str, rows: int = 200) -> Quantized:
    grid, group, stored = GRIDS[name]
    return rounded(torch.randn(rows, 256), grid, group, stored)


def packed(weight: Quantized, extras: Extras = Extras()) -> Packed:  # noqa: B008
    if PackedLinear.takes(weight):
        return PackedLinear(weight, extras)
    return (SmallLinear if SmallLinear.takes(weight) else UnpackedLinear)(weight, extras)


def some_residual(shape: tuple[int, int], share: float = 0.05, stored: torch.dtype = BF16) -> Residual:
    rows, columns = torch.nonzero(torch.rand(shape) < share, as_tuple=True)
    return Residual(rows, columns, torch.randn(len(rows)).to(stored), shape)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((found.double() - expected.double()).norm() <= tolerance * expected.double().norm())


@pytest.mark.parametrize("name", GRIDS)
def test_a_weight_of_any_format_is_multiplied_as_it_is_stored(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacked, "AT_ONCE", 256 * 48)  # several pieces, the last one smaller
    weight, bias, x = any_weight(name), torch.randn(200), torch.randn(2, 3, 256)
    module = UnpackedLinear(weight, Extras(bias))
    assert not PackedLinear.takes(weight)
    assert close(module(x), x @ weight.dequantize(torch.float32).T + bias)
    half = module(x.bfloat16())
    assert half.dtype == BF16 and close(half, module(x.bfloat16().float()), 1e-2)
    assert module(x[:0]).shape == (0, 3, 200)


@pytest.mark.parametrize("name", GRIDS)
def test_memory_is_that_of_what_is_stored(name: str) -> None:
    weight = any_weight(name, 256)
    stored = sum(buffer.nbytes for buffer in UnpackedLinear(weight).buffers())
    # Zero points take a byte, and blocks' scales are held once per output.
    assert stored <= 1.05 * (256 * 256 * weight.bits / 8 + weight.scale.nbytes + (weight.zero_point.nbytes if weight.zero_point is not None else 0))


def test_what_is_not_quantised_keeps_its_dtype() -> None:
    weight, x = torch.randn(20, 64).bfloat16(), torch.randn(3, 64)
    module = DenseLinear(weight)
    assert module.codes is weight and close(module(x), x @ weight.float().T)


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), tokens=st.integers(0, 9), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_residuals_are_a_sparse_product(rows: int, columns: int, tokens: int, share: float, seed: int) -> None:
    torch.manual_seed(seed)
    residual = some_residual((rows, columns), share)
    dense = torch.zeros(rows, columns, dtype=torch.float64)
    dense[residual.rows, residual.columns] = residual.values.double()
    x = torch.randn(tokens, columns)
    if len(residual.values):
        assert torch.allclose(Residuals([residual], rows)(x).double(), x.double() @ dense.T, atol=1e-4)


def test_residuals_are_computed_a_piece_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    residual, x = some_residual((30, 64)), torch.randn(7, 64)
    whole = Residuals([residual], 30)(x)
    monkeypatch.setattr(residuals, "AT_ONCE", 2 * len(residual.values))
    assert Residuals([residual], 30)(x).equal(whole)


@pytest.mark.parametrize("name", ["nvfp4", "w5", "w4"])
def test_residuals_lie_beside_any_format(name: str) -> None:
    weight = rounded(torch.randn(200, 256), Integer(4, True), 64, BF16) if name == "w4" else any_weight(name)
    residual, bias, x = some_residual((200, 256)), torch.randn(200), torch.randn(2, 3, 256)
    module = packed(weight, Extras(bias, None, residual))
    assert close(module(x), x @ residual.add_to(weight.dequantize(torch.float32)).T + bias, 1e-4)
    inputs = Activations("int8")
    module = packed(weight, Extras(bias, inputs, residual))
    assert close(module(x), inputs.round(x) @ residual.add_to(weight.dequantize(torch.float32)).T + bias, 1e-4)
    assert packed(weight, Extras(bias, None, none(weight.codes))).residuals is None


@pytest.mark.parametrize("tokens", [0, 1, 5, 33])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("scale", [None, torch.tensor([0.02])], ids=["dynamic", "static"])
def test_inputs_in_int8_are_exact(bits: int, tokens: int, scale: Tensor | None) -> None:
    weight = rounded(torch.randn(48, 256), Integer(bits, True), 64, BF16)
    inputs, x = Activations("int8", None, scale), torch.randn(tokens, 256)
    if tokens:
        x[0, 3] = -x.abs().max() * 2  # which becomes -128, more than a digit holds
        assert int(inputs.codes(x)[0].min()) == -128
    found = PackedLinear(weight, Extras(None, inputs))(x)
    # Two digits of the kernels' own would be off by a hundred times as much.
    assert close(found, inputs.round(x) @ weight.dequantize(torch.float32).T, 5e-7)


def test_inputs_in_float8_are_rounded() -> None:
    weight, x = any_weight("fp8-block"), torch.randn(5, 256)
    for inputs in (Activations("fp8"), Activations("fp8", 128), Activations("fp8", None, torch.tensor([0.01]))):
        assert close(UnpackedLinear(weight, Extras(None, inputs))(x), inputs.round(x) @ weight.dequantize(torch.float32).T)


EXPERTS, HIDDEN, INNER = 6, 64, 48


def swiglu(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return nn.functional.silu(gate) * up


def stacks(name: str, with_residuals: bool = False) -> tuple[PackedExperts, Tensor, Tensor]:
    """Experts and their weights, gate and up one below the other [experts, 2 * inner, hidden] and down [experts, hidden, inner]."""
    made, weights = [], []
    for rows, columns, halves in ((INNER, HIDDEN, 2), (HIDDEN, INNER, 1)):
        members, extra, dense = [], [], []
        for expert in range(EXPERTS):
            parts = []
            for _ in range(halves):
                grid, group, stored = {
                    "w4": (Integer(4, True), 16, BF16), "w3 asymmetric": (Integer(3, False), columns, torch.float16),
                    "w8": (Integer(8, True), columns, torch.float32), "fp8-block": (E4M3(128), columns, BF16),
                    "nvfp4": (E2M1(2.0**expert), 16, torch.float8_e4m3fn), "mxfp4": (E2M1(), 16, E8M0), "w5": (Integer(5, True), 16, BF16),
                }[name]  # fmt: skip
                parts.append(rounded(torch.randn(rows, columns) / columns**0.5, grid, group, stored))
                # Some experts have none.
                extra.append(some_residual((rows, columns)) if expert % 2 else none(parts[-1].codes))
            members.append(packed(below(parts)))
            dense.append(torch.cat([part.dequantize(torch.float32) for part in parts]))
            if with_residuals:
                own = extra[-halves:]
                dense[-1] = torch.cat([each.add_to(half) for each, half in zip(own, dense[-1].chunk(halves), strict=True)])
        made.append(Stack(members, Residuals(extra, rows * halves) if with_residuals else None))
        weights.append(torch.stack(dense))
    return PackedExperts(made[0], made[1], swiglu), weights[0], weights[1]


def by_token(hidden: Tensor, index: Tensor, factors: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The slowest way: one token and one expert after the other."""
    result = torch.zeros(hidden.shape, dtype=torch.float64)
    for token in range(len(hidden)):
        for expert, factor in zip(index[token].tolist(), factors[token].tolist(), strict=True):
            gate, up = (gate_up[expert].double() @ hidden[token].double()).chunk(2)
            result[token] += factor * (down[expert].double() @ (nn.functional.silu(gate) * up))
    return result


def chosen(tokens: int, seed: int, most: int = EXPERTS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(most, generator=generator)[:2] for _ in range(tokens)]) if tokens else torch.zeros(0, 2, dtype=torch.int64)
    return torch.randn(tokens, HIDDEN, generator=generator), index, torch.rand(tokens, 2, generator=generator)


@pytest.mark.parametrize("with_residuals", [False, True], ids=["", "residuals"])
@pytest.mark.parametrize("name", ["w4", "w8", "w5", "fp8-block", "nvfp4", "mxfp4"])
def test_experts_are_those_of_each_token(name: str, with_residuals: bool) -> None:
    module, gate_up, down = stacks(name, with_residuals)
    for tokens in (0, 1, 7, 150):
        hidden, index, factors = chosen(tokens, tokens)
        assert close(module(hidden, index, factors), by_token(hidden, index, factors, gate_up, down), 5e-4)


@given(tokens=st.integers(1, 40), most=st.integers(2, EXPERTS), seed=st.integers(0, 99))
def test_experts_may_be_hit_or_not(tokens: int, most: int, seed: int) -> None:
    torch.manual_seed(1)
    module, gate_up, down = stacks("w4")
    hidden, index, factors = chosen(tokens, seed, most)
    found = module(hidden, index, factors)
    assert close(found, by_token(hidden, index, factors, gate_up, down), 5e-4)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(module(hidden[order], index[order], factors[order]), found[order], atol=1e-6)


@pytest.mark.parametrize("name", ["w4", "w8", "w3 asymmetric"])
def test_the_experts_that_are_hit_are_read_by_one_call_and_others_are_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if native.tier() == "torch":
        pytest.skip("needs the compiled kernels: python -m compress.kernels.build; ran with those for AVX2 on 2026-11-22")
    module, _, _ = stacks(name)
    calls: list[list[int]] = []
    multiply = native.experts

    def counted(inputs: Tensor, ends: Tensor, codes: Tensor, *more: Any, **named: Any) -> Tensor:
        calls.append(ends.diff(prepend=ends.new_zeros(1)).tolist())
        outputs = multiply(inputs, ends, codes, *more, **named)
        scales, zeros = more
        for expert, (start, end) in enumerate(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)):
            if start < end:  # the same, to the last bit, as the product with this expert alone
                own = (codes[expert], scales[expert], None if zeros is None else zeros[expert])
                assert outputs[start:end].equal(native.multiply(inputs[start:end], *own, **named))
        return outputs

    monkeypatch.setattr(native, "experts", counted)
    given_ = torch.randn(3, HIDDEN), torch.tensor([[4, 1], [1, 4], [1, 2]]), torch.rand(3, 2)
    before = module(*given_)
    assert calls == [[0, 3, 1, 0, 2, 0]] * 2
    monkeypatch.setattr(native, "experts", multiply)
    for stack in (module.gate_up, module.down):
        stack.scales[[0, 3, 5]] = torch.nan
    assert module(*given_).equal(before)


@pytest.mark.parametrize("ends", [[0, 1, 1, 3, 4, 5], [0, 2, 1, 3, 4, 4], [-1, 1, 1, 3, 4, 4], [0, 1, 4], [0.0, 1, 1, 3, 4, 4]])
def test_ends_of_experts_that_would_read_what_is_not_theirs_are_refused(ends: list[float]) -> None:
    if native.tier() == "torch":
        pytest.skip("needs the compiled kernels: python -m compress.kernels.build; ran with those for AVX2 on 2026-11-22")
    module, _, _ = stacks("w4")
    with pytest.raises(ValueError, match=r"ends must be int64 \[6\], ascending to at most 4, got"):
        module.gate_up(torch.randn(4, HIDDEN), torch.tensor(ends))


def test_the_operators_keep_torchs_rules() -> None:
    operators, x = torch.ops.compress, torch.randn(4, HIDDEN)
    # The checks of torch know no products of small floats.
    stack, ends = stacks("w5", with_residuals=True)[0].gate_up, torch.tensor([0, 1, 1, 3, 4, 4])
    assert stack.residuals is not None
    arguments = (x, ends, stack.codes, stack.scales, stack.zeros, stack.units, stack.coding, stack.out_features, stack.digits)
    torch.library.opcheck(operators.packed_experts.default, arguments)
    own = stack.residuals
    torch.library.opcheck(operators.residual_product.default, (x, ends, own.offsets, own.columns, own.values, own.rows))
    linear = UnpackedLinear(any_weight("w6 asymmetric"))
    torch.library.opcheck(operators.unpacked_linear.default, (torch.randn(2, 256), linear.codes, linear.scales, linear.zeros, None, linear.coding))
    eight = PackedLinear(rounded(torch.randn(20, 64), Integer(8, True), 64, BF16))
    codes, scale = Activations("int8").codes(x)
    torch.library.opcheck(operators.packed_int8_linear.default, (codes, scale, eight.codes, eight.scales, None, 8, 20))


def test_experts_can_be_exported_whatever_is_chosen() -> None:
    module, _, _ = stacks("w4")
    exported = torch.export.export(module, chosen(5, 0)).module()
    for seed in (1, 2):
        given_ = chosen(5, seed)
        assert exported(*given_).equal(module(*given_))


@pytest.mark.parametrize("tier", [name for name, here in native.built().items() if here])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 37), (64, 256)])
def test_what_is_not_quantised_is_multiplied_as_it_is_stored(
    shape: tuple[int, int], dtype: torch.dtype, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(native.FORCE, tier)
    weight = torch.randn(shape).to(dtype)
    for tokens in (0, 1, 3, dense.FEW + 1):
        x = torch.randn(tokens, shape[1])
        assert close(DenseLinear(weight)(x), (x.double() @ weight.double().T).float(), 1e-5)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("digits", [1, 2])
def test_what_is_no_number_shows_in_every_output(number: float, digits: int) -> None:
    module = PackedLinear(rounded(torch.randn(48, 256), Integer(4, True), 64, BF16), digits=digits)
    x = torch.randn(3, 256)
    x[1, 7] = number
    found = module(x)
    assert not found[1].isfinite().any() and found[[0, 2]].isfinite().all()


def test_inputs_that_would_be_silently_wrong_are_refused() -> None:
    for inputs in (None, Activations("int8")):
        module = PackedLinear(rounded(torch.randn(48, 256), Integer(8, True), 256, BF16), Extras(None, inputs))
        for x in (torch.randn(2, 128), torch.randn(2, 257), torch.ones(2, 256, dtype=torch.int64)):
            with pytest.raises(ValueError, match=r"inputs must be floats \[..., 256\], got"):
                module(x)
        with pytest.raises(ValueError, match="have no gradient"):
            module(torch.randn(2, 256, requires_grad=True))
        with torch.no_grad():
            assert module(torch.randn(2, 256, requires_grad=True)).shape == (2, 48)
