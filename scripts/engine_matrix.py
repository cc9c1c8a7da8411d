"""Every export in every engine that reads it, for real: writes bench/results/engines.json and docs/engines.md.

    python scripts/engine_matrix.py --venvs $COMPRESS_RIVALS --work FOLDER   # what is in the JSON already is left as it is
    python scripts/engine_matrix.py --create --venvs FOLDER ...              # installs each engine that has no folder there
    python scripts/engine_matrix.py --render                                 # the document alone, from the JSON

A cell is one artifact, written as one layout, in one engine. It runs and agrees with `compress.load`; or what `compress check --engine` says and what
the engine says are both no; everything else is a mismatch, and there may be none.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from typer.testing import CliRunner

from compress import declared, exporting, serving
from compress.checkpoint import Checkpoint
from compress.cli import app
from compress.engines.base import Engine, find, tables
from compress.errors import InputError
from compress.layout import Layout
from compress.recipe import export_names, said_of
from compress.source import demo_model

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "engines.json"
DOCUMENT = ROOT / "docs" / "engines.md"
TOKENS = 64
CHUNK = 12
"""Cells that one process of an engine answers, after which they are written."""
FIRST_WORDS = 240
"""Characters of what an engine says that are told."""
KEPT = ("agrees", "tolerance", "tokens", "tokens_equal", "largest_margin", "prompt_logprob_difference", "inputs", "version", "dtype")
CALIBRATION = {"data": "demo:text", "samples": 16, "length": 128}
SEES_DATA = ("kv_quant", "kv_shrink", "prune_nm", "prune_structured", "low_rank", "prune_experts")
CASES: dict[str, list[dict[str, Any]]] = {
    "16 bits": [],
    "w4 g128": [{"rtn": {"bits": 4, "group_size": 128}}],
    "w4 g32": [{"rtn": {"bits": 4, "group_size": 32}}],
    "w4 g128 asymmetric": [{"rtn": {"bits": 4, "group_size": 128, "symmetric": False}}],
    "w8 g128": [{"rtn": {"bits": 8, "group_size": 128}}],
    "w3 g128": [{"rtn": {"bits": 3, "group_size": 128}}],
    "w2 g64": [{"rtn": {"bits": 2, "group_size": 64}}],
    "w5 g128": [{"rtn": {"bits": 5, "group_size": 128}}],
    "w8 where down, else w4": [
        {"rtn": {"bits": 8, "group_size": 128, "include": ["*.down_proj"]}},
        {"rtn": {"bits": 4, "group_size": 128, "exclude": ["*.down_proj"]}},
    ],
    "w8a8": [{"rtn": {"bits": 8, "group_size": "channel", "activations": "dynamic"}}],
    "w8a8 static": [{"rtn": {"bits": 8, "group_size": "channel", "activations": "static"}}],
    "w4a8": [{"rtn": {"bits": 4, "group_size": 128, "activations": "dynamic"}}],
    "fp8": [{"rtn": {"format": "fp8"}}],
    "fp8, inputs too": [{"rtn": {"format": "fp8", "activations": "dynamic"}}],
    "fp8-block": [{"rtn": {"format": "fp8-block"}}],
    "nvfp4": [{"rtn": {"format": "nvfp4"}}],
    "mxfp4": [{"rtn": {"format": "mxfp4"}}],
    "mxfp8": [{"rtn": {"format": "mxfp8"}}],
    "w4, cache fp8": [{"rtn": {"bits": 4, "group_size": 128}}, {"kv_quant": {"format": "fp8", "granularity": "tensor"}}],
    "w4, cache fp8 per head": [{"rtn": {"bits": 4, "group_size": 128}}, {"kv_quant": {"format": "fp8", "granularity": "head"}}],
    "w4, cache of latents": [{"rtn": {"bits": 4, "group_size": 128}}, {"kv_shrink": {"keep": 0.5, "window": 32, "bits": 4}}],
    "2:4": [{"prune_nm": {"pattern": "2:4", "method": "sparsegpt"}}],
    "2:4, w4": [{"prune_nm": {"pattern": "2:4", "method": "sparsegpt"}}, {"rtn": {"bits": 4, "group_size": 128}}],
    "narrower": [{"prune_structured": {"method": "flap", "keep": {"ffn_channel": 0.75}, "multiple_of": 64}}],
    "low rank": [{"low_rank": {"method": "svd_llm", "keep": 0.8, "store": "factors"}}],
    "half of the experts": [{"prune_experts": {"method": "frequency", "keep": 0.5}}],
}
"""What is done to the model, rounding to nearest throughout: what is asked is who reads it."""
MODELS = ("dense", "moe")
OF_EXPERTS = (
    "16 bits",
    "w4 g128",
    "w4 g128 asymmetric",
    "w8 g128",
    "w3 g128",
    "w8a8",
    "fp8",
    "nvfp4",
    "mxfp4",
    "w4, cache fp8",
    "half of the experts",
)
"""Cases of the model with experts: those in which engines treat experts otherwise."""
EXPORTS = tuple(name for name in export_names() if name not in ("mxfp4", "nm-packed"))
"""mxfp4 is for gpt-oss, of which no trained one ships; nm-packed is for compress alone."""


def artifact(model: str, case: str, work: Path) -> tuple[Path | None, str]:
    """The folder of an artifact, made if it is not there; where it cannot be, None and why."""
    if not CASES[case]:
        return demo_model(f"demo:{model}"), ""
    folder = work / f"{model}-{case.replace(' ', '_').replace(':', '')}"
    if not folder.exists():
        recipe: dict[str, Any] = {"passes": CASES[case], "evaluate": None}
        if any(name in SEES_DATA or "static" in options.values() for step in CASES[case] for name, options in step.items()):
            recipe["calibration"] = CALIBRATION
        file = folder.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(recipe))
        said = CliRunner().invoke(app, ["run", str(file), f"demo:{model}", "--out", str(folder), "--json"]).stdout
        if problems := json.loads(said).get("errors"):
            return None, problems[0]["what"]
    return folder, ""


def exported(folder: Path, target: str) -> tuple[Path | None, str]:
    """The same in another layout; where that has no place for it, None and why."""
    place = folder.with_name(f"{folder.name}-{target}")
    if target == "compressed-tensors":
        return folder, ""
    try:
        if not place.exists():
            exporting.export(folder, {target: place}, Quiet())
    except InputError as error:
        return None, error.problems[0].what
    return place, ""


class Quiet:
    def step(self, name: str, total: int) -> None:
        pass


def said(folder: Path, target: str, engine: Engine) -> str:
    """What is known beforehand."""
    layout = Layout(Checkpoint(folder))
    return engine.verdict(target, said_of(target, layout, declared.schemes(layout), declared.cache(layout)))


def prepared(engine: Engine, work: Path, known: set[tuple[str, ...]]) -> list[dict[str, Any]]:
    """Every cell of one engine that is not `known` yet: what is known beforehand, and where the folder is; or why there is none."""
    rows: list[dict[str, Any]] = []
    for model in MODELS:
        for case in OF_EXPERTS if model == "moe" else [name for name in CASES if "experts" not in name]:
            for target in [name for name in EXPORTS if name in engine.table.READS]:
                if (engine.name, target, model, case) in known or (case == "16 bits" and target != "compressed-tensors"):
                    continue
                row: dict[str, Any] = {"engine": engine.name, "export": target, "model": model, "case": case}
                folder, why = artifact(model, case, work)
                if folder is None:
                    if target == "compressed-tensors":
                        rows.append(row | {"outcome": "not made", "why": why})
                    continue
                place, why = exported(folder, target)
                if place is None:
                    rows.append(row | {"outcome": "not written", "why": why})
                else:
                    rows.append(row | {"said": said(folder, target, engine), "artifact": str(folder), "folder": str(place)})
    return rows


def run(engine: Engine, python: Path, rows: list[dict[str, Any]], timeout: float) -> None:
    """Have an engine answer for each of `rows`, and add what came of it."""
    asked = [serving.ask_for(Path(row["artifact"]), None, TOKENS) for row in rows]
    for dtype in engine.table.DTYPES:
        waiting = [index for index, row in enumerate(rows) if "tokens" not in row]
        requests = [{"folder": rows[index]["folder"], "prompts": asked[index], "max_tokens": TOKENS, "dtype": dtype} for index in waiting]
        for index, answer in zip(waiting, serving.ask_all(engine, python, requests, timeout) if requests else (), strict=True):
            row = rows[index]
            if "error" in answer:
                # What it says first is of the dtype it prefers; others are tried where that does not do.
                row.setdefault("error", {key: first_words(str(value), row["folder"]) for key, value in answer["error"].items()})
                row["version"] = row.get("version") or answer["version"]
                continue
            row.pop("error", None)
            model = serving.meant(Path(row["artifact"]), Path(row["folder"]), engine)
            found = serving.compare(model, asked[index], answer, rounded=serving.is_rounded(Path(row["folder"])))
            row |= {key: value for key, value in found.items() if key in KEPT}
    for row in rows:
        del row["folder"], row["artifact"]
        row["outcome"] = outcome(row)


def first_words(text: str, folder: str) -> str:
    """Of an error, without the folders of this machine; of the log of what died, the line of the error."""
    line = next((line for line in reversed(text.splitlines()) if "Error: " in line), text) if len(text) > FIRST_WORDS else text
    return " ".join(line.replace(folder, "DIR").split())[:FIRST_WORDS]


def outcome(row: dict[str, Any]) -> str:
    """How what is known and what happened go together."""
    no = row["said"].startswith("refuses")
    elsewhere = any(part in row["said"] for part in ("GPU only", "unproven"))
    if "tokens" not in row:
        return "refused" if no else "elsewhere" if elsewhere else "MISMATCH: did not run"
    if no:
        return "MISMATCH: runs" if row["agrees"] else "refused"
    if row["agrees"]:
        return "MISMATCH: runs here" if elsewhere else "agrees"
    return "elsewhere" if "GPU only" in row["said"] else "MISMATCH: differs"


def python_of(name: str, venvs: Path) -> Path:
    """The interpreter of an engine, in a folder named as rivals' are."""
    return venvs / name.replace(".", "") / "bin" / "python"


def create(engine: Engine, venvs: Path) -> None:
    """A virtual environment with an engine, as its file says."""
    environment = os.environ | engine.table.ENVIRONMENT
    python = str(python_of(engine.name, venvs))
    subprocess.run([sys.executable, "-m", "venv", str(Path(python).parents[1])], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", *engine.table.INSTALL], check=True, env=environment)
    if engine.table.REMOVE:
        subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", *engine.table.REMOVE], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venvs", type=Path, default=Path(os.environ.get("COMPRESS_RIVALS", ".")), help="one folder per engine [$COMPRESS_RIVALS]")
    parser.add_argument("--create", action="store_true", help="install what is not there")
    parser.add_argument("--work", type=Path, help="for artifacts, which are kept")
    parser.add_argument("--engine", action="append", choices=list(tables()), help="this one alone; may be repeated")
    parser.add_argument("--again", action="store_true", help="forget what is known of these engines")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for all cells of an engine")
    parser.add_argument("--render", action="store_true", help="write the document alone")
    arguments = parser.parse_args()
    if not arguments.render:
        if arguments.work is None:
            parser.error("--work is needed")
        arguments.work.mkdir(parents=True, exist_ok=True)
        for name in arguments.engine or [name for name in tables() if name != "compress"]:
            engine, python = find(name), python_of(name, arguments.venvs)
            if not engine.runs:
                continue
            if arguments.create and not python.exists():
                create(engine, arguments.venvs)
            if not python.exists():
                print(f"{name}: {python} is not there, left as it was")
                continue
            known = {key(cell) for cell in read()["cells"] if "said" in cell and not (arguments.again and cell["engine"] == name)}
            rows = prepared(engine, arguments.work.resolve(), known)
            write([row for row in rows if "said" not in row])
            rows = [row for row in rows if "said" in row]
            for start in range(0, len(rows), CHUNK):
                run(engine, python, rows[start : start + CHUNK], arguments.timeout)
                write(rows[start : start + CHUNK])
                print(f"{name}: {min(start + CHUNK, len(rows))} of {len(rows)} cells", flush=True)
    document = read()
    DOCUMENT.write_text(render(document))
    broken = [cell for cell in document["cells"] if cell["outcome"].startswith("MISMATCH")]
    for cell in broken:
        print(cell)
    sys.exit(bool(broken))


def key(cell: dict[str, Any]) -> tuple[str, ...]:
    return tuple(cell[part] for part in ("engine", "export", "model", "case"))


def read() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"benchmark": "engines", "tokens": TOKENS, "cells": []}
    return document


def write(rows: list[dict[str, Any]]) -> None:
    """Put `rows` in the place of what was known of them."""
    document = read()
    cells = {key(cell): cell for cell in (*document["cells"], *rows)}
    document["cells"] = [cells[each] for each in sorted(cells, key=order)]
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")


def order(each: tuple[str, ...]) -> tuple[Any, ...]:
    engine, export, model, case = each
    return MODELS.index(model), list(CASES).index(case), export, engine


INTRODUCTION = """<!-- written by scripts/engine_matrix.py; do not edit -->
# Engines

Exports in the engines that read them, run for real; cells that have not run yet are empty. Each cell is one artifact in one engine: what is
asked are {tokens} greedy tokens after each of {prompts} prompts, and the log probabilities of the prompts; what answers are compared with is
`compress.load` in float32 without kernels, which round in their own way, token by token, each given the same ones before it. Weights are rounded
to nearest: what is asked is who reads them, not what they lost. Of a GGUF file what is meant has inputs of products rounded as llama.cpp rounds
them, see [export.md](export.md#gguf).

| | |
|---|---|
| `agrees 0.0003, 256/256` | the largest difference of a prompt's log probabilities in nats; how many tokens are those meant, others being near ties |
| refused | `compress check --engine` says no, and so does the engine, or it answers wrongly; both are told below |
| elsewhere | `check` says that it takes a GPU, or that it is unproven, and this engine on a CPU says no or, where it takes a GPU, answers otherwise |
| no place | the layout cannot hold it, so `compress export` and `check` refuse to write it |
| MISMATCH | it answers otherwise than was meant, or otherwise than `check` says |

Nothing else should happen; of mismatches {broken}.
Tolerances, in nats, of differences and of ties: {tolerance}. Run here: {versions}; SGLang's rules are read off its
loaders, it does not run without a GPU.

ONNX Runtime GenAI and OpenVINO make a model of their own of what they are given, and both round more of it unless they are told not to, which
their files in `compress/engines/` do. Left to themselves they were off from the same export, `demo:dense` in 4 bits, by 0.40 and by 0.03 nats. The
builder of the first rounds embedding and output layer to 4 bits as well, which no export does (0.41 with that alone), and inputs to 8 bits (0.09 with
that alone): give it `accuracy_level=1 nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather`, or measure what its own choice loses.

Differences that are more than sums in another order:

* transformers in float32 rounds integers that it unpacks while loading - experts, and everything where weights are asymmetric - to the dtype of their
  scales, here bfloat16, and is compared with weights rounded likewise. From exact ones it is up to 0.01 off, and 0.08 where that sends one token of
  demo:moe in 3 bits to another expert, two being nearly tied; given the same choice of experts that prompt is 0.0026 off.
* Inputs in 8 bits and caches in FP8 make a whole step of a last bit: an engine that sums in another order than torch is off by hundredths.
* GPTQ and AWQ in transformers are products of GPTQModel. In 4 bits its kernel for CPUs rounds inputs to bfloat16 even where told float32; other
  widths are unpacked to float16.
* MLX has biases where others have zero points, so the export rounds asymmetric weights again, and tells it.

`scripts/engine_matrix.py --create` installs the engines and runs all of it; `pytest -m engines` runs a part. Your own artifact, engine and
prompts are `compress serve-check`:

<!-- not run: needs an engine in an environment of its own -->
```bash
compress check w4 demo:dense --engine vllm==0.33                    # what is known, before anything runs
compress serve-check w4 --engine vllm --python VENV/bin/python      # its server, on this machine; exits with 3 if it answers otherwise
compress serve-check w4-mlx --engine mlx --python VENV/bin/python --reference w4
```

`serve-check` starts vLLM's own server, and of the others the engine itself in a process of the interpreter that is given; each is ended, with
all it started, when the check ends, however it ends. It tells the margin of every token that differs: how much less likely the reference finds
it than its own choice. A near tie has next to none.

VENV is an environment of the engine alone, in which `compress` need not be. What ran here was installed so:

| | |
|---|---|
{environments}

To add an engine, write one file in `compress/engines/`: what it is called, the versions that are known, the exports it reads, and `run`, which
loads a folder and answers. `compress/engines/launch.py` runs it in the engine's own interpreter.
"""


def render(document: dict[str, Any]) -> str:
    """docs/engines.md."""
    found = document["cells"]
    broken = [cell for cell in found if cell["outcome"].startswith("MISMATCH")]
    versions = sorted({cell["version"] for cell in found if cell.get("version")})
    text = INTRODUCTION.format(
        tokens=document["tokens"],
        prompts=len(serving.PROMPTS),
        broken=f"there are {len(broken)}" if broken else "there is none",
        tolerance=", ".join(f"{value:g} in {dtype}" for dtype, value in serving.TOLERANCE.items()),
        versions=", ".join(versions),
        environments="\n".join(map(environment, (table for name, table in tables().items() if name != "compress" and hasattr(table, "INSTALL")))),
    )
    for model in MODELS:
        for export in EXPORTS:
            cells = [cell for cell in found if (cell["model"], cell["export"]) == (model, export)]
            if any("said" in cell for cell in cells):
                text += f"\n## demo:{model} as {export}\n\n" + table(cells)
    return text


def environment(table: ModuleType) -> str:
    """A row of docs/engines.md: how what ran here was installed."""
    steps = [" ".join([*(f'{key}="{value}"' for key, value in table.ENVIRONMENT.items() if key == "CMAKE_ARGS"), "pip install", *table.INSTALL])]
    steps += [f"pip uninstall {' '.join(table.REMOVE)}"] if table.REMOVE else []
    return f"| {table.TITLE} | {', then '.join(f'`{step}`' for step in steps)} |"


def table(cells: list[dict[str, Any]]) -> str:
    """A row per artifact and a column per engine, then what was said where an engine did not run it."""
    engines = sorted({cell["engine"] for cell in cells})
    rows = [f"| | {' | '.join(find(name).title for name in engines)} |", "|---|" + "---|" * len(engines)]
    for case in dict.fromkeys(cell["case"] for cell in cells):
        mine = {cell["engine"]: short(cell) for cell in cells if cell["case"] == case}
        if mine:
            rows.append(f"| {case} | {' | '.join(mine.get(name, '') for name in engines)} |")
    notes = []
    for cell in cells:
        if "said" in cell and cell["outcome"] != "agrees":
            off = cell.get("prompt_logprob_difference")
            own = (
                f"{cell['error']['type']}: {cell['error']['message']}"
                if "error" in cell
                else f"nothing, and is off by {off or cell['largest_margin']:.2f} nats"
            )
            notes.append(f"* {cell['case']}: `check` says {cell['said']}; {find(cell['engine']).title} says `{own.replace('`', chr(39))}`")
        elif cell["outcome"] in ("not written", "not made"):
            notes.append(f"* {cell['case']}: {cell['why']}")
    return "\n".join(rows) + "\n" + ("\n" + "\n".join(dict.fromkeys(notes)) + "\n" if notes else "")


def short(cell: dict[str, Any]) -> str:
    match cell["outcome"]:
        case "agrees":
            off = cell["prompt_logprob_difference"]
            return f"agrees {'' if off is None else f'{off:.4f}, '}{cell['tokens_equal']}/{cell['tokens']}"
        case "not written" | "not made":
            return "no place"
        case other:
            return str(other)


if __name__ == "__main__":
    main()
