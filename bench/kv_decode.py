"""Decoding over a long context: steps per second behind a cache of latents, beside the dense cache and one that rebuilds all keys each step.

    python bench/kv_decode.py --json bench/results/kv-decode.json
    python bench/kv_decode.py --json kv-decode.json --contexts 8192 --steps 8

Attention of one random layer with the shape of Llama-3-8B (32 query heads, 8 of keys and values, of 128 channels), its projections and norms
included, over a context of random states. The sides take turns, step by step, so that a machine that slows down slows down for all of them.
`held` is the memory of the tensors in the cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import harness
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from compress.cache import Latent, attach_latents
from compress.latents import Latents, Turns, held_bytes, own_kernel
from compress.numerics.latents import basis, by_head, commuting_basis, rotate

HEADS, KV_HEADS, WIDTH, HIDDEN = 32, 8, 128, 4096
CHANNELS = KV_HEADS * WIDTH


def layer(dtype: torch.dtype) -> tuple[LlamaAttention, LlamaRotaryEmbedding]:
    config = LlamaConfig(
        hidden_size=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=WIDTH, num_hidden_layers=1,
        max_position_embeddings=1 << 17, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    return LlamaAttention(config, 0).to(dtype).eval(), LlamaRotaryEmbedding(config)


def projections(rank: int, window: int, bits: int, keys: str) -> Latents:
    """Any will do: nothing here depends on what is kept."""
    mixed = torch.randn(2 * CHANNELS, CHANNELS, dtype=torch.float64)
    moment = mixed.T @ mixed / len(mixed)
    of_values = basis(moment)
    cost = torch.eye(WIDTH, dtype=torch.float64).repeat(KV_HEADS, 1, 1)
    of_keys = commuting_basis(moment, cost) if keys == "commuting" else of_values
    of_both = [(each.down[:rank], each.up[:, :rank]) for each in (of_keys, of_values)]
    return Latents(of_both[0], of_both[1], window, bits, keys == "commuting")


class Rebuilding:
    """Gives attention all keys and values as tensors, restored anew at each step: what an approach by the cache alone amounts to."""

    def __init__(self, latents: Latents, keys: Tensor, values: Tensor, rotation: tuple[Tensor, Tensor]) -> None:
        self.latents = latents
        self.kept = latents.project_keys(keys, rotation), latents.project_values(values)
        self.rotation = rotation

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        restored = self.latents.restore_keys(self.kept[0], KV_HEADS, self.rotation)
        assert self.latents.value_up is not None
        of_values = by_head(self.kept[1] @ self.latents.value_up.T, KV_HEADS)
        return torch.cat([restored, keys], 2), torch.cat([of_values, values], 2)


def fill(
    cache: Any, module: nn.Module, context: int, rotary: LlamaRotaryEmbedding, dtype: torch.dtype
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """The states of `context` tokens, in the cache of ``module``."""
    torch.manual_seed(1)
    keys, values = (torch.randn(1, KV_HEADS, context, WIDTH, dtype=dtype) for _ in range(2))
    positions = torch.arange(context)[None]
    rotation = rotary(keys, positions)
    keys = rotate(keys, *rotation)
    if cache is not None:
        if hasattr(module, "latents"):
            Latent(module.latents, cache, positions).update(keys, values, 0)
        else:
            cache.update(keys, values, 0)
    return keys, values, rotation


@torch.no_grad()
def measure(context: int, arguments: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    """Median seconds of a step and bytes held, by side."""
    rank = int(arguments.keep * CHANNELS) // 8 * 8
    dense, rotary = layer(dtype)
    sides: dict[str, tuple[nn.Module, Any]] = {"dense": (dense, DynamicCache())}
    fill(sides["dense"][1], dense, context, rotary, dtype)
    for name in ("joint", "joint, 4 bits", "commuting", "commuting, 4 bits"):
        of_keys, bits = name.partition(",")[0], 4 if name.endswith("bits") else 16
        module, _ = layer(dtype)
        attach_latents(module, projections(rank, arguments.window, bits, of_keys).to(dtype), Turns(rotary))
        sides[name] = module, DynamicCache()
        fill(sides[name][1], module, context, rotary, dtype)
    module, _ = layer(dtype)
    own_kernel(module)
    keys, values, rotation = fill(None, module, context, rotary, dtype)
    sides["rebuilt"] = module, Rebuilding(projections(rank, 0, 16, "joint").to(dtype), keys, values, rotation)
    del keys, values
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for step in range(arguments.steps + 1):
        hidden = torch.randn(1, 1, HIDDEN, dtype=dtype)
        positions = torch.tensor([[context + step]])
        turned = rotary(hidden, positions)
        for name, (module, cache) in sides.items():
            started = time.perf_counter()
            module(hidden, position_embeddings=turned, attention_mask=None, past_key_values=cache, position_ids=positions)
            seconds[name].append(time.perf_counter() - started)
    found: dict[str, Any] = {}
    for name, (_, cache) in sides.items():
        held = held_bytes(cache) if isinstance(cache, DynamicCache) else None
        found[name] = {"seconds": statistics.median(seconds[name][1:]), "held_bytes": held}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the numbers go")
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768], help="tokens before the first step")
    parser.add_argument("--steps", type=int, default=15, help="steps of each, after one that does not count")
    parser.add_argument("--keep", type=float, default=0.2)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments = parser.parse_args()
    results = {str(context): measure(context, arguments, getattr(torch, arguments.dtype)) for context in arguments.contexts}
    protocol = {"shape": [HEADS, KV_HEADS, WIDTH, HIDDEN]} | {name: getattr(arguments, name) for name in ("keep", "window", "steps", "dtype")}
    document = {"benchmark": "kv-decode", "protocol": protocol, "results": results, "stamp": harness.stamp({})}
    arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    table = Table("context", "cache", "ms a step", "x dense", "x rebuilt", "held MB", "of dense")
    for context, sides in results.items():
        for name, side in sides.items():
            held = side["held_bytes"]
            share = f"{held / sides['dense']['held_bytes']:.3f}" if held else ""
            speed = [f"{sides[other]['seconds'] / side['seconds']:.2f}" for other in ("dense", "rebuilt")]
            table.add_row(context, name, f"{1e3 * side['seconds']:.2f}", *speed, f"{held / 1e6:.1f}" if held else "", share)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
