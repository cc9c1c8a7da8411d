"""Grids: what a code means, how scales are found, and the tensor that results.

A weight is ``(code - zero_point) * scale``. Codes are whole numbers ``q`` in ``[-2^(b-1), 2^(b-1) - 1]`` or the values of a small float
(E2M1, E4M3). Every search measures its error with the scale **as it will be stored**, never with the float32 one it came from.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from compress.hardware import in_parallel

TILE = 1 << 19
"""Elements a thread works on at once in a search: enough that an operation takes longer than to hand it out."""
COARSE = 8
SMALLEST_SHRINK = 0.35
"""The range of a group is shrunk from 1 down to this; at 2 bits the best range is near 0.5, so the end is never the winner."""
SMALLEST_SCALE = 1e-8
E4M3_MAX = 448.0
E4M3_MIN = 2.0**-9


class Grid(ABC):
    """The points a weight may take in units of its scale: all between ``low`` and ``high`` that `round_` knows."""

    bits: int
    symmetric: bool
    codes: ClassVar[torch.dtype]
    """Holds every point exactly, in one byte."""
    reach: ClassVar[tuple[float, float]]
    """A search tries to widen and to shrink the range of a group by these factors."""
    rows: ClassVar[int] = 1
    """Outputs that share a scale."""
    unit: float = 1.0
    """What scales are multiplied by before they are stored; a power of two, so that nothing is lost."""

    @property
    @abstractmethod
    def low(self) -> float: ...

    @property
    @abstractmethod
    def high(self) -> float: ...

    @abstractmethod
    def round_(self, values: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
        """Nearest points, in place; ``low`` and ``high`` are the ends, moved by the zero point if there is one."""

    @abstractmethod
    def spacing(self, values: Tensor) -> Tensor | float:
        """Distance between the points around each of ``values``."""


@dataclass(frozen=True)
class Integer(Grid):
    """Whole numbers of `bits` (2 to 8), with a zero point per group unless `symmetric`."""

    bits: int
    symmetric: bool
    codes = torch.int8
    reach = (1.0, SMALLEST_SHRINK)

    @property
    def low(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def round_(self, values: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
        return values.round_().clamp_(low, high)  # type: ignore[arg-type]

    def spacing(self, values: Tensor) -> Tensor | float:
        return 1.0


@dataclass(frozen=True)
class E2M1(Grid):
    """The 4-bit float of MXFP4 and NVFP4 (OCP MX 1.0, section 5.3.3): 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives; ties to the even mantissa."""

    unit: float = 1.0
    bits = 4
    symmetric = True
    codes = torch.float8_e4m3fn
    reach = (1.5, 0.5)
    low = -6.0
    high = 6.0

    def round_(self, values: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
        step = self.spacing(values)
        return values.div_(step).round_().mul_(step).clamp_(self.low, self.high)

    def spacing(self, values: Tensor) -> Tensor:
        magnitude = values.abs()
        return 0.5 + 0.5 * (magnitude >= 2) + (magnitude >= 4).to(values.dtype)


@dataclass(frozen=True)
class E4M3(Grid):
    """The 8-bit float with 4 bits of exponent (arXiv 2209.05433); ends at 448, never infinite."""

    rows: int = 1  # type: ignore[misc]
    bits = 8
    symmetric = True
    codes = torch.float8_e4m3fn
    reach = (1.0, 0.5)
    low = -E4M3_MAX
    high = E4M3_MAX

    def round_(self, values: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
        return values.copy_(values.clamp(self.low, self.high).to(self.codes))

    def spacing(self, values: Tensor) -> Tensor:
        exponent = torch.frexp(values.abs().clamp_min(2.0**-6)).exponent - 1
        return torch.ldexp(torch.ones_like(values), exponent - 3)


@dataclass(frozen=True)
class Quantized:
    """One quantised linear.

    ``codes`` [out, in] in `Grid.codes`; ``scale`` [ceil(out / rows), groups] in the dtype it is stored in; ``zero_point`` int8
    [out, groups] or None when symmetric. ``group_size`` counts inputs per scale; it divides ``in``.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    grid: Grid

    @property
    def bits(self) -> int:
        return self.grid.bits

    @property
    def group_size(self) -> int:
        return self.codes.shape[1] // self.scale.shape[1]

    @property
    def symmetric(self) -> bool:
        return self.zero_point is None

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights: that of the scale, or bfloat16 for small floats with small scales, all of whose products it holds exactly."""
        return self.scale.dtype if self.scale.dtype.itemsize > 1 else torch.bfloat16

    def by_output(self) -> Tensor:
        """The scale, as it is stored, once for every output: [out, groups]."""
        return self.scale.repeat_interleave(self.grid.rows, 0)[: len(self.codes)] if self.grid.rows > 1 else self.scale

    def scales(self) -> Scales:
        """Scales and zero points as a search gives them, float32 [out, groups]."""
        scale = self.by_output().float() / self.grid.unit
        return Scales(scale, torch.zeros_like(scale) if self.zero_point is None else self.zero_point.float())

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """[out, in], by default with the rounding of every engine that multiplies in the dtype of the weights."""
        rows, columns = self.codes.shape
        weight = torch.empty(rows, columns, dtype=dtype or self.dtype, device=self.codes.device)
        scale = self.scales().scale
        step = max(1, TILE // columns)
        for start in range(0, rows, step):  # so that float32 copies of the whole are never held
            part = slice(start, start + step)
            values = torch.unflatten(self.codes[part].float(), 1, (scale.shape[1], -1))
            if self.zero_point is not None:
                values -= self.zero_point[part, :, None]
            weight[part] = values.mul_(scale[part, :, None]).flatten(1)
        return weight


def below(weights: Sequence[Quantized]) -> Quantized:
    """``weights`` on one grid and in equal groups as one, the outputs of each after those of the one before it."""
    grid, zeros = weights[0].grid, [weight.zero_point for weight in weights if weight.zero_point is not None]
    return Quantized(
        as_bytes(torch.cat, [weight.codes for weight in weights]),
        as_bytes(torch.cat, [weight.by_output() for weight in weights]),
        torch.cat(zeros) if zeros else None,
        E4M3() if isinstance(grid, E4M3) else grid,
    )


def as_bytes(join: Callable[[list[Tensor]], Tensor], parts: Sequence[Tensor]) -> Tensor:
    """``join`` of ``parts``, which torch need not know for small floats."""
    kind = parts[0].dtype
    return join([part.view(torch.uint8) for part in parts]).view(kind) if kind.itemsize == 1 else join(list(parts))


@dataclass(frozen=True)
class Scales:
    """``scale`` float32 [..., out, groups], holding values the stored dtype can hold exactly; ``zero`` float32, integral."""

    scale: Tensor
    zero: Tensor


def minmax_scales(weight: Tensor, grid: Grid, group_size: int, stored: torch.dtype) -> Scales:
    """The scales of plain rounding: each group's range is the grid's. ``weight`` float32 [..., in]."""
    low, high = _range(torch.unflatten(weight, -1, (-1, group_size)), grid, -1)
    if grid.rows > 1:
        low, high = _shared(low, grid.rows, torch.amin), _shared(high, grid.rows, torch.amax)
    return _scales(low, high, grid, stored)


def _shared(ends: Tensor, rows: int, most: Callable[..., Tensor]) -> Tensor:
    """The outermost of ``ends`` [..., out, groups] among every `rows` outputs, for each of them."""
    return torch.cat([most(part, -2, keepdim=True).expand_as(part) for part in torch.split(ends, rows, -2)], -2)


def search_scales(weight: Tensor, grid: Grid, group_size: int, stored: torch.dtype, importance: Tensor | None = None) -> Scales:
    """The scales with the least weighted squared rounding error per group.

    ``weight`` float32 [out, in]; ``importance`` float32 [in], one non-negative weight per input, or None for all equal. Candidates
    change the range of the group; on a grid that has one more negative than positive code each is tried with both signs. The
    unchanged range is a candidate, so the result is never worse than `minmax_scales` by this measure. Raises `ValueError` for a
    grid whose outputs share scales.
    """
    if grid.rows > 1:
        raise ValueError("scales are searched per output, and here outputs share them")
    rows, columns = weight.shape
    groups = columns // group_size
    if importance is None:
        importance = torch.ones(columns, device=weight.device)
    weights = importance.clamp_min(0).view(groups, 1, group_size)
    scale = torch.empty(groups, rows, device=weight.device)
    zero = torch.empty_like(scale)
    wide = min(rows, TILE // group_size + 1)
    deep = max(1, TILE // (group_size * wide))

    def search(corner: tuple[int, int]) -> None:
        part = slice(corner[0], min(corner[0] + deep, groups)), slice(corner[1], min(corner[1] + wide, rows))
        # Inputs first, so that every operation below runs along rows, which share nothing but are many. Group by group: torch turns whole
        # matrices in blocks, and slices of them, at a third of the speed, element by element.
        tile = torch.empty(part[0].stop - part[0].start, group_size, part[1].stop - part[1].start, device=weight.device, dtype=weight.dtype)
        slab = weight[part[1], part[0].start * group_size : part[0].stop * group_size]
        for place, group in enumerate(torch.split(slab, group_size, 1)):
            tile[place] = group.contiguous().T
        found = _search_tile(tile, grid, stored, weights[part[0]])
        scale[part], zero[part] = found.scale, found.zero

    in_parallel(search, product(range(0, groups, deep), range(0, rows, wide)))
    return Scales(scale.T.contiguous(), zero.T.contiguous())


def _search_tile(tile: Tensor, grid: Grid, stored: torch.dtype, weights: Tensor) -> Scales:
    """Scales [groups, rows] of ``tile`` [groups, group_size, rows] under ``weights`` [groups, 1, group_size]."""
    low, high = _range(tile, grid, 1)
    buffer = torch.empty_like(tile)

    def attempt(shrink: Tensor, sign: Tensor) -> Tensor:
        """Error, shrink, sign, scale and zero point of ranges shrunk so far: [5, tries, groups, rows] of ``shrink`` and ``sign`` [tries, ...]."""
        # What is small is done for all tries at once: one by one it would take as long to hand out as the tile itself.
        tried = _scales(low * shrink, high * shrink, grid, stored, sign)
        error = torch.empty_like(tried.scale)
        inverse = tried.scale.reciprocal()
        for index in range(len(error)):
            zero = None if grid.symmetric else tried.zero[index]
            error[index] = _error(tile, tried.scale[index], inverse[index], zero, grid, weights, buffer)
        return torch.stack([error, shrink.expand_as(error), sign.expand_as(error), tried.scale, tried.zero])

    def least(tries: Tensor) -> Tensor:
        """The first of the best ``tries``, [5, 1, groups, rows]."""
        return tries.gather(1, tries[0].min(0).indices.expand(len(tries), 1, -1, -1))

    widest, narrowest = grid.reach
    spacing = (widest - narrowest) / COARSE
    ranges = [1.0, *(factor for index in range(COARSE) if (factor := widest - index * spacing) != 1)]
    both = [(factor, sign) for sign in ((1.0, -1.0) if -grid.low > grid.high and grid.symmetric else (1.0,)) for factor in ranges]
    shrink, sign = torch.tensor(both, device=tile.device).T[:, :, None, None]
    best = least(attempt(shrink, sign))
    for fraction in (1 / 2, 1 / 4):
        step = torch.tensor([spacing, -spacing], device=tile.device)[:, None, None] * fraction
        best = least(torch.cat([best, attempt(best[1] + step, best[2])], 1))
    return Scales(best[3, 0], best[4, 0])


def _range(groups: Tensor, grid: Grid, along: int) -> tuple[Tensor, Tensor]:
    """Ends of each group's range (its members lie along one dimension), which always contains zero so that a pruned weight stays exactly zero."""
    if grid.symmetric:
        # Half a step beyond the outermost positive code: the grid's extra negative code serves the other end.
        high = groups.abs().amax(along)
        return -high, high
    return groups.amin(along).clamp_max(0), groups.amax(along).clamp_min(0)


def _scales(low: Tensor, high: Tensor, grid: Grid, stored: torch.dtype, sign: Tensor | float = 1.0) -> Scales:
    scale = as_stored((high - low) / (grid.high - grid.low), grid, stored)
    if grid.symmetric:
        return Scales(scale * sign, torch.zeros_like(scale))
    return Scales(scale, (grid.low - low / scale).round_().clamp_(grid.low, grid.high))


def as_stored(scale: Tensor, grid: Grid, stored: torch.dtype) -> Tensor:
    """Positive ``scale`` float32 rounded to what `stored` holds, never to zero.

    bfloat16, float16, float32: to the nearest. E4M3: to the nearest in units of ``1 / grid.unit``. E8M0: to the power of two whose
    exponent, with that of the grid's largest point, is that of the largest weight (OCP MX 1.0, section 6.3), so the largest
    weights of a group may be cut off.
    """
    if stored == torch.float8_e8m0fnu:
        headroom = grid.high / 2.0 ** (math.frexp(grid.high)[1] - 1)
        exponent = torch.frexp(scale * headroom).exponent - 1
        return torch.ldexp(torch.ones_like(scale), exponent.clamp_(-126, 127))
    if stored == torch.float8_e4m3fn:
        return (scale * grid.unit).clamp(E4M3_MIN, E4M3_MAX).to(stored).float().div_(grid.unit)
    kind = torch.finfo(stored)
    smallest = max(SMALLEST_SCALE, kind.smallest_normal * kind.eps)  # float16 would store less as zero
    return scale.clamp_min(smallest).to(stored).float()


def _error(tile: Tensor, scale: Tensor, inverse: Tensor, zero: Tensor | None, grid: Grid, weights: Tensor, buffer: Tensor) -> Tensor:
    """Weighted squared rounding error of each group, [groups, rows]; `buffer` is overwritten."""
    torch.mul(tile, inverse[:, None], out=buffer)
    if zero is None:
        grid.round_(buffer, grid.low, grid.high)
    else:
        # The zero point is a whole number: moving the grid's ends by it spares adding it to and taking it from every weight.
        grid.round_(buffer, grid.low - zero[:, None], grid.high - zero[:, None])
    torch.addcmul(tile, buffer, scale[:, None], value=-1, out=buffer)
    return torch.bmm(weights, buffer.square_())[:, 0]


def round_to_nearest(weight: Tensor, scales: Scales, grid: Grid) -> Tensor:
    """Codes [..., in] of ``weight`` float32 [..., in] under ``scales`` [..., groups]."""
    groups = scales.scale.shape[-1]
    codes = torch.unflatten(weight, -1, (groups, -1)) * scales.scale[..., None].reciprocal()
    return grid.round_(codes.add_(scales.zero[..., None]), grid.low, grid.high).to(grid.codes).flatten(-2)


def quantized(codes: Tensor, scales: Scales, grid: Grid, stored: torch.dtype) -> Quantized:
    """Bundle codes [out, in] with their scales [out, groups] as stored."""
    zero_point = None if grid.symmetric else scales.zero.to(torch.int8)
    return Quantized(codes, (scales.scale[:: grid.rows] * grid.unit).to(stored), zero_point, grid)
