"""Experts: what a mixture loses when it has fewer of them, or sends tokens to fewer, on the same model and data.

    python bench/quality.py moe --json bench/results/experts.json
    python bench/quality.py moe --json experts.json --only 'half/*' --seeds 1

Rows of one table leave equally many bytes, but for `active`, which leaves all. As bench/pruning.py; beside text, every row is judged by the half of
the minimal pairs of the demo that no search sees. Those of `word order` are judged by sentences of demo:heldout, each with two neighbouring words
exchanged, and search by such sentences of demo:text: of a task that is learnt from few examples there are few in the demo.
"""

from __future__ import annotations

import json
import random
import re
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
    **{f"word order/{method}": experts(method, 0.25) for method in ("frequency", "routing_mass", "reap", "gated_ean", "naee")},
    "word order/eep for pairs": searched(0.25, fitness="margin", pairs="demo:pairs", held_out=0.3),
    "active/2 of 4": experts("random", 1.0, active=2),
    "active/2 of 4, eep": [{"eep": {"keep": 1.0, "active": 2, "merge": 160}}],
    "quantised/reap, half, then W4": [*experts("reap", 0.5), {"gptq": {"group_size": 32, "fallback": "round"}}],
}
"""By table and name, the passes of a row."""


EXCHANGED = {pruning.SEARCHED: ("demo:text", 1500), pruning.JUDGED: ("demo:heldout", 1500)}
WORDS = range(5, 25)


def exchanged(text: str, count: int) -> list[dict[str, str]]:
    """So many sentences, and what they are when two neighbouring words, neither the first nor the last, change places."""
    rng = random.Random(0)
    sentences = [found.split() for found in re.findall(r"(?:(?<=[.!?;] )|^)[A-Z][^.!?\n]*[.!?](?=\s)", text, re.M)]
    sentences = list({tuple(words) for words in sentences if len(words) in WORDS})
    rows = []
    for words in rng.sample(sorted(sentences), len(sentences)):
        at = rng.randrange(1, len(words) - 2)
        if words[at] != words[at + 1]:
            rows.append({"good": " ".join(words), "bad": " ".join((*words[:at], words[at + 1], words[at], *words[at + 2 :]))})
    return rows[:count]


def pairs(table: str, folder: Path) -> None:
    """Write the pairs for the rows of a table."""
    if table == "word order":
        for name, (data, count) in EXCHANGED.items():
            rows = exchanged(demo_data(data).read_text(), count)
            (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return
    lines = demo_data("demo:pairs").read_text().splitlines()
    (folder / pruning.SEARCHED).write_text("".join(f"{line}\n" for line in lines[::2]))
    (folder / pruning.JUDGED).write_text("".join(f"{line}\n" for line in lines[1::2]))


def main(argv: list[str]) -> None:
    pruning.main(argv, pruning.Bench("moe", __doc__ or "", "demo:moe", ROWS, pairs=pairs))
