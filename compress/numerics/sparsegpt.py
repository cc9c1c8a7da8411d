"""SparseGPT (arXiv 2301.00774, section 3): remove weights group after group, and let those still to come make good for what was lost.

With ``H = U D U^T`` as in `compress.numerics.feedback`, removing a weight ``w`` of input ``k`` costs ``D_k w^2`` once all inputs before it are
fixed and all behind it are free. That is the score of the paper, ``w^2 / (H^-1)_kk`` of what is left, without an inverse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.numerics.feedback import Factor
from compress.numerics.pattern import Pattern
from compress.numerics.sparsity import keep

PANEL = 128
"""Inputs whose feedback reaches the rest in one product, rounded down to whole groups."""


def prune_with_feedback(weight: Tensor, factor: Factor, dead: Tensor, pattern: Pattern, panel: int = PANEL) -> tuple[Tensor, Tensor]:
    """``weight`` [batch, out, in] with zeros where the pattern removes, the rest corrected, in the dtype of ``factor``; and where it is kept, bool.

    ``factor`` is that of the damped second moment with inputs in their own order; ``dead`` [batch, in] tells inputs that are always zero, which
    go first and cost nothing. `panel` changes speed, not the result.
    """
    batch, rows, columns = weight.shape
    exact = weight.to(factor.upper.dtype).transpose(1, 2).contiguous()
    # Inputs first, [batch, in, out]: what each input should be once all before it are fixed, then what of it was lost.
    wanted, lost = exact.clone(), torch.zeros_like(exact)
    kept = torch.ones(batch, columns, rows, dtype=torch.bool, device=weight.device)
    price = factor.diagonal.masked_fill(dead, 0)[:, :, None]
    panel = max(pattern.m, panel - panel % pattern.m)
    for start in range(0, columns, panel):
        end = min(start + panel, columns)
        for first in range(start, end, pattern.m):
            group = slice(first, min(first + pattern.m, end))
            corner = factor.upper[:, group, group]
            if first + pattern.m <= columns:
                moved = torch.linalg.solve_triangular(corner.mT, wanted[:, group] - exact[:, group], upper=False, unitriangular=True)
                cost = (exact[:, group] + moved).square_() * price[:, group]
                kept[:, group] = keep(cost.mT, pattern).mT
            for k in range(group.start, group.stop):
                if k > group.start:
                    wanted[:, k] += torch.einsum("bj,bjr->br", factor.upper[:, group.start : k, k], lost[:, group.start : k])
                wanted[:, k].masked_fill_(~kept[:, k], 0)
                lost[:, k] = exact[:, k] - wanted[:, k]
            wanted[:, group.stop : end] += factor.upper[:, group, group.stop : end].mT @ lost[:, group]
        wanted[:, end:] += factor.upper[:, start:end, end:].mT @ lost[:, start:end]
    return wanted.mT.contiguous(), kept.mT.contiguous()
