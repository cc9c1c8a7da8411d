"""Rounding that is learned: which way each weight goes, and how far each group's range reaches (AutoRound, arXiv 2309.05516, section 3).

Both are trained through the rounding as if it were the identity, by the sign of the gradient alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from compress.numerics.grid import Grid, Scales, as_stored, minmax_scales, search_scales

JUDGED_BATCHES = 4
"""Batches that say which state was the best; fixed, so that states can be compared."""
JUDGED_EVERY = 10


class Rounding:
    """Learned rounding of ``weight`` [n, out, in] float32, linears that share shape, `grid`, `group_size` and `stored` dtype of scales.

    Starts as plain rounding with searched scales: ``offset`` [n, out, in] at 0, kept within half a step, and ``reach``
    [ends, n, out, groups] at 1, one factor for each end of the range (one for both on a symmetric grid). Where ``kept`` [n, out, in] bool says
    no, the offset stays at 0, so that a weight that is zero stays that.
    """

    def __init__(self, weight: Tensor, grid: Grid, group_size: int, stored: torch.dtype, kept: Tensor | None = None) -> None:
        self.grid = grid
        self.stored = stored
        find_scales = search_scales if grid.rows == 1 else minmax_scales
        found = [find_scales(each, grid, group_size, stored) for each in weight]
        scales = Scales(*(torch.stack([getattr(each, name) for each in found]) for name in ("scale", "zero")))
        self._grouped = torch.unflatten(weight, -1, (-1, group_size))
        self._kept = None if kept is None else torch.unflatten(kept, -1, (-1, group_size))
        self._scale = scales.scale
        self._ends = ((grid.low - scales.zero) * scales.scale, (grid.high - scales.zero) * scales.scale)
        self.offset = torch.zeros_like(self._grouped).requires_grad_()
        self.reach = torch.ones(1 if grid.symmetric else 2, *scales.scale.shape, device=weight.device).requires_grad_()

    def scales(self) -> Scales:
        """[n, out, groups], as stored; differentiable in ``reach``."""
        # Moved from where it starts rather than computed anew, so that nothing learned is exactly nothing changed.
        if self.grid.symmetric:
            scale = self._stored_scale(self._scale * self.reach[0])
            return Scales(scale, torch.zeros_like(scale))
        grown = [end * (reach - 1) for end, reach in zip(self._ends, self.reach, strict=True)]
        scale = self._stored_scale(self._scale + (grown[1] - grown[0]) / (self.grid.high - self.grid.low))
        low = self._ends[0] * self.reach[0]
        return Scales(scale, _straight(self.grid.low - low / scale, torch.round).clamp(self.grid.low, self.grid.high))

    def _stored_scale(self, exact: Tensor) -> Tensor:
        return _straight(exact, lambda value: as_stored(value.abs(), self.grid, self.stored).copysign(value))

    def codes(self, scales: Scales) -> Tensor:
        """[n, out, in] float32, points of the grid; differentiable."""
        exact = self._grouped * scales.scale.reciprocal()[..., None]
        exact = exact + self.offset * self.grid.spacing(exact.detach()) + scales.zero[..., None]
        low, high = self.grid.low, self.grid.high
        return _straight(exact, lambda value: self.grid.round_(value.clone(), -math.inf, math.inf)).clamp(low, high)

    def values(self) -> Tensor:
        """What the weights are as rounded, [n, out, in]; differentiable."""
        scales = self.scales()
        return ((self.codes(scales) - scales.zero[..., None]) * scales.scale[..., None]).flatten(-2)

    def step(self, rate: float) -> None:
        """Move against the sign of the gradients that have gathered, and forget them."""
        with torch.no_grad():
            # Where outputs share a scale, none of them may move it.
            for parameter, low, high in ((self.offset, -0.5, 0.5), (self.reach, 0.0, 2.0))[: 1 + (self.grid.rows == 1)]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign_(), alpha=rate).clamp_(low, high)
                    parameter.grad = None
            if self._kept is not None:
                self.offset.mul_(self._kept)

    def forget(self, member: int) -> None:
        """Go back to plain rounding for one of the linears."""
        with torch.no_grad():
            self.offset[member] = 0
            self.reach[:, member] = 1

    def state(self) -> tuple[Tensor, Tensor]:
        """A copy of what is learned."""
        return self.offset.detach().clone(), self.reach.detach().clone()

    def restore(self, state: tuple[Tensor, Tensor]) -> None:
        """Go back to a `state`."""
        with torch.no_grad():
            self.offset.copy_(state[0])
            self.reach.copy_(state[1])


def _straight(exact: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """``rounding(exact)``, with the gradient of ``exact``."""
    return exact + (rounding(exact) - exact).detach()


def descend(
    roundings: Sequence[Rounding], loss: Callable[[int], Tensor], batches: int, *, steps: int, rate: float, at_once: int, chooser: random.Random
) -> tuple[float, float]:
    """Leave every rounding in the best state found in so many `steps` of sign descent, with a step size that falls from `rate` to 0.

    ``loss(batch)`` depends on what the roundings give; `at_once` of its batches, as `chooser` likes, make a step. Returns the loss before
    and after, on the batches that judge.
    """

    def judge() -> float:
        with torch.no_grad():
            return sum(float(loss(batch)) for batch in judges) / len(judges)

    judges = range(0, batches, -(-batches // JUDGED_BATCHES))
    at_start = best = judge()
    kept = [rounding.state() for rounding in roundings]
    for step in range(steps):
        with torch.enable_grad():
            for batch in chooser.sample(range(batches), min(at_once, batches)):
                loss(batch).backward()  # type: ignore[no-untyped-call]
        for rounding in roundings:
            rounding.step(rate * (1 - step / steps))
        if (step + 1) % JUDGED_EVERY == 0 or step + 1 == steps:
            now = judge()
            if now < best:
                best, kept = now, [rounding.state() for rounding in roundings]
    for rounding, state in zip(roundings, kept, strict=True):
        rounding.restore(state)
    return at_start, best
