"""Whole runs with every way of storing a weight and rounding an input: recipes that are refused, artifacts that transformers opens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from oracles import statistics as oracle
from test_run import QUICK, compress, weights

from compress import data, inspection, planning, recipe
from compress.checkpoint import Checkpoint
from compress.data import Tokenizer
from compress.errors import InputError
from compress.layout import Layout
from compress.model import Model
from compress.numerics.grid import Integer, search_scales
from compress.recipe import Evaluation

PASSES = ("rtn", "gptq", "autoround")
SCHEMES: list[dict[str, Any]] = [
    {"format": "fp8"},
    {"format": "fp8", "activations": "dynamic"},
    {"format": "fp8", "activations": "static"},
    {"format": "mxfp8"},
    {"format": "mxfp4"},
    {"format": "nvfp4"},
    {"bits": 8, "group_size": "channel", "activations": "dynamic"},
    {"bits": 8, "group_size": "channel", "activations": "static"},
    {"bits": 4, "group_size": 32, "activations": "dynamic"},
]


def recipe_of(name: str, options: dict[str, Any]) -> dict[str, Any]:
    more = {} if name == "rtn" else {"min_tokens": 0} | ({"steps": 2} if name == "autoround" else {})
    return QUICK | {"passes": [{name: options | more}], "verify": "full"}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (name, options)
        for name in ("rtn", "gptq", "autoround")
        for options in SCHEMES
        if name != "autoround" or options.get("activations") != "static"
    ],
    ids=str,
)
def test_every_scheme_makes_an_artifact_that_computes_the_same_in_plain_transformers(
    name: str, options: dict[str, Any], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    result = compress(recipe_of(name, options), checkpoint("llama"), tmp_path / "out")
    # Inputs near the middle between two points fall to one side or the other by the last bit of a sum.
    assert result["verification"]["logits_max_difference"] < 1e-3
    assert result["verification"]["weights_unpacked_by_compressed_tensors"] == 14


@pytest.mark.parametrize("activations", ["none", "dynamic"])
def test_blocks_of_fp8_make_an_artifact_that_computes_the_same_in_plain_transformers(activations: str, tmp_path: Path) -> None:
    plain = recipe_of("rtn", {"format": "fp8-block", "activations": activations})
    result = compress(plain, "demo:dense", tmp_path / "out")
    assert result["verification"]["logits_max_difference"] < 8e-3
    assert result["size"]["bits_per_weight"] == 8 + 16 / 128**2


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "llava"])
@pytest.mark.parametrize("format_", ["fp8", "mxfp4", "nvfp4"])
def test_small_floats_serve_experts_and_images(kind: str, format_: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    result = compress(recipe_of("gptq", {"format": format_}) | {"verify": "streamed"}, checkpoint(kind, torch.bfloat16), tmp_path / "out")
    assert result["accepted"]


def test_experts_that_transformers_misreads_are_compared_without_it(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    result = compress(recipe_of("rtn", {"format": "nvfp4"}) | {"verify": "auto"}, checkpoint("qwen3_moe"), tmp_path / "out")
    assert result["verification"]["mode"] == "streamed"
    assert result["engines"]["transformers"] == "refuses experts in nvfp4: unpacks them wrongly or not at all"


@pytest.mark.parametrize("options", SCHEMES, ids=str)
def test_a_plan_says_the_bytes_that_a_run_writes(options: dict[str, Any], checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    chosen = recipe.validate(recipe_of("gptq", options), "r.yaml")
    layout = Layout(Checkpoint(checkpoint("qwen2", torch.bfloat16)))
    planned = planning.plan(chosen, layout, recipe.check(chosen, layout, "r.yaml"))
    result = compress(recipe_of("gptq", options) | {"verify": "streamed"}, checkpoint("qwen2", torch.bfloat16), tmp_path / "out")
    assert planned["size"]["after_bytes"] == result["size"]["after_bytes"]
    assert planned["size"]["bits_per_weight"] == pytest.approx(result["size"]["bits_per_weight"])


def test_inputs_are_rounded_in_the_model_and_in_what_is_read_back(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from compress.evaluate import measure

    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat and looked at the dog. " * 40)
    evaluation = {"data": str(text), "context": 32, "windows": 4}
    losses = {}
    for activations in ("none", "dynamic"):
        out = tmp_path / activations
        plain = recipe_of("rtn", {"bits": 8, "group_size": "channel", "activations": activations}) | {"evaluate": evaluation}
        figures = compress(plain, checkpoint("llama"), out)["evaluation"]
        layout = Layout(Checkpoint(out))
        again = measure.alone(layout, Evaluation.model_validate(evaluation), Tokenizer(out), tiny.Silent())
        assert again["perplexity"] == pytest.approx(figures["compressed"]["perplexity"], rel=1e-6)
        losses[activations] = again["perplexity"]
    assert losses["none"] != losses["dynamic"]


def test_fixed_scales_of_inputs_cover_the_largest_that_was_seen(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(recipe_of("gptq", SCHEMES[2]), checkpoint("llama"), tmp_path / "out")
    found = {name: float(tensor) for name, tensor in weights(tmp_path / "out").items() if name.endswith("input_scale")}
    assert len(found) == 14 and all(scale > 0 for scale in found.values())
    block = "model.layers.0.self_attn."
    assert found[f"{block}q_proj.input_scale"] == found[f"{block}k_proj.input_scale"]
    assert Model(Layout(Checkpoint(tmp_path / "out"))).inputs(f"{block}q_proj") is not None


def test_errors_are_weighted_by_the_mean_square_of_what_is_read(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("llama")
    options = {"bits": 3, "group_size": 32, "scales": "imatrix"}
    plain = QUICK | {"passes": [{"rtn": options}], "calibration": {"samples": 4, "length": 48}}
    compress(plain, folder, tmp_path / "out")
    samples = data.calibration("demo:text", 4, 48, 0, Tokenizer(folder))
    read = oracle.inputs_of_linears(tiny.plain(folder), [batch.inputs for batch in samples.batches()])
    name = "model.layers.0.self_attn.v_proj"  # of the first group, before anything was rounded
    importance = oracle.second_moment(read[name]).diagonal().float()
    weight = Checkpoint(folder).read(f"{name}.weight").float()
    scales = search_scales(weight, Integer(3, True), 32, torch.float32, importance)
    found = weights(tmp_path / "out")
    assert torch.allclose(found[f"{name}.weight_scale"], scales.scale)
    assert not torch.allclose(scales.scale, search_scales(weight, Integer(3, True), 32, torch.float32).scale)


def test_an_expert_that_saw_nothing_cannot_be_weighted(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    plain = QUICK | {"passes": [{"rtn": {"bits": 4, "group_size": 32, "scales": "imatrix"}}], "calibration": {"samples": 1, "length": 2}}
    with pytest.raises(InputError, match="saw no calibration token"):
        compress(plain, checkpoint("qwen3_moe"), tmp_path / "out")


def test_fused_linears_share_the_global_scale_of_nvfp4(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("rtn", "gptq", "autoround"):
        out = tmp_path / name
        compress(recipe_of(name, {"format": "nvfp4"}), checkpoint("llama"), out)
        found = {tensor: float(value) for tensor, value in weights(out).items() if tensor.endswith("global_scale")}
        fused = [[found[f"model.layers.1.{linear}.weight_global_scale"] for linear in linears] for linears in (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))]  # fmt: skip
        assert all(len(set(values)) == 1 for values in fused)


@pytest.mark.parametrize(
    ("options", "became"),
    [
        ({"format": "nvfp4"}, "nvfp4, group 16"),
        ({"format": "mxfp8"}, "mxfp8, group 32"),
        ({"format": "fp8"}, "fp8, group 64"),
        (SCHEMES[6], "int8, group 64, symmetric, F32 scales"),
    ],
)
def test_inspect_says_what_a_weight_became(options: dict[str, Any], became: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(recipe_of("rtn", options), checkpoint("llama"), tmp_path / "out")
    found = {item["name"]: item for item in inspection.inspect(tmp_path / "out")["tensors"]}
    assert found["model.layers.0.self_attn.q_proj"]["became"] == became and found["model.layers.0.self_attn.q_proj"]["shape"] == [64, 64]


def test_two_formats_stand_in_one_artifact(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    steps = [{"rtn": {"format": "mxfp4", "include": ["*.mlp.*"]}}, {"rtn": {"format": "fp8", "include": ["*.self_attn.*"]}}]
    compress(QUICK | {"passes": steps, "verify": "full"}, checkpoint("llama"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert {group["format"] for group in config["config_groups"].values()} == {"mxfp4-pack-quantized", "float-quantized"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "mxfp4", "bits": 3}, "format mxfp4 fixes bits at 4, but bits is 3"),
        ({"format": "nvfp4", "group_size": 32}, "format nvfp4 fixes group_size at 16, but group_size is 32"),
        ({"format": "fp8", "symmetric": False}, "format fp8 fixes symmetric at True, but symmetric is False"),
        ({"format": "fp8-block", "scales": "mse"}, "format fp8-block fixes scales at minmax, but scales is 'mse'"),
        ({"format": "fp9"}, "input should be 'int'"),
        ({"format": ["fp8"]}, "input should be 'int'"),
    ],
)
def test_a_format_that_fixes_an_option_refuses_another(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipe.validate({"passes": [{"rtn": options}]}, "r.yaml")


@pytest.mark.parametrize(
    ("kind", "name", "options", "message"),
    [
        ("llama", "rtn", {"format": "mxfp4", "activations": "dynamic"}, "mxfp4 is for weights only here"),
        ("llama", "rtn", {"bits": 8, "symmetric": False, "group_size": 32, "activations": "dynamic"}, "asymmetric"),
        ("qwen3_moe", "rtn", {"format": "fp8", "activations": "dynamic"}, "inputs of experts"),
        ("llama", "rtn", {"format": "mxfp4", "indivisible": "channel"}, "no scale per output to fall back to"),
        ("llama", "rtn", {"format": "fp8-block"}, "128 does not divide the width 64"),
        ("llama", "autoround", {"format": "fp8", "activations": "static"}, "does not measure inputs"),
    ],
)
def test_what_no_engine_or_pass_can_do_is_refused_before_weights_load(
    kind: str, name: str, options: dict[str, Any], message: str, checkpoint: Callable[..., Path]
) -> None:
    chosen = recipe.validate({"passes": [{name: options}]}, "r.yaml")
    with pytest.raises(InputError, match=message):
        recipe.check(chosen, Layout(Checkpoint(checkpoint(kind))), "r.yaml")
