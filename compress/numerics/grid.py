"""Integer grids: what a code means, how scales are found, and the tensor that results.

Codes are always signed, ``q`` in ``[-2^(b-1), 2^(b-1) - 1]``, and a weight is ``(q - zero_point) * scale``. Every search measures
its error with the scale **as it will be stored**, never with the float32 one it came from.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from compress.hardware import in_parallel

TILE = 1 << 20
"""Elements a thread works on at once in a search: enough that an operation takes longer than to hand it out."""
COARSE = 8
SMALLEST_SHRINK = 0.35
"""The range of a group is shrunk from 1 down to this; at 2 bits the best range is near 0.5, so the end is never the winner."""
SMALLEST_SCALE = 1e-8


@dataclass(frozen=True)
class Grid:
    """An integer grid of `bits` (2 to 8), with a zero point per group unless `symmetric`."""

    bits: int
    symmetric: bool

    @property
    def low(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        return (1 << (self.bits - 1)) - 1


@dataclass(frozen=True)
class Quantized:
    """One quantised linear.

    ``codes`` int8 [out, in]; ``scale`` [out, groups] in the dtype it is stored in; ``zero_point`` int8 [out, groups] or None when
    symmetric. ``group_size`` counts inputs per scale; it divides ``in``.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int

    @property
    def group_size(self) -> int:
        return self.codes.shape[1] // self.scale.shape[1]

    @property
    def symmetric(self) -> bool:
        return self.zero_point is None

    def dequantize(self) -> Tensor:
        """[out, in] in the dtype of the scale; the same rounding as every engine that multiplies in that dtype."""
        rows, columns = self.codes.shape
        weight = torch.empty(rows, columns, dtype=self.scale.dtype, device=self.codes.device)
        step = max(1, TILE // columns)
        for start in range(0, rows, step):  # so that float32 copies of the whole are never held
            part = slice(start, start + step)
            values = torch.unflatten(self.codes[part].float(), 1, (self.scale.shape[1], -1))
            if self.zero_point is not None:
                values -= self.zero_point[part, :, None]
            weight[part] = values.mul_(self.scale[part, :, None].float()).flatten(1)
        return weight


@dataclass(frozen=True)
class Scales:
    """``scale`` float32 [..., out, groups], holding values the stored dtype can hold exactly; ``zero`` float32, integral."""

    scale: Tensor
    zero: Tensor


def minmax_scales(weight: Tensor, grid: Grid, group_size: int, stored: torch.dtype) -> Scales:
    """The scales of plain rounding: each group's range is the grid's. ``weight`` float32 [..., in]."""
    low, high = _range(torch.unflatten(weight, -1, (-1, group_size)), grid, -1)
    return _scales(low, high, grid, stored)


def search_scales(weight: Tensor, grid: Grid, group_size: int, stored: torch.dtype, importance: Tensor | None = None) -> Scales:
    """The scales with the least weighted squared rounding error per group.

    ``weight`` float32 [out, in]; ``importance`` float32 [in], one non-negative weight per input, or None for all equal. Candidates
    shrink the range of the group; on a symmetric grid, which has one more negative than positive code, each is tried with both
    signs. The unshrunk range is a candidate, so the result is never worse than `minmax_scales` by this measure.
    """
    rows, columns = weight.shape
    groups = columns // group_size
    if importance is None:
        importance = torch.ones(columns, device=weight.device)
    weights = importance.clamp_min(0).view(groups, 1, group_size)
    # Inputs first, so that every operation below runs along rows, which share nothing but are many.
    by_input = weight.T.view(groups, group_size, rows)
    scale = torch.empty(groups, rows, device=weight.device)
    zero = torch.empty_like(scale)
    wide = min(rows, TILE // group_size + 1)
    deep = max(1, TILE // (group_size * wide))

    def search(corner: tuple[int, int]) -> None:
        part = slice(corner[0], corner[0] + deep), slice(corner[1], corner[1] + wide)
        tile = by_input[part[0], :, part[1]].contiguous()
        found = _search_tile(tile, grid, stored, weights[part[0]])
        scale[part], zero[part] = found.scale, found.zero

    in_parallel(search, product(range(0, groups, deep), range(0, rows, wide)))
    return Scales(scale.T.contiguous(), zero.T.contiguous())


def _search_tile(tile: Tensor, grid: Grid, stored: torch.dtype, weights: Tensor) -> Scales:
    """Scales [groups, rows] of ``tile`` [groups, group_size, rows] under ``weights`` [groups, 1, group_size]."""
    low, high = _range(tile, grid, 1)
    buffer = torch.empty_like(tile)
    best = _scales(low, high, grid, stored)
    best_error = _error(tile, best, grid, weights, buffer)
    shrink = torch.ones_like(low)
    sign = torch.ones_like(low)

    def attempt(factor: Tensor | float, signs: Tensor | float) -> None:
        nonlocal best, best_error, shrink, sign
        candidate = _scales(low * factor, high * factor, grid, stored, signs)
        error = _error(tile, candidate, grid, weights, buffer)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = Scales(torch.where(better, candidate.scale, best.scale), torch.where(better, candidate.zero, best.zero))
        shrink = torch.where(better, factor, shrink)
        sign = torch.where(better, signs, sign)

    spacing = (1 - SMALLEST_SHRINK) / COARSE
    for signs in (1.0, -1.0) if grid.symmetric else (1.0,):
        for index in range(int(signs > 0), COARSE):  # the first candidate of the positive sign is the one to beat
            attempt(1 - index * spacing, signs)
    for fraction in (1 / 2, 1 / 4):
        centre, direction = shrink, sign
        attempt(centre + spacing * fraction, direction)
        attempt(centre - spacing * fraction, direction)
    return best


def _range(groups: Tensor, grid: Grid, along: int) -> tuple[Tensor, Tensor]:
    """Ends of each group's range (its members lie along one dimension), which always contains zero so that a pruned weight stays exactly zero."""
    if grid.symmetric:
        # Half a step beyond the outermost positive code: the grid's extra negative code serves the other end.
        high = groups.abs().amax(along)
        return -high, high
    return groups.amin(along).clamp_max(0), groups.amax(along).clamp_min(0)


def _scales(low: Tensor, high: Tensor, grid: Grid, stored: torch.dtype, sign: Tensor | float = 1.0) -> Scales:
    kind = torch.finfo(stored)
    smallest = max(SMALLEST_SCALE, kind.smallest_normal * kind.eps)  # float16 would store less as zero
    scale = ((high - low) / (2**grid.bits - 1)).clamp_min(smallest).to(stored).float()
    if grid.symmetric:
        return Scales(scale * sign, torch.zeros_like(scale))
    return Scales(scale, (grid.low - low / scale).round_().clamp_(grid.low, grid.high))


def _error(tile: Tensor, scales: Scales, grid: Grid, weights: Tensor, buffer: Tensor) -> Tensor:
    """Weighted squared rounding error of each group, [groups, rows]; `buffer` is overwritten."""
    scale = scales.scale[:, None]
    torch.mul(tile, scale.reciprocal(), out=buffer)
    # The zero point is a whole number: moving the grid's ends by it spares adding it to and taking it from every weight.
    buffer.round_().clamp_(grid.low - scales.zero[:, None], grid.high - scales.zero[:, None])
    torch.addcmul(tile, buffer, scale, value=-1, out=buffer)
    return torch.bmm(weights, buffer.square_())[:, 0]


def round_to_nearest(weight: Tensor, scales: Scales, grid: Grid) -> Tensor:
    """Codes int8 [..., in] of ``weight`` float32 [..., in] under ``scales`` [..., groups]."""
    groups = scales.scale.shape[-1]
    codes = torch.unflatten(weight, -1, (groups, -1)) * scales.scale[..., None].reciprocal()
    codes = codes.add_(scales.zero[..., None]).round_().clamp_(grid.low, grid.high)
    return codes.to(torch.int8).flatten(-2)


def quantized(codes: Tensor, scales: Scales, grid: Grid, stored: torch.dtype) -> Quantized:
    """Bundle codes int8 [out, in] with their scales [out, groups] as stored."""
    zero_point = None if grid.symmetric else scales.zero.to(torch.int8)
    return Quantized(codes, scales.scale.to(stored), zero_point, grid.bits)
