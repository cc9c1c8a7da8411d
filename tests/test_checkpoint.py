"""Damaged folders are refused with the place of the damage, sound ones are read and written byte for byte."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from compress import checkpoint
from compress.checkpoint import INDEX, SINGLE, TORCH_DTYPES, Checkpoint, Entry, entry, read_entry, read_header, write_safetensors
from compress.errors import InputError
from compress.layout import Layout

Damage = Callable[[Path], None]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def truncate(folder: Path) -> None:
    path = shards(folder)[1]
    path.write_bytes(path.read_bytes()[:-5])


def append(folder: Path) -> None:
    path = shards(folder)[1]
    path.write_bytes(path.read_bytes() + b"more")


def remove_shard(folder: Path) -> None:
    shards(folder)[1].unlink()


def point_at(file: str) -> Damage:
    return lambda folder: edit_json(folder / INDEX, lambda index: index["weight_map"].update({"model.elsewhere.weight": file}))


def list_what_is_absent(folder: Path) -> None:
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({"model.ghost.weight": shards(folder)[0].name}))


def header(content: bytes, length: int | None = None) -> Damage:
    return lambda folder: shards(folder)[0].write_bytes(struct.pack("<Q", len(content) if length is None else length) + content) and None


def index(text: str) -> Damage:
    return lambda folder: (folder / INDEX).write_text(text) and None


def config(text: str) -> Damage:
    return lambda folder: (folder / "config.json").write_text(text) and None


def only_pickles(folder: Path) -> None:
    for path in [*shards(folder), folder / INDEX]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")


FOLDER_FAULTS: dict[str, tuple[Damage, str]] = {
    "truncated shard": (truncate, r"^model-00002-of-\d+\.safetensors: truncated \(\d+ bytes, header says \d+\)"),
    "bytes nobody owns": (append, r"^model-00002-of-\d+\.safetensors: followed by bytes that no tensor owns"),
    "missing shard": (remove_shard, rf"^{INDEX}: names model-00002-of-\d+\.safetensors, which is missing"),
    "index out of the folder": (point_at("../elsewhere.safetensors"), rf"^{INDEX}: points outside the folder \(\.\./elsewhere"),
    "index to an absolute path": (point_at("/etc/passwd"), rf"^{INDEX}: points outside the folder \(/etc/passwd\)"),
    "index into a folder below": (point_at("sub/x.safetensors"), rf"^{INDEX}: points outside the folder \(sub/x"),
    "listed but absent": (list_what_is_absent, rf"^{INDEX}: model\.ghost\.weight: not in model-00001-of-\d+\.safetensors"),
    "index is not JSON": (index("{"), rf"^{INDEX}: cannot be understood"),
    "index is a list": (index("[]"), rf"^{INDEX}: cannot be understood"),
    "index without a map": (index("{}"), rf"^{INDEX}: cannot be understood"),
    "empty shard": (header(b"", 0), r"^model-00001-of-\d+\.safetensors: not a safetensors file"),
    "header longer than the file": (header(b"{}", 1 << 40), r"^model-00001-of-\d+\.safetensors: not a safetensors file"),
    "header is noise": (header(b"\xff\xfe garbage"), r"^model-00001-of-\d+\.safetensors: its header is not JSON"),
    "header is a list": (header(b"[]"), r"^model-00001-of-\d+\.safetensors: its header is not"),
    "header is a number": (header(b"12"), r"^model-00001-of-\d+\.safetensors: its header is not"),
    "header nested without end": (header(b"[" * 200_000), r"^model-00001-of-\d+\.safetensors: its header is not"),
    "only pickled weights": (only_pickles, r"holds neither .*; pickled weights are never read"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"model: has no config\.json"),
    "config is not JSON": (config("model_type: llama"), r"^config\.json: is not JSON"),
    "config is a list": (config("[]"), r"^config\.json: must hold a mapping, got list"),
}


@pytest.mark.parametrize("fault", FOLDER_FAULTS)
def test_a_damaged_folder_is_refused_with_the_place(fault: str, copy: Callable[..., Path]) -> None:
    damage, message = FOLDER_FAULTS[fault]
    folder = copy()
    damage(folder)
    with pytest.raises(InputError, match=message):
        Checkpoint(folder)


def test_all_faults_of_a_folder_are_told_at_once(copy: Callable[..., Path]) -> None:
    folder = copy()
    truncate(folder)
    point_at("../x")(folder)
    list_what_is_absent(folder)
    config("[]")(folder)
    with pytest.raises(InputError) as caught:
        Checkpoint(folder)
    assert len(caught.value.problems) == 4


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        Checkpoint(tmp_path / "nothing")


ENTRIES: dict[str, dict] = {
    "unknown dtype": {"dtype": "Q4", "shape": [2], "data_offsets": [0, 8]},
    "size and shape differ": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
    "begins before the data": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
    "ends before it begins": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]},
    "negative widths": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]},
    "offsets are fractions": {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]},
    "one offset": {"dtype": "F32", "shape": [2], "data_offsets": [8]},
    "shape is text": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]},
    "no dtype": {"shape": [2], "data_offsets": [0, 8]},
}


@pytest.mark.parametrize("fault", ENTRIES)
def test_a_header_entry_that_makes_no_sense_is_refused_by_name(fault: str, tmp_path: Path) -> None:
    content = json.dumps({"x.weight": ENTRIES[fault]}).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", len(content)) + content + bytes(8))
    with pytest.raises(InputError, match=r"^bad\.safetensors: x\.weight: header entry makes no sense"):
        read_header(path)


@given(st.integers(0, 400), st.binary(min_size=1, max_size=6))
def test_a_header_with_noise_in_it_is_read_or_refused_but_never_crashes(tmp_path_factory: pytest.TempPathFactory, place: int, noise: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.safetensors"
    save_file({"a.weight": torch.zeros(3, 2), "b": torch.zeros((), dtype=torch.bfloat16)}, path, {"format": "pt"})
    content = bytearray(path.read_bytes())
    place %= len(content)
    content[place : place + len(noise)] = noise
    path.write_bytes(content)
    try:
        tensors, _ = read_header(path)
        assert all(info.nbytes >= 0 for info in tensors.values())
    except InputError:
        pass


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_found_by_name(value: float, dtype: torch.dtype, copy: Callable[..., Path]) -> None:
    folder = copy("llama", dtype)
    name = "model.layers.1.mlp.up_proj.weight"
    path = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    edit_weights(path, lambda tensors: tensors[name].view(-1).__setitem__(-1, value))
    with pytest.raises(InputError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight: holds NaN or infinity"):
        Checkpoint(folder).verify()


def test_verification_hashes_every_shard_and_counts_every_byte(checkpoint: Callable[..., Path]) -> None:
    folder, seen = checkpoint("llama"), []
    hashes = Checkpoint(folder).verify(seen.append)
    assert (sorted(hashes), sum(seen)) == ([path.name for path in shards(folder)], sum(path.stat().st_size for path in shards(folder)))


def as_gptq(folder: Path) -> None:
    edit_json(folder / "config.json", lambda plain: plain.update(quantization_config={"quant_method": "gptq", "bits": 4}))
    for path in shards(folder):
        edit_weights(
            path,
            lambda tensors: [tensors.update({name.replace(".weight", ".qweight"): tensors.pop(name)}) for name in list(tensors) if "_proj" in name],
        )
    edit_json(folder / INDEX, lambda plain: plain.update(weight_map={name: path.name for path in shards(folder) for name in load_file(path)}))


def as_float8(folder: Path) -> None:
    for path in shards(folder):
        edit_weights(path, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn) for name in tensors if "_proj" in name}))


def as_declared(folder: Path) -> None:
    edit_json(folder / "config.json", lambda plain: plain.update(quantization_config={"quant_method": "fbgemm_fp8"}))


@pytest.mark.parametrize(
    ("quantise", "message"),
    [
        (as_gptq, r"already quantised \(gptq\)"),
        (as_float8, "stored as F8_E4M3, already quantised"),
        (as_declared, r"says that weights are quantised \(fbgemm_fp8\), but all are of floats; take it out of config\.json if"),
    ],
)
def test_an_already_quantised_source_is_refused_as_such(quantise: Damage, message: str, copy: Callable[..., Path]) -> None:
    folder = copy()
    quantise(folder)
    with pytest.raises(InputError, match=message):
        Layout(Checkpoint(folder)).refuse_quantized()


def rename_block(old: int, new: int) -> Damage:
    def damage(folder: Path) -> None:
        for path in shards(folder):
            edit_weights(
                path,
                lambda tensors: [tensors.update({name.replace(f"layers.{old}.", f"layers.{new}."): tensors.pop(name)}) for name in list(tensors)],
            )
        edit_json(folder / INDEX, lambda plain: plain.update(weight_map={name: path.name for path in shards(folder) for name in load_file(path)}))

    return damage


def set_config(**changes: object) -> Damage:
    return lambda folder: edit_json(folder / "config.json", lambda plain: plain.update(changes))


def widen_one(folder: Path) -> None:
    for path in shards(folder):
        edit_weights(
            path, lambda tensors: tensors.update({name: torch.zeros(32, 80) for name in tensors if name.endswith("layers.0.self_attn.k_proj.weight")})
        )


LAYOUT_FAULTS: dict[str, tuple[Damage, str]] = {
    "missing block": (set_config(num_hidden_layers=3), r"model\.layers\.2: has no tensors"),
    "extra block": (set_config(num_hidden_layers=1), r"model\.layers\.1: is not accounted for: config\.json has 1 blocks"),
    "block with another number": (rename_block(1, 7), r"model\.layers\.1: has no tensors[^$]*\nmodel\.layers\.7: is not accounted for"),
    "no number of blocks": (set_config(num_hidden_layers=None), r"config\.json: num_hidden_layers: must be a positive number, got None"),
    "unknown model_type": (set_config(model_type="rwkv9"), r"config\.json: model_type: 'rwkv9' is not supported; supported are deepseek_v3, "),
    "no model_type": (set_config(model_type=None), r"config\.json: model_type: None is not supported"),
    "model_type of an odd kind": (set_config(model_type=["llama"]), r"config\.json: model_type: \['llama'\] is not supported"),
    "model_type of the table's own base": (set_config(model_type="base"), r"config\.json: model_type: 'base' is not supported"),
    "linears of a group differ in width": (widen_one, r"model\.layers\.0\.qkv: linears that share an input differ in width"),
    "the text config is no mapping": (set_config(model_type="llava", text_config="none"), r"config\.json: "),
}


@pytest.mark.parametrize("fault", LAYOUT_FAULTS)
def test_blocks_that_do_not_fit_the_config_are_refused_with_the_place(fault: str, copy: Callable[..., Path]) -> None:
    damage, message = LAYOUT_FAULTS[fault]
    folder = copy()
    damage(folder)
    with pytest.raises(InputError, match=message):
        Layout(Checkpoint(folder))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("gate_up_proj", r"holds what model\.layers\.0\.block_sparse_moe\.experts\.0\.w1\.weight holds too"),
        ("both_proj", "holds experts in a form that is not known; save the checkpoint with one tensor per expert"),
    ],
)
def test_experts_that_are_there_twice_or_in_a_form_of_their_own_are_refused(tensor: str, message: str, copy: Callable[..., Path]) -> None:
    folder = copy("mixtral")
    path = shards(folder)[0]
    fused = f"model.layers.0.block_sparse_moe.experts.{tensor}"
    edit_weights(path, lambda tensors: tensors.update({fused: torch.zeros(4, 192, 64)}))
    edit_json(folder / INDEX, lambda plain: plain["weight_map"].update({fused: path.name}))
    with pytest.raises(InputError, match=f"{fused}: {message}"):
        Layout(Checkpoint(folder))


def test_other_files_are_carried_and_other_weights_left_behind(copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / "extra").mkdir()
    for name in ("LICENSE", "extra/notes.txt", "old.bin", "extra/model.gguf", ".hidden"):
        (folder / name).write_bytes(b"x")
    opened = Checkpoint(folder)
    carried = {str(path) for path in opened.extra_files} - {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert (carried, set(opened.left_behind)) == ({"LICENSE", "extra/notes.txt"}, {"old.bin", "extra/model.gguf"})


def test_a_tensor_that_the_index_leaves_out_is_noticed(copy: Callable[..., Path]) -> None:
    folder = copy()
    path = shards(folder)[0]
    edit_weights(path, lambda tensors: tensors.update({"stowaway": torch.zeros(1)}))
    assert Checkpoint(folder).unlisted == ["stowaway"]


TENSORS = {
    "empty": torch.zeros(0, 4),
    "number": torch.tensor(3.5),
    "half": torch.randn(3, 5).bfloat16(),
    "float16": torch.randn(7).half(),
    "codes": torch.randint(-8, 8, (3, 3), dtype=torch.int8),
    "flags": torch.tensor([True, False, True]),
    "shape": torch.tensor([2, 3]),
    "eight": torch.randn(4).to(torch.float8_e4m3fn),
    "transposed": torch.randn(4, 6).T,
}


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    left_bytes, right_bytes = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (left, right))
    return left.dtype == right.dtype and left.shape == right.shape and left_bytes.equal(right_bytes)


@pytest.mark.parametrize("name", TENSORS)
def test_what_is_written_is_read_back_by_the_safetensors_library(name: str, tmp_path: Path) -> None:
    write_safetensors(tmp_path / SINGLE, [entry(key, tensor) for key, tensor in TENSORS.items()], {"format": "pt"})
    assert same(load_file(tmp_path / SINGLE)[name], TENSORS[name])


@pytest.mark.parametrize("name", TENSORS)
def test_what_the_safetensors_library_writes_is_read_back(name: str, tmp_path: Path) -> None:
    save_file({key: tensor.contiguous() for key, tensor in TENSORS.items()}, tmp_path / SINGLE)
    (tmp_path / "config.json").write_text("{}")
    assert same(Checkpoint(tmp_path).read(name), TENSORS[name])


def test_stored_tensors_are_copied_without_change(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = Checkpoint(checkpoint("llama", torch.bfloat16))
    write_safetensors(tmp_path / SINGLE, [entry(name, info) for name, info in source.tensors.items()], {})
    written = load_file(tmp_path / SINGLE)
    assert all(same(written[name], source.read(name)) for name in source.tensors)


def test_nothing_is_left_at_the_target_if_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_safetensors(tmp_path / SINGLE, [entry("x", torch.zeros(3))], {})
    assert not (tmp_path / SINGLE).exists()


def test_a_file_that_shrinks_while_it_is_read_is_an_input_error(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(100)}, tmp_path / SINGLE)
    (tmp_path / "config.json").write_text("{}")
    opened = Checkpoint(tmp_path)
    (tmp_path / SINGLE).write_bytes((tmp_path / SINGLE).read_bytes()[:-8])
    with pytest.raises(InputError, match="became shorter"):
        opened.read("x")


@pytest.mark.parametrize("at_once", [1, 3, 1 << 20])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F64", "F32"])
def test_a_stored_tensor_is_written_in_another_dtype_piece_by_piece(
    dtype: str, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = torch.randn(5, 7)
    write_safetensors(tmp_path / "before", [entry("a", torch.zeros(2)), entry("x", value)], {})
    monkeypatch.setattr(checkpoint, "CAST_AT_ONCE", at_once)
    item = Entry("y", dtype, (5, 7), read_header(tmp_path / "before")[0]["x"])
    write_safetensors(tmp_path / "after", [item, entry("z", torch.ones(3))], {})
    after = load_file(tmp_path / "after")
    expected = value.to(getattr(torch, TORCH_DTYPES[dtype]))
    assert torch.equal(after["y"], expected) and torch.equal(read_entry(item), expected) and torch.equal(after["z"], torch.ones(3))


def test_a_value_that_the_other_dtype_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "before", [entry("x", torch.tensor([1.0, 1e5]))], {})
    item = Entry("x", "F16", (2,), read_header(tmp_path / "before")[0]["x"])
    with pytest.raises(InputError, match="x: was changed to values that F16 cannot hold"):
        write_safetensors(tmp_path / "after", [item], {})


def test_a_config_that_counts_a_million_blocks_is_refused_without_listing_them(copy: Callable[..., Path]) -> None:
    folder = copy()
    set_config(num_hidden_layers=10**6)(folder)
    with pytest.raises(InputError) as told:
        Layout(Checkpoint(folder))
    found = list(map(str, told.value.problems))
    assert len(found) == 17 and found[-1].startswith("config.json: num_hidden_layers: counts 999982 more blocks without tensors")


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_nested_too_deeply_is_none(name: str, copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / name).write_text("[" * 100_000)
    with pytest.raises(InputError, match="maximum recursion depth"):
        Layout(Checkpoint(folder))
