"""What can go wrong, in one place: every message says where, what was found and what to do.

Layer 0: imports nothing of ours and no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of every command."""

    ACCEPTED = 0
    BUG = 1
    UNREACHED = 1
    """Nothing measured is as good as was asked for. A bug, which has the same number, prints a traceback."""
    BAD_INPUT = 2
    GATE_FAILED = 3
    INTERRUPTED = 4


@dataclass(frozen=True)
class Problem:
    """One mistake: ``place: what; remedy``."""

    place: str
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.place}: {self.what}" + (f"; {self.remedy}" if self.remedy else "")


class InputError(Exception):
    """The recipe, the model or the data is at fault, not this program. Carries every problem found."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))

    @classmethod
    def one(cls, place: str, what: str, remedy: str = "") -> InputError:
        return cls([Problem(place, what, remedy)])


class Problems:
    """Collects problems so that a user sees all of them at once."""

    def __init__(self) -> None:
        self._found: list[Problem] = []

    def add(self, place: str, what: str, remedy: str = "") -> None:
        self._found.append(Problem(place, what, remedy))

    def absorb(self, error: InputError) -> None:
        self._found.extend(error.problems)

    def __iter__(self) -> Iterator[Problem]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def raise_if_any(self) -> None:
        if self._found:
            raise InputError(self._found)


class Interrupted(Exception):
    """The user stopped a run; finished blocks are on disk and the same command continues."""
