"""Branches: the best that their few weights can do, the same model in memory, on disk and packed, and nothing else than was asked for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import branch as oracle
from torch import Tensor

from compress.numerics import branch as branches

# The start ----------------------------------------------------------------------------------------------------------------------------


def example(columns: int, tokens: int = 400, rows: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, what pruning leaves of it, and inputs that hang together [tokens, in], float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    pruned = weight * (torch.rand(rows, columns, generator=generator) < 0.5)
    inputs = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    return weight, pruned, inputs + 0.5 * torch.randn(tokens, 1, generator=generator, dtype=torch.float64)


def start(weight: Tensor, pruned: Tensor, inputs: Tensor, size: int, damp: float) -> Tensor:
    return branches.least_squares(weight - pruned, inputs.T @ branches.run_sums(inputs, size) / len(inputs), size, damp)


@given(st.integers(1, 70), st.integers(1, 20))
def test_sums_and_what_they_add_to_a_weight_are_those_of_the_matrix_written_out(columns: int, size: int) -> None:
    _, pruned, inputs = example(columns, tokens=5)
    written = oracle.runs(columns, size)
    branch = torch.randn(len(pruned), branches.count(columns, size), dtype=torch.float64)
    assert torch.allclose(branches.run_sums(inputs, size), inputs @ written.T)
    assert torch.equal(branches.expanded(branch, size, columns), branch @ written)
    beside = inputs @ pruned.T + branches.run_sums(inputs, size) @ branch.T
    assert torch.allclose(beside, inputs @ (pruned + branches.expanded(branch, size, columns)).T)


@given(st.integers(2, 60), st.sampled_from([1, 3, 4, 16, 64]))
def test_the_start_is_that_of_least_squares_on_the_inputs(columns: int, size: int) -> None:
    weight, pruned, inputs = example(columns)
    assert torch.allclose(start(weight, pruned, inputs, size, 1e-12), oracle.best(weight - pruned, inputs, size), atol=1e-6)


@given(st.integers(2, 40), st.sampled_from([1, 4, 16]), st.sampled_from([1e-12, 1e-4, 0.1, 10.0]), st.integers(0, 5))
def test_the_start_never_costs_more_than_no_branch(columns: int, size: int, damp: float, seed: int) -> None:
    weight, pruned, inputs = example(columns, tokens=7, seed=seed)  # too few to know all runs
    branch = start(weight, pruned, inputs, size, damp)
    missing = inputs @ (weight - pruned).T
    left = missing - branches.run_sums(inputs, size) @ branch.T
    assert bool((left.square().sum(0) <= missing.square().sum(0) * (1 + 1e-9)).all())


def test_a_run_that_is_never_fed_gets_nothing_and_the_others_what_they_would() -> None:
    weight, pruned, inputs = example(12)
    inputs[:, 4:8] = 0
    branch = start(weight, pruned, inputs, 4, 1e-12)
    assert bool((branch[:, 1] == 0).all()) and bool((branch[:, [0, 2]] != 0).all())
    assert torch.allclose(branch, oracle.best(weight - pruned, inputs, 4), atol=1e-6)
    assert bool((start(weight, pruned, torch.zeros_like(inputs), 4, 1e-4) == 0).all())


@pytest.mark.parametrize("size", [1, 100])
def test_a_run_of_one_input_gives_everything_back_and_one_of_all_inputs_reads_their_sum(size: int) -> None:
    weight, pruned, inputs = example(24)
    branch = start(weight, pruned, inputs, size, 1e-12)
    if size == 1:
        assert torch.allclose(pruned + branch, weight, atol=1e-6)
    else:
        sums = inputs.sum(1)
        assert torch.allclose(branch[:, 0], (inputs @ (weight - pruned).T * sums[:, None]).sum(0) / sums.square().sum(), atol=1e-9)
