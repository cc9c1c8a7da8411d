"""The whole model in memory, to be trained through: for what can only be learned from what comes out at the end.

Weights stay in the dtype they are computed with; what is kept for the way back is a block's inputs where everything would be too much.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compress.backsweep import LOGITS_AT_ONCE
from compress.block import Block
from compress.checkpoint import entry, read_header, read_tensor
from compress.data import Batch, Samples
from compress.model import Model
from compress.state import write_state

KEPT_BYTES = 2 << 30
"""Activations kept for the way back; where a step has more, blocks are computed again."""


WARM = 0.1
"""Share of a training in which the learning rate rises."""


class Whole:
    """All blocks of ``model`` at once; to be made by `opened`."""

    def __init__(self, model: Model, blocks: list[Block]) -> None:
        self.model, self.blocks = model, blocks

    def embed(self, batch: Batch) -> tuple[Tensor, list[dict[str, Any]]]:
        """What the first block is given, [rows, tokens, hidden], and the keyword arguments of each."""
        with torch.no_grad():
            return self.model.embed(batch.inputs)

    def forward(self, hidden: Tensor, kwargs: Sequence[dict[str, Any]], weights: Sequence[dict[str, Tensor]] | None = None) -> Tensor:
        """What the last block gives for ``hidden`` [rows, tokens, hidden], with ``weights`` [out, in] of some linears, by block and name."""
        again = torch.is_grad_enabled() and self._activations(hidden) > KEPT_BYTES
        for index, block in enumerate(self.blocks):
            with_ = weights[index] if weights else {}
            if again:
                hidden = checkpoint(block.forward_with, with_, hidden, kwargs[index], use_reentrant=False)
            else:
                hidden = block.forward_with(with_, hidden, kwargs[index])
        return hidden

    def _activations(self, hidden: Tensor) -> int:
        """Bytes that are about to be kept: what every linear is given and gives, twice over for what lies between."""
        widths = sum(linear.rows + linear.columns for block in self.blocks for linear in block.layout.linears if linear.name not in self._experts)
        return 2 * hidden[..., 0].numel() * widths * hidden.element_size()

    @property
    def _experts(self) -> frozenset[str]:
        return self.model.layout.of_experts


@contextmanager
def opened(model: Model) -> Iterator[Whole]:
    """All blocks of `model` in memory."""
    with ExitStack() as stack:
        yield Whole(model, [stack.enter_context(model.block(layout.index)) for layout in model.blocks])


def draw(samples: Samples, count: int, seed: int, step: int) -> Samples:
    """What a step learns from: `count` samples, in an order that `seed` gives, every one once before any comes again."""
    count = min(count, len(samples.items))
    per_round = len(samples.items) // count
    order = list(range(len(samples.items)))
    random.Random(f"{seed}-{step // per_round}").shuffle(order)
    return Samples(samples.source, tuple(samples.items[index] for index in order[step % per_round * count :][:count]))


@dataclass(frozen=True)
class Distillation:
    """What a step is to come nearer to: the text itself and, `divergence` times as much, what ``teacher`` says of it."""

    student: Model
    teacher: Model
    divergence: float

    def learn(self, batch: Batch, given: Tensor, wanted: Tensor, tokens: int) -> tuple[float, float]:
        """Add to the gradients behind ``given`` those of the loss, and return the sums of cross-entropy and KL divergence, nats.

        ``given`` and ``wanted`` are what the last blocks of student and teacher give, [rows, tokens, hidden]; the loss is a mean over so many
        `tokens`. Logits are held for some positions at a time.
        """
        labels = batch.inputs["input_ids"].to(given.device)
        leaf, gradient = given.detach(), torch.zeros_like(given)
        sums = [0.0, 0.0]
        for part in torch.split(torch.nonzero(batch.scored[:, 1:].to(given.device)), LOGITS_AT_ONCE):
            row, place = part.unbind(1)
            states = leaf[row, place].requires_grad_()
            with torch.no_grad():
                meant = self.teacher.logits(wanted[row, place]).log_softmax(-1)
            with torch.enable_grad():
                said = self.student.logits(states).log_softmax(-1)
                entropy = nn.functional.nll_loss(said, labels[row, place + 1], reduction="sum")
                apart = nn.functional.kl_div(said, meant, reduction="sum", log_target=True)
                (found,) = torch.autograd.grad((entropy + self.divergence * apart) / tokens, states)
            gradient[row, place] = found.to(gradient.dtype)
            sums = [sums[0] + float(entropy.detach()), sums[1] + float(apart.detach())]
        torch.autograd.backward(given, gradient)
        return sums[0], sums[1]


def scored(samples: Samples) -> int:
    """Tokens whose prediction counts."""
    return sum(int(batch.scored[:, 1:].sum()) for batch in samples.batches())


def rate(done: float) -> float:
    """The share of the learning rate once so much of the training is done, 0 to 1: up in the first tenth, then down along a cosine to a hundredth."""
    if done < WARM:
        return max(0.01, done / WARM)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (done - WARM) / (1 - WARM)))


class Training:
    """Parameters and their optimisers, which a killed run finds again in the file `path`."""

    def __init__(self, path: Path, parameters: Mapping[str, Tensor], optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._path, self._parameters, self._optimizers = path, parameters, optimizers
        self.step = 0
        self.seconds = 0.0
        """What earlier runs have spent, as told to `save`."""
        self._rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        if path.exists():
            self._restore()

    def advance(self, share: float) -> None:
        """A step of every optimiser at so much of its learning rate; gradients are forgotten."""
        for optimizer, rates in zip(self._optimizers, self._rates, strict=True):
            for group, full in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = full * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1

    @torch.no_grad()
    def floor(self, lowest: float) -> None:
        """Let no parameter of the first optimiser be lower."""
        for group in self._optimizers[0].param_groups:
            for parameter in group["params"]:
                parameter.clamp_(min=lowest)

    def save(self, seconds: float = 0.0) -> None:
        """Durably, with how many seconds it took so far."""
        tensors = {f"parameter.{name}": tensor.detach() for name, tensor in self._parameters.items()}
        for name, state in self._states():
            tensors |= {f"state.{name}.{key}": value for key, value in state.items()}
        write_state(self._path, [entry(name, tensor) for name, tensor in tensors.items()], {"step": str(self.step), "seconds": repr(seconds)})

    def _restore(self) -> None:
        infos, metadata = read_header(self._path)
        self.step, self.seconds = int(metadata["step"]), float(metadata["seconds"])
        with torch.no_grad():
            for name, tensor in self._parameters.items():
                tensor.copy_(read_tensor(infos[f"parameter.{name}"]))
        by_tensor = {id(tensor): name for name, tensor in self._parameters.items()}
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for tensor in group["params"]:
                    prefix = f"state.{by_tensor[id(tensor)]}."
                    kept = {name.removeprefix(prefix): read_tensor(info) for name, info in infos.items() if name.startswith(prefix)}
                    optimizer.state[tensor] = {key: value if key == "step" else value.to(tensor.device) for key, value in kept.items()}

    def _states(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        by_tensor = {id(tensor): name for name, tensor in self._parameters.items()}
        for optimizer in self._optimizers:
            for tensor, state in optimizer.state.items():
                yield by_tensor[id(tensor)], state
