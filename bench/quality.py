"""Quality beside the rivals: perplexity of one model after each tool, on the same calibration and evaluation tokens.

    python bench/quality.py --model DIR --calibration TEXT --eval TEXT --venvs DIR --json quality.json

Every tool reads the same token windows from one file, and every result is evaluated by the same script (rivals/perplexity.py,
where the protocol stands). A rival that is not installed or that fails is a row of the table like any other.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness
import yaml
from rich.console import Console
from rich.table import Table
from rivals.protocol import VARIANTS

OURS = "ours"


@dataclass(frozen=True)
class Cell:
    """One row of the table: what was done to the model, by whom."""

    tool: str
    method: str
    bits: int
    group_size: int
    symmetric: bool


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint directory, or demo:NAME for a model inside this project")
    parser.add_argument("--calibration", type=Path, required=True, help="text file, plain or .xz")
    parser.add_argument("--eval", type=Path, nargs="+", required=True, help="text files, plain or .xz")
    parser.add_argument("--venvs", type=Path, default=os.environ.get("COMPRESS_RIVALS"), help="the rivals' environments (or $COMPRESS_RIVALS)")
    parser.add_argument("--json", type=Path, required=True, help="where the numbers go")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--symmetric", choices=("both", "yes", "no"), default="both")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens per window, of calibration and evaluation")
    parser.add_argument("--windows", type=int, help="evaluate on the first so many windows only")
    parser.add_argument("--seeds", type=int, default=1, help="repeat with so many draws of the calibration windows")
    parser.add_argument("--variants", nargs="+", default=["default", "mse"], help="of the rivals; 'all' for every one")
    parser.add_argument("--rival-dtype", choices=("auto", "float32"), default="auto", help="what the rivals compute in; auto: as the checkpoint")
    parser.add_argument("--rivals", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--passes", nargs="*", default=["rtn", "gptq"], help="ours; with options as NAME={key: value} (YAML), if any")
    return parser.parse_args()


def cells(arguments: argparse.Namespace) -> list[Cell]:
    """Every row there will be, whether its tool is installed or not."""
    methods = [
        (tool, variant) for tool in arguments.rivals for variant in VARIANTS[tool] if variant in arguments.variants or "all" in arguments.variants
    ] + [(OURS, name) for name in arguments.passes]
    grids = {"both": (True, False), "yes": (True,), "no": (False,)}[arguments.symmetric]
    return [
        Cell(tool, method, bits, arguments.group_size, symmetric)
        for bits, symmetric, (tool, method) in itertools.product(arguments.bits, grids, methods)
    ]


def evaluate(python: Path | str, model: Path, windows: list[Path]) -> dict[str, Any]:
    """Losses by evaluation text, or an error, of the checkpoint in `model`, read in the environment of `python`."""
    done = harness.run([python, harness.BENCH / "rivals" / "perplexity.py", "--model", model, "--windows", *windows])
    losses = {Path(line["file"]).stem: line for line in harness.json_lines(done.stdout) if "perplexity" in line}
    if done.returncode or len(losses) != len(windows):
        return {"error": f"evaluation: {done.error()}"}
    return {"losses": losses}


def command(cell: Cell, python: Path | str, model: Path, out: Path, tokens: Path, arguments: argparse.Namespace) -> list[Any]:
    """The command that lets the tool of `cell` write its checkpoint to `out`."""
    grid = {"bits": cell.bits, "group_size": cell.group_size, "symmetric": cell.symmetric}
    if cell.tool != OURS:
        return harness.rival_command(Path(python), cell.tool, model, tokens, out, variant=cell.method, dtype=arguments.rival_dtype, **grid)
    name, _, more = cell.method.partition("=")
    options = grid | (yaml.safe_load(more) if more else {})
    recipe = tokens.with_name("recipe.yaml")
    harness.write_recipe(recipe, name, options, tokens, arguments.samples, arguments.length)
    return harness.our_command(recipe, model, out)


def measure(cell: Cell, quantise: list[Any], python: Path | str, out: Path, windows: list[Path]) -> dict[str, Any]:
    """Quantise and evaluate once: cost, bytes of the tensors and losses, or the error that stopped it."""
    done = harness.run(quantise)
    if done.returncode not in (harness.OUR_SUCCESS if cell.tool == OURS else (0,)):
        return {"error": done.error()}
    size = sum(file.stat().st_size for file in out.rglob("*.safetensors"))
    return {"cost": done.cost(), "tensor_bytes": size} | evaluate(python, out, windows)


def summarise(runs: list[dict[str, Any]], baseline: dict[str, Any]) -> dict[str, Any]:
    """Mean and range over the seeds that worked, by evaluation text, beside the baseline."""
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


def show(rows: list[dict[str, Any]], baseline: dict[str, Any], seeds: int) -> None:
    """Print the table: one row per cell, three columns per evaluation text."""
    table = Table(title=f"mean over {seeds} calibration seed(s), min-max in brackets" if seeds > 1 else None)
    for heading in ("tool", "method", "bits", "group", "grid", "MB"):
        table.add_column(heading, overflow="fold")
    for heading in (part for text in baseline for part in (f"{text}: ppl", "x baseline", "excess loss")):
        table.add_column(heading, justify="right")
    numbers = [part for base in baseline.values() for part in (f"{base['perplexity']:.3f}", "1", "0")]
    table.add_row("-", "baseline", "16", "-", "-", "", *numbers)
    for row in rows:
        cell, numbers, size = row["cell"], [], ""
        for value in row["summary"].values():
            low, high = value["excess_loss_range"]
            spread = f" [{low:.4f}-{high:.4f}]".replace("[", r"\[") if seeds > 1 else ""
            numbers += [f"{value['perplexity']:.3f}", f"{value['ratio']:.4f}", f"{value['excess_loss']:.4f}{spread}"]
        if row["summary"]:
            size = f"{statistics.mean(run['tensor_bytes'] for run in row['runs'] if 'losses' in run) / 1e6:.2f}"
        else:
            numbers = [row["status"]]
        grid = "sym" if cell["symmetric"] else "asym"
        table.add_row(cell["tool"], cell["method"], str(cell["bits"]), str(cell["group_size"]), grid, size, *numbers)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def main() -> None:
    from transformers import AutoTokenizer  # here, so that --help answers at once

    arguments = parse_arguments()
    demo = arguments.model.removeprefix("demo:")
    model = harness.BENCH.parent / "compress" / "demo" / demo if demo != arguments.model else Path(arguments.model).absolute()
    pythons = {tool: harness.venv_python(arguments.venvs, tool) for tool in arguments.rivals}
    stamp = harness.stamp(pythons)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows: dict[Cell, list[dict[str, Any]]] = {cell: [] for cell in cells(arguments)}
    with tempfile.TemporaryDirectory(prefix="quality-") as name:
        work = Path(name)
        hashes, windows = {}, []
        for text in arguments.eval:
            windows.append(work / f"{text.name.split('.')[0]}.jsonl")
            cut = harness.consecutive_windows(harness.read_text(text), tokenizer, arguments.length, arguments.windows)
            hashes[windows[-1].stem] = harness.write_windows(windows[-1], cut)
        first = evaluate(sys.executable, model, windows)
        if "error" in first:
            raise SystemExit(f"baseline: {first['error']}")
        baseline = first["losses"]
        calibration = harness.read_text(arguments.calibration)
        for seed in range(arguments.seeds):
            tokens = work / f"calibration-{seed}.jsonl"
            drawn = harness.random_windows(calibration, tokenizer, arguments.samples, arguments.length, seed)
            hashes[tokens.stem] = harness.write_windows(tokens, drawn)
            for cell, runs in rows.items():
                python = sys.executable if cell.tool == OURS else pythons[cell.tool]
                if python is None:
                    continue
                out = work / "out"
                quantise = command(cell, python, model, out, tokens, arguments)
                result = {"seed": seed} | measure(cell, quantise, python, out, windows)
                shutil.rmtree(out, ignore_errors=True)
                runs.append(result)
                print(f"seed {seed} {cell}: {result.get('error', 'done')}", file=sys.stderr)
    report = [
        {
            "cell": asdict(cell),
            "status": next((run["error"] for run in runs if "error" in run), "done") if runs else "not installed",
            "summary": summarise(runs, baseline),
            "runs": runs,
        }
        for cell, runs in rows.items()
    ]
    show(report, baseline, arguments.seeds)
    protocol = {
        "model": model.name,
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
    document = {"benchmark": "quality", "stamp": stamp, "protocol": protocol, "baseline": baseline, "results": report}
    arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
