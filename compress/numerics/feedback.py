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


def round_with_feedback(weight: Tensor, factor: Factor, scales: Scales, grid: Grid, panel: int = 64) -> tuple[Tensor, Tensor]:
    """Round each column after feeding back the errors of those before it.

    ``weight`` [batch, out, in] and ``scales`` [batch, out, groups] in the dtype of ``factor``. Returns codes int8 [batch, out, in] and the cost
    ``tr((W - Q) H (W - Q)^T)`` per row, [batch, out]. ``panel`` columns share one matrix product; it changes speed, not the result.
    """
    batch, rows, columns = weight.shape
    dtype, device = factor.upper.dtype, weight.device
    index = factor.order[:, None, :].expand(batch, rows, columns)
    # Input-major [in, batch, out]: each step below works on contiguous memory.
    target = weight.to(dtype).gather(2, index).permute(2, 0, 1).contiguous()
    error = torch.empty_like(target)
    codes = torch.empty(columns, batch, rows, dtype=torch.int8, device=device)
    cost = torch.zeros(batch, rows, dtype=dtype, device=device)
    group_of = factor.order // (columns // scales.scale.shape[2])
    each = torch.arange(batch, device=device)
    scale = scales.scale.to(dtype).transpose(1, 2).contiguous()
    zero = scales.zero.to(dtype).transpose(1, 2).contiguous()
    inverse = scale.reciprocal()
    for start in range(0, columns, panel):
        end = min(start + panel, columns)
        wanted = target[start:end].clone()
        if start:
            wanted += torch.bmm(factor.upper[:, :start, start:end].transpose(1, 2), error[:start].transpose(0, 1)).transpose(0, 1)
        for k in range(start, end):
            column = wanted[k - start]
            if k > start:
                column = torch.baddbmm(column[:, None], factor.upper[:, start:k, k, None].transpose(1, 2), error[start:k].transpose(0, 1))[:, 0]
            groups = group_of[:, k]
            code = torch.mul(column, inverse[each, groups])
            if not grid.symmetric:
                code += zero[each, groups]
            code.round_().clamp_(grid.low, grid.high)
            codes[k] = code
            if not grid.symmetric:
                code -= zero[each, groups]
            code *= scale[each, groups]
            torch.sub(target[k], code, out=error[k])
            cost.addcmul_(column.sub_(code).square_(), factor.diagonal[:, k, None])
    original = torch.empty(batch, rows, columns, dtype=torch.int8, device=device)
    return original.scatter_(2, index, codes.permute(1, 2, 0)), cost
