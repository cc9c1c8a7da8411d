"""The report of a run: everything measured, as JSON and as a page."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from compress import experts_told, modalities_told, plots
from compress.checkpoint import write_text
from compress.formats.base import LEFT_OUT

DASH, TIMES, SPACE, MINUS, ARROW = "\u2013", "\u00d7", "\u00a0", "\u2212", "\u2192"
DTYPE_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16}
"""Bits of an element, by safetensors' names; every other type it knows has 8."""
LISTED, AT_ONCE = 200, 8
"""Fallbacks that the page lists one by one, and those of them that are seen without a click; `report.json` has all."""
FEW = 8
"""So many values of one kind are named one by one."""
GATE_NAMES = {
    "perplexity_ratio": "perplexity, after / before",
    "kl": "KL divergence",
    "top1_agreement": "top-1 agreement",
    "accuracy_drop": "accuracy lost",
    "bits_per_weight": "bits per weight",
    "size_ratio": "size, after / before",
    "fallbacks": "fallbacks",
}
PARTS = {
    "outside the decoder blocks": ("kept: outside the decoder blocks", "still"),
    "no pass takes this linear": ("kept: linears that no pass takes", "c1"),
}
"""Name and colour of what stays as it was, by the ledger's reason."""
EXPERTS = "experts "
KEPT_IN_BLOCKS = ("kept: norms, biases and routers", "c2")
REWRITTEN = ("rewritten, as large as before", "c3")


@dataclass(frozen=True)
class Place:
    """Where a linear stands: ``panel`` is the module that holds it, ``expert`` its number among routed ones."""

    block: int
    panel: str
    kind: str
    expert: int | None


def finite(value: Any) -> Any:
    """`value` with every NaN and infinity replaced by None, which JSON can hold: a model that is broken beyond measuring has a report too."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(result: dict[str, Any], folder: Path) -> None:
    """Write `report.json` and `report.html` into `folder`."""
    result = finite(result)
    write_text(folder / "report.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    write_text(folder / "report.html", page(result))


def page(result: dict[str, Any]) -> str:
    """The report as one HTML page that needs nothing else. What a run skipped is null or missing in `result` and left out here."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8"))
    html = template.render(
        model=result.get("model") or "a model",
        version=result.get("compress"),
        accepted=result.get("accepted"),
        recipe_hash=result.get("recipe_hash"),
        summary=_summary(result),
        figures=_figures(result),
        gates=[_gate(gate) for gate in result.get("gates") or []],
        figure_groups=_plots(result),
        tasks=_tasks(result.get("evaluation") or {}),
        cut=_cut(result),
        experts=experts_told.experts(result.get("transforms") or []),
        outcomes=experts_told.outcomes(result.get("transforms") or []),
        modalities=modalities_told.modalities(result),
        seeing=modalities_told.remark(result),
        transforms=_transforms([record for record in result.get("transforms") or [] if not _special(record)]),
        pruned=_pruned(result),
        factored=_factored([record for record in result.get("transforms") or [] if "rank" in record]),
        detached=[_detaching(record, result) for record in _detached(result)],
        passes=_passes(result),
        engines=[(name, verdict, _verdict_state(verdict)) for name, verdict in (result.get("engines") or {}).items()],
        fallbacks=_fallbacks(result.get("fallbacks") or []),
        verification=_verification(result.get("verification") or {}),
        calibration=_plain(result.get("calibration")),
        protocol=_plain((result.get("evaluation") or {}).get("protocol")),
        allocated=_allocated(result.get("allocation") or {}),
        worst=_worst(result.get("linears") or []),
        ledger=_ledger(result.get("ledger") or []),
        tensors=len(result.get("ledger") or []),
        recipe=yaml.safe_dump(result["recipe"], sort_keys=False) if result.get("recipe") else None,
        environment=_environment(result.get("environment") or {}),
    )
    # ASCII reads the same in whatever encoding the file is written and opened.
    return html.encode("ascii", "xmlcharrefreplace").decode("ascii") + "\n"


def size_text(count: float) -> str:
    """Bytes in decimal units, three digits."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor * 0.9995:
            return f"{_digits(count / factor)}{SPACE}{unit}"
    return f"{count:.0f}{SPACE}B"


def time_text(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 59.95:
        return f"{seconds:.1f}{SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{SPACE}min {rest}{SPACE}s"
    return f"{minutes // 60}{SPACE}h {minutes % 60}{SPACE}min"


def percent_text(share: float) -> str:
    """A share in percent, as many digits as it takes to see it: also what is close to none or to all."""
    far = min(abs(share), abs(1 - share)) * 100
    digits = 1 if far >= 1 or far == 0 else min(1 - math.floor(math.log10(far)), 6)
    return f"{share * 100:.{digits}f}{SPACE}%"


def share_text(share: float) -> str:
    """A share on an axis, where round numbers have no digits to spare."""
    return f"{share * 100:.3g}{SPACE}%" if share >= 1e-6 or share == 0 else f"{share * 100:.0e}{SPACE}%"


def _count(value: float) -> str:
    """A count with its thousands set apart, large ones rounded."""
    return f"{_digits(value / 1e9)} billion" if value >= 1e9 else f"{_digits(value / 1e6)} million" if value >= 1e6 else f"{value:,.0f}"


def _digits(value: float) -> str:
    """Three significant digits, without an exponent for what is shown here."""
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"


def _small(value: float) -> str:
    return f"{value:.3g}"


def _points(value: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    rounded = f"{abs(value) * 100:.2f}"
    return f"{MINUS if value < 0 and float(rounded) else ''}{rounded}{SPACE}points"


def _figure_text(name: str, value: float | None) -> str:
    """A gated figure in its unit."""
    if value is None:
        return "not measured"
    match name:
        case "perplexity_ratio":
            return f"{TIMES}{value:.4f}"
        case "kl":
            return f"{_small(value)}{SPACE}nats"
        case "top1_agreement" | "size_ratio":
            return percent_text(value)
        case "accuracy_drop":
            return _points(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _interval_text(name: str, interval: Iterable[float | None] | None) -> str | None:
    ends = list(interval or ())
    if len(ends) != 2 or None in ends:
        return None
    if ends[0] == ends[1]:
        return "exact"
    # The unit stands once, behind the upper end.
    return f"{_figure_text(name, ends[0]).partition(SPACE)[0]} to {_figure_text(name, ends[1])}"


def _summary(result: dict[str, Any]) -> str:
    """What was done, in a sentence."""
    records = result.get("linears") or []
    caches = {_caching(record) for record in _caches(result)}
    rest = f" Keys and values cached {' and '.join(sorted(caches))}." if caches else ""
    removed = [record["pattern"] for record in result.get("transforms") or [] if record.get("pattern")]
    if removed:
        rest = f" {len(removed):,} linear{'s' if len(removed) > 1 else ''} pruned to {' and '.join(sorted(set(removed)))}.{rest}"
    if not records:
        return f"No linear was quantised.{rest}"
    ways = sorted({f"{_treatment(record)} by {record['pass']}" for record in records})
    return f"{len(records):,} linear{'s' if len(records) > 1 else ''} quantised: {'; '.join(ways[:4])}{' and more' if len(ways) > 4 else ''}.{rest}"


def _special(record: dict[str, Any]) -> bool:
    """Whether what a pass did that quantised nothing is told elsewhere on the page."""
    return any(key in record for key in ("key_error", "sensitivity", "completeness", "pattern", "after", "rank", "loss"))


def _pruned(result: dict[str, Any]) -> list[dict[str, str]]:
    """Pattern and density of every linear that was pruned; those that differ in nothing but the numbers in their names share a row."""
    rows: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in result.get("transforms") or []:
        if "pattern" in record:
            rows.setdefault((re.sub(r"\d+", "#", record["name"]), record["pattern"], record["pass"], record["method"]), []).append(record)
    return [
        {
            "name": _with_ranges(name, [record["name"] for record in members]),
            "pattern": pattern or "given up",
            "by": f"{step}, {method}" + (", inputs reordered" if any(record["permuted"] for record in members) else ""),
            "density": _spread(sorted({record["density"] for record in members}), percent_text),
            "error": _spread([record["error"] for record in members if record.get("error") is not None], percent_text, middle_only=True),
        }
        for (name, pattern, step, method), members in rows.items()
    ]


def _caches(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Records of blocks whose keys and values are quantised, or kept as latents."""
    return [record for record in result.get("transforms") or [] if "key_error" in record]


def _caching(record: dict[str, Any]) -> str:
    if "granularity" in record:
        return f"in FP8, a scale per {record['granularity'].replace('tensor', 'block')}"
    told = f"in {record['latent_bits']} bits, " if record["latent_bits"] < 16 else ""
    return f"as latents, {told}the newest {record['window']} tokens as they are"


def _detached(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Records of passes that looked for weights worth a residual."""
    return [record for record in result.get("transforms") or [] if "completeness" in record]


def _detaching(record: dict[str, Any], result: dict[str, Any]) -> str:
    """What residuals there are and what they are good for, in a few sentences."""
    loss, residuals = record["loss"], sum(linear.get("residuals", 0) for linear in result.get("linears") or [])
    told = f"{residuals:,} weights have a residual beside their code" if residuals else "No weight was given a residual"
    told += f". Loss on the calibration data: {loss['before']:.4f} before quantising, {loss['quantised']:.4f} after"
    told += f", {loss['with residuals']:.4f} with residuals." if residuals else f"; residuals would have made it {loss['with residuals']:.4f}."
    if record["completeness"] is not None:
        told += f" What the change of each weight does to the loss adds up to {percent_text(record['completeness'])} of what all of them did."
    return told


def _treatment(record: dict[str, Any]) -> str:
    if record.get("format", "int") != "int":
        return str(record["format"])
    return f"{record['bits']} bits, group {record['group_size']}{'' if record['symmetric'] else ', asymmetric'}"


def _figures(result: dict[str, Any]) -> list[dict[str, str | None]]:
    """The tiles on top: what was lost, what was gained, what it cost."""
    evaluation, size = result.get("evaluation") or {}, result.get("size") or {}
    tiles = _lost(evaluation)
    before, after = size.get("before_bytes"), size.get("after_bytes")
    if before and after:
        tiles.append(_tile("Size", size_text(before), size_text(after), f"{percent_text(after / before)} of the original"))
    if (bits := size.get("bits_per_weight")) is not None:
        weights = _count(size.get("quantized_weights") or 0)
        tiles.append(_tile("Bits per weight", None, f"{bits:.4g}", f"scales included, over {weights} quantised weights"))
    if (seconds := result.get("seconds")) is not None:
        tiles.append(_tile("Time", None, time_text(seconds), "from start to finish"))
    if (peak := result.get("peak_bytes")) is not None:
        tiles.append(_tile("Peak memory", None, size_text(peak), "of the whole process"))
    return tiles


def _lost(evaluation: dict[str, Any]) -> list[dict[str, str | None]]:
    base, compressed, figures = evaluation.get("baseline") or {}, evaluation.get("compressed") or {}, evaluation.get("figures") or {}
    tiles = []

    def note(name: str) -> str | None:
        text = _interval_text(name, (evaluation.get("intervals") or {}).get(name))
        return f"95{SPACE}%: {text}" if text else None

    if "perplexity" in base and "perplexity" in compressed:
        ratio = _figure_text("perplexity_ratio", figures.get("perplexity_ratio"))
        notes = [ratio, note("perplexity_ratio")]
        tiles.append(_tile("Perplexity", _digits4(base["perplexity"]), _digits4(compressed["perplexity"]), "; ".join(filter(None, notes))))
    for key in [key for key in evaluation if key.startswith("without_")]:
        what, without = key.removeprefix("without_").replace("_", " "), evaluation[key]
        told = f"what engines lose that leave {what} out; KL divergence {_figure_text('kl', without.get('kl'))}"
        tiles.append(_tile(f"Perplexity without {what}", None, _digits4(without["perplexity"]), told))
    if figures.get("kl") is not None:
        tiles.append(_tile("KL divergence", None, _figure_text("kl", figures["kl"]), note("kl")))
    if figures.get("top1_agreement") is not None:
        tiles.append(_tile("Top-1 agreement", None, percent_text(figures["top1_agreement"]), note("top1_agreement")))
    if base.get("accuracy") is not None and compressed.get("accuracy") is not None:
        lost = f"lost {_figure_text('accuracy_drop', figures.get('accuracy_drop'))}"
        notes = [lost, note("accuracy_drop")]
        tiles.append(_tile("Accuracy", percent_text(base["accuracy"]), percent_text(compressed["accuracy"]), "; ".join(filter(None, notes))))
    return tiles


def _digits4(value: float) -> str:
    return f"{value:.4g}" if value < 1e4 else f"{value:,.0f}"


def _tile(name: str, before: str | None, value: str, note: str | None) -> dict[str, str | None]:
    return {"name": name, "before": before, "value": value, "note": note}


def _gate(gate: dict[str, Any]) -> dict[str, Any]:
    name, value, bound = gate["name"], gate.get("value"), gate.get("bound") or {}
    least, most = bound.get("min"), bound.get("max")
    limits = [f"at {side} {_figure_text(name, limit)}" for side, limit in (("least", least), ("most", most)) if limit is not None]
    interval = gate.get("interval") or [None, None]
    drawing = None
    if value is not None:
        ends = (value, value) if None in interval else (interval[0], interval[1])
        drawing = plots.against_bound(value, ends, (least, most), gate["passed"], f"{_figure_text(name, value)}, {' and '.join(limits)}")
    return {
        "name": GATE_NAMES.get(name, name),
        "value": _figure_text(name, value),
        "bound": ", ".join(limits),
        "interval": _interval_text(name, interval),
        "passed": gate["passed"],
        "noise": value is not None and not gate.get("certain", True),
        "drawing": drawing,
    }


def _tasks(evaluation: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Every lm-eval figure before and after."""
    before, after = ((evaluation.get(side) or {}).get("tasks") or {} for side in ("baseline", "compressed"))
    return [
        (task, metric, f"{value:.4g}", f"{after[task][metric]:.4g}")
        for task, metrics in before.items()
        for metric, value in metrics.items()
        if metric in after.get(task, {})
    ]


def _cut(result: dict[str, Any]) -> list[dict[str, str]]:
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
            "before": _spread(sorted({record["before"] for record in members}), str),
            "after": _spread(sorted({record["after"] for record in members}), str),
        }
        for (step, method, kind), members in rows.items()
    ]


def _transforms(records: list[dict[str, Any]]) -> list[dict[str, str]]:
    """What passes did to tensors that they did not quantise, a row per pass and kind."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        rows.setdefault((record["pass"], record.get("kind") or ""), []).append(record)
    return [
        {
            "pass": step,
            "kind": kind,
            "count": f"{len(members):,}",
            "alpha": _spread([record["alpha"] for record in members if record.get("alpha") is not None], lambda value: f"{value:g}"),
            "error": f" {ARROW} ".join(
                _spread([record["error"][end] for record in members if record.get("error")], percent_text, middle_only=True) for end in (0, 1)
            ).strip(f"{ARROW} "),
            "clipped": _spread([record["clipped"] for record in members if record.get("clipped") is not None], percent_text),
        }
        for (step, kind), members in rows.items()
    ]


def _factored(records: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Ranks and what they lose, a row per method and kind of linear."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        rows.setdefault((record["method"], record["kind"]), []).append(record)
    return [
        {
            "method": method,
            "kind": kind,
            "count": f"{len(members):,}",
            "before": _spread(sorted({record["rank"][0] for record in members}), str),
            "after": _spread([record["rank"][1] for record in members], str),
            "error": _spread([record["error"] for record in members], share_text),
        }
        for (method, kind), members in rows.items()
    ]


def _spread(values: list[float], text: Callable[[float], str], *, middle_only: bool = False) -> str:
    """A few values in order, or the ends and the middle of many."""
    if not values:
        return ""
    if middle_only:
        return text(median(values))
    if len(values) <= FEW:
        return ", ".join(map(text, values))
    return f"{text(min(values))} to {text(max(values))}, median {text(median(values))}"


def _passes(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Time and memory of each pass, and the time of all the rest."""
    passes, total = result.get("passes") or [], result.get("seconds")
    longest = total or max((step["seconds"] for step in passes), default=0) or 1
    rows = [{"name": step["name"], "seconds": step["seconds"], "peak": size_text(step["peak_bytes"])} for step in passes]
    if passes and total is not None:
        rest = max(total - sum(step["seconds"] for step in passes), 0.0)
        rows.append({"name": "everything else", "seconds": rest, "peak": size_text(result["peak_bytes"]) if result.get("peak_bytes") else ""})
    return [row | {"time": time_text(row["seconds"]), "share": round(100 * row["seconds"] / longest, 1)} for row in rows]


def _fallbacks(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Linears with the reason a pass had to make do: those seen at once, those listed behind them, and how many more there are."""
    listed = [(record["name"], record["fallback"]) for record in records[:LISTED]]
    return {"first": listed[:AT_ONCE], "rest": listed[AT_ONCE:], "count": len(records), "unlisted": len(records) - len(listed)}


def _verdict_state(verdict: str) -> str:
    return "good" if verdict.startswith("loads") else "bad" if verdict.startswith("refuses") else "partly"


def _verification(verification: dict[str, Any]) -> list[str]:
    """How the artifact was reopened, in sentences."""
    told = []
    if (tensors := verification.get("tensors")) is not None:
        told.append(f"All {tensors:,} tensors were read back from disk and equal, bit for bit, what was meant to be written.")
    if count := verification.get("weights_unpacked_by_compressed_tensors"):
        told.append(f"The compressed-tensors library unpacked {count:,} quantised weights to exactly the values that were measured.")
    if (difference := verification.get("logits_max_difference")) is not None:
        differ = f"differ by at most {_small(difference)} of the largest logit" if difference else "equal those of the measured model exactly"
        told.append(f"Plain transformers loaded the whole artifact; its logits {differ}.")
        if left_out := " and ".join(what for what in LEFT_OUT if verification.get(f"{what}_left_out")):
            told.append(f"It leaves {left_out} out; it was compared with the measured model without.")
    elif verification.get("mode"):
        told.append("The artifact was not loaded as a whole; the tensors were compared one at a time.")
    if pruned := verification.get("pruned_linears"):
        left = percent_text(verification["pruned_density"])
        told.append(f"In the files, all {pruned:,} pruned linears keep their pattern; {left} of their weights are left.")
    known = {
        "pruned_linears",
        "pruned_density",
        "mode",
        "tensors",
        "weights_unpacked_by_compressed_tensors",
        "logits_max_difference",
        *(f"{what}_left_out" for what in LEFT_OUT),
    }
    return told + [f"{key.replace('_', ' ')}: {_value(value)}" for key, value in verification.items() if key not in known]


def _plain(mapping: dict[str, Any] | None) -> list[tuple[str, str]]:
    return [(key.replace("_", " "), _value(value)) for key, value in (mapping or {}).items() if value is not None]


def _value(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else _small(value) if isinstance(value, float) else str(value)


def _environment(environment: dict[str, Any]) -> list[tuple[str, str]]:
    rest = {key: value for key, value in environment.items() if key != "versions"}
    return [(name, str(value)) for name, value in (environment.get("versions") or {}).items()] + _plain(rest)


def _worst(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    known = sorted((record for record in records if record.get("error") is not None), key=lambda record: -record["error"])
    return [(record["name"], percent_text(record["error"])) for record in known[:10]]


def _ledger(ledger: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tensors that differ in nothing but the numbers in their names share a row: 18,000 experts make a few dozen."""
    rows: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for item in ledger:
        key = (re.sub(r"\d+", "#", item["name"]), tuple(item.get("shape") or ()), item.get("dtype"), item["action"], item["why"])
        rows.setdefault(key, []).append(item)
    return [
        {
            "key": key[0],
            "name": _with_ranges(key[0], [item["name"] for item in items]),
            "count": len(items),
            "shape": f" {TIMES} ".join(f"{side:,}" for side in key[1]) or "scalar" if items[0].get("shape") is not None else "",
            "dtype": key[2] or "",
            "bytes": size_text(sum(_tensor_bytes(item) for item in items)) if items[0].get("shape") is not None else "",
            "action": key[3],
            "why": key[4],
        }
        for key, items in rows.items()
    ]


def _with_ranges(pattern: str, names: list[str]) -> str:
    """`pattern` with every # replaced by the numbers that stand there in `names`."""
    columns = zip(*(map(int, re.findall(r"\d+", name)) for name in names), strict=True)
    texts = iter([_ranges(sorted(set(column))) for column in columns])
    return re.sub("#", lambda _: next(texts), pattern)


def _ranges(numbers: list[int]) -> str:
    """Numbers in ascending order, neighbours as ranges; in braces if there are several."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(low) if low == high else f"{low}{DASH}{high}" for low, high in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"


def _tensor_bytes(item: dict[str, Any]) -> int:
    elements: int = math.prod(item["shape"])
    return elements * DTYPE_BITS.get(item["dtype"], 8) // 8


def place(name: str, block: int) -> Place:
    """What a linear's name says: `model.layers.3.mlp.experts.17.up_proj` is kind `up_proj` of `mlp.experts`, expert 17."""
    local = name.partition(f".{block}.")[2] or name
    if match := re.fullmatch(r"(.+?)\.(\d+)\.(.+)", local):
        return Place(block, match[1], match[3], int(match[2]))
    parts = local.split(".")
    last = len(parts) - (2 if parts[-1].isdigit() else 1)  # of two factors both have the name of the linear they were
    return Place(block, ".".join(parts[:last]), ".".join(parts[last:]), None)


def _plots(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Plots with titles, captions and legends; those that have nothing to show are left out."""
    records = [(place(record["name"], record["block"]), record) for record in result.get("linears") or []]
    drawn = [_allocation_plot(result.get("allocation") or {}), _size_plot(result), _bits_plot(records, result.get("ledger") or [])]
    if records:
        numbers = [where.block for where, _ in records]
        blocks = range(min(numbers), max(numbers) + 1)
        drawn = [*_error_plots(records, blocks), *drawn, _tokens_plot(records, blocks, result), _damp_plot(records, blocks, result)]
    return [each for each in [*drawn, _cache_plot(_caches(result))] if each]


def _cache_plot(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What rounding or projecting takes from keys and values in each block."""
    if not records:
        return None
    blocks = [record["block"] for record in records]
    series = [_series(side, {record["block"]: [record[f"{side[:-1]}_error"]] for record in records}) for side in ("keys", "values")]
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
        series = {panel: [_series(kind, values) for kind, values in kinds.items()] for panel, kinds in panels.items()}
        every = [each for members in series.values() for each in members]
        domain = plots.round_domain(value for each in every for ends in (each.lows, each.highs) for value in ends.values())
        what = "outputs, on calibration data" if step == "gptq" else "weights"
        for panel, members in series.items():
            caption = f"Squared error of a linear's {what}, as a share of their sum of squares; pass {step}."
            if any(each.lows != each.highs for each in members):
                caption += " Lines are medians over the experts of a block, bands reach from the least to the largest."
            title = f"Relative error of {panel or 'the linears'}"
            svg = plots.along_blocks(members, blocks, domain, "relative squared error" + (", log scale" if domain[2] else ""), share_text, title)
            drawn.append(_plot(title, svg, caption))
    return drawn


def _series(kind: str, values: dict[int, list[float]]) -> plots.Series:
    ordered = {block: values[block] for block in sorted(values)}
    return plots.Series(
        kind,
        {block: median(each) for block, each in ordered.items()},
        {block: min(each) for block, each in ordered.items()},
        {block: max(each) for block, each in ordered.items()},
    )


def _allocation_plot(plan: dict[str, Any]) -> dict[str, Any] | None:
    """The least loss predicted at each size, with what was chosen and what uniform bits would have been."""
    curve = [(size, loss) for size, loss in plan.get("curve") or [] if loss > 0]
    if len(curve) < 2:
        return None
    marks = [
        plots.Mark(each["bits_per_weight"], each["predicted"], f"{each['bits']} bits", False) for each in plan["uniform"] if each["predicted"] > 0
    ]
    marks.append(plots.Mark(plan["figures"]["bits_per_weight"], plan["predicted"], "chosen", True))
    title = "Bits against predicted loss"
    svg = plots.front(curve, marks, ("bits per weight as stored", f"predicted by {plan['score']}"), _small, title)
    caption = f"The least that the scores {plan['score']} of {len(plan['units'])} units predict within each size, and uniform bits beside it."
    if plan["measured"]:
        found = "; ".join(f"{name} {_small(value)}" for name, value in plan["measured"].items())
        caption += f" Divergence measured with plain rounding, nats: {found}."
    if plan["other_model"]:
        caption += " The scores were measured on another model."
    return _plot(title, svg, caption, [("loud", "chosen"), ("c2", "the same bits everywhere")])


def _allocated(plan: dict[str, Any]) -> dict[str, Any]:
    """A row per unit: weights, bits, and what each option was predicted to cost."""
    rows = [
        (unit["name"], _count(unit["weights"]), unit["bits"], [_small(unit["scores"][bits]) for bits in sorted(unit["scores"], key=int)])
        for unit in plan.get("units") or []
    ]
    return {"score": plan.get("score"), "options": sorted(plan["units"][0]["scores"], key=int) if rows else [], "rows": rows}


def _size_plot(result: dict[str, Any]) -> dict[str, Any] | None:
    """Bytes by what happened to them. What is kept is copied byte for byte, so the rest of the artifact is the quantised part."""
    size = result.get("size") or {}
    before, after = size.get("before_bytes"), size.get("after_bytes")
    if not before or not after:
        return None
    kept: dict[tuple[str, str], float] = {}
    away = {"dropped": 0, "added": 0}
    for item in result.get("ledger") or []:
        action = item["action"]
        if action in away:
            away[action] += _tensor_bytes(item) if item.get("shape") is not None else 0
        elif action != "quantized":
            part = PARTS.get(item["why"], KEPT_IN_BLOCKS) if action == "kept" else REWRITTEN
            kept[part] = kept.get(part, 0) + _tensor_bytes(item)
    same = sum(kept.values())
    if same + away["added"] > after:
        kept, same, away = {}, 0, dict.fromkeys(away, 0)
    quantised = ("quantised linears" if kept else "all weights", "c0")
    ends = (("before", before, ("dropped", "away")), ("after", after, ("added", "c4")))
    rows = [
        (name, [(*part, value) for part, value in [(quantised, total - same - away[one[0]]), *kept.items(), (one, away[one[0]])] if value > 0])
        for name, total, one in ends
    ]
    legend = list(dict.fromkeys((shade, part) for _, parts in rows for part, shade, _ in parts))
    return _plot("Size before and after", plots.stacked(rows, size_text, "Size before and after"), "Bytes of all tensors.", legend)


def _bits_plot(records: list[tuple[Place, dict[str, Any]]], ledger: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Which bits each kind of linear has in each block, kept ones too."""
    cells: dict[str, dict[int, set[tuple[str, str]]]] = {}
    for where, record in records:
        cell = (f"b{record['bits']}", _treatment(record))
        cells.setdefault(_row_name(where), {}).setdefault(where.block, set()).add(cell)
    for item in ledger:
        if item["action"] == "kept" and item["why"] == "no pass takes this linear" and (match := re.search(r"\.(\d+)\.", item["name"])):
            where = place(item["name"].removesuffix(".weight"), int(match[1]))
            cells.setdefault(_row_name(where), {}).setdefault(where.block, set()).add(("kept", f"{item['dtype'].lower()}, kept"))
    if not cells:
        return None
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
        members.setdefault(where.block, []).append(f"{_row_name(where)}{number}: {_small(damp)}")
    notes = {block: "\n".join(each[:8] + ([f"and {len(each) - 8} more"] if len(each) > 8 else [])) for block, each in members.items()}
    title = "Raised damping"
    line = (max(asked), f"asked for: {_small(max(asked))}")
    svg = plots.dots_along_blocks(dots, blocks, line, "share of the Hessian's mean diagonal, log scale", _small, notes, title)
    return _plot(title, svg, f"{len(raised):,} linears could be factored only with more damping than the recipe asks for.")
