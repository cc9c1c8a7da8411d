"""Routing and experts the slow, obvious way: every expert is given every token, and weights say what counts."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import torch
from torch import Tensor


def gates(module: Any, hidden: Tensor, kept: list[int] | None = None) -> Tensor:
    """Weights [tokens, experts] by which the outputs of all experts of a sparse MLP of transformers are summed up, for softmax routers; experts
    that are not `kept` have logits of minus infinity."""
    logits = hidden @ module.gate.weight.T
    if kept is not None:
        logits[:, [expert for expert in range(logits.shape[1]) if expert not in kept]] = -torch.inf
    probabilities = logits.softmax(-1)
    chosen = probabilities.topk(module.gate.top_k, dim=-1)
    weights = torch.zeros_like(probabilities).scatter_(1, chosen.indices, chosen.values)
    return weights / weights.sum(-1, keepdim=True) if getattr(module.gate, "norm_topk_prob", True) else weights


def outputs(module: Any, hidden: Tensor) -> Tensor:
    """[tokens, experts, hidden]."""
    found = []
    for gate_up, down in zip(module.experts.gate_up_proj, module.experts.down_proj, strict=True):
        gate, up = (hidden @ gate_up.T).chunk(2, -1)
        found.append((torch.nn.functional.silu(gate) * up) @ down.T)
    return torch.stack(found, 1)


def score(weights: Tensor, given: Tensor, *, mean: bool, alpha: int, beta: int) -> list[float]:
    """Of each expert, from ``weights`` [tokens, experts] and what all of them gave."""
    found = []
    for expert in range(weights.shape[1]):
        terms = [
            float(weights[token, expert]) ** alpha * float(given[token, expert].norm()) ** beta
            for token in range(len(weights))
            if weights[token, expert] > 0
        ]
        found.append(sum(terms) / max(1, len(terms)) if mean else sum(terms))
    return found


def best_subset(module: Any, hidden: Tensor, count: int) -> tuple[list[int], float]:
    """The experts that together come nearest to what all of them give, by trying all."""
    given = outputs(module, hidden)
    whole = torch.einsum("te,teh->th", gates(module, hidden), given)
    errors = {
        kept: float((torch.einsum("te,teh->th", gates(module, hidden, list(kept)), given) - whole).norm())
        for kept in combinations(range(given.shape[1]), count)
    }
    kept = min(errors, key=lambda each: errors[each])
    return list(kept), errors[kept]
