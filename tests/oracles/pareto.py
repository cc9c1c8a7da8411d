"""Which points nothing beats, by comparing each with each."""

from __future__ import annotations

from collections.abc import Sequence


def front(points: Sequence[tuple[float | None, float | None]]) -> list[int]:
    """Numbers of the points, (cost, loss), for which no other is at most as large in both and smaller in one; unknown ones are left out."""
    found = []
    for index, (cost, loss) in enumerate(points):
        if cost is None or loss is None:
            continue
        beaten = False
        for other_cost, other_loss in points:
            if other_cost is None or other_loss is None:
                continue
            beaten |= other_cost <= cost and other_loss <= loss and (other_cost < cost or other_loss < loss)
        if not beaten:
            found.append(index)
    return found
