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


def by_method(keep: float) -> dict[str, Passes]:
    even = {"ranks": "uniform"}
    return {
        "svd": shrunk(keep, method="svd", **even),
        "asvd": shrunk(keep, method="asvd", **even),
        "whitened": shrunk(keep, method="whitened", **even),
        "aware": shrunk(keep, **even),
        "aware, ranks shared out": shrunk(keep),
        "aware, commuting keys": shrunk(keep, keys="commuting", **even),
        "aware, 4 bits": shrunk(keep, bits=4, **even),
        "aware, 2 bits": shrunk(keep, bits=2, **even),
        "aware, no window": shrunk(keep, window=0, **even),
        "aware, window of 8": shrunk(keep, window=8, **even),
        "aware, window of 128": shrunk(keep, window=128, **even),
    }


ROWS: dict[str, Passes] = {
    f"{table}/{name}": passes
    for table, rows in {
        "50 %": by_method(0.5),
        "20 %": by_method(0.2),
        "12.5 %": by_method(0.125),
        "100 %": {"full rank": shrunk(1.0), "4 bits": shrunk(1.0, bits=4), "2 bits": shrunk(1.0, bits=2)},
    }.items()
    for name, passes in rows.items()
}
"""By table and name, the passes of a row."""


def main(argv: list[str]) -> None:
    pruning.main(argv, pruning.Bench("kv", __doc__ or "", "demo:dense", ROWS, seeds=1, samples=64, windows=40))
