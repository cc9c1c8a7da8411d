"""Keys and values of all heads of a block as fewer numbers: projections that lose least of what attention makes of them.

CSKV (arXiv 2409.10593, section 3) factors the projections of keys and values and trains the factors to give back what the model computes. What
training can reach at best is known beforehand: with ``S`` the second moment of what is to be kept ([n, n], all heads side by side, keys before
rotation) and ``M`` what an error costs, a projection of rank r loses at least the eigenvalues of ``M^1/2 S M^1/2`` but the r largest, and
``up = M^-1/2 U_r``, ``down = U_r^T M^1/2`` lose no more. It projects keys and values themselves, so biases and normalised keys are
nothing special, and what a cache holds of recent tokens can be projected when they cease to be recent.

All in float64. Costs ``M`` are [heads, d, d], since errors in different heads are not made up for by each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROOM = 1e-4
"""Added to the cost of an error in any direction, as a fraction of the mean: a root has to be inverted."""


@dataclass(frozen=True)
class Basis:
    """Projections of every rank: ``up[:, :r] @ down[:r]`` is the best of rank r. ``energy`` [n], falling, is what each direction saves;
    ``down`` [n, n]; ``up`` [n, n]."""

    energy: Tensor
    down: Tensor
    up: Tensor


def basis(moment: Tensor, cost: Tensor | None = None) -> Basis:
    """Of ``moment`` [n, n], the mean of ``k k^T``, under ``cost`` [heads, d, d], positive semi-definite; None: all errors cost alike."""
    root, inverse = (torch.eye(len(moment), dtype=torch.float64, device=moment.device),) * 2 if cost is None else _roots(cost.double())
    weighed = root @ moment.double() @ root
    energy, directions = torch.linalg.eigh((weighed + weighed.T) / 2)
    directions = directions.flip(1)
    return Basis(energy.flip(0).clamp_min(0), directions.T @ root, inverse @ directions)


def _roots(cost: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of ``cost`` [heads, d, d] float64 as one matrix over all heads, [n, n], and its inverse."""
    values, vectors = torch.linalg.eigh(cost)
    mean = float(values.mean())
    values = values.clamp_min(0) + (ROOM * mean if mean > 0 else 1.0)
    root, inverse = (vectors * part[:, None] @ vectors.transpose(1, 2) for part in (values.sqrt(), values.rsqrt()))
    return _along_diagonal(root), _along_diagonal(inverse)


def _along_diagonal(blocks: Tensor) -> Tensor:
    heads, width, _ = blocks.shape
    whole = torch.zeros(heads, width, heads, width, dtype=blocks.dtype, device=blocks.device)
    whole.diagonal(dim1=0, dim2=2).copy_(blocks.permute(1, 2, 0))
    return whole.view(heads * width, heads * width)


def commuting_basis(moment: Tensor, cost: Tensor) -> Basis:
    """The best among projections that commute with rotation: what they keep of rotated keys needs no rotating, and can be told to queries instead.

    Channels i and i + d / 2 of a head are a complex number, which rotation multiplies by one that all heads share; only complex combinations of
    heads, one pair at a time, are indifferent to that. ``moment`` [n, n] as for `basis`, of keys before rotation or after; ``cost`` [heads, d, d]
    is diagonal, alike in both channels of a pair, as `cost_of_keys` gives it. Directions come in twos, which may not be parted.
    """
    heads, width, _ = cost.shape
    half = width // 2
    weight = (cost.double().diagonal(dim1=1, dim2=2)[:, :half] + ROOM * cost.double().diagonal(dim1=1, dim2=2).mean().clamp_min(1e-30)).sqrt()
    parts = moment.double().view(heads, 2, half, heads, 2, half).diagonal(dim1=2, dim2=5).permute(4, 1, 3, 0, 2)  # [half, 2, 2, heads, heads]
    complex_ = torch.complex(parts[:, 0, 0] + parts[:, 1, 1], parts[:, 1, 0] - parts[:, 0, 1]) * weight.T[:, :, None] * weight.T[:, None, :]
    energy, vectors = torch.linalg.eigh(complex_)
    order = energy.flatten().argsort(descending=True)
    pair, direction = order // heads, order % heads
    chosen = vectors[pair, :, direction]  # [n / 2, heads]
    down, up = (torch.zeros(heads * half, 2, heads, 2, half, dtype=torch.float64, device=moment.device) for _ in range(2))
    at = torch.arange(heads * half, device=moment.device)
    for whole, scaled in ((down, chosen * weight.T[pair]), (up, chosen / weight.T[pair])):
        whole[at, 0, :, 0, pair], whole[at, 0, :, 1, pair] = scaled.real, scaled.imag
        whole[at, 1, :, 0, pair], whole[at, 1, :, 1, pair] = -scaled.imag, scaled.real
    halved = energy.flatten()[order].clamp_min(0) / 2
    return Basis(halved.repeat_interleave(2), down.view(heads * width, -1), up.view(heads * width, -1).T.contiguous())


def cost_of_keys(energy: Tensor, heads: int) -> Tensor:
    """What errors in keys cost attention scores, [heads, d, d].

    ``energy`` [query heads, d / 2] is the mean of ``q_i^2 + q_(i + d/2)^2`` over queries: rotated by every distance there is, the two
    channels of a pair see the same on average, and pairs that turn at different speeds nothing of each other.
    """
    pairs = energy.double().view(heads, -1, energy.shape[1]).sum(1) / 2
    return torch.diag_embed(torch.cat([pairs, pairs], 1))


def cost_of_values(weight: Tensor, heads: int, width: int) -> Tensor:
    """What errors in values cost the output, [heads, d, d]: ``weight`` [out, query heads * d] reads those of each head for several queries."""
    by_head = weight.double().view(len(weight), heads, -1, width)
    return torch.einsum("ohgd,ohge->hde", by_head, by_head)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``states`` [rows, heads, tokens, d] turned as far as ``cos`` and ``sin`` [rows or 1, tokens, d] say, channel i with channel i + d / 2."""
    return states * cos[:, None] + _turned(states) * sin[:, None]


def rotate_back(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The inverse of `rotate`, also where ``cos`` and ``sin`` are scaled."""
    return (states * cos[:, None] - _turned(states) * sin[:, None]) / (cos.square() + sin.square())[:, None]


def _turned(states: Tensor) -> Tensor:
    first, second = states.chunk(2, -1)
    return torch.cat([-second, first], -1)


def side_by_side(states: Tensor) -> Tensor:
    """[rows, tokens, heads * d] of ``states`` [rows, heads, tokens, d]."""
    return states.transpose(1, 2).flatten(2)


def by_head(states: Tensor, heads: int) -> Tensor:
    """The inverse of `side_by_side`."""
    return torch.unflatten(states, 2, (heads, -1)).transpose(1, 2)


def ranks(spectra: Mapping[str, Sequence[float]], total: int, multiple: int, weights: Mapping[str, float]) -> dict[str, int]:
    """How many of its directions each keeps, multiples that sum to `total`, such that all together lose least.

    ``spectra`` have energies, falling; what a direction is worth is its share of the energy times ``weights`` of the same name. Each keeps one
    multiple at least. Raises ValueError if that is more than `total`, or `total` no multiple or more than there are.
    """
    most = {name: len(energy) // multiple for name, energy in spectra.items()}
    left = total // multiple - len(spectra)
    if total % multiple or left < 0 or total // multiple > sum(most.values()):
        raise ValueError(f"{total} channels cannot be shared out among {len(spectra)} in multiples of {multiple}")
    gains = sorted(
        (-weights[name] * sum(energy[step * multiple : (step + 1) * multiple]) / max(sum(energy), 1e-30), step, name)
        for name, energy in spectra.items()
        for step in range(1, most[name])
    )
    # Energies fall, so the steps of each come in their order.
    kept = dict.fromkeys(spectra, multiple)
    for _, _, name in gains[:left]:
        kept[name] += multiple
    return kept
