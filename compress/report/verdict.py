"""What was lost and gained, in figures, and what the gates say of it."""

from __future__ import annotations

from typing import Any

from compress import plots
from compress.report.records import caches, caching, factored, treatment
from compress.report.text import (
    GATE_NAMES,
    NOT_FINITE,
    SPACE,
    bound_text,
    count_text,
    digits4,
    figure_text,
    gated_text,
    interval_text,
    percent_text,
    size_text,
    time_text,
)


def summary(result: dict[str, Any]) -> str:
    """What was done, in a sentence."""
    records = result.get("linears") or []
    ways_of_caching = sorted({caching(record) for record in caches(result)})
    rest = f" Keys and values cached {' and '.join(ways_of_caching)}." if ways_of_caching else ""
    removed = [record["pattern"] for record in result.get("transforms") or [] if record.get("pattern")]
    if removed:
        rest = f" {len(removed):,} linear{'s' if len(removed) > 1 else ''} pruned to {' and '.join(sorted(set(removed)))}.{rest}"
    if of_low_rank := factored(result):
        rest = f" {len(of_low_rank):,} linear{'s' if len(of_low_rank) > 1 else ''} made two of low rank by {of_low_rank[0]['pass']}.{rest}"
    rest = "".join(f" {sentence}" for sentence in taken_out(result)) + rest
    if not records:
        return f"No linear was quantised.{rest}"
    ways = sorted({f"{treatment(record)} by {record['pass']}" for record in records})
    return f"{len(records):,} linear{'s' if len(records) > 1 else ''} quantised: {'; '.join(ways[:4])}{' and more' if len(ways) > 4 else ''}.{rest}"


def taken_out(result: dict[str, Any]) -> list[str]:
    """How much of what was taken out, a sentence per pass and kind."""
    found: dict[tuple[str, str], list[int]] = {}
    for record in result.get("transforms") or []:
        if "after" in record:
            # Of blocks, which go as a whole, it is not known here how many there were.
            kind = "block" if record["kind"].startswith("block ") else record["kind"].replace("_", " ")
            counts = found.setdefault((record["pass"], kind), [0, 0])
            counts[0] += record["before"] - record["after"]
            counts[1] += record["before"] if kind != "block" else 0
    return [
        f"{gone:,}{f' of {there:,}' if there else ''} {kind}{'s' if max(gone, there) > 1 else ''} taken out by {step}."
        for (step, kind), (gone, there) in found.items()
        if gone
    ]


def sentence(accepted: bool | None, gates: list[dict[str, Any]]) -> str:
    """What the gates come to."""
    failed, noisy = ([gate["name"] for gate in gates if gate[key] is wanted] for key, wanted in (("passed", False), ("noise", True)))
    if accepted is None:
        return "Nothing was judged."
    if not gates:
        return "The recipe sets no gates, so any loss is accepted."
    passed = {1: "The gate passed.", 2: "Both gates passed."}.get(len(gates), f"All {len(gates)} gates passed.")
    told = f"Failed: {', '.join(failed)}." if failed else passed
    return f"{told} Within noise, so that other data of this size could turn the verdict: {', '.join(noisy)}." if noisy else told


def tiles(result: dict[str, Any]) -> list[dict[str, str | None]]:
    """The tiles on top: what was lost, what was gained, what it cost."""
    evaluation, size = result.get("evaluation") or {}, result.get("size") or {}
    found = _lost(evaluation)
    before, after = size.get("before_bytes"), size.get("after_bytes")
    if before and after:
        found.append(_tile("Size", size_text(before), size_text(after), f"{percent_text(after / before)} of the original"))
    if (bits := size.get("bits_per_weight")) is not None:
        weights = count_text(size.get("quantized_weights") or 0)
        found.append(_tile("Bits per weight", None, f"{bits:.4g}", f"scales included, over {weights} quantised weights"))
    if (seconds := result.get("seconds")) is not None:
        found.append(_tile("Time", None, time_text(seconds), "from start to finish"))
    if (peak := result.get("peak_bytes")) is not None:
        found.append(_tile("Peak memory", None, size_text(peak), "of the whole process"))
    return found


def _lost(evaluation: dict[str, Any]) -> list[dict[str, str | None]]:
    base, compressed, figures = evaluation.get("baseline") or {}, evaluation.get("compressed") or {}, evaluation.get("figures") or {}
    found = []

    def note(name: str) -> str | None:
        text = interval_text(name, (evaluation.get("intervals") or {}).get(name))
        return f"95{SPACE}%: {text}" if text else None

    if "perplexity" in base and "perplexity" in compressed:
        ratio = figures.get("perplexity_ratio")
        notes = [figure_text("perplexity_ratio", ratio) if ratio is not None else None, note("perplexity_ratio")]
        found.append(_tile("Perplexity", digits4(base["perplexity"]), digits4(compressed["perplexity"]), "; ".join(filter(None, notes))))
    for key in [key for key in evaluation if key.startswith("without_")]:
        what, without = key.removeprefix("without_").replace("_", " "), evaluation[key]
        told = f"what engines lose that leave {what} out; KL divergence {figure_text('kl', without.get('kl'))}"
        found.append(_tile(f"Perplexity without {what}", None, digits4(without["perplexity"]), told))
    if figures.get("kl") is not None:
        found.append(_tile("KL divergence", None, figure_text("kl", figures["kl"]), note("kl")))
    if figures.get("top1_agreement") is not None:
        found.append(_tile("Top-1 agreement", None, percent_text(figures["top1_agreement"]), note("top1_agreement")))
    if base.get("accuracy") is not None and compressed.get("accuracy") is not None:
        lost = f"lost {figure_text('accuracy_drop', figures.get('accuracy_drop'))}"
        notes = [lost, note("accuracy_drop")]
        found.append(_tile("Accuracy", percent_text(base["accuracy"]), percent_text(compressed["accuracy"]), "; ".join(filter(None, notes))))
    return found


def _tile(name: str, before: str | None, value: str, note: str | None) -> dict[str, str | None]:
    return {"name": name, "before": before, "value": value, "note": note}


def gate(gate: dict[str, Any]) -> dict[str, Any]:
    name, value, bound = gate["name"], gate.get("value"), gate.get("bound") or {}
    least, most = bound.get("min"), bound.get("max")
    interval = gate.get("interval") or [None, None]
    drawing = None
    if value is not None:
        ends = (value, value) if None in interval else (interval[0], interval[1])
        drawing = plots.against_bound(value, ends, (least, most), gate["passed"], f"{figure_text(name, value)}, {bound_text(name, bound)}")
    return {
        "name": GATE_NAMES.get(name, name),
        "value": gated_text(name, value),
        "bound": bound_text(name, bound),
        "interval": interval_text(name, interval),
        "passed": gate["passed"],
        "noise": value is not None and not gate.get("certain", True),
        "drawing": drawing,
    }


def tasks(evaluation: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Every lm-eval figure before and after."""

    def score(value: float | None) -> str:
        return NOT_FINITE if value is None else f"{value:.4g}"

    before, after = ((evaluation.get(side) or {}).get("tasks") or {} for side in ("baseline", "compressed"))
    return [
        (task, metric, score(value), score(after[task][metric]))
        for task, metrics in before.items()
        for metric, value in metrics.items()
        if metric in after.get(task, {})
    ]
