"""Small floats from their definition: every code decoded, nearest points found by trying all."""

from __future__ import annotations

import math
from itertools import pairwise


def points(exponent_bits: int, mantissa_bits: int, largest: float) -> list[tuple[float, int]]:
    """Non-negative values with the last bit of their mantissa, ascending (OCP MX 1.0, section 5.3)."""
    bias = 2 ** (exponent_bits - 1) - 1
    found = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            fraction = mantissa / 2**mantissa_bits
            value = 2.0 ** (exponent - bias) * (1 + fraction) if exponent else 2.0 ** (1 - bias) * fraction
            if value <= largest:
                found.append((value, mantissa % 2))
    return sorted(found)


E2M1 = points(2, 1, 6.0)
E4M3 = points(4, 3, 448.0)


def nearest(value: float, table: list[tuple[float, int]]) -> float:
    """The nearest point, of two equally near ones that with the even mantissa; beyond the largest, that."""
    magnitude = min(abs(value), table[-1][0])
    best = min(table, key=lambda point: (abs(point[0] - magnitude), point[1]))
    return math.copysign(best[0], value)


def middles(table: list[tuple[float, int]]) -> list[float]:
    """Where two points are equally near."""
    return [(low + high) / 2 for (low, _), (high, _) in pairwise(table)]


def shared_exponent(values: list[float], largest: float) -> int:
    """Exponent of the scale of a block (OCP MX 1.0, section 6.3): that of its largest magnitude less that of the largest point."""
    peak = max(map(abs, values))
    return math.floor(math.log2(peak)) - math.floor(math.log2(largest))
