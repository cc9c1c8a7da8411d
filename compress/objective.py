"""What other weights in place of an edge's readers would do to what these feed: the objective of a search for scales.

Where several linears read the channels, their submodule (attention, an MLP) is run again; where one does, its own output is judged. The
weight of each token is given, so that some can be left out and some count for more than others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, Protocol

import torch
from torch import Tensor

from compress.layout import Edge
from compress.probe import Probe

Inputs = Mapping[str, Callable[[Tensor], Tensor]]
"""By name of a linear, what becomes of what it is given."""
UNCHANGED: Inputs = MappingProxyType({})


class Loss(Protocol):
    """From weights [out, in] in place of those some linears have, and what becomes of inputs, to an error, as a share of what was given."""

    def __call__(self, weights: dict[str, Tensor], inputs: Inputs = UNCHANGED) -> float: ...


Error = Literal["mse", "mae"]
"""What is summed up over elements: squares or magnitudes."""


def losses(probe: Probe, edges: list[Edge], counted: list[Tensor], error: Error = "mse") -> dict[str, Loss]:
    """The loss of each of some edges of one kind, by name. ``counted`` by batch [rows, tokens], the weight of each token; 0 leaves it out."""
    batches = [batch for batch, weight in enumerate(counted) if weight.any()]
    if edges[0].expert is None:
        return {edge.name: _loss_of_module(probe, edge, batches, counted, error) for edge in edges}
    given: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for batch in batches:
        weight = counted[batch].flatten()

        def keep(expert: int, token: Tensor, inputs: Tensor, weight: Tensor = weight) -> None:
            given.setdefault(expert, []).append((weight[token], inputs))

        probe.last_inputs_of_experts(batch, keep)
    return {edge.name: _loss_of_rows(probe, edge, given[edge.expert], error) for edge in edges if edge.expert is not None}


def _loss_of_module(probe: Probe, edge: Edge, batches: list[int], counted: list[Tensor], error: Error) -> Loss:
    first = edge.consumers[0]
    module = probe.block.submodule(first) if len(edge.consumers) == 1 else probe.block.surrounding(first)
    calls = probe.calls(module, batches)
    before = [call.repeat(module) for call in calls]
    energy = sum(_total(each, counted[call.batch], error) for call, each in zip(calls, before, strict=True))

    def loss(weights: dict[str, Tensor], inputs: Inputs = UNCHANGED) -> float:
        with probe.block.trying(weights, inputs):
            lost = sum(_total(call.repeat(module) - each, counted[call.batch], error) for call, each in zip(calls, before, strict=True))
        return lost / (energy or 1.0)

    return loss


def _loss_of_rows(probe: Probe, edge: Edge, given: list[tuple[Tensor, Tensor]], error: Error) -> Loss:
    """With ``given`` (weights [n], inputs [n, in]) of the linear that ends an expert, whose inputs are never rounded."""
    name = edge.consumers[0]
    weight, rows = (torch.cat([each[part] for each in given]) for part in (0, 1))
    weight, rows = weight[weight > 0], rows[weight > 0].float()
    before = probe.block.weight(name)
    energy = _total(rows @ before.T, weight, error)

    def loss(weights: dict[str, Tensor], inputs: Inputs = UNCHANGED) -> float:
        return _total(rows @ (weights[name] - before).T, weight, error) / (energy or 1.0) if name in weights else 0.0

    return loss


def _total(values: Tensor, weight: Tensor, error: Error) -> float:
    """Weighted sum of the errors ``values`` [..., out], whose tokens some modules count in one row and others beside a dimension of one."""
    each = values.float().square() if error == "mse" else values.float().abs()
    return float((each.sum(-1, dtype=torch.float64).view(weight.shape) * weight).sum())
