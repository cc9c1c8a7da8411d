"""The page that puts runs of one model beside each other."""

from __future__ import annotations

from typing import Any

from compress import plots
from compress.report.origins import verdict_state
from compress.report.template import render
from compress.report.text import (
    GATE_NAMES,
    SPACE,
    TIMES,
    bound_text,
    count_text,
    figure_text,
    gated_text,
    interval_text,
    percent_text,
    share_text,
    size_text,
    time_text,
)

LONGEST = 18
"""Letters of a name in a plot."""
AXES = {"after_bytes": "size of the artifact", "bits_per_weight": "bits per weight, scales included"}
FIGURES = {"perplexity": "perplexity_ratio", "KL divergence": "kl", "top-1 agreement": "top1_agreement", "accuracy lost": "accuracy_drop"}
LOSSES = {"perplexity_ratio": "perplexity above the source's", "kl": "KL divergence, nats"}


def page(result: dict[str, Any]) -> str:
    """What `compress.compare.compare` gives, as one HTML page that needs nothing else."""
    runs = result["runs"]
    return render(
        "comparison.html.j2",
        title=f"{result['model']} - {len(runs)} runs compared",
        result=result,
        runs=[_run(run, result) | {"shade": plots.shade_of(number)} for number, run in enumerate(runs)],
        names=[(plots.shade_of(number), run["name"]) for number, run in enumerate(runs)],
        retrieval=any(run["retrieval_drop"] is not None for run in runs),
        fronts=_fronts(result),
        errors=_errors(result),
        recipes=[[row["key"], *row["values"]] for row in result["recipes"]],
        gates=_gates(runs),
        engines=_engines(runs),
        costs=[_cost(run) for run in runs],
    )


def worth(name: str, result: dict[str, Any]) -> tuple[str, str]:
    """Whether a run is worth its bytes, and the class of the chip that says so."""
    fronts, beaten = result["fronts"]["after_bytes"], result["beaten"]["after_bytes"]
    best = [loss for loss, names in fronts.items() if name in names]
    lost = {loss: found[name] for loss, found in beaten.items() if name in found}
    if best and not lost:
        return "on the front", "good"
    if not lost:
        return "not measured", "plain"
    by = " and ".join(dict.fromkeys(each["by"] for each in lost.values()))
    noise = all(each["noise"] for each in lost.values())
    text = f"beaten by {by}" + (", within noise" if noise else "")
    return (f"on the front by {' and '.join(map(_loss_name, best))}; else {text}", "noise") if best else (text, "noise" if noise else "plain")


def _loss_name(loss: str) -> str:
    return {"kl": "KL", "perplexity_ratio": "perplexity"}[loss]


def _run(run: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    told, state = worth(run["name"], result)
    before, after = run["before_bytes"], run["after_bytes"]

    def figure(name: str) -> tuple[str, str | None]:
        interval = interval_text(name, run["intervals"].get(name))
        return figure_text(name, run[name]), interval and interval.replace(TIMES, "").partition(SPACE)[0]

    return {
        "name": run["name"],
        "summary": run["summary"],
        "accepted": run["accepted"],
        "gated": bool(run["gates"]),
        "worth": told,
        "state": state,
        "size": size_text(after) if after else "not known",
        "share": percent_text(after / before) if after and before else None,
        "bits": figure_text("bits_per_weight", run["bits_per_weight"]) if run["bits_per_weight"] is not None else "none quantised",
        "figures": [(label, *figure(name)) for label, name in FIGURES.items()],
        "retrieval": figure("retrieval_drop"),
    }


def short(name: str) -> str:
    """A name as long as a plot can bear: its end tells more than its beginning."""
    return name if len(name) <= LONGEST else f"\u2026{name[1 - LONGEST :]}"


def _fronts(result: dict[str, Any]) -> list[dict[str, Any]]:
    drawn = []
    for loss, unit in LOSSES.items():
        shift = 1.0 if loss == "perplexity_ratio" else 0.0
        for cost, axis in AXES.items():
            points = []
            for number, run in enumerate(result["runs"]):
                if run[cost] is None or run[loss] is None:
                    continue
                low, high = run["intervals"].get(loss) or (None, None)
                ends = (low if low is not None else run[loss], high if high is not None else run[loss])
                best = run["name"] in result["fronts"][cost][loss]
                points.append(plots.Point(short(run["name"]), run[cost], run[loss] - shift, (ends[0] - shift, ends[1] - shift), number, best))
            if not points:
                continue
            along = size_text if cost == "after_bytes" else lambda value: f"{value:.3g}"
            up = share_text if shift else lambda value: f"{value:.2g}"
            title = f"{'Perplexity' if shift else 'KL divergence'} against {'size' if cost == 'after_bytes' else 'bits'}"
            svg = plots.scatter(points, (axis, unit), (along, up), title)
            left = len(result["runs"]) - len(points)
            caption = "Filled: no other run is as small and loses as little. Bars are 95 % intervals."
            drawn.append({"title": title, "svg": svg, "caption": caption + (f" {left} without such a figure." if left else ""), "legend": []})
    return drawn


def _errors(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A plot for what was measured, a line for each run, in the colour that the run has everywhere."""
    drawn = []
    numbers_of = {run["name"]: number for number, run in enumerate(result["runs"])}
    for what, runs in result["errors"].items():
        series = [plots.Series(short(name), blocks, blocks, blocks, numbers_of[name]) for name, blocks in runs.items()]
        numbers = [block for blocks in runs.values() for block in blocks]
        domain = plots.round_domain(value for blocks in runs.values() for value in blocks.values())
        title = f"Relative error of {what.partition(',')[0]}"
        unit = "relative squared error" + (", log scale" if domain[2] else "")
        svg = plots.along_blocks(series, range(min(numbers), max(numbers) + 1), domain, unit, share_text, title)
        caption = f"Squared error of linears' {what}, as a share of their sum of squares; mean over a block."
        drawn.append({"title": title, "svg": svg, "caption": caption, "legend": []})
    return drawn


def _gates(runs: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any] | None]]]:
    """A row per gate that any run had, with a cell per run, None where it had no such gate."""
    named = [{gate["name"]: gate for gate in run["gates"]} for run in runs]
    return [
        (
            GATE_NAMES.get(name, name),
            [
                {
                    "passed": gates[name]["passed"],
                    "value": gated_text(name, gates[name].get("value")),
                    "bound": bound_text(name, gates[name].get("bound") or {}),
                    "noise": gates[name].get("value") is not None and not gates[name].get("certain", True),
                }
                if name in gates
                else None
                for gates in named
            ],
        )
        for name in dict.fromkeys(name for gates in named for name in gates)
    ]


def _engines(runs: list[dict[str, Any]]) -> list[tuple[str, list[tuple[str, str] | None]]]:
    names = dict.fromkeys(name for run in runs for name in run["engines"])
    return [
        (name, [(run["engines"][name], verdict_state(run["engines"][name])) if name in run["engines"] else None for run in runs]) for name in names
    ]


def _cost(run: dict[str, Any]) -> list[str]:
    machine = run["environment"]
    about = ", ".join(filter(None, [machine.get("machine"), f"{machine['cpus']} CPUs" if machine.get("cpus") else None]))
    seconds, peak = run["seconds"], run["peak_bytes"]
    versions = (machine.get("versions") or {}).get("torch")
    return [
        run["name"],
        time_text(seconds) if seconds is not None else "not known",
        size_text(peak) if peak is not None else "not known",
        count_text(run["fallbacks"]),
        f"{run['compress'] or 'unknown'}" + (f", torch {versions}" if versions else ""),
        about or "not known",
    ]
