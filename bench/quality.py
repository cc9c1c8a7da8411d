"""Quality beside the rivals: perplexity of one model after each tool, on the same calibration and evaluation tokens.

    python bench/quality.py --model DIR --calibration TEXT --eval TEXT --venvs DIR --json quality.json --only 'w3g128/*'
    python bench/quality.py prune --json pruning.json          # how much each way of pruning loses: bench/pruning.py
    python bench/quality.py moe --json experts.json            # and of doing with fewer experts: bench/experts.py
    python bench/quality.py vlm --json vlm.json                # quantising a model that sees: bench/vision.py
    python bench/quality.py kv --json kv.json                  # caches with fewer channels: bench/kv.py
    python bench/quality.py kv --json kv.json                  # caches with fewer channels: bench/kv.py

Every tool reads the same token windows from one file, and every result is evaluated by the same script (rivals/perplexity.py,
where the protocol stands). A rival that is not installed or that fails is a row of the table like any other. The numbers are
written after every run, and what they hold already is not run again, so a killed bench continues where it was.
"""

import argparse
import fnmatch
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import experts
import harness
import kv
import pruning
import vision
from outliers import plant
from rich.console import Console
from rich.table import Table
from rivals.protocol import DATA_FREE, EIGHT, GRIDS, INTEGER, METHODS

OURS, BASELINE = "ours", "rtn"
TIMEOUT = 24 * 3600.0
"""Seconds one tool may take; some of them do take hours on a machine without an accelerator."""

ROUNDING = ("rtn", "gptq", "autoround")
"""Our passes that are told the grid."""

WEIGHTS_IN_4_BITS = ("nvfp4", "mxfp4")

AVERAGE_3 = {"allocate": {"options": [2, 3, 4], "average_bits": 3.0}}

Passes = list[dict[str, Any]]

RECIPES: dict[str, tuple[tuple[str, ...], Passes]] = {
    BASELINE: ((*INTEGER, *EIGHT, *WEIGHTS_IN_4_BITS), [{"rtn": {}}]),
    "rtn mse": ((*INTEGER, *WEIGHTS_IN_4_BITS), [{"rtn": {"scales": "mse"}}]),
    "gptq": ((*INTEGER, *WEIGHTS_IN_4_BITS), [{"gptq": {}}]),
    "gptq qep": ((*INTEGER, *WEIGHTS_IN_4_BITS), [{"gptq": {"qep": 1.0}}]),
    "awq": (INTEGER, [{"smooth": {"method": "awq"}}, {"rtn": {}}]),
    "smoothquant": (("w8a8",), [{"smooth": {"method": "smoothquant"}}, {"rtn": {}}]),
    "autoround": ((*INTEGER, *WEIGHTS_IN_4_BITS), [{"autoround": {}}]),
    "rtn mse allocated": (("w3g128",), [AVERAGE_3, {"rtn": {"bits": "allocated", "scales": "mse"}}]),
    "gptq qep allocated": (("w3g128",), [AVERAGE_3, {"gptq": {"bits": "allocated", "qep": 1.0}}]),
    "allocate gptq qep": (
        ("mixed-2.5",),  # shapes, which the bench counts and a budget does not, take the rest
        [{"allocate": {"options": [2, 3, 4], "bits_per_weight": 2.495}}, {"gptq": {"bits": "allocated", "group_size": 128, "qep": 1.0}}],
    ),
}
"""Ours: by name, the grids it is a row of and the recipe's passes; those that round are told the grid beside what stands here."""


@dataclass(frozen=True)
class Cell:
    """One row of the table: what was done to the model, by whom."""

    grid: str
    tool: str
    method: str

    @property
    def name(self) -> str:
        """What ``--only`` is matched with."""
        return f"{self.grid}/{self.tool}/{self.method}"

    @property
    def calibrated(self) -> bool:
        """Whether other calibration tokens can give another result."""
        if self.tool == OURS:
            return any(set(step) != {BASELINE} for step in RECIPES[self.method][1])
        return (self.tool, self.method) not in DATA_FREE


CELLS = [
    Cell(grid, tool, method)
    for grid in GRIDS
    for tool, methods in {**METHODS, OURS: {name: grids for name, (grids, _) in RECIPES.items()}}.items()
    for method, grids in methods.items()
    if grid in grids
]
"""Every row there can be, in the order of the table."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint directory, or demo:NAME for a model inside this project")
    parser.add_argument("--calibration", type=Path, required=True, help="text file, plain or .xz")
    parser.add_argument("--eval", type=Path, nargs="+", required=True, help="text files, plain or .xz")
    parser.add_argument("--venvs", type=Path, default=os.environ.get("COMPRESS_RIVALS"), help="the rivals' environments (or $COMPRESS_RIVALS)")
    parser.add_argument("--json", type=Path, required=True, help="where the numbers go; what is there already is kept and not run again")
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="PATTERN", help="rows to run, in this order, as GRID/TOOL/METHOD with * (default: all)"
    )
    parser.add_argument("--retry", action="store_true", help="run again what failed before")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens per window, of calibration and evaluation")
    parser.add_argument("--windows", type=int, help="evaluate on the first so many windows only")
    parser.add_argument("--seeds", type=int, default=3, help="repeat with so many draws of the calibration windows")
    parser.add_argument("--rival-dtype", choices=("auto", "float32"), default="auto", help="what the rivals compute in; auto: as the checkpoint")
    parser.add_argument("--plant-outliers", action="store_true", help="give the model outlier channels first (bench/outliers.py)")
    return parser.parse_args()


def chosen(patterns: Sequence[str]) -> list[Cell]:
    """The rows that match, in the order of the patterns; a pattern without a row is a mistake."""
    found: dict[Cell, None] = {}
    for pattern in patterns:
        matching = [cell for cell in CELLS if fnmatch.fnmatchcase(cell.name, pattern)]
        if not matching:
            raise SystemExit(f"--only {pattern}: no such row; rows are {', '.join(cell.name for cell in CELLS)}")
        found |= dict.fromkeys(matching)
    return list(found)


def evaluate(python: Path | str, model: Path, windows: list[Path]) -> dict[str, Any]:
    """Losses by evaluation text and stored bits per weight, or an error, of the checkpoint in `model`, read by `python`."""
    done = harness.run([python, harness.BENCH / "rivals" / "perplexity.py", "--model", model, "--windows", *windows], TIMEOUT)
    found = harness.json_lines(done.stdout)
    losses = {Path(line["file"]).stem: line for line in found if "perplexity" in line}
    if done.returncode or len(losses) != len(windows):
        return {"error": f"evaluation: {done.error()}"}
    return {"losses": losses} | next(line for line in found if "stored_bits_per_weight" in line)


def our_passes(cell: Cell) -> Passes:
    """The passes of our row `cell`, those that round told the grid."""
    grid = harness.our_grid(GRIDS[cell.grid])
    _, passes = RECIPES[cell.method]
    return [{name: grid | options if name in ROUNDING else options} for step in passes for name, options in step.items()]


def command(cell: Cell, python: Path | str, model: Path, out: Path, tokens: Path, arguments: argparse.Namespace) -> list[Any]:
    """The command that lets the tool of `cell` write its checkpoint to `out`."""
    if cell.tool != OURS:
        return harness.rival_command(Path(python), cell.tool, model, tokens, out, grid=cell.grid, method=cell.method, dtype=arguments.rival_dtype)
    recipe = harness.write_recipe(tokens.with_name("recipe.yaml"), our_passes(cell), tokens, arguments.samples, arguments.length)
    return harness.our_command(recipe, model, out)


def measure(cell: Cell, quantise: list[Any], python: Path | str, out: Path, windows: list[Path]) -> dict[str, Any]:
    """Quantise and evaluate once: cost, bytes of the tensors, bits per weight and losses, or the error that stopped it."""
    done = harness.run(quantise, TIMEOUT)
    if done.returncode not in (harness.OUR_SUCCESS if cell.tool == OURS else (0,)):
        return {"error": done.error()}
    size = sum(file.stat().st_size for kind in ("*.safetensors", "*.pt") for file in out.rglob(kind))
    return {"cost": done.cost(), "tensor_bytes": size} | evaluate(python, out, windows)


def summarise(runs: list[dict[str, Any]], baseline: dict[str, Any]) -> dict[str, Any]:
    """Mean and range over the seeds that worked, by evaluation text, beside the unquantised model."""
    worked = [run["losses"] for run in runs if "losses" in run]
    summary = {}
    for text, base in baseline.items() if worked else ():
        perplexities = [losses[text]["perplexity"] for losses in worked]
        excess = [losses[text]["loss"] - base["loss"] for losses in worked]
        summary[text] = {
            "perplexity": statistics.mean(perplexities),
            "perplexity_range": [min(perplexities), max(perplexities)],
            "ratio": statistics.mean(perplexities) / base["perplexity"],
            "excess_loss": statistics.mean(excess),
            "excess_loss_range": [min(excess), max(excess)],
        }
    return summary


def ratios_to_rtn(rows: Iterable[dict[str, Any]]) -> dict[Cell, dict[str, float]]:
    """Mean excess loss over that of our plain rounding on the same grid, by row and text, where both were measured."""
    excess = {Cell(**row["cell"]): {text: value["excess_loss"] for text, value in row["summary"].items()} for row in rows}
    plain = {cell.grid: losses for cell, losses in excess.items() if (cell.tool, cell.method) == (OURS, BASELINE) and losses}
    return {cell: {text: loss / plain[cell.grid][text] for text, loss in losses.items()} for cell, losses in excess.items() if cell.grid in plain}


def show(rows: list[dict[str, Any]], baseline: dict[str, Any]) -> None:
    """Print the table: one row per cell, four columns per evaluation text."""
    table = Table(title="mean over draws of the calibration windows, min-max in brackets; seconds only mean something on a quiet machine")
    for heading in ("grid", "tool", "method", "draws", "bits/weight", "CPU s"):
        table.add_column(heading, overflow="fold")
    for heading in (part for text in baseline for part in (f"{text}: ppl", "x baseline", "excess loss", "x RTN")):
        table.add_column(heading, justify="right")
    numbers = [part for base in baseline.values() for part in (f"{base['perplexity']:.3f}", "1", "0", "")]
    table.add_row("-", "-", "baseline", "", "", "", *numbers)
    ratios = ratios_to_rtn(rows)
    for row in rows:
        cell = Cell(**row["cell"])
        worked = [run for run in row["runs"] if "losses" in run]
        if not worked:
            table.add_row(cell.grid, cell.tool, cell.method, "", "", "", row["status"])
            continue
        bits = statistics.mean(run["stored_bits_per_weight"] for run in worked)
        seconds = statistics.mean(run["cost"]["cpu_seconds"] for run in worked)
        numbers = []
        for text, value in row["summary"].items():
            low, high = value["excess_loss_range"]
            spread = f" \\[{low:.4f}-{high:.4f}]" if len(worked) > 1 else ""
            ratio = ratios.get(cell, {}).get(text)
            numbers += [f"{value['perplexity']:.3f}", f"{value['ratio']:.4f}", f"{value['excess_loss']:.4f}{spread}"]
            numbers.append("" if ratio is None else f"{ratio:.3f}")
        table.add_row(cell.grid, cell.tool, cell.method, str(len(worked)), f"{bits:.3f}", f"{seconds:.0f}", *numbers)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def opened(path: Path, protocol: dict[str, Any]) -> dict[str, Any]:
    """The document at `path`, or a new one; one that was measured by another protocol is refused."""
    if not path.exists():
        return {"benchmark": "quality", "protocol": protocol, "results": []}
    document: dict[str, Any] = json.loads(path.read_text())
    hashes = document["protocol"]["windows_sha256"] | protocol["windows_sha256"]
    if document["protocol"] | {"windows_sha256": hashes} != protocol | {"windows_sha256": hashes} or any(
        document["protocol"]["windows_sha256"].get(name, digest) != digest for name, digest in protocol["windows_sha256"].items()
    ):
        raise SystemExit(f"{path} was measured by another protocol; write elsewhere, or remove it")
    document["protocol"]["windows_sha256"] = hashes
    return document


def renewed(before: dict[str, Any] | None, now: dict[str, Any]) -> dict[str, Any]:
    """The stamp of this run, with the versions of rivals that only an earlier one found; each result has its own commit."""
    earlier = before["versions"] if before else {}
    return now | {"versions": {tool: found or earlier.get(tool) for tool, found in now["versions"].items()}}


def write(path: Path, document: dict[str, Any], rows: dict[Cell, dict[str, Any]]) -> None:
    """Write the document with `rows`, in the order of the table, in one step, so that a kill leaves the one or the other."""
    order = {cell: place for place, cell in enumerate(CELLS)}
    document["results"] = [row for _, row in sorted(rows.items(), key=lambda item: order.get(item[0], len(order)))]
    written = path.with_name(f"{path.name}.part")
    written.write_text(json.dumps(document, indent=1) + "\n")
    written.replace(path)


def missing(row: dict[str, Any] | None, seed: int, retry: bool) -> bool:
    """Whether the run of `seed` is still to be done."""
    return not any(run["seed"] == seed and not (retry and "error" in run) for run in (row or {"runs": []})["runs"])


def updated(row: dict[str, Any] | None, cell: Cell, run: dict[str, Any] | None, baseline: dict[str, Any]) -> dict[str, Any]:
    """The row of `cell` with one more run, which replaces a failed one of the same seed; None: the tool is not installed."""
    runs = [kept for kept in (row or {"runs": []})["runs"] if run is None or kept["seed"] != run["seed"]] + ([run] if run else [])
    status = next((kept["error"] for kept in runs if "error" in kept), "done") if runs else "not installed"
    return {
        "cell": asdict(cell),
        "calibrated": cell.calibrated,
        "status": status,
        "summary": summarise(runs, baseline),
        "runs": sorted(runs, key=lambda kept: kept["seed"]),
    }


def windows_of(arguments: argparse.Namespace, model: Path, work: Path) -> tuple[list[Path], list[Path], dict[str, str]]:
    """Files of evaluation windows by text and of calibration windows by seed, written to `work`, and the hashes of both."""
    from transformers import AutoTokenizer  # here, so that --help answers at once

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [(work / f"{text.name.split('.')[0]}.jsonl", text) for text in arguments.eval]
    draws = [work / f"calibration-{seed}.jsonl" for seed in range(arguments.seeds)]
    hashes = {}
    for path, text in texts:
        cut = harness.consecutive_windows(harness.read_text(text), tokenizer, arguments.length, arguments.windows)
        hashes[path.stem] = harness.write_windows(path, cut)
    calibration = harness.read_text(arguments.calibration)
    for seed, path in enumerate(draws):
        drawn = harness.random_windows(calibration, tokenizer, arguments.samples, arguments.length, seed)
        hashes[path.stem] = harness.write_windows(path, drawn)
    return [path for path, _ in texts], draws, hashes


def protocol_of(arguments: argparse.Namespace, model: Path, planted: dict[str, Any] | None, hashes: dict[str, str]) -> dict[str, Any]:
    """All that two results have to share to be compared."""
    return {
        "model": model.name,
        "planted_outliers": planted,
        "context": arguments.length,
        "stride": arguments.length,
        "bos": False,
        "arithmetic": "float32",
        "rival_dtype": arguments.rival_dtype,
        "calibration": {
            "text": arguments.calibration.name,
            "samples": arguments.samples,
            "length": arguments.length,
            "windows": "random places by seed, whole words, no BOS",
        },
        "windows_sha256": hashes,
    }


def main() -> None:
    arguments = parse_arguments()
    cells = chosen(arguments.only)
    demo = arguments.model.removeprefix("demo:")
    model = harness.BENCH.parent / "compress" / "demo" / demo if demo != arguments.model else Path(arguments.model).absolute()
    pythons = {tool: harness.venv_python(arguments.venvs, tool) for tool in METHODS} | {OURS: Path(sys.executable)}
    with tempfile.TemporaryDirectory(prefix="quality-") as name:
        work = Path(name)
        windows, draws, hashes = windows_of(arguments, model, work)
        planted = plant(model, work / "planted") if arguments.plant_outliers else None
        source = work / "planted" if planted else model
        document = opened(arguments.json, protocol_of(arguments, model, planted, hashes))
        document["stamp"] = stamp = renewed(document.get("stamp"), harness.stamp({tool: pythons[tool] for tool in METHODS}))
        if "baseline" not in document:
            first = evaluate(sys.executable, source, windows)
            if "error" in first:
                raise SystemExit(f"baseline: {first['error']}")
            document["baseline"] = first["losses"]
        rows = {Cell(**row["cell"]): row for row in document["results"]}
        for (seed, tokens), cell in itertools.product(enumerate(draws), cells):
            python, result = pythons[cell.tool], None
            if python is not None:
                if not missing(rows.get(cell), seed, arguments.retry) or (seed and not cell.calibrated):
                    continue
                quantise = command(cell, python, source, work / "out", tokens, arguments)
                result = {"seed": seed, "commit": stamp["commit"]} | measure(cell, quantise, python, work / "out", windows)
                shutil.rmtree(work / "out", ignore_errors=True)
                print(f"seed {seed} {cell.name}: {result.get('error', 'done')}", file=sys.stderr, flush=True)
            rows[cell] = updated(rows.get(cell), cell, result, document["baseline"])
            write(arguments.json, document, rows)
    show(document["results"], document["baseline"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["prune"]:
        pruning.main(sys.argv[2:])
    elif sys.argv[1:2] == ["moe"]:
        experts.main(sys.argv[2:])
    elif sys.argv[1:2] == ["vlm"]:
        vision.main(sys.argv[2:])
    elif sys.argv[1:2] == ["kv"]:
        kv.main(sys.argv[2:])
    else:
        main()
