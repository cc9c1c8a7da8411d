"""What a unit of a block - a channel, a group of heads - is worth, and which are to stay.

A unit is an equal run of columns of the linear that reads it. Scores say what is lost without it, in units of their own, so that those of
different kinds or blocks can be compared only once they are standardised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Moments:
    """Mean and variance of each channel, merged batch by batch (Chan, Golub and LeVeque), [columns] float64."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.tokens = 0
        self.mean = torch.zeros(columns, dtype=torch.float64, device=device)
        self._squares = torch.zeros(columns, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor) -> None:
        """Count ``inputs`` [..., columns]."""
        rows = inputs.reshape(-1, inputs.shape[-1]).double()
        if not len(rows):
            return
        mean = rows.mean(0)
        apart, tokens = mean - self.mean, self.tokens + len(rows)
        self._squares += (rows - mean).square().sum(0) + apart.square() * (self.tokens * len(rows) / tokens)
        self.mean += apart * (len(rows) / tokens)
        self.tokens = tokens

    def variance(self) -> Tensor:
        """[columns] float64, over tokens, zero if there are none."""
        return self._squares / max(1, self.tokens)

    def norm(self) -> Tensor:
        """[columns] float64, root of the mean square over tokens."""
        return (self.variance() + self.mean.square()).sqrt()


def magnitude(rows: Sequence[Tensor], columns: Tensor, count: int) -> Tensor:
    """[count] float64: the sum of the magnitudes of all weights of each unit; ``rows`` [count * run, in] each, ``columns`` [out, count * run]."""
    total = columns.abs().double().sum(0).view(count, -1).sum(1)
    return total + sum(weight.abs().double().sum(1).view(count, -1).sum(1) for weight in rows)


def wanda(columns: Tensor, norm: Tensor, count: int) -> Tensor:
    """[count] float64: Wanda's ``|W| |x|`` summed over each unit (the baseline of arXiv 2312.11983); ``norm`` [count * run]."""
    return (columns.abs().double().mean(0) * norm).view(count, -1).sum(1)


def fluctuation(columns: Tensor, variance: Tensor, count: int) -> Tensor:
    """[count] float64: how much what a unit adds to the output varies, ``Var(x) |W|^2`` (arXiv 2312.11983 section 3.2).

    Runs of more than one channel are judged by the mean of the square over their channels, as the paper does for heads.
    """
    each = (variance * columns.double().square().sum(0)).view(count, -1)
    return each.square().mean(1) if each.shape[1] > 1 else each[:, 0]


def first_order(weights: Sequence[Tensor], gradients: Sequence[Tensor], count: int) -> Tensor:
    """[count] float64: sum of ``|g w|`` over a unit (arXiv 2305.11627); the last of `weights` is read by columns, the others by rows."""
    products = [(weight.double() * gradient.double()).abs() for weight, gradient in zip(weights, gradients, strict=True)]
    sums = [product.sum(1) for product in products[:-1]] + [products[-1].sum(0)]
    return torch.stack([each.view(count, -1).sum(1) for each in sums]).sum(0)


class SecondOrder:
    """What the loss would change by without a channel, to second order, from what it is and the gradient in it (HEAPr, arXiv 2509.22299 section 3).

    ``n/2 mean(a^2) mean(g^2)`` of the ``n`` tokens that reached it, so that channels of experts compare: ``g`` is the product of what reads the
    channel with the gradient of the output, so its square is what the paper takes from the Gram matrix of output gradients, which is never formed.
    [columns] float64.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self.tokens = 0
        self._inputs = torch.zeros(columns, dtype=torch.float64, device=device)
        self._gradients = torch.zeros(columns, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Count ``inputs`` and the ``gradients`` in them, [tokens, columns]."""
        self.tokens += len(inputs)
        self._inputs += inputs.double().square().sum(0)
        self._gradients += gradients.double().square().sum(0)

    def score(self, count: int) -> Tensor:
        """[count]: sums over runs of channels."""
        each = 0.5 * self._inputs * self._gradients / max(1, self.tokens)
        return each.view(count, -1).sum(1)


def standardised(scores: Tensor) -> Tensor:
    """Scores with mean zero and deviation one; where all are equal, zero."""
    apart = scores - scores.mean()
    return apart / apart.square().mean().sqrt().clamp_min(torch.finfo(scores.dtype).tiny)


def best(scores: Tensor, keep: int, parts: int = 1) -> Tensor:
    """Indices of the `keep` highest ``scores`` [n], in ascending order, equally many from each of `parts` equal runs; of equal ones the first."""
    each = scores.view(parts, -1)
    order = each.argsort(dim=1, descending=True, stable=True)[:, : keep // parts]
    return (order + each.shape[1] * torch.arange(parts, device=scores.device)[:, None]).flatten().sort().values


@dataclass(frozen=True)
class Choice:
    """What may be taken from one place: ``scores`` [n], each unit of ``cost`` parameters, in steps of so many units, so many to stay at least."""

    scores: Tensor
    cost: int
    step: int
    least: int


def share_out(choices: Mapping[str, Choice], remove: int) -> dict[str, int]:
    """How many units each place keeps when about `remove` parameters go, the least valuable first, whole steps at a time.

    Scores of all places are compared with one another. A step that no longer fits is left out for cheaper ones.
    """
    steps = []
    for place, (name, choice) in enumerate(choices.items()):
        ascending = choice.scores.sort().values
        for number in range((len(ascending) - choice.least) // choice.step):
            value = float(ascending[number * choice.step : (number + 1) * choice.step].mean())
            steps.append((value, place, number, name))
    kept = {name: len(choice.scores) for name, choice in choices.items()}
    full: set[str] = set()
    for _, _, _, name in sorted(steps):
        cost = choices[name].cost * choices[name].step
        if name not in full and cost <= remove:
            kept[name] -= choices[name].step
            remove -= cost
        else:
            full.add(name)
    return kept
