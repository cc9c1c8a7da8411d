"""What the report says of experts that were chosen among, and of what a search or training has come to."""

from __future__ import annotations

from statistics import median
from typing import Any

ARROW = "→"


def experts(transforms: list[dict[str, Any]]) -> list[dict[str, str]]:
    """A row per block and pass: which experts stay, and how many calibration tokens those that were there had."""
    return [
        {
            "block": record["name"].removesuffix(".experts"),
            "by": f"{record['pass']}: {record['method']}",
            "kept": f"{record['after']} of {record['before']}",
            "which": numbers(record["kept"]),
            "tokens": _tokens(record.get("tokens")),
            "how": _how(record),
        }
        for record in transforms
        if record.get("kind") == "expert" and "kept" in record
    ]


def numbers(each: list[int]) -> str:
    """Ascending numbers as people write them."""
    return ", ".join(map(str, each))


def _tokens(tokens: list[int] | None) -> str:
    if not tokens:
        return ""
    least, most = min(tokens), max(tokens)
    told = f"{least:,} (expert {tokens.index(least)}), {median(tokens):,.0f}, {most:,} (expert {tokens.index(most)})"
    unseen = [expert for expert, count in enumerate(tokens) if not count]
    return f"{told}; none: {numbers(unseen)}" if len(unseen) > 1 else told


def _how(record: dict[str, Any]) -> str:
    said = []
    if record.get("super_experts"):
        said.append(f"protected {numbers(record['super_experts'])}")
    if into := record.get("merged_into"):
        said.append(f"{sum(expert != each for expert, each in enumerate(into))} merged into others")
    if record.get("mixed"):
        said.append("mixtures of all")
    if record.get("mapped"):
        said.append("router with a map")
    if record.get("active"):
        said.append(f"{record['active']} to a token")
    return ", ".join(said)


def outcomes(transforms: list[dict[str, Any]]) -> list[dict[str, str]]:
    """A row per search or training: before and after, on what it learnt from and on what it did not see."""
    rows = []
    if searched := next((record for record in transforms if record["pass"] == "eep"), None):
        seen, held = searched["fitness"], searched["held_out"]
        rows.append({
            "what": f"eep: {searched['method']}, the higher the better, {searched['evaluated']:,} choices",
            "seen": f"{seen['before']:.4f} {ARROW} {seen['after']:.4f}; best one-shot {seen['one_shot']:.4f}",
            "held": f"{held['before']:.4f} {ARROW} {held['after']:.4f}",
        })  # fmt: skip
    healed = [record for record in transforms if record["pass"] == "heal" and "loss" in record]
    # Every block says the same of the pass that it was healed by.
    for steps, tokens, (first, best) in dict.fromkeys((record["steps"], record["tokens"], tuple(record["loss"])) for record in healed):
        rows.append({"what": f"heal: loss in nats, {steps:,} steps, {tokens:,} tokens", "seen": "", "held": f"{first:.4f} {ARROW} {best:.4f}"})
    return rows
