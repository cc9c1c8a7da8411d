"""ALPS (arXiv 2406.07831): which weights to keep and what they should be, as one problem, by the alternating direction method of multipliers."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.numerics.pattern import Pattern
from compress.numerics.refit import cost, refit
from compress.numerics.sparsity import keep

ITERATIONS = 300
FIRST_PENALTY = 0.1
EVERY = 3
"""Iterations after which the penalty grows, by how much of the support has changed since."""
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))


def alps(weight: Tensor, hessian: Tensor, pattern: Pattern, start: Tensor) -> Tensor:
    """``weight`` [out, in] as the pattern allows it, with the least error of the outputs that was found.

    ``hessian`` [in, in] is the mean of ``x x^T``, damped; ``start`` a solution to beat, such as that of SparseGPT: for each output (with V, for each
    block of them) the better of both is returned, each with its values refitted.
    """
    found = _admm(weight, hessian, pattern)
    mine, theirs = (refit(weight, each, each != 0, hessian) for each in (found, start))
    gain = cost(weight - theirs, hessian) - cost(weight - mine, hessian)
    if pattern.v is not None:  # outputs of a block share their inputs
        gain = torch.unflatten(gain, 0, (-1, pattern.v)).sum(1).repeat_interleave(pattern.v)
    return torch.where((gain > 0)[:, None], mine, theirs)


def _admm(weight: Tensor, hessian: Tensor, pattern: Pattern) -> Tensor:
    """Where the dense and the sparse half of the problem agree: section 3.2, with the scaling of section 3.4 by the norms of the inputs."""
    norm = hessian.diagonal().clamp_min(torch.finfo(hessian.dtype).tiny).sqrt()
    values, vectors = torch.linalg.eigh(hessian / norm / norm[:, None])
    values = values.clamp_min(0)
    target = weight * norm
    pull = (target @ vectors) * values
    sparse, kept = _project(target, pattern)
    multiplier, penalty, before = torch.zeros_like(target), FIRST_PENALTY, kept
    for iteration in range(1, ITERATIONS + 1):
        dense = ((pull + (penalty * sparse - multiplier) @ vectors) / (values + penalty)) @ vectors.T
        sparse, kept = _project(dense + multiplier / penalty, pattern)
        multiplier = multiplier + penalty * (dense - sparse)
        if iteration % EVERY == 0:
            changed = float((kept & ~before).sum() / kept.sum())
            if not changed:
                break
            penalty *= next(growth for least, growth in GROWTH if changed > least)
            before = kept
    return sparse / norm


def _project(value: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    kept = keep(value.square(), pattern)
    return value * kept, kept
