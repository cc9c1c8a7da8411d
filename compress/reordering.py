"""Having channels change places along an edge: where they are made and where they are read, so that a block computes the same.

That takes an edge whose channels one linear reads alone and others make: down projections, and attention outputs within each head (RIA, ICLR 2024,
section 3.3, without the orders that would have to be applied when the model runs).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.block import Block
from compress.layout import BlockLayout
from compress.numerics.pattern import Pattern
from compress.numerics.permutation import spread


@dataclass(frozen=True)
class Order:
    """``columns`` int64 [in] of the linear that reads; ``makers`` by name the order int64 [out] of the outputs of each linear that makes them."""

    columns: Tensor
    makers: Mapping[str, Tensor]


def better_order(block: Block, linear: str, scores: Tensor, pattern: Pattern) -> Order | None:
    """The order of a linear's inputs in which a pattern keeps more of its ``scores`` [out, in]; None if there is none or they cannot be moved."""
    names = {each.name for each in block.layout.linears}
    edge = next((edge for edge in block.layout.edges if edge.consumers == (linear,) and edge.producer in names), None)
    if edge is None:
        return None
    if not edge.heads:
        columns = spread(scores, pattern)
        # What is multiplied channel by channel moves together.
        order = Order(columns, dict.fromkeys(_beside(block.layout, edge.producer), columns))
    elif block.head_dim % pattern.m:
        return None
    else:
        rows, size, channels = len(scores), block.head_dim, block.tensor(f"{edge.producer}.weight").shape[0]
        # All query heads that read a head of values have to read it in one order.
        by_head = scores.view(rows, channels // size, -1, size).permute(1, 2, 0, 3).flatten(1, 2)
        within = torch.stack([spread(each, pattern) for each in by_head])
        columns = _of_heads(within.repeat_interleave(scores.shape[1] // channels, 0))
        order = Order(columns, {edge.producer: _of_heads(within)})
    return None if bool((order.columns.diff() == 1).all()) else order


def _beside(layout: BlockLayout, linear: str) -> list[str]:
    """The linears that read what ``linear`` reads, itself among them."""
    groups = (group for stage in layout.stages for group in stage.groups)
    return next([each.name for each in group.linears] for group in groups if linear in [each.name for each in group.linears])


def _of_heads(within: Tensor) -> Tensor:
    """The order of all channels [heads * size] from those within each head, [heads, size]."""
    heads, size = within.shape
    return (within + size * torch.arange(heads, device=within.device)[:, None]).flatten()
