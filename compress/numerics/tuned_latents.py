"""Projections of keys and values trained a little further, by what attention gives.

The closed form (`compress.numerics.latents`) is the best there is for keys and values, each weighed by what an error costs on average. What
attention gives depends on both together, on who is attended to, and on what lies within the window: gradients see that. Trained are ``down`` and
``up`` of both, from the closed form on, by Adam (arXiv 1412.6980) on the squares of what the output of attention is off by; what was not trained on
decides whether they are taken. CSKV (arXiv 2409.10593, section 3.3) trains by errors of keys and values, whose optimum is known without.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.numerics.latents import by_head, rotate, rotate_back, side_by_side

ROWS = 3
"""Sequences of a step."""
RATE = 5e-3
"""Of Adam in the first step, as a share of the mean size of a projection's entries; it falls to zero by a cosine."""
HELD_OUT = 8
"""One of so many sequences is not trained on, and so many at most."""

Projections = tuple[Tensor, Tensor, Tensor, Tensor]
"""``down`` [rank, n] and ``up`` [n, rank] of keys, then of values."""


@dataclass(frozen=True)
class Lesson:
    """One of calibration: ``query`` [1, query heads, tokens, d], ``keys`` and ``values`` [1, heads, tokens, d], rotated, and cosines and sines
    [1, tokens, d]."""

    query: Tensor
    keys: Tensor
    values: Tensor
    rotation: tuple[Tensor, Tensor]


def attended(made: Projections | None, given: Lesson, window: int, scaling: float) -> Tensor:
    """[tokens, query heads * d], float32, if each query sees itself and `window` tokens before it exactly, and older ones through ``made``; None: all
    exactly."""
    query, keys, values = (states.float() for states in (given.query, given.keys, given.values))
    rotation = given.rotation[0].float(), given.rotation[1].float()
    each, tokens = query.shape[1] // keys.shape[1], query.shape[2]
    distance = torch.arange(tokens, device=query.device)[:, None] - torch.arange(tokens, device=query.device)
    scores = query @ keys.repeat_interleave(each, 1).transpose(2, 3)
    if made is not None:
        old = distance > window
        key_down, key_up, value_down, value_up = made
        restored = rotate(by_head(side_by_side(rotate_back(keys, *rotation)) @ key_down.T @ key_up.T, keys.shape[1]), *rotation)
        scores = torch.where(old, query @ restored.repeat_interleave(each, 1).transpose(2, 3), scores)
    probabilities = torch.softmax((scores * scaling).masked_fill(distance < 0, -math.inf), -1)
    if made is None:
        result = probabilities @ values.repeat_interleave(each, 1)
    else:
        far = by_head(side_by_side(values) @ value_down.T @ value_up.T, keys.shape[1])
        near = probabilities.masked_fill(old, 0) @ values.repeat_interleave(each, 1)
        result = near + probabilities.masked_fill(~old, 0) @ far.repeat_interleave(each, 1)
    return side_by_side(result)[0]


def tuned(
    start: Projections, given: Sequence[Lesson], out: Tensor, window: int, scaling: float, steps: int
) -> tuple[Projections, tuple[float, float]]:
    """``start`` after so many steps, float64, or as it was if that is no better; and the error of what was held out before and after.

    ``out`` [hidden, query heads * d] is the weight behind attention. Errors are squares, as shares of those of what it should give. Sequences no
    longer than the window teach nothing.
    """
    weight = out.float().T
    held_out = given[::HELD_OUT][:HELD_OUT]
    learned = [each for number, each in enumerate(given) if number % HELD_OUT] or held_out
    with torch.no_grad():
        rows = torch.cat([side_by_side(rotate_back(each.keys.float(), *(part.float() for part in each.rotation)))[0] for each in held_out])
        sizes = [(states @ down.float().T).square().mean(0).sqrt().clamp_min(1e-6) for states, down in (
            (rows, start[0]), (torch.cat([side_by_side(each.values.float())[0] for each in held_out]), start[2]))]  # fmt: skip
        # Latents of one size, so that one rate suits all of them.
        made = [start[0].float() / sizes[0][:, None], start[1].float() * sizes[0], start[2].float() / sizes[1][:, None], start[3].float() * sizes[1]]

    def error(some: Sequence[Lesson]) -> Tensor:
        lost, whole = torch.zeros((), device=weight.device), torch.zeros((), device=weight.device)
        for each in some:
            with torch.no_grad():
                wanted = attended(None, each, window, scaling) @ weight
            lost = lost + (attended((made[0], made[1], made[2], made[3]), each, window, scaling) @ weight - wanted).square().sum()
            whole = whole + wanted.square().sum()
        return lost / whole.clamp_min(1e-30)

    with torch.no_grad():
        before = float(error(held_out))
    optimiser = torch.optim.Adam(
        [{"params": [each.requires_grad_()], "lr": RATE * float(each.detach().square().mean().sqrt())} for each in made], betas=(0.9, 0.99)
    )
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    drawn = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for _ in range(steps):
            loss = error([learned[int(place)] for place in torch.randint(len(learned), (ROWS,), generator=drawn)])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            falling.step()
    with torch.no_grad():
        after = float(error(held_out))
    if not after < before:
        return start, (before, before)
    found = [each.detach().double() for each in made]
    return (found[0], found[1], found[2], found[3]), (before, after)
