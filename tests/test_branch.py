"""Branches: the best that their few weights can do, the same model in memory, on disk and packed, and nothing else than was asked for."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import branch as oracle
from test_run import compress
from torch import Tensor

from compress import explain, pipeline, planning, recipe
from compress import load as compress_load
from compress.checkpoint import BRANCHES, Checkpoint
from compress.data import Sample, Samples
from compress.errors import InputError
from compress.evaluate.scoring import last_hidden
from compress.formats import branch as stored
from compress.inspection import inspect
from compress.kernels.branch import Branched, BranchProduct
from compress.layout import Layout
from compress.model import Model
from compress.numerics import branch as branches
from compress.numerics.activations import Activations

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


# The pass -----------------------------------------------------------------------------------------------------------------------------

SHORT: dict[str, Any] = {"calibration": {"samples": 12, "length": 32}, "evaluate": None}
MAGNITUDE = {"prune_nm": {"method": "magnitude"}}
START = {"tokens": 1, "learning_rate": 1e-9, "held_out": 0.2}


def branched(*behind: Any, before: Any = MAGNITUDE, **options: Any) -> dict[str, Any]:
    heal = {"heal": {"tokens": 800, "batch": 4, "learning_rate": 0.003, "branch": 16} | options}
    return SHORT | {"passes": [*([before] if before else []), heal, *behind]}


def opened(folder: Path) -> Model:
    return Model(Layout(Checkpoint(folder)))


def logits(model: Model) -> Tensor:
    return model.logits(last_hidden(model, Samples("probe", (Sample.of(list(range(1, 40))),)))[0][0])


def whole(folder: Path) -> dict[str, Tensor]:
    """The weight that every linear computes with."""
    model = opened(folder)
    found = {}
    for name, linear in model.layout.linears.items():
        found[name] = model.dense(name).float()
        if branch := model.branch(name):
            found[name] = found[name] + branches.expanded(branch.weight.float(), branch.run, linear.columns)
    return found


def healing(result: dict[str, Any]) -> dict[str, Any]:
    return next(record for record in result["transforms"] if record["pass"] == "heal" and "loss" in record)


def test_the_start_alone_makes_a_pruned_model_better_on_text_it_did_not_see(tmp_path: Path) -> None:
    data = {"calibration": {"samples": 24, "length": 128}, "evaluate": {"data": "demo:heldout", "context": 128, "windows": 12}}
    pruned = compress(data | {"passes": [MAGNITUDE]}, "demo:dense", tmp_path / "pruned")
    result = compress(data | {"passes": [MAGNITUDE, {"heal": START | {"branch": 16}}]}, "demo:dense", tmp_path / "out")
    first, best = healing(result)["loss"]
    assert best < first
    evaluated = result["evaluation"]
    assert evaluated["compressed"]["perplexity"] < evaluated["without_branch"]["perplexity"]
    assert evaluated["without_branch"]["perplexity"] == pytest.approx(pruned["evaluation"]["compressed"]["perplexity"], rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "behind", [[], [{"rtn": {"bits": 4, "group_size": 32}}], [{"gptq": {"bits": 8, "group_size": 32, "activations": "dynamic"}}]]
)
def test_a_kept_branch_is_computed_with_from_disk_and_packed(
    behind: list[Any], dtype: torch.dtype, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meant: list[Tensor] = []
    real = pipeline._Run._export
    monkeypatch.setattr(pipeline._Run, "_export", lambda run, staging: (meant.append(logits(run.model)), real(run, staging)))
    result = compress(branched(*behind), checkpoint("llama", dtype), tmp_path / "out")
    model = opened(tmp_path / "out")
    assert model.left_out == ("branch",) and model.patterns == {} and torch.equal(logits(model), meant[0])
    without = float((logits(model.in_engines()) - meant[0]).abs().max())
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        loaded = compress_load(tmp_path / "out")(ids).logits[0].float()
    assert float((loaded - meant[0]).abs().max()) < 0.05 * without
    assert result["verification"]["branch_left_out"] and result["engines"]["compress"] == "loads"
    assert all(text.startswith(("without branch; ", "refuses quantised")) for engine, text in result["engines"].items() if engine != "compress")
    stored = Checkpoint(tmp_path / "out").tensors
    kept = {name: info for name, info in stored.items() if name.endswith("branch_weight")}
    assert len(kept) == 14 and {info.dtype for info in kept.values()} == {{torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]}
    assert {info.file.parent.name for info in kept.values()} == {"branches"}


def test_a_branch_reads_inputs_as_its_linear_does() -> None:
    linear, branch = torch.nn.Linear(20, 3, bias=False), stored.Branch(torch.randn(3, 2).bfloat16(), 16)
    inputs, x = Activations("int8", None), torch.randn(5, 20)
    written = oracle.runs(20, 16).float()
    for rounding, seen in ((None, x), (inputs, inputs.round(x))):
        both = Branched(linear, branch, rounding)(x)
        assert torch.allclose(both, linear(x) + seen @ (branch.weight.float() @ written).T, atol=1e-5)
    assert not torch.allclose(Branched(linear, branch, None)(x), Branched(linear, branch, inputs)(x), atol=1e-5)


@pytest.mark.usefixtures("in_float32")
def test_a_loaded_model_with_branches_can_be_copied_pickled_and_cast(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(branched(), checkpoint("llama", torch.bfloat16), tmp_path / "out")
    model, ids = compress_load(tmp_path / "out"), torch.arange(1, 20)[None]
    with torch.no_grad():
        first = model(ids).logits
        again = pickle.loads(pickle.dumps(copy.deepcopy(model)))(ids).logits
        assert torch.equal(first, again) and torch.allclose(model.double()(ids).logits.float(), first.float(), atol=0.05)
    told = [record["stored"] for record in explain(model) if record["part"] == "branch"]
    assert told == ["bfloat16, one per 16 inputs"] * 14
    weights = [module.weight for module in model.modules() if isinstance(module, BranchProduct)]
    assert len(weights) == 14 and {weight.dtype for weight in weights} == {torch.bfloat16}


def test_a_merged_branch_makes_weights_dense_and_they_are_those_of_both(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(branched(), checkpoint("llama"), tmp_path / "kept")
    result = compress(branched(branch_after="merge"), checkpoint("llama"), tmp_path / "merged")
    kept, merged = whole(tmp_path / "kept"), whole(tmp_path / "merged")
    assert all(torch.allclose(weight, merged[name], atol=1e-6) and bool((merged[name] != 0).float().mean() > 0.9) for name, weight in kept.items())
    assert not opened(tmp_path / "merged").left_out and "pruned_linears" not in result["verification"]
    assert set(result["engines"]) == {"transformers", "vLLM", "SGLang", "ONNX Runtime GenAI", "OpenVINO"}
    given_up = [record for record in result["transforms"] if "pattern" in record and record["pattern"] is None]
    assert len(given_up) == 14 and {record["method"] for record in given_up} == {"branch merged"}
    actions = {item["action"] for item in result["ledger"] if item["name"].endswith("proj.weight")}
    assert actions == {"pruned 2:4 and healed, its pattern given up"}
    assert "given up" in (tmp_path / "merged" / "report.html").read_text()


def test_later_passes_may_fill_what_a_merged_branch_has_filled(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(branched({"gptq": {"bits": 4, "group_size": 32}}, branch_after="merge"), checkpoint("llama"), tmp_path / "out")
    assert all(bool((weight != 0).float().mean() > 0.6) for weight in whole(tmp_path / "out").values())


def test_experts_get_branches_that_are_merged(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    result = compress(branched(branch_after="merge"), checkpoint("qwen3_moe"), tmp_path / "out")
    first, best = healing(result)["loss"]
    assert best <= first
    filled = [name for name, weight in whole(tmp_path / "out").items() if ".experts." in name and bool((weight != 0).float().mean() > 0.9)]
    assert filled


@pytest.mark.parametrize("export", ["compressed-tensors", "nm-packed"])
def test_sizes_are_as_planned_and_inspection_tells_of_branches(export: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    plain = branched({"rtn": {"bits": 4, "group_size": 32}}) | {"export": [export]}
    result = compress(plain, checkpoint("llama"), tmp_path / "out")
    wanted, layout = recipe.validate(plain, "r"), Layout(Checkpoint(checkpoint("llama")))
    planned = planning.plan(wanted, layout, recipe.check(wanted, layout, "r"))
    extra = sum(4 * linear.rows * -(-linear.columns // 16) + 4 for linear in layout.linears.values())
    beside = sum(info.nbytes for name, info in Checkpoint(tmp_path / "out").tensors.items() if ".branch_" in name)
    assert extra == beside and planned["size"]["at_most"] and planned["engines"] == result["engines"]
    if export == "compressed-tensors":
        assert planned["size"]["after_bytes"] == result["size"]["after_bytes"]
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        assert manifest["loadable_by"] == ["compress"] and "transformers" in manifest["loadable_without_branch_by"]
        assert "leave out what lies in `branches/`" in (tmp_path / "out" / "README.md").read_text()
    else:
        assert result["engines"]["transformers"].startswith("refuses")
    became = {item["name"]: item["became"] for item in inspect(tmp_path / "out")["tensors"]}
    assert became["model.layers.0.mlp.down_proj"].endswith("branch per 16 inputs")


def test_two_exports_hold_the_same_model(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    for export in ("compressed-tensors", "nm-packed"):
        compress(branched() | {"export": [export]}, checkpoint("llama"), tmp_path / export)
    one, other = (opened(tmp_path / export) for export in ("compressed-tensors", "nm-packed"))
    assert other.left_out == ("branch",) and torch.equal(logits(one), logits(other))


def test_residuals_and_a_branch_go_together(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    behind = [{"rtn": {"bits": 3, "group_size": 32}}, {"detach": {"share": 0.05, "values": "restored", "score": "taylor"}}]
    small = {"evaluate": {"data": "demo:heldout", "context": 32, "windows": 4}}
    result = compress(branched(*behind) | small, checkpoint("llama"), tmp_path / "out")
    if "residuals" in opened(tmp_path / "out").left_out:
        assert "without_residuals_and_branch" in result["evaluation"]
        assert result["engines"]["transformers"].startswith("without branch; without residuals; ")
    else:
        assert "without_branch" in result["evaluation"]


# What is refused ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        (branched(before=None), "no linear has an N:M pattern"),
        (branched(branch=None, branch_after="merge"), "branch_after: is read only with branch"),
        (branched(train="lora"), "trained together with all weights"),
        (branched(before={"prune_nm": {"permute": True}}), "another order"),
        (branched({"smooth": {}}), "would change the inputs that the branches"),
        (branched({"heal": {"tokens": 8, "branch": 8}}), "or add more"),
        (branched({"heal": {"tokens": 8, "branch": 8}}, branch_after="merge"), "no linear has an N:M pattern"),
        (branched() | {"evaluate": {"tasks": ["arc_easy"]}}, "leaves branches out"),
        (branched(branch_after="merge") | {"export": ["nm-packed"]}, "branches that are merged fill what was removed"),
    ],
)
def test_what_does_not_fit_together_is_refused(plain: dict[str, Any], message: str, checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(InputError) as caught:
        recipe.check(recipe.validate(plain, "r.yaml"), Layout(Checkpoint(checkpoint("llama"))), "r.yaml")
    assert message in str(caught.value)


def test_branches_cannot_stay_beside_experts(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="set branch_after: merge"):
        recipe.check(recipe.validate(branched(), "r.yaml"), Layout(Checkpoint(checkpoint("qwen3_moe"))), "r.yaml")


def test_a_damaged_artifact_and_one_to_start_from_again_are_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(branched(), checkpoint("llama"), tmp_path / "out")
    with pytest.raises(InputError, match="has branches beside its linears; start from the original"):
        compress(branched(), tmp_path / "out", tmp_path / "again")
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / name).symlink_to(tmp_path / "out" / name)
    with pytest.raises(InputError, match=r"branches\.safetensors: cannot be read"):
        Checkpoint(tmp_path / "bare")
    config = (tmp_path / "out" / "config.json").read_text()
    (tmp_path / "bare" / "config.json").unlink()
    (tmp_path / "bare" / "config.json").write_text(config.replace(BRANCHES, "../elsewhere.safetensors"))
    with pytest.raises(InputError, match=r"compress_branches: names '\.\./elsewhere\.safetensors'"):
        Checkpoint(tmp_path / "bare")


def test_a_branch_that_does_not_fit_its_weight_is_refused() -> None:
    tensors = stored.pack("X", stored.Branch(torch.zeros(3, 2), 16))
    assert torch.equal(stored.unpack("X", tensors, (3, 20)).weight, torch.zeros(3, 2)) and stored.unpack("X", tensors, (3, 20)).run == 16
    for shape in ((3, 33), (3, 16), (4, 20)):
        with pytest.raises(InputError, match="its branch does not fit"):
            stored.unpack("X", tensors, shape)
    with pytest.raises(InputError, match="its branch does not fit"):
        stored.unpack("X", tensors | {"X.branch_run": torch.tensor([0], dtype=torch.int32)}, (3, 20))
