"""What passes did, how long they took and where they had to make do."""

from __future__ import annotations

import re
from typing import Any

from compress.report.records import with_ranges
from compress.report.text import ARROW, decimals, percent_text, share_text, size_text, spread, time_text

LISTED, AT_ONCE = 200, 8
"""Fallbacks that the page lists one by one, and those of them that are seen without a click; `report.json` has all."""


def cut(result: dict[str, Any]) -> list[dict[str, str]]:
    """What was taken out of blocks that are otherwise as they were, a row per pass and kind."""
    rows: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for record in result.get("transforms") or []:
        if "after" in record:
            rows.setdefault((record["pass"], record["method"], record["kind"]), []).append(record)
    return [
        {
            "pass": f"{step}: {method}",
            "kind": kind.replace("_", " "),
            "places": f"{len(members):,}",
            **({"before": "whole", "after": "gone"} if kind.startswith("block ") else _ends(members)),
        }
        for (step, method, kind), members in rows.items()
    ]


def _ends(members: list[dict[str, Any]]) -> dict[str, str]:
    return {side: spread(sorted({record[side] for record in members}), str) for side in ("before", "after")}


def transforms(records: list[dict[str, Any]]) -> list[dict[str, str]]:
    """What passes did to tensors that they did not quantise, a row per pass and kind."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        rows.setdefault((record["pass"], record.get("kind") or ""), []).append(record)
    return [
        {
            "what": f"{step}: {kind}" if kind else step,
            "count": f"{len(members):,}",
            **{
                power: spread([record[power] for record in members if record.get(power) is not None], lambda value: f"{value:g}")
                for power in ("alpha", "beta")
            },
            "error": f" {ARROW} ".join(
                spread([record["error"][end] for record in members if record.get("error")], percent_text, middle_only=True) for end in (0, 1)
            ).strip(f"{ARROW} "),
            "clipped": spread([record["clipped"] for record in members if record.get("clipped") is not None], percent_text),
        }
        for (step, kind), members in rows.items()
    ]


def pruned(result: dict[str, Any]) -> list[dict[str, str]]:
    """Pattern and density of every linear that was pruned; those that differ in nothing but the numbers in their names share a row."""
    rows: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in result.get("transforms") or []:
        if "pattern" in record:
            rows.setdefault((re.sub(r"\d+", "#", record["name"]), record["pattern"], record["pass"], record["method"]), []).append(record)
    return [
        {
            "name": with_ranges(name, [record["name"] for record in members]),
            "pattern": pattern or "given up",
            "by": f"{step}, {method}" + (", inputs reordered" if any(record["permuted"] for record in members) else ""),
            "density": spread(sorted({record["density"] for record in members}), percent_text),
            "error": spread([record["error"] for record in members if record.get("error") is not None], percent_text, middle_only=True),
        }
        for (name, pattern, step, method), members in rows.items()
    ]


def factored(result: dict[str, Any]) -> list[dict[str, str]]:
    """Ranks and what they lose, a row per method and kind of linear; those that stay whole are named."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in result.get("transforms") or []:
        if "rank" in record:
            whole = record["rank"][0] == record["rank"][1]
            rows.setdefault((record["method"], re.sub(r"\d+", "#", record["name"]) if whole else record["kind"]), []).append(record)
    return [
        {
            "method": method,
            "kind": with_ranges(kind, [record["name"] for record in members]) if "#" in kind else kind,
            "count": f"{len(members):,}",
            "before": spread(sorted({record["rank"][0] for record in members}), str),
            "after": "left whole" if "#" in kind else spread([record["rank"][1] for record in members], str),
            "error": spread([record["error"] for record in members if record["error"] is not None], share_text) if "#" not in kind else "nothing",
        }
        for (method, kind), members in rows.items()
    ]


def detached(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Records of passes that looked for weights worth a residual."""
    return [record for record in result.get("transforms") or [] if "completeness" in record]


def detaching(record: dict[str, Any], result: dict[str, Any]) -> str:
    """What residuals there are and what they are good for, in a few sentences."""
    loss, residuals = record["loss"], sum(linear.get("residuals", 0) for linear in result.get("linears") or [])
    told = f"{residuals:,} weights have a residual beside their code" if residuals else "No weight was given a residual"
    with_them = decimals(loss["with residuals"])
    told += f". Loss on the calibration data, nats: {decimals(loss['before'])} before quantising, {decimals(loss['quantised'])} after"
    told += f", {with_them} with residuals." if residuals else f"; residuals would have made it {with_them}."
    if record["completeness"] is not None:
        told += f" What is reckoned for each weight adds up to {percent_text(record['completeness'])} of what the loss rose by in fact."
    return told


def times(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Time and memory of each pass, and the time of all the rest."""
    passes, total = result.get("passes") or [], result.get("seconds")
    longest = total or max((step["seconds"] for step in passes), default=0) or 1
    rows = [{"name": step["name"], "seconds": step["seconds"], "peak": size_text(step["peak_bytes"])} for step in passes]
    if passes and total is not None:
        rest = max(total - sum(step["seconds"] for step in passes), 0.0)
        rows.append({"name": "everything else", "seconds": rest, "peak": size_text(result["peak_bytes"]) if result.get("peak_bytes") else ""})
    return [row | {"time": time_text(row["seconds"]), "share": round(100 * row["seconds"] / longest, 1)} for row in rows]


def fallbacks(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Linears with the reason a pass had to make do: those seen at once, those listed behind them, and how many more there are."""
    listed = [(record["name"], record["fallback"]) for record in records[:LISTED]]
    return {"first": listed[:AT_ONCE], "rest": listed[AT_ONCE:], "count": len(records), "unlisted": len(records) - len(listed)}
