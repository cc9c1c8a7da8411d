"""What rounding some linears would cost the model: the scores that bits are allotted by.

Each is on the scale of the loss, nats per token, so that scores of different units add up to a prediction. Errors of weights or outputs
alone, which are not, led to allocations worse than uniform bits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.backsweep import backsweep
from compress.block import Block
from compress.data import Samples
from compress.errors import InputError
from compress.layout import Linear
from compress.model import Model
from compress.state import write_state_text

LOGITS_AT_ONCE = 1024
"""Positions whose logits are held at once."""
STREAMS_BYTES = 1 << 30
"""Activations of variants that run side by side; more of them than fit take several turns over the model."""

Rounder = Callable[[Block, Linear, int], Tensor]
"""A linear's weight [out, in] float32 as so many bits would leave it."""
Variant = Mapping[str, int]
"""A model some of whose linears, by name, are rounded to so many bits."""
Choice = tuple[int, ...]
"""Bits of each unit."""


class Measurements:
    """What has been measured of a model whose `units`, linears by name, may each be rounded to one of `options`.

    It is kept in `folder`, so that a killed run measures nothing twice; `advance` is told how many measurements of those asked for are done.
    Raises `InputError` if the model overflows.
    """

    def __init__(
        self,
        model: Model,
        samples: Samples,
        units: Sequence[Sequence[str]],
        options: Sequence[int],
        rounded: Rounder,
        folder: Path,
        advance: Callable[[int, int], None],
    ) -> None:
        self._model, self._samples, self._units, self._options, self._rounded = model, samples, units, options, rounded
        self._folder, self._advance = folder, advance
        self._path = folder / "measured.json"
        self._known: dict[str, list[float]] = json.loads(self._path.read_text()) if self._path.exists() else {}

    def divergences(self, choices: Mapping[str, Choice]) -> dict[str, float]:
        """Of each choice, by its name."""
        found = self._diverge(choices.values(), {})
        return {name: found[choice] for name, choice in choices.items()}

    def around(self, base: Choice) -> tuple[float, list[dict[int, float]]]:
        """The divergence of ``base``, and for each unit what it changes by, by bits, if that unit alone gets these."""
        changed = [{bits: (*base[:place], bits, *base[place + 1 :]) for bits in self._options} for place in range(len(base))]
        found = self._diverge((choice for each in changed for choice in each.values()), self._variant(base))
        return found[base], [{bits: found[choice] - found[base] for bits, choice in each.items()} for each in changed]

    def influences(self, along: float) -> list[dict[int, float]]:
        """For each unit the sum of `influences` of its linears, by bits, gradients taken with all units rounded alike."""
        keys = {bits: f"influence {along} {bits}" for bits in self._options}
        missing = [bits for bits, key in keys.items() if key not in self._known]
        variants = [self._variant((bits,) * len(self._units)) for bits in missing]
        found = influences(self._model, self._samples, variants, self._rounded, along=along, folder=self._folder)
        for done, (bits, scores) in enumerate(zip(missing, found, strict=True), 1):
            self._note({keys[bits]: [sum(scores[name] for name in unit) for unit in self._units]})
            self._advance(done, len(missing))
        return [{bits: self._known[key][place] for bits, key in keys.items()} for place in range(len(self._units))]

    def _diverge(self, choices: Iterable[Choice], base: Variant) -> dict[Choice, float]:
        keys = {choice: " ".join(map(str, choice)) for choice in choices}
        missing = [choice for choice, key in keys.items() if key not in self._known]
        if missing:
            done = 0
            for found in divergences(self._model, self._samples, [self._variant(choice) for choice in missing], self._rounded, base):
                self._note({keys[missing[number]]: [value] for number, value in found.items()})
                done += len(found)
                self._advance(done, len(missing))
        return {choice: self._known[key][0] for choice, key in keys.items()}

    def _note(self, found: Mapping[str, list[float]]) -> None:
        for key, values in found.items():
            if not all(map(math.isfinite, values)):
                raise InputError.one("allocate", f"the model overflows with {key} bits", "leave the fewest bits out of options")
        self._known |= found
        write_state_text(self._path, json.dumps(self._known))

    def _variant(self, choice: Choice) -> Variant:
        return {name: bits for unit, bits in zip(self._units, choice, strict=True) for name in unit}


@torch.no_grad()
def divergences(model: Model, samples: Samples, variants: Sequence[Variant], rounded: Rounder, base: Variant) -> Iterator[dict[int, float]]:
    """Mean Kullback-Leibler divergence over all scored tokens of `samples`, nats, from the model as it is to each of `variants`.

    What variants share with `base` is computed once, so one costs the blocks from the first in which it differs. As many as memory holds go
    through the model together and are yielded together, by their number, in the order of those blocks. Raises `InputError` if no token is scored.
    """
    if not any(bool(batch.scored[:, 1:].any()) for batch in samples.batches()):
        raise InputError.one(samples.source, "has no token whose prediction counts", "give sequences of at least two tokens")
    hidden, kwargs = model.embed_all(batch.inputs for batch in samples.batches())
    model.release()
    first = [_first_difference(model, variant, base) for variant in variants]
    order = sorted(range(len(variants)), key=first.__getitem__)
    side_by_side = max(1, STREAMS_BYTES // sum(each.numel() * each.element_size() for each in hidden))
    unchanged = list(hidden)
    for layout in model.blocks:
        with model.block(layout.index) as block:
            block.advance(unchanged, [each[layout.index] for each in kwargs])
    reached = 0
    for start in range(0, len(order), side_by_side):
        turn = order[start : start + side_by_side]
        streams: dict[int, list[Tensor]] = {}
        for layout in model.blocks[reached:]:
            of_block = [each[layout.index] for each in kwargs]
            with model.block(layout.index) as block:
                common = _weights(block, base, rounded)
                streams |= {number: list(hidden) for number in turn if first[number] == layout.index}
                for number, stream in streams.items():
                    own = {name: bits for name, bits in variants[number].items() if base.get(name) != bits}
                    _forward(block, common | _weights(block, own, rounded), stream, of_block)
                if layout.index < first[turn[-1]]:
                    _forward(block, common, hidden, of_block)
        reached = first[turn[-1]]
        yield dict(zip(turn, _divergences(model, samples, unchanged, [streams[number] for number in turn]), strict=True))
        model.release()


def _first_difference(model: Model, variant: Variant, base: Variant) -> int:
    """The first block in which `variant`, which rounds all that `base` does, differs from it."""
    return next((layout.index for layout in model.blocks for linear in layout.linears if variant.get(linear.name) != base.get(linear.name)), 0)


def _weights(block: Block, variant: Variant, rounded: Rounder) -> dict[str, Tensor]:
    """What `variant` rounds of a block."""
    linears = [linear for linear in block.layout.linears if linear.name in variant]
    return {linear.name: rounded(block, linear, variant[linear.name]) for linear in linears}


def _forward(block: Block, weights: dict[str, Tensor], hidden: list[Tensor], kwargs: list[dict[str, Any]]) -> None:
    for batch, each in enumerate(hidden):
        hidden[batch] = block.forward_with(weights, each, kwargs[batch])


def _divergences(model: Model, samples: Samples, unchanged: list[Tensor], streams: list[list[Tensor]]) -> list[float]:
    """Of each of `streams`, what the last block gives by batch, from `unchanged`, the same of the model as it is."""
    totals, count = [0.0] * len(streams), 0
    for number, batch in enumerate(samples.batches()):
        for part in torch.split(torch.nonzero(batch.scored[:, 1:].to(model.device)), LOGITS_AT_ONCE):
            row, place = part.unbind(1)
            count += len(part)
            meant = torch.log_softmax(model.logits(unchanged[number][row, place]), -1)
            for index, stream in enumerate(streams):
                given = torch.log_softmax(model.logits(stream[number][row, place]), -1)
                # Token by token it cannot be negative; rounding of float32 can make it so where it is near zero.
                totals[index] += float((meant.exp() * (meant - given)).sum(-1).clamp_min(0).sum(dtype=torch.float64))
    return [total / count for total in totals]


def influences(
    model: Model,
    samples: Samples,
    variants: Sequence[Variant],
    rounded: Rounder,
    *,
    along: float,
    folder: Path,
    advance: Callable[[], None] = lambda: None,
) -> Iterator[dict[str, float]]:
    """For each of `variants` in turn, by linear: the sum over its weights of ``|g (Q(w) - w)|``, nats; ``Q(w)`` is the rounded weight.

    ``g`` is the gradient of the mean loss on `samples` at ``w + along (Q(w) - w)``, all linears of the variant moved at once. 0 is the first
    term of a Taylor series (one gradient serves all variants), 1 the DeltaLoss of AutoRound's AutoScheme, 0.5 the post-quantization
    integral of arXiv 2503.01901 (section 3) by the midpoint rule with a single interval. Without the absolute value, errors that make up
    for one another would count as harmless one by one. `folder` and `advance` are as for `backsweep`.
    """
    for group in [variants] if along == 0 else [[variant] for variant in variants]:
        found: list[dict[str, float]] = [{} for _ in group]
        for swept in backsweep(model, samples, folder, partial(_moved, variant=group[0], rounded=rounded, along=along), advance=advance):
            for scores, variant in zip(found, group, strict=True):
                for name, value in _weights(swept.block, variant, rounded).items():
                    change = value.sub_(swept.block.weight(name))
                    scores[name] = float(change.mul_(swept.weights[name]).abs_().sum(dtype=torch.float64))
        yield from found


def _moved(block: Block, *, variant: Variant, rounded: Rounder, along: float) -> dict[str, Tensor]:
    """The weights `along` the way to the rounded ones."""
    if along == 0:
        return {linear.name: block.weight(linear.name) for linear in block.layout.linears if linear.name in variant}
    return {name: block.weight(name).lerp(value, along) for name, value in _weights(block, variant, rounded).items()}
