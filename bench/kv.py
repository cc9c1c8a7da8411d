"""Caches with fewer channels: what held-out text loses when tokens before the window are read from latents.

    python bench/quality.py kv --json bench/results/kv.json
    python bench/quality.py kv --json kv.json --only '20 %/*' --seeds 1

As bench/pruning.py. Every token of a window is scored with what decoding would find: itself and the tokens of the window exactly, older ones
restored (`compress.latents.Blended`). Rows of one table keep equally many channels. KL is the figure to go by where texts are longer than
those the model learned from: losing far tokens that confuse it lowers its perplexity.
"""

from __future__ import annotations

from typing import Any

import pruning

Passes = list[dict[str, Any]]


def shrunk(keep: float, **options: Any) -> Passes:
    return [{"kv_shrink": {"keep": keep} | options}]


ROWS: dict[str, Passes] = {
    "50 %/whitened": shrunk(0.5, method="whitened"),
    "50 %/aware": shrunk(0.5),
    "50 %/aware, commuting keys": shrunk(0.5, keys="commuting"),
    "20 %/svd": shrunk(0.2, method="svd"),
    "20 %/asvd": shrunk(0.2, method="asvd"),
    "20 %/whitened": shrunk(0.2, method="whitened"),
    "20 %/aware": shrunk(0.2),
    "20 %/aware, tuned": shrunk(0.2, tune=80),
    "20 %/aware, ranks shared out": shrunk(0.2, ranks="water_filling"),
    "20 %/aware, commuting keys": shrunk(0.2, keys="commuting"),
    "20 %/aware, 4 bits": shrunk(0.2, bits=4),
    "20 %/aware, 2 bits": shrunk(0.2, bits=2),
    "20 %/aware, no window": shrunk(0.2, window=0),
    "20 %/aware, window of 128": shrunk(0.2, window=128),
    "100 %/fp8": [{"kv_quant": {}}],
    "100 %/int4": [{"kv_quant": {"format": "int4"}}],
    "100 %/int2": [{"kv_quant": {"format": "int2"}}],
}
"""By table and name, the passes of a row."""


def main(argv: list[str]) -> None:
    pruning.main(argv, pruning.Bench("kv", __doc__ or "", "demo:dense", ROWS, seeds=1, samples=64, windows=40))
