"""N:M sparsity, one group, one weight, one mask at a time."""

from __future__ import annotations

from itertools import combinations, permutations, product

import numpy as np
import torch
from torch import Tensor

from compress.numerics.pattern import Pattern


def keep(scores: Tensor, pattern: Pattern) -> Tensor:
    """Where [out, in] the largest scores are, by sorting lists."""
    rows, columns = scores.shape
    kept = torch.zeros(rows, columns, dtype=torch.bool)
    for start in range(0, columns, pattern.m):
        group = list(range(start, min(start + pattern.m, columns)))
        for row in range(rows):
            allowed = group
            if len(group) < pattern.m:
                kept[row, group] = True
                continue
            if pattern.v is not None:
                first = row - row % pattern.v
                totals = {c: sum(float(scores[r, c]) for r in range(first, first + pattern.v)) for c in group}
                allowed = sorted(sorted(group, key=lambda c: (-totals[c], c))[:4])
            for column in sorted(allowed, key=lambda c: (-float(scores[row, c]), c))[: pattern.n]:
                kept[row, column] = True
    return kept


def wanda(weight: Tensor, inputs: Tensor) -> np.ndarray:
    """Scores by the definition."""
    norms = np.sqrt((inputs.numpy() ** 2).mean(0))
    return np.abs(weight.numpy()) * norms


def ria(weight: Tensor, inputs: Tensor) -> np.ndarray:
    """Scores by the definition."""
    size = np.abs(weight.numpy())
    scores = np.empty_like(size)
    for row, column in product(*map(range, size.shape)):
        share = size[row, column] / size[:, column].sum() + size[row, column] / size[row].sum()
        scores[row, column] = share * np.sqrt((inputs.numpy()[:, column] ** 2).mean()) ** 0.5
    return scores


def prune_column_by_column(weight: Tensor, hessian: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Optimal brain surgery from left to right: after each column all behind it are solved for anew, by an explicit inverse of what is left of H."""
    result, current = torch.zeros_like(weight), weight.clone()
    kept = torch.ones_like(weight, dtype=torch.bool)
    columns = weight.shape[1]
    for j in range(columns):
        inverse = torch.linalg.inv(hessian[j:, j:])
        if j % pattern.m == 0 and j + pattern.m <= columns:
            # Each column of the group is priced as if those before it in the group were fixed.
            prices = torch.stack([torch.linalg.inv(hessian[k:, k:])[0, 0] for k in range(j, j + pattern.m)])
            kept[:, j : j + pattern.m] = keep(current[:, j : j + pattern.m] ** 2 / prices, pattern)
        result[:, j] = current[:, j] * kept[:, j]
        error = (current[:, j] - result[:, j]) / inverse[0, 0]
        current[:, j:] -= error[:, None] * inverse[0][None]
    return result, kept


def least_squares(weight: Tensor, kept: Tensor, hessian: Tensor) -> Tensor:
    """The best values of each row where it is kept: ``w H_{:,S} (H_SS)^-1``."""
    result = torch.zeros_like(weight)
    for row in range(len(weight)):
        chosen = kept[row].nonzero()[:, 0]
        result[row, chosen] = torch.linalg.solve(hessian[chosen][:, chosen], hessian[chosen] @ weight[row])
    return result


def best_of_all_masks(weight: Tensor, hessian: Tensor, pattern: Pattern) -> Tensor:
    """For each row the least error over every mask of a pattern without V, values solved for exactly, [out]."""
    columns = weight.shape[1]
    choices = [list(combinations(range(start, start + pattern.m), pattern.n)) for start in range(0, columns, pattern.m)]
    best = torch.full((len(weight),), torch.inf, dtype=weight.dtype)
    for mask in product(*choices):
        kept = torch.zeros(1, columns, dtype=torch.bool)
        kept[0, [column for group in mask for column in group]] = True
        lost = weight - least_squares(weight, kept.expand_as(weight), hessian)
        best = torch.minimum(best, ((lost @ hessian) * lost).sum(1))
    return best


def least_sum(cost: np.ndarray) -> float:
    """The cheapest assignment, by trying all."""
    return min(sum(cost[row, column] for row, column in enumerate(order)) for order in permutations(range(len(cost))))


def masks(pattern: Pattern, rows: int, columns: int) -> list[tuple[tuple[int, int], ...]]:
    """What is kept, as pairs of row and column, by every way to choose it: with V the columns of each block first. Some ways may keep the same."""
    v = pattern.v or 1
    blocks = []
    for first, start in product(range(0, rows, v), range(0, columns, pattern.m)):
        group = range(start, start + pattern.m)
        found = []
        for allowed in combinations(group, 4) if pattern.v else [tuple(group)]:
            for chosen in product(combinations(allowed, pattern.n), repeat=v):
                found.append(tuple((first + row, column) for row in range(v) for column in chosen[row]))
        blocks.append(found)
    return [tuple(pair for block in mask for pair in block) for mask in product(*blocks)]
