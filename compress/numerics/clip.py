"""Clipping: which weights to give up range for (AWQ, arXiv 2306.00978, appendix; per group and output)."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.hardware import in_parallel
from compress.numerics.grid import TILE, Grid, minmax_scales, quantized, round_to_nearest

CANDIDATES = 10
SMALLEST_SHRINK = 0.5
"""The ends of a group are tried at evenly spaced shares of where they are, from 1 down to just above this."""


def clipped(weight: Tensor, moment: Tensor, grid: Grid, stored: torch.dtype) -> Tensor:
    """``weight`` float32 [out, in] with the ends of each group's range pulled in to where plain rounding gives the least output error.

    ``moment`` float32 [groups, group, group] is the mean of ``x x^T`` over the inputs of each group, so the error of an output is that on
    all tokens behind it, exactly, as far as one group makes it. On a grid with zero points both ends move, one after the other; on a
    symmetric one they move together. Not moving is a candidate.
    """
    rows = max(1, TILE // weight.shape[1])
    result = torch.empty_like(weight)

    def search(start: int) -> None:
        result[start : start + rows] = _clip_rows(weight[start : start + rows], moment, grid, stored)

    in_parallel(search, range(0, weight.shape[0], rows))
    return result


def _clip_rows(weight: Tensor, moment: Tensor, grid: Grid, stored: torch.dtype) -> Tensor:
    group = moment.shape[1]
    groups = torch.unflatten(weight, 1, (-1, group))
    low, high = groups.amin(-1), groups.amax(-1)
    if grid.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    best = torch.full_like(low, torch.inf)
    kept = (torch.ones_like(low), torch.ones_like(high))

    def attempt(below: Tensor, above: Tensor) -> None:
        nonlocal best, kept
        cut = groups.clamp((low * below)[..., None], (high * above)[..., None])
        error = _error(groups, cut, moment, grid, stored)
        better = error < best
        best = torch.where(better, error, best)
        kept = torch.where(better, below, kept[0]), torch.where(better, above, kept[1])

    shares = [1 - (1 - SMALLEST_SHRINK) * step / CANDIDATES for step in range(CANDIDATES)]
    for share in shares:
        attempt(torch.full_like(low, share), torch.full_like(high, share))
    for end in (0, 1) if not grid.symmetric else ():
        other = kept[1 - end]
        for share in shares:
            moved = torch.full_like(low, share)
            attempt(*((moved, other) if end == 0 else (other, moved)))
    return groups.clamp((low * kept[0])[..., None], (high * kept[1])[..., None]).flatten(1)


def _error(groups: Tensor, cut: Tensor, moment: Tensor, grid: Grid, stored: torch.dtype) -> Tensor:
    """Mean squared output error [out, groups] of rounding ``cut`` in place of ``groups``, both [out, groups, group]."""
    weight = cut.flatten(1)
    scales = minmax_scales(weight, grid, groups.shape[-1], stored)
    rounded = quantized(round_to_nearest(weight, scales, grid), scales, grid, stored).dequantize().float()
    lost = (torch.unflatten(rounded, 1, groups.shape[1:]) - groups).transpose(0, 1)
    return (torch.bmm(lost, moment) * lost).sum(-1).T
