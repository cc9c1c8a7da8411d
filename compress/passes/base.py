"""What every quantising pass shares: which linears it takes and what its widths must satisfy."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, field_validator

from compress.errors import InputError, Problems
from compress.layout import Group, Layout, Linear

if TYPE_CHECKING:
    from compress.calibrate import Workspace
    from compress.data import Samples
    from compress.model import Model

NARROWEST = 32
"""Inputs of the narrowest linear that is quantised: below, the packed width does not tell the bits."""
STAGES = ("restructure", "sparsify", "transform", "quantize")
"""The order in which passes may stand in a recipe."""


class Pass(Protocol):
    """A frozen set of options that knows how to apply itself."""

    stage: ClassVar[str]
    needs_data: ClassVar[bool]

    def check(self, place: str, layout: Layout, problems: Problems) -> None:
        """Report everything that can be known before weights load."""

    def plan(self, layout: Layout) -> dict[str, Scheme]:
        """What becomes of each linear it takes."""

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """Its options as plain data."""

    def run(self, model: Model, samples: Samples, workspace: Workspace) -> None:
        """Do it; finished blocks go to the workspace."""


class Scheme(BaseModel):
    """How one linear is stored."""

    model_config = ConfigDict(frozen=True)

    bits: int
    group_size: int
    symmetric: bool


class Quantize(BaseModel):
    """Options of every pass that rounds weights to an integer grid."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    stage: ClassVar[str] = "quantize"

    bits: int = Field(default=4, ge=2, le=8, description="bits per weight, 2 to 8")
    group_size: int | Literal["channel"] = Field(
        default=128, description="inputs that share a scale, at least 16 and a divisor of the width; `channel` for one scale per output"
    )
    symmetric: bool = Field(default=True, description="no zero points; the only form every engine reads, and required for experts")
    include: tuple[str, ...] = Field(default=(), description="take only linears that match: shell patterns, or `re:` and a regular expression")
    exclude: tuple[str, ...] = Field(default=(), description="leave out linears that match, same patterns")
    indivisible: Literal["error", "keep", "channel"] = Field(
        default="error",
        description="what to do with a linear whose width the group does not divide: refuse, leave it as it is, or one scale per output",
    )

    @field_validator("include", "exclude")
    @classmethod
    def _compile(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern.removeprefix("re:"))
                except re.error as error:
                    raise ValueError(f"{pattern!r} is no regular expression ({error})") from error
        return patterns

    def takes(self, layout: Layout) -> dict[str, Linear]:
        """The linears this pass quantises, by name."""
        chosen = {}
        for name, linear in layout.linears.items():
            wanted = not self.include or any(matches(pattern, name) for pattern in self.include)
            wanted = wanted and not any(matches(pattern, name) for pattern in self.exclude)
            if wanted and (self.indivisible != "keep" or linear.columns % self._group(linear) == 0):
                chosen[name] = linear
        return chosen

    def _group(self, linear: Linear) -> int:
        return linear.columns if self.group_size == "channel" else self.group_size

    def group_of(self, linear: Linear) -> int:
        """Inputs per scale of a linear this pass takes."""
        group = self._group(linear)
        return group if linear.columns % group == 0 else linear.columns

    def plan(self, layout: Layout) -> dict[str, Scheme]:
        return {
            name: Scheme(bits=self.bits, group_size=self.group_of(linear), symmetric=self.symmetric) for name, linear in self.takes(layout).items()
        }

    def check(self, place: str, layout: Layout, problems: Problems) -> None:
        if self.group_size != "channel" and self.group_size < 16:
            problems.add(f"{place}: group_size", f"must be at least 16, got {self.group_size}", "smaller groups store more scale than weight")
            return
        for key in ("include", "exclude"):
            for pattern in getattr(self, key):
                if not any(matches(pattern, name) for name in layout.linears):
                    problems.add(
                        f"{place}: {key}",
                        f"{pattern!r} matches none of the {len(layout.linears)} linears",
                        f"one of them is {_first(layout.linears)}",
                    )
        chosen = self.takes(layout)
        if not chosen:
            problems.add(place, "takes no linear at all", "loosen include and exclude")
        if narrow := next((linear for linear in chosen.values() if linear.columns < NARROWEST), None):
            problems.add(
                place, f"{narrow.name} has {narrow.columns} inputs, fewer than {NARROWEST}", "exclude it: its scales would outweigh its codes"
            )
        if self.indivisible == "error":
            self._check_widths(place, chosen.values(), problems)

    def _check_widths(self, place: str, chosen: Iterable[Linear], problems: Problems) -> None:
        bad: dict[int, list[str]] = {}
        for linear in chosen:
            if linear.columns % self._group(linear):
                bad.setdefault(linear.columns, []).append(linear.name)
        for width, names in sorted(bad.items()):
            works = [group for group in range(16, width + 1) if width % group == 0 and group % 8 == 0][:6]
            problems.add(
                f"{place}: group_size",
                f"{self.group_size} does not divide the width {width} of {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else ""),
                f"widths that work: {', '.join(map(str, works)) or 'none'}, or channel; or set indivisible: keep or channel",
            )


class Calibrated(Quantize):
    """Options of every pass that rounds by what it saw of calibration data."""

    needs_data: ClassVar[bool] = True

    fallback: Literal["error", "round"] = Field(
        default="error",
        description="for a linear that saw too few tokens or whose Hessian cannot be factored: stop, or round it without data and record it",
    )
    min_tokens: float = Field(
        default=0.25,
        ge=0,
        description="fewest tokens per input a linear must have seen (0.25: a width of 2048 needs 512); fewer is a case for `fallback`",
    )

    def starved(self, columns: int, tokens: int, seen: int) -> str | None:
        """Why a linear of so many inputs that saw `tokens` of `seen` cannot be calibrated, or None."""
        needed = math.ceil(self.min_tokens * columns)
        return f"saw {tokens} of {seen} calibration tokens, needs {needed}" if tokens < needed else None

    def refuse(self, name: str, reason: str) -> None:
        """Raise for `reason` unless the recipe asks for another way out."""
        if self.fallback == "error":
            raise InputError.one(name, reason, "give more calibration data, or set fallback: round to have it rounded without data and recorded")


def matches(pattern: str, name: str) -> bool:
    """Whether a linear's name on disk fits a pattern: ``re:`` and a regular expression, or a shell pattern."""
    if pattern.startswith("re:"):
        return re.search(pattern.removeprefix("re:"), name) is not None
    return fnmatchcase(name, pattern)


def split(group: Group, chosen: dict[str, Any]) -> tuple[Linear, ...]:
    """The linears of a group that a pass takes."""
    return tuple(linear for linear in group.linears if linear.name in chosen)


def _first(names: Iterable[str]) -> str:
    return next(iter(names), "none")
