"""Which recipe suits a model, a memory and an engine, from headers and from what others measured.

What was measured and what follows from it is data, `advice.yaml` beside this file. Here it is read, checked and applied: every candidate is
turned into a recipe, checked against the model like any other, weighed and judged; of those left the goal picks one.
"""

from __future__ import annotations

import math
import re
import shlex
import textwrap
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from compress import recipe
from compress.errors import InputError, Problem, Problems
from compress.layout import Layout
from compress.planning import cache_bytes
from compress.scheme import CacheScheme, Scheme, output_bytes

GOALS = ("lossless", "balanced", "smallest")
USES = ("chat", "reasoning")
VERDICTS = ("safe", "warn", "experimental", "refuse")
"""Each is a notch below the one before it."""
UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
CONTEXT = 4096
"""Tokens a cache is planned for if the user does not say."""
NARROWEST_GROUP = 32
"""Kernels of engines know no narrower groups of integers."""
CACHE = CacheScheme(format="fp8", granularity="tensor")
"""The cache of eight bits that every engine with one reads."""
WIDTH = 110
"""Columns of the comments in a recipe."""


class Section(BaseModel):
    """A part of the data: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Evidence(Section):
    """What a format did to models of some sizes when rounded to nearest; see the comments in the data."""

    format: str
    source: str
    above: float | None = Field(default=None, alias="from")
    to: float | None = None
    change: dict[str, tuple[float, float]] = {}
    kept_at_length: tuple[float, float] | None = None
    collapses: bool = False


class Multiplier(Section):
    """The share of rounding's loss that a method leaves; without a format, in all of them."""

    method: str
    format: str | None = None
    source: str
    left: dict[str, float] = Field(min_length=1)


class Engine(Section):
    """What serves the result: whether weights stay packed in its memory, and the bits its cache may have."""

    name: str
    keeps_packed: bool
    cache: tuple[int, ...]


class Candidate(Section):
    """A way to store the weights; ``uses`` are those it is offered for, none meaning all."""

    name: str
    format: str
    method: str
    text: str
    uses: tuple[Literal["chat", "reasoning"], ...] = ()
    passes: tuple[dict[str, dict[str, Any]], ...]
    for_experts: dict[str, Any] = {}


@dataclass(frozen=True)
class Case:
    """What a rule looks at."""

    goal: str
    use: str
    format: str
    method: str
    cache: int
    parameters: float
    context: int
    experts: bool
    images: bool


class When(Section):
    """What must hold for a rule to fit; what is not said may be anything."""

    goal: tuple[Literal["lossless", "balanced", "smallest"], ...] = ()
    use: tuple[Literal["chat", "reasoning"], ...] = ()
    format: tuple[str, ...] = ()
    method: tuple[str, ...] = ()
    cache: tuple[int, ...] = ()
    above: float | None = Field(default=None, alias="from")
    to: float | None = None
    context_to: int | None = None
    experts: bool | None = None
    images: bool | None = None

    def fits(self, case: Case) -> bool:
        listed = all(not getattr(self, key) or getattr(case, key) in getattr(self, key) for key in ("goal", "use", "format", "method", "cache"))
        flags = all(getattr(self, key) in (None, getattr(case, key)) for key in ("experts", "images"))
        return listed and flags and _between(case.parameters, self.above, self.to) and (self.context_to is None or case.context <= self.context_to)


class Gate(Section):
    """How to find out: bounds for the recipe, lm-eval tasks to run on both models, and what to look for in them."""

    bounds: dict[str, recipe.Bound] = {}
    tasks: tuple[str, ...] = ()
    look_for: str


class Rule(Section):
    """A verdict, for what it holds, why, and how to find out; where it is a refusal, what to do instead."""

    when: When
    verdict: Literal["safe", "warn", "experimental", "refuse"]
    why: str
    gate: Gate | None = None
    instead: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> Rule:
        if (self.gate is None) != (self.verdict == "refuse") or (self.instead is None) == (self.verdict == "refuse"):
            raise ValueError("a refusal says what to do instead, every other verdict names its gate")
        return self


class Note(Section):
    """Something worth saying."""

    when: When
    text: str


class Kin(Section):
    """Models recognised by their config."""

    model_type: str
    vocabulary_from: int = 0


class HeavilyTrained(Section):
    """Models on which verdicts on some formats are a notch lower."""

    formats: tuple[str, ...]
    models: tuple[Kin, ...]


class Book(Section):
    """All of `advice.yaml`."""

    sources: dict[str, str]
    caveats: tuple[str, ...]
    evidence: tuple[Evidence, ...]
    multipliers: tuple[Multiplier, ...]
    engines: dict[str, Engine]
    candidates: tuple[Candidate, ...]
    weights: tuple[Rule, ...]
    cache: tuple[Rule, ...]
    notes: tuple[Note, ...]
    heavily_trained: HeavilyTrained


@cache
def book() -> Book:
    """The data, validated."""
    return Book.model_validate(yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Wish:
    """What the user asks for; ``memory`` in bytes, ``context`` in tokens."""

    memory: int
    engine: str
    goal: str
    use: str
    context: int


def wish(layout: Layout, memory: str, engine: str, goal: str, use: str, context: int | None) -> Wish:
    """What the command line says, checked. Raises `InputError` with everything wrong in it."""
    problems = Problems()
    for option, value, known in (("--engine", engine, tuple(book().engines)), ("--goal", goal, GOALS), ("--use", use, USES)):
        if value not in known:
            problems.add(option, f"{value!r} is not known", f"known are {', '.join(known)}")
    size = _bytes(memory, problems)
    longest = layout.text_config.get("max_position_embeddings")
    tokens = context if context is not None else min(CONTEXT, longest if isinstance(longest, int) else CONTEXT)
    if isinstance(longest, int) and tokens > longest:
        problems.add("--context", f"{tokens} tokens exceed the model's {longest}", f"set it to {longest} or less")
    problems.raise_if_any()
    return Wish(size, engine, goal, use, tokens)


def _bytes(text: str, problems: Problems) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text.lower())
    if not match or match[2] not in UNITS or not float(match[1]):
        problems.add("--memory", f"{text!r} is no size", "write a number and a unit, such as 12GiB, 12GB or 800MB")
        return 0
    return int(float(match[1]) * UNITS[match[2]])


@dataclass(frozen=True)
class Offer:
    """A candidate with a cache, on this model. ``against`` is why it cannot be taken, whatever the memory, or None; then sizes are known."""

    candidate: Candidate
    case: Case
    rules: tuple[Rule, Rule]
    verdict: str
    against: str | None
    schemes: dict[str, Scheme]
    file_bytes: int
    weight_bytes: int
    cache_bytes: int

    @property
    def gate(self) -> Gate:
        """How to find out, of an offer that may be taken."""
        assert self.rules[0].gate
        return self.rules[0].gate

    @property
    def needs(self) -> int:
        return self.weight_bytes + self.cache_bytes

    @property
    def name(self) -> str:
        return self.candidate.name if self.case.cache == 16 else f"{self.candidate.name} + kv{self.case.cache}"

    @property
    def text(self) -> str:
        return self.candidate.text if self.case.cache == 16 else f"{self.candidate.text}; FP8 cache"


def advise(layout: Layout, model: str, wished: Wish, file: str) -> dict[str, Any]:
    """The recipe that suits best, why, and what was passed over; ``file`` is what the recipe will be called.

    Raises `InputError` with every reason if nothing suits.
    """
    layout.refuse_quantized()
    holds = parts(layout)
    parameters = sum(part["parameters"] for part in holds)
    candidates = [candidate for candidate in book().candidates if not candidate.uses or wished.use in candidate.uses]
    offers = [offer for candidate in candidates for offer in _offers(layout, candidate, wished, parameters)]
    left = [offer for offer in offers if offer.against is None and offer.needs <= wished.memory]
    if not left:
        raise InputError(_refusal(offers, wished))
    chosen = min(left, key=lambda offer: offer.needs) if wished.goal == "smallest" else left[0]
    return {"model": model, "parts": holds} | _result(layout, model, wished, offers, chosen, file)


def _offers(layout: Layout, candidate: Candidate, wished: Wish, parameters: int) -> list[Offer]:
    """A candidate with each cache that the engine has; only with the first if it cannot be taken anyway."""
    engine = book().engines[wished.engine]
    schemes: dict[str, Scheme] = {}
    offers: list[Offer] = []
    for bits in engine.cache:
        case = Case(
            wished.goal, wished.use, candidate.format, candidate.method, bits, parameters, wished.context,
            experts=layout.arch.experts is not None, images=layout.arch.image,
        )  # fmt: skip
        rule, cache_rule = (next(rule for rule in rules if rule.when.fits(case)) for rules in (book().weights, book().cache))
        verdict = max(_lowered(rule.verdict, candidate, layout), cache_rule.verdict, key=VERDICTS.index)
        against = _too_risky(verdict, rule, wished.goal)
        if not against and not schemes:
            schemes, against = _schemes(layout, candidate, engine)
        file_bytes = output_bytes(layout, schemes, CACHE if bits == 8 else None)
        weight_bytes = file_bytes if engine.keeps_packed else layout.checkpoint.nbytes
        held = cache_bytes(layout, wished.context, bits)
        offers.append(Offer(candidate, case, (rule, cache_rule), verdict, against, schemes, file_bytes, weight_bytes, held))
        if against:
            break
    return offers


def _schemes(layout: Layout, candidate: Candidate, engine: Engine) -> tuple[dict[str, Scheme], str | None]:
    """What becomes of each linear, and why the program or the engine cannot do it, if so."""
    try:
        checked = recipe.validate(_plain(layout, candidate, 16, {}), candidate.name)
        schemes = {name: scheme for name, (_, scheme) in recipe.check(checked, layout, candidate.name).items()}
    except InputError as error:
        return {}, str(error.problems[0])
    reads = recipe.export_module(checked.export[0]).verdicts(layout, schemes)[engine.name]
    return schemes, f"{engine.name} {reads}" if reads.startswith("refuses") else None


def _lowered(verdict: str, candidate: Candidate, layout: Layout) -> str:
    """``verdict``, a notch lower where the model was trained too much for it."""
    config, data = layout.text_config, book().heavily_trained
    kin = any(layout.arch.model_type == each.model_type and config.get("vocab_size", 0) >= each.vocabulary_from for each in data.models)
    if not kin or candidate.format not in data.formats:
        return verdict
    return VERDICTS[min(VERDICTS.index(verdict) + 1, len(VERDICTS) - 1)]


def _too_risky(verdict: str, rule: Rule, goal: str) -> str | None:
    if verdict == "refuse":
        return f"{rule.why}; take {rule.instead or 'more bits, as this model was trained for long'}"
    if verdict == "experimental" and goal != "smallest":
        return f"{rule.why}: an experiment, which only --goal smallest makes"
    return None


def _plain(layout: Layout, candidate: Candidate, bits: int, bounds: dict[str, recipe.Bound]) -> dict[str, Any]:
    """The recipe of a candidate as plain data, fitted to the widths and the kind of the model."""
    longest = layout.text_config.get("max_position_embeddings")
    length = min(512, longest) if isinstance(longest, int) else 512
    passes = [{name: _fitted(layout, candidate, options) for name, options in step.items()} for step in candidate.passes]
    if bits == 8:
        passes.append({"kv_quant": CACHE.model_dump()})
    images = layout.arch.image
    plain: dict[str, Any] = {
        "calibration": {"data": "demo:images" if images else "demo:text", "samples": 128, "length": length},
        "passes": passes,
        "evaluate": {"data": "demo:images-heldout", "context": length, "windows": None} if images else {"data": "demo:heldout", "context": length},
        "gates": {name: bound.model_dump(exclude_none=True) for name, bound in bounds.items()},
    }
    if candidate.method == "rtn" and bits == 16:
        del plain["calibration"]
    return plain


def _fitted(layout: Layout, candidate: Candidate, options: dict[str, Any]) -> dict[str, Any]:
    """``options`` of a pass with the widest group up to theirs that divides every width; where none does, one scale per output."""
    options = options | (candidate.for_experts if layout.arch.experts else {})
    widest = options.get("group_size")
    if not isinstance(widest, int):
        return options
    groups = [widest >> halvings for halvings in range(widest.bit_length()) if widest >> halvings >= NARROWEST_GROUP]
    fitting = [group for group in groups if not any(linear.columns % group for linear in layout.linears.values())]
    return options | ({"group_size": fitting[0]} if fitting else {"indivisible": "channel"})


def parts(layout: Layout) -> list[dict[str, Any]]:
    """Parameters and bytes of the model by what they are for, the largest first."""
    found: dict[str, dict[str, Any]] = {}
    for name, info in layout.checkpoint.tensors.items():
        part = _part(layout, name)
        item = found.setdefault(part, {"part": part, "parameters": 0, "bytes": 0})
        item["parameters"] += math.prod(info.shape)
        item["bytes"] += info.nbytes
    return sorted(found.values(), key=lambda item: -item["bytes"])


def _part(layout: Layout, name: str) -> str:
    linear = name.removesuffix(".weight")
    if linear in layout.linears:
        return "experts" if linear in layout.of_experts else "linears of the blocks"
    if name in layout.in_blocks or linear.endswith("norm"):
        return "norms, biases and routers"
    return "embeddings and output head" if linear.endswith(("embed_tokens", "lm_head")) else "everything else"


def expected(layout: Layout, offer: Offer) -> dict[str, tuple[float, float]]:
    """Change of each task against 16 bits in percent, median and worst: of each format by its share of the weights, and of the cache, added up.

    Empty where nothing was measured, or where it collapsed.
    """
    weights: dict[str, float] = {}
    for name, scheme in offer.schemes.items():
        weights[kind(scheme)] = weights.get(kind(scheme), 0) + layout.linears[name].rows * layout.linears[name].columns
    whole = sum(weights.values())
    terms = {format_: count / whole * _left(offer.candidate.method, format_) for format_, count in weights.items()}
    if offer.case.cache < 16:
        terms[f"kv{offer.case.cache}"] = 1.0
    changes = {format_: _change(format_, offer.case.parameters) for format_ in terms}
    known = [task for task in changes[next(iter(weights))] if all(task in changes[format_] for format_ in weights)]

    def total(task: str, side: int) -> float:
        return sum(factor * changes[format_].get(task, (0.0, 0.0))[side] for format_, factor in terms.items())

    return {task: (total(task, 0), total(task, 1)) for task in known}


def _change(format_: str, parameters: float) -> dict[str, tuple[float, float]]:
    """What rounding to nearest changed, by task."""
    return next((each.change for each in book().evidence if each.format == format_ and _between(parameters, each.above, each.to)), {})


def kind(scheme: Scheme) -> str:
    """A scheme as the evidence calls it."""
    return scheme.format if scheme.format != "int" else f"w{scheme.bits}" + ("a8" if scheme.activations != "none" else "")


def _left(method: str, format_: str) -> float:
    """The share of rounding's loss that a method leaves."""
    rows = [row for row in book().multipliers if row.method == method and row.format in (format_, None)]
    return max((share for row in rows for share in row.left.values()), default=1.0)


def _between(value: float, above: float | None, to: float | None) -> bool:
    return (above is None or value > above) and (to is None or value <= to)


def _refusal(offers: list[Offer], wished: Wish) -> list[Problem]:
    """Why nothing can be advised: each offer's reason, and what the least one that may be taken needs."""
    found = [Problem(offer.name, offer.against or f"needs {_size(offer.needs)}, more than {_size(wished.memory)}") for offer in offers]
    possible = [offer for offer in offers if offer.against is None]
    if not possible:
        return [*found, Problem("advice", "nothing that this engine reads may be taken for this goal", "take another --goal or --engine")]
    least = min(possible, key=lambda offer: offer.needs)
    ways = ["a smaller or pruned model"]
    if least.case.cache == 16 and least.cache_bytes > least.weight_bytes // 10:
        ways.append("a shorter --context")
    if not book().engines[wished.engine].keeps_packed:
        ways.append("an engine that keeps weights packed, which this one does not")
    if wished.goal == "lossless":
        ways.append("--goal balanced")
    elif wished.goal == "balanced" and any(offer.verdict == "experimental" for offer in offers):
        ways.append("--goal smallest")
    what = f"{_size(wished.memory)} does not hold the least that may be taken: {least.name} needs {_size(least.needs)}, {_split(least)}"
    return [*found, Problem("--memory", what, "take more memory, " + " or ".join(ways))]


def _result(layout: Layout, model: str, wished: Wish, offers: list[Offer], chosen: Offer, file: str) -> dict[str, Any]:
    rule, cache_rule = chosen.rules
    artifact = f"{model.rstrip('/').replace(':', '-').rpartition('/')[2]}-{Path(file).stem}"
    tasks = [word for task in chosen.gate.tasks for word in ("--tasks", task)]
    commands = [["compress", "run", file, model, "--out", artifact]]
    commands += [["compress", "eval", folder, *tasks] for folder in (model, artifact)] if tasks else []
    plain = _plain(layout, chosen.candidate, chosen.case.cache, chosen.gate.bounds)
    recipe.check(recipe.validate(plain, file), layout, file)
    result: dict[str, Any] = {
        "wish": {"memory_bytes": wished.memory, "engine": wished.engine, "goal": wished.goal, "use": wished.use, "context": wished.context},
        "advice": {
            "name": chosen.name,
            "text": chosen.text,
            "verdict": chosen.verdict,
            "why": [rule.why, cache_rule.why],
            "weight_bytes": chosen.weight_bytes,
            "file_bytes": chosen.file_bytes,
            "cache_bytes": chosen.cache_bytes,
        },
        "expected": expected(layout, chosen),
        "gate": {"commands": [shlex.join(command) for command in commands], "look_for": chosen.gate.look_for},
        "considered": [
            {"name": offer.name, "verdict": offer.verdict, "needs": None if offer.against else offer.needs, "against": _against(offer, wished)}
            for offer in offers
        ],
        "notes": _unchanged(layout, wished) + [note.text for note in book().notes if note.when.fits(chosen.case)],
        "caveats": list(book().caveats),
    }
    result["recipe"] = _text(result, chosen, wished, plain)
    return result


def _unchanged(layout: Layout, wished: Wish) -> list[str]:
    """That the model would fit as it is, if it would."""
    needs = layout.checkpoint.nbytes + cache_bytes(layout, wished.context, 16)
    return [f"Unchanged, the model needs {_size(needs)}, which fits as well."] if needs <= wished.memory else []


def _against(offer: Offer, wished: Wish) -> str | None:
    return offer.against or (f"needs more than {_size(wished.memory)}" if offer.needs > wished.memory else None)


def _text(result: dict[str, Any], chosen: Offer, wished: Wish, plain: dict[str, Any]) -> str:
    """The recipe with its reasons as comments; the first line is the command that runs it, the second says what it is for."""
    engine = book().engines[wished.engine]
    losses = ", ".join(f"{task} {median:+.1f} % (worst {worst:+.1f} %)" for task, (median, worst) in result["expected"].items())
    reasons = [
        f"{chosen.text[:1].upper()}{chosen.text[1:]}: {_size(chosen.needs)} of {_size(wished.memory)}, for {engine.name}.",
        f"In memory: {_split(chosen)}. On disk: {_size(result['advice']['file_bytes'])}.",
        f"Why: {chosen.verdict}; {'; '.join(result['advice']['why'])}.",
        f"Expected change: {losses or 'not known'}.",
        f"Then look for: {result['gate']['look_for']}.",
        *result["gate"]["commands"][1:],
        *result["notes"],
        *result["caveats"],
        "Put text like yours, or images, in place of the demonstration data below.",
    ]
    comments = [result["gate"]["commands"][0], *(line for reason in reasons for line in textwrap.wrap(reason, WIDTH, subsequent_indent="  "))]
    return "".join(f"# {line}\n" for line in comments) + yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=WIDTH)


def _split(offer: Offer) -> str:
    return f"{_size(offer.weight_bytes)} of weights and {_size(offer.cache_bytes)} of cache for one sequence of {offer.case.context:,} tokens"


def _size(count: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB" if count < 999.5 else f"{count / 1000:.3g} TB"
