"""The streaming model computes what plain transformers computes, and refuses what it does not understand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from compress.checkpoint import Checkpoint
from compress.errors import InputError
from compress.evaluate.scoring import last_hidden
from compress.layout import Layout
from compress.model import Model
from compress.numerics.grid import Integer, minmax_scales, quantized, round_to_nearest

KINDS = tiny.KINDS


def open_model(folder: Path) -> Model:
    return Model(Layout(Checkpoint(folder)))


@torch.no_grad()
def difference(folder: Path, image: bool) -> float:
    """Largest difference of logits from plain transformers in the same dtype, relative to the largest logit."""
    data = tiny.samples(image=image)
    model = open_model(folder)
    reference = tiny.plain(folder, model.dtype)
    worst = 0.0
    for batch, hidden in zip(data.batches(), last_hidden(model, data), strict=True):
        theirs = reference(**batch.inputs, use_cache=False).logits
        worst = max(worst, float((model.logits(hidden) - theirs).abs().max() / theirs.abs().max()))
    return worst


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_plain_transformers(kind: str, checkpoint: Callable[..., Path]) -> None:
    assert difference(checkpoint(kind), kind == "llava") < 1e-5


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "llava"])
def test_logits_of_a_bfloat16_checkpoint_are_close(kind: str, checkpoint: Callable[..., Path]) -> None:
    assert difference(checkpoint(kind, torch.bfloat16), kind == "llava") < 3e-2


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Apply `change` to all tensors and store them as one file."""
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def drop(tensors: dict[str, torch.Tensor], part: str) -> None:
    """Take out every tensor with `part` in its name."""
    for name in [name for name in tensors if part in name]:
        del tensors[name]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama", "model.layers.1.input_layernorm.weight"),
        ("llama", "model.layers.1.mlp.up_proj.weight"),
        ("qwen2", "model.layers.0.self_attn.q_proj.bias"),
        ("qwen3", "model.layers.0.self_attn.q_norm.weight"),
        ("qwen3_moe", "model.layers.0.mlp.gate.weight"),
        ("qwen3_moe", "model.layers.0.mlp.experts.3.down_proj.weight"),
    ],
)
def test_a_missing_tensor_is_refused_by_name(kind: str, name: str, copy: Callable[..., Path]) -> None:
    folder = copy(kind)
    rewrite(folder, lambda tensors: drop(tensors, name))
    with pytest.raises(InputError, match=name.replace(".", r"\.") + ".*missing"):
        open_model(folder)


def test_a_whole_missing_expert_is_refused_by_name(copy: Callable[..., Path]) -> None:
    folder = copy("mixtral")
    rewrite(folder, lambda tensors: drop(tensors, "layers.1.block_sparse_moe.experts.3."))
    with pytest.raises(InputError, match=r"layers\.1\.block_sparse_moe\.experts\.3.*missing"):
        open_model(folder)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama", "model.layers.1.self_attn.extra.weight"),
        ("llama", "model.layers.0.self_attn.q_proj.bias"),
        ("qwen3_moe", "model.layers.0.mlp.experts.8.down_proj.weight"),
    ],
)
def test_an_unknown_tensor_is_refused_by_name(kind: str, name: str, copy: Callable[..., Path]) -> None:
    folder = copy(kind)
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(64, 32)}))
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        open_model(folder)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.layers.0.input_layernorm.weight"])
def test_a_tensor_of_another_shape_than_the_config_says_is_refused_by_name(name: str, copy: Callable[..., Path]) -> None:
    folder = copy()

    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name][..., :1].contiguous()

    rewrite(folder, narrow)
    with pytest.raises(InputError, match=name.replace(".", r"\.") + ".*shape"):
        open_model(folder)


def test_a_config_that_transformers_refuses_is_refused_by_place(copy: Callable[..., Path]) -> None:
    folder = copy()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 7, "rms_norm_eps": "small"}))
    with pytest.raises(InputError, match=r"config\.json: transformers makes no model of it"):
        Model(Layout(Checkpoint(folder)))


@pytest.mark.parametrize("value", ["abc", -1, 0, 1.5, True])
def test_a_size_that_is_none_is_refused_by_name(value: object, copy: Callable[..., Path]) -> None:
    folder = copy()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": value}))
    with pytest.raises(InputError, match=r"config\.json: hidden_size: must be a positive number, got"):
        Layout(Checkpoint(folder))


def test_memory_of_a_block_is_freed_on_leaving(checkpoint: Callable[..., Path]) -> None:
    model = open_model(checkpoint("llama"))
    with model.block(0) as block:
        inside = {parameter.device.type for parameter in block.module.parameters()}
    assert (inside, {parameter.device.type for parameter in block.module.parameters()}) == ({"cpu"}, {"meta"})


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "mixtral"])
def test_a_quantized_block_computes_with_the_dequantised_weights_and_so_does_its_file(
    kind: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model, grid = open_model(checkpoint(kind)), Integer(4, True)
    linear = model.blocks[0].stages[-1].groups[-1].linears[0].name
    with model.block(0) as block:
        weight = block.weight(linear)
        scales = minmax_scales(weight, grid, 32, torch.float32)
        meant = quantized(round_to_nearest(weight, scales, grid), scales, grid, torch.float32)
        block.set_quantized(linear, meant, {})
        now = block._slots[f"{linear}.weight"].view(block.module).clone()
        block.save(tmp_path / "block.safetensors")
    model.adopt(tmp_path / "block.safetensors")
    assert torch.equal(now, meant.dequantize()) and torch.equal(model.dense(linear), meant.dequantize())


def test_only_the_named_expert_changes_when_one_is_quantised(checkpoint: Callable[..., Path]) -> None:
    model, grid = open_model(checkpoint("qwen3_moe")), Integer(2, True)
    with model.block(0) as block:
        before = block.experts.gate_up_proj.detach().clone()
        name = "model.layers.0.mlp.experts.5.up_proj"
        weight = block.weight(name)
        scales = minmax_scales(weight, grid, 32, torch.float32)
        block.set_quantized(name, quantized(round_to_nearest(weight, scales, grid), scales, grid, torch.float32), {})
        changed = (block.experts.gate_up_proj != before).any(-1).nonzero()
    assert changed[:, 0].unique().tolist() == [5] and int(changed[:, 1].min()) == 32
