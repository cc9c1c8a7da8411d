"""What a KV cache holds, by plain transformers and loops over single numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


def e4m3_numbers() -> list[float]:
    """Every number of FP8 E4M3 that is not negative: 3 bits of fraction, 4 of exponent with a bias of 7, no infinity."""
    subnormal = [fraction / 8 * 2.0**-6 for fraction in range(8)]
    return subnormal + [(1 + fraction / 8) * 2.0 ** (exponent - 7) for exponent in range(1, 16) for fraction in range(8)][:-1]


def rounded(value: float, scale: float) -> float:
    """``value`` as a cache gives it back: the nearest number times ``scale``, of two equally near ones the even; beyond the largest, that."""
    numbers = e4m3_numbers()
    wanted = abs(value) / scale
    place = min(range(len(numbers)), key=lambda index: (abs(numbers[index] - wanted), index % 2))
    return numbers[place] * scale * (-1 if value < 0 else 1)


def read_back(states: Tensor, scale: Tensor) -> Tensor:
    """``states`` [rows, heads, tokens, size] with every number `rounded`; ``scale`` [1] or [heads, 1, 1]."""
    scales = scale.expand(states.shape).flatten().tolist()
    return torch.tensor([rounded(value, one) for value, one in zip(states.flatten().tolist(), scales, strict=True)]).view(states.shape)


class Recording(DynamicCache):
    """Keeps what it is given by layer, and gives back what `scales` of that layer (keys, values) would leave of it."""

    def __init__(self, scales: dict[int, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.scales = scales
        self.given: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.given[layer] = keys, values
        if layer in self.scales:
            keys, values = read_back(keys, self.scales[layer][0]), read_back(values, self.scales[layer][1])
        return super().update(keys, values, layer)


@torch.no_grad()
def given(model: Any, ids: Tensor, scales: dict[int, tuple[Tensor, Tensor]]) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]]]:
    """Logits of ``ids`` [rows, tokens] and, by layer, the keys and values that a cache is given, those of the layers in `scales` rounded."""
    cache = Recording(scales)
    logits = model(input_ids=ids, use_cache=True, past_key_values=cache).logits
    return logits, cache.given
