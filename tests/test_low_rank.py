"""Low-rank factors: optimality on the data, ranks under a budget, and whole runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from oracles import low_rank as oracle
from oracles import statistics
from safetensors.torch import load_file, save_file
from test_run import compress, weights
from torch import Tensor

from compress import recipe, runtime
from compress.calibrate import Workspace, sweep
from compress.checkpoint import Checkpoint
from compress.data import Samples, Tokenizer, calibration
from compress.errors import InputError
from compress.layout import Layout
from compress.model import Model
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


# Whole runs -------------------------------------------------------------------------------------------------------------------------


QUICK: dict[str, Any] = {"calibration": {"samples": 4, "length": 48}, "evaluate": None}
WITHOUT_EXPERTS = {kind: ["*.experts.*"] for kind in tiny.ROUTED}
KINDS = tiny.KINDS
RTN = {"rtn": {"bits": 8, "group_size": 32}}


def recipe_of(*more: dict[str, Any], **options: Any) -> dict[str, Any]:
    return QUICK | {"passes": [{"low_rank": {"multiple_of": 4} | options}, *more]}


def factored(kind: str, folder: Path, out: Path, *more: dict[str, Any], **options: Any) -> tuple[dict[str, Any], Model]:
    """A run on a model of a kind, its experts aside, and what it made, opened."""
    result = compress(recipe_of(*more, exclude=WITHOUT_EXPERTS.get(kind, []), **options), folder, out)
    return result, Model(Layout(Checkpoint(out)))


@torch.no_grad()
def logits(model: Model, samples: Samples) -> list[Tensor]:
    """By batch."""
    hidden, kwargs = model.embed_all(batch.inputs for batch in samples.batches())
    for layout in model.blocks:
        with model.block(layout.index) as block:
            block.advance(hidden, [each[layout.index] for each in kwargs])
    return [model.logits(each) for each in hidden]


def close(one: list[Tensor], other: list[Tensor], tolerance: float = 1e-4) -> bool:
    return all(bool((mine - theirs).abs().max() <= tolerance * theirs.abs().max()) for mine, theirs in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_two_linears_compute_what_their_product_does_in_plain_transformers(kind: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder, samples = checkpoint(kind), tiny.samples(image=kind == "llava")
    _, apart = factored(kind, folder, tmp_path / "factors")
    whole = compress(recipe_of(store="dense", exclude=WITHOUT_EXPERTS.get(kind, [])) | {"verify": "full"}, folder, tmp_path / "dense")
    plain = tiny.plain(tmp_path / "dense")
    expected = [plain(**batch.inputs, use_cache=False).logits.float() for batch in samples.batches()]
    assert whole["accepted"] and whole["size"]["after_bytes"] == whole["size"]["before_bytes"] and apart.layout.factored
    assert close(logits(apart, samples), expected) and not close(expected, logits(Model(Layout(Checkpoint(folder))), samples), 0.01)


@pytest.mark.parametrize("store", ["factors", "dense"])
def test_a_model_of_that_rank_stays_what_it_is(store: str, copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy("llama-bias")
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if "_proj.weight" in name:
                left, values, right = torch.linalg.svd(tensor, full_matrices=False)
                tensors[name] = (left[:, :8] * values[:8]) @ right[:8]
        save_file(tensors, path, {"format": "pt"})
    result, model = factored("llama-bias", folder, tmp_path / "out", store=store, ranks="uniform", multiple_of=8)
    assert close(logits(model, tiny.samples()), logits(Model(Layout(Checkpoint(folder))), tiny.samples()))
    assert all(record["error"] < 1e-6 for record in result["transforms"])


@pytest.mark.parametrize("ranks_", ["uniform", "water_filling"])
def test_factors_have_the_ranks_of_the_records_and_the_parameters_of_the_recipe(ranks_: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("llama-bias", torch.bfloat16)
    result, model = factored("llama-bias", folder, tmp_path / "out", keep=0.6, ranks=ranks_)
    before, after = Checkpoint(folder).tensors, weights(tmp_path / "out")
    total = {"before": 0, "after": 0}
    for record in result["transforms"]:
        name, (full, rank) = record["name"], record["rank"]
        rows, columns = before[f"{name}.weight"].shape
        assert full == min(rows, columns) and 0 <= record["error"] < 1
        total["before"] += rows * columns
        if record["kind"] == "left whole":
            assert rank == full and tuple(after[f"{name}.weight"].shape) == (rows, columns)
            total["after"] += rows * columns
        else:
            assert after[f"{name}.0.weight"].shape == (rank, columns) and after[f"{name}.1.weight"].shape == (rows, rank) and rank % 4 == 0
            assert after[f"{name}.0.weight"].dtype == torch.bfloat16 and f"{name}.weight" not in after and f"{name}.1.bias" in after
            total["after"] += rank * (rows + columns)
    assert 0.5 < total["after"] / total["before"] <= 0.6 and len(result["transforms"]) == len(Layout(Checkpoint(folder)).linears)
    assert {linear.name for block in model.blocks for linear in block.linears} == {
        name.removesuffix(".weight") for name in after if name.endswith("weight") and "_proj" in name
    }


def given_to(folder: Path, samples: Samples) -> dict[str, Tensor]:
    """Everything each linear is given in plain transformers, [tokens, in] by module."""
    seen = statistics.inputs_of_linears(tiny.plain(folder), [batch.inputs for batch in samples.batches()])
    return {name: torch.cat([each.flatten(0, -2) for each in inputs]).double() for name, inputs in seen.items()}


@pytest.mark.parametrize("method", ["svd_llm", "lord", "asvd", "svd"])
def test_each_linear_is_measured_with_all_before_it_replaced(method: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("llama-bias")
    result, _ = factored("llama-bias", folder, tmp_path / "out", method=method, store="dense", ranks="uniform")
    samples = calibration("demo:text", 4, 48, 0, Tokenizer(folder))
    seen, before, after = given_to(tmp_path / "out", samples), weights(folder), weights(tmp_path / "out")
    for record in result["transforms"]:
        weight, instead, inputs = before[f"{record['name']}.weight"].double(), after[f"{record['name']}.weight"].double(), seen[record["name"]]
        expected = float((inputs @ (weight - instead).T).square().sum() / (inputs @ weight.T).square().sum())
        assert record["error"] == pytest.approx(expected, rel=1e-3), record["name"]


def test_asvd_goes_by_the_mean_magnitude_of_what_a_linear_is_given(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("llama")
    compress(recipe_of(method="asvd", store="dense", ranks="uniform", include=["*.0.self_attn.q_proj"]), folder, tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj"
    inputs = given_to(folder, calibration("demo:text", 4, 48, 0, Tokenizer(folder)))[name]
    weight = weights(folder)[f"{name}.weight"]
    expected = low_rank.decompose(weight, low_rank.magnitudes_root(inputs.abs().mean(0)), ranks.uniform(64, 64, 0.8, 4) or 0).product
    assert torch.allclose(weights(tmp_path / "out")[f"{name}.weight"].double(), expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_products_of_experts_are_stored_as_their_weights(kind: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    result = compress(recipe_of(store="dense", include=["*experts*"], keep=0.5) | {"verify": "full"}, checkpoint(kind), tmp_path / "out")
    after = weights(tmp_path / "out")
    for record in result["transforms"]:
        if record["kind"] != "left whole":
            values = torch.linalg.svdvals(after[f"{record['name']}.weight"])
            assert values[record["rank"][1] :].max() < 1e-4 * values[0]


def test_too_few_tokens_are_recorded_and_never_silent(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    plain = recipe_of() | {"calibration": {"samples": 1, "length": 8}, "gates": {"fallbacks": {"max": 0}}}
    result = compress(plain, checkpoint("llama"), tmp_path / "out")
    replaced = [record for record in result["transforms"] if record["kind"] != "left whole"]
    assert len(result["fallbacks"]) == len(replaced) and not result["accepted"]
    assert all("second moment is not positive definite" in record["fallback"] for record in replaced)


# The artifact -----------------------------------------------------------------------------------------------------------------------


def test_plain_transformers_refuses_factors_loudly(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    import transformers

    result, _ = factored("llama", checkpoint("llama"), tmp_path / "out")
    with pytest.raises((ValueError, KeyError), match="compress_low_rank"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    assert result["verification"]["mode"] == "streamed" and json.loads((tmp_path / "out" / "manifest.json").read_text())["loadable_by"] == [
        "compress"
    ]
    assert {verdict.partition(" ")[0] for engine, verdict in result["engines"].items() if engine != "compress"} == {"refuses"}
    assert "compress.load" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("more", [[], [RTN], [{"gptq": {"bits": 4, "group_size": 32, "min_tokens": 0}}]], ids=["exact", "rtn", "gptq"])
def test_a_loaded_model_computes_what_the_streamed_one_does(more: list[Any], checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    _, model = factored("llama-bias", checkpoint("llama-bias"), tmp_path / "out", *more, multiple_of=32, keep=0.95)
    samples = tiny.samples()
    loaded = runtime.load(tmp_path / "out")
    with torch.no_grad():
        found = [loaded(**batch.inputs, use_cache=False).logits.float() for batch in samples.batches()]
    assert close(found, logits(model, samples), 1e-2 if more else 1e-4)


def test_the_command_line_opens_factors(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from compress.cli import app

    factored("llama", checkpoint("llama"), tmp_path / "out")
    for command in (["eval", "--context", "32", "--windows", "2"], ["inspect"], ["generate", "--tokens", "3"]):
        words = [command[0], str(tmp_path / "out"), *(["The"] if command[0] == "generate" else []), *command[1:]]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output


def test_the_ledger_says_what_every_tensor_became_two_of(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("llama-bias")
    options: dict[str, Any] = {"include": ["*q_proj"], "ranks": "uniform", "multiple_of": 16, "keep": 0.9}
    for number, more in enumerate([[], [{"rtn": {"group_size": 32, "include": ["*q_proj.0"]}}]]):
        result, _ = factored("llama-bias", folder, tmp_path / str(number), *more, **options)
        ledger = {item["name"]: item for item in result["ledger"]}
        weight, bias = (ledger[f"model.layers.1.self_attn.q_proj.{part}"] for part in ("weight", "bias"))
        names = [f"model.layers.1.self_attn.q_proj.{factor}.weight" for factor in (0, 1)]
        assert len(ledger) == len(result["ledger"]) == len(Checkpoint(folder).tensors)
        assert weight["action"] == ("quantized and factored" if more else "factored") and weight["why"].endswith(f"now called {' and '.join(names)}")
        assert bias["action"] == "kept" and bias["why"].endswith("now called model.layers.1.self_attn.q_proj.1.bias")


def test_a_run_goes_on_from_an_artifact_of_factors(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder, options = checkpoint("llama"), {"multiple_of": 32, "keep": 0.95, "ranks": "uniform"}
    factored("llama", folder, tmp_path / "first", **options)
    compress(QUICK | {"passes": [RTN]}, tmp_path / "first", tmp_path / "second")
    factored("llama", folder, tmp_path / "both", RTN, **options)
    one, other = weights(tmp_path / "second"), weights(tmp_path / "both")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.down_proj is two linears of low rank already; exclude it"):
        compress(recipe_of(), tmp_path / "first", tmp_path / "third")


@pytest.mark.parametrize("factor", [0, 1])
def test_a_factor_that_is_missing_is_named(factor: int, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    factored("llama", checkpoint("llama"), tmp_path / "out", ranks="uniform", include=["*o_proj"])
    path = tmp_path / "out" / "model.safetensors"
    name = f"model.layers.1.self_attn.o_proj.{factor}.weight"
    save_file({key: tensor for key, tensor in load_file(path).items() if key != name}, path, {"format": "pt"})
    with pytest.raises(InputError, match=rf"layers\.1\.self_attn\.o_proj{factor * '.1'}\.weight: is missing from the checkpoint"):
        Model(Layout(Checkpoint(tmp_path / "out")))


# What comes after -------------------------------------------------------------------------------------------------------------------


def test_the_second_factor_is_measured_with_what_the_first_gives_now(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    _, model = factored("llama", checkpoint("llama"), tmp_path / "out", ranks="uniform")
    samples, seen = tiny.samples(), {}
    for inputs in sweep(model, samples, Workspace(tmp_path, tiny.Silent()), lambda group: True):
        for group, moment in zip(inputs.groups, inputs.hessian, strict=True):
            for linear in group.linears:
                seen[linear.name] = moment.clone()
                if linear.name.endswith(".0"):
                    inputs.block.set_dense(f"{linear.name}.weight", 0.5 * inputs.block.weight(linear.name))
                if linear.name.endswith(".1"):
                    first = linear.name.removesuffix("1") + "0"
                    weight = inputs.block.weight(first)
                    torch.testing.assert_close(moment, weight @ seen[first] @ weight.T, rtol=1e-3, atol=1e-5 * float(moment.abs().max()))
    assert len(seen) == 28


@pytest.mark.parametrize("kind", ["llama-bias", "qwen2", "mixtral"])
@pytest.mark.parametrize("step", [{"rotate": {}}, {"smooth": {"method": "smoothquant"}}], ids=lambda step: next(iter(step)))
def test_what_leaves_a_model_as_it_is_does_so_with_factors(kind: str, step: dict[str, Any], checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint(kind)
    (_, one), (_, other) = (factored(kind, folder, tmp_path / str(len(more)), *more, ranks="uniform") for more in ([], [step]))
    assert close(logits(other, tiny.samples()), logits(one, tiny.samples()), 1e-3)
    assert not all(torch.equal(tensor, weights(tmp_path / "1")[name]) for name, tensor in weights(tmp_path / "0").items())


@pytest.mark.parametrize(
    "step",
    [
        {"gptq": {"group_size": 32, "min_tokens": 0, "qep": 0.5}},
        {"autoround": {"group_size": 32, "min_tokens": 0, "steps": 2}},
        {"smooth": {"min_tokens": 0}},
        {"prune_structured": {"keep": {"ffn_channel": 0.67, "kv_group": 0.5}, "multiple_of": 32}},
        {"prune_depth": {"drop": 1}},
        {"prune_nm": {"min_tokens": 0, "permute": True}},
        {"heal": {"tokens": 96, "batch": 2}},
    ],
    ids=lambda step: next(iter(step)),
)
def test_every_kind_of_pass_takes_factors(step: dict[str, Any], checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    more = [step, *([RTN] if next(iter(step)) not in ("gptq", "autoround") else [])]
    result, model = factored("llama-bias", checkpoint("llama-bias"), tmp_path / "out", *more, multiple_of=32, keep=0.95)
    assert {record["name"].rpartition(".")[2] for record in result["linears"]} >= {"0", "1"}
    assert {record["name"] for record in result["linears"]} == model.layout.linears.keys()


# What is refused before weights load ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("qwen3_moe", {}, r"store: .*experts\.0\.gate_proj is a routed expert, which transformers holds in one tensor"),
        ("llama", {"keep": 0.1}, r"keep: 0\.1 of the parameters of model\.layers\.0\.self_attn\.q_proj is rank 3, less than multiple_of 4"),
        ("llama", {"multiple_of": 64}, "no rank that is a multiple of 64 makes any linear smaller"),
        ("llama", {"include": ["*nothing*"]}, r"include: '\*nothing\*' matches none"),
    ],
)
def test_what_cannot_be_is_refused_beforehand(kind: str, options: dict[str, Any], message: str, checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=message):
        recipe.check(recipe.validate(recipe_of(**options), "r.yaml"), Layout(Checkpoint(checkpoint(kind))), "r.yaml")


def test_a_group_that_does_not_divide_the_ranks_is_refused_beforehand(checkpoint: Callable[..., Path]) -> None:
    layout = Layout(Checkpoint(checkpoint("llama")))
    for ranks_ in ("uniform", "water_filling"):
        plain = recipe_of(RTN, ranks=ranks_, keep=0.95, include=["*.q_proj"], multiple_of=20)
        with pytest.raises(InputError, match=r"group_size: 32 does not divide the width \d+ of model\.layers\.0\.self_attn\.q_proj\.1"):
            recipe.check(recipe.validate(plain, "r.yaml"), layout, "r.yaml")


def test_tasks_are_refused_for_what_transformers_refuses(checkpoint: Callable[..., Path]) -> None:
    plain = recipe_of() | {"evaluate": {"context": 32, "tasks": ["arc_easy"]}}
    with pytest.raises(InputError, match=r"evaluate\.tasks: lm-eval runs the artifact in transformers, which refuses linears that are two"):
        recipe.check(recipe.validate(plain, "r.yaml"), Layout(Checkpoint(checkpoint("llama"))), "r.yaml")
