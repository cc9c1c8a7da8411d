"""The plots of a report."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from statistics import median
from typing import Any

from markupsafe import Markup

from compress import plots
from compress.report.records import Place, caches, factored, measured, place, tensor_bytes, treatment
from compress.report.text import ARROW, percent_text, score_text, share_text, size_text, small
from compress.report.training import block_losses

PARTS = {
    "outside the decoder blocks": ("kept: outside the decoder blocks", "still"),
    "no pass takes this linear": ("kept: linears that no pass takes", "c1"),
}
"""Name and colour of what stays as it was, by the ledger's reason."""

EXPERTS = "experts "

SIDES = ("keys", "values")

KEPT_IN_BLOCKS = ("kept: norms, biases and routers", "c2")

QUANTISED = ("quantised linears", "c0")

REWRITTEN = ("rewritten, not quantised", "c3")

GONE = {"removed": ("taken out", "away"), "dropped": ("dropped", "away")}

ADDED = ("added", "c4")

ORDER = ("c0", "still", "c1", "c3", "c2", "c4", "away")
"""Of the parts of a bar, by colour."""


def figures(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Plots with titles, captions and legends; those that have nothing to show are left out."""
    records = [(place(record["name"], record["block"]), record) for record in result.get("linears") or [] if "block" in record]
    halves = [(place(record["name"], record["block"]), record) for record in factored(result)]
    drawn = [_allocation_plot(result.get("allocation") or {}), _size_plot(result), _bits_plot(records, halves, result.get("ledger") or [])]
    if records or halves:
        numbers = [where.block for where, _ in (*halves, *records)]
        blocks = range(min(numbers), max(numbers) + 1)
        drawn = [*_error_plots([*halves, *records], blocks), *drawn, _tokens_plot(records, blocks, result), _damp_plot(records, blocks, result)]
    return [each for each in [*drawn, _training_plot(result.get("linears") or []), _cache_plot(caches(result))] if each]


def _training_plot(linears: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What training the rounding of each block has come to."""
    losses = block_losses(linears)
    if not losses:
        return None
    series = [_series(name, {block: [ends[side]] for block, ends in losses.items()}, side) for side, name in enumerate(("before", "after"))]
    domain = plots.round_domain(loss for ends in losses.values() for loss in ends)
    title = "Training of the rounding"
    label = "mean squared error" + (", log scale" if domain[2] else "")
    svg = plots.along_blocks(series, range(min(losses), max(losses) + 1), domain, label, small, title)
    return _plot(title, svg, "Mean squared error of a block's outputs on calibration data, before its rounding was trained and after.")


def retrieval(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Right answers by length of a prompt and depth in it, before and after."""
    found = evaluation.get("retrieval") or {}
    drawn = []
    for side, title in (("baseline", "The source"), ("compressed", "The artifact")):
        cells = (found.get(side) or {}).get("cells") or []
        if cells:
            shares = [plots.Share(f"{cell['depth']:g}", f"{cell['length']:,}", cell["correct"], cell["cases"]) for cell in cells]
            label = f"{title}: right answers to {found['task']} by length and depth"
            right, cases = (sum(cell[name] for cell in cells) for name in ("correct", "cases"))
            caption = f"{right:,} of {cases:,} right, {percent_text(right / cases)}."
            if side == "baseline" and not right:
                caption += " The source finds nothing, so nothing can be lost here."
            drawn.append(_plot(title, plots.heat_map(shares, ("tokens", "depth"), label), caption))
    return drawn


def _cache_plot(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What rounding or projecting takes from keys and values in each block."""
    if not records:
        return None
    blocks = [record["block"] for record in records]
    found = {
        side: {record["block"]: [record[f"{side[:-1]}_error"]] for record in records if record[f"{side[:-1]}_error"] is not None} for side in SIDES
    }
    series = [_series(side, found[side], index) for index, side in enumerate(SIDES) if found[side]]
    if not series:
        return None
    domain = plots.round_domain(value for each in series for value in each.lows.values())
    title = "Relative error of cached keys and values"
    label = "relative squared error" + (", log scale" if domain[2] else "")
    svg = plots.along_blocks(series, range(min(blocks), max(blocks) + 1), domain, label, share_text, title)
    return _plot(
        title, svg, "Squared error of keys and values on calibration data, as a share of their sum of squares; of latents as attention weighs it."
    )


def _plot(title: str, svg: Markup, caption: str, legend: Iterable[tuple[str, str]] = ()) -> dict[str, Any]:
    return {"title": title, "svg": svg, "caption": caption, "legend": list(legend)}


def _error_plots(records: list[tuple[Place, dict[str, Any]]], blocks: range) -> list[dict[str, Any]]:
    """A plot per pass and module; those of one pass share a scale, so that they can be compared."""
    found: dict[str, dict[str, dict[str, dict[int, list[float]]]]] = {}
    for where, record in records:
        if record.get("error") is not None:
            kinds = found.setdefault(record["pass"], {}).setdefault(where.panel, {})
            kinds.setdefault(where.kind, {}).setdefault(where.block, []).append(record["error"])
    drawn = []
    for step, panels in found.items():
        series = {panel: [_series(kind, values, index) for index, (kind, values) in enumerate(kinds.items())] for panel, kinds in panels.items()}
        every = [each for members in series.values() for each in members]
        domain = plots.round_domain(value for each in every for ends in (each.lows, each.highs) for value in ends.values())
        for panel, members in series.items():
            caption = f"Squared error of a linear's {measured(step)}, as a share of their sum of squares; pass {step}."
            if any(each.lows != each.highs for each in members):
                caption += " Lines are medians over the experts of a block, bands reach from the least to the largest."
            title = f"Relative error of {panel or 'the linears'}"
            svg = plots.along_blocks(members, blocks, domain, "relative squared error" + (", log scale" if domain[2] else ""), share_text, title)
            drawn.append(_plot(title, svg, caption))
    return drawn


def _series(kind: str, values: dict[int, list[float]], shade: int) -> plots.Series:
    ordered = {block: values[block] for block in sorted(values)}
    return plots.Series(
        kind,
        {block: median(each) for block, each in ordered.items()},
        {block: min(each) for block, each in ordered.items()},
        {block: max(each) for block, each in ordered.items()},
        shade,
    )


def _allocation_plot(plan: dict[str, Any]) -> dict[str, Any] | None:
    """The least loss predicted at each size, with what was chosen and what uniform bits would have been."""
    curve = [(size, loss) for size, loss in plan.get("curve") or [] if (loss or 0) > 0]
    if len(curve) < 2 or plan["predicted"] is None:
        return None
    marks = [
        plots.Mark(each["bits_per_weight"], each["predicted"], f"{each['bits']} bits", False)
        for each in plan["uniform"]
        if (each["predicted"] or 0) > 0
    ]
    marks.append(plots.Mark(plan["figures"]["bits_per_weight"], plan["predicted"], "chosen", True))
    title = "Bits against predicted loss"
    svg = plots.front(curve, marks, ("bits per weight as stored", f"predicted by {score_text(plan['score'])}"), small, title)
    caption = f"The least that {score_text(plan['score'])}, predicts of {len(plan['units'])} units within each size, and uniform bits beside it."
    if plan["measured"]:
        found = "; ".join(f"{name}: {small(value)}" for name, value in plan["measured"].items())
        caption += f" Divergence measured on calibration data, nats: {found}."
    if plan["other_model"]:
        caption += " The scores were measured on another model."
    return _plot(title, svg, caption, [("loud", "chosen"), ("c2", "the same bits everywhere")])


def _size_plot(result: dict[str, Any]) -> dict[str, Any] | None:
    """Bytes before and after, by what happened to the tensors they are of."""
    size = result.get("size") or {}
    before, after = size.get("before_bytes"), size.get("after_bytes")
    if not before or not after:
        return None
    parts: dict[tuple[str, str], list[int]] = {}
    for item in result.get("ledger") or []:
        if item.get("shape") is not None:
            sizes = parts.setdefault(_part(item), [0, 0])
            sizes[0] += 0 if item["action"] == "added" else tensor_bytes(item)
            sizes[1] += item["stored_bytes"]
    if not parts:
        parts = {("all tensors", "c0"): [before, after]}
    ordered = sorted(parts.items(), key=lambda each: ORDER.index(each[0][1]))
    rows = [(name, [(*part, sizes[side]) for part, sizes in ordered if sizes[side]]) for side, name in enumerate(("before", "after"))]
    legend = [(shade, f"{part}: {_change(*sizes)}") for (part, shade), sizes in ordered]
    return _plot("Size before and after", plots.stacked(rows, size_text, "Size before and after"), "Bytes of all tensors.", legend)


def _part(item: dict[str, Any]) -> tuple[str, str]:
    """Name and colour of what a tensor of the ledger belongs to."""
    match item["action"]:
        case "kept":
            return PARTS.get(item["why"].partition(";")[0], KEPT_IN_BLOCKS)
        case "removed" | "dropped" as action:
            return GONE[action]
        case "added":
            return ADDED
    return QUANTISED if "quantized" in item["action"] else REWRITTEN


def _change(before: int, after: int) -> str:
    if before == after:
        return size_text(before)
    return f"{size_text(before) if before else 0} {ARROW} {size_text(after) if after else 0}"


def _bits_plot(
    records: list[tuple[Place, dict[str, Any]]], halves: list[tuple[Place, dict[str, Any]]], ledger: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """Which bits each kind of linear has in each block, kept ones too."""
    cells: dict[str, dict[int, set[tuple[str, str]]]] = {}
    for where, record in records:
        cell = (f"b{record['bits']}", treatment(record))
        cells.setdefault(_row_name(where), {}).setdefault(where.block, set()).add(cell)
    if not records and not halves:
        return None
    quantised = {record["name"] for _, record in records}
    for where, record in halves:
        if f"{record['name']}.0" not in quantised:
            cells.setdefault(_row_name(where), {}).setdefault(where.block, set()).add(("mixed", f"rank {record['rank'][1]}"))
    for item in ledger:
        if item["action"] == "kept" and item["why"] == "no pass takes this linear" and (match := re.search(r"\.(\d+)\.", item["name"])):
            where = place(item["name"].removesuffix(".weight"), int(match[1]))
            cells.setdefault(_row_name(where), {}).setdefault(where.block, set()).add(("kept", f"{item['dtype'].lower()}, kept"))
    numbers = [block for row in cells.values() for block in row]
    rows = [(name, _runs(row)) for name, row in sorted(cells.items(), key=lambda item: item[0].startswith(EXPERTS))]
    title = "Bits per layer"
    svg = plots.runs_along_blocks(rows, range(min(numbers), max(numbers) + 1), title)
    return _plot(title, svg, "Bits of a stored code, without scales; grey linears stay as in the source.")


def _row_name(where: Place) -> str:
    return where.kind if where.expert is None else EXPERTS + where.kind


def _runs(row: dict[int, set[tuple[str, str]]]) -> list[plots.Run]:
    runs: list[plots.Run] = []
    for block in sorted(row):
        shade, label = next(iter(row[block])) if len(row[block]) == 1 else ("mixed", "mixed: " + " and ".join(sorted(text for _, text in row[block])))
        if runs and (runs[-1].last, runs[-1].shade, runs[-1].label) == (block - 1, shade, label):
            runs[-1] = plots.Run(runs[-1].first, block, shade, label)
        else:
            runs.append(plots.Run(block, block, shade, label))
    return runs


def _tokens_plot(records: list[tuple[Place, dict[str, Any]]], blocks: range, result: dict[str, Any]) -> dict[str, Any] | None:
    """How much calibration data each expert saw, beside what it needs."""
    tokens: dict[tuple[int, int], int] = {}
    for where, record in records:
        if where.expert is not None and record.get("tokens") is not None:
            key = (where.block, where.expert)
            tokens[key] = min(record["tokens"], tokens.get(key, record["tokens"]))
    if not tokens:
        return None
    needed = _needed(records, result)
    dots = [plots.Dot(block, count, count < needed) for (block, _), count in tokens.items()]
    starving = sum(dot.loud for dot in dots)
    members: dict[int, list[tuple[int, int]]] = {}
    for (block, expert), count in tokens.items():
        members.setdefault(block, []).append((count, expert))
    notes = {block: _tokens_note(each, needed) for block, each in members.items()}
    line = (float(needed), f"needed: {needed:,}") if needed > 1 else None
    title = "Calibration tokens per expert"
    svg = plots.dots_along_blocks(dots, blocks, line, "tokens, log scale", lambda value: f"{value:,.0f}", notes, title)
    verdict = f"{starving:,} saw too few to be trusted." if starving else "None saw too few."
    return _plot(title, svg, f"A dot per expert, {len(dots):,} in all. {verdict}", [("loud", "too few")] if starving else [])


def _tokens_note(members: list[tuple[int, int]], needed: int) -> str:
    least, expert = min(members)
    counts = [count for count, _ in members]
    few = sum(count < needed for count in counts)
    lines = [f"{len(members)} experts, median {median(counts):,.0f} tokens", f"least: {least:,} (expert {expert})"]
    return "\n".join(lines + ([f"too few: {few}"] if few else []))


def _needed(records: list[tuple[Place, dict[str, Any]]], result: dict[str, Any]) -> int:
    """Fewest tokens every linear of an expert can be calibrated with, at least one."""
    shares = _options(result, "min_tokens")
    shapes = {item["name"].removesuffix(".weight"): item["shape"] for item in result.get("ledger") or [] if item.get("shape")}
    widths = (shapes[record["name"]][-1] for where, record in records if where.expert is not None and record["name"] in shapes)
    return max(1, math.ceil(max(shares, default=0) * max(widths, default=0)))


def _options(result: dict[str, Any], key: str) -> list[float]:
    """What the recipe's passes set for an option."""
    steps = (result.get("recipe") or {}).get("passes") or []
    return [options[key] for step in steps for options in step.values() if options and options.get(key) is not None]


def _damp_plot(records: list[tuple[Place, dict[str, Any]]], blocks: range, result: dict[str, Any]) -> dict[str, Any] | None:
    """Linears whose Hessian could be factored only with more damping than the recipe asks for."""
    asked = _options(result, "damp")
    raised = [
        (where, record["damp"])
        for where, record in records
        if asked and record.get("damp") is not None and not any(math.isclose(record["damp"], damp, rel_tol=1e-3) for damp in asked)
    ]
    if not raised:
        return None
    dots = [plots.Dot(where.block, damp, True) for where, damp in raised]
    members: dict[int, list[str]] = {}
    for where, damp in raised:
        number = "" if where.expert is None else f" {where.expert}"
        members.setdefault(where.block, []).append(f"{_row_name(where)}{number}: {small(damp)}")
    notes = {block: "\n".join(each[:8] + ([f"and {len(each) - 8} more"] if len(each) > 8 else [])) for block, each in members.items()}
    title = "Raised damping"
    line = (max(asked), f"asked for: {small(max(asked))}")
    svg = plots.dots_along_blocks(dots, blocks, line, "share of the Hessian's mean diagonal, log scale", small, notes, title)
    return _plot(title, svg, f"{len(raised):,} linears could be factored only with more damping than the recipe asks for.")
