"""Products with weights of V:N:M against the same weights with their zeros."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_branch import branched
from test_nm_packed import plain, sparse
from test_run import compress
from torch import Tensor

from compress import runtime
from compress.errors import InputError
from compress.formats import nm_packed
from compress.kernels import native, vnm
from compress.kernels.packed import Extras
from compress.kernels.vnm import VNMLinear

PATTERNS = ["1:2:4", "4:2:5", "2:2:8", "3:1:6", "16:2:5", "5:3:16", "2:2:64"]


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return found.shape == expected.shape and bool(torch.allclose(found.double(), expected.double(), tolerance, tolerance * 10))


def module(weight: Tensor, text: str, bias: Tensor | None = None) -> VNMLinear:
    """As it comes from disk."""
    return VNMLinear(nm_packed.compact("x", nm_packed.pack_dense("x", weight, nm_packed.Pattern.parse(text))), Extras(bias))


@given(st.sampled_from(PATTERNS), st.integers(1, 4), st.integers(64, 150), st.integers(0, 5), st.integers(0, 99))
def test_products_are_those_of_the_dense_weight(text: str, blocks: int, columns: int, tokens: int, seed: int) -> None:
    weight, _ = sparse(text, blocks, columns, seed)
    x, bias = torch.randn(2, tokens, columns), torch.randn(len(weight))
    assert close(module(weight, text, bias)(x), x @ weight.T + bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 3, vnm.FEW, vnm.FEW + 1])
def test_every_kernel_gives_them_for_any_number_of_tokens(tokens: int, dtype: torch.dtype, tier: str) -> None:
    weight = sparse("16:2:8", 3, 83, 0)[0].to(dtype)
    x = torch.randn(tokens, 83)
    assert close(module(weight, "16:2:8")(x), x @ weight.float().T)
    assert module(weight, "16:2:8")(x.bfloat16()).dtype == torch.bfloat16


def test_threads_share_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = sparse("4:2:5", 7, 40, 0)[0], torch.randn(1, 40)
    expected = module(weight, "4:2:5")(x)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert module(weight, "4:2:5")(x).equal(expected)


def test_what_is_never_read_is_not_kept() -> None:
    weight = sparse("32:2:16", 4, 256, 0)[0].bfloat16()
    held = module(weight, "32:2:16")
    assert held.codes.nbytes == weight.nbytes / 4 and held.columns.nbytes == 4 * 4 * 64
    assert "bfloat16, 32:2:16" in repr(held)


def test_columns_that_make_no_sense_are_refused() -> None:
    tensors = nm_packed.pack_dense("x", *sparse("2:2:8", 2, 16, 0))
    with pytest.raises(InputError, match=r"x\.nm_columns: holds numbers that are not ascending"):
        nm_packed.compact("x", tensors | {"x.nm_columns": torch.zeros_like(tensors["x.nm_columns"])})


# Artifacts ------------------------------------------------------------------------------------------------------------------------------


def loaded(folder: Path) -> tuple[Any, dict[str, str], Tensor]:
    """A model, how its linears are stored, by module, and its logits."""
    model = runtime.load(folder)
    stored = {record["module"]: record["stored"] for record in runtime.explain(model) if record["part"] == "linear"}
    return model, stored, model(input_ids=torch.arange(8)[None]).logits


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("kind", ["llama-bias", "qwen3_moe"])
def test_an_artifact_runs_as_the_one_with_zeros(kind: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint(kind, torch.bfloat16)
    for target in ("compressed-tensors", "nm-packed"):
        compress(plain(target, pattern="16:2:8"), folder, tmp_path / target)
    (_, none, expected), (model, stored, found) = (loaded(tmp_path / target) for target in ("compressed-tensors", "nm-packed"))
    assert close(found, expected, 1e-3) and not none
    # Experts lie in one tensor of transformers, and are unpacked into it.
    assert len(stored) == (8 if kind == "qwen3_moe" else 14) and set(stored.values()) == {"bfloat16, 16:2:8"}
    assert not runtime.remarks(model) or native.tier() == "torch"


@pytest.mark.parametrize("pattern", ["8:2:8", "16:2:4", "2:4"])
def test_what_would_not_be_faster_is_dense(pattern: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(plain("nm-packed", pattern=pattern), checkpoint("llama"), tmp_path / "out")
    assert not loaded(tmp_path / "out")[1]


def test_without_a_kernel_it_is_said(checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compress(plain("nm-packed", pattern="16:2:8"), checkpoint("llama"), tmp_path / "out")
    expected = loaded(tmp_path / "out")[2]
    monkeypatch.setenv(native.FORCE, "torch")
    model, _, found = loaded(tmp_path / "out")
    assert close(found, expected, 1e-4)
    assert runtime.remarks(model) == ["14 of 14 packed modules are unpacked for each product: $COMPRESS_CPU is torch (14)"]


def test_a_branch_lies_beside_it(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    pruned = branched(before={"prune_nm": {"pattern": "16:2:8", "method": "magnitude"}})
    for target in ("compressed-tensors", "nm-packed"):
        compress(pruned | {"export": [target]}, checkpoint("llama"), tmp_path / target)
    (_, none, expected), (_, stored, found) = (loaded(tmp_path / target) for target in ("compressed-tensors", "nm-packed"))
    assert close(found, expected, 1e-4) and not none
    assert len(stored) == 14 and all(name.endswith(".linear") for name in stored)


def test_codes_are_unpacked_as_before(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(plain("nm-packed", {"rtn": {"group_size": 32}}, pattern="16:2:8"), checkpoint("llama"), tmp_path / "out")
    assert set(loaded(tmp_path / "out")[1].values()) == {"4 bits, group 32"}
