"""The routed experts of a block: what they are given and give, how tokens would be routed among fewer, and the tensors of those that stay.

Whatever a router does - softmax or sigmoid, a correction, groups - it is the module of transformers that does it, with the rows that are left, as
in the checkpoint that will be written. So a search judges exactly what it will ship.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.block import Block
from compress.expert_forward import gated_by, given_by
from compress.numerics.experts import Tally, aligned, average
from compress.probe import Probe

OUTPUT_BYTES = 64 << 20
"""What all experts give for all tokens of a sample, held at once."""


@dataclass(frozen=True)
class Routed:
    """What the experts of a block are called with: ``hidden`` [tokens, hidden], and for each token the experts ``index`` it goes to and their
    ``weights``, [tokens, active]."""

    hidden: Tensor
    index: Tensor
    weights: Tensor


def routed(probe: Probe) -> Iterator[Routed]:
    """By batch."""
    for batch in range(len(probe.hidden)):
        (call,) = probe.calls(probe.block.experts, [batch])
        yield Routed(*call.arguments)


def outputs(block: Block, expert: int, hidden: Tensor) -> Tensor:
    """What an expert gives, [tokens, hidden], unweighted."""
    return given_by(block.experts, expert, gated_by(block.experts, expert, hidden))


def tally(probe: Probe) -> Tally:
    """What is to be known of each expert of a block, exactly, over all data."""
    block = probe.block
    found: Tally | None = None
    for given in routed(probe):
        found = found or Tally(len(block.layout.experts), given.hidden.shape[1], given.hidden.device)
        found.add_routes(given.index)
        for expert in block.layout.experts:
            token, place = torch.where(given.index == expert)
            found.add(expert, given.weights[token, place], outputs(block, expert, given.hidden[token]))
    assert found
    return found


@contextmanager
def restricted(block: Block, kept: Tensor | None = None, active: int | None = None, routes: Tensor | None = None) -> Iterator[None]:
    """While inside, tokens are routed as in a checkpoint with only the experts ``kept`` [n] int64, ascending, of which `active` serve a token.

    Experts keep their numbers. With ``routes`` [n, experts], routers have these maps, and all rows.
    """
    if routes is not None:
        assert kept is not None
        with block.mapped_router(routes, active) as mapped:
            mapped.register_forward_hook(lambda _, __, found: (*found[:2], kept[found[2]]))
            yield
        return
    router = block.router
    before = router.num_experts, router.top_k
    parameters, buffers = dict(router._parameters), dict(router._buffers)
    handle = None
    if active is not None:
        router.top_k = active
    if kept is not None:
        router.num_experts = len(kept)
        router._parameters |= {name: nn.Parameter(tensor[kept], requires_grad=False) for name, tensor in parameters.items() if tensor is not None}
        router._buffers |= {name: tensor[kept] for name, tensor in buffers.items() if tensor is not None}
        handle = router.register_forward_hook(lambda _, __, found: (*found[:2], kept[found[2]]))
    try:
        yield
    finally:
        if handle:
            handle.remove()
        router._parameters |= parameters
        router._buffers |= buffers
        router.num_experts, router.top_k = before


class Reconstruction:
    """How far what a block's experts give together is from what it was, when there are fewer (NAEE, arXiv 2402.14800 section 3.1).

    What every expert gives for a sample of the tokens is worked out once; a choice of experts is then only another sum.
    """

    def __init__(self, probe: Probe, active: int | None) -> None:
        block, every = probe.block, list(routed(probe))
        hidden, index, weights = (torch.cat(each) for each in zip(*((one.hidden, one.index, one.weights) for one in every), strict=True))
        count = len(block.layout.experts)
        room = max(1, OUTPUT_BYTES // (count * hidden.shape[1] * hidden.element_size()))
        chosen = torch.arange(0, len(hidden), -(-len(hidden) // room), device=hidden.device)
        self._block, self._active, self._hidden = block, active, hidden[chosen]
        self._outputs = torch.stack([outputs(block, expert, self._hidden) for expert in block.layout.experts], 1)
        self._whole = self._sum(index[chosen], weights[chosen])

    def error(self, kept: Tensor) -> float:
        """The Frobenius norm of the difference with the experts ``kept`` [n] int64 alone."""
        with restricted(self._block, kept.to(self._hidden.device), self._active):
            _, weights, index = self._block.router(self._hidden)
        return float((self._sum(index, weights) - self._whole).norm())

    def _sum(self, index: Tensor, weights: Tensor) -> Tensor:
        picked = self._outputs.gather(1, index[..., None].expand(-1, -1, self._outputs.shape[2]))
        return torch.einsum("tk,tkh->th", weights.to(picked.dtype), picked)


def logits(probe: Probe) -> Tensor:
    """Second moments [experts, experts] float64 of what the router says of each expert, over all data."""
    total = torch.zeros((), dtype=torch.float64)
    for given in routed(probe):
        said = probe.block.router(given.hidden)[0].double()
        total = total + said.T @ said
    return total


def merged(block: Block, members: Sequence[int], shares: Tensor, first: int, *, align: bool) -> dict[str, Tensor]:
    """The tensors of expert `first`, by name, once it is the average by ``shares`` [experts] of all `members`, itself among them.

    With `align`, neurons of the others are first put in the order in which they are most like its own.
    """
    place, names = block.layout.prefix, block.expert_tensors(first)
    if [member for member in members if shares[member]] == [first]:
        return {}
    weights = {member: {local: block.tensor(f"{place}.{name}") for local, name in block.expert_tensors(member).items()} for member in members}
    if align:
        for member in members:
            if member != first:
                weights[member] |= _aligned(weights[member], weights[first])
    given = torch.stack([shares[member] for member in members])
    return {f"{place}.{name}": average([weights[member][local] for member in members], given) for local, name in names.items()}


def mixed(block: Block, kept: Sequence[int], mix: Tensor) -> dict[str, Tensor]:
    """The tensors of the experts ``kept``, by name, once they are sums of all by ``mix`` [kept, experts]; those that are themselves left out."""
    place, found = block.layout.prefix, {}
    for expert, shares in zip(kept, mix, strict=True):
        if shares[expert] == 1 and shares.count_nonzero() == 1:
            continue
        for what, name in block.expert_tensors(expert).items():
            parts = [block.tensor(f"{place}.{block.expert_tensors(other)[what]}") * share for other, share in enumerate(shares.tolist()) if share]
            found[f"{place}.{name}"] = torch.stack(parts).sum(0)
    return found


def _aligned(tensors: dict[str, Tensor], to: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gate, up and down, and biases of the first two, in the order of the neurons of another expert."""
    wanted = ("gate.weight", "up.weight", "down.weight")
    gate, up, down = wanted
    order = aligned((tensors[gate], tensors[up], tensors[down]), (to[gate], to[up], to[down]))
    found = {gate: tensors[gate][order], up: tensors[up][order], down: tensors[down][:, order]}
    return found | {name: tensors[name][order] for name in ("gate.bias", "up.bias") if name in tensors}
