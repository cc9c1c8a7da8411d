"""Attention of grouped queries as attention to latents (MLA, arXiv 2405.04434 section 2.1): one rotated key for all heads and one latent of values.

A matrix that commutes with rotary embedding mixes, at each frequency f, the heads of keys by complex numbers: with the two channels of a head that
turn together as one number, ``kappa_a = k_a[f] + i k_a[f + d/2]``, a position turns all of them by the same angle. So of the g numbers at a
frequency any complex directions may be kept, and all query heads read those: a cached key of two channels a direction, with no loss where all g are
kept. TransMLA (arXiv 2502.07864) rotates by real matrices, a special case. The directions are those in which keys vary most, each head of keys
weighted by what its queries are multiplied with it: with ``delta_a`` the root of their energy, the eigenvectors of ``diag(delta) E[conj(kappa)
kappa^T] diag(delta)``.

Values are linear in what their output is, so any projection may be kept of them: the one of rank r that loses least after the output projection.

d is the size of a head, H the number of query heads, g that of heads of keys and values, n = g d; query head h reads h // (H / g). Channel f of a
head turns with f + d/2, as transformers stores a Llama. Everything in float64 and complex128.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GAIN = 2.0**14
"""The weight of the norm of the latent: exact in bfloat16, and its inverse squared is beyond the precision of float32."""
WEAKEST = 1e-6
"""How little a head of keys may count for, beside the one that counts most at a frequency: what it is multiplied by is divided by afterwards."""
ROOM = 1e-6
"""What is added to the diagonal of a metric, as a fraction of its mean, so that it has an inverse."""


def turning(weight: Tensor, heads: int) -> Tensor:
    """The rows of ``weight`` [heads d, in] that turn together as one of complex numbers, [heads, d/2, in]."""
    halves = weight.double().reshape(heads, 2, -1, weight.shape[1])
    return torch.complex(halves[:, 0], halves[:, 1])


def interleaved(rows: Tensor) -> Tensor:
    """Complex ``rows`` [..., n, in] as real ones [..., 2 n, in]: real and imaginary part of each one after the other."""
    return torch.view_as_real(rows).movedim(-1, -2).flatten(-3, -2)


def key_moments(weight: Tensor, heads: int, moment: Tensor) -> Tensor:
    """``E[conj(kappa) kappa^T]`` at each frequency, [d/2, g, g]: of what ``weight`` [n, in] makes of inputs with this second moment [in, in]."""
    rows = turning(weight, heads).transpose(0, 1)
    return rows.conj() @ moment.to(rows.dtype) @ rows.mT


def query_energies(weight: Tensor, heads: int, moment: Tensor) -> Tensor:
    """``E|q|^2`` at each frequency, [d/2, H]: of what ``weight`` [H d, in] makes of inputs with this second moment [in, in]."""
    rows = turning(weight, heads)
    return ((rows @ moment.to(rows.dtype)) * rows.conj()).sum(-1).real.T


@dataclass(frozen=True)
class Directions:
    """At each frequency, in descending order of what they carry: ``energies`` [d/2, g], and how directions and heads are made of one another.

    Direction j is the sum over heads of ``down`` [d/2, g, g] (head, j) times kappa; a query reads it by ``up`` (head, j) of its own head.
    """

    energies: Tensor
    down: Tensor
    up: Tensor


def directions(moments: Tensor, energies: Tensor) -> Directions:
    """Those of keys with these ``moments`` [d/2, g, g], read by queries with these ``energies`` [d/2, H]."""
    frequencies, groups, _ = moments.shape
    weights = energies.reshape(frequencies, groups, -1).sum(-1).sqrt()
    largest = weights.amax(1, keepdim=True)
    weights = torch.where(largest > 0, weights.clamp_min(WEAKEST * largest), 1.0)
    values, basis = torch.linalg.eigh(weights[:, :, None] * moments * weights[:, None, :])
    basis = basis.flip(-1)
    return Directions(values.flip(-1).clamp_min(0), weights[:, :, None] * basis, basis / weights[:, :, None])


def allot(energies: Sequence[Tensor], pairs: int) -> Tensor:
    """How many directions to keep at each frequency, [d/2] int64, `pairs` in all, as many in each of the blocks with these ``energies`` [d/2, g].

    Those that carry the largest shares, summed over blocks: an MLA has the same frequencies in all of them.
    """
    shares = torch.stack([each / each.sum().clamp_min(torch.finfo(each.dtype).tiny) for each in energies]).sum(0)
    chosen = shares.flatten().argsort(descending=True, stable=True)[:pairs]
    return torch.bincount(chosen // shares.shape[1], minlength=shares.shape[0])


def evenly_spread(frequencies: int, pairs: int) -> Tensor:
    """One direction at every so many-th frequency, [d/2] int64, `pairs` in all: if frequencies are geometric, those kept are too."""
    counts = torch.zeros(frequencies, dtype=torch.int64)
    counts[:: frequencies // pairs] = 1
    return counts


def kept(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Frequency and number of each direction that is kept, both [pairs] int64, of so many at each frequency [d/2]."""
    places = [(frequency, number) for frequency, count in enumerate(counts.tolist()) for number in range(count)]
    frequency, number = torch.tensor(places, dtype=torch.int64, device=counts.device).T
    return frequency, number


def key_rows(weight: Tensor, heads: int, found: Directions, counts: Tensor) -> Tensor:
    """What makes the shared key, [2 pairs, in], of what makes keys, [n, in]; the two channels of a direction one after the other."""
    frequency, number = kept(counts)
    return interleaved(torch.einsum("pa,api->pi", found.down[frequency, :, number], turning(weight, heads)[:, frequency]))


def query_rows(weight: Tensor, heads: int, found: Directions, counts: Tensor) -> Tensor:
    """What makes queries for the shared key, [H, 2 pairs, in], of what makes queries, [H d, in]."""
    frequency, number = kept(counts)
    up = found.up[frequency, :, number].repeat_interleave(heads // found.up.shape[1], dim=1)  # [pairs, H]
    return interleaved(up.T[:, :, None] * turning(weight, heads)[:, frequency])


def value_moment(weight: Tensor, moment: Tensor) -> Tensor:
    """``E[v v^T]``, [n, n], of values that ``weight`` [n, in] makes of inputs with this second moment [in, in]."""
    return weight.double() @ moment.double() @ weight.double().T


def output_metric(weight: Tensor, groups: int, size: int) -> Tensor:
    """What an error of values costs after the output projection ``weight`` [out, H d], [n, n]: each head's own, of all that read it."""
    heads = weight.double().T.reshape(groups, -1, size, weight.shape[0])
    metric, each = heads.new_zeros(groups, size, groups, size), torch.arange(groups, device=heads.device)
    metric[each, :, each] = torch.einsum("ghdo,gheo->gde", heads, heads)
    return metric.reshape(groups * size, groups * size)


@dataclass(frozen=True)
class Latent:
    """``down`` [rank, n] and ``up`` [n, rank], of which ``up @ down`` stands for the identity; ``lost``, the share of the energy it leaves out."""

    down: Tensor
    up: Tensor
    lost: float


def value_latent(moment: Tensor, metric: Tensor, rank: int) -> Latent:
    """The projection of this rank that loses least of values with this second ``moment`` [n, n], errors counted by ``metric`` [n, n].

    With M the metric, ``up @ down`` is ``M^-1/2 U U^T M^1/2``, U the first eigenvectors of ``M^1/2 E[v v^T] M^1/2``. The mean square of the latent's
    entries is one.
    """
    room = ROOM * (float(metric.diagonal().mean()) or 1.0)
    squares, axes = torch.linalg.eigh(metric)
    roots = (squares.clamp_min(0) + room).sqrt()
    root = (axes * roots) @ axes.T
    energies, basis = torch.linalg.eigh(root @ moment @ root)
    energies, basis = energies.flip(0).clamp_min(0), basis.flip(1)[:, :rank]
    size = math.sqrt(float(energies[:rank].sum()) / rank) or 1.0
    lost = float(energies[rank:].sum() / energies.sum().clamp_min(torch.finfo(energies.dtype).tiny))
    return Latent(basis.T @ root / size, ((axes / roots) @ axes.T @ basis) * size, lost)


@dataclass(frozen=True)
class Widths:
    """``heads`` H, ``groups`` g and their ``size`` d; the width ``rope`` of the shared key, ``rank`` of the latent, and ``nope`` of the part of
    queries and keys that is not turned, all of it zeros."""

    heads: int
    groups: int
    size: int
    rope: int
    rank: int
    nope: int


def assemble(widths: Widths, query: Tensor, key: Tensor, value: Tensor, latent: Latent, epsilon: float) -> dict[str, Tensor]:
    """The weights of DeepSeek-V3's attention by local name, float64.

    ``query`` [H, rope, in] and ``key`` [rope, in] belong to the shared key; what makes values, ``value`` [n, in], is projected to ``latent`` and
    padded with zeros to the rank. The norm behind the latent, given ``s z``, divides by ``sqrt(s^2 mean(z^2) + epsilon)``: with ``s`` the root of
    `epsilon` by `GAIN`, and `GAIN` as its weight, it gives z again, up to ``mean(z^2) / (2 GAIN^2)`` of it. Scores are divided by the root of another
    width than before.
    """
    made, hidden = latent.down.shape[0], value.shape[1]
    scaled = query * math.sqrt((widths.nope + widths.rope) / widths.size)
    queries = torch.cat([scaled.new_zeros(widths.heads, widths.nope, hidden), scaled], 1)
    narrow = math.sqrt(epsilon) / GAIN * (latent.down @ value.double())
    padded = torch.cat([narrow, narrow.new_zeros(widths.rank - made, hidden)])
    of_groups = latent.up.reshape(widths.groups, widths.size, made)
    values = of_groups.repeat_interleave(widths.heads // widths.groups, dim=0)
    expanded = values.new_zeros(widths.heads, widths.nope + widths.size, widths.rank)
    expanded[:, widths.nope :, :made] = values
    return {
        "self_attn.q_proj": queries.flatten(0, 1),
        "self_attn.kv_a_proj_with_mqa": torch.cat([padded, key]),
        "self_attn.kv_a_layernorm": torch.full((widths.rank,), GAIN, dtype=torch.float64, device=key.device),
        "self_attn.kv_b_proj": expanded.flatten(0, 1),
    }
