"""The plan of mixed precision: what each unit may be stored in, what that takes and costs, and what was chosen within which budget.

A plan is a JSON file that people can read and edit, and that can be solved again for another budget without the model.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from compress.checkpoint import write_text
from compress.errors import InputError
from compress.numerics.knapsack import Knapsack
from compress.options import Options

FILE = "plan.json"
POINTS = 200
"""Of a curve, at most."""
KINDS = ("average_bits", "bits_per_weight", "budget", "tokens_per_second")
"""Of budgets."""
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kMGT])(i?))?B", re.ASCII)


def _bytes(value: object) -> object:
    """A size with its unit as whole bytes; anything else is left to be refused."""
    match = SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        if isinstance(value, str):
            raise ValueError("must be a size such as 500MB or 12GiB")
        return value
    power = " kMGT".index(match[2] or " ")
    return math.floor(Fraction(match[1]) * (1024 if match[3] else 1000) ** power)


Size = Annotated[int, BeforeValidator(_bytes, json_schema_input_type=int | str), Field(gt=0)]


class Budget(Options):
    """How much room a choice may take: at most one of the four kinds."""

    average_bits: float | None = Field(
        default=None, gt=0, description="budget: bits of a code, averaged over the weights; 3.0 takes the room of `bits: 3` everywhere"
    )
    bits_per_weight: float | None = Field(
        default=None, gt=0, description="budget: everything stored for these weights, with scales and zero points, as the gate of this name counts"
    )
    budget: Size | None = Field(default=None, description="budget: bytes of all tensors of the artifact, a number or such as `500MB` or `12GiB`")
    tokens_per_second: float | None = Field(
        default=None, gt=0, description="budget: what reading the weights once per token leaves of `bandwidth`, for one sequence, without its cache"
    )
    bandwidth: Size | None = Field(default=None, description="bytes per second that memory delivers, such as `900GB`; for `tokens_per_second`")

    @model_validator(mode="after")
    def _one(self) -> Budget:
        given = [key for key in KINDS if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are two budgets; give one of {', '.join(KINDS)}")
        if (self.tokens_per_second is None) != (self.bandwidth is None):
            raise ValueError("tokens_per_second and bandwidth belong together")
        return self

    @property
    def kind(self) -> str | None:
        """Which of the four it is."""
        return next((key for key in KINDS if getattr(self, key) is not None), None)


class Plain(Options):
    """A part of a plan."""


class Unit(Plain):
    """Linears that must be stored alike.

    ``bytes`` of codes, scales and zero points by bits; ``read`` the share of them that is read for a token; ``scores`` by kind and bits.
    """

    name: str
    bits: int
    linears: tuple[str, ...] = Field(min_length=1)
    weights: int = Field(gt=0)
    read: float = Field(gt=0, le=1)
    bytes: dict[int, int]
    scores: dict[str, dict[int, float]]


class Rest(Plain):
    """Bytes of all other tensors of the artifact, and how many of them are read for a token."""

    bytes: int
    read: float


class Origin(Plain):
    """What scores were measured on: sha256 of the weights by file and of the calibration tokens, and how many sequences."""

    source: dict[str, str]
    calibration: str
    sequences: int


class Allocation(Plain):
    """``options`` ascending; ``offsets`` are by kind of score what the sum of scores is above; ``measured`` divergences of candidates, nats."""

    options: tuple[int, ...] = Field(min_length=1)
    budget: Budget
    score: str
    offsets: dict[str, float]
    measured: dict[str, float]
    origin: Origin
    rest: Rest
    units: tuple[Unit, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _whole(self) -> Allocation:
        if list(self.options) != sorted(set(self.options)):
            raise ValueError(f"options must ascend, got {list(self.options)}")
        for unit in self.units:
            tables: dict[str, Mapping[int, float]] = {"bytes": unit.bytes, **{f"scores.{kind}": scores for kind, scores in unit.scores.items()}}
            for what, given in tables.items():
                if given.keys() != set(self.options):
                    raise ValueError(f"{unit.name}: {what} must name the options {list(self.options)}, got {sorted(given)}")
            if unit.bits not in self.options:
                raise ValueError(f"{unit.name}: bits must be one of {list(self.options)}, got {unit.bits}")
            if unit.scores.keys() != self.offsets.keys():
                raise ValueError(f"{unit.name}: must have the scores {sorted(self.offsets)}, got {sorted(unit.scores)}")
        return self

    @cached_property
    def weights(self) -> int:
        """Of all units."""
        return sum(unit.weights for unit in self.units)

    @property
    def chosen(self) -> tuple[int, ...]:
        """The bits of each unit."""
        return tuple(unit.bits for unit in self.units)

    def bits(self) -> dict[str, int]:
        """The bits of each linear, by name."""
        return {linear: unit.bits for unit in self.units for linear in unit.linears}

    def with_bits(self, chosen: Sequence[int]) -> Allocation:
        """The same with other bits of each unit."""
        return self.model_copy(update={"units": tuple(unit.model_copy(update={"bits": bits}) for unit, bits in zip(self.units, chosen, strict=True))})

    def with_scores(self, kind: str, offset: float, scores: Sequence[Mapping[int, float]]) -> Allocation:
        """The same with scores of each unit, by bits, under another name, and what their sum is above."""
        units = tuple(unit.model_copy(update={"scores": unit.scores | {kind: dict(each)}}) for unit, each in zip(self.units, scores, strict=True))
        return self.model_copy(update={"units": units, "offsets": self.offsets | {kind: offset}})

    def uniform(self, bits: int) -> tuple[int, ...]:
        """The same bits for each unit."""
        return (bits,) * len(self.units)

    def largest_uniform(self, budget: Budget) -> tuple[int, ...] | None:
        """The most bits for all units alike that fit into `budget`, if any do."""
        return max((self.uniform(bits) for bits in self.options if self.fits(budget, self.uniform(bits))), default=None)

    def nearest_uniform(self, budget: Budget) -> tuple[int, ...]:
        """The bits for all units alike that come nearest to `budget`, rather above than below."""
        return min(map(self.uniform, reversed(self.options)), key=lambda chosen: abs(self._size(budget, chosen) - self._limit(budget)))

    def predicted(self, chosen: Sequence[int], score: str) -> float:
        """What `score` says that bits of each unit cost."""
        return self.offsets[score] + sum(unit.scores[score][bits] for unit, bits in zip(self.units, chosen, strict=True))

    def solved(self, budget: Budget, score: str | None, place: str) -> Allocation:
        """The choice with the least sum of scores within `budget`; by default of those this choice went by.

        Raises `InputError` at `place` if there are no such scores or the smallest choice exceeds the budget.
        """
        if score is not None and score not in self.offsets:
            raise InputError.one(f"{place}: score", f"the plan has no scores {score!r}", f"it has {', '.join(self.offsets)}")
        self.refuse_too_small(budget, place)
        score = self._score(score)
        solver = Knapsack(self._sizes(budget), [[unit.scores[score][bits] for bits in self.options] for unit in self.units])
        solution = self.with_bits([self.options[option] for option in solver.choose(self._limit(budget))])
        return solution.model_copy(update={"budget": budget, "score": score, "measured": {}})

    def _score(self, wanted: str | None) -> str:
        """The scores to go by: those that are wanted, or that this choice went by, or, if it went by none, the first."""
        return wanted or (self.score if self.score in self.offsets else next(iter(self.offsets)))

    def fits(self, budget: Budget, chosen: Sequence[int]) -> bool:
        """Whether bits of each unit are within `budget`."""
        return self._size(budget, chosen) <= self._limit(budget)

    def refuse_too_small(self, budget: Budget, place: str) -> None:
        """Raise `InputError` if nothing fits into `budget`."""
        smallest = self.uniform(self.options[0])
        if not self.fits(budget, smallest):
            value = self.figures(smallest, budget.bandwidth)[budget.kind or ""]
            least = "the most is" if budget.kind == "tokens_per_second" else "the least is"
            text = f"{value:,.0f}" if budget.kind == "budget" else f"{value:,.4g}"
            raise InputError.one(
                f"{place}: {budget.kind}",
                f"{getattr(budget, budget.kind or ''):,} cannot be reached; with {self.options[0]} bits everywhere {least} {text}",
                "change it, or allow fewer bits",
            )

    def figures(self, chosen: Sequence[int], bandwidth: int | None = None) -> dict[str, float]:
        """What bits of each unit take, in the terms of a `Budget`; tokens per second only if memory's ``bandwidth`` is known."""
        stored = sum(unit.bytes[bits] for unit, bits in zip(self.units, chosen, strict=True))
        figures: dict[str, float] = {
            "average_bits": sum(unit.weights * bits for unit, bits in zip(self.units, chosen, strict=True)) / self.weights,
            "bits_per_weight": 8 * stored / self.weights,
            "budget": stored + self.rest.bytes,
        }
        if bandwidth:
            read = sum(math.ceil(unit.bytes[bits] * unit.read) for unit, bits in zip(self.units, chosen, strict=True))
            figures["tokens_per_second"] = bandwidth / (read + self.rest.read)
        return figures

    def summary(self) -> dict[str, Any]:
        """What there is to show, as plain data. Predictions of uniform bits, or of any others that no score led to, are by the first score."""
        score = self._score(None)
        return {
            "figures": self.figures(self.chosen, self.budget.bandwidth),
            "score": score,
            "chosen_by": self.score,
            "predicted": self.predicted(self.chosen, score),
            "measured": self.measured,
            "uniform": [
                {"bits": bits, "bits_per_weight": self.figures(chosen)["bits_per_weight"], "predicted": self.predicted(chosen, score)}
                for bits, chosen in ((bits, self.uniform(bits)) for bits in self.options)
            ],
            "curve": self.curve(score),
            "units": [
                {
                    "name": unit.name,
                    "weights": unit.weights,
                    "bits": unit.bits,
                    "scores": {str(bits): value for bits, value in unit.scores[score].items()},
                }
                for unit in self.units
            ],
        }

    def curve(self, score: str) -> list[tuple[float, float]]:
        """The Pareto front: bits per weight as stored, and the least that `score` predicts there; at most `POINTS`."""
        sizes = [[unit.bytes[bits] for bits in self.options] for unit in self.units]
        front = Knapsack(sizes, [[unit.scores[score][bits] for bits in self.options] for unit in self.units]).front()
        thinned = [front[round(index * (len(front) - 1) / (POINTS - 1))] for index in range(POINTS)] if len(front) > POINTS else front
        return [(8 * size / self.weights, self.offsets[score] + cost) for size, cost in thinned]

    def _sizes(self, budget: Budget) -> list[list[int]]:
        """Of each unit and option, in the measure of `budget`."""
        match budget.kind:
            case "average_bits":
                return [[unit.weights * bits for bits in self.options] for unit in self.units]
            case "tokens_per_second":
                return [[math.ceil(unit.bytes[bits] * unit.read) for bits in self.options] for unit in self.units]
            case _:
                return [[unit.bytes[bits] for bits in self.options] for unit in self.units]

    def _size(self, budget: Budget, chosen: Sequence[int]) -> int:
        places = map(self.options.index, chosen)
        return sum(sizes[place] for sizes, place in zip(self._sizes(budget), places, strict=True))

    def _limit(self, budget: Budget) -> int:
        """The most that sizes may sum to. Decimals mean what is written: 2.3 is not a bit less."""
        match budget.kind:
            case "average_bits":
                return math.floor(Fraction(str(budget.average_bits)) * self.weights)
            case "bits_per_weight":
                return math.floor(Fraction(str(budget.bits_per_weight)) * self.weights / 8)
            case "budget":
                return (budget.budget or 0) - self.rest.bytes
            case "tokens_per_second":
                return math.floor((budget.bandwidth or 0) / Fraction(str(budget.tokens_per_second)) - Fraction(self.rest.read))
        raise AssertionError("no budget is given")


def write(allocation: Allocation, path: Path, by: Callable[[Path, str], None] = write_text) -> None:
    """Write a plan, its figures first, `by` what writes a text to a file."""
    head = {"figures": allocation.figures(allocation.chosen, allocation.budget.bandwidth)}
    by(path, json.dumps(head | allocation.model_dump(mode="json", exclude_none=True), indent=2) + "\n")


def budget(plain: dict[str, Any], place: str) -> Budget:
    """A budget from its keys, those that are None left out. Raises `InputError` at `place` if it is none."""
    try:
        found = Budget.model_validate(plain)
    except ValidationError as error:
        raise InputError.one(place, "; ".join(item["msg"].removeprefix("Value error, ") for item in error.errors())) from error
    if found.kind is None:
        raise InputError.one(place, "has no budget", f"give one of {', '.join(KINDS)}")
    return found


def read(path: Path) -> Allocation:
    """A plan from its file. Raises `InputError` with everything that is wrong with it."""
    try:
        plain: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError.one(str(path), f"cannot be read ({error.strerror})", "give the plan.json of an artifact") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError.one(str(path), f"is not JSON ({error})", "give the plan.json of an artifact") from error
    if isinstance(plain, dict):
        plain.pop("figures", None)  # they follow from the rest, which may have been edited
    try:
        return Allocation.model_validate(plain)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()[:5])
        raise InputError.one(str(path), f"is no plan ({faults.removeprefix(': ')})", "give the plan.json of an artifact") from error
