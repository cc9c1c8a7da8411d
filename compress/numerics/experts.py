"""What a routed expert is worth, which are alike, and what several become as one.

``f`` is what an expert gives for a token that was routed to it, ``g`` the weight it is given with. All that is measured is a sum over tokens, so
that two measurements of different data add up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

import torch
from scipy.cluster.hierarchy import linkage
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import squareform
from torch import Tensor


@dataclass(frozen=True)
class Score:
    """Mean or sum, over the tokens routed to an expert, of ``g^alpha |f|^beta`` (arXiv 2606.15716)."""

    mean: bool
    alpha: int
    beta: int


SCORES = {
    "frequency": Score(False, 0, 0),
    "routing_mass": Score(False, 1, 0),
    "ean": Score(False, 0, 1),
    "gated_ean": Score(False, 1, 1),
    "reap": Score(True, 1, 1),
    "man": Score(True, 0, 1),
    "msan": Score(True, 0, 2),
}
"""By the name in the literature; REAP is arXiv 2510.13999."""


class Tally:
    """Of each expert of a block: ``tokens`` routed to it, sums [experts] of what `SCORES` need, the largest magnitude of what it gave, the ``mean``
    of that [experts, hidden], and how often two of them served the same token, ``together`` [experts, experts]; float64."""

    def __init__(self, experts: int, hidden: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.tokens, self.peaks = zeros(experts), zeros(experts)
        self._sums = {(score.alpha, score.beta): zeros(experts) for score in SCORES.values()}
        self._outputs, self.together = zeros(experts, hidden), zeros(experts, experts)

    def add(self, expert: int, weights: Tensor, outputs: Tensor) -> None:
        """Count tokens that were routed to `expert`, with ``weights`` [tokens], for which it gave ``outputs`` [tokens, hidden]."""
        if not len(outputs):
            return
        outputs, weights = outputs.double(), weights.double()
        norms = outputs.norm(dim=1)
        self.tokens[expert] += len(outputs)
        for (alpha, beta), sums in self._sums.items():
            sums[expert] += (weights**alpha * norms**beta).sum()
        self.peaks[expert] = torch.maximum(self.peaks[expert], outputs.abs().max())
        self._outputs[expert] += outputs.sum(0)

    def add_routes(self, index: Tensor) -> None:
        """Count which experts each token went to, ``index`` [tokens, active]."""
        hits = torch.zeros(len(index), len(self.tokens), dtype=torch.float64, device=index.device).scatter_(1, index, 1.0)
        self.together += hits.T @ hits

    def mean(self) -> Tensor:
        """[experts, hidden]: what each gave on average; zeros for one that nothing was routed to."""
        return self._outputs / self.tokens.clamp_min(1)[:, None]

    def score(self, score: Score, guard: float) -> Tensor:
        """[experts]; of a mean, less for an expert that few tokens say it of: by ``n / (n + guard * mean n)``."""
        sums = self._sums[score.alpha, score.beta]
        if not score.mean:
            return sums
        trusted = self.tokens / (self.tokens + guard * self.tokens.mean()).clamp_min(1)
        return sums / self.tokens.clamp_min(1) * trusted


def super_experts(peaks: Sequence[Tensor]) -> list[Tensor]:
    """By block, which experts [experts] bool give values so large that the model hangs by them: above the 99.5 % quantile of all blocks' ``peaks``
    [experts] and above a tenth of the largest (arXiv 2507.23279 as arXiv 2510.13999 applies it)."""
    every = torch.cat(list(peaks))
    line = torch.maximum(every.quantile(0.995), every.max() / 10)
    return [each > line for each in peaks]


def best(scores: Tensor, count: int, groups: int = 1, protected: Tensor | None = None) -> Tensor:
    """[count] int64 ascending: the experts of the highest ``scores`` [experts], those ``protected`` [experts] bool first, of each group equally many.

    Of equal scores the first wins.
    """
    ranked = scores.double()
    if protected is not None:
        ranked = ranked.masked_fill(protected, torch.inf)
    by_group = ranked.view(groups, -1).argsort(dim=1, descending=True, stable=True)[:, : count // groups]
    return (by_group + torch.arange(groups, device=scores.device)[:, None] * (len(scores) // groups)).flatten().sort().values


def subset(experts: int, count: int, groups: int, error: Callable[[Tensor], float], most: int) -> tuple[Tensor, float]:
    """The `count` experts [count] int64, of each group equally many, with the least ``error``, and that.

    All subsets are tried if there are at most so many, `most`; otherwise experts go one after the other, each time the one that is missed least
    (NAEE, arXiv 2402.14800, and a greedy search in its place).
    """
    size = experts // groups
    if groups == 1 and comb(experts, count) <= most:
        tried = [(error(torch.tensor(each)), each) for each in combinations(range(experts), count)]
        least, chosen = min(tried)
        return torch.tensor(chosen), least
    left, least = list(range(experts)), error(torch.arange(experts))
    while len(left) > count:
        full = {group for group in range(groups) if sum(each // size == group for each in left) == count // groups}
        tried_without = [(error(torch.tensor([one for one in left if one != out])), out) for out in left if out // size not in full]
        least, out = min(tried_without)
        left.remove(out)
    return torch.tensor(left), least


def clusters(distances: Tensor, count: int, method: str, groups: int = 1) -> Tensor:
    """[experts] int64: the number of the cluster of each, `count` clusters in all and of each group equally many, by agglomeration.

    ``distances`` [experts, experts]; ``method`` is ``complete`` or ``average`` linkage. Clusters are numbered by their first expert.
    """
    size, found = len(distances) // groups, []
    for group in range(groups):
        part = distances[group * size : (group + 1) * size, group * size : (group + 1) * size].double().cpu()
        if size == 1:
            labels = [0]
        else:
            tree = linkage(squareform(part.numpy(), checks=False), method)
            labels = _cut(tree, size, count // groups)
        order = list(dict.fromkeys(labels))
        found += [order.index(label) + group * (count // groups) for label in labels]
    return torch.tensor(found)


def _cut(tree: object, size: int, count: int) -> list[int]:
    """Cluster of each of `size` members once so many clusters are left; ties are broken as the tree was built, so exactly `count` come out."""
    members = {number: [number] for number in range(size)}
    for step, row in enumerate(tree[: size - count]):  # type: ignore[index]
        members[size + step] = members.pop(int(row[0])) + members.pop(int(row[1]))
    label = {one: number for number, each in enumerate(members.values()) for one in each}
    return [label[one] for one in range(size)]


def aligned(weights: tuple[Tensor, Tensor, Tensor], to: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """[width] int64: the order in which neurons of an expert, gate and up [width, hidden] and down [hidden, width], are most like another's.

    A linear assignment on the dot products of all three (arXiv 2310.01334 section 3.1); in any order the expert computes the same.
    """
    gate, up, down = (weight.double() for weight in weights)
    other_gate, other_up, other_down = (weight.double() for weight in to)
    alike = other_gate @ gate.T + other_up @ up.T + other_down.T @ down
    _, order = linear_sum_assignment(alike.cpu().numpy(), maximize=True)
    return torch.as_tensor(order, device=gate.device)


def average(weights: Sequence[Tensor], shares: Tensor) -> Tensor:
    """The mean of ``weights``, [out, in] each, by ``shares`` [experts]; that of the only one with a share is itself, to the last bit."""
    present = [weight for weight, share in zip(weights, shares.tolist(), strict=True) if share]
    if len(present) == 1:
        return present[0]
    parts = [weight.double() * share for weight, share in zip(weights, shares.double() / shares.sum(), strict=True)]
    mixed: Tensor = sum(parts[1:], parts[0])
    return mixed.to(weights[0].dtype)


def apart(rows: Tensor, together: Tensor, coactivation: float) -> Tensor:
    """[experts, experts]: how unlike two experts are by their router ``rows`` [experts, hidden], less by how often they serve a token ``together``.

    Each is taken as a share of its mean over pairs (STUN, arXiv 2409.06211 section 4.2); the least distance is zero.
    """
    pairs = ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    distances = torch.cdist(rows, rows)
    found = distances / distances[pairs].mean().clamp_min(1e-30) - coactivation * together / together[pairs].mean().clamp_min(1e-30)
    return (found - found[pairs].min()).masked_fill(~pairs, 0)


def joined(moments: Tensor, tokens: Tensor, count: int, groups: int = 1) -> Tensor:
    """[experts] int64: the cluster of each, around the `count` experts with most ``tokens``, of each group equally many.

    Every other joins the one whose router logits are most like its own, by the cosine; ``moments`` [experts, experts] are the second ones of
    these (M-SMoE, arXiv 2310.01334 section 3.2).
    """
    norms = moments.diagonal().clamp_min(1e-30).sqrt()
    alike = moments / (norms[:, None] * norms)
    dominant, size = best(tokens, count, groups).to(moments.device), len(tokens) // groups
    apart_by_group = dominant[None, :] // size != torch.arange(len(tokens), device=moments.device)[:, None] // size
    nearest = alike[:, dominant].masked_fill(apart_by_group, -torch.inf).argmax(1)
    nearest[dominant] = torch.arange(count, device=moments.device)
    return nearest.cpu()


def representatives(cluster: Tensor, worth: Tensor) -> Tensor:
    """[clusters] int64 ascending: of each cluster the expert of most ``worth`` [experts], the first of equals."""
    worth = worth.to(cluster.device)
    members = [torch.nonzero(cluster == number).flatten() for number in sorted(set(cluster.tolist()))]
    return torch.stack([each[worth[each].argmax()] for each in members]).sort().values
