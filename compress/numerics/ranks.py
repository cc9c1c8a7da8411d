"""How many ranks a linear keeps when it becomes two of low rank.

A weight [m, n] of rank r takes r (m + n) parameters as two factors, so it gets smaller only below mn / (m + n). Plain Python, so that a recipe
can be checked without loading torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise


def saves(rows: int, columns: int, rank: int) -> bool:
    """Whether two factors of this rank have fewer parameters than the whole."""
    return rank * (rows + columns) < rows * columns


def share(rows: int, columns: int, keep: float) -> int:
    """The highest rank whose factors have at most the share `keep` of the parameters of the whole."""
    return math.floor(keep * rows * columns / (rows + columns))


def uniform(rows: int, columns: int, keep: float, multiple: int) -> int | None:
    """The same share for every linear: `share` rounded down to a multiple. None, it stays whole, if not even the first multiple saves anything."""
    return share(rows, columns, keep) // multiple * multiple if saves(rows, columns, multiple) else None


@dataclass(frozen=True)
class Spectrum:
    """What each rank of a weight [rows, columns] is worth: ``energy`` [min(rows, columns)], descending, what is lost without it."""

    rows: int
    columns: int
    energy: Sequence[float]


def water_filling(spectra: Mapping[str, Spectrum], keep: float, multiple: int) -> dict[str, int | None]:
    """The rank of each linear, a multiple, such that all together lose least with the share `keep` of their parameters; None, it stays whole.

    Parameters go where they gain most: the level of the last gain is the same everywhere, so the loss is the least there is for as many parameters
    as are used. Up to the cost of one step may be left over. Every linear gets one multiple at least; those that this would not make smaller stay
    whole and do not count. Raises ValueError if that is more than the share.
    """
    ranks: dict[str, int | None] = {name: multiple if saves(each.rows, each.columns, multiple) else None for name, each in spectra.items()}
    among = {name: each for name, each in spectra.items() if ranks[name]}
    left = math.floor(keep * sum(each.rows * each.columns for each in among.values()))
    left -= sum(multiple * (each.rows + each.columns) for each in among.values())
    if left < 0:
        raise ValueError(f"rank {multiple} everywhere takes more than {keep:g} of the parameters")
    steps = [
        (-gain, place, number, name, rank)
        for place, (name, each) in enumerate(among.items())
        for number, (gain, rank) in enumerate(_steps(each, multiple))
    ]
    full: set[str] = set()
    for _, _, _, name, rank in sorted(steps, key=lambda step: step[:3]):
        each, before = among[name], ranks[name]
        if name in full or before is None:
            continue
        size = each.rows + each.columns
        cost = (each.rows * each.columns if rank is None else rank * size) - before * size
        if cost > left:
            full.add(name)
            more = left // (multiple * size) * multiple  # of a leap to the whole, as much as fits; of a single step, nothing
            ranks[name], cost = before + more, more * size
        else:
            ranks[name] = rank
        left -= cost
    return ranks


def _steps(spectrum: Spectrum, multiple: int) -> list[tuple[float, int | None]]:
    """Steps up from the first multiple along the lower convex hull of loss over parameters: gain per parameter, falling, and the rank after it."""
    size, whole = spectrum.rows + spectrum.columns, spectrum.rows * spectrum.columns
    tail = list(accumulate(reversed(spectrum.energy), initial=0.0))[::-1]
    points: list[tuple[int, float, int | None]] = [(r * size, tail[r], r) for r in range(multiple, len(tail), multiple) if r * size < whole]
    hull: list[tuple[int, float, int | None]] = []
    for point in [*points, (whole, 0.0, None)]:
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-2], point):
            hull.pop()
        hull.append(point)
    return [(_gain(one, other), other[2]) for one, other in pairwise(hull)]


def _gain(one: tuple[int, float, int | None], other: tuple[int, float, int | None]) -> float:
    return (one[1] - other[1]) / (other[0] - one[0])
