"""Low-rank factors: optimality on the data, ranks under a budget, and whole runs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from oracles import low_rank as oracle
from torch import Tensor

from compress.numerics import low_rank, ranks
from compress.numerics.ranks import Spectrum

SIZES = st.integers(1, 13)


def problem(rows: int, columns: int, tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, inputs of very different sizes that are correlated, and their second moment."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    inputs = inputs @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs *= torch.logspace(-1, 1, columns, dtype=torch.float64)
    return weight, inputs, inputs.T @ inputs / tokens


def found(method: str, weight: Tensor, inputs: Tensor, moment: Tensor, rank: int) -> Tensor:
    if method == "lord":
        return low_rank.output_directions(weight, moment, rank).product
    root = {
        "svd": lambda: torch.ones(weight.shape[1], dtype=torch.float64),
        "asvd": lambda: low_rank.magnitudes_root(inputs.abs().mean(0)),
        "svd_llm": lambda: low_rank.moment_root(moment)[0],
    }[method]()
    return low_rank.decompose(weight, root, rank).product


def error(method: str, weight: Tensor, inputs: Tensor, moment: Tensor, rank: int) -> float:
    return oracle.output_error(weight.numpy(), found(method, weight, inputs, moment, rank).numpy(), inputs.numpy())


# One linear -------------------------------------------------------------------------------------------------------------------------


@given(SIZES, SIZES, st.integers(0, 9), st.data())
def test_svd_llm_loses_the_singular_values_it_leaves_out_and_no_weight_of_that_rank_less(
    rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(rows, columns)))
    weight, inputs, moment = problem(rows, columns, 3 * columns + 2, seed)
    lost = error("svd_llm", weight, inputs, moment, rank)
    left_out = float(low_rank.energy(weight, low_rank.moment_root(moment)[0])[rank:].sum())
    scale = oracle.output_error(weight.numpy(), 0 * weight.numpy(), inputs.numpy())
    assert lost == pytest.approx(left_out, rel=1e-4, abs=1e-9 * scale)
    assert lost == pytest.approx(oracle.least_output_error(weight.numpy(), inputs.numpy(), rank), rel=1e-4, abs=1e-9 * scale)


@given(SIZES, SIZES, st.integers(0, 9), st.data())
def test_svd_llm_never_loses_more_than_asvd_or_plain_svd(rows: int, columns: int, seed: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(rows, columns)))
    given_ = problem(rows, columns, 3 * columns + 2, seed)
    scale = oracle.output_error(given_[0].numpy(), 0 * given_[0].numpy(), given_[1].numpy())
    best = error("svd_llm", *given_, rank)
    assert all(best <= error(method, *given_, rank) + 1e-9 * scale for method in ("asvd", "svd"))


def test_data_make_a_difference() -> None:
    given_ = problem(24, 24, 200, 0)
    errors = [error(method, *given_, 8) for method in ("svd_llm", "asvd", "svd")]
    assert errors[0] < 0.9 * errors[1] < 0.9 * 0.9 * errors[2]


@given(SIZES, SIZES, st.integers(0, 9), st.data())
def test_lord_ties_svd_llm(rows: int, columns: int, seed: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(rows, columns)))
    given_ = problem(rows, columns, 3 * columns + 2, seed)
    scale = oracle.output_error(given_[0].numpy(), 0 * given_[0].numpy(), given_[1].numpy())
    assert error("lord", *given_, rank) == pytest.approx(error("svd_llm", *given_, rank), rel=1e-6, abs=1e-9 * scale)


@given(SIZES, SIZES, st.integers(0, 9))
def test_both_ways_to_the_energies_agree(rows: int, columns: int, seed: int) -> None:
    weight, _, moment = problem(rows, columns, 3 * columns + 2, seed)
    one, other = low_rank.energy(weight, low_rank.moment_root(moment)[0]), low_rank.output_energy(weight, moment)
    torch.testing.assert_close(other[: len(one)], one, rtol=1e-6, atol=1e-9 * float(one[0]))


@pytest.mark.parametrize("method", ["svd", "asvd", "svd_llm", "lord"])
@given(rows=SIZES, columns=SIZES, seed=st.integers(0, 9))
def test_full_rank_gives_the_weight_back(method: str, rows: int, columns: int, seed: int) -> None:
    given_ = problem(rows, columns, 3 * columns + 2, seed)
    assert found(method, *given_, rows if method == "lord" else min(rows, columns)).sub(given_[0]).abs().max() < 1e-7


def test_factors_share_the_singular_values() -> None:
    weight, _, moment = problem(9, 7, 40, 0)
    root, _ = low_rank.moment_root(moment)
    factors = low_rank.decompose(weight, root, 4)
    values = low_rank.energy(weight, root).sqrt()[:4]
    assert torch.allclose(factors.second.square().sum(0), values) and torch.allclose((factors.first @ root).square().sum(1), values)


def test_a_positive_definite_moment_is_taken_as_it_is() -> None:
    _, _, moment = problem(3, 6, 40, 0)
    root, added = low_rank.moment_root(moment)
    assert added == 0 and torch.allclose(root @ root.T, moment) and torch.equal(root, root.tril())


@pytest.mark.parametrize("least", [0.0, -0.3])
def test_a_moment_that_is_not_positive_definite_is_mended_as_said(least: float) -> None:
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    moment = turn @ torch.diag(torch.tensor([least, 0.5, 1.0, 2.0, 4.0], dtype=torch.float64)) @ turn.T
    moment = (moment + moment.T) / 2 - 1e-15 * torch.eye(5)
    root, added = low_rank.moment_root(moment)
    assert added == pytest.approx(-least + 1e-6 * float(moment.diagonal().mean()), rel=1e-6)
    assert torch.allclose(root @ root.T, moment + added * torch.eye(5))


def test_without_data_all_inputs_count_alike() -> None:
    weight = torch.randn(6, 5, dtype=torch.float64)
    root, added = low_rank.moment_root(torch.zeros(5, 5))
    plain = low_rank.decompose(weight, torch.ones(5, dtype=torch.float64), 2).product
    assert added == 1e-6 and torch.allclose(low_rank.decompose(weight, root, 2).product, plain)


def test_channels_that_are_always_zero_do_not_break_asvd() -> None:
    root = low_rank.magnitudes_root(torch.tensor([0.0, 4.0, 1.0]))
    assert root.tolist() == [1, 2, 1] and low_rank.magnitudes_root(torch.zeros(2)).tolist() == [1, 1]


def test_what_is_lost_is_a_share_of_the_outputs() -> None:
    weight, inputs, moment = problem(6, 5, 30, 0)
    instead = found("svd", weight, inputs, moment, 3)
    whole = oracle.output_error(weight.numpy(), np.zeros((6, 5)), inputs.numpy())
    assert low_rank.lost(weight, instead, moment) == pytest.approx(error("svd", weight, inputs, moment, 3) / whole)
    assert low_rank.lost(weight, instead, 0 * moment) == 0


# Ranks ------------------------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 5000), st.integers(1, 5000), st.floats(0.01, 0.99), st.sampled_from([1, 8, 16, 128]))
def test_a_uniform_rank_is_the_largest_multiple_within_its_share(rows: int, columns: int, keep: float, multiple: int) -> None:
    rank = ranks.uniform(rows, columns, keep, multiple)
    if rank is None:
        assert multiple * (rows + columns) >= rows * columns
    else:
        budget = keep * rows * columns
        assert (
            rank % multiple == 0 and rank * (rows + columns) <= budget * (1 + 1e-12) and (rank + multiple) * (rows + columns) > budget * (1 - 1e-12)
        )


@st.composite
def spectra(draw: st.DrawFn, most: int = 3) -> dict[str, Spectrum]:
    each = {}
    for number in range(draw(st.integers(1, most))):
        rows, columns = draw(st.integers(3, 12)), draw(st.integers(3, 12))
        energy = draw(st.lists(st.integers(0, 64), min_size=min(rows, columns), max_size=min(rows, columns)))
        each[f"l{number}"] = Spectrum(rows, columns, [float(value) for value in sorted(energy, reverse=True)])
    return each


def used(linears: dict[str, Spectrum], chosen: dict[str, int | None]) -> int:
    sizes = {
        name: each.rows * each.columns if chosen[name] is None else (chosen[name] or 0) * (each.rows + each.columns) for name, each in linears.items()
    }
    return sum(sizes.values())


def tail(linears: dict[str, Spectrum], chosen: dict[str, int | None]) -> float:
    return sum(sum(each.energy[rank:]) for name, each in linears.items() if (rank := chosen[name]) is not None)


def fit(linears: dict[str, Spectrum], keep: float, multiple: int) -> bool:
    return all(ranks.share(each.rows, each.columns, keep) >= multiple for each in linears.values() if ranks.saves(each.rows, each.columns, multiple))


@given(spectra(), st.floats(0.3, 0.99), st.integers(1, 2))
def test_water_filling_stays_within_the_budget_and_loses_the_least_for_what_it_uses(linears: dict[str, Spectrum], keep: float, multiple: int) -> None:
    assume(fit(linears, keep, multiple))
    chosen = ranks.water_filling(linears, keep, multiple)
    among = {name: each for name, each in linears.items() if ranks.saves(each.rows, each.columns, multiple)}
    budget = math.floor(keep * sum(each.rows * each.columns for each in among.values()))
    plain = {name: (each.rows, each.columns, each.energy) for name, each in among.items()}
    assert all(chosen[name] is None for name in linears.keys() - among.keys())
    assert all(
        rank is None or (rank % multiple == 0 and ranks.saves(linears[name].rows, linears[name].columns, rank)) for name, rank in chosen.items()
    )
    if among:
        spent, lost = used(among, chosen), tail(among, chosen)
        best = oracle.least_loss(plain, budget, multiple)
        largest = max(each.rows * each.columns for each in among.values())
        assert spent <= budget and lost >= best - 1e-9
        # Greedy along the hull: no better than if the budget were smaller by the one leap that did not fit.
        assert lost <= oracle.least_loss(plain, max(budget - largest, sum(multiple * (r + c) for r, c, _ in plain.values())), multiple) + 1e-9


@given(st.integers(1, 3), st.floats(0.2, 0.8), st.integers(0, 9))
def test_water_filling_is_exact_where_gains_fall_fast_and_steps_cost_alike(count: int, keep: float, seed: int) -> None:
    sizes = np.random.default_rng(seed).uniform(1, 100, count)
    linears = {f"l{number}": Spectrum(16, 16, [float(size) * 0.3**k for k in range(16)]) for number, size in enumerate(sizes)}
    best = oracle.least_loss({name: (16, 16, each.energy) for name, each in linears.items()}, math.floor(keep * 256 * count), 1)
    assert tail(linears, ranks.water_filling(linears, keep, 1)) == pytest.approx(best)


def test_parameters_go_where_they_gain_most() -> None:
    linears = {"flat": Spectrum(64, 64, [1.0] * 64), "steep": Spectrum(64, 64, [100.0] * 24 + [0.0] * 40)}
    chosen = ranks.water_filling(linears, 0.5, 4)
    assert chosen == {"flat": 8, "steep": 24}


def test_a_leap_to_the_whole_that_does_not_fit_is_taken_as_far_as_it_does() -> None:
    assert ranks.water_filling({"one": Spectrum(64, 64, [1.0] * 64)}, 0.8, 4) == {"one": 24}


def test_one_that_no_rank_makes_smaller_stays_whole() -> None:
    assert ranks.water_filling({"small": Spectrum(8, 8, [1.0] * 8), "large": Spectrum(64, 64, [1.0] * 64)}, 0.5, 8) == {"small": None, "large": 16}


def test_a_share_that_the_first_multiple_exceeds_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rank 16 everywhere takes more than 0\.1"):
        ranks.water_filling({"one": Spectrum(64, 64, [1.0] * 64)}, 0.1, 16)
