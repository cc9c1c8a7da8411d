"""Values of detached weights against least squares row by row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import sparse as oracle
from torch import Tensor

from compress.numerics import sparse
from compress.numerics.sparse import least_error


def problem(seed: int, rows: int = 9, columns: int = 24, share: float = 0.2, tokens: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """What weights are off by, which may be chosen, and correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    error = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return error, torch.rand(rows, columns, generator=generator) < share, inputs


def second_moment(inputs: Tensor) -> Tensor:
    return inputs.T @ inputs / len(inputs)


@given(st.integers(0, 1000), st.sampled_from([0.0, 0.02, 0.3, 1.0]), st.sampled_from([1e-3, 0.1]))
def test_errors_are_those_of_least_squares(seed: int, share: float, damp: float) -> None:
    error, positions, inputs = problem(seed, share=share)
    hessian = second_moment(inputs)
    expected = oracle.least_error(error, positions, inputs, damp * float(hessian.diagonal().mean()))
    assert torch.allclose(least_error(error, positions, hessian, damp).double(), expected, rtol=1e-3, atol=1e-3)


def test_rows_in_one_go_or_one_by_one_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    error, positions, inputs = problem(3, rows=40)
    positions[5], positions[6] = True, False
    whole = least_error(error, positions, second_moment(inputs), 0.01)
    monkeypatch.setattr(sparse, "AT_ONCE", 1)
    assert torch.allclose(least_error(error, positions, second_moment(inputs), 0.01), whole, rtol=1e-5, atol=1e-6)


@given(st.integers(0, 1000))
def test_outputs_never_lose_more_than_with_the_weights_as_they_were(seed: int) -> None:
    error, positions, inputs = problem(seed)
    left = least_error(error, positions, second_moment(inputs), 1e-6)
    restored = error.masked_fill(positions, 0)
    assert (inputs @ left.T).square().sum() <= 1.0001 * min((inputs @ restored.T).square().sum(), (inputs @ error.T).square().sum())


def test_without_data_weights_go_back_to_what_they_were() -> None:
    error, positions, _ = problem(0)
    assert torch.equal(least_error(error, positions, torch.zeros(24, 24), 0.01), error.masked_fill(positions, 0))


def test_uncorrelated_inputs_leave_nothing_to_make_good() -> None:
    error, positions, _ = problem(1)
    assert torch.allclose(least_error(error, positions, torch.eye(24), 0.01), error.masked_fill(positions, 0), atol=1e-6)
