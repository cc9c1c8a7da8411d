"""Several runs of one model beside each other: which are worth their bytes, and what their recipes do differently.

Knows reports alone. Runs whose figures say nothing about each other - of other models, or measured in other ways - are refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import InputError, Problems
from compress.report import SCHEMA
from compress.report.records import factored, measured
from compress.report.verdict import summary

COSTS = ("after_bytes", "bits_per_weight")
LOSSES = ("perplexity_ratio", "kl")
REPORT = "report.json"
ABSENT = "\u2013"
"""Value of a key that a run's recipe does not have."""


@dataclass(frozen=True)
class Run:
    """A report and the name it has here."""

    name: str
    report: dict[str, Any]


def read(places: Sequence[Path]) -> list[Run]:
    """The reports in artifact folders, or files `report.json` themselves, named by their folders.

    Raises `InputError` with every problem: reports that are missing, listed twice or of another schema, and runs that cannot be compared.
    """
    problems, found, seen = Problems(), list[tuple[Path, dict[str, Any]]](), dict[Path, Path]()
    for place in places:
        path = place / REPORT if place.is_dir() else place
        if (same := path.resolve()) in seen:
            problems.add(str(place), f"is listed twice, first as {seen[same]}", "list each run once")
            continue
        seen[same] = place
        try:
            found.append((path, _report(place, path)))
        except InputError as error:
            problems.absorb(error)
    runs = [Run(name, report) for name, (_, report) in zip(_names([path for path, _ in found]), found, strict=True)]
    _check(runs, problems)
    problems.raise_if_any()
    return runs


def _report(place: Path, path: Path) -> dict[str, Any]:
    """The report at `path`, which was asked for as `place`."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        what = f"has no {REPORT}" if place.is_dir() else "is no file or folder"
        raise InputError.one(str(place), what, "give the folder of a finished run, or its report.json") from error
    except OSError as error:
        raise InputError.one(str(path), f"cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError.one(str(path), "is not JSON", "give the folder of a finished run, or its report.json") from error
    if not isinstance(report, dict) or "recipe_hash" not in report:
        raise InputError.one(str(path), "is no report of compress run", "give the folder of a finished run, or its report.json")
    if (schema := report.get("schema")) != SCHEMA:
        what = f"has schema {schema if schema is not None else 'none'}, this version reads {SCHEMA}"
        raise InputError.one(str(path), what, "run its recipe again, or compare with the version that wrote it")
    return report


def _names(paths: list[Path]) -> list[str]:
    """A name of each report, different from all others: its folder, with as many folders above as that takes."""
    folders = [path.resolve().parent.parts if path.name == REPORT else path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, folders), default=0) + 1):
        names = ["/".join(parts[-depth:]) for parts in folders]
        if len(set(names)) == len(names):
            break
    return names if paths else []


def _check(runs: list[Run], problems: Problems) -> None:
    """Report what makes runs differ that must be alike, each beside the first run."""
    if not runs:
        return
    first, *others = runs
    hashes, protocol = _source(first), _protocol(first)
    for run in others:
        if (mine := _source(run)) != hashes:
            what = f"compressed {run.report.get('model')} ({_short(mine)}), {first.name} {first.report.get('model')} ({_short(hashes)})"
            problems.add(run.name, what, "compare runs of one model")
        theirs = _protocol(run)
        if theirs is None or protocol is None:
            if theirs is not protocol:
                without, with_one = (run, first) if theirs is None else (first, run)
                problems.add(without.name, f"was not evaluated, {with_one.name} was", "run it again with the same evaluate, or leave it out")
            continue
        if differing := [key for key in dict.fromkeys((*protocol, *theirs)) if protocol.get(key) != theirs.get(key)]:
            told = ", ".join(f"{key} {_told(theirs.get(key))} instead of {_told(protocol.get(key))}" for key in differing)
            problems.add(run.name, f"was evaluated otherwise than {first.name}: {told}", "run it again with the same evaluate, or leave it out")


def _source(run: Run) -> list[str]:
    """Hashes of the files of weights that were compressed, whatever they are called."""
    return sorted(((run.report.get("source") or {}).get("sha256") or {}).values())


def _short(hashes: list[str]) -> str:
    return f"sha256 {hashes[0][:12]}" + (f" and {len(hashes) - 1} more" if len(hashes) > 1 else "") if hashes else "no hash"


def _protocol(run: Run) -> dict[str, Any] | None:
    """How a run was evaluated, what retrieval was measured with among it; None, not at all."""
    evaluation = run.report.get("evaluation")
    if not evaluation:
        return None
    told = evaluation.get("retrieval") or {}
    retrieval = {f"retrieval {key}": told[key] for key in ("task", "cases", "seed", "tokens_sha256") if key in told}
    return {**(evaluation.get("protocol") or {}), **retrieval}


def _told(value: object) -> str:
    return "none" if value is None else value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def compare(runs: Sequence[Run]) -> dict[str, Any]:
    """What `compress compare` prints, as plain data.

    ``runs`` in the order given, with size, figures and intervals; ``fronts`` by cost and loss the names of the runs that no other beats;
    ``beaten`` by cost and loss, for every other run the least loss that is no larger (``by``) and whether the two intervals overlap (``noise``);
    ``recipes`` the keys that differ, with a value per run.
    """
    rows = [_row(run) for run in runs]
    fronts: dict[str, dict[str, list[str]]] = {cost: {} for cost in COSTS}
    beaten: dict[str, dict[str, dict[str, Any]]] = {cost: {} for cost in COSTS}
    for cost in COSTS:
        for loss in LOSSES:
            points = [(row[cost], row[loss]) for row in rows]
            on = front(points)
            fronts[cost][loss] = [rows[index]["name"] for index in on]
            beaten[cost][loss] = {
                row["name"]: _beaten(index, rows, points, loss) for index, row in enumerate(rows) if index not in on and None not in points[index]
            }
    return {
        "model": runs[0].report["model"],
        "source": _source(runs[0]),
        "protocol": _protocol(runs[0]),
        "runs": rows,
        "fronts": fronts,
        "beaten": beaten,
        "recipes": differences([run.report.get("recipe") or {} for run in runs]),
        "errors": _errors(runs),
    }


def front(points: Sequence[tuple[float | None, float | None]]) -> list[int]:
    """Numbers of the points, (cost, loss) with less being better, that no other is as good as in both and better than in one; equal points beat
    each other not. What is not known is on no front."""
    known = sorted((cost, loss, index) for index, (cost, loss) in enumerate(points) if cost is not None and loss is not None)
    found, least, at = list[int](), float("inf"), None
    for cost, loss, index in known:
        if loss < least or (cost, loss) == at:
            found.append(index)
            least, at = loss, (cost, loss)
    return sorted(found)


def _beaten(index: int, rows: list[dict[str, Any]], points: list[tuple[float | None, float | None]], loss: str) -> dict[str, Any]:
    """Which run loses least of those that are no larger than one that is on no front."""
    known = [(cost, of_loss, other) for other, (cost, of_loss) in enumerate(points) if cost is not None and of_loss is not None]
    mine = next(cost for cost, _, other in known if other == index)
    by = rows[min((of_loss, other) for cost, of_loss, other in known if cost <= mine)[1]]
    lows, highs = zip(*(row["intervals"].get(loss) or (None, None) for row in (rows[index], by)), strict=True)
    return {"by": by["name"], "noise": None not in (*lows, *highs) and max(lows) <= min(highs)}


def _row(run: Run) -> dict[str, Any]:
    report = run.report
    size, evaluation = report.get("size") or {}, report.get("evaluation") or {}
    figures = evaluation.get("figures") or {}
    return {
        "name": run.name,
        "summary": summary(report),
        "accepted": report.get("accepted"),
        "before_bytes": size.get("before_bytes"),
        "after_bytes": size.get("after_bytes"),
        "bits_per_weight": size.get("bits_per_weight"),
        **{name: figures.get(name) for name in (*LOSSES, "top1_agreement", "accuracy_drop", "retrieval_drop")},
        "intervals": evaluation.get("intervals") or {},
        "gates": report.get("gates") or [],
        "engines": report.get("engines") or {},
        "fallbacks": len(report.get("fallbacks") or []),
        "seconds": report.get("seconds"),
        "peak_bytes": report.get("peak_bytes"),
        "compress": report.get("compress"),
        "environment": report.get("environment") or {},
        "command": report.get("command"),
        "recipe_hash": report["recipe_hash"],
    }


def differences(recipes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The keys of recipes that differ, each with a value per recipe, `ABSENT` where it has none.

    ``passes`` tells their order. Options of a pass are compared among the recipes that have it; a pass that only one has is told as a whole,
    without what it leaves empty or off.
    """
    flat = [_flat({key: value for key, value in each.items() if key != "passes"}) for each in recipes]
    rows = _differing(flat, ABSENT)
    steps = [_steps(each) for each in recipes]
    orders = [", ".join(each) or "none" for each in steps]
    if len(set(orders)) > 1:
        rows.insert(0, {"key": "passes", "values": orders})
    for name in dict.fromkeys(name for each in steps for name in each):
        having = [each[name] for each in steps if name in each]
        if len(having) == 1 < len(recipes):
            told = ", ".join(f"{key}: {_plain(value)}" for key, value in having[0].items() if value not in (None, False, [], {}, ""))
            rows.append({"key": name, "values": [told or "nothing set" if name in each else ABSENT for each in steps]})
        else:
            among = iter(_flat(each) for each in having)
            rows += _differing([next(among) if name in each else None for each in steps], ABSENT, f"{name}.")
    return rows


def _steps(recipe: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Options by pass, in order; the second pass of a name is called so."""
    found: dict[str, dict[str, Any]] = {}
    for step in recipe.get("passes") or []:
        for name, options in step.items():
            again = sum(each.partition(" ")[0] == name for each in found)
            found[f"{name} ({again + 1})" if again else name] = options or {}
    return found


def _differing(flat: Sequence[dict[str, Any] | None], absent: str, before: str = "") -> list[dict[str, Any]]:
    """The keys in which those differ that are there."""
    keys = dict.fromkeys(key for each in flat if each for key in each)
    rows = []
    for key in keys:
        values = [absent if each is None else _plain(each[key]) if key in each else absent for each in flat]
        if len({value for value, each in zip(values, flat, strict=True) if each is not None}) > 1:
            rows.append({"key": f"{before}{key}", "values": values})
    return rows


def _flat(mapping: dict[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in mapping.items():
        found |= _flat(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return found


def _plain(value: Any) -> str:
    """A value of a recipe as it is written there; what is null is as good as not there."""
    return value if isinstance(value, str) else ABSENT if value is None else json.dumps(value)


def _errors(runs: Sequence[Run]) -> dict[str, dict[str, dict[int, float]]]:
    """By what was measured, then by run: the mean over a block's linears of their relative squared errors, by block.

    Errors of outputs and errors of weights do not compare, so a run is only among those whose passes measured the same.
    """
    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    for run in runs:
        linears = run.report.get("linears") or []
        for record in (*linears, *factored(run.report)):
            if record.get("error") is not None:
                of = found.setdefault(measured(record["pass"]), {}).setdefault(run.name, {})
                of.setdefault(record["block"], []).append(record["error"])
    return {
        what: {name: {block: sum(each) / len(each) for block, each in sorted(blocks.items())} for name, blocks in of.items()}
        for what, of in found.items()
    }
