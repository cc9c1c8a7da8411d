"""What a search or training has come to, on what it learnt from and on what it did not see."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

from compress.report.text import TIMES, decimals, small


def outcomes(result: dict[str, Any]) -> list[dict[str, str]]:
    """A row per figure that a search or training was to better: before, after and by how much."""
    transforms = result.get("transforms") or []
    return [*_searched(transforms), *_healed(transforms), *_rounded(result.get("linears") or [])]


def _row(what: str, on: str, ends: tuple[str, str], change: str, note: str) -> dict[str, str]:
    return {"what": what, "on": on, "before": ends[0], "after": ends[1], "change": change, "note": note}


def _searched(transforms: list[dict[str, Any]]) -> list[dict[str, str]]:
    found = next((record for record in transforms if record["pass"] == "eep"), None)
    if found is None:
        return []
    seen, held = found["fitness"], found["held_out"]
    note = f"higher is better; {found['evaluated']:,} choices tried, the best by a one-shot score gave {decimals(seen['one_shot'])}"
    what = f"eep: {found['method']}" + (", nats per token" if found["method"] == "likelihood" else "")
    return [
        _row(what, on, (decimals(each["before"]), decimals(each["after"])), _signed(each["before"], each["after"]), said)
        for on, each, said in (("what it searched with", seen, note), ("what it did not see", held, ""))
    ]


def _healed(transforms: list[dict[str, Any]]) -> list[dict[str, str]]:
    # Every block says the same of the pass that it was healed by.
    passes = {(record["steps"], record["tokens"], *record["loss"]): record for record in transforms if record["pass"] == "heal" and "loss" in record}
    rows = []
    for record in passes.values():
        first, best = record["loss"]
        note = f"{record['steps']:,} steps, {record['tokens']:,} tokens"
        if len(copies := record.get("copies") or ()) > 1:
            note += f"; {len(copies)} copies ended at {', '.join(map(decimals, copies))}, {record['averaged']} averaged"
        if record.get("branch"):
            note += f"; branches of one weight per {record['branch']} inputs, {record['branch_after']} afterwards"
        change = _signed(first, best)
        if change and best < first:
            change += f", perplexity {TIMES}{math.exp(best - first):.4f}"
        elif change:
            change, note = "none", f"{note}; nothing better was found, so the weights stayed as they were"
        rows.append(_row("heal: loss, nats", "text it did not learn from", (decimals(first), decimals(best)), change, note))
    return rows


def _rounded(linears: list[dict[str, Any]]) -> list[dict[str, str]]:
    ends = list(block_losses(linears).values())
    if not ends:
        return []
    before, after = (median(each[side] for each in ends) for side in (0, 1))
    change = f"{TIMES}{after / before:.3f}" if before > 0 else ""
    note = f"median over {len(ends)} blocks; better in {sum(last < first for first, last in ends)} of them"
    return [_row("autoround: squared error of a block's outputs", "calibration data", (small(before), small(after)), change, note)]


def block_losses(linears: list[dict[str, Any]]) -> dict[int, tuple[float, float]]:
    """By block whose rounding was trained: the loss before and after, means over what was trained apart."""
    found: dict[int, set[tuple[float, float]]] = {}
    for record in linears:
        if record.get("block_loss") and None not in record["block_loss"]:
            found.setdefault(record["block"], set()).add((record["block_loss"][0], record["block_loss"][1]))
    return {block: (sum(first for first, _ in ends) / len(ends), sum(last for _, last in ends) / len(ends)) for block, ends in sorted(found.items())}


def _signed(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return ""
    return f"{'' if after < before else '+'}{decimals(after - before)}"
