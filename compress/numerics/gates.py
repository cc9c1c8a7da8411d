"""Deterministic differentiable gates (DDP, arXiv 2603.08065): what each unit is multiplied by, and whether it counts as there.

Both are functions of one number ``z`` per unit without any noise. The gate, ``max(z, 0)``, is a scale that can be folded into the weights; that a
unit is there, `retention`, is a soft step which becomes steeper as training goes on, and its mean is held at the share that is to stay by
multipliers that grow for as long as it is not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WIDEST, STEEPNESS = 0.1, math.log(11.0)
"""How far the soft step reaches beyond 0 and 1 before it is cut, and what makes it 0 at zero and 1 at twice its middle."""
FIRST_MIDDLE, LAST_MIDDLE = 0.5, 0.05
SPREAD = 0.45
"""How far the first gates are from one, at most."""
LOWEST = -0.1
"""Gates are not let further below zero, so that they can come back."""


def in_order(worth: Tensor) -> Tensor:
    """Gates to begin with, float32: evenly spread around one, in the order of ``worth`` [n]; of equal ones the first lower."""
    ranks = worth.argsort(stable=True).argsort(stable=True).float()
    return 1 + SPREAD * (2 * ranks / max(1, len(worth) - 1) - 1)


def middle(progress: float) -> float:
    """Where a unit counts half, by how much of the training is over, 0 to 1 (section 3.3)."""
    return FIRST_MIDDLE - (FIRST_MIDDLE - LAST_MIDDLE) * math.sqrt(progress)


def gate(z: Tensor) -> Tensor:
    """``max(z, 0)``, with the gradient of ``z`` also below zero."""
    return z + (z.clamp_min(0) - z).detach()


def retention(z: Tensor, middle: float) -> Tensor:
    """How much a unit is there, 0 to 1: 0 at ``z = 0``, a half at `middle`, 1 at twice that; beyond, the gradient goes on."""
    soft = torch.sigmoid(STEEPNESS * (z - middle) / middle) * (1 + 2 * WIDEST) - WIDEST
    return soft + (soft.clamp(0, 1) - soft).detach()


class Multipliers:
    """What holds the mean retention of each of some scopes at its target: learned by ascent, all zero to begin with.

    ``targets`` [scopes] is the share of units that is to stay.
    """

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets
        self.linear = torch.zeros_like(targets, requires_grad=True)
        self.square = torch.zeros_like(targets, requires_grad=True)
        self.binary = torch.zeros_like(targets, requires_grad=True)

    def penalty(self, retained: list[Tensor]) -> Tensor:
        """To be added to the loss; ``retained`` are the retentions of each scope's units."""
        excess = torch.stack([each.mean() for each in retained]) - self.targets
        undecided = torch.stack([(each * (1 - each)).mean() for each in retained])
        return (self.linear * excess + self.square * excess.square() + self.binary * undecided).sum()

    def optimizer(self, rate: float) -> torch.optim.Optimizer:
        """Ascends; the multiplier of the square, whose gradient is small, in twenty times larger steps (section 4.1)."""
        return torch.optim.AdamW(
            [{"params": [self.linear, self.binary], "lr": rate}, {"params": [self.square], "lr": 20 * rate}], weight_decay=0.0, maximize=True
        )
