"""A recipe: what to do to a model, checked completely before a weight is read."""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import os
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from compress import questions
from compress.engines import base as engines_base
from compress.errors import InputError, Problems
from compress.export import base as export_base
from compress.layout import Layout
from compress.numerics.pattern import Pattern
from compress.options import Options, parse, report, suggest
from compress.passes.base import (
    STAGES,
    WHY,
    Allocator,
    Balancing,
    Branching,
    Feeding,
    LearnsFromPairs,
    Pass,
    Prunes,
    Quantize,
    QuantizesCache,
    Refining,
    Restructure,
    Rewrite,
    Transform,
)
from compress.scheme import Caching, LatentScheme, Scheme


class Section(Options):
    """A part of a recipe: immutable, unknown keys refused."""


class Calibration(Section):
    """The data statistics are measured on."""

    data: str = Field(
        default="demo:text",
        min_length=1,
        description="`demo:text`, a `.txt` or `.jsonl` file, a folder of images with `data.jsonl`, or a data set on the hub (`id` or `id#config`)",
    )
    samples: int = Field(default=128, ge=1, description="sequences drawn")
    length: int = Field(default=512, ge=2, description="tokens per sequence, at most")
    seed: int = Field(default=0, description="of the draw")


NEW_TOKENS = {"lines": 100, "passkey": 16, "recall": 1}
"""By task of retrieval: so many tokens at most an answer has."""
RECALLED = range(5, 260)
"""Tokens of a sequence of associative recall that asks once: BOS, one to 128 pairs, SEP and a key."""


class Retrieval(Section):
    """Whether the model, before and after, finds what it was told long ago; all of it is loaded for this, packed."""

    task: Literal["lines", "passkey", "recall"] = Field(
        default="lines",
        description="`lines`: one of many lines is asked for; `passkey`: one number hidden in filler; `recall`: a key among pairs of tokens, for "
        "models that were trained on nothing else",
    )
    lengths: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(512, 1024), min_length=1, description="of prompts, in tokens")
    depths: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
        default=(0.0, 0.25, 0.5, 0.75, 1.0), min_length=1, description="where it stands, from 0 (the beginning) to 1 (the end)"
    )
    cases: int = Field(default=10, ge=1, description="prompts for each length and depth")
    seed: int = Field(default=0, description="of what prompts say")

    @model_validator(mode="after")
    def _room_for_pairs(self) -> Retrieval:
        if self.task == "recall" and not set(self.lengths) <= set(RECALLED):
            raise ValueError(f"lengths of recall must be from {RECALLED.start} to {RECALLED.stop - 1}, for 1 to 128 pairs")
        return self


class Evaluation(Section):
    """What the model is measured with before and after."""

    data: str = Field(
        default="demo:heldout",
        min_length=1,
        description="a `.txt` file, a folder of images with `data.jsonl`, `demo:heldout` or `demo:images-heldout`",
    )
    context: int = Field(default=512, ge=2, description="tokens per window; windows do not overlap")
    windows: int | None = Field(default=100, ge=1, description="at most this many windows; `null` for all")
    pairs: str | None = Field(default=None, min_length=1, description="minimal pairs (`.jsonl` of `good` and `bad`, or `demo:pairs`) for `accuracy`")
    skip_pairs: int = Field(default=0, ge=0, description="leave out so many of the pairs, those that a pass with `first` has learnt from")
    tasks: tuple[str, ...] = Field(default=(), description="lm-eval tasks: names, or paths of task files; the whole model is loaded for these")
    retrieval: Retrieval | None = Field(default=None, description="also measure retrieval from long prompts, for `retrieval_drop`; `null` to skip")


class Bound(Section):
    """What a gate lets through."""

    max: float | None = None
    min: float | None = None

    @model_validator(mode="after")
    def _some_bound(self) -> Bound:
        if self.max is None and self.min is None:
            raise ValueError("needs max or min")
        return self


MEASURED_GATES = {
    "perplexity_ratio": "perplexity after, divided by perplexity before",
    "kl": "mean Kullback-Leibler divergence from the original's next-token distribution, in nats",
    "top1_agreement": "share of positions where both models predict the same token",
    "accuracy_drop": "accuracy before minus accuracy after",
    "retrieval_drop": "share of answers right before minus share right after, over all of `evaluate.retrieval`",
}
RECORDED_GATES = {
    "bits_per_weight": "of everything stored for the weights of the quantised linears",
    "size_ratio": "bytes after, divided by bytes before",
    "fallbacks": "how often a pass had to make do",
}
GATES = MEASURED_GATES | RECORDED_GATES


class Recipe(Section):
    """The whole recipe; every key but `passes` has a default."""

    calibration: Calibration = Calibration()
    passes: tuple[dict[str, Any], ...] = Field(min_length=1, description="in order; each is one file in `compress/passes/`")
    evaluate: Evaluation | None = Field(default=Evaluation(), description="`null` to skip")
    gates: dict[Annotated[str, Field(description="what is measured")], Bound] = Field(
        default={}, description="a run whose figures leave these bounds exits with 3"
    )
    export: tuple[str, ...] = Field(
        default=("compressed-tensors",),
        min_length=1,
        description="each is one file in `compress/export/`: first the layout of the artifact, then those that copies of it beside it shall have",
    )
    verify: Literal["auto", "full", "streamed"] = Field(
        default="auto",
        description="how the artifact is reopened: `full` loads all of it into plain transformers and compares logits, `streamed` compares "
        "every tensor block by block; `auto` is `full` up to 2 GiB of weights where transformers reads them",
    )

    def instances(self) -> list[tuple[str, Pass]]:
        """The passes in order, with their names; one that allocates knows them all."""
        named = [(name, _pass_class(name).model_validate(options or {})) for step in self.passes for name, options in step.items()]
        return [(name, step.among([each for _, each in named]) if isinstance(step, Allocator) else step) for name, step in named]

    @property
    def hash(self) -> str:
        """sha256 of the recipe with every default filled in."""
        return hashlib.sha256(json.dumps(self.resolved(), sort_keys=True).encode()).hexdigest()

    def resolved(self) -> dict[str, Any]:
        """Plain data with every default filled in."""
        plain = self.model_dump(mode="json")
        plain["passes"] = [{name: step.model_dump(mode="json")} for name, step in self.instances()]
        return plain


def pass_names() -> list[str]:
    """Every pass, found by file name."""
    return _modules("compress.passes")


def export_names() -> list[str]:
    """Every export target, found by file name."""
    return [name.replace("_", "-") for name in _modules("compress.export")]


def export_module(name: str) -> ModuleType:
    """The module that writes an export target."""
    return importlib.import_module(f"compress.export.{name.replace('-', '_')}")


def _modules(package: str) -> list[str]:
    path = importlib.import_module(package).__path__
    return sorted(module.name for module in pkgutil.iter_modules(path) if module.name != "base")


def _pass_class(name: str) -> Any:
    return importlib.import_module(f"compress.passes.{name}").Pass


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, of which YAML would silently take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.value[index][0].start_mark)
        return super().construct_mapping(node, deep)


def read(path: Path, remedy: str = "`compress recipes` lists those that ship with the project") -> object:
    """The plain data of a recipe file, or of another in YAML. Raises `InputError` if it is none, with the `remedy` for one that cannot be read."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise InputError.one(str(path), f"cannot be read ({error.strerror})", remedy) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError.one(str(path), f"is not YAML ({' '.join(str(error).split())})") from error


def load(path: Path) -> Recipe:
    """Read and validate a recipe. Raises `InputError` with every mistake in it, each with its place."""
    return validate(read(path), path.name)


def validate(plain: object, place: str) -> Recipe:
    """A recipe from plain data; `place` starts every message."""
    return parse(Recipe, plain, place, "the key passes", _check_plain, told="passes")


def _check_plain(plain: dict[str, Any], place: str, problems: Problems) -> None:
    _check_passes(plain.get("passes"), place, problems)
    _check_names(plain, place, problems)


def salvage(plain: object) -> Recipe | None:
    """What is left of a faulty recipe without its faults, so that the rest can be checked against the model in the same go."""
    if not isinstance(plain, dict):
        return None
    kept = {key: value for key, value in plain.items() if key in Recipe.model_fields and key not in ("gates", "export")}
    steps = kept.get("passes")
    kept["passes"] = [step for step in map(_salvage_step, steps if isinstance(steps, list) else []) if step]
    cleaned = _cleaned(Recipe, kept)
    return Recipe.model_validate(cleaned) if cleaned is not None else None


def _salvage_step(step: object) -> dict[str, Any] | None:
    if not isinstance(step, dict) or len(step) != 1:
        return None
    name, options = next(iter(step.items()))
    if name not in pass_names() or not isinstance(options, dict | None):
        return None
    cleaned = _cleaned(_pass_class(name), options or {})
    return {name: cleaned} if cleaned is not None else None


def _cleaned(model: type[BaseModel], plain: dict[str, Any]) -> dict[str, Any] | None:
    """`plain` without the keys `model` refuses, or None if nothing valid remains."""
    try:
        model.model_validate(plain)
        return plain
    except ValidationError as error:
        plain = copy.deepcopy(plain)
        for item in error.errors():
            node: Any = plain
            for part in item["loc"]:
                if not isinstance(node, dict) or part not in node:
                    break
                if isinstance(node[part], dict) and part != item["loc"][-1]:
                    node = node[part]
                else:
                    del node[part]
    try:
        model.model_validate(plain)
        return plain
    except ValidationError:
        return None


def _check_passes(steps: object, place: str, problems: Problems) -> None:
    if not isinstance(steps, list):
        return
    stage_reached = 0
    for index, step in enumerate(steps):
        where = f"{place}: passes[{index}]"
        if not isinstance(step, dict) or len(step) != 1:
            problems.add(where, "must be one pass name with its options", "write `- gptq: {bits: 4}`")
            continue
        name, options = next(iter(step.items()))
        if name not in pass_names():
            problems.add(where, f"no pass is called {name!r}", suggest(str(name), pass_names()))
            continue
        if not isinstance(options, dict | None):
            problems.add(f"{where}.{name}", f"options must be a mapping, got {options!r}", "write `- gptq: {bits: 4}`")
            continue
        cls = _pass_class(name)
        try:
            cls.model_validate(options or {})
        except ValidationError as error:
            report(error, f"{where}.{name}", cls, problems)
        stage = STAGES.index(cls.stage)
        if stage < stage_reached:
            reason = WHY.get((cls.stage, STAGES[stage_reached]))
            problems.add(
                where,
                f"{name} belongs to stage {cls.stage}, but comes after a pass of stage {STAGES[stage_reached]}",
                f"the order is {' < '.join(STAGES)}" + (f": {reason}" if reason else ""),
            )
        stage_reached = max(stage, stage_reached)


def _check_names(plain: dict[str, Any], place: str, problems: Problems) -> None:
    gates = plain.get("gates")
    for name in gates if isinstance(gates, dict) else ():
        if name not in GATES:
            problems.add(f"{place}: gates.{name}", "nothing of this name is measured", suggest(str(name), list(GATES)))
        elif name in MEASURED_GATES and "evaluate" in plain and plain["evaluate"] is None:
            problems.add(f"{place}: gates.{name}", "needs an evaluation, but evaluate is null", "give evaluate some data or drop the gate")
        elif name == "retrieval_drop" and not (isinstance(evaluation := plain.get("evaluate"), dict) and evaluation.get("retrieval") is not None):
            problems.add(f"{place}: gates.{name}", "needs evaluate.retrieval, which is not set", "set it, such as to {}, or drop the gate")
    exports = plain.get("export")
    exports = exports if isinstance(exports, list) else []
    for name in exports:
        if name not in export_names():
            problems.add(f"{place}: export", f"no export is called {name!r}", suggest(str(name), export_names()))
        elif (name == exports[0]) != export_module(name).READABLE:
            first = [each for each in export_names() if export_module(each).READABLE]
            what = f"{name} comes first, but compress cannot read it back" if name == exports[0] else f"{name} can only come first"
            problems.add(f"{place}: export", what, f"begin with one of {', '.join(first)}, then name those to be made of it")
        elif exports.count(name) > 1:
            problems.add(f"{place}: export", f"names {name} twice", "name it once")


def check(recipe: Recipe, layout: Layout, place: str, *, done: int = 0) -> dict[str, tuple[str, Scheme]]:
    """Everything that can be known before weights load. Returns pass and scheme per linear; raises `InputError` with every problem.

    The first so many passes are `done` already, and `layout` is what they made. Linears are called as they will be in the end; those whose bits
    are yet to be allocated are returned with the most they may get.
    """
    problems = Problems()
    plan: dict[str, tuple[str, Scheme]] = {}
    layout.refuse_quantized()  # of a model that cannot be compressed nothing else can be known
    of_cache = [index for index, (_, step) in enumerate(recipe.instances()) if isinstance(step, QuantizesCache)]
    for index in of_cache[1:]:
        problems.add(f"{place}: passes[{index}]", f"the cache is already taken by passes[{of_cache[0]}]", "keep one of them")
    found: list[Layout] = []
    allocators, examples = 0, [dict[str, int]()]
    for index, (name, step) in list(enumerate(recipe.instances()))[done:]:
        where = f"{place}: passes[{index}].{name}"
        before = len(problems)
        found.append(layout)
        step.check(where, layout, problems)
        if isinstance(step, Feeding) and not layout.arch.image:  # what images make of tokens is known once they are read
            step.check_tokens(where, layout, recipe.calibration.samples, recipe.calibration.length, problems)
        if layout.uneven and (taken := sorted(step.plan(layout).keys() & layout.of_experts)):
            what = f"{taken[0]} is of an expert that differs in width from others, which no kernel takes in few bits"
            problems.add(where, what, "exclude '*.experts.*', or take widths: uniform")
        if isinstance(step, Allocator):
            allocators += 1
            if allocators > 1:
                problems.add(where, "is the second pass that allocates bits", "let one allocate them for all passes behind it")
        elif isinstance(step, Quantize) and step.bits == "allocated":
            if not allocators:
                problems.add(f"{where}: bits", "no pass before it allocates any", "put an allocate pass before it, or give a number")
            step = step.given(examples[0])
        if len(problems) > before or (isinstance(step, Quantize) and step.bits == "allocated" and not examples[0]):
            continue  # what is wrong with it, or with the pass that allocates, has been told
        if isinstance(step, Restructure):
            layout = step.expected(layout)
        if isinstance(step, Allocator):
            examples = step.examples(layout)
        for linear, scheme in step.plan(layout).items():
            if linear in plan:
                problems.add(
                    where, f"{linear} is already quantised by {plan[linear][0]}", "use include and exclude so that each linear is taken once"
                )
                break
            plan[linear] = (name, scheme)
        if isinstance(step, Refining):
            refined = step.refine(where, {linear: scheme for linear, (_, scheme) in plan.items() if linear in layout.linears}, problems)
            plan |= {linear: (plan[linear][0], scheme) for linear, scheme in refined.items()}
    if found:
        _check_pruned(recipe, found, place, problems)
        _check_branches(recipe, found, place, problems)
    for index, (name, step) in enumerate(recipe.instances()):
        if isinstance(step, Rewrite) and not len(problems):  # a plan with a fault in it says little
            step.check_plan(f"{place}: passes[{index}].{name}", {linear: scheme for linear, (_, scheme) in plan.items()}, problems)
    # Of passes in a wrong order some may plan for linears that others take away.
    _check_export(recipe, layout, place, {name: scheme for name, (_, scheme) in plan.items() if name in layout.all_linears}, examples, problems)
    caching = cache_scheme(recipe)
    if isinstance(caching, LatentScheme) and recipe.evaluate and recipe.evaluate.context <= caching.window:
        problems.add(
            f"{place}: evaluate.context",
            f"in {recipe.evaluate.context} tokens nothing is older than the window of {caching.window}, so what latents lose would not be measured",
            "set it higher, or the window lower",
        )
    beside = ["residuals"] * any(scheme.residuals for _, scheme in plan.values()) + ["branches"] * keeps_branches(recipe)
    if recipe.evaluate and recipe.evaluate.tasks and beside:
        problems.add(
            f"{place}: evaluate.tasks",
            f"lm-eval runs the artifact in transformers, which leaves {' and '.join(beside)} out",
            "drop the tasks; the other figures are measured with them",
        )
    _check_retrieval(recipe, layout, place, problems)
    _check_data(recipe, layout, place, problems)
    problems.raise_if_any()
    return plan


def _check_pruned(recipe: Recipe, found: list[Layout], place: str, problems: Problems) -> None:
    """Report passes that would undo what one before them removed. The last passes of the recipe find these layouts."""
    pruned: dict[str, tuple[str, Pattern]] = {}
    steps = list(enumerate(recipe.instances()))[-len(found) :]
    for (index, (name, step)), layout in zip(steps, found, strict=True):
        where = f"{place}: passes[{index}].{name}"
        if isinstance(step, Prunes):
            mine = step.prunes(layout)
            if again := next((linear for linear in mine if linear in pruned), None):
                problems.add(where, f"{again} is already pruned by {pruned[again][0]}", "use include and exclude so that each linear is taken once")
            if step.moves and (blocks := next((pattern for _, pattern in pruned.values() if pattern.v), None)):
                problems.add(
                    f"{where}: permute", f"would move outputs out of the blocks of {blocks} that a pass before it made", "set permute: false"
                )
            pruned |= {linear: (name, pattern) for linear, pattern in mine.items()}
        elif pruned and isinstance(step, Rewrite) and step.mixes:
            by, _ = next(iter(pruned.values()))
            problems.add(where, f"makes sums of channels, in which no weight that {by} removed stays zero", f"leave out {name}, or {by}")


def _check_branches(recipe: Recipe, found: list[Layout], place: str, problems: Problems) -> None:
    """Report branches beside nothing, and passes that give the inputs they add up another order or size. As for `_check_pruned`."""
    pruned: set[str] = set()
    moved, kept = "", ""
    steps = list(enumerate(recipe.instances()))[-len(found) :]
    for (index, (name, step)), layout in zip(steps, found, strict=True):
        where = f"{place}: passes[{index}].{name}"
        moves = isinstance(step, Prunes) and step.moves
        branches = isinstance(step, Branching) and step.branch is not None
        if kept and (moves or branches or isinstance(step, Transform)):
            problems.add(where, f"would change the inputs that the branches of {kept} add up, or add more", f"set branch_after: merge in {kept}")
        if isinstance(step, Prunes):
            pruned |= step.prunes(layout).keys()
            moved = name if moves else moved
        if isinstance(step, Branching) and branches:
            if not pruned:
                problems.add(
                    f"{where}: branch", "no linear has an N:M pattern that a branch could make good for", "put prune_nm before it, or leave it out"
                )
            if moved:
                problems.add(f"{where}: branch", f"{moved} gives inputs another order than the source has them in", "set permute: false")
            kept = f"passes[{index}].{name}" if step.keeps_branches else kept
            pruned = pruned if step.keeps_branches else set()


def keeps_branches(recipe: Recipe) -> bool:
    """Whether branches will lie beside linears of the artifact."""
    return any(isinstance(step, Branching) and step.keeps_branches for _, step in recipe.instances())


def said_of(export: str, layout: Layout, schemes: dict[str, Scheme], cache: Caching | None = None) -> dict[str, str]:
    """For each engine, whether and how it reads an artifact that is written as `export`."""
    return engines_base.verdicts(export, layout, schemes, cache, export_module(export).verdicts(layout, schemes, cache))


def verdicts(recipe: Recipe, layout: Layout, schemes: dict[str, Scheme], target: str | None = None) -> dict[str, str]:
    """For each engine, whether and how it reads what `recipe` makes with these schemes, as `target`; by default as the artifact."""
    found = said_of(target or recipe.export[0], layout, schemes, cache_scheme(recipe))
    if not keeps_branches(recipe):
        return found
    # Like residuals they lie where no engine looks.
    theirs = {engine: text for engine, text in found.items() if engine != "compress"}
    return {"compress": "loads"} | {engine: text if text.startswith("refuses") else f"without branch; {text}" for engine, text in theirs.items()}


def _check_export(recipe: Recipe, layout: Layout, place: str, plan: dict[str, Scheme], examples: list[dict[str, int]], problems: Problems) -> None:
    """What is exported must be possible with whatever bits are allocated."""
    found = Problems()
    for target in recipe.export:
        if target == "nm-packed" and not any(isinstance(step, Prunes) for _, step in recipe.instances()):
            found.add(f"{place}: export", "nothing is pruned that nm-packed could pack", "add a pass such as prune_nm, or take compressed-tensors")
        if target == "nm-packed" and any(isinstance(step, Branching) and step.branch and not step.keeps_branches for _, step in recipe.instances()):
            found.add(
                f"{place}: export", "branches that are merged fill what was removed, so that nm-packed packs nothing", "keep them, or drop them"
            )
        for bits in examples:
            schemes = plan | {name: plan[name].model_copy(update={"bits": bits[name]}) for name in plan.keys() & bits.keys()}
            exporter = export_module(target)
            if not exporter.READABLE:
                check_copy(f"{place}: export", target, recipe, layout, schemes, found)
                continue
            exporter.check(f"{place}: export", layout, schemes, found)
            verdict = exporter.verdicts(layout, schemes, cache_scheme(recipe))["transformers"]
            if recipe.verify == "full" and verdict.startswith("refuses"):
                found.add(f"{place}: verify", f"full opens the artifact with transformers, which {verdict}", "take auto, or streamed")
            if verdict.startswith("refuses") and recipe.evaluate and recipe.evaluate.tasks:
                found.add(f"{place}: evaluate.tasks", f"lm-eval runs the artifact in transformers, which {verdict}", "drop the tasks")
    if len(found):
        problems.absorb(InputError(dict.fromkeys(found)))  # each is told once


def check_copy(place: str, target: str, recipe: Recipe, layout: Layout, plan: dict[str, Scheme], problems: Problems) -> None:
    """Report what a copy of the artifact as `target` cannot hold."""
    export_module(target).check(place, layout, plan, problems)
    export_base.refuse(place, target, layout, plan, cache_scheme(recipe), problems)
    if keeps_branches(recipe):
        problems.add(place, f"{target} has no place for branches", "merge or drop them, or leave it out")


def expected(recipe: Recipe, layout: Layout) -> list[Layout]:
    """What each pass will find, as far as headers tell, and last what comes out. For recipes that `check` has found nothing wrong with."""
    layouts = [layout]
    for _, step in recipe.instances():
        layouts.append(step.expected(layouts[-1]) if isinstance(step, Restructure) else layouts[-1])
    return layouts


def cache_scheme(recipe: Recipe) -> Caching | None:
    """How the KV cache is stored, or None if it stays as it is."""
    return next((step.cache() for _, step in recipe.instances() if isinstance(step, QuantizesCache)), None)


def _check_pairs(recipe: Recipe, evaluation: Evaluation, place: str, problems: Problems) -> None:
    """Nothing is judged by what it was chosen by."""
    if evaluation.skip_pairs and not evaluation.pairs:
        problems.add(f"{place}: evaluate.skip_pairs", "is an option of pairs", "leave it out")
    for name, step in recipe.instances():
        if not isinstance(step, LearnsFromPairs) or step.pairs is None or step.pairs != evaluation.pairs:
            continue
        if step.first is None:
            problems.add(f"{place}: evaluate.pairs", f"{name} learns from all pairs of {step.pairs}", f"set {name}.first, and skip_pairs to as many")
        elif evaluation.skip_pairs < step.first:
            problems.add(f"{place}: evaluate.skip_pairs", f"{name} learns from the first {step.first} pairs", f"set it to {step.first} or more")


def _check_retrieval(recipe: Recipe, layout: Layout, place: str, problems: Problems) -> None:
    """Prompts and answers must fit into the model."""
    wanted = recipe.evaluate.retrieval if recipe.evaluate else None
    if wanted is None:
        return
    longest, new = layout.text_config.get("max_position_embeddings"), NEW_TOKENS[wanted.task]
    for length in wanted.lengths:
        if isinstance(longest, int) and length + new > longest:
            fits = f"choose at most {longest - new}" if longest > new else "drop it"
            problems.add(f"{place}: evaluate.retrieval.lengths", f"{length} and {new} new tokens exceed the model's {longest}", fits)


def _check_data(recipe: Recipe, layout: Layout, place: str, problems: Problems) -> None:
    from compress.source import HUB_ID, locate_data

    longest = layout.text_config.get("max_position_embeddings")
    wanted = {"calibration.length": recipe.calibration.length} if any(step.needs_data for _, step in recipe.instances()) else {}
    names = {"calibration.data": recipe.calibration.data} if wanted else {}
    for index, (name, step) in enumerate(recipe.instances()):
        if isinstance(step, LearnsFromPairs) and step.pairs:
            names[f"passes[{index}].{name}.pairs"] = step.pairs
    if recipe.evaluate:
        wanted["evaluate.context"] = recipe.evaluate.context
        names["evaluate.data"] = recipe.evaluate.data
        if recipe.evaluate.pairs:
            names["evaluate.pairs"] = recipe.evaluate.pairs
        _check_pairs(recipe, recipe.evaluate, place, problems)
    for key, tokens in wanted.items():
        if isinstance(longest, int) and tokens > longest:
            problems.add(f"{place}: {key}", f"{tokens} tokens exceed the model's {longest}", f"set it to {longest} or less")
    for key, name in names.items():
        try:
            path = locate_data(name)
        except InputError as error:
            problems.add(f"{place}: {key}", str(error))
            continue
        if not path.exists() and (key != "calibration.data" or not HUB_ID.fullmatch(name.partition("#")[0])):
            problems.add(f"{place}: {key}", f"{name} is no file or folder", "paths are relative to where the command runs")
        elif path.exists() and not os.access(path, os.R_OK):
            problems.add(f"{place}: {key}", f"{name} may not be read", "change its permissions, or give another")
        elif key == "calibration.data" and path.is_file() and path.suffix not in (".txt", ".jsonl"):
            problems.add(f"{place}: {key}", f"{name} is neither a .txt nor a .jsonl file", "give one, a folder, a hub id or demo:text")
        if (path / questions.FILE).exists() and not layout.arch.image:
            problems.add(f"{place}: {key}", f"{name} holds images, but a {layout.arch.model_type} reads text only", "give text")
        elif key == "evaluate.data" and path.is_dir() and not (path / questions.FILE).exists():
            problems.add(f"{place}: {key}", f"{name} is a folder without {questions.FILE}", f"give a .txt file, or write one: {questions.NEEDED}")
        else:
            questions.check_folder(path, f"{place}: {key}: {name}", problems)
        balancing = [f"passes[{index}].{by}" for index, (by, step) in enumerate(recipe.instances()) if isinstance(step, Balancing) and step.balances]
        if key == "calibration.data" and path.is_file() and layout.arch.image and balancing:
            what = f"{name} is text, which has no vision tokens that {balancing[0]} could balance with it"
            problems.add(f"{place}: {key}", what, "give images with questions, such as demo:images, or leave the balance out")
