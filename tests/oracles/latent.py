"""What attention to a latent of low rank has to compute: a plain Llama whose keys and values were projected, by sums over tokens and loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from oracles import statistics

Array = NDArray[Any]


def turned(head: Array, frequencies: Array, position: int) -> Array:
    """One ``head`` [d] after rotary embedding at a position, one pair of channels at a time."""
    half = len(head) // 2
    out = np.zeros_like(head)
    for f in range(half):
        cos, sin = np.cos(frequencies[f] * position), np.sin(frequencies[f] * position)
        out[f] = head[f] * cos - head[f + half] * sin
        out[f + half] = head[f + half] * cos + head[f] * sin
    return out


def spectra(keys: Array, queries: Array) -> tuple[Array, Array, Array]:
    """Energies [d/2, g], directions [d/2, g, g] and weights of heads [d/2, g] of ``keys`` [tokens, g, d] that ``queries`` [tokens, H, d] read."""
    tokens, groups, size = keys.shape
    half, per = size // 2, queries.shape[1] // groups
    energies, basis, weights = np.zeros((half, groups)), np.zeros((half, groups, groups), complex), np.zeros((half, groups))
    for f in range(half):
        for head in range(queries.shape[1]):
            weights[f, head // per] += np.mean(queries[:, head, f] ** 2 + queries[:, head, f + half] ** 2)
        weights[f] = np.sqrt(weights[f])
        total = np.zeros((groups, groups), complex)
        for token in range(tokens):
            kappa = weights[f] * (keys[token, :, f] + 1j * keys[token, :, f + half])
            total += np.outer(kappa.conj(), kappa) / tokens
        values, vectors = np.linalg.eigh(total)
        energies[f], basis[f] = values[::-1], vectors[:, ::-1]
    return energies, basis, weights


def most(energies: Sequence[Array], pairs: int) -> list[int]:
    """How many directions each frequency is left with when all blocks keep as many, by one choice after the other."""
    half, groups = energies[0].shape
    counts = [0] * half
    for _ in range(pairs):
        worth = {f: sum(each[f, counts[f]] / each.sum() for each in energies) for f in range(half) if counts[f] < groups}
        counts[max(worth, key=lambda f: worth[f])] += 1
    return counts


def key_projection(basis: Array, weights: Array, counts: Sequence[int]) -> Array:
    """What is left of keys, [g x d, g x d]: of each frequency the first directions alone."""
    half, groups = weights.shape
    size, out = 2 * half, np.zeros((groups * 2 * half, groups * 2 * half))
    for f in range(half):
        first = basis[f][:, : counts[f]]
        kept = np.diag(1 / weights[f]) @ first.conj() @ first.T @ np.diag(weights[f])
        for a in range(groups):
            for b in range(groups):
                there, here = (a * size + f, a * size + f + half), (b * size + f, b * size + f + half)
                out[there[0], here[0]] = out[there[1], here[1]] = kept[a, b].real
                out[there[0], here[1]], out[there[1], here[0]] = -kept[a, b].imag, kept[a, b].imag
    return out


def value_projection(values: Array, output: Array, groups: int, rank: int) -> Array:
    """What is left of ``values`` [tokens, n] with the least error after ``output`` [out, H x d]: by a Cholesky factor rather than a root."""
    size = values.shape[1] // groups
    per = output.shape[1] // size // groups
    metric = np.zeros((values.shape[1], values.shape[1]))
    for head in range(groups * per):
        block, place = output[:, head * size : (head + 1) * size], slice(head // per * size, (head // per + 1) * size)
        metric[place, place] += block.T @ block
    factor = np.linalg.cholesky(metric)
    _, _, directions = np.linalg.svd(values @ factor, full_matrices=False)
    first = directions[:rank].T
    return np.asarray(np.linalg.inv(factor.T) @ first @ first.T @ factor.T)


@torch.no_grad()
def project(model: Any, batches: list[dict[str, torch.Tensor]], rope: int, rank: int, counts: Sequence[int] | None = None) -> None:
    """Replace what makes keys and values of a plain Llama, in place, by what an MLA of these widths has to make of them.

    `counts` says how many directions each frequency keeps, if not those that carry most.
    """
    config = model.config
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    seen = statistics.inputs_of_linears(model, batches)
    found = []
    for index, layer in enumerate(model.model.layers):
        rows = torch.cat([each.reshape(-1, each.shape[-1]) for each in seen[f"model.layers.{index}.self_attn.q_proj"]]).double().numpy()
        weight = {name: getattr(layer.self_attn, f"{name}_proj").weight.double().numpy() for name in "qkvo"}
        keys, queries = (rows @ weight["k"].T).reshape(-1, groups, size), (rows @ weight["q"].T).reshape(-1, heads, size)
        found.append((layer, weight, rows, spectra(keys, queries)))
    counts = counts or most([energies for *_, (energies, _, _) in found], rope // 2)
    for layer, weight, rows, (_, basis, weights) in found:
        keys = key_projection(basis, weights, counts) @ weight["k"]
        values = value_projection(rows @ weight["v"].T, weight["o"], groups, rank) @ weight["v"]
        layer.self_attn.k_proj.weight.copy_(torch.from_numpy(keys))
        layer.self_attn.v_proj.weight.copy_(torch.from_numpy(values))
