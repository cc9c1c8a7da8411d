"""Rounding of inputs, against compressed-tensors, which serves the same numbers."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from compress.numerics.activations import Activations

KINDS = [Activations("int8"), Activations("fp8"), Activations("fp8", 128)]


def theirs(inputs: torch.Tensor, rounding: Activations) -> torch.Tensor:
    arguments = QuantizationArgs.model_validate(rounding.arguments())
    if rounding.scale is not None:
        return fake_quantize(inputs, rounding.scale.to(inputs.dtype), None, arguments)
    scale, zero = compute_dynamic_scales_and_zp(inputs, arguments, torch.nn.Identity())
    return fake_quantize(inputs, scale, zero, arguments)


@pytest.mark.parametrize("rounding", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_rounded_as_compressed_tensors_rounds_them(rounding: Activations, dtype: torch.dtype) -> None:
    inputs = (torch.randn(2, 7, 256) * torch.logspace(-4, 4, 7)[None, :, None]).to(dtype)
    inputs[1, 3] = 0
    assert torch.equal(rounding.round(inputs), theirs(inputs, rounding))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_fixed_scale_rounds_as_compressed_tensors_does_and_cuts_off_beyond(kind: str) -> None:
    scale = Activations.static_scale(kind, 2.0, torch.bfloat16)
    rounding = Activations(kind, None, scale)  # type: ignore[arg-type]
    inputs = torch.randn(2, 5, 64) * 2
    rounded = rounding.round(inputs)
    assert torch.equal(rounded, theirs(inputs, rounding)) and rounded.abs().max() <= 2.02


@pytest.mark.parametrize("rounding", KINDS, ids=str)
def test_no_token_depends_on_another(rounding: Activations) -> None:
    inputs = torch.randn(3, 4, 256)
    assert torch.equal(rounding.round(inputs)[1:2, 2:3], rounding.round(inputs[1:2, 2:3]))
    assert rounding.round(inputs[:0]).shape == (0, 4, 256)


@pytest.mark.parametrize("rounding", [*KINDS, Activations("int8", None, torch.tensor([0.5]))], ids=str)
def test_what_a_config_says_is_read_back(rounding: Activations) -> None:
    assert Activations.from_arguments(rounding.arguments(), rounding.scale) == rounding
