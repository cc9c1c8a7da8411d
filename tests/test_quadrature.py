"""Contributions of changed weights to a loss, against closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import path as oracle
from torch import Tensor

from compress.numerics.quadrature import between, contributions, gauss_legendre


def charged(gradient: Callable[[Tensor], Tensor], before: Tensor, after: Tensor, points: int) -> Tensor:
    """What each weight's change did, by so many points on the path."""
    mean = sum((share * gradient(between(before, after, place)) for place, share in gauss_legendre(points)), torch.zeros_like(before))
    return contributions(mean, before, after)


def problem(seed: int, size: int = 12) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A symmetric matrix, a slope and two ends, float64."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, size, dtype=torch.float64, generator=generator)
    slope, before, after = torch.randn(3, size, dtype=torch.float64, generator=generator)
    return matrix + matrix.T, slope, before, after


@pytest.mark.parametrize("points", [1, 2, 4, 8])
def test_contributions_to_a_quadratic_are_its_closed_form(points: int) -> None:
    for seed in range(5):
        matrix, slope, before, after = problem(seed)
        found = charged(lambda w, a=matrix, b=slope: a @ w + b, before, after, points)  # type: ignore[misc]
        assert torch.allclose(found, oracle.quadratic(matrix, slope, before, after), rtol=0, atol=1e-10)


def gradient_of_a_loss(weights: Tensor) -> Tensor:
    """Of a cross-entropy: smooth, but no polynomial."""
    weights = weights.detach().requires_grad_()
    logits = torch.outer(torch.linspace(-1, 1, 7, dtype=weights.dtype), weights).sin() @ torch.ones(len(weights), 5, dtype=weights.dtype).tril()
    torch.nn.functional.cross_entropy(logits, torch.arange(7) % 5).backward()
    assert weights.grad is not None
    return weights.grad


def test_points_of_gauss_and_legendre_come_nearer_than_as_many_midpoints() -> None:
    _, _, before, after = problem(3)
    exact = contributions(oracle.midpoints(gradient_of_a_loss, before, after, 300), before, after)
    for points in (4, 8):
        midpoints = contributions(oracle.midpoints(gradient_of_a_loss, before, after, points), before, after)
        assert (charged(gradient_of_a_loss, before, after, points) - exact).abs().max() < 0.2 * (midpoints - exact).abs().max()


@given(st.integers(0, 1000), st.integers(1, 8))
def test_swapping_the_ends_turns_the_signs(seed: int, points: int) -> None:
    _, _, before, after = problem(seed)
    there, back = charged(gradient_of_a_loss, before, after, points), charged(gradient_of_a_loss, after, before, points)
    assert torch.allclose(there, -back, rtol=0, atol=1e-12)


@given(st.integers(0, 1000), st.integers(1, 8))
def test_what_did_not_change_is_charged_nothing(seed: int, points: int) -> None:
    _, _, before, after = problem(seed)
    after[::3] = before[::3]
    assert not charged(gradient_of_a_loss, before, after, points)[::3].any()


@pytest.mark.parametrize("points", range(1, 17))
def test_points_are_exact_for_every_polynomial_they_should_be(points: int) -> None:
    rule = gauss_legendre(points)
    assert sum(share for _, share in rule) == pytest.approx(1, abs=1e-14) and all(0 < place < 1 for place, _ in rule)
    for power in range(2 * points):
        assert math.isclose(sum(share * place**power for place, share in rule), 1 / (power + 1), rel_tol=1e-12)
