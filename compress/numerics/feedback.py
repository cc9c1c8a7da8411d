"""GPTQ (arXiv 2210.17323) in the form of LDLQ (arXiv 2307.13304, section 3 and theorem 6).

Rounding ``W`` [out, in] to ``Q`` costs ``tr((W - Q) H (W - Q)^T)``. With ``H = U D U^T``, ``U`` unit upper triangular, the cost is
``sum_k D_k |e_k|^2`` where ``e_k`` is the rounding error of column ``k`` after the errors of the columns before it were fed back
through ``U``. This is what GPTQ computes; factoring ``H`` itself takes one Cholesky factorisation where inverting it takes three,
and loses no digits to the inverse. A batch dimension serves experts, whose matrices are too small to be worked on one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.numerics.grid import Grid, Scales

DAMP_RETRIES = (1.0, 10.0, 100.0)
"""Factors on the damping, tried in turn while the factorisation fails."""


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

    def importance(self) -> Tensor:
        """[batch, in] in the original order: what a squared rounding error of each input costs once feedback is at work."""
        return torch.empty_like(self.diagonal).scatter_(1, self.order, self.diagonal)


def factorize(hessian: Tensor, damp: float, act_order: bool) -> Factor:
    """Factor ``hessian`` [batch, in, in] float32 or float64 (mean of x x^T over tokens; its scale does not matter).

    ``damp`` is a fraction of the mean diagonal. With ``act_order`` inputs are rounded in falling order of their diagonal, so the
    loudest get the least feedback error; groups stay those of the original order ("static groups").
    """
    batch, size, _ = hessian.shape
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    order = torch.arange(size, device=hessian.device).expand(batch, size)
    if act_order:
        order = torch.argsort(diagonal, dim=1, descending=True, stable=True)
    upper = torch.zeros_like(hessian)
    found = torch.full((batch,), torch.nan, dtype=hessian.dtype, device=hessian.device)
    mean = diagonal.mean(1)
    reverse = order.flip(1)
    for factor in DAMP_RETRIES:
        todo = torch.nonzero(found.isnan() & (mean > 0)).flatten().tolist()
        for index in todo:
            # Reversed rows and columns turn the usual lower factor into the upper one; each is cut to size to spare a batch of copies.
            permuted = hessian[index][reverse[index]][:, reverse[index]]
            permuted.diagonal().add_(damp * factor * mean[index])
            lower, failed = torch.linalg.cholesky_ex(permuted)
            if not failed and bool(lower.diagonal().isfinite().all()):
                upper[index] = lower.flip(0, 1)
                found[index] = damp * factor
    root = upper.diagonal(dim1=1, dim2=2).clone()
    upper /= root.masked_fill(root == 0, 1)[:, None, :]
    return Factor(upper, root.square(), order, found)


def round_with_feedback(weight: Tensor, factor: Factor, scales: Scales, grid: Grid, leaf: int = 32) -> tuple[Tensor, Tensor]:
    """Round each column after feeding back the errors of those before it.

    ``weight`` [batch, out, in] and ``scales`` [batch, out, groups] in the dtype of ``factor``. Returns codes int8 [batch, out, in] and the cost
    ``tr((W - Q) H (W - Q)^T)`` per row, [batch, out]. Columns are halved until `leaf` are left, so that most of the feedback is a
    few large matrix products; `leaf` changes speed, not the result.
    """
    batch, rows, columns = weight.shape
    dtype, device = factor.upper.dtype, weight.device
    # Inputs first [in, batch, out]: each step below works on contiguous memory.
    error = torch.empty(columns, batch, rows, dtype=dtype, device=device)
    for member in range(batch):
        error[:, member] = weight[member].T.contiguous().index_select(0, factor.order[member])
    wanted = error.clone()
    codes = torch.empty(columns, batch, rows, dtype=torch.int8, device=device)
    group_of = (factor.order // (columns // scales.scale.shape[2])).T
    each = torch.arange(batch, device=device).expand(columns, batch)
    by_group = Scales(scales.scale.to(dtype).transpose(1, 2).contiguous(), scales.zero.to(dtype).transpose(1, 2).contiguous())

    def solve(start: int, end: int) -> None:
        if end - start > leaf:
            middle = (start + end) // 2
            solve(start, middle)
            _feed_back(wanted[middle:end], factor.upper[:, start:middle, middle:end], error[start:middle])
            solve(middle, end)
            return
        at = each[start:end], group_of[start:end]
        scale, zero = by_group.scale[at], by_group.zero[at]
        inverse, negative = scale.reciprocal(), -scale
        low, high = grid.low - zero, grid.high - zero
        for k in range(start, end):
            place, column = k - start, wanted[k]
            if place:
                _feed_back(wanted[k : k + 1], factor.upper[:, start:k, k : k + 1], error[start:k])
            code = torch.mul(column, inverse[place]).round_()
            torch.clamp(code, low[place], high[place], out=code)
            error[k].addcmul_(code, negative[place])  # held the weight until here
            column.addcmul_(code, negative[place])
            torch.add(code, zero[place], out=code)
            codes[k] = code

    solve(0, columns)
    cost = torch.einsum("kbr,bk->br", wanted.square_(), factor.diagonal)
    result = torch.empty(batch, rows, columns, dtype=torch.int8, device=device)
    for member in range(batch):
        back = torch.argsort(factor.order[member])
        result[member] = codes[:, member].index_select(0, back).T
    return result, cost


def _feed_back(wanted: Tensor, upper: Tensor, error: Tensor) -> None:
    """Add to ``wanted`` [k, batch, out] what ``error`` [j, batch, out] of earlier columns sends through ``upper`` [batch, j, k]; in place."""
    if wanted.shape[1] > 1:
        wanted += torch.bmm(upper.transpose(1, 2), error.transpose(0, 1)).transpose(0, 1)
    elif wanted.shape[0] > 1:
        wanted[:, 0].addmm_(upper[0].T, error[:, 0])
    else:
        wanted[0, 0].addmv_(error[:, 0].T, upper[0, :, 0])
