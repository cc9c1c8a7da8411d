"""How far one language model is from another, one position of one sequence at a time."""

from __future__ import annotations

from typing import Any

import torch

from compress.data import Samples


@torch.no_grad()
def between(meant: Any, given: Any, samples: Samples) -> float:
    """Mean Kullback-Leibler divergence from ``meant`` to ``given``, plain transformers models, before each scored token but the first, nats."""
    found = []
    for item in samples.items:
        one, other = (
            torch.log_softmax(model(input_ids=item.ids[None], **item.extra, use_cache=False).logits[0].double(), -1) for model in (meant, given)
        )
        found += [float((one[place].exp() * (one[place] - other[place])).sum()) for place in range(len(item.ids) - 1) if item.scored[place + 1]]
    return sum(found) / len(found)
