"""FP8 scales of the KV cache: what is measured, what attention then reads, and what whole runs make of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import cache as oracle
from safetensors.torch import load_file, save_file
from test_run import QUICK, compress, weights
from torch import Tensor

from compress import data, planning, recipe
from compress.calibrate import Workspace
from compress.checkpoint import Checkpoint
from compress.errors import InputError
from compress.evaluate.scoring import last_hidden
from compress.layout import Layout
from compress.model import Model
from compress.numerics.cache import SMALLEST_SCALE, as_cached, scale_for
from compress.numerics.grid import E4M3_MAX
from compress.passes.kv_quant import Pass

CASES = [("llama", "tensor"), ("llama", "head"), ("qwen2-sliding", "head"), ("qwen3", "tensor"), ("mistral", "tensor"), ("mixtral", "head")]
Scales = dict[int, tuple[Tensor, Tensor]]


def calibrated(folder: Path, work: Path, samples: data.Samples, **options: object) -> tuple[Model, Scales]:
    """The model with the scales that the pass found, and these scales by block."""
    model = Model(Layout(Checkpoint(folder)))
    work.mkdir()
    workspace = Workspace(work, tiny.Silent())
    Pass.model_validate(options).run(model, samples, workspace)
    for block in model.blocks:
        model.adopt(workspace.block_file(block.index))
    found = {block.index: model.cache_scales(block) for block in model.blocks}
    return model, {index: scales for index, scales in found.items() if scales}


# Numbers ----------------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-2000, 2000, width=32), min_size=1, max_size=20), st.sampled_from([1.0, 0.25, 3.0, 0.0078125]))
def test_what_is_read_back_is_the_nearest_number_of_e4m3(values: list[float], scale: float) -> None:
    found = as_cached(torch.tensor(values), torch.tensor([scale])).tolist()
    assert found == pytest.approx([oracle.rounded(value, scale) for value in values], rel=1e-6)


def test_numbers_of_e4m3_stay_as_they_are_and_larger_ones_saturate() -> None:
    numbers = torch.tensor(oracle.e4m3_numbers())
    assert torch.equal(as_cached(numbers, torch.ones(1)), numbers)
    assert as_cached(torch.tensor([1e30, -449.0]), torch.ones(1)).tolist() == [E4M3_MAX, -E4M3_MAX]


@given(st.floats(0, 2.0**100, width=32))
def test_a_scale_cuts_nothing_off_and_is_the_same_number_in_bfloat16(largest: float) -> None:
    scale = scale_for(torch.tensor([largest]))
    below = (scale.view(torch.int32) - 0x10000).view(torch.float32)
    assert torch.equal(scale.bfloat16().float(), scale) and float(scale) * E4M3_MAX >= largest
    assert float(below.double()) * E4M3_MAX < largest or float(scale) == SMALLEST_SCALE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_is_read_back_keeps_its_dtype_and_is_within_a_sixteenth(dtype: torch.dtype) -> None:
    states = torch.randn(2, 3, 5, 8).to(dtype)
    scale = scale_for(states.abs().amax((0, 2, 3))).view(3, 1, 1)
    back = as_cached(states, scale)
    assert back.dtype == dtype and torch.allclose(back.float(), states.float(), rtol=2.0**-4 + 2.0**-7, atol=float(scale.max()) * 2.0**-9)


# What is measured -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "granularity"), CASES)
def test_scales_reach_as_far_as_what_caches_of_plain_transformers_are_given(
    kind: str, granularity: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    samples, headroom = tiny.samples((9, 9, 12)), 1.5
    _, scales = calibrated(checkpoint(kind), tmp_path / "work", samples, granularity=granularity, headroom=headroom)
    plain = tiny.plain(checkpoint(kind))
    for block, found in scales.items():
        before = {index: each for index, each in scales.items() if index < block}
        seen = [oracle.given(plain, item.ids[None], before)[1][block] for item in samples.items]
        for side in (0, 1):
            by_head = torch.stack([states[side].abs().amax((0, 2, 3)) for states in seen]).amax(0)
            largest = by_head.view(-1, 1, 1) if granularity == "head" else by_head.amax().view(1)
            assert found[side].shape == largest.shape
            assert torch.allclose(found[side], largest * headroom / E4M3_MAX, rtol=2.0**-7)
            assert bool((found[side] * E4M3_MAX >= largest * headroom * (1 - 1e-5)).all())


@pytest.mark.parametrize("per_batch", [1, 30])
def test_scales_do_not_depend_on_the_batch(per_batch: int, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole = calibrated(checkpoint("llama"), tmp_path / "whole", tiny.samples())
    monkeypatch.setattr(data, "TOKENS_PER_BATCH", per_batch)
    _, parts = calibrated(checkpoint("llama"), tmp_path / "parts", tiny.samples())
    assert all(torch.equal(mine, theirs) for block in whole for mine, theirs in zip(whole[block], parts[block], strict=True))


def test_keys_that_are_not_finite_are_refused_by_name(copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy()
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if (name := "model.layers.1.self_attn.v_proj.weight") in tensors:
            tensors[name] *= 1e38
            save_file(tensors, path, {"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1: keys or values are not finite"):
        calibrated(folder, tmp_path / "work", tiny.samples())


# What attention reads ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "granularity"), CASES)
def test_logits_equal_those_of_plain_transformers_whose_cache_rounds(
    kind: str, granularity: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    samples = tiny.samples((12,))
    model, scales = calibrated(checkpoint(kind), tmp_path / "work", samples, granularity=granularity)
    ours = model.logits(last_hidden(model, samples)[0])
    plain = tiny.plain(checkpoint(kind))
    meant, exact = (oracle.given(plain, samples.items[0].ids[None], each)[0] for each in (scales, {}))
    assert float((ours - meant).abs().max()) < 1e-4 * float(meant.abs().max()) < 1e-1 * float((meant - exact).abs().max())


# Whole runs -------------------------------------------------------------------------------------------------------------------------


def recipe_of(*steps: dict[str, Any]) -> dict[str, Any]:
    return QUICK | {"passes": list(steps), "verify": "full"}


@pytest.mark.parametrize("granularity", ["tensor", "head"])
@pytest.mark.parametrize("kind", ["llama", "qwen2-sliding", "qwen3_moe", "llava"])
def test_plain_transformers_computes_with_the_scales_of_the_artifact(
    kind: str, granularity: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    steps = {"rtn": {"group_size": 32}}, {"kv_quant": {"granularity": granularity}}
    result = compress(recipe_of(*steps), checkpoint(kind, torch.bfloat16), tmp_path / "out")
    assert result["verification"]["logits_max_difference"] < 1e-5 and "kv_cache" not in result["verification"]
    stored = {name: tensor for name, tensor in weights(tmp_path / "out").items() if name.endswith(("k_scale", "v_scale"))}
    shape = (1,) if granularity == "tensor" else (2, 1, 1)
    assert len(stored) == 4 and all(tensor.dtype == torch.float32 and tensor.shape == shape for tensor in stored.values())
    assert declared(tmp_path / "out")["kv_cache_scheme"]["strategy"] == {"tensor": "tensor", "head": "attn_head"}[granularity]


def test_a_cache_beside_experts_is_compared_in_one_order_of_sums(tmp_path: Path) -> None:
    """Experts computed together add up otherwise: in a bit, of which a rounded cache made .8 % of the largest logit."""
    result = compress(recipe_of({"rtn": {"bits": 4, "group_size": 128}}, {"kv_quant": {}}), "demo:moe", tmp_path / "out")
    assert result["verification"]["logits_max_difference"] < 1e-5


def declared(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def test_scales_alone_make_an_artifact_that_plain_transformers_opens(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    result = compress(recipe_of({"kv_quant": {}}), checkpoint("llama", torch.bfloat16), tmp_path / "out")
    assert result["verification"]["logits_max_difference"] < 1e-5 and declared(tmp_path / "out")["config_groups"] == {}
    source = {name: tensor for path in checkpoint("llama", torch.bfloat16).glob("*.safetensors") for name, tensor in load_file(path).items()}
    written = weights(tmp_path / "out")
    assert all(torch.equal(written.pop(name), tensor) for name, tensor in source.items()) and len(written) == 4


def test_a_cache_that_transformers_rounds_otherwise_is_never_handed_over(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress import cache

    monkeypatch.setattr(cache, "as_cached", lambda states, scale: states)
    with pytest.raises(InputError, match="transformers computes other logits than meant"):
        compress(recipe_of({"kv_quant": {}}), checkpoint("llama"), tmp_path / "out")


def test_where_transformers_ignores_the_scales_it_is_said_so(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    steps = {"rtn": {"group_size": 32, "symmetric": False}}, {"kv_quant": {}}
    result = compress(recipe_of(*steps), checkpoint("llama"), tmp_path / "out")
    assert result["verification"]["kv_cache"].startswith("ignored by transformers")
    assert result["engines"]["transformers"].endswith("ignores the scales of the cache")


def test_what_the_artifact_loses_by_its_cache_is_measured(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    measured = {"evaluate": {"context": 64, "windows": 4}, "calibration": {"samples": 16, "length": 128}}
    result = compress(recipe_of({"kv_quant": {}}) | measured, "demo:dense", tmp_path / "out")
    lost = result["evaluation"]["figures"]
    assert 1e-5 < lost["kl"] < 5e-3 and abs(lost["perplexity_ratio"] - 1) < 5e-3
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Keys and values cached in FP8" in page and "Relative error of cached keys and values" in page


def test_a_plan_tells_the_size_and_what_each_engine_makes_of_the_cache(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    plain = recipe_of({"rtn": {"group_size": 32}}, {"kv_quant": {"granularity": "head"}})
    layout, checked = Layout(Checkpoint(checkpoint("llama"))), recipe.validate(plain, "r")
    told = planning.plan(checked, layout, recipe.check(checked, layout, "r"))
    result = compress(plain, checkpoint("llama"), tmp_path / "out")
    assert told["size"]["after_bytes"] == result["size"]["after_bytes"] and told["engines"] == result["engines"]
    assert "ignores" in told["engines"]["SGLang"] and "FP8 cache, GPU only" in told["engines"]["vLLM"]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([{"kv_quant": {}}, {"rtn": {}}], "rtn belongs to stage quantize, but comes after a pass of stage cache"),
        ([{"kv_quant": {}}, {"kv_quant": {"granularity": "head"}}], r"passes\[1\]: the cache is already taken by passes\[0\]"),
        ([{"kv_quant": {"headroom": 0.5}}], "headroom: input should be greater than or equal to 1"),
        ([{"kv_quant": {"format": "int8"}}], "format: input should be 'fp8'"),
    ],
)
def test_what_makes_no_sense_is_refused(steps: list[dict[str, Any]], message: str, checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=message):
        recipe.check(recipe.validate(recipe_of(*steps), "r"), Layout(Checkpoint(checkpoint("llama"))), "r")


@pytest.fixture(scope="module")
def artifact(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kv") / "out"
    compress(recipe_of({"kv_quant": {}}) | {"verify": "streamed"}, checkpoint("llama"), out)
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.layers.1.self_attn.v_scale"), r"layers\.1\.self_attn\.v_scale: is missing from the checkpoint, though"),
        (
            lambda tensors: tensors.update({"model.layers.0.self_attn.k_scale": torch.ones(3, 1, 1)}),
            r"k_scale: is F32 \[3, 1, 1\], which is no scale",
        ),
    ],
)
def test_scales_that_are_missing_or_of_another_shape_are_refused(
    change: Callable[[dict[str, Tensor]], object], message: str, artifact: Path, tmp_path: Path
) -> None:
    tensors = weights(artifact)
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((artifact / "config.json").read_bytes())
    with pytest.raises(InputError, match=message):
        Model(Layout(Checkpoint(tmp_path)))


def test_scales_without_a_scheme_are_refused(artifact: Path, tmp_path: Path) -> None:
    config = json.loads((artifact / "config.json").read_text())
    config.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights(artifact), tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="k_scale: is not accounted for"):
        Model(Layout(Checkpoint(tmp_path)))
