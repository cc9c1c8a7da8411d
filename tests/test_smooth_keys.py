"""Factors folded into what makes keys and queries: against a loop, the same logits to the bit, and caches that code tokens lose less."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_run import QUICK, compress
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from compress.errors import InputError
from compress.numerics.blocks import BLOCK, Coding
from compress.numerics.scaling import LEAST_SCALE, tied

KINDS = ("llama", "llama-bias", "qwen2", "qwen2-sliding", "qwen3", "mixtral", "olmoe", "gpt_oss")


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(folder: Path, cache: Any = None) -> Tensor:
    ids = torch.randint(5, 60, (2, 3 * BLOCK), generator=torch.Generator().manual_seed(3))
    found: Tensor = plain(folder)(ids, past_key_values=cache, use_cache=cache is not None).logits
    return found


def recipe_of(**options: Any) -> dict[str, Any]:
    return QUICK | {"evaluate": None, "passes": [{"smooth_keys": options}]}


@pytest.mark.parametrize("strength", [0.5, 1.0, 0.3])
def test_factors_are_those_of_a_loop_over_pairs(strength: float) -> None:
    largest = torch.rand(3, 10) * 100
    largest[1, 2] = largest[1, 7] = 0  # a pair that is never used
    found = tied(largest, strength)
    for head in range(3):
        powers = {pair: max(float(largest[head, pair]), float(largest[head, pair + 5])) ** strength for pair in range(5)}
        used = [max(power, LEAST_SCALE) for power in powers.values() if power > 0]
        middle = math.sqrt(min(used) * max(used))
        for pair, power in powers.items():
            expected = 2.0 ** round(math.log2(power / middle)) if power else 1.0
            assert float(found[head, pair]) == float(found[head, pair + 5]) == expected


def with_outliers(source: Path, folder: Path, by: Callable[[int], Tensor]) -> Path:
    """A copy whose keys are ``by(d)`` [d] times as large, all heads alike, and whose queries are as much smaller."""
    folder.mkdir()
    width = plain(source).config.head_dim
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
            continue
        tensors = load_file(file)
        normed = any("k_norm" in name for name in tensors)
        for name, tensor in tensors.items():
            module, which = name.split(".")[-2:] if "self_attn" in name else ("", "")
            if module in (("q_norm", "k_norm") if normed else ("q_proj", "k_proj")) and which in ("weight", "bias"):
                factor = by(width) if module[0] == "k" else 1 / by(width)
                heads = torch.unflatten(tensor, 0, (-1, width))
                heads.mul_(factor.to(tensor.dtype) if tensor.ndim == 1 else factor.to(tensor.dtype)[:, None])
        save_file(tensors, folder / file.name, {"format": "pt"})
    return folder


def spread_out(width: int) -> Tensor:
    """Unlike in the two channels of a pair."""
    return torch.logspace(-4, 4, width, base=2.0)[torch.randperm(width, generator=torch.Generator().manual_seed(1))]


def one_pair(width: int) -> Tensor:
    factor = torch.ones(width)
    factor[[width // 2 - 1, width - 1]] = 64.0
    return factor


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_same_to_the_bit(kind: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Biases are folded too, and norms of heads and of all heads together."""
    source = with_outliers(checkpoint(kind), tmp_path / "source", spread_out)
    result = compress(recipe_of(strength=1.0), source, tmp_path / "out")
    records = [record for record in result["transforms"] if record["pass"] == "smooth_keys"]
    assert records and all(record["factors"][0] < 0.5 and record["factors"][1] > 2 and record["left_alone"] == 0 for record in records)
    assert torch.equal(logits(source), logits(tmp_path / "out"))


class TokenByToken(DynamicCache):
    """As engines hold caches of whole numbers: each token of each head under a scale of its own."""

    def update(self, keys: Tensor, values: Tensor, layer: int, *others: Any, **named: Any) -> Any:
        rounded = [Coding(4, along_tokens=False).round(states.flatten(0, 1)).view_as(states) for states in (keys, values)]
        return super().update(rounded[0], rounded[1], layer, *others, **named)


def test_a_cache_with_scales_for_tokens_loses_less_of_keys_with_outliers(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = with_outliers(checkpoint("llama"), tmp_path / "outliers", one_pair)
    compress(recipe_of(), source, tmp_path / "out")
    exact = logits(source)
    assert float((exact - logits(checkpoint("llama"))).abs().max()) < 1e-4 * float(exact.abs().max())

    def lost(folder: Path) -> float:
        got = logits(folder, TokenByToken())
        return float(torch.nn.functional.kl_div(got.log_softmax(-1), exact.log_softmax(-1), reduction="batchmean", log_target=True))

    assert lost(tmp_path / "out") < 0.5 * lost(source)


@pytest.mark.parametrize("along", [True, False])
def test_what_has_a_scale_for_each_channel_does_not_notice(along: bool) -> None:
    """So the pass is no use to codes by channel, as `kv_quant` makes them of keys."""
    keys = torch.randn(2, BLOCK, 8) * torch.logspace(-2, 2, 8)
    factor = torch.logspace(-3, 4, 8, base=2.0).log2().round().exp2()
    coding = Coding(4, along_tokens=along)
    same = torch.allclose(coding.round(keys / factor) * factor, coding.round(keys), rtol=1e-2, atol=1e-3)
    assert same == along


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("deepseek_v3", {}, "makes keys of one latent vector for all heads"),
        ("llama", {"strength": 0}, "strength: input should be greater than 0"),
        ("llama", {"strength": 1.5}, "strength: input should be less than or equal to 1"),
    ],
)
def test_what_cannot_be_folded_is_refused(kind: str, options: dict[str, Any], message: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        compress(recipe_of(**options), checkpoint(kind), tmp_path / "out")


def test_heads_of_which_a_part_turns_are_refused(copy: Callable[..., Path], tmp_path: Path) -> None:
    import json

    folder = copy()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"partial_rotary_factor": 0.5}))
    with pytest.raises(InputError, match="turns only a part of each head"):
        compress(recipe_of(), folder, tmp_path / "out")
