"""An artifact that runs packed computes what transformers computes from it, in the memory of its file."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_run import compress as compress_run
from torch import Tensor
from typer.testing import CliRunner

import compress
from compress import runtime, speed
from compress.checkpoint import RESIDUALS, Checkpoint
from compress.cli import app
from compress.data import Sample, Samples
from compress.errors import InputError
from compress.evaluate.scoring import last_hidden
from compress.formats import sparse_residual
from compress.formats.sparse_residual import Residual
from compress.kernels import native
from compress.kernels.linear import PackedLinear
from compress.layout import Layout
from compress.model import Model

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
SCHEMES: dict[str, dict[str, Any]] = {f"w{bits}": {"bits": bits, "group_size": 32} for bits in (2, 3, 4, 8)} | {
    "w4-asymmetric": {"bits": 4, "group_size": 32, "symmetric": False},
    "w8-channel": {"bits": 8, "group_size": "channel"},
}
UNPACKED: dict[str, dict[str, Any]] = {
    "w5": {"bits": 5, "group_size": 32},
    "w6-asymmetric": {"bits": 6, "group_size": 32, "symmetric": False},
    "w7": {"bits": 7, "group_size": "channel"},
    "w3-g16": {"bits": 3, "group_size": 16},
}
SMALL: dict[str, dict[str, Any]] = {
    "fp8": {"format": "fp8"},
    "fp8-dynamic": {"format": "fp8", "activations": "dynamic"},
    "fp8-static": {"format": "fp8", "activations": "static"},
    "mxfp8": {"format": "mxfp8"},
    "mxfp4": {"format": "mxfp4"},
    "nvfp4": {"format": "nvfp4"},
}
"""What is multiplied without rounding inputs, so that logits are those of transformers but for the order of sums."""


def made(kind: Path | str, out: Path, *steps: dict[str, Any], **settings: Any) -> Path:
    compress_run({"calibration": {"samples": 4, "length": 24}, "evaluate": None, "passes": list(steps)} | settings, kind, out)
    return out


@torch.no_grad()
def logits(folder: Path, digits: int = 2) -> Tensor:
    """Of the packed model."""
    return cast(Tensor, compress.load(folder, digits=digits)(input_ids=IDS).logits)


@torch.no_grad()
def difference(folder: Path, digits: int = 2) -> float:
    """Of logits from those of plain transformers, as a share of the largest."""
    plain = tiny.plain(folder)
    for parameter in plain.parameters():
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.float()  # it leaves unpacked experts in the dtype of their scales
    return relative(logits(folder, digits), plain(input_ids=IDS).logits)


@torch.no_grad()
def from_meant(folder: Path) -> float:
    """Difference from the logits that are meant, which `reopen` and `eval` compute block by block with dequantised weights."""
    model = Model(Layout(Checkpoint(folder)))
    return relative(logits(folder)[0], model.logits(last_hidden(model, Samples("ids", (Sample.of(IDS[0].tolist()),)))[0][0]))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def parts(folder: Path) -> dict[str, set[str]]:
    """The kernels of each part of the packed model."""
    found: dict[str, set[str]] = {}
    for record in compress.explain(compress.load(folder)):
        found.setdefault(record["part"], set()).add(record["kernel"])
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_are_those_of_transformers(scheme: str, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(checkpoint("llama"), tmp_path / "out", {"rtn": SCHEMES[scheme]})
    assert difference(folder) < 5e-4 and difference(folder, digits=1) < 6e-2 and difference(folder, digits=0) < 5e-6
    monkeypatch.setenv(native.FORCE, "torch")
    assert difference(folder) < 1e-5


@pytest.mark.parametrize("scheme", UNPACKED)
def test_formats_without_a_kernel_run_and_say_so(scheme: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = made(checkpoint("llama"), tmp_path / "out", {"rtn": UNPACKED[scheme]})
    assert difference(folder) < 1e-5 and parts(folder) == {"linear": {"torch"}}
    (line,) = runtime.remarks(compress.load(folder))
    assert line.startswith("14 of 14 packed modules are unpacked for each product: no kernel for ") and line.endswith(" (14)")


@pytest.mark.parametrize("scheme", SMALL)
def test_small_floats_run(scheme: str, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(checkpoint("llama"), tmp_path / "out", {"rtn": SMALL[scheme]})
    # Where inputs are rounded, the order of a sum decides on which side of a step one falls.
    assert difference(folder) < (1e-3 if "activations" in SMALL[scheme] else 1e-5)
    assert parts(folder) == {"linear": {native.tier()}} and not runtime.remarks(compress.load(folder))
    monkeypatch.setenv(native.FORCE, "torch")
    assert difference(folder) < 1e-5 and parts(folder) == {"linear": {"torch"}}


@pytest.mark.parametrize(("part", "byte"), [("weight", 0x7F), ("weight", 0xFF), ("weight_scale", 0xFF)])
def test_small_floats_that_are_no_numbers_are_refused(part: str, byte: int, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder, linear = made(checkpoint("llama"), tmp_path / "out", {"rtn": SMALL["mxfp8"]}), "model.layers.1.mlp.up_proj"
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{linear}.{part}"].view(torch.uint8)[3, 1] = byte
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"{linear}: holds NaN or infinity; the artifact is damaged; fetch it again"):
        compress.load(folder)


@pytest.mark.usefixtures("in_float32")
def test_blocks_of_fp8_run(tmp_path: Path) -> None:
    folder = made("demo:dense", tmp_path / "out", {"rtn": {"format": "fp8-block", "activations": "dynamic"}})
    assert difference(folder) < 1e-3  # an input may fall to the other side of a step


@pytest.mark.parametrize("activations", ["dynamic", "static"])
@pytest.mark.parametrize("bits", [4, 8])
def test_inputs_are_rounded_as_the_checkpoint_says(
    bits: int, activations: str, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = {"bits": bits, "group_size": "channel" if bits == 8 else 32, "activations": activations}
    folder = made(checkpoint("llama"), tmp_path / "out", {"rtn": scheme})
    # Where the order of a sum decides on which side of a step an input falls, its whole step shows.
    assert difference(folder) < (1e-6 if bits == 8 else 1e-2)
    assert parts(folder) == {"linear": {native.tier()}}
    monkeypatch.setenv(native.FORCE, "torch")
    assert difference(folder) < 1e-6


EXPERTS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "qwen3_moe": ("qwen3_moe", SCHEMES["w4"], None),
    "dense first": ("qwen3_moe-dense-first", SCHEMES["w8-channel"], None),
    "mixtral": ("mixtral", SCHEMES["w3"], None),
    "qwen2_moe": ("qwen2_moe", SCHEMES["w4"], None),
    "olmoe": ("olmoe", SCHEMES["w4"], None),
    "deepseek_v3": ("deepseek_v3", SCHEMES["w4"], None),
    "fp8": ("qwen3_moe", {"format": "fp8"}, None),
    "w5": ("mixtral", UNPACKED["w5"], "torch"),
}


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_run(case: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    kind, scheme, kernel = EXPERTS[case]
    folder = made(checkpoint(kind), tmp_path / "out", {"rtn": scheme})
    assert difference(folder) < (1e-5 if kernel else 5e-4) and parts(folder)["experts"] == {kernel or native.tier()}


@pytest.mark.parametrize(("kind", "scheme"), [("llama", SCHEMES["w4"]), ("llama-tied", SMALL["nvfp4"]), ("qwen3_moe", SCHEMES["w2"])])
def test_residuals_are_added(kind: str, scheme: dict[str, Any], checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = made(checkpoint(kind), tmp_path / "out", {"rtn": scheme})
    before = logits(folder)
    model, tensors = Model(Layout(Checkpoint(folder))), {}
    for name, linear in list(model.layout.linears.items())[::2]:  # every other linear has some
        rows, columns = torch.nonzero(torch.rand(linear.rows, linear.columns) < 0.05, as_tuple=True)
        tensors |= sparse_residual.pack(name, Residual(rows, columns, 0.2 * torch.randn(len(rows)), (linear.rows, linear.columns)))
    (folder / RESIDUALS).parent.mkdir()
    save_file(tensors, folder / RESIDUALS)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["residuals"] = RESIDUALS
    (folder / "config.json").write_text(json.dumps(config))
    # Beside small floats the sum of code and residual is meant to be rounded to bfloat16, which a sum of two products is not.
    assert relative(logits(folder), before) > 0.05 and from_meant(folder) < (5e-3 if "format" in scheme else 1e-3)
    with torch.no_grad():  # engines do without
        assert relative(runtime.reference(folder, beside=False, as_transformers=False)(input_ids=IDS).logits, before) < 1e-3


@pytest.mark.parametrize(("granularity", "symmetric"), [("tensor", True), ("head", True), ("head", False)])
def test_a_cache_in_fp8_is_rounded_as_the_checkpoint_says(
    granularity: str, symmetric: bool, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = {"rtn": SCHEMES["w4"] | {"symmetric": symmetric}}, {"kv_quant": {"granularity": granularity}}
    folder = made(checkpoint("llama"), tmp_path / "out", *steps)
    monkeypatch.setenv(native.FORCE, "torch")
    assert from_meant(folder) < 1e-5
    # transformers ignores the scales beside weights that it unpacks while loading.
    assert (difference(folder) < 1e-5) == symmetric
    model = compress.load(folder)
    assert parts(folder) == {"linear": {"torch"}, "cache": {"torch"}}
    assert runtime.remarks(model)[-1] == "the cache of 2 blocks is rounded as the checkpoint says, but kept in the dtype of the model"
    # One token after the other reads what all at once read.
    with torch.no_grad():
        whole, past, last = model(input_ids=IDS).logits[:, -1], None, torch.empty(0)
        for token in IDS[0]:
            given = model(input_ids=token.view(1, 1), past_key_values=past, use_cache=True)
            past, last = given.past_key_values, given.logits[:, -1]
    assert relative(last, whole) < 1e-2


@pytest.mark.parametrize("kind", [kind for kind in tiny.DENSE if kind != "llama"])
def test_every_architecture_without_experts_runs(kind: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = made(checkpoint(kind), tmp_path / "out", {"rtn": SCHEMES["w4"]})
    assert difference(folder) < 5e-4


def test_a_mix_of_widths_and_dense_linears_runs(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    steps = ({"rtn": SCHEMES["w3"] | {"include": ["*0.mlp*"]}}, {"rtn": SCHEMES["w8"] | {"include": ["*1.mlp*"]}})
    folder = made(checkpoint("llama"), tmp_path / "out", *steps)
    assert difference(folder) < 5e-4
    assert {module.bits for module in compress.load(folder).modules() if isinstance(module, PackedLinear)} == {3, 8}


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        ("llama", SCHEMES["w3"]), ("llama-tied", SCHEMES["w4-asymmetric"]), ("llama-bias", UNPACKED["w6-asymmetric"]), ("qwen2", SMALL["nvfp4"]),
        ("llava", SMALL["mxfp8"]), ("qwen3_moe", SCHEMES["w4"]), ("mixtral", SMALL["fp8"]),
    ],
)  # fmt: skip
def test_memory_is_within_a_twentieth_of_the_file(kind: str, scheme: dict[str, Any], checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = made(checkpoint(kind, torch.bfloat16), tmp_path / "out", {"rtn": scheme})
    model = compress.load(folder)
    assert abs(speed.resident_bytes(model) / Checkpoint(folder).nbytes - 1) < 0.05
    assert difference(folder) < 2e-2  # where transformers unpacks while loading it rounds weights to bfloat16, which the kernels do not


@torch.no_grad()
@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize(
    ("kind", "scheme", "rounded"),
    [
        ("llama", SCHEMES["w4"], False), ("llama", SCHEMES["w8-channel"] | {"activations": "dynamic"}, False), ("llama", SMALL["fp8-dynamic"], False),
        ("mixtral", SMALL["fp8"], False), ("llama", SCHEMES["w4-asymmetric"], True), ("qwen3_moe", SCHEMES["w8"], True),
    ],
)  # fmt: skip
def test_the_reference_is_what_transformers_computes(
    kind: str, scheme: dict[str, Any], rounded: bool, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Products of the same numbers in the same order, also where transformers rounds what it unpacks while loading; exact weights differ then."""
    folder = made(checkpoint(kind, torch.bfloat16), tmp_path / "out", {"rtn": scheme})
    plain = tiny.plain(folder)
    for parameter in plain.parameters():
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.float()
    theirs = plain(input_ids=IDS).logits
    exact = relative(logits(folder, digits=0), theirs)
    assert relative(runtime.reference(folder, beside=False, as_transformers=True)(input_ids=IDS).logits, theirs) < 1e-6
    assert exact == relative(runtime.reference(folder, beside=True, as_transformers=False)(input_ids=IDS).logits, theirs)
    assert 1e-4 < exact < 2e-2 if rounded else exact < 1e-6
    assert not runtime.remarks(compress.load(folder)) or native.tier() == "torch"
    assert "inputs are to stay as they are" in runtime.remarks(compress.load(folder, digits=0))[0]


def test_generating_is_what_transformers_generates(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = made("demo:dense", tmp_path / "out", {"rtn": {"bits": 4, "group_size": 128}})
    tokenizer, prompt = AutoTokenizer.from_pretrained(folder), "The old man said"
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    expected = tiny.plain(folder).generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    done = CliRunner().invoke(app, ["generate", str(folder), prompt, "--tokens", "12"])
    assert done.exit_code == 0 and done.stdout.rstrip("\n") == tokenizer.decode(expected, skip_special_tokens=True)


def test_generating_with_experts_works_and_says_what_is_slow(tmp_path: Path) -> None:
    folder = made("demo:moe", tmp_path / "out", {"rtn": {"bits": 5, "group_size": "channel"}})
    done = CliRunner().invoke(app, ["generate", str(folder), "The old man said", "--tokens", "3"])
    assert done.exit_code == 0 and done.stdout.strip()
    assert re.fullmatch(r"\d+ of \d+ packed modules are unpacked for each product: no kernel for 5 bits, group channel \(\d+\)\n", done.stderr)


PICKLED: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "w4, embedding, cache": ("llama-tied", [{"rtn": SCHEMES["w4"]}, {"kv_quant": {}}]),
    "experts": ("qwen3_moe", [{"rtn": {"format": "fp8"}}]),
    "scales in E8M0": ("llama", [{"rtn": {"format": "mxfp4"}}]),
    "dense experts": ("qwen3_moe", []),
}


@pytest.mark.usefixtures("in_float32")
@torch.no_grad()
@pytest.mark.parametrize("case", PICKLED)
def test_a_loaded_model_can_be_copied_pickled_and_cast(case: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    kind, steps = PICKLED[case]
    source = checkpoint(kind, torch.bfloat16)
    model = compress.load(made(source, tmp_path / "out", *steps) if steps else source)
    expected = model(input_ids=IDS).logits
    torch.save(model, tmp_path / "model.pt")
    assert copy.deepcopy(model)(input_ids=IDS).logits.equal(expected)
    script = (
        "import sys, torch; folder = sys.argv[1]; model = torch.load(f'{folder}/model.pt', weights_only=False)\n"
        f"with torch.no_grad(): torch.save(model(input_ids=torch.tensor({IDS.tolist()})).logits, f'{{folder}}/logits.pt')"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True)
    assert torch.load(tmp_path / "logits.pt").equal(expected)
    before = {name: data.dtype for name, data in model.named_buffers() if name.endswith(("codes", "scales"))}
    for dtype, tolerance in ((torch.float64, 2e-4), (torch.float32, 1e-6)):
        found = model.to(dtype)(input_ids=IDS).logits
        assert found.dtype == dtype and relative(found, expected) < tolerance
    found = model.half()(input_ids=IDS).logits
    assert found.dtype == torch.float16 and relative(found, expected) < 5e-2
    assert before == {name: data.dtype for name, data in model.named_buffers() if name.endswith(("codes", "scales"))}


def test_a_loaded_model_is_not_saved_as_a_checkpoint(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = made(checkpoint("llama"), tmp_path / "out", {"rtn": SCHEMES["w4"]})
    with pytest.raises(
        InputError, match=re.escape(f"save_pretrained: weights that run packed are not what transformers would write; copy or upload {folder}")
    ):
        compress.load(folder).save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_experts_of_which_some_are_packed_are_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = made(checkpoint("qwen3_moe"), tmp_path / "out", {"rtn": SCHEMES["w4"]})
    name, shard = "model.layers.1.mlp.experts.3.up_proj", folder / "model.safetensors"
    tensors = load_file(shard)
    dense = Model(Layout(Checkpoint(folder))).dense(name)
    save_file({key: value for key, value in tensors.items() if not key.startswith(name)} | {f"{name}.weight": dense}, shard, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"].append(name)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"{name}: is not quantised, but other experts of its block are; open it with transformers"):
        compress.load(folder)
    three = made(checkpoint("qwen3_moe"), tmp_path / "three", {"rtn": SCHEMES["w3"]})
    other = {key: value for key, value in load_file(three / "model.safetensors").items() if key.startswith(name)}
    save_file(tensors | other, shard, {"format": "pt"})
    config["quantization_config"]["ignore"].remove(name)
    (group,) = config["quantization_config"]["config_groups"].values()
    own = group | {"targets": [name], "weights": group["weights"] | {"num_bits": 3}}
    config["quantization_config"]["config_groups"] = {"own": own, "group_0": group}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="is stored in another way than other experts of its block"):
        compress.load(folder)


def test_the_speed_of_an_artifact_is_measured(tmp_path: Path, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "LEAST_READ", 1 << 20)
    folder, out = made(checkpoint("qwen3_moe", torch.bfloat16), tmp_path / "out", {"rtn": SCHEMES["w4"]}), tmp_path / "speed.json"
    threads = torch.get_num_threads()
    done = CliRunner().invoke(app, ["bench", str(folder), "--tokens", "2", "--threads", str(speed.processors()), "--json", str(out)])
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert torch.get_num_threads() == threads and result["threads"] == speed.processors()
    done = CliRunner().invoke(app, ["bench", str(folder), "--threads", "1000"])
    assert done.exit_code == 2 and f"--threads: must be at most {speed.processors()}, the processors that this" in " ".join(done.output.split())
    stored, layout = Checkpoint(folder), Layout(Checkpoint(folder))
    # Two of eight experts serve a token, and of the embedding next to nothing is read.
    of_experts = sum(info.nbytes for name, info in stored.tensors.items() if ".experts." in name)
    expected = stored.nbytes - stored.tensors["model.embed_tokens.weight"].nbytes - of_experts * 6 / 8
    assert abs(result["decode"]["bytes_per_token"] / expected - 1) < 0.05 and len(layout.blocks) == 2
    assert abs(result["memory"]["resident_bytes"] / result["memory"]["file_bytes"] - 1) < 0.05
    assert result["roofline"]["by"] == ("torch" if native.tier() == "torch" else "kernel")
    assert CliRunner().invoke(app, ["bench", str(folder), "--json", str(out)]).exit_code == 2
    assert CliRunner().invoke(app, ["bench", str(folder), "--tokens", "250"]).exit_code == 2
    monkeypatch.setenv(native.FORCE, "torch")
    done = CliRunner().invoke(app, ["bench", str(folder), "--tokens", "1"])
    assert done.exit_code == 0 and "memory was read by torch's sum: $COMPRESS_CPU is torch" in " ".join(done.stdout.split())


def test_mistakes_are_told(tmp_path: Path, checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="digits: must be 0, 1 or 2, got 3"):
        compress.load(checkpoint("llama"), digits=3)
    done = CliRunner().invoke(app, ["generate", str(tmp_path / "none"), "word"])
    assert done.exit_code == 2 and "none" in done.stderr
    assert CliRunner().invoke(app, ["generate", "demo:dense", ""]).exit_code == 2
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        compress.nothing  # noqa: B018


@pytest.mark.parametrize("lost", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight_scale", "tokenizer.json"])
def test_what_is_missing_is_named_and_never_made_up(lost: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = made(checkpoint("llama"), tmp_path / "out", {"rtn": SCHEMES["w4"]})
    if lost == "tokenizer.json":
        (folder / lost).unlink()
    else:
        (file,) = folder.glob("*.safetensors")
        save_file({name: tensor for name, tensor in load_file(file).items() if name != lost}, file, {"format": "pt"})
    done = CliRunner().invoke(app, ["generate", str(folder), "word", "--tokens", "2"])
    assert done.exit_code == 2 and (
        f"{lost} is missing" in done.stderr or f"{lost}: is missing" in done.stderr or "no usable tokenizer" in done.stderr
    )


def test_more_tokens_than_the_model_takes_are_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["generate", "demo:dense", "word " * 3000, "--tokens", "2"])
    assert done.exit_code == 2 and "with 2 new ones more than the" in done.stderr
    (tmp_path / "there.json").write_text("")
    done = CliRunner().invoke(app, ["bench", "demo:dense", "--json", str(tmp_path / "there.json")])
    assert done.exit_code == 2 and "exists already; choose another --json" in done.stderr
