"""Routers with maps: as stock ones where the map says nothing, as written where it does, and opened by nobody who would leave it out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_eep import QUICK, records, searching
from test_model import rewrite
from test_run import compress
from transformers import AutoModelForCausalLM

from compress import runtime
from compress.backsweep import mean_loss
from compress.checkpoint import Checkpoint
from compress.data import Samples, Tokenizer, calibration, divided
from compress.errors import InputError
from compress.evaluate.scoring import last_hidden
from compress.evolution import Gene
from compress.fitness import Mixture, likelihood
from compress.layout import Layout
from compress.model import Model
from compress.routing import MappedRouter
from compress.whole import opened

SOFTMAX = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe")


@torch.no_grad()
@pytest.mark.parametrize("kind", SOFTMAX)
def test_a_map_that_gives_each_its_own_is_the_stock_router(kind: str, checkpoint: Callable[..., Path]) -> None:
    plain = tiny.plain(checkpoint(kind))
    stock, layout = plain.model.layers[0].mlp.gate, Layout(Checkpoint(checkpoint(kind)))
    count = len(layout.blocks[0].experts)
    mapped = MappedRouter(stock.weight, torch.eye(count), stock.top_k, renormalise=layout.renormalises)
    hidden = torch.randn(50, 64, generator=torch.Generator().manual_seed(3))
    for found, meant in zip(mapped(hidden), stock(hidden), strict=True):
        torch.testing.assert_close(found, meant, rtol=1e-6, atol=1e-6)
    assert torch.equal(mapped(hidden)[2], stock(hidden)[2])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen2_moe", "qwen3_moe"])
def test_a_map_joins_duplicates_without_loss(kind: str, copy: Callable[..., Path], edit_config: Callable[..., None]) -> None:
    """Every expert and router row twice, and twice as many to a token: half as many whose probabilities are sums, with and without renormalising."""
    folder = copy(kind)
    samples = calibration("demo:text", 4, 48, 0, Tokenizer(folder))
    original = mean_loss(Model(Layout(Checkpoint(folder))), samples)
    layout = Layout(Checkpoint(folder))
    count, active = len(layout.blocks[0].experts), int(layout.text_config["num_experts_per_tok"])

    def double(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            place, _, rest = name.partition(".mlp.experts.")
            if rest:
                number, _, local = rest.partition(".")
                tensors[f"{place}.mlp.experts.{int(number) + count}.{local}"] = tensors[name].clone()
            elif name.endswith("mlp.gate.weight"):
                tensors[name] = torch.cat([tensors[name], tensors[name]])

    rewrite(folder, double)
    edit_config(folder, num_experts=2 * count, num_local_experts=2 * count, num_experts_per_tok=2 * active)
    twice = [[float(one % count == kept) for one in range(2 * count)] for kept in range(count)]
    gene = Gene(tuple(range(count)), tuple(tuple(value / 2 for value in row) for row in twice), tuple(map(tuple, twice)))
    with opened(Model(Layout(Checkpoint(folder)))) as whole:
        groups = [[block.index] for block in layout.blocks if block.experts]
        mixture = Mixture(whole, groups, active, mapped=True)
        assert -mixture.fitness((gene,) * len(groups), samples, likelihood) == pytest.approx(original, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "options"),
    [("qwen2_moe", {"keep": 0.5, "prune": 4}), ("mixtral", {"keep": 0.5, "prune": 4, "active": 1}), ("olmoe", {"keep": 1.0, "active": 1})],
)
def test_what_is_judged_is_what_is_written_and_run(kind: str, options: dict[str, Any], checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    search = {"eep": {"mode": "full", "start": 2, "merge": 40, "judged": 1} | options}
    result = compress(QUICK | {"passes": [search]}, checkpoint(kind), tmp_path / "out")
    (first, *_) = found = records(tmp_path / "out")
    assert any(record["mapped"] for record in found)
    others = ("transformers", "vLLM", "SGLang", "ONNX Runtime GenAI", "OpenVINO")
    assert result["engines"] == {"compress": "loads"} | dict.fromkeys(others, "refuses routers with maps")
    samples = calibration("demo:text", 8, 48, 0, Tokenizer(checkpoint(kind)))
    model = Model(Layout(Checkpoint(tmp_path / "out")))
    for part, key in zip(divided(samples, 0.5, "eep"), ("fitness", "held_out"), strict=True):
        assert -mean_loss(model, part) == pytest.approx(first[key]["after"], abs=2e-5)
    held = divided(samples, 0.5, "eep")[1].items
    ours = runtime.load(tmp_path / "out")
    losses = [ours(input_ids=item.ids[None], labels=item.ids[None]).loss for item in held]
    assert -float(torch.stack(losses).mean()) == pytest.approx(first["held_out"]["after"], abs=2e-4)
    added = [item["name"] for item in result["ledger"] if item["action"] == "added"]
    assert len(added) == len(found) and all(name.endswith("gate.map") for name in added)


def test_transformers_refuses_what_it_would_leave_out(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(searching(mode="full"), checkpoint("qwen3_moe"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "compress_mapped_routers"
    with pytest.raises(ValueError, match="compress_mapped_routers"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_quantised_experts_behind_a_map_run_packed(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    steps = searching(mode="full")
    steps["passes"].append({"rtn": {"bits": 4, "group_size": 32}})
    compress(steps, checkpoint("qwen3_moe"), tmp_path / "out")
    sample = tiny.samples().items[0]
    model = Model(Layout(Checkpoint(tmp_path / "out")))
    with torch.no_grad():
        expected = model.logits(last_hidden(model, Samples("one", (sample,)))[0][0])
        found = runtime.load(tmp_path / "out")(input_ids=sample.ids[None]).logits[0]
    # Where two experts are nearly tied, rounding decides which is chosen.
    assert float((found - expected).abs().amax(-1).median() / expected.abs().max()) < 5e-4


@pytest.mark.parametrize("kind", ["deepseek_v3", "gpt_oss"])
def test_routers_without_a_softmax_over_all_are_refused(kind: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"mode: routers of a {kind} take no softmax over all experts"):
        compress(searching(mode="full"), checkpoint(kind), tmp_path / "out")


def test_experts_behind_a_map_are_not_pruned_again(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(searching(mode="full"), checkpoint("qwen3_moe"), tmp_path / "out")
    with pytest.raises(InputError, match="the model's routers have maps"):
        compress(QUICK | {"passes": [{"prune_experts": {"keep": 0.5}}]}, tmp_path / "out", tmp_path / "again")


@pytest.mark.parametrize("change", [lambda tensor: tensor[0], lambda tensor: tensor[:3].contiguous(), lambda tensor: tensor[:, :5].contiguous()])
def test_a_map_of_another_shape_is_refused_by_name(
    change: Callable[[torch.Tensor], torch.Tensor], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    compress(searching(mode="full"), checkpoint("qwen3_moe"), tmp_path / "out")
    name = "model.layers.1.mlp.gate.map"
    rewrite(tmp_path / "out", lambda tensors: tensors.update({name: change(tensors[name])}))
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.gate"):
        Model(Layout(Checkpoint(tmp_path / "out")))
