"""GPTQ as its objective reads: fix a column, then find anew the best values of all columns still free."""

from __future__ import annotations

import torch
from torch import Tensor


def round_column_by_column(
    weight: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, low: int, high: int, order: list[int], kept: Tensor | None = None
) -> Tensor:
    """Codes [out, in] of ``weight`` float64 [out, in]; ``scale`` and ``zero`` [out, in] are given per weight, where not ``kept`` the code is zero's.

    After each column the free ones solve ``min tr((W - Q) H (W - Q)^T)`` from scratch: no factor, no update, no shortcut.
    """
    codes = torch.zeros_like(weight)
    error = torch.zeros_like(weight)
    for step, column in enumerate(order):
        fixed, free = order[:step], order[step:]
        wanted = weight[:, column].clone()
        if fixed:
            # The gradient with respect to the free columns of E = W - Q vanishes: E_free H_free,free = -E_fixed H_fixed,free.
            best = -error[:, fixed] @ hessian[fixed][:, free] @ torch.linalg.inv(hessian[free][:, free])
            wanted -= best[:, 0]
        code = (wanted / scale[:, column] + zero[:, column]).round().clamp(low, high)
        if kept is not None:
            code = torch.where(kept[:, column], code, zero[:, column])
        codes[:, column] = code
        error[:, column] = weight[:, column] - (code - zero[:, column]) * scale[:, column]
    return codes


def cost(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """``tr((W - Q) H (W - Q)^T)``, one product at a time."""
    error = weight - rounded
    total = 0.0
    for row in error:
        for i in range(len(row)):
            for j in range(len(row)):
                total += float(row[i] * hessian[i, j] * row[j])
    return total
