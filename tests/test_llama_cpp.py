"""Exported files in the real llama.cpp: logits of transformers in float32, and tokens of the tokenizer, where the file rounds nothing.

Needs llama-cpp-python in $COMPRESS_RIVALS/llamacpp.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_emulation import rounded_scales
from test_exporting import exported, plain
from test_run import compress
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from compress import demo, serving
from compress.checkpoint import Checkpoint
from compress.engines.base import find
from compress.errors import Problems
from compress.export import gguf
from compress.formats import gguf_vocabulary
from compress.layout import Layout
from compress.model import Model

pytestmark = pytest.mark.engines
PYTHON = Path(os.environ.get("COMPRESS_RIVALS", "")) / "llamacpp" / "bin" / "python"
RUNNER = Path(__file__).parents[1] / "scripts" / "engines" / "llama_cpp_logits.py"

ROTATIONS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        "rope_theta": 10000.0,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0},
}  # fmt: skip


def ask(work: Path, **request: Any) -> dict[str, Any]:
    if not PYTHON.exists():
        pytest.skip(f"{PYTHON} is not there")
    (work / "request.json").write_text(json.dumps(request))
    subprocess.run([PYTHON, RUNNER, work / "request.json", work / "answer.npz"], check=True)
    return dict(np.load(work / "answer.npz"))


def written(folder: Path, out: Path) -> Path:
    """The file of a checkpoint that nobody quantised: float32, if it is."""
    out.mkdir()
    layout = Layout(Checkpoint(folder))
    problems = Problems()
    gguf.check("gguf", layout, {}, problems)
    problems.raise_if_any()
    gguf.write(Model(layout), {}, None, out)
    return out / gguf.FILE


def same_logits(folder: Path, work: Path) -> None:
    ids = [torch.randint(4, tiny.VOCABULARY, (length,)).tolist() for length in (40, 9)]
    got = ask(work, file=str(written(folder, work / "file")), forced=ids)
    model = tiny.plain(folder)
    for number, text in enumerate(ids):
        with torch.no_grad():
            meant = model(torch.tensor([text])).logits[0]
        found = torch.from_numpy(got[f"logits_{number}"])
        assert float((found - meant).abs().max()) < 1e-4 * float(meant.abs().max())


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "llama-bias", "llama-688", "qwen2", "qwen3", "qwen3_moe", "qwen2_moe", "mixtral"])
def test_logits_are_those_of_transformers(kind: str, copy: Callable[..., Path], tmp_path: Path) -> None:
    same_logits(copy(kind), tmp_path)


def test_logits_of_an_olmoe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.config("olmoe")
    config.num_key_value_heads = config.num_attention_heads
    monkeypatch.setattr(tiny, "config", lambda kind: config)
    same_logits(tiny.save("olmoe", torch.float32, tmp_path / "model"), tmp_path)


def test_logits_of_a_mistral_without_windows(copy: Callable[..., Path], edit_config: Callable[..., None], tmp_path: Path) -> None:
    folder = copy("mistral")
    config = json.loads((folder / "config.json").read_text()) | {"sliding_window": None}
    (folder / "config.json").write_text(json.dumps(config))
    same_logits(folder, tmp_path)


@pytest.mark.parametrize(
    ("kind", "rotation"), [(kind, each) for kind in ("llama", "qwen3") for each in ROTATIONS if (kind, each) != ("qwen3", "llama3")]
)
def test_rotations_are_those_of_transformers(
    kind: str, rotation: str, copy: Callable[..., Path], edit_config: Callable[..., None], tmp_path: Path
) -> None:
    folder = copy(kind)
    edit_config(folder, rope_parameters=ROTATIONS[rotation])
    same_logits(folder, tmp_path)


TYPES: dict[str, dict[str, Any]] = {
    "Q4_0": {"bits": 4, "group_size": 128},
    "Q4_1": {"bits": 4, "group_size": 128, "symmetric": False},
    "Q5_0": {"bits": 5, "group_size": 128},
    "Q5_1": {"bits": 5, "group_size": 128, "symmetric": False},
    "Q8_0": {"bits": 8, "group_size": "channel"},
    "Q2_K": {"bits": 2, "group_size": 256},
    "Q3_K": {"bits": 3, "group_size": 256},
    "Q4_K": {"bits": 4, "group_size": 256, "symmetric": False},
    "Q5_K": {"bits": 5, "group_size": 256, "symmetric": False},
    "Q6_K": {"bits": 6, "group_size": 256},
    "MXFP4": {"format": "mxfp4"},
}


def answers(artifact: Path, file: Path) -> dict[str, Any]:
    """What llama.cpp makes of a file beside what the artifact means with inputs rounded as it rounds them."""
    if not PYTHON.exists():
        pytest.skip(f"{PYTHON} is not there")
    asked = [torch.randint(4, tiny.VOCABULARY, (length,)).tolist() for length in (40, 9)]
    request = {"folder": str(file.parent), "prompts": asked, "max_tokens": 24, "dtype": "int8"}
    (answer,) = serving.ask_all(find("llama.cpp"), PYTHON, [request], 300)
    assert "error" not in answer, answer
    return serving.compare(serving.meant(artifact, file.parent, find("llama.cpp")), asked, answer)


def same_answers(artifact: Path, file: Path) -> None:
    """Every token is what was meant, and every input of a product."""
    found = answers(artifact, file)
    assert found["tokens_equal"] == found["tokens"] == 48 and found["prompt_logprob_difference"] < 1e-4
    assert found["inputs"]["blocks"] > 0 and found["inputs"]["strayed"] == 0


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_is_multiplied_as_it_was_meant(kind: str, tmp_path: Path) -> None:
    import gguf as package

    compress(plain({"rtn": TYPES[kind]}), demo.path("dense"), tmp_path / "out")
    if kind in ("Q4_1", "Q5_1"):
        rounded_scales(tmp_path / "out")
    file = Path(exported(tmp_path / "out", "gguf")["gguf"]["folder"]) / gguf.FILE
    assert kind in {tensor.tensor_type.name for tensor in package.GGUFReader(file).tensors}
    same_answers(tmp_path / "out", file)


def test_one_code_of_three_million_that_is_another_is_found(tmp_path: Path) -> None:
    """No token need change, but inputs behind it are others."""
    import gguf as package

    compress(plain({"rtn": TYPES["Q4_0"]}), demo.path("dense"), tmp_path / "out")
    file = Path(exported(tmp_path / "out", "gguf")["gguf"]["folder"]) / gguf.FILE
    place = next(int(tensor.data_offset) for tensor in package.GGUFReader(file).tensors if tensor.name == "blk.1.ffn_up.weight")
    with file.open("r+b") as stream:
        stream.seek(place + 2)  # behind the scale of the first block
        code = stream.read(1)[0]
        stream.seek(place + 2)
        stream.write(bytes([code ^ 4]))
    assert answers(tmp_path / "out", file)["inputs"]["strayed"] > 0


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "MXFP4", None])
def test_experts_are_multiplied_as_they_were_meant(kind: str | None, tmp_path: Path) -> None:
    if kind is None:
        same_answers(demo.path("moe"), written(demo.path("moe"), tmp_path / "file"))
        return
    compress(plain({"rtn": TYPES[kind]}), demo.path("moe"), tmp_path / "out")
    same_answers(tmp_path / "out", Path(exported(tmp_path / "out", "gguf")["gguf"]["folder"]) / gguf.FILE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama-bias", "qwen2", "qwen3_moe", "mixtral", "qwen2_moe"])
def test_what_is_not_quantised_is_rounded_as_it_was_meant(kind: str, dtype: torch.dtype, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint(kind, dtype)
    same_answers(folder, written(folder, tmp_path / "file"))


TEXTS = (
    "The old man said: \"I can't come\", and it's 12345 o'clock.",
    "  two spaces, a\ttab\n\n\nthree lines \n  indented  ",
    "naïve café — Ünïcödé ПРИВЕТ 你好世界 🙂👍🏽 e̊",
    "x=3.14159; y[0]+=1e-10 // CamelCaseWords HTTPServer don'T WE'LL",
    "!!!???...---===```",
)


def trained(name: str, steps: list[dict[str, Any]], ignores: bool) -> dict[str, Any]:
    """A small tokenizer that cuts text by ``steps``, as `tokenizer.json` has it."""
    cutter = Fast(models.BPE())
    told = json.loads(cutter.to_str())
    told["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"trim_offsets": True} | step if step["type"] == "ByteLevel" else step for step in steps],
    }
    cutter = Fast.from_str(json.dumps(told))
    cutter.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    text = (Path(demo.__file__).parent / "data" / "heldout.txt").read_text()[:200_000]
    cutter.train_from_iterator([text, *TEXTS * 20], trainer)
    told = json.loads(cutter.to_str())
    told["model"]["ignore_merges"] = ignores
    return dict(told)


def same_tokens(told: dict[str, Any], work: Path, texts: tuple[str, ...] = TEXTS) -> None:
    import gguf as package

    folder = work / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(told))
    shutil.copy(demo.path("dense") / "tokenizer_config.json", folder)
    size = len(told["model"]["vocab"])
    writer = package.GGUFWriter(work / "vocabulary.gguf", "llama")
    gguf_vocabulary.read(folder, size).add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    got = json.loads(str(ask(work, file=str(work / "vocabulary.gguf"), texts=texts)["cut"]))
    fast = Fast.from_str(json.dumps(told))
    assert got["ids"] == [fast.encode(text, add_special_tokens=False).ids for text in texts]
    assert [text.lstrip(" ") for text in got["texts"]] == [text.lstrip(" ") for text in texts]


@pytest.mark.parametrize(("name", "steps", "ignores"), gguf_vocabulary.KNOWN, ids=[each[0] for each in gguf_vocabulary.KNOWN])
def test_text_is_cut_as_the_tokenizer_cuts_it(name: str, steps: list[dict[str, Any]], ignores: bool, tmp_path: Path) -> None:
    same_tokens(trained(name, steps, ignores), tmp_path)


@pytest.mark.parametrize("form", ["normalizer", "metaspace"])
def test_sentencepiece_is_cut_as_the_tokenizer_cuts_it(form: str, tmp_path: Path) -> None:
    space = gguf_vocabulary.SPACE
    cutter = Fast(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    cutter.pre_tokenizer = pre_tokenizers.Metaspace(replacement=space, prepend_scheme="first", split=True)  # SentencePiece keeps words apart, too
    octets = [f"<0x{octet:02X}>" for octet in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=["<unk>", "<s>", "</s>", *octets], limit_alphabet=80)
    cutter.train_from_iterator([(Path(demo.__file__).parent / "data" / "heldout.txt").read_text()[:200_000]], trainer)
    cutter.pre_tokenizer = None
    if form == "normalizer":
        cutter.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    else:
        cutter.pre_tokenizer = pre_tokenizers.Metaspace(replacement=space, prepend_scheme="first", split=False)
    told = json.loads(cutter.to_str())
    told["added_tokens"] = [each for each in told["added_tokens"] if each["content"] not in octets]
    same_tokens(told, tmp_path, TEXTS if form == "normalizer" else tuple(text for text in TEXTS if not text.startswith(" ")))
