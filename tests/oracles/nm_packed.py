"""The bytes of `nm-packed`, one weight and one bit at a time, with nothing but the written rules."""

from __future__ import annotations

from collections.abc import Sequence

from compress.numerics.pattern import Pattern


def stream(numbers: Sequence[int], bits: int) -> list[int]:
    """Unsigned numbers as 32-bit words, little-endian, signed as torch shows them."""
    whole = sum(number << (place * bits) for place, number in enumerate(numbers))
    words = [whole >> (32 * place) & 0xFFFFFFFF for place in range(-(-len(numbers) * bits // 32))]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def places(weight: list[list[float]], pattern: Pattern) -> tuple[list[list[list[int]]], list[list[list[int]]]]:
    """By row and group the inputs, counted in the group (with V: in the four of its block), that are stored; by block and group these four."""
    rows, columns = len(weight), len(weight[0])
    starts = range(0, columns - columns % pattern.m, pattern.m)
    height = pattern.v or 1
    found: list[list[list[int]]] = [[] for _ in range(rows)]
    chosen: list[list[list[int]]] = [[] for _ in range(rows // height)]
    for block in range(rows // height):
        members = range(block * height, (block + 1) * height)
        for start in starts:
            inputs = list(range(pattern.m))
            if pattern.v is not None:
                used = [i for i in inputs if any(weight[row][start + i] != 0 for row in members)]
                inputs = sorted([*used, *(i for i in inputs if i not in used)][:4])
                chosen[block].append(inputs)
            for row in members:
                used = [place for place, i in enumerate(inputs) if weight[row][start + i] != 0]
                unused = [place for place in range(len(inputs)) if place not in used]
                found[row].append(sorted([*used, *unused][: pattern.n]))
    return found, chosen
