"""What architecture tables say beyond what other tests try on every kind of model: what is left out, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_folding import difference
from test_model import rewrite
from test_run import compress, weights

from compress import runtime
from compress.arch import olmoe
from compress.checkpoint import Checkpoint
from compress.data import Samples
from compress.errors import InputError
from compress.evaluate.scoring import last_hidden
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


# Experts together on disk ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint of a kind that holds experts as transformers does in memory, never to be changed."""
    return cache(lambda kind: tiny.save(kind, torch.bfloat16, tmp_path_factory.mktemp(f"{kind}-joined"), save_original_format=False))


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen2_moe", "olmoe", "deepseek_v3"])
def test_experts_in_one_tensor_are_those_of_one_each(kind: str, joined: Callable[[str], Path], checkpoint: Callable[..., Path]) -> None:
    together, apart = (Layout(Checkpoint(folder)) for folder in (joined(kind), checkpoint(kind, torch.bfloat16)))
    assert any(name.endswith("experts.gate_up_proj") for name in Checkpoint(joined(kind)).tensors)
    assert sorted(together.checkpoint.tensors) == sorted(apart.checkpoint.tensors) and together.blocks == apart.blocks
    assert together.checkpoint.nbytes == apart.checkpoint.nbytes
    for name in apart.checkpoint.tensors:
        assert torch.equal(together.checkpoint.read(name), apart.checkpoint.read(name)), name


def test_experts_across_and_interleaved_are_read_as_a_loop_does(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("gpt_oss", torch.bfloat16)
    layout, expected = Layout(Checkpoint(folder)), tiny.weights(folder)
    assert sorted(layout.checkpoint.tensors) == sorted(expected)
    assert all(torch.equal(layout.checkpoint.read(name), tensor) for name, tensor in expected.items())
    assert len({(info.file, info.begin) for info in layout.checkpoint.tensors.values()}) == len(expected)  # what a pass has moved is found by place
    assert layout.checkpoint.nbytes == Checkpoint(folder).nbytes


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_what_is_made_does_not_depend_on_how_experts_were_stored(
    kind: str, joined: Callable[[str], Path], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Where transformers reads both, from either; gpt-oss against its own tensors written one by one and joined by a loop."""
    steps = [{"prune_structured": {"method": "magnitude", "keep": {"expert_channel": 0.5}, "multiple_of": 16}}]
    result = compress(QUICK | {"passes": steps, "verify": "full"}, joined(kind), tmp_path / "one")
    other = compress(QUICK | {"passes": steps, "verify": "full"}, checkpoint(kind, torch.bfloat16), tmp_path / "other")
    assert [(item["name"], item["action"]) for item in result["ledger"]] == [(item["name"], item["action"]) for item in other["ledger"]]
    assert sum(".experts." in item["name"] and item["action"] == "pruned" for item in result["ledger"]) >= 2 * 3 * 4
    one, two = (tiny.weights(tmp_path / name) for name in ("one", "other"))
    assert sorted(one) == sorted(two) and all(torch.equal(one[name], two[name]) for name in one)


def test_dense_experts_of_gpt_oss_are_written_as_they_were(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("gpt_oss", torch.bfloat16)
    compress(QUICK | {"passes": [RTN | {"rtn": RTN["rtn"] | {"exclude": ["*.experts.*"]}}], "verify": "full"}, folder, tmp_path / "out")
    before, after = weights(folder), weights(tmp_path / "out")
    of_experts = [name for name in before if ".experts." in name]
    assert len(of_experts) == 2 * 4 and all(torch.equal(before[name], after[name]) for name in of_experts)


def test_quantised_experts_of_gpt_oss_are_for_this_program_alone_and_all_in_the_ledger(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    result = compress(QUICK | {"passes": [RTN]}, checkpoint("gpt_oss"), tmp_path / "out")
    assert result["engines"]["transformers"].startswith("refuses quantised experts of a gpt_oss")
    assert result["engines"]["vLLM"].startswith("unproven: experts of a gpt_oss one by one")
    fates = {item["name"]: item["action"] for item in result["ledger"]}
    linears = [f"model.layers.{block}.mlp.experts.{expert}" for block in (0, 1) for expert in range(4)]
    for name in linears:
        assert {fates[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down")} == {"quantized"}
        assert {fates[f"{name}.{part}_proj.bias"] for part in ("gate", "up", "down")} == {"kept"}
    ours, meant = runtime.load(tmp_path / "out"), Model(Layout(Checkpoint(tmp_path / "out")))
    sample = tiny.samples().items[0]
    with torch.no_grad():
        expected = meant.logits(last_hidden(meant, Samples("first", (sample,)))[0])
        found = ours(input_ids=sample.ids[None]).logits
    assert float((found - expected).abs().max() / expected.abs().max()) < 5e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor[0], r"experts\.gate_up_proj: is \[64, 64\], not of 3 dimensions"),
        (lambda tensor: tensor[:, :63].contiguous(), r"experts\.gate_up_proj: is \[8, 63, 64\], where half of dimension 1 must be gates"),
        (lambda tensor: tensor[..., :63].contiguous(), r"experts\.gate_up_proj: is \[8, 64, 63\], where dimension 2 must be the 64 channels"),
    ],
)
def test_experts_of_another_shape_are_refused_by_name(
    change: Callable[[torch.Tensor], torch.Tensor], message: str, joined: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(joined("qwen3_moe"), tmp_path / "model"))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    rewrite(folder, lambda tensors: tensors.update({name: change(tensors[name])}))
    with pytest.raises(InputError, match=message):
        Layout(Checkpoint(folder))


def test_experts_across_what_the_table_says_are_refused_by_name(joined: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(joined("qwen3_moe"), tmp_path / "model"))
    name = "model.layers.1.mlp.experts.down_proj"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].transpose(1, 2).contiguous()}))
    with pytest.raises(InputError, match=r"experts\.down_proj: is \[8, 32, 64\], where dimension 1 must be the 64 channels"):
        Layout(Checkpoint(folder))


def test_experts_in_a_packed_form_of_their_publisher_are_refused_with_a_way_out(
    copy: Callable[..., Path], edit_config: Callable[..., None], tmp_path: Path
) -> None:
    folder = copy("gpt_oss")

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_proj") and ".experts." in name]:
            tensors |= {f"{name}_blocks": torch.zeros(4, 64, 2, 16, dtype=torch.uint8), f"{name}_scales": torch.zeros(4, 64, 2, dtype=torch.uint8)}
            del tensors[name]

    rewrite(folder, pack)
    edit_config(folder, quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(InputError, match=r"already quantised \(mxfp4\); start from .* dequantize=True"):
        compress(QUICK | {"passes": [RTN]}, folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("is_transposed", True, "is_transposed: True"),
        ("has_bias", True, "has_bias: True"),
        ("is_concatenated", None, "is_concatenated: None"),
        ("has_something_new", True, "has_something_new: True"),
    ],
)
def test_a_layout_that_the_table_does_not_say_is_refused_by_name(
    flag: str, value: bool | None, message: str, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    made = Qwen3MoeExperts.__init__

    def otherwise(self: Any, *arguments: Any) -> None:
        made(self, *arguments)
        setattr(self, flag, value)

    monkeypatch.setattr(Qwen3MoeExperts, "__init__", otherwise)
    with pytest.raises(InputError, match=f"qwen3_moe experts: are held in a way that is not supported: {message}"):
        Model(Layout(Checkpoint(checkpoint("qwen3_moe"))))


@pytest.mark.parametrize(("kind", "experts"), [("qwen2_moe-60", 60), ("olmoe", 16), ("deepseek_v3", 8), ("gpt_oss", 8)])
def test_half_of_the_experts_in_four_bits_are_all_accounted_for_and_open_in_plain_transformers(
    kind: str, experts: int, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Those of a gpt-oss in the form in which it is published."""
    joined = kind == "gpt_oss"
    rounding = {"rtn": {"format": "mxfp4", "include": ["*.experts.*"]}} if joined else RTN
    steps = [{"prune_experts": {"method": "reap", "keep": 0.5}}, rounding]
    recipe = QUICK | {"passes": steps, "verify": "full", "export": ["mxfp4" if joined else "compressed-tensors"]}
    result = compress(recipe, checkpoint(kind, torch.bfloat16), tmp_path / "out")
    assert result["verification"]["mode"] == "full"
    actions = [item["action"] for item in result["ledger"] if ".experts." in item["name"] and item["name"].endswith(".weight")]
    blocks = 2 if kind != "deepseek_v3" else 1
    total = 3 * blocks * (experts if kind in ("qwen2_moe-60", "deepseek_v3") else experts // 2)
    assert set(actions) == {"removed", "quantized"}
    assert len(actions) == total and actions.count("removed") == total // 2


# Experts in MXFP4 as gpt-oss is published ------------------------------------------------------------------------------------------

MXFP4: dict[str, Any] = QUICK | {"passes": [{"rtn": {"format": "mxfp4", "include": ["*.experts.*"]}}], "export": ["mxfp4"]}


@pytest.fixture(scope="session")
def published(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny gpt-oss with experts in blocks and scales, never to be changed."""
    out = tmp_path_factory.mktemp("mxfp4") / "out"
    compress(MXFP4 | {"verify": "full"}, checkpoint("gpt_oss", torch.bfloat16), out)
    return out


def test_experts_in_mxfp4_lie_as_published_and_are_read_as_a_loop_does(published: Path, checkpoint: Callable[..., Path]) -> None:
    stored, meant = weights(published), tiny.weights(checkpoint("gpt_oss", torch.bfloat16))
    config = json.loads((published / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "mxfp4" and "model.layers.*.self_attn" in config["modules_to_not_convert"]
    blocks = stored["model.layers.1.mlp.experts.gate_up_proj_blocks"]
    assert blocks.dtype == torch.uint8 and blocks.shape == (4, 64, 2, 16)
    assert stored["model.layers.1.mlp.experts.down_proj_scales"].shape == (4, 64, 1)
    values = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    model = Model(Layout(Checkpoint(published)))
    for name in ("gate_up_proj", "down_proj"):
        blocks, scales = (stored[f"model.layers.1.mlp.experts.{name}_{kind}"] for kind in ("blocks", "scales"))
        for expert, (rows, exponents) in enumerate(zip(blocks, scales, strict=True)):
            for row in range(len(rows)):
                found = torch.tensor([
                    (-1 if nibble & 8 else 1) * values[nibble & 7] * 2.0 ** (int(exponents[row, group]) - 127)
                    for group, run in enumerate(rows[row].tolist()) for byte in run for nibble in (byte & 15, byte >> 4)
                ])  # fmt: skip
                linear = "down_proj" if name == "down_proj" else ("gate_proj", "up_proj")[row % 2]
                place = row if name == "down_proj" else row // 2
                local = f"model.layers.1.mlp.experts.{expert}.{linear}"
                assert torch.equal(model.dense(local)[place], found), (local, place)
                exact = meant[f"{local}.weight"][place].float()
                assert float((found - exact).abs().max()) < 0.3 * float(exact.abs().max())


def test_experts_in_mxfp4_compute_packed_what_transformers_computes(published: Path) -> None:
    sample = tiny.samples().items[0].ids[None]
    with torch.no_grad():
        ours, theirs = runtime.load(published).float()(input_ids=sample).logits, tiny.plain(published)(input_ids=sample).logits
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 5e-4


@pytest.mark.parametrize(
    ("kind", "passes", "message"),
    [
        ("qwen3_moe", MXFP4["passes"], r"no engine looks for MXFP4 in a qwen3_moe under these names"),
        ("gpt_oss", [{"rtn": {"format": "mxfp4"}}], r"mxfp4 holds quantised experts alone, not model\.layers\.0\.self_attn\.k_proj"),
        ("gpt_oss", [{"rtn": RTN["rtn"] | {"include": ["*.experts.*"]}}], r"mxfp4 holds nothing in int"),
        ("gpt_oss", [{"rtn": {"format": "mxfp4", "include": ["*.1.mlp.experts.*"]}}], r"layers\.0\.mlp\.experts\.0\.down_proj is not quantised"),
    ],
)
def test_what_mxfp4_cannot_hold_is_refused(
    kind: str, passes: list[dict[str, Any]], message: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        compress(MXFP4 | {"passes": passes}, checkpoint(kind), tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gate_up_proj_blocks", lambda tensor: tensor[..., :8].contiguous(), r"is U8 \[4, 64, 2, 8\], where bytes \[experts, .*, 16\]"),
        ("gate_up_proj_blocks", lambda tensor: tensor[:, :, :1].contiguous(), r"is \[4, 64, 1, 16\], where inputs must be the 64 channels"),
        ("gate_up_proj_scales", lambda tensor: tensor[:, :63].contiguous(), r"is \[4, 63, 2\], where half of dimension 1 must be gates"),
        ("down_proj_scales", lambda tensor: tensor[:, :32].contiguous(), r"is \[4, 32, 1\], where outputs must be the 64 channels"),
        ("down_proj_scales", lambda tensor: tensor.short(), r"is I16 \[4, 64, 1\], where bytes"),
    ],
)
def test_damaged_experts_in_mxfp4_are_refused_by_name(
    name: str, change: Callable[[torch.Tensor], torch.Tensor], message: str, published: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(published, tmp_path / "model"))
    tensor = f"model.layers.1.mlp.experts.{name}"
    rewrite(folder, lambda tensors: tensors.update({tensor: change(tensors[tensor])}))
    with pytest.raises(InputError, match=rf"experts\.{name}: {message}"):
        Layout(Checkpoint(folder))
