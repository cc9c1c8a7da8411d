"""The forward of experts as transformers v5 takes one from outside, which can be listened to, changed on the way, and ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

WIDTHS = "widths"
"""What the module of experts that differ in width has beside its parameters: the width of each."""
Recorder = Callable[[int, Tensor, Tensor], None]
Change = tuple[Tensor, Tensor | None]
"""What inputs [..., columns] are multiplied by, and what is added then, each [columns]."""


class Reached(Exception):
    """Raised inside a block's forward once everything asked for has been measured; the rest need not be computed."""


@dataclass
class Experts3D:
    """Listens to the experts of one block: ``record(expert, token [n], inputs [n, in])`` before and after the gated product.

    ``token`` counts through the rows of a batch one after the other. What comes after what it hears is computed only if it is not where it `ends`.
    """

    before: Recorder | None = None
    after: Recorder | None = None
    ends: bool = True


def experts_forward(self: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts of transformers v5, one after the other, telling `self.listener` what each is given.

    `self.factors`, by expert, are what the last linear of each is to have its inputs multiplied by, and what is then to be added; `self.watcher`
    is told what these inputs are, and nothing ends.

    ``hidden`` [tokens, hidden]; ``top_k_index`` and ``top_k_weights`` [tokens, k]. Same operations in the same order as the eager
    implementation.
    """
    listener: Experts3D | None = getattr(self, "listener", None)
    factors: dict[int, Change] | None = getattr(self, "factors", None)
    watcher: Callable[[int, Tensor], None] | None = getattr(self, "watcher", None)
    result = torch.zeros_like(hidden)
    for expert in range(self.gate_up_proj.shape[0]):
        token, place = torch.where(top_k_index == expert)
        inputs = hidden[token]
        if listener and listener.before:
            listener.before(expert, token, inputs)
            if listener.ends:
                continue
        gated = gated_by(self, expert, inputs)
        if watcher:
            watcher(expert, gated)
        if factors and expert in factors:
            factor, shift = factors[expert]
            gated = gated * factor if shift is None else gated * factor + shift
        if listener and listener.after:
            listener.after(expert, token, gated)
            if listener.ends:
                continue
        output = given_by(self, expert, gated) * top_k_weights[token, place, None]
        result.index_add_(0, token, output.to(result.dtype))
    if listener and listener.ends:
        raise Reached
    return result


def gated_by(experts: Any, expert: int, inputs: Tensor) -> Tensor:
    """What the last linear of an expert is given, [tokens, width], when the expert is given ``inputs`` [tokens, hidden]."""
    gated: Tensor = experts._apply_gate(_product(experts, "gate_up_proj", expert, inputs))
    widths: list[int] | None = getattr(experts, WIDTHS, None)
    return gated if widths is None else gated[:, : widths[expert]]


def given_by(experts: Any, expert: int, gated: Tensor) -> Tensor:
    """What an expert gives, [tokens, hidden], when its last linear is given ``gated`` [tokens, width]."""
    return _product(experts, "down_proj", expert, gated)


def _product(experts: Any, name: str, expert: int, inputs: Tensor) -> Tensor:
    weight = getattr(experts, name)[expert]
    width = inputs.shape[-1]  # what is behind the width of an expert is zero
    outputs = inputs @ weight[:width] if experts.is_transposed else nn.functional.linear(inputs, weight[:, :width])
    return outputs + getattr(experts, f"{name}_bias")[expert] if experts.has_bias else outputs
