"""Artifacts as GGUF files, read back by the gguf package: numbers, names, order of rows, what is told of the model and of its tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf as package
import pytest
import tiny
import torch
from gguf.quants import dequantize
from test_exporting import exported, plain, refused
from test_run import compress
from torch import Tensor

from compress import demo, recipe
from compress.checkpoint import Checkpoint
from compress.errors import InputError, Problems
from compress.export import gguf
from compress.formats import gguf_vocabulary
from compress.layout import Layout
from compress.model import Model

Made = tuple[dict[str, Any], package.GGUFReader, Model]


def made(chosen: dict[str, Any], folder: Path, out: Path) -> Made:
    """What the export says of itself, its file, and the artifact it was made of."""
    compress(chosen, folder, out)
    result = exported(out, "gguf")["gguf"]
    return result, package.GGUFReader(Path(result["folder"]) / gguf.FILE), Model(Layout(Checkpoint(out)))


@pytest.fixture(scope="module")
def rounded(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """`made` of a model of a kind in bfloat16, rounded to 4 bits; never to be changed."""

    @cache
    def make(kind: str) -> Made:
        return made(plain(), checkpoint(kind, torch.bfloat16), tmp_path_factory.mktemp(kind) / "out")

    return make


def numbers(file: package.GGUFReader, name: str) -> Tensor:
    tensor = next(tensor for tensor in file.tensors if tensor.name == name)
    shape = [int(size) for size in reversed(tensor.shape)]
    return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).view(shape)


def kinds(file: package.GGUFReader) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in file.tensors}


def meant(model: Model, linear: str) -> Tensor:
    weight = model.quantized(linear)
    assert weight
    return weight.dequantize(torch.float32)


KINDS = ["llama", "llama-tied", "llama-bias", "qwen2", "qwen3", "qwen3_moe", "qwen2_moe", "mixtral"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_exact_and_has_a_name_that_llama_cpp_knows(kind: str, rounded: Callable[[str], Made]) -> None:
    result, file, model = rounded(kind)
    assert result["losses"] == {} and result["exact"] > 10
    assert sorted(path.name for path in Path(result["folder"]).iterdir()) == ["export.json", "model.gguf"]
    types = kinds(file)
    assert types["blk.1.attn_v.weight"] == "Q4_0" and types["blk.1.attn_norm.weight"] == "F32" and types["token_embd.weight"] == "BF16"
    assert ("output.weight" in types) == (kind != "llama-tied")
    assert torch.equal(numbers(file, "blk.1.attn_v.weight"), meant(model, "model.layers.1.self_attn.v_proj"))
    assert file.get_field("general.architecture").contents() == gguf.TARGETS[kind.partition("-")[0]].name  # type: ignore[union-attr]


def test_queries_and_keys_of_a_llama_are_in_the_order_of_neighbours(rounded: Callable[[str], Made]) -> None:
    """transformers turns channel ``i`` of a head with ``i`` plus half a head, llama.cpp ``2 i`` with ``2 i + 1``."""
    _, file, model = rounded("llama-bias")
    size = model.head_dim
    for local, name in (("q_proj", "attn_q"), ("k_proj", "attn_k")):
        weight, bias = meant(model, f"model.layers.0.self_attn.{local}"), model.checkpoint.read(f"model.layers.0.self_attn.{local}.bias").float()
        found, moved = numbers(file, f"blk.0.{name}.weight"), numbers(file, f"blk.0.{name}.bias")
        for head in range(len(weight) // size):
            for channel in range(size // 2):
                for half in range(2):
                    here, there = head * size + 2 * channel + half, head * size + half * size // 2 + channel
                    assert torch.equal(found[here], weight[there]) and moved[here] == bias[there]
    _, file, model = rounded("qwen3")
    assert torch.equal(numbers(file, "blk.0.attn_q.weight"), meant(model, "model.layers.0.self_attn.q_proj"))


@pytest.mark.parametrize(("kind", "experts"), [("qwen3_moe", "mlp.experts.{}.down_proj"), ("mixtral", "block_sparse_moe.experts.{}.w2")])
def test_experts_lie_one_after_the_other(kind: str, experts: str, rounded: Callable[[str], Made]) -> None:
    _, file, model = rounded(kind)
    together = numbers(file, "blk.1.ffn_down_exps.weight")
    for expert in model.blocks[1].experts:
        assert torch.equal(together[expert], meant(model, f"model.layers.1.{experts.format(expert)}"))
    assert kinds(file)["blk.1.ffn_gate_inp.weight"] == "F32"


def test_each_linear_gets_the_type_that_holds_it(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    of = {"q_proj": 3, "k_proj": 3, "v_proj": 3, "o_proj": 8, "gate_proj": 5, "up_proj": 5}
    steps = [{"rtn": {"bits": bits, "group_size": 32, "include": [f"*.{local}"]}} for local, bits in of.items()]
    result, file, _ = made(plain(*steps), checkpoint("llama", torch.bfloat16), tmp_path / "out")
    names = {"attn_q": "Q4_0", "attn_k": "Q4_0", "attn_v": "Q4_0", "attn_output": "Q8_0", "ffn_gate": "Q5_0", "ffn_up": "Q5_0", "ffn_down": "BF16"}
    assert result["losses"] == {} and {name: kinds(file)[f"blk.0.{name}.weight"] for name in names} == names


@pytest.mark.parametrize(
    ("options", "wanted"), [({"group_size": 32, "symmetric": False}, ("Q5_0", "Q4_1")), ({"format": "mxfp4"}, ("MXFP4",))], ids=str
)
def test_zero_points_and_small_floats_are_held_too(
    options: dict[str, Any], wanted: tuple[str, ...], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    result, file, _ = made(plain({"rtn": options}), checkpoint("llama", torch.bfloat16), tmp_path / "out")
    assert result["losses"] == {} and {kind for name, kind in kinds(file).items() if name.startswith("blk.") and "norm" not in name} <= set(wanted)


def test_scales_that_float16_cannot_hold_are_told_with_what_they_lose(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    result, _, _ = made(plain(), checkpoint("llama", torch.float32), tmp_path / "out")
    assert len(result["losses"]) == 14 and all(0 < error < 2.0**-20 for error in result["losses"].values())


def test_what_nobody_quantised_is_written_too(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    result = exported(Path(shutil.copytree(checkpoint("qwen3_moe", torch.bfloat16), tmp_path / "model")), "gguf")["gguf"]
    assert result["losses"] == {} and result["engines"]["llama.cpp"] == "loads" and result["engines"]["OpenVINO"].startswith("refuses")
    assert set(kinds(package.GGUFReader(Path(result["folder"]) / gguf.FILE)).values()) == {"BF16", "F32"}


def test_what_llama_cpp_is_told_of_the_model(rounded: Callable[[str], Made]) -> None:
    _, file, model = rounded("qwen3_moe")
    config = model.config
    wanted = {
        "block_count": 2, "context_length": 256, "embedding_length": 64, "feed_forward_length": 96, "attention.head_count": 4,
        "attention.head_count_kv": 2, "attention.key_length": 16, "attention.value_length": 16, "rope.dimension_count": 16, "rope.freq_base": 10000.0,
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"], "expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 32,
    }  # fmt: skip
    for key, value in wanted.items():
        field = file.get_field(f"qwen3moe.{key}")
        assert field and field.contents() == pytest.approx(value), key
    assert file.get_field("general.file_type").contents() == package.LlamaFileType.MOSTLY_Q4_0  # type: ignore[union-attr]


def test_slower_rotation_is_told_by_a_factor_for_each_pair(copy: Callable[..., Path], edit_config: Callable[..., None], tmp_path: Path) -> None:
    folder = copy("llama", torch.bfloat16)
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    edit_config(folder, rope_parameters=rope | {"rope_theta": 10000.0})
    _, file, _ = made(plain(), folder, tmp_path / "out")
    factors = numbers(file, "rope_freqs.weight")
    assert factors.shape == (8,) and factors[0] == 1 and factors[-1] == 8 and bool((factors.diff() >= 0).all())


def test_the_tokenizer_comes_with_the_file(rounded: Callable[[str], Made]) -> None:
    _, file, _ = rounded("llama")
    told = json.loads((demo.path("dense") / "tokenizer.json").read_text())
    tokens = file.get_field("tokenizer.ggml.tokens").contents()  # type: ignore[union-attr]
    assert {token: number for number, token in enumerate(tokens)} == told["model"]["vocab"]
    assert file.get_field("tokenizer.ggml.merges").contents() == [" ".join(pair) for pair in told["model"]["merges"]]  # type: ignore[union-attr]
    assert file.get_field("tokenizer.ggml.token_type").contents()[:5] == [3, 3, 3, 3, 1]  # type: ignore[union-attr]
    fields = {"model": "gpt2", "pre": "gpt-2", "bos_token_id": 0, "eos_token_id": 0, "padding_token_id": 0, "add_bos_token": False}
    assert {key: file.get_field(f"tokenizer.ggml.{key}").contents() for key in fields} == fields  # type: ignore[union-attr]


# What is refused ----------------------------------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[str, list[dict[str, Any]], str]] = {
    "rounded inputs": ("llama", [{"rtn": {"bits": 8, "group_size": "channel", "activations": "dynamic"}}], "no place for how inputs are rounded"),
    "floats": ("llama", [{"rtn": {"format": "fp8"}}], "gguf holds integers and mxfp4, not fp8"),
    "bytes with zero points": ("llama", [{"rtn": {"bits": 8, "group_size": 32, "symmetric": False}}], "no codes of 8 bits with a zero point"),
    "narrow groups": ("llama", [{"rtn": {"group_size": 16}}], "groups of 16 do not end where GGML's blocks of 32 do"),
    "odd rows": ("llama-688", [{"rtn": {"group_size": 16}}], "rows of 688 weights are no whole number of GGML's blocks of 32"),
    "latents": ("llama", [{"rtn": {"group_size": 32}}, {"kv_shrink": {"keep": 0.5, "window": 8}}], "gguf has no place for a cache of latents"),
    "windows": ("mistral", [{"rtn": {"group_size": 32}}], "llama.cpp knows no windows of attention in a mistral"),
    "dense blocks": ("qwen3_moe-dense-first", [{"rtn": {"group_size": 32}}], "no qwen3_moe with blocks that have no experts"),
    "heads of keys": ("olmoe", [{"rtn": {"group_size": 32}}], "as many heads of keys as of queries"),
    "clipped values": ("olmoe-clipped", [{"rtn": {"group_size": 32}}], "no place here for clip_qkv"),
    "unknown": ("deepseek_v3", [{"rtn": {"group_size": 32}}], "how llama.cpp calls the parts of a deepseek_v3 is not known here; known are llama"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_cannot_load_is_refused_before_weights_load(case: str, checkpoint: Callable[..., Path]) -> None:
    kind, passes, message = REFUSED[case]
    chosen = recipe.validate(plain(*passes, export=("compressed-tensors", "gguf")), "r.yaml")
    with pytest.raises(InputError) as caught:
        recipe.check(chosen, Layout(Checkpoint(checkpoint(kind))), "r.yaml")
    assert any(message in str(problem) for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "llama.cpp does not turn a llama by rotation of the kind dynamic"),
        ("qwen3", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "it knows default, linear, yarn"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": 1.5}}, "gguf has no place for attention_factor"),
        ("llama", {"hidden_act": "gelu"}, "llama.cpp computes a llama with silu, not gelu"),
        ("qwen2", {"head_dim": 32}, "together as wide as the model, which is 64, not 128"),
        ("qwen3_moe", {"norm_topk_prob": False}, "always makes the weights of a qwen3_moe's experts sum to one"),
        ("qwen2_moe", {"norm_topk_prob": True}, "never makes the weights of a qwen2_moe's experts sum to one"),
    ],
    ids=str,
)
def test_settings_that_llama_cpp_has_no_place_for_are_named(
    kind: str, changes: dict[str, Any], message: str, copy: Callable[..., Path], edit_config: Callable[..., None]
) -> None:
    folder = copy(kind)
    if "rope_scaling" in changes:
        edit_config(folder, rope_parameters=None)
    edit_config(folder, **changes)
    problems = Problems()
    gguf.check("here", Layout(Checkpoint(folder)), {}, problems)
    assert [str(problem) for problem in problems if message in str(problem)]


def test_biases_that_llama_cpp_does_not_read_are_named(copy: Callable[..., Path]) -> None:
    folder = copy("qwen3")
    tensors = tiny.weights(folder)
    tensors["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(64)
    tiny.write(tensors, folder)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    problems = Problems()
    gguf.check("here", Layout(Checkpoint(folder)), {}, problems)
    assert [str(problem) for problem in problems] == [
        "here: llama.cpp has no place for model.layers.0.self_attn.o_proj.bias in a qwen3; choose another target"
    ]


def change_tokenizer(folder: Path, **changes: Any) -> None:
    told = json.loads((demo.path("dense") / "tokenizer.json").read_text())
    model = changes.pop("model", {})
    told |= changes
    told["model"] |= model
    (folder / "tokenizer.json").write_text(json.dumps(told))


TOKENIZERS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown cuts": ({"pre_tokenizer": {"type": "WhitespaceSplit"}}, r"cuts text in a way that is not known here \(WhitespaceSplit\)"),
    "lower case": ({"normalizer": {"type": "Lowercase"}}, r"changes text before it is cut \(Lowercase\)"),
    "another kind": ({"model": {"type": "Unigram"}}, "is of the kind Unigram"),
    "words before merges": ({"model": {"ignore_merges": True}}, "cuts text in a way that is not known here"),
    "prefixes": ({"model": {"continuing_subword_prefix": "##"}}, "sets continuing_subword_prefix"),
    "another cut by bytes": ({"model": {"byte_fallback": True}}, r"cuts text in a way that is not known here \(none, ByteLevel\)"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizers_that_llama_cpp_would_not_follow_are_refused(case: str, tmp_path: Path) -> None:
    changes, message = TOKENIZERS[case]
    change_tokenizer(tmp_path, **changes)
    with pytest.raises(InputError, match=message):
        gguf_vocabulary.read(tmp_path, 4096)


def test_tokenizers_must_be_there_and_fit_the_embedding(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"llama\.cpp needs a tokenizer inside the file"):
        gguf_vocabulary.read(tmp_path, 4096)
    change_tokenizer(tmp_path)
    with pytest.raises(InputError, match="has the token 4095, but the model has 4000 embeddings"):
        gguf_vocabulary.read(tmp_path, 4000)
    padded = gguf_vocabulary.read(tmp_path, 4100)
    assert len(padded.tokens) == 4100 and padded.tokens[-1] == "[PAD4099]" and padded.types[-1] == gguf_vocabulary.UNUSED
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="is no tokenizer"):
        gguf_vocabulary.read(tmp_path, 4096)


@pytest.mark.parametrize(("name", "steps", "ignores"), gguf_vocabulary.KNOWN, ids=[each[0] for each in gguf_vocabulary.KNOWN])
def test_known_cuts_are_found_whatever_else_is_said(name: str, steps: list[dict[str, Any]], ignores: bool, tmp_path: Path) -> None:
    told = [step | {"trim_offsets": False} if step["type"] == "ByteLevel" else step for step in steps]
    pre = told[0] if len(told) == 1 else {"type": "Sequence", "pretokenizers": told}
    change_tokenizer(tmp_path, pre_tokenizer=pre, normalizer={"type": "NFC"}, model={"ignore_merges": ignores})
    found = gguf_vocabulary.read(tmp_path, 4096)
    assert (found.model, found.pre) == ("gpt2", name)


def test_the_order_of_merges_is_that_of_scores(tmp_path: Path) -> None:
    space = gguf_vocabulary.SPACE
    tokens = ["<unk>", "<s>", "<0x0A>", space, "a", "b", f"{space}a", "ab"]
    told = {
        "added_tokens": [{"id": 1, "content": "<s>", "special": True}],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": space}, {"type": "Replace", "pattern": {"String": " "}, "content": space}
        ]},
        "pre_tokenizer": None,
        "model": {
            "type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [["a", "b"], [space, "a"]],
        },
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(told))
    found = gguf_vocabulary.read(tmp_path, len(tokens))
    assert (found.model, found.prefix, found.merges) == ("llama", True, [])
    assert found.types == [2, 3, 6, 1, 1, 1, 1, 1] and found.scores[7] > found.scores[6] > found.scores[4]


def test_a_writer_that_is_wrong_is_found_out(rounded: Callable[[str], Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(rounded("llama")[2].checkpoint.folder, tmp_path / "out")
    true = gguf._data
    monkeypatch.setattr(gguf, "_data", lambda model, item, kind: true(model, item, kind)[::-1].copy())
    assert "reads back differently from what the artifact means" in refused(tmp_path / "out", "gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
