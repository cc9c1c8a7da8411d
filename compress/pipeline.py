"""The table of contents of a run."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import time
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import yaml

from compress import __version__, allocation, exporting, places
from compress.allocation import Allocation
from compress.checkpoint import Checkpoint, copy_file, deliver, sha256, write_text
from compress.errors import InputError, Problem, Problems
from compress.formats.base import BESIDE_PARTS, PARTS
from compress.layout import Layout
from compress.passes.base import Allocator, Pass, Prunes, Quantize, Restructure, Rewrite
from compress.places import Places
from compress.recipe import Recipe, cache_scheme, check, export_module, verdicts
from compress.scheme import Scheme
from compress.source import locate_model

if TYPE_CHECKING:
    from compress.evaluate.kept import Kept

WORK_NAME = re.compile("run-[0-9a-f]{16}")
"""Folders of unfinished runs; anything else in a work folder is somebody else's."""
FULL_REOPEN_BYTES = 2 << 30
CARD = "README.md"
OURS = (CARD, "recipe.yaml", allocation.FILE, "manifest.json", "report.json", "report.html")
"""Files every artifact has; those of the source that are called the same get `.source` before their ending."""
NOT_IN_MANIFEST = ("manifest.json", "report.json", "report.html")
"""The report holds seconds and memory, which no two runs share; everything else is the same bytes every time."""
TELL_SHAPES = ("weight_shape", "nm_pattern", "branch_run")
"""Parts of a linear that are no weights."""


class Progress(Protocol):
    """What a run tells whoever watches it."""

    def step(self, name: str, total: int) -> None:
        """A step begins that has `total` units."""

    def done(self, units: int) -> None:
        """So many units of the step are done in all."""

    def blocks(self, done: int, total: int) -> None:
        """So many blocks of the step are done."""

    def note(self, text: str) -> None:
        """Something worth a line."""


@dataclass(frozen=True)
class Request:
    """One `compress run`."""

    recipe: Recipe
    place: str
    model: str
    out: Path
    work: Path
    overwrite: bool
    command: str | None = None
    """What was typed, for the report."""

    @property
    def places(self) -> Places:
        return Places(self.out, self.work, self.overwrite)


def open_layout(model: str) -> Layout:
    """The model's layout from headers alone."""
    return Layout(Checkpoint(locate_model(model)))


def run(request: Request, progress: Progress) -> dict[str, Any]:
    """Check, compress, export, reopen, evaluate, gate; returns the report, which also lies in the artifact.

    Raises `InputError` for anything the user can mend; then `request.out` is as it was before. Finished blocks stay in the work
    folder, so that the same request continues where a killed one stopped.
    """
    from compress.hardware import tune_allocator

    began = time.monotonic()
    tune_allocator()
    layout = open_layout(request.model)
    problems = Problems()
    plan: dict[str, tuple[str, Scheme]] = {}
    try:
        plan = check(request.recipe, layout, request.place)
    except InputError as error:
        problems.absorb(error)
    places.check(request.places, request.recipe, layout, plan, problems)
    problems.raise_if_any()
    with places.no_space_is_an_input_error(request.places), places.alone(request.work):
        places.make(request.out.absolute().parent, "--out")
        return _Run(request, layout, plan, progress, began).go()


class _Run:
    """One run: what its steps share."""

    def __init__(self, request: Request, layout: Layout, plan: dict[str, tuple[str, Scheme]], progress: Progress, began: float) -> None:
        from compress.data import Tokenizer
        from compress.model import Model

        self.request, self.recipe, self.progress, self.began = request, request.recipe, progress, began
        self.source = layout
        self.layout = layout
        """Of the model as it is now: passes may take parts out of it."""
        self.origins = {name: name for name in layout.checkpoint.tensors}
        """What each tensor of the model as it is now was called in the source."""
        self.added: dict[str, str] = {}
        """By tensor of the model as it is now that the source has nothing of: the pass that made it."""
        self.cut: dict[str, dict[str, str]] = {}
        """By tensor of the source that passes made smaller, or took out: which did, and what they call it."""
        self.plan = plan
        self.schemes = {name: scheme for name, (_, scheme) in plan.items()}
        self.cache = cache_scheme(request.recipe)
        self.steps: list[tuple[str, Pass]] = self.recipe.instances()
        self.model = Model(layout, self.schemes)
        self.tokenizer = Tokenizer(layout.checkpoint.folder)
        self.passes: list[dict[str, Any]] = []
        self.records: list[dict[str, Any]] = []
        self.transforms: list[dict[str, Any]] = []
        self.rewritten: dict[str, dict[str, str]] = {}
        """By tensor that passes changed, or added, without quantising it: which did, and what they call it."""
        self.allocation: Allocation | None = None
        self.redone: list[dict[str, Any]] = []
        """Passes and measurements that an interrupted run had made, but of which files are not what it wrote."""

    def go(self) -> dict[str, Any]:
        from compress import report
        from compress.evaluate import measure
        from compress.hardware import peak_bytes

        sources = self._verify_source()
        _ = self.model.skeleton  # of what lies outside the blocks too faults are told now, not when it is first needed
        self.model.release()
        samples = self._calibration()
        if self.recipe.evaluate is not None:
            measure.read(self.recipe.evaluate, self.tokenizer, self.source)  # to be told of its faults now, not after hours
            self._prompts()
        given = [self._drawn(step.own_samples) if isinstance(step, Rewrite) and step.own_samples else samples for _, step in self.steps]
        work = self._work_folder(sources, [drawn.digest for drawn in given if drawn])
        self._discard_damaged(work)
        for index, ((name, step), drawn) in enumerate(zip(self.steps, given, strict=True)):
            self._pass(index, name, step, sources, drawn, work)
        self._settle()
        staging = work / "artifact"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        self._export(staging)
        verification = self._reopen(staging)
        hashes = _hashes(staging)
        evaluation = self._evaluate(staging, sources, hashes)
        ledger = self._ledger(Checkpoint(staging))
        size = self._size(staging)
        fallbacks = [record for record in (*self.records, *self.transforms) if record.get("fallback")]
        gates = judge(self.recipe, evaluation, size, len(fallbacks))
        accepted = all(gate["passed"] for gate in gates)
        self._manifest(staging, sources, samples, accepted, hashes)
        result = {
            "schema": report.SCHEMA,
            "accepted": accepted,
            "compress": __version__,
            "model": self.request.model,
            "source": {"name": self.request.model, "sha256": sources},
            "command": self.request.command,
            "recipe": self.recipe.resolved(),
            "recipe_hash": self.recipe.hash,
            "seconds": time.monotonic() - self.began,
            "peak_bytes": peak_bytes(),
            "calibration": {"source": samples.source, "sequences": len(samples.items), "tokens": samples.tokens, "sha256": samples.digest}
            | ({"vision_tokens": samples.vision_tokens} if self.layout.arch.image else {})
            if samples
            else None,
            "passes": self.passes,
            "redone": self.redone,
            "size": size,
            "engines": verdicts(self.recipe, self.layout, self.schemes),
            "verification": verification,
            "evaluation": evaluation,
            "allocation": self.allocation.summary() | {"other_model": self.allocation.origin.source != sources} if self.allocation else None,
            "fallbacks": fallbacks,
            "gates": gates,
            "linears": self.records,
            "transforms": self.transforms,
            "ledger": ledger,
            "environment": environment(),
        }
        report.write(result, staging)
        self._deliver(staging)
        if others := self.recipe.export[1:]:
            result["exports"] = self._export_copies(others) if accepted else []
        return result

    def _export_copies(self, targets: tuple[str, ...]) -> list[dict[str, Any]]:
        self.model.release()
        places = exporting.folders(self.request.out, targets)
        return exporting.export(self.request.out, places, self.progress, overwrite=self.request.overwrite)

    def _verify_source(self) -> dict[str, str]:
        total = sum(path.stat().st_size for path in self.source.checkpoint.shards)
        self.progress.step("read and hash the source", total)
        seen = 0

        def advance(count: int) -> None:
            nonlocal seen
            seen += count
            self.progress.done(seen)

        return self.source.checkpoint.verify(advance)

    def _calibration(self) -> Any:
        return self._drawn(self.recipe.calibration.samples) if any(step.needs_data for _, step in self.steps) else None

    def _drawn(self, samples: int) -> Any:
        from compress import data

        options = self.recipe.calibration
        return data.calibration(options.data, samples, options.length, options.seed, self.tokenizer)

    def _work_folder(self, sources: dict[str, str], drawn: list[str]) -> Path:
        """A folder named after everything that decides the result; what other contents left there is thrown away."""
        compression = {key: self.recipe.resolved()[key] for key in ("passes", "export")}
        config = sha256(self.layout.checkpoint.folder / "config.json")
        plans = [sha256(path) for _, step in self.steps if isinstance(step, Allocator) for path in step.files()]
        decisive = [__version__, sources, config, compression, plans, drawn, str(self.model.dtype), str(self.model.device)]
        key = json.dumps(decisive, sort_keys=True)
        folder = self.request.work / f"run-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        if folder.exists():
            self.progress.note(f"continuing from {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        for stale in self.request.work.iterdir():
            if stale != folder and WORK_NAME.fullmatch(stale.name):
                shutil.rmtree(stale)
        return folder

    def _discard_damaged(self, work: Path) -> None:
        """Throw away the first pass whose files are not as they were written, and all behind it, which went by them."""
        from compress.state import damaged

        folders = [work / f"pass-{index}-{name}" for index, (name, _) in enumerate(self.steps)]
        for index, folder in enumerate(folders):
            if folder.is_dir() and (found := damaged(folder)):
                self._redo(folder.name, found[0] + (f", and {len(found) - 1} more" if len(found) > 1 else ""))
                for each in folders[index:]:
                    shutil.rmtree(each, ignore_errors=True)
                return

    def _redo(self, what: str, why: str) -> None:
        self.redone.append({"what": what, "why": why})
        self.progress.note(f"{what} is made again: {why}")

    def _pass(self, index: int, name: str, step: Pass, sources: dict[str, str], samples: Any, work: Path) -> None:
        from compress.calibrate import Workspace
        from compress.hardware import peak_bytes

        self.progress.step(name, len(self.layout.blocks))
        folder = work / f"pass-{index}-{name}"
        folder.mkdir(exist_ok=True)
        workspace = Workspace(folder, self.progress, sources)
        began = time.monotonic()
        if isinstance(step, Quantize) and self.allocation:
            step = step.given(self.allocation.bits())
        self.model.at_work = name
        step.run(self.model, samples, workspace)
        if isinstance(step, Allocator):
            self._allocate(allocation.read(folder / allocation.FILE), name, sources)
        elif isinstance(step, Restructure):
            self._restructure(index, name, step, workspace)
        else:
            self._adopt(name, step, workspace)
        self.passes.append({"name": name, "seconds": time.monotonic() - began, "peak_bytes": peak_bytes()})
        missing = sorted(step.plan(self.layout).keys() - {record["name"] for record in self.records})
        if missing:
            raise AssertionError(f"{name} left {len(missing)} linears alone that it should have taken: {missing[:3]}")

    def _adopt(self, name: str, step: Pass, workspace: Any) -> None:
        """Take what a pass made of the model."""
        files = [workspace.outside_file] * workspace.outside_file.exists() + [workspace.block_file(layout.index) for layout in self.layout.blocks]
        pruned = set(self.model.patterns)
        for file in files:
            for record in self.model.adopt(file):
                self._take(record)
        filled = pruned - self.model.patterns.keys()
        for tensor, info in self.model.tensors.items():
            if info.file.parent == workspace.folder and not self.model.packed_as(tensor.rpartition(".")[0]):
                verb = step.verb if isinstance(step, Rewrite) else "changed"
                if isinstance(step, Prunes):
                    pattern = step.prunes(self.layout).get(tensor.removesuffix(".weight"))
                    verb = f"pruned {pattern}" if pattern else "reordered"
                if tensor.removesuffix(".weight") in filled:
                    verb += ", its pattern given up"
                self.rewritten.setdefault(tensor, {})[name] = verb

    def _restructure(self, index: int, name: str, step: Restructure, workspace: Any) -> None:
        """From here on the model is what a pass has made of it."""
        from compress.checkpoint import read_header
        from compress.model import Model

        before, self.layout = self.layout, step.outcome(self.layout, workspace)
        self.plan = check(self.recipe, self.layout, self.request.place, done=index + 1)  # widths may be others than could be expected
        self.schemes = {linear: scheme for linear, (_, scheme) in self.plan.items()}
        self.model = Model(self.layout, self.schemes)
        files = [workspace.block_file(layout.index) for layout in before.blocks]
        for file in (workspace.outside_file, *files):
            for record in json.loads(read_header(file)[1]["records"]) if file.exists() else ():
                self._take(record)
        made = [each for file in files if file.exists() for each in read_header(file)[0].items()]
        places = {(info.file, info.begin): tensor for tensor, info in (*before.checkpoint.tensors.items(), *made)}
        known = before.checkpoint.tensors
        now = {tensor: places[info.file, info.begin] for tensor, info in self.layout.checkpoint.tensors.items()}
        now = {tensor: was if was in known else self.layout.unfactored(was) for tensor, was in now.items()}
        changed = {was for tensor, was in now.items() if self.layout.checkpoint.tensors[tensor] is not known.get(was)}
        for was in (changed | (known.keys() - now.values())) & self.origins.keys():
            self.cut.setdefault(self.origins[was], {})[name] = step.verb
        self.added = {tensor: self.added.get(was, name) for tensor, was in now.items() if was not in self.origins}
        self.origins = {tensor: self.origins[was] for tensor, was in now.items() if was in self.origins}

    def _allocate(self, plan: Allocation, name: str, sources: dict[str, str]) -> None:
        """From here on linears are to be stored as `plan` says."""
        if plan.origin.source != sources:
            self.progress.note(f"{name}: the scores of the plan were measured on another model")
        self.allocation = plan
        for linear, bits in plan.bits().items():
            by, scheme = self.plan[linear]
            self.plan[linear] = by, scheme.model_copy(update={"bits": bits})
        self.schemes = {linear: scheme for linear, (_, scheme) in self.plan.items()}
        self.model.schemes = self.schemes

    def _take(self, record: dict[str, Any]) -> None:
        """A linear has one record, which later passes add to."""
        known = next((each for each in self.records if each["name"] == record["name"]), None)
        if known:
            known |= record | {"pass": f"{known['pass']} + {record['pass']}"}
        else:
            (self.records if "bits" in record else self.transforms).append(record)

    def _settle(self) -> None:
        """A pass may have found that the model is better off without residuals; then nothing may claim that there are some."""
        if "residuals" not in self.model.left_out:
            self.plan = {name: (by, scheme.coded) for name, (by, scheme) in self.plan.items()}
            self.schemes = {name: scheme for name, (_, scheme) in self.plan.items()}

    def _export(self, staging: Path) -> None:
        self.progress.step("export", 1)
        export_module(self.recipe.export[0]).write(self.model, self.schemes, self.cache, staging)
        for relative in self.layout.checkpoint.extra_files:
            target = relative.with_suffix(f".source{relative.suffix}") if str(relative) in OURS else relative
            copy_file(self.layout.checkpoint.folder / relative, staging / target)
        if self.allocation:
            allocation.write(self.allocation, staging / allocation.FILE)
        write_text(staging / "recipe.yaml", yaml.safe_dump(self.recipe.resolved(), sort_keys=False))

    def _reopen(self, staging: Path) -> dict[str, Any]:
        from compress import reopen

        self.progress.step("reopen and compare", 1)
        weights = export_module(self.recipe.export[0]).compare(self.model, staging)
        result: dict[str, Any] = {"tensors": len(self.model.tensors), "weights_unpacked_by_compressed_tensors": weights}
        verdict = export_module(self.recipe.export[0]).verdicts(self.layout, self.schemes, self.cache)["transformers"]
        small = self.layout.checkpoint.nbytes <= FULL_REOPEN_BYTES and not verdict.startswith("refuses")
        if self.model.patterns:
            result |= reopen.verify_patterns(self.model, staging)
        mode = self.recipe.verify if self.recipe.verify != "auto" else "full" if small else "streamed"
        result["mode"] = mode
        if mode == "full":
            only = "bfloat16" in verdict
            result |= reopen.compare_logits(self.model.in_engines(), staging, self.tokenizer, bfloat16_only=only)
            result |= {f"{what}_left_out": True for what in self.model.left_out}
        return result

    def _evaluate(self, staging: Path, sources: dict[str, str], hashes: dict[str, str]) -> dict[str, Any] | None:
        from compress.evaluate import measure
        from compress.evaluate.kept import ARTIFACT, IN_ENGINES, SOURCE, Kept

        if self.recipe.evaluate is None:
            return None
        self.progress.step("evaluate", 2 * len(self.layout.blocks))
        self.model.release()
        before = sources | {str(path): sha256(self.source.checkpoint.folder / path) for path in self.source.checkpoint.extra_files}
        after = {name: digest for name, digest in hashes.items() if name not in OURS}  # a recipe tells of figures too
        models = {SOURCE: before, ARTIFACT: after, IN_ENGINES: after}
        kept = Kept(staging.with_name("evaluation"), models, lambda name: self._redo(f"evaluation/{name}", "it is not what was written"))
        result = measure.against_source(self.source, staging, self.recipe.evaluate, self.tokenizer, self.progress, kept)
        if self.recipe.evaluate.retrieval is not None:
            self._retrieve(staging, result, kept)
        if left_out := " and ".join(self.model.left_out):
            self.progress.step(f"evaluate without {left_out}", 2 * len(self.layout.blocks))
            bare = measure.against_source(self.source, staging, self.recipe.evaluate, self.tokenizer, self.progress, kept, in_engines=True)
            result[f"without_{left_out.replace(' ', '_')}"] = bare["compressed"]
        return result

    def _prompts(self) -> tuple[Any, Any] | None:
        """What retrieval is measured with, if it is: cells and their prompts."""
        from compress.evaluate import retrieval

        wanted = self.recipe.evaluate.retrieval if self.recipe.evaluate else None
        if wanted is None:
            return None
        lengths, depths = tuple(sorted(set(wanted.lengths))), tuple(sorted(set(wanted.depths)))
        cells = retrieval.Wish(wanted.task, lengths, depths, wanted.cases, wanted.seed)
        try:
            return cells, retrieval.prompts(cells, self.tokenizer.plain, self.progress)
        except InputError as error:
            raise InputError(Problem(f"evaluate.retrieval: {each.place}", each.what, each.remedy) for each in error.problems) from error

    def _retrieve(self, staging: Path, result: dict[str, Any], kept: Kept) -> None:
        """Measure retrieval before and after, packed as `compress.load` runs it, and add it to `result`."""
        from compress import runtime
        from compress.evaluate import retrieval
        from compress.evaluate.kept import ARTIFACT, SOURCE

        asked = self._prompts()
        assert asked is not None
        wanted, made = asked

        def measure(folder: Path) -> dict[str, Any]:
            return retrieval.measure(runtime.load(folder), self.tokenizer.plain, wanted, made, self.progress)

        protocol = asdict(wanted) | {"tokens_sha256": retrieval.digest(made)}
        before, after = (
            kept.figures("retrieval", (name,), protocol, partial(measure, folder))
            for name, folder in ((SOURCE, self.source.checkpoint.folder), (ARTIFACT, staging))
        )
        result["retrieval"], result["figures"]["retrieval_drop"], result["intervals"]["retrieval_drop"] = retrieval.compared(before, after)

    def _ledger(self, after: Checkpoint) -> list[dict[str, Any]]:
        """What became of every tensor of the source, how many bytes `after` stores for it, and what is new.

        Raises AssertionError if one is not accounted for: a bug, not a warning.
        """
        ledger: list[dict[str, Any]] = []
        names: dict[str, list[str]] = {}
        for name, of in sorted(self.origins.items()):
            names.setdefault(of, []).append(name)
        for origin, info in sorted(self.source.checkpoint.tensors.items()):
            item: dict[str, Any] = {"name": origin, "shape": list(info.shape), "dtype": info.dtype}
            cut = self.cut.get(origin, {})
            if reason := self.source.dropped(origin):
                item |= {"action": "dropped", "why": reason}
            elif origin not in names:
                item |= {"action": "removed", "why": f"by {' and '.join(cut)}"}
            else:
                fates = {name: self._fate(name, cut) for name in names[origin]}
                alike = len({fate["why"] for fate in fates.values()}) == 1
                item["action"] = " and ".join(dict.fromkeys(fate["action"] for fate in fates.values()))
                item["why"] = next(iter(fates.values()))["why"] if alike else "; ".join(f"{name} {fate['why']}" for name, fate in fates.items())
                if names[origin] != [origin]:
                    item["why"] += f"; now called {' and '.join(names[origin])}"
            ledger.append(item)
        added = sorted(self.rewritten.keys() - self.layout.checkpoint.tensors.keys())
        for name in added:
            info, by = self.model.tensors[name], " and ".join(self.rewritten[name])
            ledger.append({"name": name, "shape": list(info.shape), "dtype": info.dtype, "action": "added", "why": f"by {by}"})
        for name, by in sorted(self.added.items()):
            info, fate = self.layout.checkpoint.tensors[name], self._fate(name, {})
            then = f", then {fate['action']} by {fate['why']}" if fate["action"] == "quantized" else ""
            ledger.append({"name": name, "shape": list(info.shape), "dtype": info.dtype, "action": "added", "why": f"by {by}{then}"})
        ledger += [{"name": name, "action": "dropped", "why": "in a shard, but not in the index"} for name in self.source.checkpoint.unlisted]
        ledger += [{"name": name, "action": "dropped", "why": "weights in another format"} for name in self.source.checkpoint.left_behind]
        stored = self._stored(after)
        return [item | {"stored_bytes": stored.get(item["name"], 0)} if "shape" in item else item for item in ledger]

    def _stored(self, after: Checkpoint) -> dict[str, int]:
        """Bytes in `after` by the tensor of the source that they stand for, or by their own name where they are new."""
        found: dict[str, int] = {}
        for name, info in after.tensors.items():
            # Codes, scales and residuals of a weight have its linear's name, then their own.
            linear = f"{name.rpartition('.')[0]}.weight"
            owner = next((each for each in (name, linear) if each in self.origins or each in self.added), name)
            owner = self.origins.get(owner, owner)
            found[owner] = found.get(owner, 0) + info.nbytes
        return found

    def _fate(self, name: str, cut: dict[str, str]) -> dict[str, Any]:
        """What became of a tensor of the model as it is now, which passes `cut` before."""
        linear = name.removesuffix(".weight")
        before = cut | self.rewritten.get(name, {})
        if linear in self.plan and self.model.packed_as(linear):
            by, scheme = self.plan[linear]
            verbs = " and ".join(f"{verb} by {step}" for step, verb in before.items())
            return {"action": "quantized", "why": f"{by}: {scheme.text}" + (f", {verbs} before" if before else "")}
        if before and name in self.model.tensors:
            return {"action": " and ".join(dict.fromkeys(before.values())), "why": f"by {' and '.join(before)}, stored in its own dtype again"}
        if linear in self.layout.linears and linear not in self.plan:
            return {"action": "kept", "why": "no pass takes this linear"}
        if name in self.layout.in_blocks:
            return {"action": "kept", "why": "not a linear of the block (norm, bias or router)"}
        if name in self.model.tensors and linear not in self.plan:
            return {"action": "kept", "why": "outside the decoder blocks"}
        raise AssertionError(f"{name} is not accounted for")

    def _size(self, staging: Path) -> dict[str, Any]:
        after = Checkpoint(staging)
        quantized = sum(linear.rows * linear.columns for name, linear in self.layout.all_linears.items() if name in self.plan)
        parts = [f"{name}.{part}" for name in self.plan for part in (*PARTS, *BESIDE_PARTS) if part not in TELL_SHAPES]
        stored = sum(after.tensors[part].nbytes for part in parts if part in after.tensors)
        return {
            "before_bytes": self.source.checkpoint.nbytes,
            "after_bytes": after.nbytes,
            "bits_per_weight": 8 * stored / quantized if quantized else None,
            "quantized_weights": quantized,
        }

    def _manifest(self, staging: Path, sources: dict[str, str], samples: Any, accepted: bool, hashes: dict[str, str]) -> None:
        from compress import card

        factored = len(self.layout.factored)
        opens = not verdicts(self.recipe, self.layout, self.schemes)["transformers"].startswith("refuses")
        kept = sum(name not in self.schemes for name in self.layout.linears)
        text = card.write(self.request.model, self.recipe, self.schemes, self.model.patterns, self.model.left_out, factored, kept, opens)
        write_text(staging / CARD, text)
        said = verdicts(self.recipe, self.layout, self.schemes)
        manifest = {
            "accepted": accepted,
            "loadable_by": sorted(engine for engine, verdict in said.items() if not verdict.startswith(("refuses", "without "))),
            "loadable_without_residuals_by": sorted(engine for engine, verdict in said.items() if "without residuals" in verdict),
            "loadable_without_branch_by": sorted(engine for engine, verdict in said.items() if "without branch" in verdict),
            "compress": __version__,
            "recipe_hash": self.recipe.hash,
            "seed": self.recipe.calibration.seed,
            "calibration_sha256": samples.digest if samples else None,
            "source": {"name": self.request.model, "sha256": sources},
            "versions": environment()["versions"],
            "files": dict(sorted((hashes | {CARD: sha256(staging / CARD)}).items(), key=lambda item: Path(item[0]))),
        }
        write_text(staging / "manifest.json", json.dumps(manifest, indent=2) + "\n")

    def _deliver(self, staging: Path) -> None:
        """Move the finished artifact to its place, then forget the work folder."""
        deliver(staging, self.request.out.absolute())
        shutil.rmtree(staging.parent)


def _hashes(staging: Path) -> dict[str, str]:
    """sha256 of each file of an artifact that a manifest tells of."""
    found = (path for path in sorted(staging.rglob("*")) if path.is_file() and path.name not in NOT_IN_MANIFEST)
    return {str(path.relative_to(staging)): sha256(path) for path in found}


def judge(recipe: Recipe, evaluation: dict[str, Any] | None, size: dict[str, Any], fallbacks: int) -> list[dict[str, Any]]:
    """Every gate with the figure, its confidence interval where there is one, and whether it is within bounds."""
    figures: dict[str, float | None] = {
        "bits_per_weight": size["bits_per_weight"],
        "size_ratio": size["after_bytes"] / size["before_bytes"],
        "fallbacks": fallbacks,
    }
    intervals: dict[str, Any] = {}
    if evaluation:
        figures |= evaluation["figures"]
        intervals = evaluation["intervals"]
    gates = []
    for name, bound in recipe.gates.items():
        value = figures[name]
        passed = value is not None and (bound.max is None or value <= bound.max) and (bound.min is None or value >= bound.min)
        low, high = intervals.get(name, (value, value))
        # The whole interval on one side of the bound: more data would not change the verdict.
        certain = value is not None and all(limit is None or not low < limit < high for limit in (bound.max, bound.min))
        gates.append(
            {
                "name": name,
                "value": value,
                "bound": bound.model_dump(exclude_none=True),
                "interval": [low, high],
                "passed": passed,
                "certain": certain,
            }
        )
    return gates


def environment() -> dict[str, Any]:
    """Versions and hardware, for the report."""
    packages = ("torch", "transformers", "compressed-tensors", "safetensors", "tokenizers")
    return {
        "versions": {"python": platform.python_version(), "compress": __version__} | {name: metadata.version(name) for name in packages},
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
    }
