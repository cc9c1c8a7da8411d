"""In which order inputs should stand so that groups of them hold as much as they may keep (RIA, ICLR 2024, section 3.3)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from compress.numerics.pattern import Pattern
from compress.numerics.sparsity import keep

AT_ONCE = 64
"""Groups that exchange inputs with each other in one assignment."""
ELEMENTS = 1 << 22
"""Of the scores tried at once."""


def spread(scores: Tensor, pattern: Pattern) -> Tensor:
    """The order int64 [in] in which inputs keep the most of ``scores`` [out, in] under a pattern without V; never less than as they stand.

    Inputs are dealt out to the groups from the largest sum of scores on, there and back again. Then, place by place, the inputs of that place are
    assigned to the groups anew so that most is kept: a linear sum assignment among `AT_ONCE` groups. Inputs behind the last whole group stay.
    """
    columns = scores.shape[1]
    count = pattern.pruned_columns(columns) // pattern.m
    identity = torch.arange(columns, device=scores.device)
    if count < 2:
        return identity
    dealt = scores[:, : count * pattern.m].sum(0).argsort(descending=True, stable=True).view(pattern.m, count)
    dealt[1::2] = dealt[1::2].flip(1)
    groups = dealt.T.contiguous()  # [groups, m]
    for place in range(pattern.m):
        for start in range(0, count, AT_ONCE):
            part = slice(start, start + AT_ONCE)
            groups[part, place] = groups[part, place][_assign(scores, groups[part], place, pattern)]
    order = torch.cat([groups.flatten(), identity[count * pattern.m :]])
    return order if retained(scores[:, order], pattern) > retained(scores, pattern) else identity


def retained(scores: Tensor, pattern: Pattern) -> float:
    """The sum of the ``scores`` [out, in] that are kept."""
    return float(scores[keep(scores, pattern)].sum(dtype=torch.float64))


def _assign(scores: Tensor, groups: Tensor, place: int, pattern: Pattern) -> Tensor:
    """For each of ``groups`` [g, m], from which of them its input at `place` should come, [g]."""
    count, rows = len(groups), len(scores)
    others = torch.cat([groups[:, :place], groups[:, place + 1 :]], 1)
    # A newcomer takes the place of the smallest that a group would keep without it, if it is larger.
    best = scores[:, others].topk(pattern.n, -1).values  # [out, g, n]
    newcomers = scores[:, groups[:, place]]
    gain = torch.zeros(count, count, dtype=torch.float64)
    step = max(1, ELEMENTS // count**2)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        gain += (newcomers[part, None, :] - best[part, :, -1:]).clamp_min_(0).sum(0, dtype=torch.float64).cpu()
    return torch.from_numpy(assignment(-gain.numpy())).to(groups.device)


def assignment(cost: np.ndarray) -> np.ndarray:
    """The column of each row of a square ``cost`` float64 so that the sum is least, by shortest augmenting paths (Jonker and Volgenant, 1987)."""
    size = len(cost)
    row_price, column_price = np.zeros(size), np.zeros(size + 1)
    owner = np.full(size + 1, -1)  # of each column; the last column is where a row begins that has none yet
    for row in range(size):
        owner[size] = row
        column, slack, before, done = size, np.full(size, np.inf), np.full(size, -1), np.zeros(size + 1, dtype=bool)
        while owner[column] >= 0:
            done[column] = True
            reduced = cost[owner[column]] - row_price[owner[column]] - column_price[:size]
            better = (reduced < slack) & ~done[:size]
            slack[better], before[better] = reduced[better], column
            following = int(np.where(done[:size], np.inf, slack).argmin())
            step = slack[following]
            row_price[owner[done]] += step
            column_price[done] -= step
            slack[~done[:size]] -= step
            column = following
        while column != size:
            owner[column] = owner[before[column]]
            column = int(before[column])
    result = np.empty(size, dtype=np.int64)
    result[owner[:size]] = np.arange(size)
    return result
