"""FP8 scales of the KV cache: what is measured, what attention then reads, and what whole runs make of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import cache as oracle
from torch import Tensor

from compress import data
from compress.calibrate import Workspace
from compress.checkpoint import Checkpoint
from compress.errors import InputError
from compress.evaluate.scoring import last_hidden
from compress.layout import Layout
from compress.model import Model
from compress.numerics.cache import SMALLEST_SCALE, as_cached, scale_for
from compress.numerics.grid import E4M3_MAX
from compress.passes.kv_quant import Pass

KINDS = ("llama", "qwen2-sliding", "qwen3", "mistral", "qwen3_moe", "mixtral")
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


@pytest.mark.parametrize("granularity", ["tensor", "head"])
@pytest.mark.parametrize("kind", KINDS)
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
    from safetensors.torch import load_file, save_file

    folder = copy()
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if (name := "model.layers.1.self_attn.v_proj.weight") in tensors:
            tensors[name] *= 1e38
            save_file(tensors, path, {"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1: keys or values are not finite"):
        calibrated(folder, tmp_path / "work", tiny.samples())


# What attention reads ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["tensor", "head"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_plain_transformers_whose_cache_rounds(
    kind: str, granularity: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    samples = tiny.samples((12,))
    model, scales = calibrated(checkpoint(kind), tmp_path / "work", samples, granularity=granularity)
    ours = model.logits(last_hidden(model, samples)[0])
    plain = tiny.plain(checkpoint(kind))
    meant, exact = (oracle.given(plain, samples.items[0].ids[None], each)[0] for each in (scales, {}))
    assert float((ours - meant).abs().max()) < 1e-4 * float(meant.abs().max()) < 1e-1 * float((meant - exact).abs().max())
