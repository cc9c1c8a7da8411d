"""Finished artifacts in other layouts: the bytes as engines' documents have them, nothing lost unsaid, nothing written that no engine can read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import layouts as oracle
from safetensors.torch import load_file, save_file
from test_run import QUICK, compress
from torch import Tensor
from typer.testing import CliRunner

from compress import cli, declared, exporting, recipe
from compress.checkpoint import Checkpoint
from compress.errors import InputError
from compress.export import base
from compress.formats import awq, gptq, mlx
from compress.layout import Layout
from compress.model import Model
from compress.numerics.grid import Integer, Quantized

COPIES = ("gptq", "awq", "mlx")


def rounded(rows: int, columns: int, bits: int, symmetric: bool, group: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Quantized:
    generator = torch.Generator().manual_seed(seed)
    ends = -(1 << bits - 1), 1 << bits - 1
    codes = torch.randint(*ends, (rows, columns), generator=generator, dtype=torch.int8)
    scale = (torch.rand(rows, columns // group, generator=generator) - 0.5).to(dtype)
    zeros = None if symmetric else torch.randint(*ends, scale.shape, generator=generator, dtype=torch.int8)
    return Quantized(codes, scale, zeros, Integer(bits, symmetric))


def plain(*passes: dict[str, Any], export: tuple[str, ...] = ("compressed-tensors",)) -> dict[str, Any]:
    return QUICK | {"passes": list(passes) or [{"rtn": {"bits": 4, "group_size": 32}}], "export": list(export)}


def exported(artifact: Path, *targets: str, **options: Any) -> dict[str, dict[str, Any]]:
    results = exporting.export(artifact, exporting.folders(artifact, targets), tiny.Silent(), **options)
    return {result["target"]: result for result in results}


def refused(artifact: Path, *targets: str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        exporting.export(artifact, exporting.folders(artifact, targets), tiny.Silent(), **options)
    return "\n".join(map(str, caught.value.problems))


def test_mlx_is_told_in_the_older_keys_that_most_of_its_models_read_alone() -> None:
    """The base of rotation above all: without it mlx-lm takes one of its own."""
    from compress.export.mlx import _spelled_out

    plain = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "num_local_experts": 16, "quantization": {"bits": 4}}
    assert _spelled_out(plain) == plain | {"rope_theta": 5e5, "num_experts": 16}
    scaled = {"text_config": {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}}}
    older = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
    assert _spelled_out(scaled) == {"text_config": scaled["text_config"] | older}
    old = {"rope_theta": 1e4, "num_experts": 8, "rope_scaling": None}
    assert _spelled_out(old) == old


# Bytes ----------------------------------------------------------------------------------------------------------------------------------


@given(st.sampled_from([2, 3, 4, 8]), st.booleans(), st.sampled_from([32, 64]), st.integers(0, 100))
def test_gptq_is_read_by_hand_as_it_was_meant(bits: int, symmetric: bool, group: int, seed: int) -> None:
    weight = rounded(32, 64, bits, symmetric, group, seed, torch.float16)
    version = 1 if symmetric else 2
    parts = gptq.pack("x", weight, version)
    assert [parts[f"x.{part}"].dtype for part in ("qweight", "qzeros", "scales", "g_idx")] == [torch.int32, torch.int32, torch.float16, torch.int32]
    assert parts["x.qweight"].shape == (64 * bits // 32, 32) and parts["x.qzeros"].shape == (64 // group, 32 * bits // 32)
    by_hand = oracle.gptq(*(parts[f"x.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")), bits, version)
    assert torch.equal(torch.tensor(by_hand), weight.dequantize(torch.float32))
    assert torch.equal(gptq.unpack("x", parts, bits, version), weight.dequantize(torch.float32))


def test_symmetric_gptq_has_the_zero_points_that_everybody_writes() -> None:
    parts = gptq.pack("x", rounded(32, 32, 4, True, 32, 0), 1)
    assert {word & 0xFFFFFFFF for word in parts["x.qzeros"].flatten().tolist()} == {0x77777777}


@given(st.booleans(), st.sampled_from([8, 24, 48]), st.integers(1, 3), st.integers(0, 100))
def test_awq_is_read_by_hand_as_it_was_meant(symmetric: bool, columns: int, groups: int, seed: int) -> None:
    weight = rounded(16, columns * groups, 4, symmetric, columns, seed, torch.float16)
    parts = awq.pack("x", weight)
    assert parts["x.qweight"].shape == (columns * groups, 2) and parts["x.qzeros"].shape == (groups, 2)
    assert torch.equal(torch.tensor(oracle.awq(*(parts[f"x.{part}"] for part in ("qweight", "qzeros", "scales")))), weight.dequantize(torch.float32))
    assert torch.equal(awq.unpack("x", parts), weight.dequantize(torch.float32))


@given(st.sampled_from([2, 3, 4, 5, 6, 8]), st.sampled_from([(32, 32), (64, 32), (128, 128)]), st.integers(1, 5), st.integers(0, 100))
def test_mlx_is_read_by_hand_as_it_was_meant(bits: int, sizes: tuple[int, int], rows: int, seed: int) -> None:
    group, theirs = sizes
    weight = rounded(rows, 2 * group, bits, True, group, seed)
    parts = mlx.pack("x", weight, theirs)
    assert parts["x.weight"].dtype == torch.uint32 and parts["x.scales"].shape == (rows, 2 * group // theirs)
    by_hand = oracle.mlx(parts["x.weight"], parts["x.scales"], parts["x.biases"], bits, theirs)
    assert torch.equal(torch.tensor(by_hand), weight.dequantize(torch.float32))
    assert torch.equal(mlx.unpack("x", parts, bits, theirs), weight.dequantize(torch.float32))


def test_asymmetric_mlx_loses_what_its_bias_rounds_and_no_more() -> None:
    weight = rounded(16, 128, 4, False, 64, 0)
    parts = mlx.pack("x", weight, 64)
    off = (mlx.unpack("x", parts, 4, 64) - weight.dequantize(torch.float32)).abs().amax(1)
    assert float(off.max()) > 0 and bool((off <= 2.0**-8 * parts["x.biases"].float().abs().amax(1)).all())


# Folders --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "llama-bias", "qwen2", "qwen3", "qwen3_moe", "qwen3_moe-dense-first", "mixtral", "olmoe"])
def test_every_weight_comes_out_as_the_artifact_means_it(kind: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(plain(), checkpoint(kind, torch.bfloat16), tmp_path / "out")
    for target, result in exported(tmp_path / "out", *COPIES).items():
        assert result["losses"] == {} and result["exact"] > 10
        folder = Path(result["folder"])
        told = json.loads((folder / "export.json").read_text())
        assert told["target"] == target and told["of"].keys() == {"manifest.json", "config.json"}
        assert (folder / "tokenizer.json").read_bytes() == (tmp_path / "out" / "tokenizer.json").read_bytes()
        assert not (folder / "manifest.json").exists()
        config = json.loads((folder / "config.json").read_text())
        assert config["quantization_config"].get("quant_method", "mlx") == target


def test_scales_that_float16_cannot_hold_are_told_with_what_they_lose(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(plain(), checkpoint("llama", torch.float32), tmp_path / "out")
    result = exported(tmp_path / "out", "gptq")["gptq"]
    assert len(result["losses"]) == 14 and all(0 < error < 2.0**-20 for error in result["losses"].values())


@pytest.mark.parametrize(
    "options", [{"bits": 3}, {"bits": 2}, {"bits": 8}, {"bits": 4, "symmetric": False}, {"bits": 4, "group_size": "channel"}], ids=str
)
def test_gptq_and_mlx_hold_other_widths(options: dict[str, Any], checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(plain({"rtn": {"group_size": 32} | options}), checkpoint("llama", torch.bfloat16), tmp_path / "out")
    results = exported(tmp_path / "out", "gptq", "mlx")
    config = json.loads((Path(results["gptq"]["folder"]) / "quantize_config.json").read_text())
    assert config["bits"] == options["bits"] and config["group_size"] == (-1 if options.get("group_size") else 32)
    assert config["checkpoint_format"] == ("gptq" if options.get("symmetric", True) else "gptq_v2")
    assert results["gptq"]["losses"] == {}
    assert (results["mlx"]["losses"] == {}) == options.get("symmetric", True)


def test_linears_of_different_bits_are_named(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    steps = {"rtn": {"bits": 4, "group_size": 32, "include": ["*.mlp.*"]}}, {"rtn": {"bits": 8, "group_size": 32, "include": ["*.o_proj"]}}
    compress(plain(*steps), checkpoint("qwen3", torch.bfloat16), tmp_path / "out")
    results = exported(tmp_path / "out", "gptq", "mlx")
    dynamic = json.loads((Path(results["gptq"]["folder"]) / "config.json").read_text())["quantization_config"]["dynamic"]
    assert dynamic[r"+:^model\.layers\.0\.self_attn\.o_proj$"] == {"bits": 8, "group_size": 32}
    assert dynamic[r"-:^model\.layers\.1\.self_attn\.v_proj$"] == {}
    quantization = json.loads((Path(results["mlx"]["folder"]) / "config.json").read_text())["quantization"]
    assert quantization["bits"] == 4 and quantization["model.layers.1.self_attn.o_proj"]["bits"] == 8


def test_what_is_packed_with_its_places_can_be_had_unpacked(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    prune = {"prune_nm": {"pattern": "2:4", "method": "magnitude"}}
    compress(
        plain(prune, {"rtn": {"group_size": 32, "include": ["*.mlp.*"]}}, export=("nm-packed",)),
        checkpoint("llama", torch.bfloat16),
        tmp_path / "out",
    )
    results = exported(tmp_path / "out", "compressed-tensors", "gptq")
    assert results["gptq"]["losses"] == {}
    packed, opened = (Model(Layout(Checkpoint(folder))) for folder in (tmp_path / "out", Path(results["compressed-tensors"]["folder"])))
    assert not list(Path(results["compressed-tensors"]["folder"]).rglob(".*"))
    for linear in packed.layout.linears:
        assert torch.equal(packed.dense(linear), opened.dense(linear))


def test_an_fp8_cache_stays_with_the_layout_that_has_a_place_for_it(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(plain({"rtn": {"group_size": 32}}, {"kv_quant": {}}), checkpoint("llama", torch.bfloat16), tmp_path / "out")
    assert "gptq has no place for scales of an FP8 cache" in refused(tmp_path / "out", "gptq")
    result = exported(tmp_path / "out", "compressed-tensors")["compressed-tensors"]
    one, other = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", Path(result["folder"])))
    assert one == other and one["quantization_config"]["kv_cache_scheme"]["num_bits"] == 8


@pytest.mark.parametrize("target", COPIES)
def test_a_writer_that_is_wrong_is_found_out(target: str, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compress(plain(), checkpoint("llama", torch.bfloat16), tmp_path / "out")
    true = base.converted

    def wrong(model: Model, pack: Callable[[str], dict[str, Tensor]]) -> Any:
        return true(model, lambda linear: {name: tensor.roll(1, 0) if name.endswith("weight") else tensor for name, tensor in pack(linear).items()})

    monkeypatch.setattr(base, "converted", wrong)
    assert "reads back differently from what the artifact means" in refused(tmp_path / "out", target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


# What is refused ------------------------------------------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[list[dict[str, Any]], str, str]] = {
    "five bits": ([{"rtn": {"bits": 5, "group_size": 32}}], "gptq", "gptq holds 2, 3, 4, 8 bits, not 5"),
    "three bits": ([{"rtn": {"bits": 3, "group_size": 32}}], "awq", "awq holds 4 bits, not 3"),
    "rounded inputs": ([{"rtn": {"bits": 8, "group_size": "channel", "activations": "dynamic"}}], "gptq", "no place for rounded inputs"),
    "floats": ([{"rtn": {"format": "fp8"}}], "mlx", "mlx holds integers, not fp8"),
    "odd groups": ([{"rtn": {"bits": 4, "group_size": 16}}], "mlx", "mlx knows groups of 32, 64, 128 and their multiples, not [16]"),
    "mixed groups": (
        [{"rtn": {"group_size": 32, "include": ["*.mlp.*"]}}, {"rtn": {"group_size": 16, "include": ["*.self_attn.*"]}}],
        "awq",
        "awq has one group size for all linears, not [16, 32]",
    ),
    "no codes": ([{"prune_nm": {"pattern": "2:4", "method": "magnitude"}}], "awq", "no linear is quantised"),
    "latents": ([{"rtn": {"group_size": 32}}, {"kv_shrink": {"keep": 0.5, "window": 8}}], "awq", "awq has no place for a cache of latents"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_layout_cannot_hold_is_refused_before_weights_load(case: str, checkpoint: Callable[..., Path]) -> None:
    passes, target, message = REFUSED[case]
    with pytest.raises(InputError) as caught:
        recipe.check(
            recipe.validate(plain(*passes, export=("compressed-tensors", target)), "r.yaml"), Layout(Checkpoint(checkpoint("llama"))), "r.yaml"
        )
    assert any(message in str(problem) for problem in caught.value.problems)


def test_an_artifact_is_refused_what_its_recipe_would_have_been(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(plain({"rtn": {"format": "fp8"}}), checkpoint("llama"), tmp_path / "out")
    told = refused(tmp_path / "out", "gptq", "awq", "nope")
    assert "gptq holds integers, not fp8" in told and "awq holds integers, not fp8" in told and "no export is called 'nope'" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_codes_that_would_not_fill_their_words_are_named(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(plain({"rtn": {"group_size": 16}}), checkpoint("llama-688"), tmp_path / "out")
    told = refused(tmp_path / "out", "gptq", "mlx")  # 688 outputs fill words of four bits by eight, but not by 32
    assert "(and 5 more) is 688 x 64; gptq takes multiples of 32 x 32" in told
    assert "(and 1 more) is 64 x 688; mlx takes multiples of 1 x 32" in told
    assert exported(tmp_path / "out", "awq")["awq"]["losses"]


def test_schemes_are_read_off_what_a_run_wrote(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    steps = [
        {"rtn": {"bits": 3, "group_size": 32, "symmetric": False, "include": ["*.q_proj", "*.k_proj", "*.v_proj"]}},
        {"rtn": {"format": "fp8", "include": ["*.o_proj"], "activations": "static"}},
        {"rtn": {"bits": 8, "group_size": "channel", "activations": "dynamic", "include": ["*.down_proj"]}},
    ]
    folder, chosen = checkpoint("llama"), recipe.validate(plain(*steps), "r.yaml")
    try:
        meant = recipe.check(chosen, Layout(Checkpoint(folder)), "r.yaml")
    except InputError:
        steps[0]["rtn"]["symmetric"] = True  # asymmetric beside others is refused by transformers
        chosen = recipe.validate(plain(*steps), "r.yaml")
        meant = recipe.check(chosen, Layout(Checkpoint(folder)), "r.yaml")
    compress(plain(*steps), folder, tmp_path / "out")
    assert declared.schemes(Layout(Checkpoint(tmp_path / "out"))) == {name: scheme for name, (_, scheme) in meant.items()}


# Artifacts as they are found ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def artifact(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    compress(plain(), checkpoint("llama", torch.bfloat16), tmp_path / "out")
    return tmp_path / "out"


def test_changed_weights_are_found_out_by_the_manifest(artifact: Path) -> None:
    path = artifact / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight_scale"] *= 1.05
    save_file(tensors, path, metadata={"format": "pt"})
    assert "model.safetensors: is not the file that manifest.json tells of" in refused(artifact, "gptq")


def test_weights_that_are_no_numbers_are_the_fault_of_the_artifact(artifact: Path) -> None:
    path = artifact / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight_scale"][3] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    (artifact / "manifest.json").unlink()
    assert "model.layers.0.mlp.up_proj.weight: holds NaN or infinity; the artifact is damaged" in refused(artifact, "gptq")


def test_an_export_is_no_artifact_but_in_the_layout_of_one(artifact: Path) -> None:
    told = exported(artifact, "mlx", "compressed-tensors")
    assert "is itself an export, to mlx; give the artifact" in refused(Path(told["mlx"]["folder"]), "gptq")
    assert exported(Path(told["compressed-tensors"]["folder"]), "gptq")["gptq"]["losses"] == {}


def test_an_artifact_whose_gates_failed_is_exported_on_demand_only(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    failing = plain(export=("compressed-tensors", "gptq")) | {"gates": {"bits_per_weight": {"max": 1.0}}}
    result = compress(failing, checkpoint("llama", torch.bfloat16), tmp_path / "out")
    assert not result["accepted"] and result["exports"] == [] and not (tmp_path / "out-gptq").exists()
    assert "its gates failed" in refused(tmp_path / "out", "gptq")
    assert exported(tmp_path / "out", "gptq", rejected=True)["gptq"]["losses"] == {}


def test_a_recipe_makes_copies_beside_its_artifact(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    chosen = plain(export=("compressed-tensors", "gptq", "mlx"))
    result = compress(chosen, checkpoint("llama", torch.bfloat16), tmp_path / "out")
    assert [made["target"] for made in result["exports"]] == ["gptq", "mlx"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-gptq", "out-mlx"]
    with pytest.raises(InputError, match="exists already"):
        compress(chosen, checkpoint("llama", torch.bfloat16), tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(InputError, match="out-gptq: exists already"):
        compress(chosen, checkpoint("llama", torch.bfloat16), tmp_path / "out")
    compress(chosen, checkpoint("llama", torch.bfloat16), tmp_path / "out", overwrite=True)


@pytest.mark.parametrize(
    ("export", "message"),
    [
        (["gptq"], "gptq comes first, but compress cannot read it back"),
        (["compressed-tensors", "nm-packed"], "nm-packed can only come first"),
        (["compressed-tensors", "gptq", "gptq"], "names gptq twice"),
    ],
    ids=str,
)
def test_the_order_of_exports_is_checked(export: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipe.validate(plain() | {"export": export}, "r.yaml")


def test_the_command_line_writes_tells_and_refuses(artifact: Path, tmp_path: Path) -> None:
    def ran(*arguments: str) -> Any:
        return CliRunner().invoke(cli.app, ["export", str(artifact), *arguments])

    assert ran("--to", "gptq, awq", "--out", str(tmp_path / "made")).exit_code == 0
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["awq", "gptq"]
    said = ran("--to", "gptq", "--out", str(tmp_path / "made" / "gptq"))
    assert said.exit_code == 2 and "exists already" in said.output
    result = json.loads(ran("--to", "gptq", "--out", str(tmp_path / "made" / "gptq"), "--overwrite", "--json").stdout)
    assert result[0]["target"] == "gptq" and result[0]["seconds"] < 10
    assert ran("--to", " , ").exit_code == 2
    said = ran("--to", "gptq", "--out", str(artifact), "--overwrite")
    assert said.exit_code == 2 and "is no export of ours" in said.output
    assert (artifact / "manifest.json").exists()


def test_what_was_not_quantised_by_us_is_taken_too(checkpoint: Callable[..., Path], artifact: Path) -> None:
    (artifact / "manifest.json").unlink()
    assert exported(artifact, "awq")["awq"]["losses"] == {}
    assert "no linear is quantised" in refused(checkpoint("llama"), "awq")


def test_places_where_an_export_would_be_lost_or_cannot_be_are_refused(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    exporting.export(artifact, {"gptq": tmp_path / "made" / "gptq", "awq": tmp_path / "alone"}, tiny.Silent())
    places = {
        artifact / "sub": "lies in the artifact itself",
        tmp_path / "file" / "x": "is no folder",
        Path("/proc/x"): "cannot be made",
        tmp_path / "made": "holds other exports: gptq",
        tmp_path / "alone" / "mlx": "lies in an earlier export",
    }
    for place, message in places.items():
        if place == Path("/proc/x") and os.access("/proc", os.W_OK):
            continue  # nothing forbids root to try
        with pytest.raises(InputError) as caught:
            exporting.check(artifact, {"mlx": place}, overwrite=True)
        assert any(message in str(problem) for problem in caught.value.problems)


def test_a_model_that_ships_is_exported_too(tmp_path: Path) -> None:
    said = CliRunner().invoke(cli.app, ["export", "demo:dense", "--to", "gguf", "--out", str(tmp_path / "out")])
    assert said.exit_code == 0 and (tmp_path / "out" / "model.gguf").is_file()
