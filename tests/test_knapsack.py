"""The knapsack against trying everything, and what must be true of it."""

from __future__ import annotations

import random
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles.knapsack import least_cost

from compress.numerics import knapsack
from compress.numerics.knapsack import Knapsack

COSTS = st.integers(0, 64).map(lambda eighths: eighths / 8)
"""Exact in binary and few, so that sums are exact and ties are common."""


@st.composite
def problems(draw: st.DrawFn, units: int = 6, options: int = 3, largest: int = 12) -> tuple[list[list[int]], list[list[float]]]:
    counts = draw(st.lists(st.integers(1, options), min_size=1, max_size=units))
    sizes = [draw(st.lists(st.integers(0, largest), min_size=count, max_size=count)) for count in counts]
    costs = [draw(st.lists(COSTS, min_size=count, max_size=count)) for count in counts]
    return sizes, costs


@given(problems(), st.integers(1, 5))
def test_every_budget_has_the_cost_that_trying_everything_finds(problem: tuple[list[list[int]], list[list[float]]], factor: int) -> None:
    sizes, costs = [[size * factor for size in each] for each in problem[0]], problem[1]
    solver = Knapsack(sizes, costs)
    assert solver.exact
    for budget in range(solver.smallest, solver.largest + 2):
        chosen = solver.choose(budget)
        assert solver.size(chosen) <= budget and solver.cost(chosen) == least_cost(sizes, costs, budget)


@pytest.mark.parametrize("seed", range(5))
def test_six_units_of_three_options_have_the_cost_that_trying_everything_finds(seed: int) -> None:
    rng = random.Random(seed)
    sizes = [[rng.randrange(1, 1000) for _ in range(3)] for _ in range(6)]
    costs = [[rng.random() for _ in range(3)] for _ in range(6)]
    solver = Knapsack(sizes, costs)
    for budget in range(solver.smallest, solver.largest, 150):
        assert solver.cost(solver.choose(budget)) == least_cost(sizes, costs, budget)


@given(problems())
def test_the_front_falls_from_the_smallest_choice_to_the_cheapest(problem: tuple[list[list[int]], list[list[float]]]) -> None:
    solver = Knapsack(*problem)
    front = solver.front()
    assert front[0][0] == solver.smallest and front[-1][1] == sum(map(min, problem[1]))
    assert all(one[0] < other[0] and one[1] > other[1] for one, other in pairwise(front))
    assert all(solver.cost(solver.choose(size)) == cost and solver.size(solver.choose(size)) == size for size, cost in front)


@given(problems(), st.integers(-3, 3))
def test_the_choice_does_not_depend_on_the_scale_of_the_costs(problem: tuple[list[list[int]], list[list[float]]], power: int) -> None:
    sizes, costs = problem
    solver, scaled = Knapsack(sizes, costs), Knapsack(sizes, [[cost * 2.0**power for cost in each] for each in costs])
    assert all(solver.choose(budget) == scaled.choose(budget) for budget in range(solver.smallest, solver.largest + 1))


def test_one_option_is_taken_everywhere() -> None:
    assert Knapsack([[3], [5], [2]], [[0.5], [0.1], [9.0]]).choose(10) == (0, 0, 0)


def test_of_equal_costs_the_smaller_option_is_taken() -> None:
    assert Knapsack([[4, 2, 3]] * 3, [[1.0] * 3] * 3).choose(12) == (1, 1, 1)


def test_a_budget_below_the_smallest_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="the smallest choice takes 3, more than 2"):
        Knapsack([[1, 4], [2, 5]], [[1.0, 0.0]] * 2).choose(2)


@pytest.mark.parametrize(("sizes", "costs"), [([[1], []], [[1.0], []]), ([[1, 2]], [[1.0, float("nan")]]), ([[1, 2]], [[float("inf"), 0.0]])])
def test_what_cannot_be_weighed_is_refused(sizes: list[list[int]], costs: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="every unit needs an option and every cost must be finite"):
        Knapsack(sizes, costs)


@given(problems(largest=1000), st.integers(2, 200))
def test_rounded_sizes_never_exceed_the_budget_and_lose_no_more_than_a_step_per_unit(
    problem: tuple[list[list[int]], list[list[float]]], cells: int
) -> None:
    sizes, costs = problem
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(knapsack, "CELLS", cells)
        solver = Knapsack(sizes, costs)
    step = max(1, -(-(solver.largest - solver.smallest) // cells))
    before = float("inf")
    for budget in range(solver.smallest, solver.largest + 50, 50):
        chosen = solver.choose(budget)
        assert solver.size(chosen) <= budget and solver.cost(chosen) <= before
        before = solver.cost(chosen)
        reduced = least_cost(sizes, costs, budget - step * len(sizes))
        assert reduced is None or before <= reduced


def test_a_hundred_units_of_six_options_take_less_than_a_second() -> None:
    rng = random.Random(0)
    sizes = [[rng.randrange(1, 10**10) for _ in range(6)] for _ in range(100)]  # no divisor in common, more sizes than cells: the slowest case
    began = time.process_time()
    solver = Knapsack(sizes, [[rng.random() for _ in range(6)] for _ in range(100)])
    chosen = solver.choose((solver.smallest + solver.largest) // 3)
    assert time.process_time() - began < 1 and not solver.exact
    assert solver.size(chosen) <= (solver.smallest + solver.largest) // 3
