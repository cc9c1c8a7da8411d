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
from typing import Any

import yaml

from compress import declared, exporting, serving
from compress.checkpoint import Checkpoint
from compress.engines.base import Engine, find, tables
from compress.errors import InputError
from compress.layout import Layout
from compress.recipe import export_module, export_names
from compress.source import demo_model

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "engines.json"
DOCUMENT = ROOT / "docs" / "engines.md"
TOKENS = 64
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
        ran = subprocess.run(
            [sys.executable, "-m", "compress", "run", str(file), f"demo:{model}", "--out", str(folder)], capture_output=True, text=True
        )
        if ran.returncode:
            return None, "; ".join(line.removeprefix(f"error: {file.name}: ") for line in ran.stderr.splitlines() if line.startswith("error"))
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
    return engine.verdict(target, export_module(target).verdicts(layout, declared.schemes(layout), declared.cache(layout)))


def cells(engine: Engine, python: Path, work: Path, known: set[tuple[str, ...]], timeout: float) -> list[dict[str, Any]]:
    """Every cell of one engine that is not `known` yet."""
    rows: list[dict[str, Any]] = []
    places: list[Path] = []
    asked: dict[str, list[list[int]]] = {}
    for model in MODELS:
        for case in CASES:
            for target in [name for name in EXPORTS if name in engine.table.READS]:
                if (engine.name, target, model, case) in known or (case == "16 bits" and target != "compressed-tensors"):
                    continue
                row: dict[str, Any] = {"engine": engine.name, "export": target, "model": model, "case": case}
                folder, why = artifact(model, case, work)
                if folder is None:
                    if target == "compressed-tensors":
                        rows.append(row | {"outcome": "not made", "why": why})
                        places.append(Path())
                    continue
                place, why = exported(folder, target)
                if place is None:
                    rows.append(row | {"outcome": "not written", "why": why})
                    places.append(Path())
                    continue
                asked.setdefault(model, serving.ask_for(folder, None, TOKENS))
                rows.append(row | {"said": said(folder, target, engine), "folder": str(folder)})
                places.append(place)
    for dtype in engine.table.DTYPES:
        waiting = [index for index, row in enumerate(rows) if "said" in row and not row.get("tokens")]
        if not waiting:
            break
        requests = [{"folder": str(places[index]), "prompts": asked[rows[index]["model"]], "max_tokens": TOKENS, "dtype": dtype} for index in waiting]
        for index, answer in zip(waiting, serving.ask_all(engine, python, requests, timeout), strict=True):
            row = rows[index]
            if "error" in answer:
                # What it says first is of the dtype it prefers; later ones are tried where that does not do.
                row.setdefault("error", {key: first_words(str(value)) for key, value in answer["error"].items()})
                row.setdefault("version", answer["version"])
                continue
            found = serving.compare(Path(row["folder"]), asked[row["model"]], answer)
            row |= {key: value for key, value in found.items() if key not in ("prompts", "tokens_per_second", "first_token_seconds", "load_seconds")}
    for row in rows:
        row.pop("folder", None)
        if "said" in row:
            row["outcome"] = outcome(row)
    return rows


def first_words(text: str) -> str:
    """Of an error, without the folders of this machine."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    line = lines[-1] if lines and lines[-1].partition(":")[0].endswith(("Error", "Exception")) else (lines or [""])[0]
    return " ".join(line.replace(str(Path.home()), "~").split())[:300]


def outcome(row: dict[str, Any]) -> str:
    """How what is known and what happened go together."""
    no = row["said"].startswith("refuses")
    elsewhere = any(part in row["said"] for part in ("GPU only", "unproven"))
    if "tokens" not in row:
        return "refused" if no else "elsewhere" if elsewhere else "MISMATCH: did not run"
    if no:
        return "MISMATCH: runs" if row["agrees"] else "refused"
    return ("MISMATCH: runs here" if elsewhere else "agrees") if row["agrees"] else "MISMATCH: differs"


def create(engine: Engine, venvs: Path) -> None:
    """A virtual environment with an engine, as its file says."""
    environment = os.environ | engine.table.ENVIRONMENT
    python = str(venvs / engine.name / "bin" / "python")
    subprocess.run([sys.executable, "-m", "venv", str(venvs / engine.name)], check=True)
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
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"benchmark": "engines", "tokens": TOKENS, "cells": []}
    if not arguments.render:
        if arguments.work is None:
            parser.error("--work is needed")
        arguments.work.mkdir(parents=True, exist_ok=True)
        for name in arguments.engine or [name for name in tables() if name != "compress"]:
            engine = find(name)
            python = arguments.venvs / name / "bin" / "python"
            if not engine.runs:
                continue
            if arguments.create and not python.exists():
                create(engine, arguments.venvs)
            if not python.exists():
                print(f"{name}: {python} is not there, left as it was")
                continue
            kept = [cell for cell in document["cells"] if not (arguments.again and cell["engine"] == name)]
            known = {(cell["engine"], cell["export"], cell["model"], cell["case"]) for cell in kept}
            document["cells"] = kept + cells(engine, python, arguments.work.resolve(), known, arguments.timeout)
            RESULTS.write_text(json.dumps(document, indent=1) + "\n")
            print(f"{name}: {len(document['cells']) - len(kept)} cells")
    DOCUMENT.write_text(render(document))
    broken = [cell for cell in document["cells"] if cell["outcome"].startswith("MISMATCH")]
    for cell in broken:
        print({key: value for key, value in cell.items() if key != "prompts"})
    sys.exit(bool(broken))


def render(document: dict[str, Any]) -> str:
    """docs/engines.md."""
    return json.dumps(document["cells"][:1])


if __name__ == "__main__":
    main()
