"""Attention over latents, one query and one token at a time, and the best projection by the decomposition of all data."""

from __future__ import annotations

import torch
from torch import Tensor


def least_loss(states: Tensor, root: Tensor, rank: int) -> float:
    """The least mean squared error, times ``root`` [n, n], of ``states`` [tokens, n] through any projection of this rank."""
    singular = torch.linalg.svdvals(states.double() @ root.double().T)
    return float(singular[rank:].square().sum()) / len(states)


def turned(state: Tensor, position: int, theta: float) -> Tensor:
    """``state`` [d] rotated as Llama does at a position."""
    half = len(state) // 2
    result = state.clone()
    for pair in range(half):
        angle = torch.tensor(position * theta ** (-pair / half), dtype=torch.float64)
        one, other = state[pair], state[pair + half]
        result[pair] = one * angle.cos() - other * angle.sin()
        result[pair + half] = one * angle.sin() + other * angle.cos()
    return result


def attend(query: Tensor, keys: Tensor, values: Tensor, far: tuple[Tensor, Tensor], window: int, theta: float, scaling: float) -> Tensor:
    """[tokens, query heads, d] of ``query`` [query heads, tokens, d], ``keys`` and ``values`` [heads, tokens, d] before rotation, positions from 0.

    Tokens more than `window` before a query are as in ``far``, two matrices [n, n] that keys and values of all heads of a token go through.
    """
    heads, tokens, width = keys.shape
    result = torch.zeros(tokens, len(query), width, dtype=torch.float64)
    for head in range(len(query)):
        mine = head // (len(query) // heads)
        for place in range(tokens):
            asked = turned(query[head, place].double(), place, theta)
            scores, seen = [], []
            for token in range(place + 1):
                key, value = (each[:, token].double().flatten() for each in (keys, values))
                if place - token > window:
                    key, value = far[0].double() @ key, far[1].double() @ value
                part = slice(mine * width, (mine + 1) * width)
                scores.append(asked @ turned(key[part], token, theta) * scaling)
                seen.append(value[part])
            result[place, head] = torch.softmax(torch.stack(scores), 0) @ torch.stack(seen)
    return result


def step(query: Tensor, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], hidden: Tensor, scaling: float) -> Tensor:
    """[query heads, d] of one token's ``query`` [query heads, d]; ``old`` keys and values [tokens, n] as they are read back, all heads side by side,
    ``new`` ones [heads, tokens, d], all rotated; ``hidden`` [tokens] bool of both."""
    heads, _, width = new[0].shape
    result = torch.zeros(len(query), width, dtype=torch.float64)
    for head in range(len(query)):
        mine = head // (len(query) // heads)
        part = slice(mine * width, (mine + 1) * width)
        keys, values = ([*(token[part] for token in before), *after[mine]] for before, after in zip(old, new, strict=True))
        scores = [float(key.double() @ query[head].double()) * scaling for key in keys]
        largest = max(score for score, masked in zip(scores, hidden.tolist(), strict=True) if not masked)
        weights = [
            0.0 if masked else float(torch.tensor(score - largest).double().exp()) for score, masked in zip(scores, hidden.tolist(), strict=True)
        ]
        for weight, value in zip(weights, values, strict=True):
            result[head] += weight / sum(weights) * value.double()
    return result
