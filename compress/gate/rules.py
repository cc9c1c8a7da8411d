"""A gate file: what is measured, how much worse it may get, and with which certainty. Light, so that mistakes show at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from compress import recipe
from compress.errors import Problems
from compress.options import parse, suggest
from compress.recipe import Section

TOP = 64
"""Tokens whose probabilities a divergence is of; all others count as one."""


class Suite(Section):
    """Something that is measured, with bounds for it."""

    kind: ClassVar[str]
    what: ClassVar[str]
    """The option that says what it is of."""

    name: str | None = Field(default=None, min_length=1, description="what reports call it, where two suites are of the same")
    detect: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={}, description="by bound, how far above it a change must be found if it is there [default: as far as the bound is from 0]"
    )

    @property
    def title(self) -> str:
        """What reports call it."""
        return self.name or f"{self.kind} {getattr(self, self.what)}"

    def target(self, bound: str) -> float:
        """How far above a bound a change must be found; 0 if nobody said."""
        return self.detect.get(bound, self.bounds[bound])

    @property
    def bounds(self) -> dict[str, float]:
        """The checks that are asked for, each with its bound."""
        found = {name: getattr(self, name) for name in type(self).model_fields if name.startswith("max_")}
        return {name: value for name, value in found.items() if value is not None}


class Text(Suite):
    """Text in windows: loss, divergence and the likeliest token of every position."""

    kind = "text"
    what = "data"

    data: str = Field(min_length=1, description="a `.txt` file, a folder of images with `data.jsonl`, or `demo:heldout`")
    context: int = Field(default=512, ge=2, description="tokens per window; windows do not overlap")
    windows: int | None = Field(default=100, ge=8, description="at most this many windows; `null` for all")
    max_loss_increase: float | None = Field(default=None, ge=0, description="of the mean loss, in nats per token")
    max_kl: float | None = Field(
        default=None, ge=0, description=f"mean divergence from the baseline, in nats, over its {TOP} likeliest tokens and all others as one"
    )
    max_flips: float | None = Field(default=None, ge=0, le=1, description="share of positions whose likeliest token is another")
    max_accuracy_drop: float | None = Field(default=None, ge=0, le=1, description="tokens predicted right that no longer are, less the reverse")


class Items(Suite):
    """Items that are answered right or wrong."""

    max_drop: float | None = Field(default=None, ge=0, lt=1, description="share of items that become wrong, less the share that become right")
    max_flips: float | None = Field(default=None, ge=0, lt=1, description="share of items that become wrong or right")


class Pairs(Items):
    """Minimal pairs: is the good sentence likelier than the bad one."""

    kind = "pairs"
    what = "data"

    data: str = Field(min_length=1, description="a `.jsonl` of `good` and `bad`, or `demo:pairs`")
    limit: int | None = Field(default=None, ge=1, description="only the first so many, in an order by chance that is always the same")


class Task(Items):
    """A task of lm-eval, item by item."""

    kind = "tasks"
    what = "task"

    task: str = Field(min_length=1, description="a name that lm-eval knows, or the path of a task file; the whole model is loaded")
    metric: str = Field(default="acc", min_length=1, description="one that says of each item whether it is right")
    limit: int | None = Field(default=None, ge=1, description="only the first so many items")


class Retrieval(Items):
    """What `compress retrieval` asks for."""

    kind = "retrieval"
    what = "task"

    task: Literal["lines", "passkey"] = Field(default="lines", description="one of many lines is asked for, or one number hidden in filler")
    lengths: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(512, 1024), min_length=1, description="of prompts, in tokens")
    depths: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
        default=(0.0, 0.25, 0.5, 0.75, 1.0), min_length=1, description="where what is asked for stands, from 0 to 1"
    )
    cases: int = Field(default=10, ge=1, description="prompts for each length and depth")
    seed: int = Field(default=0, description="of names and numbers")


class Bias(Suite):
    """Stereotypes: which of two sentences, or which answer to a question, is the likeliest."""

    kind = "bias"
    what = "data"

    data: str = Field(min_length=1, description="a `.jsonl`; each line has `stereotype` and `anti`, perhaps `prompt` and `unknown`, and a `group`")
    max_new_bias: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="share of items that take the stereotype now and did not before, less the reverse; of all and of each group",
    )
    max_flips: float | None = Field(default=None, ge=0, lt=1, description="share of items with another answer")
    max_likelihood_drop: float | None = Field(default=None, ge=0, description="mean over items of the loss of log-likelihood, in nats per token")


class Integrity(Section):
    """What must be the same without any test."""

    allow: tuple[str, ...] = Field(
        default=(),
        description="what may differ all the same, with wildcards: `tokenizer.json`, `config.rope_theta`, `tensor lm_head.weight`",
    )
    max_gain: float | None = Field(
        default=None,
        gt=0,
        description="share by which each linear's weights, as a whole, may be larger or smaller than the baseline's; not for recipes that change "
        "their scale (`smooth`, `rotate`, `prune_*`, `mla`), unless the baseline was made by the same",
    )


class Rules(Section):
    """The whole gate file."""

    alpha: float = Field(default=0.05, gt=0, lt=0.5, description="the chance that a model that is not worse than its bounds fails")
    require_power: bool = Field(default=False, description="a check that too little data was given to is not passed (`detect`)")
    seed: int = Field(default=0, ge=0, description="of the bootstrap")
    integrity: Integrity = Integrity()
    text: tuple[Text, ...] = Field(default=(), description="text in windows")
    pairs: tuple[Pairs, ...] = Field(default=(), description="minimal pairs")
    tasks: tuple[Task, ...] = Field(default=(), description="lm-eval tasks")
    retrieval: tuple[Retrieval, ...] = Field(default=(), description="what was told long ago")
    bias: tuple[Bias, ...] = Field(default=(), description="stereotypes")

    @property
    def suites(self) -> Iterator[Suite]:
        """All of them, in order."""
        yield from (*self.text, *self.pairs, *self.tasks, *self.retrieval, *self.bias)


def load(path: Path) -> Rules:
    """Read and validate a gate file. Raises `InputError` with every mistake in it."""
    return validate(recipe.read(path, "give a gate file with --gate"), path.name)


def validate(plain: object, place: str) -> Rules:
    """Rules from plain data; `place` starts every message."""
    return parse(Rules, plain, place, "suites", _check)


def _check(plain: dict[str, Any], place: str, problems: Problems) -> None:
    """What no key says by itself. The mapping is as it was written, faults and all, so that these mistakes are told beside any others."""
    suites = [
        (f"{kind.kind}.{index}", kind, suite)
        for kind in (Text, Pairs, Task, Retrieval, Bias)
        for index, suite in enumerate(_of_type(list, plain.get(kind.kind)))
        if isinstance(suite, dict)
    ]
    if not any(isinstance(value, list) and value for value in plain.values()) and _of_type(dict, plain.get("integrity")).get("max_gain") is None:
        problems.add(place, "measures nothing", f"give a suite: {', '.join(kind.kind for kind in (Text, Pairs, Task, Retrieval, Bias))}")
    for title, count in Counter(_title(kind, suite) for _, kind, suite in suites).items():
        if title and count > 1:
            problems.add(f"{place}: {title}", "is there twice", "give each a name")
    for where, kind, suite in suites:
        bounds = {name: value for name, value in suite.items() if str(name).startswith("max_") and value is not None}
        known = [name for name in kind.model_fields if name.startswith("max_")]
        if not bounds:
            problems.add(f"{place}: {where}", f"needs a bound: {', '.join(known)}")
        detect = _of_type(dict, suite.get("detect"))
        for name in sorted(detect.keys() - bounds.keys(), key=str):
            problems.add(f"{place}: {where}.detect", f"{name} is no bound that is given", suggest(str(name), known))
        for name, bound in bounds.items():
            if plain.get("require_power") is True and bound == 0 and name not in detect:
                problems.add(f"{place}: {where}", f"{name} is 0, so nobody says what it must find", f"give detect: {{{name}: ...}}")


def _title(kind: type[Suite], plain: dict[str, Any]) -> str:
    """What reports would call a suite; nothing where it does not say what it is of."""
    field = kind.model_fields[kind.what]
    of = plain.get(kind.what, "" if field.is_required() else field.default)
    return str(plain.get("name") or (f"{kind.kind} {of}" if of else ""))


def _of_type(kind: type[Any], value: object) -> Any:
    """The value, or an empty one of that kind if it is of another."""
    return value if isinstance(value, kind) else kind()
