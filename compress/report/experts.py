"""What the report says of experts that were chosen among."""

from __future__ import annotations

from statistics import median
from typing import Any

from compress.report.records import ranges


def experts(transforms: list[dict[str, Any]]) -> list[dict[str, str]]:
    """A row per block and pass: which experts stay, and how many calibration tokens those that were there had."""
    return [
        {
            "block": record["name"].removesuffix(".experts"),
            "by": f"{record['pass']}: {record['method']}",
            "kept": f"{record['after']} of {record['before']}",
            "which": ranges(record["kept"], ", "),
            "tokens": _tokens(record.get("tokens")),
            "how": _how(record),
        }
        for record in transforms
        if record.get("kind") == "expert" and "kept" in record
    ]


def _tokens(tokens: list[int] | None) -> str:
    if not tokens:
        return ""
    least, most = min(tokens), max(tokens)
    told = f"{least:,} (expert {tokens.index(least)}), {median(tokens):,.0f}, {most:,} (expert {tokens.index(most)})"
    unseen = [expert for expert, count in enumerate(tokens) if not count]
    return f"{told}; none: {ranges(unseen, ', ')}" if len(unseen) > 1 else told


def _how(record: dict[str, Any]) -> str:
    said = []
    if record.get("super_experts"):
        said.append(f"protected {ranges(sorted(record['super_experts']), ', ')}")
    if into := record.get("merged_into"):
        said.append(f"{sum(expert != each for expert, each in enumerate(into))} merged into others")
    if record.get("mixed"):
        said.append("mixtures of all")
    if record.get("mapped"):
        said.append("router with a map")
    if record.get("active"):
        said.append(f"{record['active']} to a token")
    return ", ".join(said)
