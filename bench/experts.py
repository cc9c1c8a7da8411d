"""Experts: what a mixture loses when it has fewer of them, or sends tokens to fewer, on the same model and data.

    python bench/quality.py moe --json bench/results/experts.json
    python bench/quality.py moe --json experts.json --only 'half/*' --seeds 1

Rows of one table leave equally many bytes, but for `active`, which leaves all. As bench/pruning.py; beside text, every row is judged by the half of
the minimal pairs of the demo that no search sees.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pruning

from compress.source import demo_data

Passes = list[dict[str, Any]]

SEARCH = {"prune": 40, "merge": 160, "start": 10}
"""The paper's number of generations (arXiv 2407.00945)."""


def experts(method: str, keep: float, **options: Any) -> Passes:
    return [{"prune_experts": {"method": method, "keep": keep} | options}]


def searched(keep: float, **options: Any) -> Passes:
    return [{"eep": {"keep": keep} | SEARCH | options}]


def channels(method: str, keep: float, **options: Any) -> Passes:
    return [{"prune_structured": {"method": method, "keep": {"expert_channel": keep}, "multiple_of": 16} | options}]


ROWS: dict[str, Passes] = {
    **{f"three quarters/random-{seed}": experts("random", 0.75, seed=seed) for seed in range(10)},
    **{f"three quarters/{method}": experts(method, 0.75) for method in ("frequency", "reap", "man", "naee", "stun", "hc_smoe", "m_smoe")},
    "three quarters/heapr": channels("heapr", 0.75, widths="per_expert", multiple_of=8),
    "three quarters/heapr, all as wide": channels("heapr", 0.75),
    **{f"half/random-{seed}": experts("random", 0.5, seed=seed) for seed in range(3)},
    **{
        f"half/{method}": experts(method, 0.5)
        for method in ("frequency", "routing_mass", "ean", "gated_ean", "reap", "man", "msan", "naee", "stun", "hc_smoe", "m_smoe")
    },
    "half/naee, all choices": experts("naee", 0.5, most=13_000),
    "half/eep": searched(0.5),
    "half/eep, full": searched(0.5, mode="full"),
    "half/eep for pairs": searched(0.5, fitness="margin", pairs="demo:pairs"),
    "half/heapr": channels("heapr", 0.5, widths="per_expert", multiple_of=8),
    "half/heapr, all as wide": channels("heapr", 0.5),
    "half/taylor, channels": channels("taylor", 0.5),
    **{f"quarter/{method}": experts(method, 0.25) for method in ("frequency", "reap", "gated_ean", "naee")},
    "quarter/eep for pairs": searched(0.25, fitness="margin", pairs="demo:pairs", held_out=0.3),
    "half/eep for pairs, longer": searched(0.5, fitness="margin", pairs="demo:pairs", held_out=0.2, merge=480),
    "active/2 of 4": experts("random", 1.0, active=2),
    "active/2 of 4, eep": [{"eep": {"keep": 1.0, "active": 2, "merge": 160}}],
    "quantised/reap, half, then W4": [*experts("reap", 0.5), {"gptq": {"group_size": 32, "fallback": "round"}}],
}
"""By table and name, the passes of a row."""


def pairs(folder: Path) -> None:
    """Write every other pair for searches, and the others for judging."""
    lines = demo_data("demo:pairs").read_text().splitlines()
    for name, first in ((pruning.SEARCHED, 0), (pruning.JUDGED, 1)):
        (folder / name).write_text("".join(f"{line}\n" for line in lines[first::2]))


def main(argv: list[str]) -> None:
    pruning.main(argv, pruning.Bench("moe", __doc__ or "", "demo:moe", ROWS, pairs=pairs))
