"""What became of each tensor, and each unit that bits were allocated to."""

from __future__ import annotations

import re
from typing import Any

from compress.report.records import tensor_bytes, with_ranges
from compress.report.text import TIMES, count_text, percent_text, score_text, size_text, small


def rows(ledger: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tensors that differ in nothing but the numbers in their names share a row: 18,000 experts make a few dozen."""
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for item in ledger:
        key = (re.sub(r"\d+", "#", item["name"]), tuple(item.get("shape") or ()), item.get("dtype"), item["action"], item["why"])
        alike.setdefault(key, []).append(item)
    return [
        {
            "key": key[0],
            "name": with_ranges(key[0], [item["name"] for item in items]),
            "count": len(items),
            "shape": f" {TIMES} ".join(f"{side:,}" for side in key[1]) or "scalar" if items[0].get("shape") is not None else "",
            "dtype": key[2] or "",
            "before": size_text(sum(map(tensor_bytes, items))) if items[0].get("shape") is not None and key[3] != "added" else "",
            "after": size_text(after) if (after := sum(item.get("stored_bytes", 0) for item in items)) else "",
            "action": key[3],
            "why": key[4],
        }
        for key, items in alike.items()
    ]


def allocated(plan: dict[str, Any]) -> dict[str, Any]:
    """A row per unit: weights, bits, and what each option was predicted to add to what was measured."""
    rows = [
        (unit["name"], count_text(unit["weights"]), unit["bits"], [small(unit["scores"][bits]) for bits in sorted(unit["scores"], key=int)])
        for unit in plan.get("units") or []
    ]
    return {"score": score_text(plan["score"]) if rows else "", "options": sorted(plan["units"][0]["scores"], key=int) if rows else [], "rows": rows}


def worst(linears: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The linears with the largest relative errors."""
    known = sorted((record for record in linears if record.get("error") is not None), key=lambda record: -record["error"])
    return [(record["name"], percent_text(record["error"])) for record in known[:10]]
