"""The report of a run: everything measured, as JSON and as a page. Its parts know records alone, neither models nor weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

from compress.checkpoint import write_text
from compress.report import charts, experts, ledger, modalities, origins, passes, training, verdict
from compress.report.records import special
from compress.report.template import render
from compress.report.text import plain

SCHEMA = 1
"""Raised whenever readers of an older `report.json` would take a newer one for something else."""


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
    transforms, linears = result.get("transforms") or [], result.get("linears") or []
    evaluation = result.get("evaluation") or {}
    gates = [verdict.gate(gate) for gate in result.get("gates") or []]
    return render(
        "page.html.j2",
        title=f"{result.get('model') or 'a model'} - compress report",
        model=result.get("model") or "a model",
        version=result.get("compress"),
        accepted=result.get("accepted"),
        recipe_hash=result.get("recipe_hash"),
        summary=verdict.summary(result),
        verdict=verdict.sentence(result.get("accepted"), gates),
        gates=gates,
        tiles=verdict.tiles(result),
        charts=charts.figures(result),
        tasks=verdict.tasks(evaluation),
        retrieval=charts.retrieval(evaluation),
        cut=passes.cut(result),
        experts=experts.experts(transforms),
        outcomes=training.outcomes(result),
        modalities=modalities.modalities(result),
        seeing=modalities.remark(result),
        transforms=passes.transforms([record for record in transforms if not special(record)]),
        pruned=passes.pruned(result),
        factored=passes.factored(result),
        detached=[passes.detaching(record, result) for record in passes.detached(result)],
        passes=passes.times(result),
        engines=origins.engines(result),
        copies=", ".join(((result.get("recipe") or {}).get("export") or [])[1:]),
        fallbacks=passes.fallbacks(result.get("fallbacks") or []),
        verification=origins.verification(result.get("verification") or {}),
        calibration=plain(result.get("calibration")),
        protocol=plain(evaluation.get("protocol")),
        allocated=ledger.allocated(result.get("allocation") or {}),
        worst=ledger.worst(linears),
        ledger=ledger.rows(result.get("ledger") or []),
        tensors=len(result.get("ledger") or []),
        recipe=yaml.safe_dump(result["recipe"], sort_keys=False) if result.get("recipe") else None,
        command=result.get("command"),
        source=origins.source(result),
        environment=origins.environment(result.get("environment") or {}),
    )
