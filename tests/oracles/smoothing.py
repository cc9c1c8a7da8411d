"""What smoothing measures and tries, as loops over tokens, groups and candidates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from oracles.rounding import as_stored, float32, minmax_group, round_group


def magnitudes(rows: Iterable[Tensor]) -> tuple[list[float], list[float], int]:
    """Mean and largest magnitude of each input, and the tokens, one token at a time."""
    total: list[float] = []
    largest: list[float] = []
    count = 0
    for batch in rows:
        for token in batch.reshape(-1, batch.shape[-1]).double().abs().tolist():
            total = [one + other for one, other in zip(total, token, strict=True)] if count else token
            largest = [max(one, other) for one, other in zip(largest, token, strict=True)] if count else token
            count += 1
    return [each / max(1, count) for each in total], largest, count


def clip_error(group: list[float], below: float, above: float, bits: int, symmetric: bool, stored: torch.dtype, tokens: list[list[float]]) -> float:
    """Mean squared output error of one group whose ends are cut to shares of where they are, then rounded."""
    low, high = min(group), max(group)
    if symmetric:
        high = max(-low, high)
        low = -high
    low, high = float32(low * float32(below)), float32(high * float32(above))
    cut = [min(max(value, low), high) for value in group]
    scale, zero = minmax_group(cut, bits, symmetric, stored)
    rounded = [as_stored((code - zero) * scale, stored) for code in round_group(cut, scale, zero, bits)]
    errors = [sum(x * (new - old) for x, new, old in zip(token, rounded, group, strict=True)) for token in tokens]
    return sum(error**2 for error in errors) / len(tokens)


def best_clip(group: list[float], shares: list[float], bits: int, symmetric: bool, stored: torch.dtype, tokens: list[list[float]]) -> float:
    """The least error when both ends are cut alike, then, with zero points, the lower one alone and the upper one alone."""

    def error(ends: tuple[float, float]) -> float:
        return clip_error(group, *ends, bits, symmetric, stored, tokens)

    best = min(((share, share) for share in shares), key=error)
    if not symmetric:
        best = min([best, *((share, best[1]) for share in shares)], key=error)
        best = min([best, *((best[0], share) for share in shares)], key=error)
    return error(best)


@torch.no_grad()
def outputs(model: Any, module: str, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """What a module of a plain model gives for each batch, the first of several things."""
    found: list[Tensor] = []

    def keep(_: Any, arguments: Any, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output).clone())

    handle = model.get_submodule(module).register_forward_hook(keep)
    for batch in batches:
        model(**batch, use_cache=False)
    handle.remove()
    return found


def relative_error(before: list[Tensor], after: list[Tensor], counted: list[list[list[float]]], power: int = 2) -> float:
    """Squared difference of the counted tokens, or that to another `power`, as a share of what they are, token by token."""
    lost = energy = 0.0
    for one, other, weights in zip(before, after, counted, strict=True):
        one, other = (each.reshape(len(weights), len(weights[0]), -1) for each in (one, other))
        for row, row_weights in enumerate(weights):
            for token, weight in enumerate(row_weights):
                lost += weight * float((one[row, token] - other[row, token]).double().abs().pow(power).sum())
                energy += weight * float(one[row, token].double().abs().pow(power).sum())
    return lost / energy
