"""The best values of a few weights, row by row, by least squares on the inputs themselves."""

from __future__ import annotations

import torch
from torch import Tensor


def least_error(error: Tensor, positions: Tensor, inputs: Tensor, ridge: float) -> Tensor:
    """Errors [out, in]; those at ``positions`` minimise the mean squared output for ``inputs`` [tokens, in] plus `ridge` times their own squares."""
    result = error.clone().double()
    tokens = len(inputs)
    for row in range(len(error)):
        chosen = positions[row].nonzero()[:, 0]
        others = (~positions[row]).nonzero()[:, 0]
        left = torch.cat([inputs[:, chosen].double() / tokens**0.5, ridge**0.5 * torch.eye(len(chosen), dtype=torch.float64)])
        right = torch.cat([-(inputs[:, others].double() @ error[row, others].double()) / tokens**0.5, torch.zeros(len(chosen), dtype=torch.float64)])
        if len(chosen):
            result[row, chosen] = torch.linalg.lstsq(left, right[:, None]).solution[:, 0]
    return result
