"""What the benchmarks decide without running a tool: rows, recipes, resuming, planted outliers, bits on disk."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml

from compress.recipe import load

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture(scope="module", autouse=True)
def _importable() -> Any:
    """The benchmarks are scripts: they import each other from where they stand."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        patch.syspath_prepend(str(BENCH / "rivals"))
        yield
    for name in ("harness", "quality", "outliers", "perplexity", "protocol", "rivals.protocol", "rivals"):
        sys.modules.pop(name, None)


@pytest.fixture
def quality() -> Any:
    import quality

    return quality


def test_every_method_is_of_grids_that_exist_and_every_tool_has_its_script(quality: Any) -> None:
    for tool, methods in quality.METHODS.items():
        assert (BENCH / "rivals" / f"run_{tool}.py").exists()
        for grids in methods.values():
            assert grids and set(grids) <= set(quality.GRIDS)
    for grids, _ in quality.RECIPES.values():
        assert grids and set(grids) <= set(quality.GRIDS)
    assert {pair for pair in quality.DATA_FREE if pair[1] not in quality.METHODS[pair[0]]} == set()
    assert len({cell.name for cell in quality.CELLS}) == len(quality.CELLS)


def test_each_of_our_rows_is_a_recipe_that_loads_and_means_the_grid(quality: Any, tmp_path: Path) -> None:
    import harness

    for cell in (cell for cell in quality.CELLS if cell.tool == quality.OURS):
        path = harness.write_recipe(tmp_path / "recipe.yaml", quality.our_passes(cell), tmp_path / "tokens.jsonl", 4, 16)
        load(path)
        grid = quality.GRIDS[cell.grid]
        steps = [(name, options) for step in yaml.safe_load(path.read_text())["passes"] for name, options in step.items()]
        rounding = [options for name, options in steps if name in quality.ROUNDING]
        budgets = [options.get("average_bits", options.get("bits_per_weight")) for name, options in steps if name == "allocate"]
        assert rounding and all(0 <= grid.bits - budget < 0.01 for budget in budgets)
        for options in rounding:
            assert options.get("format", "int") == ("int" if grid.format == "mixed" else grid.format)
            assert options.get("bits", grid.bits) == ("allocated" if budgets else grid.bits)
            assert ("activations" in options) == (grid.activations is not None)


def test_rows_come_in_the_order_of_the_patterns_and_each_once(quality: Any) -> None:
    names = [cell.name for cell in quality.chosen(["w3g128/ours/gptq", "w3g128/ours/*"])]
    assert names[0] == "w3g128/ours/gptq" and len(set(names)) == len(names) and "w3g128/ours/rtn" in names
    assert len(quality.chosen(["*"])) == len(quality.CELLS)
    with pytest.raises(SystemExit, match="no such row"):
        quality.chosen(["w3g128/ours/no such recipe"])


def run(seed: int, loss: float | None = None) -> dict[str, Any]:
    if loss is None:
        return {"seed": seed, "error": "exit 1: out of memory"}
    return {"seed": seed, "losses": {"text": {"loss": loss, "perplexity": 2.0**loss}}}


def test_a_bench_that_was_killed_runs_what_is_missing_and_what_failed_only_when_asked(quality: Any) -> None:
    cell, baseline = quality.Cell("w3g128", "ours", "gptq"), {"text": {"loss": 3.0, "perplexity": 8.0}}
    assert quality.missing(None, 0, retry=False)
    row = quality.updated(None, cell, run(1), baseline)
    row = quality.updated(row, cell, run(0, 3.5), baseline)
    assert row["status"] == "exit 1: out of memory" and [kept["seed"] for kept in row["runs"]] == [0, 1]
    assert [quality.missing(row, seed, retry=False) for seed in range(3)] == [False, False, True]
    assert [quality.missing(row, seed, retry=True) for seed in range(3)] == [False, True, True]
    row = quality.updated(row, cell, run(1, 3.7), baseline)
    assert row["status"] == "done" and row["summary"]["text"]["excess_loss"] == pytest.approx(0.6)
    assert row["summary"]["text"]["excess_loss_range"] == pytest.approx([0.5, 0.7])
    assert quality.updated(None, cell, None, baseline)["status"] == "not installed"


def test_what_another_protocol_measured_is_refused(quality: Any, tmp_path: Path) -> None:
    path = tmp_path / "quality.json"
    protocol = {"context": 512, "windows_sha256": {"text": "a", "calibration-0": "b"}}
    cells = quality.CELLS[:2]
    document = quality.opened(path, protocol)
    rows = {cell: quality.updated(None, cell, run(0, 3.5), {"text": {"loss": 3.0, "perplexity": 8.0}}) for cell in reversed(cells)}
    quality.write(path, document, rows)
    more = {"context": 512, "windows_sha256": {"text": "a", "calibration-0": "b", "calibration-1": "c"}}
    kept = quality.opened(path, more)
    assert kept["protocol"] == more and [row["cell"]["method"] for row in kept["results"]] == [cell.method for cell in cells]
    for other in (more | {"context": 256}, more | {"windows_sha256": {"text": "z"}}):
        with pytest.raises(SystemExit, match="another protocol"):
            quality.opened(path, other)


def test_versions_of_rivals_that_are_gone_are_kept(quality: Any) -> None:
    before = {"versions": {"ours": {"torch": "1"}, "hqq": {"hqq": "0.2"}}}
    assert quality.renewed(before, {"versions": {"ours": {"torch": "2"}, "hqq": None}})["versions"] == {
        "ours": {"torch": "2"},
        "hqq": {"hqq": "0.2"},
    }


def test_a_ratio_is_to_plain_rounding_on_the_same_grid(quality: Any) -> None:
    def row(grid: str, tool: str, method: str, excess: float | None) -> dict[str, Any]:
        return {"cell": {"grid": grid, "tool": tool, "method": method}, "summary": {} if excess is None else {"text": {"excess_loss": excess}}}

    rows = [row("w3g128", "ours", "rtn", 0.4), row("w3g128", "hqq", "hqq", 0.1), row("w3g128", "torchao", "rtn", None), row("fp8", "hqq", "hqq", 1)]
    found = quality.ratios_to_rtn(rows)
    assert {cell.name: ratio for cell, ratio in found.items()} == {
        "w3g128/ours/rtn": {"text": 1.0}, "w3g128/hqq/hqq": {"text": 0.25}, "w3g128/torchao/rtn": {},
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planted_outliers_change_inputs_and_nothing_else(checkpoint: Callable[..., Path], tmp_path: Path, dtype: torch.dtype) -> None:
    import outliers

    source = checkpoint("llama", dtype)
    outliers.plant(source, tmp_path / "planted")
    ids = torch.randint(4, tiny.VOCABULARY, (1, 12))
    before, after = tiny.plain(source), tiny.plain(tmp_path / "planted")
    seen: list[torch.Tensor] = []
    for model in (before, after):
        model.model.layers[1].mlp.up_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].abs().amax(dim=(0, 1))))
    assert torch.equal(before(ids).logits, after(ids).logits)
    assert torch.equal((seen[1] / seen[0]).round().sort().values[-4:], torch.tensor([1.0, 32.0, 32.0, 32.0]))


def test_outliers_are_not_planted_where_the_readers_of_a_norm_are_not_known(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    import outliers

    with pytest.raises(SystemExit, match="qwen3_moe"):
        outliers.plant(checkpoint("qwen3_moe"), tmp_path / "planted")


def test_everything_stored_for_a_linear_counts_and_nothing_else_does() -> None:
    import perplexity

    model = torch.nn.ModuleDict({"a": torch.nn.Linear(16, 8), "head": torch.nn.Linear(16, 4), "norm": torch.nn.LayerNorm(16)})
    model.get_output_embeddings = lambda: model["head"]
    stored = {
        "a.weight_packed": torch.zeros(8, 2, dtype=torch.int32), "a.weight_scale": torch.zeros(8, 1, dtype=torch.bfloat16),
        "a.bias": torch.zeros(8), "head.weight": torch.zeros(4, 16), "norm.weight": torch.zeros(16), "ab.weight": torch.zeros(99),
    }  # fmt: skip
    assert perplexity.stored_bits(model, stored) == (32 * 16 + 16 * 8 + 32 * 8) / 128


def test_the_bits_of_an_unquantised_model_are_those_of_its_dtype(checkpoint: Callable[..., Path]) -> None:
    import perplexity

    model, stored = perplexity.load(checkpoint("llama", torch.bfloat16))
    assert next(model.parameters()).dtype == torch.float32
    assert perplexity.stored_bits(model, stored) == 16
    windows = [torch.randint(4, tiny.VOCABULARY, (12,)).tolist() for _ in range(3)]
    at_once = perplexity.evaluate(model, windows)
    one_by_one = [perplexity.evaluate(model, [window])["loss"] for window in windows]
    assert at_once["loss"] == pytest.approx(sum(one_by_one) / 3, rel=1e-6) and at_once["tokens"] == 33


def test_calibration_windows_of_unlike_lengths_are_refused(tmp_path: Path) -> None:
    import protocol

    path = tmp_path / "tokens.jsonl"
    path.write_text("\n".join(json.dumps({"input_ids": list(range(length))}) for length in (4, 5)))
    with pytest.raises(SystemExit, match="lengths"):
        protocol.read_windows(path)
