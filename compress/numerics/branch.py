"""A branch of few weights beside a linear that was pruned: one per output and run of neighbouring inputs, of which it reads the sum.

With ``P`` [runs, in], 1 where an input is in a run and 0 elsewhere, the linear gives ``W x + B (P x)``. This is SLoRB of AST (arXiv 2407.20584),
which starts ``B`` from the means of what was removed; here it starts from least squares on the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

DAMP = 1e-4
"""Of the start, towards zero; a share of the mean square of the sums of runs."""


def count(columns: int, size: int) -> int:
    """Runs of `size` inputs in so many; the last may be shorter."""
    return -(-columns // size)


def run_sums(x: Tensor, size: int) -> Tensor:
    """``P x``: the sum of each run of ``x`` [..., in], [..., runs]."""
    filled = nn.functional.pad(x, (0, -x.shape[-1] % size))
    return filled.reshape(*x.shape[:-1], -1, size).sum(-1)


def expanded(branch: Tensor, size: int, columns: int) -> Tensor:
    """``B P``: what ``branch`` [out, runs] adds to a weight, [out, columns]."""
    return branch.repeat_interleave(size, -1)[..., :columns]


def least_squares(removed: Tensor, moment: Tensor, size: int, damp: float = DAMP) -> Tensor:
    """The branch [out, runs], ``R H P^T (P H P^T)^-1``, that makes good best for what is missing, in the dtype of ``removed``.

    ``removed`` [out, in] is the weight before pruning less that after, ``moment`` [in, runs] is ``H P^T``: the mean, or the sum, of ``x (P x)^T``
    over the inputs. It minimises the squared error of the outputs plus ``damp`` times the mean of the diagonal of ``P H P^T`` times its own square,
    so that it never costs more than no branch, and is zero for a run whose sum always was.
    """
    wide = moment.double()
    gram = run_sums(wide.T, size)
    gram.diagonal().add_(damp * gram.diagonal().mean() + torch.finfo(torch.float32).tiny)
    found: Tensor = torch.linalg.solve(gram, removed.double() @ wide, left=False)
    return found.to(removed.dtype)
