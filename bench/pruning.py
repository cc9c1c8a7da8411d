"""Pruning: what each method loses on the same model, data and number of parameters.

    python bench/quality.py prune --json bench/results/pruning.json
    python bench/quality.py prune --json pruning.json --only 'structured/*' --seeds 1

Every row is a recipe that `compress run` carries out on the model, with calibration samples drawn by each seed in turn; what it loses is the
mean cross-entropy of held-out text after minus before, in nats per token, as the run's own report says it. Rows of one table remove
equally many parameters. What is there already is not run again.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import yaml
from rich.console import Console
from rich.table import Table

CUT = {"keep": {"ffn_channel": 0.73}, "multiple_of": 16}
"""A fifth of the parameters of a block of demo:dense: 208 of 768 channels."""
SHARED = {"keep": {"kv_group": 0.75, "ffn_channel": 0.8125}, "multiple_of": 16, "widths": "per_layer"}
"""As many, from channels and groups of heads, where they are missed least."""
GATES = {"steps": 1000, "batch": 8}
HEALING = {"tokens": 600_000, "batch": 8, "learning_rate": 0.003, "samples": 2560, "held_out": 0.02}
"""Ten minutes of two cores that have nothing else to do, or twice that of one."""

SEARCHED, JUDGED = "search.jsonl", "held.jsonl"

Passes = list[dict[str, Any]]


def structured(method: str, where: dict[str, Any], **options: Any) -> Passes:
    return [{"prune_structured": {"method": method} | where | options}]


def nm(method: str, pattern: str = "2:4", **options: Any) -> Passes:
    return [{"prune_nm": {"method": method, "pattern": pattern} | options}]


ROWS: dict[str, Passes] = {
    **{f"structured/random-{seed}": structured("random", CUT, seed=seed) for seed in range(5)},
    "structured/magnitude": structured("magnitude", CUT),
    "structured/wanda_sp": structured("wanda_sp", CUT),
    "structured/taylor": structured("taylor", CUT),
    "structured/flap": structured("flap", CUT),
    "structured/flap, compensated": structured("flap", CUT, compensate=True),
    "structured/ddp": structured("ddp", CUT, **GATES),
    "structured/ddp, compensated": structured("ddp", CUT, compensate=True, **GATES),
    "per_layer/magnitude": structured("magnitude", SHARED),
    "per_layer/wanda_sp": structured("wanda_sp", SHARED),
    "per_layer/taylor": structured("taylor", SHARED),
    "per_layer/flap": structured("flap", SHARED),
    "per_layer/flap, compensated": structured("flap", SHARED, compensate=True),
    "per_layer/ddp": structured("ddp", SHARED, **GATES),
    "per_layer/ddp, compensated": structured("ddp", SHARED, compensate=True, **GATES),
    "nm/magnitude": nm("magnitude"),
    "nm/wanda": nm("wanda"),
    "nm/ria": nm("ria"),
    "nm/wanda refitted": nm("wanda", refit=True),
    "nm/sparsegpt": nm("sparsegpt"),
    "nm/alps": nm("alps"),
    "nm/sparsegpt 4:8": nm("sparsegpt", "4:8"),
    "nm/sparsegpt 1:4": nm("sparsegpt", "1:4"),
    "healed/sparsegpt": [*nm("sparsegpt"), {"heal": HEALING}],
    "healed/sparsegpt, moving, branch": [*nm("sparsegpt"), {"heal": HEALING | {"mask": "moving", "branch": 16}}],
    "depth/one block of four": [{"prune_depth": {"drop": 1}}],
    **{f"share/flap, {share} kept": structured("flap", {"keep": {"ffn_channel": share}, "multiple_of": 16}) for share in (0.5, 0.875)},
    **{f"low_rank/{method}": [{"low_rank": {"method": method, "keep": 0.8}}] for method in ("svd", "asvd", "lord", "svd_llm")},
}
"""By table and name, the passes of a row."""


@dataclass(frozen=True)
class Bench:
    """A command of quality.py: its name, what it is about, the model that its rows are meant for and, by table and name, the passes of a row."""

    command: str
    about: str
    model: str
    rows: dict[str, Passes]
    data: Callable[[str], tuple[str, str]] = lambda row: ("demo:text", "demo:heldout")
    """What a row is calibrated on, and what it is judged by."""
    source: Callable[[str, str, Path], str] = lambda row, model, work: model
    """The checkpoint that a row is about, made of the model in a folder, if need be."""
    data_free: tuple[str, ...] = ()
    """Rows that another draw of calibration samples does not change."""
    seeds: int = 3
    samples: int = 256
    windows: int = 100
    pairs: Callable[[Path], None] | None = None
    """Writes minimal pairs into a folder: `SEARCHED`, for passes that learn from them, and `JUDGED`, by which all are."""


def parse_arguments(bench: Bench, arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"quality.py {bench.command}", description=bench.about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=bench.model, help="demo:NAME or a checkpoint (the rows are made for the default)")
    parser.add_argument("--json", type=Path, required=True, help="where the numbers go; what is there already is kept and not run again")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="rows to run, as TABLE/NAME with *")
    parser.add_argument("--seeds", type=int, default=bench.seeds, help="draws of the calibration samples")
    parser.add_argument("--samples", type=int, default=bench.samples, help="calibration samples")
    parser.add_argument("--length", type=int, default=256, help="tokens of each, and of each window of the evaluation")
    parser.add_argument("--windows", type=int, default=bench.windows, help="windows of held-out text, or questions")
    return parser.parse_args(arguments)


def run(bench: Bench, row: str, seed: int, arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Loss and size of one run, or an error."""
    passes = bench.rows[row]
    if bench.pairs:
        bench.pairs(work)
        searched = {"pairs": str(work / SEARCHED)}
        passes = [{name: options | searched if "pairs" in options else options for name, options in step.items()} for step in passes]
    calibration, held_out = bench.data(row)
    recipe = {
        "passes": passes,
        "calibration": {"data": calibration, "samples": arguments.samples, "length": arguments.length, "seed": seed},
        "evaluate": {"data": held_out, "context": arguments.length, "windows": arguments.windows},
    }
    if bench.pairs:
        recipe["evaluate"]["pairs"] = str(work / JUDGED)
    path, out = work / "recipe.yaml", work / "out"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    done = harness.run([sys.executable, "-m", "compress", "run", path, bench.source(row, arguments.model, work), "--out", out, "--overwrite"])
    if done.returncode:
        return {"seed": seed, "error": done.error()}
    report = json.loads((out / "report.json").read_text())
    evaluation = report["evaluation"]
    low, high = evaluation["intervals"]["perplexity_ratio"]
    found = {
        "seed": seed,
        "excess_loss": math.log(evaluation["figures"]["perplexity_ratio"]),
        "interval": [math.log(low), math.log(high)],
        "kl": evaluation["figures"]["kl"],
        "after_bytes": report["size"]["after_bytes"],
    }
    found |= {
        "accuracy": evaluation["compressed"]["accuracy"],
        "accuracy_drop": evaluation["figures"]["accuracy_drop"],
        "accuracy_interval": evaluation["intervals"]["accuracy_drop"],
    }
    searched = next((record for record in report["transforms"] if record["pass"] == "eep"), None)
    if searched:
        found |= {"fitness": searched["fitness"], "held_out": searched["held_out"]}
    return found | done.cost()


def show(results: dict[str, Any], rows: dict[str, Passes]) -> None:
    table = Table("table", "method", "draws", "excess loss, nats", "range", "KL", "accuracy", "bytes", "CPU s")
    for name in sorted(results, key=lambda name: list(rows).index(name)):
        worked = [one for one in results[name] if "error" not in one]
        if not worked:
            table.add_row(*name.split("/", 1), "0", results[name][0]["error"][:60])
            continue
        losses = [one["excess_loss"] for one in worked]
        size, seconds = worked[0]["after_bytes"], statistics.mean(one["cpu_seconds"] for one in worked)
        spread = f"{min(losses):.4f}-{max(losses):.4f}"
        kl, drop = (
            f"{statistics.mean(one[key] for one in worked):.4f}" if all(key in one for one in worked) else "" for key in ("kl", "accuracy_drop")
        )
        dropped = f"-{drop}".replace("--", "+")
        table.add_row(
            *name.split("/", 1),
            str(len(worked)),
            f"{statistics.mean(losses):.4f}",
            spread,
            kl,
            dropped if drop else "",
            f"{size:,}",
            f"{seconds:.0f}",
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def main(argv: list[str], bench: Bench | None = None) -> None:
    bench = bench or Bench("prune", __doc__ or "", "demo:dense", ROWS)
    arguments = parse_arguments(bench, argv)
    chosen = [name for name in bench.rows if any(fnmatch.fnmatchcase(name, pattern) for pattern in arguments.only)]
    if not chosen:
        raise SystemExit(f"--only: no such row; rows are {', '.join(bench.rows)}")
    protocol = {name: getattr(arguments, name) for name in ("model", "samples", "length", "windows")} | {
        "data": ", ".join(dict.fromkeys(each for row in bench.rows for each in bench.data(row))),
        "bos": False,
    }
    document: dict[str, Any] = {
        "benchmark": {"prune": "pruning", "moe": "experts", "vlm": "vlm", "kv": "kv"}[bench.command],
        "protocol": protocol,
        "results": {},
    }
    if arguments.json.exists():
        document = json.loads(arguments.json.read_text())
        if document["protocol"] != protocol:
            raise SystemExit(f"{arguments.json} was measured by another protocol; write elsewhere, or remove it")
    document["stamp"] = stamp = harness.stamp({})
    for seed in range(arguments.seeds):
        for name in chosen:
            runs = document["results"].setdefault(name, [])
            if any(one["seed"] == seed and "error" not in one for one in runs) or (seed and name in bench.data_free):
                continue
            with tempfile.TemporaryDirectory(prefix="pruning-") as work:
                found = run(bench, name, seed, arguments, Path(work)) | {"commit": stamp["commit"]}
            document["results"][name] = [one for one in runs if one["seed"] != seed] + [found]
            print(f"seed {seed} {name}: {found.get('error', found.get('excess_loss'))}", file=sys.stderr, flush=True)
            part = arguments.json.with_name(arguments.json.name + ".part")
            part.write_text(json.dumps(document, indent=1) + "\n")
            part.replace(arguments.json)
    show(document["results"], bench.rows)
