"""What N:M sparsity promises of a weight [out, in], without torch: recipes and plans speak of patterns before any weight is read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import comb, log2

CHOSEN = 4
"""Columns that a block of V:N:M leaves; N of them are kept in each row (arXiv 2410.16135, section 3)."""
LARGEST = 64
"""M at most: more would make groups wider than many linears."""
FORMS = re.compile(r"(?:(\d{1,5}):)?(\d{1,5}):(\d{1,5})")


@dataclass(frozen=True)
class Pattern:
    """At most ``n`` of every ``m`` consecutive inputs of an output are not zero.

    With ``v``, every ``v`` outputs have all of theirs among the same `CHOSEN` of the ``m`` inputs (V:N:M). Inputs behind the last whole group are
    not pruned.
    """

    n: int
    m: int
    v: int | None = None

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """``"2:4"`` or ``"64:2:5"``. Raises `ValueError` for anything else."""
        match = FORMS.fullmatch(text)
        if not match:
            raise ValueError(f"must be N:M or V:N:M, such as '2:4' or '64:2:5', got {text!r}")
        v, n, m = (int(part) if part else None for part in match.groups())
        assert n is not None and m is not None
        of = m if v is None else CHOSEN
        if not 1 <= n < of or m > LARGEST or (v is not None and (v < 1 or m < CHOSEN)):
            allowed = f"N from 1 to M - 1, M up to {LARGEST}" if v is None else f"V from 1, N from 1 to {CHOSEN - 1}, M from {CHOSEN} to {LARGEST}"
            raise ValueError(f"{text} is not possible: {allowed}")
        return cls(n, m, v)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.v is None else f"{self.v}:{self.n}:{self.m}"

    @property
    def density(self) -> float:
        """Share of the weights that are kept."""
        return self.n / self.m

    @property
    def diversity(self) -> float:
        """log2, per weight, of how many ways there are to choose what is kept: mask diversity (arXiv 2410.16135, section 4).

        With ``v`` the columns of a block are chosen first. Where all outputs leave out one of these the same mask is counted several times, which
        for a ``v`` of 16 and more adds nothing that could be seen.
        """
        if self.v is None:
            return log2(comb(self.m, self.n)) / self.m
        return (log2(comb(self.m, CHOSEN)) + self.v * log2(comb(CHOSEN, self.n))) / (self.v * self.m)

    def pruned_columns(self, columns: int) -> int:
        """How many of so many inputs stand in whole groups."""
        return columns - columns % self.m
