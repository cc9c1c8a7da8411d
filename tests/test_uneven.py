"""Experts that differ in width: as masked ones, opened again, and refused by whoever would not know."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_model import rewrite
from test_prune_structured import indices
from test_run import compress
from transformers import AutoModelForCausalLM

from compress import runtime
from compress.backsweep import mean_loss
from compress.checkpoint import Checkpoint
from compress.data import Samples
from compress.errors import InputError
from compress.layout import Layout
from compress.model import Model

KINDS = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe")


def pruning(**options: Any) -> dict[str, Any]:
    step = {"method": "heapr", "keep": {"expert_channel": 0.5}, "multiple_of": 4, "widths": "per_expert"} | options
    return {"calibration": {"samples": 4, "length": 48}, "passes": [{"prune_structured": step}], "evaluate": None}


def samples_of_first(samples: Samples) -> Samples:
    return Samples(samples.source, samples.items[:1])


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_experts_that_differ_in_width_compute_as_masked_ones(
    kind: str, checkpoint: Callable[..., Path], copy: Callable[..., Path], tmp_path: Path
) -> None:
    result = compress(pruning(), checkpoint(kind), tmp_path / "out")
    records = [record for record in result["transforms"] if record["pass"] == "prune_structured"]
    widths = [record["after"] for record in records]
    every = sum(units.count for block in Layout(Checkpoint(checkpoint(kind))).blocks for units in block.units if units.kind == "expert_channel")
    assert len(set(widths)) > 1 and all(width % 4 == 0 for width in widths)
    assert sum(record["before"] - record["after"] for record in records) == every // 2
    masked, layout = copy(kind), Layout(Checkpoint(checkpoint(kind)))
    kept = {record["name"]: indices(record["kept"]) for record in records}
    readers = {units.name: units.columns for block in layout.blocks for units in block.units}

    def mask(tensors: dict[str, torch.Tensor]) -> None:
        for name, stay in kept.items():
            weight = tensors[f"{readers[name]}.weight"]
            left = torch.zeros_like(weight)
            left[:, sorted(stay)] = weight[:, sorted(stay)]
            tensors[f"{readers[name]}.weight"] = left

    rewrite(masked, mask)
    samples = tiny.samples()
    meant = mean_loss(Model(Layout(Checkpoint(masked))), samples)
    assert mean_loss(Model(Layout(Checkpoint(tmp_path / "out"))), samples) == pytest.approx(meant, abs=1e-5)
    ids = samples.items[0].ids[None]
    theirs, ours = tiny.plain(masked)(input_ids=ids).logits, runtime.load(tmp_path / "out")(input_ids=ids).logits
    assert float((theirs - ours).abs().max() / theirs.abs().max()) < 1e-5


def test_those_who_know_one_width_refuse_them(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    result = compress(pruning(), checkpoint("qwen3_moe"), tmp_path / "out")
    others = ("transformers", "vLLM", "SGLang", "ONNX Runtime GenAI", "OpenVINO")
    assert result["engines"] == {"compress": "loads"} | dict.fromkeys(others, "refuses experts of different widths")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "compress_uneven_experts"
    with pytest.raises(ValueError, match="compress_uneven_experts"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_an_expert_narrower_than_the_config_says_is_refused_where_the_config_says_nothing_of_it(copy: Callable[..., Path]) -> None:
    folder = copy("qwen3_moe")
    place = "model.layers.1.mlp.experts.2"

    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{place}.down_proj.weight"] = tensors[f"{place}.down_proj.weight"][:, :8].contiguous()

    rewrite(folder, narrow)
    with pytest.raises(InputError, match=r"experts\.2\.down_proj\.weight: has the shape \[64, 8\]"):
        Model(Layout(Checkpoint(folder)))


def test_an_expert_whose_linears_do_not_fit_is_refused_by_name(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(pruning(), checkpoint("qwen3_moe"), tmp_path / "out")
    place = "model.layers.1.mlp.experts.2"

    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{place}.down_proj.weight"] = tensors[f"{place}.down_proj.weight"][:, :2].contiguous()

    rewrite(tmp_path / "out", narrow)
    with pytest.raises(InputError, match=r"experts\.2\.down_proj: reads 2 channels, of which the expert makes"):
        Model(Layout(Checkpoint(tmp_path / "out")))


@pytest.mark.parametrize(
    ("kind", "passes", "message"),
    [
        ("qwen3_moe", [pruning(method="magnitude")["passes"][0]], "per_expert compares channels of all experts, which heapr's scores alone can be"),
        ("llama", [pruning(keep={"ffn_channel": 0.5})["passes"][0]], "per_expert compares channels of all experts"),
        ("gpt_oss", pruning()["passes"], "the experts of a gpt_oss are one tensor on disk; set widths: uniform"),
        ("qwen3_moe", [*pruning()["passes"], {"rtn": {"group_size": 4}}], "is of an expert that differs in width from others"),
        ("qwen3_moe", [*pruning()["passes"], {"prune_experts": {"keep": 0.5}}], "the experts differ in width"),
        ("qwen3_moe", [*pruning()["passes"], *pruning(widths="uniform")["passes"]], "experts differ in width already; set widths: per_expert"),
    ],
)
def test_what_cannot_be_done_to_them_is_refused(
    kind: str, passes: list[dict[str, Any]], message: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        compress(pruning() | {"passes": passes}, checkpoint(kind), tmp_path / "out")
    assert message in str(caught.value)


def test_attention_in_few_bits_and_healing_go_with_them(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    steps = [*pruning()["passes"], {"prune_nm": {"include": ["*.self_attn.*"]}}, {"heal": {"tokens": 512, "samples": 8}}]
    steps.append({"rtn": {"bits": 4, "group_size": 32, "exclude": ["*.experts.*"]}})
    compress(pruning() | {"passes": steps}, checkpoint("qwen3_moe"), tmp_path / "out")
    samples = tiny.samples()
    with torch.no_grad():
        found = runtime.load(tmp_path / "out")(input_ids=samples.items[0].ids[None], labels=samples.items[0].ids[None]).loss
        assert float(found) == pytest.approx(mean_loss(Model(Layout(Checkpoint(tmp_path / "out"))), samples_of_first(samples)), abs=2e-3)
