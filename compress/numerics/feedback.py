"""GPTQ (arXiv 2210.17323) in the form of LDLQ (arXiv 2307.13304, section 3 and theorem 6).

Rounding ``W`` [out, in] to ``Q`` costs ``tr((W - Q) H (W - Q)^T)``. With ``H = U D U^T``, ``U`` unit upper triangular, the cost is
``sum_k D_k |e_k|^2`` where ``e_k`` is the rounding error of column ``k`` after the errors of the columns before it were fed back
through ``U``. This is what GPTQ computes; factoring ``H`` itself takes one Cholesky factorisation where inverting it takes three,
and loses no digits to the inverse. A batch dimension serves experts, whose matrices are too small to be worked on one by one.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.hardware import in_parallel, one_thread
from compress.numerics.grid import Grid, Scales

DAMP_RETRIES = (1.0, 10.0, 100.0)
"""Factors on the damping, tried in turn while the factorisation fails."""
TILE = 1024
ROWS_AT_ONCE = 8192
"""Rows are independent; so many of them are worked on at once, in two float32 copies."""
ALONE = 1 << 16
"""Elements of a column, of all of a batch, from which on several threads round it faster than one."""
ROWS_TURNED = 256
"""Rows transposed at once."""


@dataclass(frozen=True)
class Factor:
    """``H = U D U^T`` of a batch, rows and columns in the order of ``order``.

    ``upper`` [batch, in, in] unit upper triangular; ``diagonal`` [batch, in]; ``order`` int64 [batch, in], the input that is rounded
    k-th; ``damp`` [batch], the fraction of the mean diagonal that was added in the end; NaN where no damping sufficed.
    """

    upper: Tensor
    diagonal: Tensor
    order: Tensor
    damp: Tensor

    def members(self, chosen: list[int]) -> Factor:
        """The factors of some members of the batch; without a copy if it is all of them."""
        if chosen == list(range(len(self.damp))):
            return self
        return Factor(self.upper[chosen], self.diagonal[chosen], self.order[chosen], self.damp[chosen])

    def energy(self, member: int, weight: Tensor) -> Tensor:
        """Mean square of each output of ``weight`` [out, in], [out]: what the cost of rounding it is relative to."""
        return (weight.index_select(1, self.order[member]) @ self.upper[member]).square_() @ self.diagonal[member]

    def solve(self, member: int, right: Tensor) -> Tensor:
        """``right (H + damping)^-1`` for ``right`` [out, in]."""
        order, upper = self.order[member], self.upper[member]
        half = torch.linalg.solve_triangular(upper.T, right.index_select(1, order), upper=False, left=False, unitriangular=True)
        half = torch.linalg.solve_triangular(upper, half.div_(self.diagonal[member]), upper=True, left=False, unitriangular=True)
        return torch.empty_like(half).index_copy_(1, order, half)

    def importance(self) -> Tensor:
        """[batch, in] in the original order: what a squared rounding error of each input costs once feedback is at work."""
        return torch.empty_like(self.diagonal).scatter_(1, self.order, self.diagonal)


def factorize(hessian: Tensor, damp: float, act_order: bool, *, overwrite: bool = False) -> Factor:
    """Factor ``hessian`` [batch, in, in] float32 or float64 (mean of x x^T over tokens; its scale does not matter).

    ``damp`` is a fraction of the mean diagonal. With ``act_order`` inputs are rounded in falling order of their diagonal, so the
    loudest get the least feedback error; groups stay those of the original order ("static groups"). With ``overwrite`` the factor
    takes the memory of ``hessian``.
    """
    batch, size, _ = hessian.shape
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    order = torch.arange(size, device=hessian.device).expand(batch, size)
    if act_order:
        order = torch.argsort(diagonal, dim=1, descending=True, stable=True)
    mean = diagonal.mean(1)
    upper = hessian if overwrite else hessian.clone()
    damps = in_parallel(lambda member: _factorize_in_place(upper[member], order[member].flip(0), float(mean[member]), damp), range(batch))
    root = upper.diagonal(dim1=1, dim2=2).clone()
    upper /= root.masked_fill(root == 0, 1)[:, None, :]
    return Factor(upper, root.square(), order, torch.tensor(damps, dtype=hessian.dtype, device=hessian.device))


def _factorize_in_place(hessian: Tensor, reverse: Tensor, mean: float, damp: float) -> float:
    """Put in place of ``hessian`` the upper factor ``R`` of ``R R^T = hessian + damp * mean * I``, inputs ordered against `reverse`.

    Returns the damping it took. If none sufficed, zeros and NaN.
    """
    if mean > 0:
        torch.index_select(hessian.index_select(0, reverse), 1, reverse, out=hessian)
    added = 0.0
    for factor in DAMP_RETRIES if mean > 0 else ():
        hessian.diagonal().add_((damp * factor - added) * mean)
        added = damp * factor
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed and bool(lower.diagonal().isfinite().all()):
            # Of a matrix with rows and columns reversed, the usual lower factor is the upper one, reversed.
            size = len(lower)
            for start in range(0, size, TILE):
                end = min(start + TILE, size)
                hessian[start:end] = lower[size - end : size - start].flip(0, 1)
            return added
    hessian.zero_()
    return math.nan


def round_with_feedback(
    weight: Tensor, factor: Factor, scales: Scales, grid: Grid, leaf: int = 32, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Round each column after feeding back the errors of those before it.

    ``weight`` [batch, out, in] and ``scales`` [batch, out, groups] in the dtype of ``factor``. Returns codes [batch, out, in] and the cost
    ``tr((W - Q) H (W - Q)^T)`` per row, [batch, out]. Columns are halved until `leaf` are left, so that most of the feedback is a
    few large matrix products; `leaf` changes speed, not the result. Where ``kept`` [batch, out, in] bool says no, the code is that of zero, and
    what the weight should have made good for goes on to those behind it.
    """

    rows = weight.shape[1]
    size = -(-rows // -(-rows // ROWS_AT_ONCE))

    def round_rows(start: int) -> tuple[Tensor, Tensor]:
        part = slice(start, start + size)
        mask = None if kept is None else kept[:, part]
        return _round_rows(weight[:, part], factor, Scales(scales.scale[:, part], scales.zero[:, part]), grid, leaf, mask)

    parts = [round_rows(start) for start in range(0, rows, size)]
    return torch.cat([codes for codes, _ in parts], 1), torch.cat([cost for _, cost in parts], 1)


def _round_rows(weight: Tensor, factor: Factor, scales: Scales, grid: Grid, leaf: int, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, rows, columns = weight.shape
    dtype, device = factor.upper.dtype, weight.device
    # Inputs first [in, batch, out]: each step below works on contiguous memory.
    error, wanted = (torch.empty(columns, batch, rows, dtype=dtype, device=device) for _ in range(2))
    mask = None if kept is None else torch.empty(columns, batch, rows, dtype=torch.bool, device=device)
    tiles = [(member, slice(start, start + ROWS_TURNED)) for member in range(batch) for start in range(0, rows, ROWS_TURNED)]

    def turn(tile: tuple[int, slice]) -> None:
        member, part = tile
        wanted[:, member, part] = error[:, member, part] = weight[member, part].T.contiguous().index_select(0, factor.order[member])
        if kept is not None and mask is not None:
            mask[:, member, part] = kept[member, part].T.contiguous().index_select(0, factor.order[member])

    in_parallel(turn, tiles)
    work = _Work(
        factor,
        Scales(scales.scale.to(dtype).transpose(1, 2).contiguous(), scales.zero.to(dtype).transpose(1, 2).contiguous()),
        (factor.order // (columns // scales.scale.shape[2])).T,
        grid,
        error,
        wanted,
        torch.empty(columns, batch, rows, dtype=grid.codes, device=device),
        mask,
    )
    _solve(work, 0, columns, leaf)
    cost = torch.einsum("kbr,bk->br", work.wanted.square_(), factor.diagonal)
    result = torch.empty(batch, rows, columns, dtype=grid.codes, device=device)
    back = torch.argsort(factor.order)

    def turn_back(tile: tuple[int, slice]) -> None:
        member, part = tile
        result[member, part] = work.codes[:, member, part].index_select(0, back[member]).T.contiguous()

    in_parallel(turn_back, tiles)
    return result, cost


@dataclass(frozen=True)
class _Work:
    """What the recursion shares. ``scales`` are [batch, groups, out]; ``group_of`` [in, batch]; the rest [in, batch, out].

    ``error`` holds the weight of a column until it is rounded, then what was lost; ``wanted`` the weight with all feedback so far,
    then the rounding error itself. ``kept`` bool, or None where all weights are.
    """

    factor: Factor
    scales: Scales
    group_of: Tensor
    grid: Grid
    error: Tensor
    wanted: Tensor
    codes: Tensor
    kept: Tensor | None


def _solve(work: _Work, start: int, end: int, leaf: int) -> None:
    """Round columns `start` to `end`, whose feedback from all columns before `start` is already in ``wanted``."""
    if end - start <= leaf:
        with one_thread() if work.error[0].numel() < ALONE else nullcontext():
            _round_leaf(work, start, end)
        return
    middle = (start + end) // 2
    _solve(work, start, middle, leaf)
    _feed_back(work.wanted[middle:end], work.factor.upper[:, start:middle, middle:end], work.error[start:middle])
    _solve(work, middle, end, leaf)


def _round_leaf(work: _Work, start: int, end: int) -> None:
    at = torch.arange(work.group_of.shape[1], device=work.codes.device).expand(end - start, -1), work.group_of[start:end]
    scale, zero = work.scales.scale[at], None if work.grid.symmetric else work.scales.zero[at]
    wanted, error, codes = work.wanted[start:end], work.error[start:end], torch.empty_like(scale)
    # Each step is short, so what can be done for all columns at once is, and views are made in one go.
    low, high = ([end] * len(scale) if zero is None else (end - zero).unbind() for end in (work.grid.low, work.grid.high))
    steps = [step.unbind() for step in (wanted, error, codes, scale.reciprocal(), -scale)]
    for place, (column, lost, code, inverse, negative, least, most) in enumerate(zip(*steps, low, high, strict=True)):
        if place:
            k = start + place
            _feed_back(wanted[place : place + 1], work.factor.upper[:, start:k, k : k + 1], error[:place])
        work.grid.round_(torch.mul(column, inverse, out=code), least, most)
        if work.kept is not None:
            code.mul_(work.kept[start + place])
        lost.addcmul_(code, negative)
    wanted.addcmul_(codes, scale, value=-1)
    work.codes[start:end] = codes if zero is None else codes.add_(zero)


def _feed_back(wanted: Tensor, upper: Tensor, error: Tensor) -> None:
    """Add to ``wanted`` [k, batch, out] what ``error`` [j, batch, out] of earlier columns sends through ``upper`` [batch, j, k]; in place."""
    if wanted.shape[1] > 1:
        wanted.transpose(0, 1).baddbmm_(upper.transpose(1, 2), error.transpose(0, 1))
    elif wanted.shape[0] > 1:
        wanted[:, 0].addmm_(upper[0].T, error[:, 0])
    else:
        wanted[0, 0].addmv_(error[:, 0].T, upper[0, :, 0])
