"""A router whose probabilities pass through a matrix before the largest are taken (EEP's router map, arXiv 2407.00945 section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.layout import MAP


class MappedRouter(nn.Module):
    """In the place of a router of transformers that takes the `top_k` largest of a softmax over all experts, made to sum to one with `renormalise`.

    ``weight`` [before, hidden] has a row for each expert that there was, ``map`` [experts, before] float32 says how much of the probability of
    each goes to those that there are.
    """

    def __init__(self, weight: Tensor, map_: Tensor, top_k: int, *, renormalise: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer(MAP, map_)
        self.top_k, self.num_experts, self.renormalise = top_k, len(map_), renormalise

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As routers of transformers: logits [tokens, before], and for each token `top_k` weights and the numbers of the experts they are for."""
        logits = nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), self.weight)
        mapped = logits.softmax(-1, dtype=torch.float32) @ self.get_buffer(MAP).T
        weights, index = mapped.topk(self.top_k, dim=-1)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights.to(logits.dtype), index
