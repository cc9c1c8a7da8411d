"""Packed N:M weights: byte for byte as written in docs/formats.md, read back as they were, and opened as the same model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import nm_packed as oracle
from test_run import QUICK, compress
from torch import Tensor

from compress import planning, recipe, runtime
from compress.checkpoint import INDEX, PACKED, Checkpoint
from compress.errors import InputError
from compress.evaluate.scoring import last_hidden
from compress.export import nm_packed as exporter
from compress.formats import nm_packed as packed
from compress.inspection import inspect
from compress.layout import Layout
from compress.model import Model
from compress.numerics.grid import Integer, Quantized
from compress.numerics.pattern import Pattern
from compress.numerics.sparsity import keep

PATTERNS = ["2:4", "1:4", "4:8", "3:5", "1:2", "7:8", "4:2:5", "2:2:8", "1:2:4", "4:1:6", "2:3:64", "63:64"]


def sparse(text: str, blocks: int, columns: int, seed: int, emptiness: float = 0.3) -> tuple[Tensor, Pattern]:
    """A weight that keeps a pattern; some of what it might keep is zero too."""
    pattern, generator = Pattern.parse(text), torch.Generator().manual_seed(seed)
    shape = blocks * (pattern.v or 1), columns
    weight = torch.randn(shape, generator=generator)
    kept = keep(torch.rand(shape, generator=generator), pattern) & (torch.rand(shape, generator=generator) >= emptiness)
    return weight.masked_fill(~kept, 0), pattern


def rounded(weight: Tensor, bits: int, symmetric: bool, group: int) -> Quantized:
    """Random codes and zero points with the code of zero wherever ``weight`` is zero."""
    generator = torch.Generator().manual_seed(bits)
    low, high = -(1 << bits - 1), (1 << bits - 1)
    codes = torch.randint(low, high, weight.shape, generator=generator, dtype=torch.int8)
    scale = torch.rand(weight.shape[0], weight.shape[1] // group, generator=generator) + 0.1
    zeros = None if symmetric else torch.randint(low, high, scale.shape, generator=generator, dtype=torch.int8)
    none = torch.zeros_like(codes) if zeros is None else zeros.repeat_interleave(group, 1)
    return Quantized(torch.where(weight == 0, none, codes), scale, zeros, Integer(bits, symmetric))


# Bytes ----------------------------------------------------------------------------------------------------------------------------------


@given(
    st.sampled_from(PATTERNS),
    st.integers(1, 3),
    st.integers(0, 40),
    st.integers(0, 1000),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_weights_are_read_back_as_they_were(text: str, blocks: int, columns: int, seed: int, dtype: torch.dtype) -> None:
    weight, pattern = sparse(text, blocks, columns, seed)
    tensors = packed.pack_dense("x", weight.to(dtype), pattern)
    found = packed.unpack_dense("x", tensors)
    assert found.dtype == dtype and torch.equal(found, weight.to(dtype))


@given(st.sampled_from(PATTERNS), st.integers(2, 8), st.booleans(), st.integers(0, 1000))
def test_codes_are_read_back_as_they_were(text: str, bits: int, symmetric: bool, seed: int) -> None:
    weight, pattern = sparse(text, 2, 48, seed)
    meant = rounded(weight, bits, symmetric, 16)
    found = packed.unpack("x", packed.pack("x", meant, pattern))
    assert torch.equal(found.codes, meant.codes) and torch.equal(found.scale, meant.scale) and found.grid == meant.grid
    assert meant.zero_point is None if found.zero_point is None else torch.equal(found.zero_point, meant.zero_point)  # type: ignore[arg-type]


@pytest.mark.parametrize("columns", [64, 70, 3])
@pytest.mark.parametrize("text", PATTERNS)
def test_the_bytes_are_those_of_the_written_rules(text: str, columns: int) -> None:
    weight, pattern = sparse(text, 2, columns, 1)
    tensors = packed.pack_dense("x", weight, pattern)
    found, chosen = oracle.places(weight.tolist(), pattern)
    width = pattern.m if pattern.v is None else 4
    bits = math.ceil(math.log2(width))
    assert tensors["x.nm_pattern"].tolist() == [pattern.v or 0, pattern.n, pattern.m, 0] and tensors["x.weight_shape"].tolist() == list(weight.shape)
    assert tensors["x.nm_indices"].tolist() == [oracle.stream([place for group in row for place in group], bits) for row in found]
    if pattern.v is None:
        assert "x.nm_columns" not in tensors
    else:
        wide = math.ceil(math.log2(pattern.m))
        assert tensors["x.nm_columns"].tolist() == [oracle.stream([place for group in row for place in group], wide) for row in chosen]
    for row, groups in enumerate(found):
        inputs = [
            group * pattern.m + (place if pattern.v is None else chosen[row // pattern.v][group][place])
            for group, places in enumerate(groups)
            for place in places
        ]
        inputs += range(columns - columns % pattern.m, columns)
        assert tensors["x.nm_values"][row].tolist() == [float(weight[row, each]) for each in inputs]


@pytest.mark.parametrize(("text", "share"), [("2:4", 0.5625), ("1:4", 0.28125), ("4:8", 0.59375), ("64:2:8", 0.2827)])
def test_sixteen_bits_take_what_the_documents_say(text: str, share: float) -> None:
    weight, pattern = sparse(text, 128 // (Pattern.parse(text).v or 1), 1024, 0, 0.0)
    tensors = packed.pack_dense("x", weight.bfloat16(), pattern)
    stored = sum(tensor.nbytes for name, tensor in tensors.items() if not name.endswith(("nm_pattern", "weight_shape")))
    assert stored / (2 * weight.numel()) == pytest.approx(share, abs=1e-4)


def test_minus_zero_comes_back_as_zero() -> None:
    weight = torch.tensor([[1.0, -0.0, 2.0, -0.0], [-0.0, -0.0, -0.0, 3.0]])
    found = packed.unpack_dense("x", packed.pack_dense("x", weight, Pattern(2, 4)))
    assert torch.equal(found, weight) and not torch.signbit(found).any()


def test_a_weight_that_breaks_its_promise_is_not_packed() -> None:
    with pytest.raises(ValueError, match="x does not keep 2:4"):
        packed.pack_dense("x", torch.ones(2, 4), Pattern(2, 4))
    with pytest.raises(ValueError, match="x does not keep 4:2:8"):  # each row has two, but the block has five
        packed.pack_dense("x", torch.eye(4, 8) + torch.eye(4, 8).roll(1, 1), Pattern(2, 8, 4))


def damage(tensors: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    changes = {
        "pattern": ("x.nm_pattern", torch.tensor([0, 4, 4, 4], dtype=torch.int32)),
        "height": ("x.nm_pattern", torch.tensor([7, 2, 4, 4], dtype=torch.int32)),
        "bits": ("x.nm_pattern", torch.tensor([0, 2, 4, 9], dtype=torch.int32)),
        "width": ("x.weight_shape", torch.tensor([4, 96])),
        "indices": ("x.nm_indices", torch.zeros_like(tensors["x.nm_indices"])),
        "values": ("x.nm_values", tensors["x.nm_values"][:, 1:]),
    }
    return tensors | dict([changes[what]])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("pattern", "makes no sense"), ("height", "4 outputs, which 7:2:4 does not divide"), ("bits", "codes of 9 bits"), ("width", "has the shape"),
        ("indices", "x.nm_indices: holds numbers that are not ascending"), ("values", r"x\.nm_values: has the shape \[4, 3\], not \[4, 4\]"),
    ],
)  # fmt: skip
def test_tensors_that_contradict_each_other_are_refused(what: str, message: str) -> None:
    weight, pattern = sparse("2:4", 4, 64, 0)
    with pytest.raises(InputError, match=message):
        packed.unpack("x", damage(packed.pack("x", rounded(weight, 4, True, 16), pattern), what))


# Artifacts ------------------------------------------------------------------------------------------------------------------------------

LATER: dict[str, list[dict[str, Any]]] = {
    "dense": [],
    "w4": [{"gptq": {"group_size": 32, "min_tokens": 0}}],
    "w3 asymmetric": [{"gptq": {"group_size": 32, "bits": 3, "symmetric": False, "min_tokens": 0}}],
    "w8a8": [{"rtn": {"bits": 8, "group_size": "channel", "activations": "static"}}],
    "some": [{"rtn": {"group_size": 32, "include": ["*.mlp.*"]}}, {"kv_quant": {}}],
}


def plain(target: str, *later: dict[str, Any], **options: Any) -> dict[str, Any]:
    return QUICK | {"passes": [{"prune_nm": {"min_tokens": 0, "method": "wanda", **options}}, *later], "export": [target]}


def logits(folder: Path) -> list[Tensor]:
    model = Model(Layout(Checkpoint(folder)))
    return [model.logits(hidden) for hidden in last_hidden(model, tiny.samples())]


# Experts are symmetric, all alike, and their inputs are not rounded.
CASES = [*((kind, which) for kind in ("llama", "llama-bias") for which in LATER), ("qwen3_moe", "dense"), ("qwen3_moe", "w4")]


@pytest.mark.parametrize(("kind", "which"), CASES)
def test_the_packed_artifact_is_the_same_model_as_the_one_with_zeros(kind: str, which: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder, options = checkpoint(kind, torch.bfloat16), {"pattern": "16:2:8"} if which == "w4" else {}
    results = [compress(plain(target, *LATER[which], **options), folder, tmp_path / target) for target in ("compressed-tensors", "nm-packed")]
    dense, small = (tmp_path / target for target in ("compressed-tensors", "nm-packed"))
    assert all(torch.equal(one, other) for one, other in zip(logits(dense), logits(small), strict=True))
    opened = [runtime.load(each)(input_ids=torch.arange(8)[None]).logits for each in (dense, small)]
    assert torch.equal(*opened)
    # Scales stay as they are, and a model so small has little else.
    assert results[1]["size"]["after_bytes"] < results[0]["size"]["after_bytes"]
    assert results[1]["verification"]["mode"] == "streamed" and results[1]["verification"]["pruned_density"] <= 0.5


def test_what_is_not_pruned_is_stored_beside_it_as_always(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(plain("nm-packed", {"rtn": {"group_size": 32}}, include=["*.mlp.*"]), checkpoint("llama"), tmp_path / "out")
    became = {item["name"]: item["became"] for item in inspect(tmp_path / "out")["tensors"]}
    assert became["model.layers.0.mlp.up_proj"] == "2:4, int4, group 32, symmetric, F32 scales"
    assert became["model.layers.0.self_attn.q_proj"] == "int4, group 32, symmetric, F32 scales"


def test_weights_that_are_not_quantised_are_listed_with_their_pattern(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(plain("nm-packed", pattern="16:2:8"), checkpoint("llama", torch.bfloat16), tmp_path / "out")
    item = next(item for item in inspect(tmp_path / "out")["tensors"] if item["name"] == "model.layers.1.mlp.down_proj")
    assert (item["became"], item["shape"]) == ("16:2:8, BF16", [64, 96])


def test_only_we_find_the_weights(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    result = compress(plain("nm-packed"), checkpoint("llama"), tmp_path / "out")
    assert result["engines"] == {"compress": "loads"} | dict.fromkeys(("transformers", "vLLM", "SGLang"), exporter.ALONE)
    assert (tmp_path / "out" / PACKED / INDEX).exists() and '"loadable_by": [\n    "compress"\n  ]' in (
        tmp_path / "out" / "manifest.json"
    ).read_text()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        tiny.plain(tmp_path / "out")
    with pytest.raises(InputError, match=r"already quantised \(compress\)"):
        compress(plain("nm-packed"), tmp_path / "out", tmp_path / "again")


def test_a_shard_holds_no_more_than_a_block(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(plain("nm-packed"), checkpoint("llama-3-blocks"), tmp_path / "out")
    assert len(list((tmp_path / "out" / PACKED).glob("*.safetensors"))) == 4


def test_an_artifact_that_differs_from_what_was_meant_is_never_handed_over(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = packed.pack_dense

    def damaged(linear: str, weight: Tensor, pattern: Pattern) -> dict[str, Tensor]:
        tensors = real(linear, weight, pattern)
        tensors[f"{linear}.nm_values"][0, 0] += 1
        return tensors

    monkeypatch.setattr(packed, "pack_dense", damaged)
    with pytest.raises(InputError, match="is unpacked to other values than those meant"):
        compress(plain("nm-packed"), checkpoint("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_generation_goes_on_as_the_source_says(copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy()
    (folder / "generation_config.json").write_text('{"max_new_tokens": 3, "eos_token_id": 7}')
    compress(plain("nm-packed"), folder, tmp_path / "out")
    assert runtime.load(tmp_path / "out").generation_config.max_new_tokens == 3


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([{"rtn": {"group_size": 32}}], "export: nothing is pruned that nm-packed could pack"),
        ([{"prune_nm": {}}, {"rtn": {"format": "fp8"}}], "nm-packed holds integers and weights that are not quantised, not fp8"),
        ([{"prune_nm": {}}, {"rtn": {"group_size": 32}}, {"detach": {}}], "has no place for residuals"),
        ([{"prune_nm": {}}], "verify: full opens the artifact with transformers, which refuses: only compress"),
    ],
)
def test_what_it_cannot_hold_is_refused_before_weights_load(steps: list[dict[str, Any]], message: str, checkpoint: Callable[..., Path]) -> None:
    wanted = QUICK | {"passes": steps, "export": ["nm-packed"]} | ({"verify": "full"} if "verify" in message else {})
    with pytest.raises(InputError, match=message):
        recipe.check(recipe.validate(wanted, "r.yaml"), Layout(Checkpoint(checkpoint("llama"))), "r.yaml")


def test_a_plan_says_that_its_size_is_a_bound(checkpoint: Callable[..., Path]) -> None:
    layout = Layout(Checkpoint(checkpoint("llama")))
    made = recipe.validate(plain("nm-packed"), "r.yaml")
    found = planning.plan(made, layout, recipe.check(made, layout, "r.yaml"))
    assert found["size"]["at_most"] and found["passes"][0]["disk_bytes"] > planning.rewritten_bytes(layout)
