"""Values for the few weights of a linear that may be anything beside those that are rounded."""

from __future__ import annotations

import torch
from torch import Tensor

AT_ONCE = 1 << 22
"""Elements of the equations solved at once."""


def least_error(error: Tensor, positions: Tensor, hessian: Tensor, damp: float) -> Tensor:
    """The errors [out, in] float32 that are left if those at ``positions`` bool may be chosen: the ones with which the outputs lose least.

    ``error`` [out, in] is what all weights are off by, ``hessian`` [in, in] the mean of ``x x^T``. Each row ``e`` minimises
    ``e H e^T + lambda |e_S|^2`` over its errors ``e_S``, ``lambda`` being ``damp`` times the mean of the diagonal: the chosen weights make good for
    the others of their row, and go back to what they were as far as the data say nothing. Errors elsewhere stay.
    """
    fixed = error.masked_fill(positions, 0)
    result = fixed.clone()
    counts = positions.sum(1)
    ridge = damp * hessian.diagonal().mean().double() + torch.finfo(torch.float32).tiny
    order = counts.argsort(stable=True)
    start = int((counts == 0).sum())
    while start < len(order):
        # Rows with about as many unknowns together; the first of them tells how many fit.
        most = int(counts[order[min(len(order) - 1, start + AT_ONCE // (int(counts[order[start]]) ** 2 + error.shape[1]))]])
        rows = order[start : start + max(1, AT_ONCE // (most**2 + error.shape[1]))]
        result[rows] += _solve(fixed[rows], positions[rows], hessian, ridge)
        start += len(rows)
    return result


def _solve(fixed: Tensor, positions: Tensor, hessian: Tensor, ridge: Tensor) -> Tensor:
    """The best errors at ``positions`` and zeros elsewhere, [rows, in], each row padded to the longest with equations ``x = 0``."""
    counts = positions.sum(1)
    unknown = positions.byte().argsort(dim=1, descending=True, stable=True)[:, : int(counts.max())]
    real = torch.arange(unknown.shape[1], device=unknown.device) < counts[:, None]
    matrix = hessian[unknown[:, :, None], unknown[:, None, :]].double()
    matrix = torch.where(real[:, :, None] & real[:, None, :], matrix, 0.0)
    matrix.diagonal(dim1=1, dim2=2).add_(torch.where(real, ridge, 1.0))
    wanted = torch.where(real, -(fixed @ hessian).gather(1, unknown).double(), 0.0)
    found = torch.linalg.solve(matrix, wanted[..., None])[..., 0]
    return torch.zeros_like(fixed).scatter_(1, unknown, torch.where(real, found, 0.0).to(fixed.dtype))
