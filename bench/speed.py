"""Marginal cost of one more block, beside the rivals: GPTQ of a random-weight Llama, or of a mixture of experts, wall and CPU seconds.

    python bench/speed.py --tokenizer DIR --venvs DIR --json speed.json
    python bench/speed.py moe --tokenizer DIR --venvs DIR --json speed-moe.json --layers-of 1 2 --pass '{pool: true}'

The cost of a block is the difference of two runs of unlike depth over the difference in blocks, each run a process of its own, so
that imports, loading and saving what every model has fall out. The sides take turns, so that a machine that slows down slows down
for all of them. CPU seconds count the whole process tree and are the figure to trust where the machine is not quiet; wall seconds
are printed with how many cores others kept busy meanwhile.

Rivals compute in the checkpoint's dtype. Where the processor has no bf16 instructions they are several times faster with
--rival-dtype float32, and that is the comparison to make there.
"""

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness
import yaml
from make_random_llama import add_shape_arguments, make, shape_from
from rich.console import Console
from rich.table import Table
from rivals.protocol import GRIDS, INTEGER, METHODS

OURS = "ours"
PRESETS = {"dense": "0.9b", "moe": "moe"}
RIVALS = [tool for tool, methods in METHODS.items() if "gptq" in methods]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", nargs="?", choices=PRESETS, default="dense", help="chooses the preset")
    add_shape_arguments(parser, preset=None)
    parser.add_argument("--venvs", type=Path, default=os.environ.get("COMPRESS_RIVALS"), help="the rivals' environments (or $COMPRESS_RIVALS)")
    parser.add_argument("--json", type=Path, required=True, help="where the numbers go")
    parser.add_argument("--rivals", nargs="*", default=RIVALS, choices=RIVALS)
    parser.add_argument("--pass", dest="options", default="{}", help="more options of our gptq pass, as YAML")
    parser.add_argument("--grid", choices=INTEGER, default="w4g128")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--layers-of", type=int, nargs="+", default=(2, 4), metavar="BLOCKS", help="blocks of the two runs; of one, to take its whole cost"
    )
    parser.add_argument("--rival-dtype", choices=("auto", "float32"), default="auto", help="what the rivals compute in")
    arguments = parser.parse_args()
    arguments.preset = arguments.preset or PRESETS[arguments.kind]
    return arguments


def commands(arguments: argparse.Namespace, pythons: dict[str, Path | None], work: Path) -> dict[str, Any]:
    """For every side that is installed, a function from (model, out) to the command that quantises it."""
    tokens = work / "tokens.jsonl"
    harness.write_windows(tokens, harness.random_ids(arguments.samples, arguments.length))
    options = harness.our_grid(GRIDS[arguments.grid]) | yaml.safe_load(arguments.options)
    recipe = harness.write_recipe(work / "recipe.yaml", [{"gptq": options}], tokens, arguments.samples, arguments.length)
    sides: dict[str, Any] = {OURS: lambda model, out: harness.our_command(recipe, model, out)}
    for tool, python in pythons.items():
        if python:
            sides[tool] = lambda model, out, tool=tool, python=python: harness.rival_command(
                python, tool, model, tokens, out, dtype=arguments.rival_dtype, grid=arguments.grid, method="gptq"
            )
    return sides


def measure(command: list[str | Path], side: str, out: Path) -> dict[str, Any]:
    """One run's cost, or its error; what it wrote is removed."""
    done = harness.run(command)
    shutil.rmtree(out, ignore_errors=True)
    if done.returncode not in (harness.OUR_SUCCESS if side == OURS else (0,)):
        return {"error": done.error()}
    return done.cost()


def marginal(runs: dict[int, list[dict[str, Any]]], key: str) -> dict[str, Any]:
    """Cost of a block by repeat and in the median, of `key` ("seconds" or "cpu_seconds"); {} unless every run worked.

    Of one depth it is that of the whole run, imports, loading and saving included.
    """
    if len(runs) == 1:
        ((layers, several),) = runs.items()
        each = [run[key] / layers for run in several if "error" not in run]
        return {"median": statistics.median(each), "each": each} if len(each) == len(several) else {}
    fewer, more = sorted(runs)
    pairs = list(zip(runs[fewer], runs[more], strict=True))
    if any("error" in run for pair in pairs for run in pair):
        return {}
    each = [(many[key] - few[key]) / (more - fewer) for few, many in pairs]
    return {"median": statistics.median(each), "each": each}


def show(sides: dict[str, dict[str, Any]]) -> None:
    """Print one row per side; the ratios are how many times our cost the side's is."""
    table = Table(title="cost of one block, median of the repeats")
    for heading in ("tool", "wall s", "x ours", "CPU s", "x ours", "peak RSS GB", "load", "others' cores"):
        table.add_column(heading, justify="left" if heading == "tool" else "right")
    for tool, side in sides.items():
        if not side.get("seconds"):
            table.add_row(tool, side["status"])
            continue
        numbers = []
        for key in ("seconds", "cpu_seconds"):
            ours = sides[OURS].get(key)
            ratio = f"{side[key]['median'] / ours['median']:.2f}" if ours else "-"
            numbers += [f"{side[key]['median']:.2f}", ratio]
        runs = [run for several in side["runs"].values() for run in several]
        peak = f"{max(run['peak_rss_bytes'] for run in runs) / 1e9:.2f}"
        load, others = (statistics.mean(run[key] for run in runs) for key in ("load_average", "others_cores"))
        table.add_row(tool, *numbers, peak, f"{load:.1f}", f"{others:.2f}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def lead(sides: dict[str, dict[str, Any]], key: str) -> float | None:
    """Cost of the fastest rival over ours, or None where one of the two is missing."""
    rivals = [side[key]["median"] for tool, side in sides.items() if tool != OURS and side.get(key)]
    return min(rivals) / sides[OURS][key]["median"] if rivals and sides[OURS].get(key) else None


def main() -> None:
    arguments = parse_arguments()
    shape = shape_from(arguments)
    pythons = {tool: harness.venv_python(arguments.venvs, tool) for tool in arguments.rivals}
    stamp = harness.stamp(pythons)
    with tempfile.TemporaryDirectory(prefix="speed-") as name:
        work = Path(name)
        models = {layers: work / f"model-{layers}" for layers in arguments.layers_of}
        for layers, model in models.items():
            make(dataclasses.replace(shape, layers=layers), arguments.tokenizer, model)
        ready = commands(arguments, pythons, work)
        runs: dict[str, dict[int, list[dict[str, Any]]]] = {side: {layers: [] for layers in models} for side in ready}
        for repeat in range(arguments.repeats):
            for layers, model in models.items():
                for side, command in ready.items():
                    out = work / "out"
                    runs[side][layers].append(measure(command(model, out), side, out))
                    print(f"repeat {repeat} {side} {layers} layers: {runs[side][layers][-1]}", file=sys.stderr)
    sides: dict[str, dict[str, Any]] = {}
    for tool in (OURS, *pythons):
        if tool not in runs:
            sides[tool] = {"status": "not installed"}
            continue
        errors = [run["error"] for several in runs[tool].values() for run in several if "error" in run]
        figures = {key: marginal(runs[tool], key) for key in ("seconds", "cpu_seconds")}
        sides[tool] = {"status": errors[0] if errors else "done", **figures, "runs": runs[tool]}
    show(sides)
    leads = {key: lead(sides, key) for key in ("seconds", "cpu_seconds")}
    for key, value in leads.items():
        print(f"fastest rival / ours, {key}: {'not known' if value is None else f'{value:.2f}'}")
    protocol = {
        "shape": dataclasses.asdict(shape) | {"layers": list(arguments.layers_of)},
        "grid": arguments.grid,
        "samples": arguments.samples,
        "length": arguments.length,
        "repeats": arguments.repeats,
        "rival_dtype": arguments.rival_dtype,
        "our_options": yaml.safe_load(arguments.options),
    }
    document = {"benchmark": "speed", "stamp": stamp, "protocol": protocol, "fastest_rival_over_ours": leads, "sides": sides}
    arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
