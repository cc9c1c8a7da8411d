"""A gate file: what is measured, how much worse it may get, and with which certainty. Light, so that mistakes show at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationError, model_validator

from compress import recipe
from compress.errors import InputError, Problems
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

    @model_validator(mode="after")
    def _some_bound(self) -> Suite:
        if not self.bounds:
            known = ", ".join(name for name in type(self).model_fields if name.startswith("max_"))
            raise ValueError(f"needs a bound: {known}")
        if unknown := sorted(self.detect.keys() - self.bounds.keys()):
            raise ValueError(f"detect: {unknown[0]} is no bound that is given")
        return self


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
    lengths: tuple[int, ...] = Field(default=(512, 1024), min_length=1, description="of prompts, in tokens")
    depths: tuple[float, ...] = Field(default=(0.0, 0.25, 0.5, 0.75, 1.0), min_length=1, description="where what is asked for stands, from 0 to 1")
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
    if not isinstance(plain, dict):
        raise InputError.one(place, f"must be a mapping with suites, got {'nothing' if plain is None else type(plain).__name__}")
    problems = Problems()
    rules = None
    try:
        rules = Rules.model_validate(plain)
    except ValidationError as error:
        recipe.report(error, place, Rules, problems)
    if rules:
        _check(rules, place, problems)
    problems.raise_if_any()
    assert rules
    return rules


def _check(rules: Rules, place: str, problems: Problems) -> None:
    suites = list(rules.suites)
    if not suites and rules.integrity.max_gain is None:
        problems.add(place, "measures nothing", f"give a suite: {', '.join(('text', 'pairs', 'tasks', 'retrieval', 'bias'))}")
    for title, count in Counter(suite.title for suite in suites).items():
        if count > 1:
            problems.add(f"{place}: {title}", "is there twice", "give each a name")
    for suite in suites:
        for name in suite.bounds:
            if rules.require_power and not suite.target(name):
                problems.add(f"{place}: {suite.title}", f"{name} is 0, so nobody says what it must find", f"give detect: {{{name}: ...}}")
