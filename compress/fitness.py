"""How good a mixture of experts is with some of them, worked out with the whole model in memory.

Nothing is written: routers choose among the rows that are left, and experts that are mixtures take the places of those that stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.backsweep import LOGITS_AT_ONCE, summed_loss
from compress.block import Block
from compress.data import Batch, Samples
from compress.evolution import Individual
from compress.experts import restricted
from compress.whole import Whole, scored

Measure = Callable[["Mixture", Samples], float]


class Mixture:
    """The model ``whole`` as an individual would make it; ``groups`` are the numbers of blocks by gene, `active` how many experts serve a token, and
    `mapped` says whether routers keep all their rows and have maps."""

    def __init__(self, whole: Whole, groups: Sequence[Sequence[int]], active: int | None, *, mapped: bool = False) -> None:
        self.whole, self._groups, self._active, self._mapped = whole, groups, active, mapped
        self._exact = {index: _stacks(whole.blocks[index]) for group in groups for index in group}
        self._held: dict[int, object] = {}
        self._given: dict[int, list[tuple[Batch, Tensor, list[dict[str, Any]]]]] = {}

    @torch.no_grad()
    def fitness(self, individual: Individual | None, samples: Samples, measure: Measure) -> float:
        """What `measure` says of it; of the model as it is for None. The higher, the better."""
        with ExitStack() as stack:
            for gene, group in zip(individual or (), self._groups if individual else (), strict=True):
                for index in group:
                    block = self.whole.blocks[index]
                    self._hold(block, gene.kept, gene.mix)
                    device = block.router.weight.device
                    routes = torch.tensor(gene.routes or gene.themselves(len(block.layout.experts)), device=device) if self._mapped else None
                    stack.enter_context(restricted(block, torch.tensor(gene.kept, device=device), self._active, routes))
            if individual is None:
                for group in self._groups:
                    for index in group:
                        self._hold(self.whole.blocks[index], (), None)
            return measure(self, samples)

    def outputs(self, samples: Samples) -> list[tuple[Batch, Tensor]]:
        """Batches, and what the last block gives for each, [rows, tokens, hidden]."""
        if id(samples) not in self._given:
            self._given[id(samples)] = [(batch, *self.whole.embed(batch)) for batch in samples.batches()]
        return [(batch, self.whole.forward(hidden, kwargs)) for batch, hidden, kwargs in self._given[id(samples)]]

    def _hold(self, block: Block, kept: tuple[int, ...], mix: tuple[tuple[float, ...], ...] | None) -> None:
        """Have the experts of a block be as they were but for those ``kept``, which are the mixtures ``mix`` [kept, experts] of all."""
        index, wanted = block.layout.index, (kept, mix) if mix else None
        if self._held.get(index) == wanted:
            return
        for parameter, exact in self._exact[index]:
            parameter.copy_(exact)
            if mix:
                shares = torch.tensor(mix, dtype=exact.dtype, device=exact.device)
                parameter[list(kept)] = (shares @ exact.flatten(1)).view(len(kept), *exact.shape[1:])
        self._held[index] = wanted


def _stacks(block: Block) -> list[tuple[nn.Parameter, Tensor]]:
    """What has one entry for each expert, and a copy of it."""
    return [(parameter, parameter.detach().clone()) for parameter in block.experts.parameters()]


def likelihood(mixture: Mixture, samples: Samples) -> float:
    """Minus the mean cross-entropy of the next token, nats."""
    return -sum(summed_loss(mixture.whole.model, batch, hidden) for batch, hidden in mixture.outputs(samples)) / scored(samples)


def margin(mixture: Mixture, samples: Samples) -> float:
    """Of pairs, a good sentence before a bad one: the mean of the log of the probability that the good one is meant, by its likelihood, nats."""
    return float(nn.functional.logsigmoid(_margins(mixture, samples)).mean())


def accuracy(mixture: Mixture, samples: Samples) -> float:
    """Of pairs, a good sentence before a bad one: the share in which the good one is likelier."""
    return float((_margins(mixture, samples) > 0).double().mean())


def _margins(mixture: Mixture, samples: Samples) -> Tensor:
    """[pairs] float64: by how much the log-likelihood of the good sentence is above that of the bad one."""
    found = torch.zeros(len(samples.items), dtype=torch.float64)
    for batch, hidden in mixture.outputs(samples):
        labels = batch.inputs["input_ids"].to(hidden.device)[:, 1:]
        for rows in torch.split(torch.arange(len(labels)), max(1, LOGITS_AT_ONCE // labels.shape[1])):
            said = mixture.whole.model.logits(hidden[rows, :-1]).log_softmax(-1)
            picked = said.gather(2, labels[rows][..., None])[..., 0].double() * batch.scored[rows, 1:].to(hidden.device)
            found[[batch.members[row] for row in rows.tolist()]] = picked.sum(1).cpu()
    return found[::2] - found[1::2]


@dataclass(frozen=True)
class Kind:
    """A way to measure, and how near to the best a parent must be, when genes change and when they are crossed."""

    measure: Measure
    near: tuple[float, float]


KINDS = {"likelihood": Kind(likelihood, (0.03, 0.01)), "margin": Kind(margin, (0.03, 0.01)), "accuracy": Kind(accuracy, (0.03, 0.01))}
"""The paper's, in shares of what is right; the same number of nats where it is a likelihood."""
