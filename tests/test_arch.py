"""What architecture tables say beyond what other tests try on every kind of model: what is left out, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_folding import difference
from test_model import rewrite
from test_run import compress, weights

from compress.arch import olmoe
from compress.checkpoint import Checkpoint
from compress.errors import InputError
from compress.layout import Layout
from compress.model import Model
from compress.reshape import without_blocks

QUICK: dict[str, Any] = {"calibration": {"samples": 4, "length": 48}, "evaluate": None}
RTN = {"rtn": {"bits": 4, "group_size": 32}}


def test_the_bias_that_a_router_chooses_by_is_loaded_and_kept_in_float32(checkpoint: Callable[..., Path]) -> None:
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    model = Model(Layout(Checkpoint(checkpoint("deepseek_v3", torch.bfloat16))))
    with model.block(1) as block:
        buffer = block.module.mlp.gate.e_score_correction_bias
        assert buffer.dtype == torch.float32 and torch.equal(buffer, model.checkpoint.read(name).float()) and bool(buffer.any())


@pytest.fixture
def with_more_blocks(copy: Callable[..., Path], edit_config: Callable[..., None]) -> Path:
    """A DeepSeek-V3 with a third block that predicts further tokens, as published."""
    folder = copy("deepseek_v3")

    def add(tensors: dict[str, torch.Tensor]) -> None:
        more = {name.replace("layers.1.", "layers.2."): tensor.clone() for name, tensor in tensors.items() if "layers.1." in name}
        tensors |= more | {"model.layers.2.eh_proj.weight": torch.ones(64, 128), "model.layers.2.enorm.weight": torch.ones(64)}

    rewrite(folder, add)
    edit_config(folder, num_nextn_predict_layers=1)
    return folder


@pytest.mark.parametrize("steps", [[RTN], [{"prune_depth": {"drop": 1}}, RTN]], ids=["all blocks", "one block less"])
def test_blocks_that_predict_further_tokens_are_left_out_and_said(steps: list[dict[str, Any]], with_more_blocks: Path, tmp_path: Path) -> None:
    result = compress(QUICK | {"passes": steps, "verify": "full"}, with_more_blocks, tmp_path / "out")
    fates = {item["name"]: item for item in result["ledger"]}
    of_more = [name for name in fates if name.startswith("model.layers.2.")]
    assert len(of_more) > 30 and all(fates[name]["action"] == "dropped" and "MTP" in fates[name]["why"] for name in of_more)
    assert not [name for name in weights(tmp_path / "out") if name.startswith("model.layers.2.")]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_more_blocks_than_the_config_knows_are_refused(with_more_blocks: Path, edit_config: Callable[..., None]) -> None:
    edit_config(with_more_blocks, num_nextn_predict_layers=None)
    with pytest.raises(InputError, match=r"model\.layers\.2: is not accounted for"):
        Layout(Checkpoint(with_more_blocks))


def test_a_table_that_forgets_that_values_are_clipped_shows(checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(olmoe, "ARCH", replace(olmoe.ARCH, folds=tuple(replace(fold, unless=None) for fold in olmoe.ARCH.folds)))
    assert difference(checkpoint("olmoe-clipped", torch.float64), tmp_path) > 1e-3


@pytest.mark.parametrize(
    ("kind", "steps", "message"),
    [
        ("deepseek_v3", [{"kv_quant": {}}], r"kv_quant: a deepseek_v3 caches one latent vector for all heads, .*; leave kv_quant out"),
        ("deepseek_v3", [{"rotate": {}}, RTN], r"r2: nothing scales or turns the values of a deepseek_v3's heads .*; set r2: false"),
        ("olmoe-clipped", [{"rotate": {}}, RTN], r"r2: nothing scales or turns the values of a olmoe's heads .*; set r2: false"),
        ("deepseek_v3", [{"prune_structured": {"keep": {"kv_group": 0.5}}}], r"keep: the model has no kv_group; it has ffn_channel"),
        ("olmoe", [{"prune_structured": {"keep": {"query_head": 0.5}}}], r"keep: the model has no query_head; it has expert_channel"),
    ],
)
def test_what_an_architecture_cannot_have_done_to_it_is_refused_by_name(
    kind: str, steps: list[dict[str, Any]], message: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        compress(QUICK | {"passes": steps}, checkpoint(kind), tmp_path / "out")


def test_a_group_that_there_are_two_ways_of_has_its_missing_linear_named(copy: Callable[..., Path]) -> None:
    folder = copy("deepseek_v3")

    def without(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "layers.1.self_attn.q_" in name]:
            del tensors[name]

    rewrite(folder, without)
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.q_a_proj\.weight: is missing"):
        Layout(Checkpoint(folder))


@pytest.mark.parametrize("kind", ["qwen2_moe", "deepseek_v3"])
def test_a_block_less_keeps_dense_blocks_dense(kind: str, copy: Callable[..., Path]) -> None:
    """Four blocks, every other with experts or the first two without, of which the second goes."""
    import transformers as hf

    settings = tiny.config(kind).to_dict() | {"num_hidden_layers": 4, "layer_types": None}
    settings |= {"decoder_sparse_step": 2} if kind == "qwen2_moe" else {"first_k_dense_replace": 2}
    torch.manual_seed(2)
    model = hf.AutoModelForCausalLM.from_config(type(tiny.config(kind))(**settings))
    folder = copy(kind)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    model.save_pretrained(folder)
    left = without_blocks(Layout(Checkpoint(folder)), {1})
    assert [not block.experts for block in left.blocks] == ([True, True, False] if kind == "qwen2_moe" else [True, False, False])
    Model(left)  # transformers makes of the config what there are weights for
