"""Whether fewer bits would lose less than pruning, at as many bytes: from what both were measured to lose on one small model."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from compress.layout import Layout
from compress.passes.base import FewerExperts, Prunes, Restructure
from compress.recipe import Recipe
from compress.scheme import Scheme

WHOLE = 16.0


class Measured(BaseModel):
    """What `tradeoff.yaml` says; the comments there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: dict[float, float]
    removed: dict[float, float]
    structured: dict[str, float]
    compensated: float
    experts: dict[float, float]
    mixtures: dict[str, float]
    kept: dict[float, float]
    nm: dict[str, float]
    healed: float


@cache
def measured() -> Measured:
    """The data."""
    return Measured.model_validate(yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")))


def against_fewer_bits(recipe: Recipe, source: Layout, layout: Layout, schemes: dict[str, Scheme], after_bytes: int) -> dict[str, Any] | None:
    """What a recipe that prunes is expected to lose, and what quantising alone to as many bytes, nats per token on the model measured.

    ``source`` is the model, ``layout`` what the recipe makes of it, in `after_bytes`. ``bits`` are those stored per weight without pruning. None
    if nothing is pruned.
    """
    pruned = _pruning(recipe, source)
    if pruned is None:
        return None
    weights = sum(linear.rows * linear.columns for linear in source.linears.values())
    dense = sum(source.checkpoint.tensors[f"{name}.weight"].nbytes for name in source.linears)
    bits = min(WHOLE, 8 * (after_bytes - (source.checkpoint.nbytes - dense)) / weights)
    stored = [schemes[name].bits + WHOLE / schemes[name].group_size if name in schemes else WHOLE for name in layout.linears]
    return {
        "pruned": pruned + sum(between(measured().bits, each) for each in stored) / len(stored),
        "bits": bits,
        "quantized": between(measured().bits, bits) if bits >= min(measured().bits) else None,
    }


def _pruning(recipe: Recipe, layout: Layout) -> float | None:
    """Nats that the passes of a recipe that prune are expected to lose, or None if there are none."""
    data, lost, found = measured(), 0.0, False
    for name, step in recipe.instances():
        method = str(getattr(step, "method", ""))
        if isinstance(step, FewerExperts):
            share = 1 - step.kept(layout) / step.experts(layout)
            lost, found, layout = lost + between(data.experts, share) * data.mixtures[method or name], True, step.expected(layout)
        elif isinstance(step, Restructure) and not step.removes:
            layout = step.expected(layout)
        elif isinstance(step, Restructure):
            after = step.expected(layout)
            share = 1 - _parameters(after) / _parameters(layout)
            less = data.compensated if method == "flap" and getattr(step, "compensate", False) else 1.0
            lost, found, layout = lost + between(data.removed, share) * data.structured[method or name] * less, True, after
        elif isinstance(step, Prunes):
            patterns = step.prunes(layout)
            density = sum(pattern.density for pattern in patterns.values()) + len(layout.linears) - len(patterns)
            lost, found = lost + between(data.kept, density / len(layout.linears)) * data.nm[method], True
        elif name == "heal":
            lost *= data.healed
    return lost if found else None


def _parameters(layout: Layout) -> int:
    return sum(linear.rows * linear.columns for linear in layout.linears.values())


def between(points: dict[float, float], place: float) -> float:
    """The value at ``place`` of a curve through points, straight in the logarithm where both ends have one; beyond the last, along the last piece."""
    ordered = sorted(points.items())
    (x, y), (u, v) = next((pair for pair in pairwise(ordered) if place <= pair[1][0]), (ordered[-2], ordered[-1]))
    share = (place - x) / (u - x)
    return math.exp(math.log(y) + share * (math.log(v) - math.log(y))) if y > 0 and v > 0 else y + share * (v - y)
