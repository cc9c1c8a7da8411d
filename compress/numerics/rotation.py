"""Orthogonal matrices that spread what is concentrated: Hadamard matrices with random signs (QuaRot, arXiv 2404.00456, section 3).

A Hadamard matrix of order ``n`` has entries of one magnitude and orthogonal rows. The order is a product of a power of two (Sylvester's
doubling, applied in ``n log n`` steps without ever being written down) and of a small order with a construction of Paley's.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

LARGEST_CORE = 1024
"""Orders of Paley's that are looked for; a larger one would cost more than it spreads."""


class Rotation:
    """``R`` [size, size]: random signs, then a Hadamard matrix scaled to be orthogonal. The same for the same `size` and `seed`.

    Where no Hadamard matrix of that order is known here, the channels are turned in blocks of the largest power of two instead, and
    ``blocks`` is how many there are.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        power = size & -size  # the largest power of two in it
        odd = size // power
        cores = [odd * factor for factor in (4, 8, 16, 32) if factor <= power and odd * factor <= LARGEST_CORE]
        self.core = 1 if odd == 1 else next((core for core in cores if paley(core) is not None), 1)
        self.doubled = size // self.core if self.core > 1 else power
        self.blocks = size // (self.core * self.doubled)
        signs = torch.randint(2, (size,), generator=torch.Generator().manual_seed(seed))
        self._signs = (2 * signs - 1).double()

    def __str__(self) -> str:
        return f"{self.size} channels" + (f" in {self.blocks} blocks" if self.blocks > 1 else "")

    def columns(self, value: Tensor) -> Tensor:
        """``value R`` for float64 [..., size]."""
        value = torch.unflatten(value * self._signs.to(value.device), -1, (self.blocks, self.core, self.doubled))
        if self.core > 1:
            matrix = paley(self.core)
            assert matrix is not None
            value = torch.einsum("...cd,ce->...ed", value, matrix.to(value.device))
        return doubled(value).flatten(-3).div_(math.sqrt(self.core * self.doubled))

    def rows(self, value: Tensor) -> Tensor:
        """``R^T value`` for float64 [size, in]."""
        return self.columns(value.T).T.contiguous()


def doubled(value: Tensor) -> Tensor:
    """``value H`` with Sylvester's Hadamard matrix of a power of two, [..., 2^k]."""
    size = value.shape[-1]
    half = 1
    while half < size:
        pairs = torch.unflatten(value, -1, (-1, 2, half))
        value = torch.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], -2).flatten(-3)
        half *= 2
    return value


@cache
def paley(order: int) -> Tensor | None:
    """A Hadamard matrix of `order`, float64, by Paley's first or second construction over a prime field, or None if neither gives one."""
    if prime(order - 1) and order % 4 == 0:
        residues = jacobsthal(order - 1)
        matrix = torch.ones(order, order, dtype=torch.float64)
        matrix[1:, 1:] = residues + torch.eye(order - 1, dtype=torch.float64)
        matrix[1:, 0] = -1
        return matrix
    if order % 4 == 0 and prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        size = order // 2
        conference = torch.ones(size, size, dtype=torch.float64)
        conference[1:, 1:] = jacobsthal(size - 1)
        conference[0, 0] = 0
        plus, minus = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
        return torch.kron(conference, plus.double()) + torch.kron(torch.eye(size, dtype=torch.float64), minus.double())
    return None


def prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def jacobsthal(field: int) -> Tensor:
    """[field, field] float64: 1 where the difference of row and column is a square modulo the prime `field`, -1 where it is none, 0 for zero."""
    squares = {value * value % field for value in range(1, field)}
    symbols = torch.tensor([0.0] + [1.0 if value in squares else -1.0 for value in range(1, field)], dtype=torch.float64)
    places = torch.arange(field)
    return symbols[(places[:, None] - places) % field]
