"""A finished artifact in other layouts: from its codes, without calibration, and measured as it was written."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from compress import __version__, declared, manifest
from compress.checkpoint import BRANCHED, Checkpoint, copy_file, deliver, entry, read_header, sha256, write_safetensors, write_text
from compress.errors import InputError, Problems
from compress.export import base
from compress.formats import base as formats
from compress.layout import Layout
from compress.recipe import export_module, export_names, said_of

if TYPE_CHECKING:
    from compress.model import Model
    from compress.scheme import Scheme

FILE = "export.json"
UNPACKED = ".unpacked"
OWN = ("README.md", "recipe.yaml", "plan.json", manifest.FILE, "report.json", "report.html")
"""Files of an artifact that tell of the run, not of the model."""


class Progress(Protocol):
    """What an export reports to."""

    def step(self, name: str, total: int) -> None: ...


def folders(artifact: Path, targets: Sequence[str], out: Path | None = None) -> dict[str, Path]:
    """Where each target goes: `out` itself if there is but one, else beside the artifact or inside `out`."""
    if out is not None and len(targets) == 1:
        return {targets[0]: out}
    return {target: out / target if out else artifact.with_name(f"{artifact.name}-{target}") for target in targets}


def check(artifact: Path, places: dict[str, Path], *, overwrite: bool = False, rejected: bool = False) -> tuple[Layout, dict[str, Scheme]]:
    """What is to be exported, by its headers and files alone. Raises `InputError` with everything that stands in the way.

    That is, besides what a layout cannot hold: files that are not those the manifest tells of and, unless `rejected`, gates that failed.
    """
    target = json.loads((artifact / FILE).read_text(encoding="utf-8"))["target"] if (artifact / FILE).is_file() else None
    if target in export_names() and not export_module(target).READABLE:
        raise InputError.one(str(artifact), f"is itself an export, to {target}", "give the artifact that it was made of")
    layout = Layout(Checkpoint(artifact))
    declared.check(layout)
    plan = declared.schemes(layout)
    problems = Problems()
    _check_manifest(artifact, rejected, problems)
    for target, place in places.items():
        _check_place(artifact, place, problems)
        if target not in export_names():
            problems.add("--to", f"no export is called {target!r}", f"known are {', '.join(export_names())}")
            continue
        if place.exists() and not (overwrite and (place / FILE).is_file()):
            remedy = "choose another --out" + ("" if overwrite else " or pass --overwrite")
            problems.add(str(place), "exists already" if not overwrite else "exists and is no export of ours, so it is not overwritten", remedy)
        module = export_module(target)
        if not module.READABLE:
            base.refuse("--to", target, layout, plan, None, problems)
        if BRANCHED in layout.checkpoint.config and not module.READABLE:
            problems.add("--to", f"{target} has no place for branches", "choose compressed-tensors")
        elif layout.latents:
            problems.add("--to", f"{target} with a cache of latents is written by a run alone", "name it in the recipe's export")
        elif target == "nm-packed":
            problems.add("--to", "which patterns weights keep is known in a run alone", "name nm-packed in the recipe's export")
        module.check("--to", layout, plan, problems)
    problems.raise_if_any()
    return layout, plan


def _check_place(artifact: Path, place: Path, problems: Problems) -> None:
    """Report a place that cannot be written, or in which an export would be taken for a part of something else."""
    if place.resolve().is_relative_to(artifact.resolve()):
        problems.add(str(place), "lies in the artifact itself", "choose another --out")
    there = next(parent for parent in place.absolute().parents if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        problems.add(str(place), f"cannot be made: {there} is {'not writable' if there.is_dir() else 'no folder'}", "choose another --out")
    if (place.parent / FILE).is_file():
        problems.add(str(place), "lies in an earlier export", "choose another --out")
    if inside := sorted(path.parent.name for path in place.glob(f"*/{FILE}")):
        problems.add(str(place), f"holds other exports: {', '.join(inside)}", "choose another --out")


def _check_manifest(artifact: Path, rejected: bool, problems: Problems) -> None:
    try:
        told = manifest.read(artifact)
    except InputError as error:
        problems.absorb(error)
        return
    if told is None:
        return  # what other programs made is taken as it is, and `export` says so
    if not told.accepted and not rejected:
        what = "the artifact was not accepted: its gates failed"
        problems.add(str(artifact / manifest.FILE), what, "mend the recipe, or pass --rejected to export it nevertheless")
    told.check(artifact, problems)


def export(artifact: Path, places: dict[str, Path], progress: Progress, *, overwrite: bool = False, rejected: bool = False) -> list[dict[str, Any]]:
    """Write the artifact in each of the layouts of `places`, each folder appearing when it is finished and compared.

    Returns for each what engines make of it and what it lost: the relative squared error of every weight that is not exact. ``accepted`` is
    whether the gates of the artifact passed, and None where it has no manifest to tell that and to hold its files against.
    """
    from compress.model import Model

    layout, plan = check(artifact, places, overwrite=overwrite, rejected=rejected)
    told = manifest.read(artifact)
    results = []
    for target, place in places.items():
        progress.step(f"export {target}", 1)
        began = time.monotonic()
        module = export_module(target)
        staging = place.absolute().with_name(f".{place.name}.partial")
        shutil.rmtree(staging, ignore_errors=True)
        try:
            staging.mkdir(parents=True)
            model = _unpacked(Model(layout, plan), plan, staging / UNPACKED)
            module.write(model, plan, declared.cache(layout), staging)
            if module.READABLE:
                module.compare(model, staging)
                errors: dict[str, float] = {}
            else:
                errors = base.losses(model, module.weights(model, plan, staging))
            if module.READABLE or module.FILES:
                for relative in layout.checkpoint.extra_files:
                    if str(relative) not in OWN:
                        copy_file(artifact / relative, staging / relative)
            shutil.rmtree(staging / UNPACKED, ignore_errors=True)
            result = {
                "target": target,
                "accepted": told.accepted if told else None,
                "engines": said_of(target, layout, plan),
                "bytes": sum(path.stat().st_size for path in staging.rglob("*") if path.is_file()),
                "exact": sum(error == 0 for error in errors.values()),
                "losses": {name: error for name, error in sorted(errors.items()) if error},
            }
            write_text(staging / FILE, json.dumps({"compress": __version__, "of": _identity(artifact)} | result, indent=2) + "\n")
            deliver(staging, place.absolute())
        except OSError as error:
            raise InputError.one(str(place), f"cannot be written ({error.strerror})", "free some space or choose another --out") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        results.append(result | {"folder": str(place), "seconds": time.monotonic() - began})
    return results


def _unpacked(model: Model, plan: dict[str, Scheme], folder: Path) -> Model:
    """The model with the weights that lie packed with their places as all other layouts have them, a file for each block in `folder`."""
    for block in model.blocks:
        packed = [linear.name for linear in block.linears if f"{linear.name}.nm_values" in model.tensors]
        if not packed:
            continue
        entries = []
        for linear in packed:
            parts = (
                formats.called(plan[linear].layout).pack(linear, model.quantized(linear))
                if linear in plan
                else {f"{linear}.weight": model.dense(linear)}
            )
            entries += [entry(name, tensor) for name, tensor in parts.items()]
        folder.mkdir(exist_ok=True)
        path = folder / f"{block.index}.safetensors"
        write_safetensors(path, entries, {"format": "pt"})
        gone = {f"{linear}.{part}" for linear in packed for part in formats.PARTS if part != "input_scale"}
        model.tensors = {name: info for name, info in model.tensors.items() if name not in gone} | read_header(path)[0]
    return model


def _identity(artifact: Path) -> dict[str, str]:
    """What an export was made of."""
    known = [artifact / name for name in (manifest.FILE, "config.json") if (artifact / name).is_file()]
    return {path.name: sha256(path) for path in known}
