"""A branch as it is defined: ``P`` written out, and the best ``B`` by least squares on the inputs themselves."""

from __future__ import annotations

import torch
from torch import Tensor


def runs(columns: int, size: int) -> Tensor:
    """``P`` [runs, in] float64, entry by entry."""
    found = torch.zeros(-(-columns // size), columns, dtype=torch.float64)
    for column in range(columns):
        found[column // size, column] = 1
    return found


def best(removed: Tensor, inputs: Tensor, size: int) -> Tensor:
    """``B`` [out, runs] with ``B P x`` nearest to ``R x`` over ``inputs`` [tokens, in], the smallest if there are several."""
    sums = inputs.double() @ runs(inputs.shape[1], size).T
    return torch.linalg.lstsq(sums, inputs.double() @ removed.double().T, driver="gelsd").solution.T
