"""N:M and V:N:M sparsity: which weights to keep by a score, and whether a weight keeps a promise.

Groups are consecutive inputs. Scores and weights are [..., out, in]; ``V`` divides ``out``; inputs behind the last whole group are all kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.numerics.pattern import CHOSEN, Pattern


def keep(scores: Tensor, pattern: Pattern) -> Tensor:
    """Where the pattern lets the largest ``scores`` [..., out, in] stand, bool. Of equal ones the first; none may be negative.

    With V, a block first keeps the inputs with the largest sums over its outputs, then each output its own among these (arXiv 2410.16135,
    section 3).
    """
    kept = torch.ones_like(scores, dtype=torch.bool)
    whole = pattern.pruned_columns(scores.shape[-1])
    groups = torch.unflatten(scores[..., :whole], -1, (-1, pattern.m))
    if pattern.v is not None:
        chosen = _largest(torch.unflatten(groups, -3, (-1, pattern.v)).sum(-3), CHOSEN)
        groups = groups.masked_fill(~chosen.repeat_interleave(pattern.v, -3), -1)
    kept[..., :whole] = _largest(groups, pattern.n).flatten(-2)
    return kept


def _largest(values: Tensor, count: int) -> Tensor:
    """Where the `count` largest of the last dimension are, the first of equal ones."""
    order = values.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, order, True)


def violations(weight: Tensor, pattern: Pattern) -> int:
    """How many groups of ``weight`` [out, in] have more than N weights that are not zero, and blocks more than four such inputs."""
    groups = torch.unflatten(weight[:, : pattern.pruned_columns(weight.shape[1])] != 0, 1, (-1, pattern.m))
    broken = int((groups.sum(-1) > pattern.n).sum())
    if pattern.v is not None:
        broken += int((torch.unflatten(groups, 0, (-1, pattern.v)).any(1).sum(-1) > CHOSEN).sum())
    return broken


def magnitude(weight: Tensor) -> Tensor:
    """Scores: how large a weight is."""
    return weight.abs()


def wanda(weight: Tensor, energy: Tensor) -> Tensor:
    """Scores of ``weight`` [..., out, in]: magnitude times the norm of the input; ``energy`` [..., in] is its mean square (2306.11695)."""
    return weight.abs() * energy.sqrt()[..., None, :]


def ria(weight: Tensor, energy: Tensor) -> Tensor:
    """Scores of ``weight`` [out, in]: its share of its input's and of its output's magnitudes, times the root of the norm of the input.

    Relative importance and activations (ICLR 2024, section 3.2), with the exponent 0.5.
    """
    size = weight.abs()
    tiny = torch.finfo(weight.dtype).tiny
    share = size / size.sum(0, keepdim=True).clamp_min(tiny) + size / size.sum(1, keepdim=True).clamp_min(tiny)
    return share * energy.pow(0.25)
