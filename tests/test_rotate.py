"""Rotation against explicit matrices, and that no architecture computes anything else for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_smooth import QUICK, plant_outliers, probes, run
from torch import Tensor

import compress.model
from compress import demo
from compress.arch import llava
from compress.calibrate import Workspace
from compress.checkpoint import Checkpoint
from compress.errors import InputError
from compress.layout import Layout
from compress.model import Model
from compress.numerics.rotation import Rotation, paley
from compress.passes import rotate, smooth

KINDS = tuple(kind for kind in tiny.KINDS if kind != "qwen2-sliding")
GRID = {"bits": 4, "group_size": 32}


def matrix(size: int, seed: int = 0) -> Tensor:
    return Rotation(size, seed).columns(torch.eye(size, dtype=torch.float64))


# Matrices ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 12, 16, 20, 28, 36, 64, 96, 128, 172, 768, 896, 1152])
def test_rotations_are_orthogonal(size: int) -> None:
    turned = matrix(size)
    assert float((turned @ turned.T - torch.eye(size)).abs().max()) < 1e-12


@pytest.mark.parametrize("size", [2, 12, 20, 28, 36, 56, 64, 96, 768, 896, 1152, 1536])
def test_every_channel_is_spread_over_all_where_a_hadamard_matrix_is_known(size: int) -> None:
    assert torch.allclose(matrix(size).abs(), torch.full((size, size), size**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("size", [688, 172, 34])
def test_other_sizes_are_turned_in_blocks(size: int) -> None:
    rotation = Rotation(size, 0)
    assert rotation.blocks == size // (size & -size) and str(rotation) == f"{size} channels in {rotation.blocks} blocks"
    assert int((matrix(size) != 0).sum(0).max()) == size & -size


@pytest.mark.parametrize("size", [4096, 5120, 3584, 2560, 8192, 7168, 6144, 5376, 18432])
def test_sizes_of_real_models_are_turned_whole(size: int) -> None:
    assert Rotation(size, 0).blocks == 1


@pytest.mark.parametrize("order", range(4, 130, 4))
def test_paley_gives_hadamard_matrices_or_nothing(order: int) -> None:
    found = paley(order)
    known = {4, 8, 12, 20, 24, 28, 32, 36, 44, 48, 60, 68, 72, 76, 80, 84, 104, 108, 124, 128}  # over prime fields, not over powers of primes
    assert (found is not None) == (order in known)
    if found is not None:
        assert torch.equal(found.abs(), torch.ones(order, order)) and torch.equal(found @ found.T, order * torch.eye(order, dtype=torch.float64))


def test_columns_and_rows_are_products_with_the_matrix() -> None:
    rotation, explicit, value = Rotation(24, 5), matrix(24, 5), torch.randn(7, 24, dtype=torch.float64)
    assert torch.allclose(rotation.columns(value), value @ explicit) and torch.allclose(rotation.rows(value.T), explicit.T @ value.T)


def test_a_seed_decides_the_matrix() -> None:
    assert torch.equal(matrix(32, 1), matrix(32, 1)) and not torch.equal(matrix(32, 1), matrix(32, 2))


# The same function ------------------------------------------------------------------------------------------------------------------


def turned(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], None] = lambda tensors: None) -> dict[str, Tensor]:
    """Write the float64 checkpoint with everything turned, in float64 throughout."""
    layout, tensors = Layout(Checkpoint(folder)), tiny.weights(folder)
    change(tensors)
    tied = bool(layout.checkpoint.config.get("tie_word_embeddings"))
    stream = Rotation(64, 0)
    tensors |= rotate.turn_outside(layout.arch.outside, tied, set(tensors), tensors.__getitem__, stream)
    for block in layout.blocks:
        rotate.turn_block(block, tensors.__getitem__, tensors.__setitem__, stream, Rotation(16, block.index))
    for name in ("config.json", *tiny.TOKENIZER):
        (target / name).write_bytes((folder / name).read_bytes())
    (target / "config.json").write_text(json.dumps(layout.checkpoint.config | {"tie_word_embeddings": False}))
    tiny.write(tensors, target)
    return tensors


@torch.no_grad()
def logits(folder: Path) -> list[Tensor]:
    batches = [batch.inputs for batch in tiny.samples(image="llava" in (folder / "config.json").read_text()).batches()]
    model = tiny.plain(folder, torch.float64)
    return [model(**{name: value.double() if value.is_floating_point() else value for name, value in batch.items()}).logits for batch in batches]


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((before - after).abs().max() / before.abs().max()) for before, after in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_turned_model_computes_the_same(kind: str, checkpoint: Callable[..., Path], tmp_path: Path, exact_norms: None) -> None:
    folder = checkpoint(kind, torch.float64)
    tensors = turned(folder, tmp_path)
    assert difference(logits(folder), logits(tmp_path)) < (1e-6 if kind in tiny.ROUTED else 1e-10)
    layout = Layout(Checkpoint(folder))
    norms = {edge.producer for block in layout.blocks for edge in block.edges if edge.producer.endswith("norm") and not edge.inner} | {
        layout.arch.outside.norm[0]
    }
    assert len(norms) == 5 and all(bool((tensors[f"{norm}.weight"] == 1).all()) for norm in norms)


def test_subtracting_means_from_the_embedding_shows(checkpoint: Callable[..., Path], tmp_path: Path, exact_norms: None) -> None:
    """What code made for LayerNorm does, and this must not do."""

    def centre(tensors: dict[str, Tensor]) -> None:
        tensors["model.embed_tokens.weight"] -= tensors["model.embed_tokens.weight"].mean(-1, keepdim=True)

    folder = checkpoint("llama", torch.float64)
    turned(folder, tmp_path, centre)
    one, other = logits(folder), logits(tmp_path)
    assert max(float((before - after).abs().max()) for before, after in zip(one, other, strict=True)) > 0.1


# The pass ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama-tied", "qwen2", "qwen3_moe-dense-first", "llava"])
def test_a_recipe_that_only_rotates_makes_a_dense_model_that_plain_transformers_opens(
    kind: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = checkpoint(kind)
    result = run([{"rotate": {}}], folder, tmp_path / "out")
    assert result["verification"]["mode"] == "full"
    assert difference(logits(folder), logits(tmp_path / "out")) < 1e-4
    actions = {item["name"]: item["action"] for item in result["ledger"]}
    before, after = tiny.weights(folder), tiny.weights(tmp_path / "out")
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before.get(name, torch.empty(0)))}
    assert changed and all(actions[name] in ("rotated", "added") for name in changed)


@pytest.mark.parametrize("options", [{"r1": False}, {"r2": False}])
def test_one_rotation_alone_computes_the_same(options: dict[str, Any], checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("llama-tied")
    run([{"rotate": options}], folder, tmp_path / "out")
    assert difference(logits(folder), logits(tmp_path / "out")) < 1e-4
    assert ("lm_head.weight" in tiny.weights(tmp_path / "out")) == options.get("r1", True)


def test_a_head_that_was_the_embedding_becomes_its_own(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("llama-tied", torch.bfloat16)
    result = run([{"rotate": {}}], folder, tmp_path / "out")
    written = Checkpoint(tmp_path / "out")
    assert written.config["tie_word_embeddings"] is False and written.tensors["lm_head.weight"].dtype == "BF16"
    opened = tiny.plain(tmp_path / "out")
    assert opened.lm_head.weight.data_ptr() != opened.model.embed_tokens.weight.data_ptr()
    assert [item["name"] for item in result["ledger"] if item["action"] == "added"] == ["lm_head.weight"]
    assert result["size"]["after_bytes"] == result["size"]["before_bytes"] + 4096 * 64 * 2


def test_the_config_of_a_nested_language_model_says_so_too(tmp_path: Path) -> None:
    model = Model(Layout(Checkpoint(demo.path("vlm"))))
    assert model.tied
    model.write_outside(tmp_path / "outside.safetensors", {"extra": torch.ones(1)}, {"tie_word_embeddings": False}, [])
    model.adopt(tmp_path / "outside.safetensors")
    assert not model.tied and model.config["tie_word_embeddings"] is model.config["text_config"]["tie_word_embeddings"] is False
    assert model.checkpoint.config["tie_word_embeddings"]


def test_rotated_weights_can_be_smoothed_and_rounded(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    result = run([{"rotate": {}}, {"smooth": {}}, {"gptq": GRID | {"min_tokens": 0}}], checkpoint("llama-tied", torch.bfloat16), tmp_path / "out")
    why = {item["name"]: (item["action"], item["why"]) for item in result["ledger"]}
    assert why["model.layers.0.mlp.up_proj.weight"] == ("quantized", "gptq: 4 bits, group 32, rotated by rotate and folded by smooth before")
    assert why["model.layers.0.input_layernorm.weight"][0] == "rotated and folded" and why["model.embed_tokens.weight"][0] == "rotated"


def test_the_same_seed_gives_the_same_bytes_and_another_others(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        run([{"rotate": {"seed": seed}}], checkpoint("llama"), tmp_path / name)
    one, two, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "other"))
    assert one == two != other


@pytest.mark.parametrize("writes", range(3))
def test_a_run_killed_between_any_two_files_continues_to_the_same_bytes(
    writes: int, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = compress.model.write_state, [writes]

    def write(*arguments: Any) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        real(*arguments)

    run([{"rotate": {}}], checkpoint("llama-tied"), tmp_path / "undisturbed")
    with monkeypatch.context() as patched:
        for module in (compress.block, compress.model):
            patched.setattr(module, "write_state", write)
        with pytest.raises(KeyboardInterrupt):
            run([{"rotate": {}}], checkpoint("llama-tied"), tmp_path / "out")
    run([{"rotate": {}}], checkpoint("llama-tied"), tmp_path / "out")
    for name in ("model.safetensors", "config.json", "manifest.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_planted_outliers_are_spread(tmp_path: Path) -> None:
    """What linears read of a norm, the largest channel over the median one."""
    planted, samples = plant_outliers(demo.path("dense"), tmp_path / "planted"), tiny.samples()
    model, ratios = Model(Layout(Checkpoint(planted))), []
    (tmp_path / "work").mkdir()
    workspace = Workspace(tmp_path / "work", tiny.Silent())
    rotate.Pass().run(model, samples, workspace)
    for file in (workspace.outside_file, *(workspace.block_file(layout.index) for layout in model.blocks)):
        model.adopt(file)
    for each in (Model(Layout(Checkpoint(planted))), model):
        found = []
        for probe in probes(each, tmp_path / str(len(ratios)), samples):
            smoothing = smooth.Smoothing(smooth.Pass(clip=False), each, probe, samples, None)
            largest = [smoothing.seen[f"{probe.block.layout.prefix}.{group}"].largest for group in ("qkv", "gate_up")]
            found += [float(channel.max() / channel.median()) for channel in largest]
        ratios.append(found)
    before, after = ratios
    assert min(before) > 20 and max(after) < 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r3": True}, "rotate: r3 and r4 are rotations at run time, which no engine that reads our exports does"),
        ({"r1": False, "r2": False}, "rotate: r1 and r2 are both false, so nothing would be done"),
        ({"r5": True}, "rotate.r5: unknown key|rotate: r5: unknown key"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        run([{"rotate": options}], checkpoint("llama"), tmp_path / "out")


def test_layer_norms_are_refused_by_name(copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy("llama")
    path = sorted(folder.glob("model-*"))[0]
    save_file(load_file(path) | {"model.layers.1.input_layernorm.bias": torch.zeros(64)}, path, {"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.1.input_layernorm.bias"] = path.name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"model\.layers\.1\.input_layernorm has a bias, so it is a LayerNorm"):
        run([{"rotate": {}}], folder, tmp_path / "out")


def test_a_tower_of_unknown_outlet_is_refused(checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint("llava")
    monkeypatch.setattr(llava, "ARCH", replace(llava.ARCH, outside=replace(llava.ARCH.outside, writers=())))
    with pytest.raises(InputError, match="does not say what writes images to the residual stream"):
        run([{"rotate": {}}], folder, tmp_path / "out")


def test_plan_counts_the_head_that_is_added(checkpoint: Callable[..., Path]) -> None:
    from compress import planning, recipe

    steps = recipe.validate(QUICK | {"passes": [{"rotate": {}}]}, "r.yaml")
    layout = Layout(Checkpoint(checkpoint("llama-tied")))
    assert planning.plan(steps, layout, {})["size"]["after_bytes"] == layout.checkpoint.nbytes + 4096 * 64 * 4
