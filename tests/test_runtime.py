"""An artifact that runs packed computes what transformers computes from it, in the memory of its file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_run import compress as compress_run
from typer.testing import CliRunner

import compress
from compress.cli import app
from compress.errors import InputError
from compress.kernels import native
from compress.kernels.linear import PackedLinear

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
SCHEMES: dict[str, dict[str, Any]] = {f"w{bits}": {"bits": bits, "group_size": 32} for bits in (2, 3, 4, 8)} | {
    "w4-asymmetric": {"bits": 4, "group_size": 32, "symmetric": False},
    "w8-channel": {"bits": 8, "group_size": "channel"},
}


def made(kind: Path | str, out: Path, *steps: dict[str, Any], **settings: Any) -> Path:
    compress_run({"calibration": {"samples": 4, "length": 24}, "evaluate": None, "passes": list(steps)} | settings, kind, out)
    return out


@torch.no_grad()
def difference(folder: Path, digits: int = 2) -> float:
    """Of logits from those of plain transformers, as a share of the largest."""
    theirs, ours = tiny.plain(folder)(input_ids=IDS).logits, compress.load(folder, digits=digits)(input_ids=IDS).logits
    return float((theirs - ours).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_are_those_of_transformers(scheme: str, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(checkpoint("llama"), tmp_path / "out", {"rtn": SCHEMES[scheme]})
    assert difference(folder) < 5e-4 and difference(folder, digits=1) < 6e-2
    monkeypatch.setenv(native.FORCE, "torch")
    assert difference(folder) < 1e-5


@pytest.mark.parametrize("kind", ["llama-tied", "llama-bias", "mistral", "qwen2", "qwen2-sliding", "qwen3", "llava"])
def test_every_architecture_without_experts_runs(kind: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = made(checkpoint(kind), tmp_path / "out", {"rtn": SCHEMES["w4"]})
    assert difference(folder) < 5e-4


def test_a_mix_of_widths_and_dense_linears_runs(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    steps = ({"rtn": SCHEMES["w3"] | {"include": ["*0.mlp*"]}}, {"rtn": SCHEMES["w8"] | {"include": ["*1.mlp*"]}})
    folder = made(checkpoint("llama"), tmp_path / "out", *steps)
    assert difference(folder) < 5e-4
    assert {module.bits for module in compress.load(folder).modules() if isinstance(module, PackedLinear)} == {3, 8}


def test_memory_is_within_a_twentieth_of_the_file(tmp_path: Path) -> None:
    folder = made("demo:dense", tmp_path / "out", {"rtn": {"bits": 3, "group_size": 128}})
    model = compress.load(folder)
    packed = sum(buffer.nbytes for module in model.modules() if isinstance(module, PackedLinear) for buffer in module.buffers())
    stored = sum(
        tensor.nbytes for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items() if "_packed" in name or "_scale" in name
    )
    assert abs(packed / stored - 1) < 0.05


def test_generating_is_what_transformers_generates(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = made("demo:dense", tmp_path / "out", {"rtn": {"bits": 4, "group_size": 128}})
    tokenizer, prompt = AutoTokenizer.from_pretrained(folder), "The old man said"
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    expected = tiny.plain(folder).generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    done = CliRunner().invoke(app, ["generate", str(folder), prompt, "--tokens", "12"])
    assert done.exit_code == 0 and done.stdout.rstrip("\n") == tokenizer.decode(expected, skip_special_tokens=True)


REFUSED: dict[str, tuple[str, tuple[dict[str, Any], ...], str]] = {
    "experts": ("qwen3_moe", ({"rtn": SCHEMES["w4"]},), "has experts, whose packed weights no kernel here multiplies yet; open it with transformers"),
    "rounded inputs": ("llama", ({"rtn": {"bits": 8, "group_size": "channel", "activations": "dynamic"}},), "rounds the inputs of linears by itself"),
    "small floats": ("llama", ({"rtn": {"format": "nvfp4"}},), "is stored as E2M1"),
    "an odd width": ("llama", ({"rtn": {"bits": 5, "group_size": 32}},), "for which there is no kernel; open it with transformers"),
    "a quantised cache": ("llama", ({"rtn": SCHEMES["w4"]}, {"kv_quant": {}}), "has a quantised cache"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_kernel_computes_is_refused(what: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    kind, steps, message = REFUSED[what]
    folder = made(checkpoint(kind), tmp_path / "out", *steps)
    with pytest.raises(InputError) as caught:
        compress.load(folder)
    assert message in str(caught.value.problems[0])


def test_mistakes_are_told(tmp_path: Path, checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="digits: must be 1 or 2, got 3"):
        compress.load(checkpoint("llama"), digits=3)
    done = CliRunner().invoke(app, ["generate", str(tmp_path / "none"), "word"])
    assert done.exit_code == 2 and "none" in done.stderr
    assert CliRunner().invoke(app, ["generate", "demo:dense", ""]).exit_code == 2
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        compress.nothing  # noqa: B018
