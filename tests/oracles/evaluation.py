"""Perplexity as a plain loop over windows and tokens, with a model that transformers opened."""

from __future__ import annotations

import math
from typing import Any

import torch


@torch.no_grad()
def perplexity(model: Any, ids: list[int], context: int, limit: int) -> float:
    """exp of the mean negative log-likelihood of all tokens but the first of each full window."""
    total, count = 0.0, 0
    for window in range(min(limit, len(ids) // context)):
        tokens = ids[window * context : (window + 1) * context]
        logits = model(input_ids=torch.tensor([tokens])).logits[0].double()
        for position in range(1, context):
            total -= float(torch.log_softmax(logits[position - 1], -1)[tokens[position]])
            count += 1
    return math.exp(total / count)
