"""A block with everything it is given: what its input groups and submodules see, told on the way or kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.block import Block
from compress.expert_forward import Reached, Recorder
from compress.layout import EXPERTS_IN, EXPERTS_OUT, Group


class Seen:
    """What one input group was given: tokens, mean and largest magnitude per input, and on request second moments within groups of inputs."""

    def __init__(self, columns: int, group: int | None, device: torch.device) -> None:
        self.tokens = 0
        self.largest = torch.zeros(columns, device=device)
        self._total = torch.zeros(columns, dtype=torch.float64, device=device)
        self._squares = torch.zeros(columns // group, group, group, device=device) if group else None

    def add(self, inputs: Tensor, counts: Tensor | None = None) -> None:
        """Count ``inputs`` [..., in]; in second moments each token as often as ``counts`` says, one for each."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        if not len(rows):
            return
        magnitude = rows.abs()
        self.tokens += len(rows)
        self.largest = torch.maximum(self.largest, magnitude.amax(0))
        self._total += (magnitude if counts is None else magnitude * counts.reshape(-1, 1)).sum(0, dtype=torch.float64)
        if self._squares is not None:
            weighed = rows if counts is None else rows * counts.reshape(-1, 1).sqrt()
            grouped = weighed.T.reshape(self._squares.shape[0], -1, len(rows))
            self._squares.baddbmm_(grouped, grouped.transpose(1, 2))

    def mean(self) -> Tensor:
        """[in] float32, mean magnitude."""
        return (self._total / max(1, self.tokens)).float()

    def moment(self) -> Tensor:
        """[groups, group, group] float32, mean of ``x x^T`` within each group of neighbouring inputs."""
        assert self._squares is not None
        return self._squares / max(1, self.tokens)

    @staticmethod
    def together(parts: Sequence[Seen]) -> Seen:
        """What readers of one tensor were given, each its share of the tokens; without second moments."""
        whole = Seen(len(parts[0].largest), None, parts[0].largest.device)
        for part in parts:
            whole.tokens += part.tokens
            whole.largest = torch.maximum(whole.largest, part.largest)
            whole._total += part._total
        return whole

    def divide(self, factor: Tensor) -> None:
        """As if every input had been divided by ``factor`` [in]."""
        self.largest /= factor
        self._total /= factor
        if self._squares is not None:
            parts = factor.view(self._squares.shape[0], -1)
            self._squares /= parts[:, :, None] * parts[:, None, :]


@dataclass(frozen=True)
class Call:
    """How a submodule was called for one batch."""

    batch: int
    arguments: tuple[Any, ...]
    named: dict[str, Any]

    def repeat(self, module: nn.Module) -> Tensor:
        """What `module` now gives for it, the first of several things."""
        output = module(*self.arguments, **self.named)
        first: Tensor = output[0] if isinstance(output, tuple) else output
        return first


@dataclass(frozen=True)
class Probe:
    """A block as it is now. By batch: ``hidden`` [rows, tokens, hidden] that it is given, its keyword arguments and the numbers of its samples."""

    block: Block
    hidden: list[Tensor]
    kwargs: list[dict[str, Any]]
    members: list[tuple[int, ...]]

    def observe(self, note: Callable[[Group, Tensor], None], batches: Iterable[int] | None = None) -> None:
        """Run all data, or some `batches`, through the block and tell `note` what each input group is given, [..., in]."""
        dense, experts = self._groups()
        with ExitStack() as stack:
            for group in dense:
                module = self.block.submodule(group.linears[0].name)
                stack.callback(module.register_forward_pre_hook(lambda _, arguments, group=group: note(group, arguments[0])).remove)
            if experts:

                def before(expert: int, _: Tensor, inputs: Tensor) -> None:
                    note(experts[EXPERTS_IN][expert], inputs)

                def after(expert: int, _: Tensor, inputs: Tensor) -> None:
                    note(experts[EXPERTS_OUT][expert], inputs)

                stack.enter_context(self.block.overhearing(before, after))
            for batch in range(len(self.hidden)) if batches is None else batches:
                self._run(batch)

    def _groups(self) -> tuple[list[Group], dict[str, dict[int, Group]]]:
        """Input groups outside experts, and those of experts by stage and expert."""
        dense: list[Group] = []
        experts: dict[str, dict[int, Group]] = {}
        for stage in self.block.layout.stages:
            for group in stage.groups:
                if group.expert is None:
                    dense.append(group)
                else:
                    experts.setdefault(stage.name, {})[group.expert] = group
        return dense, experts

    def calls(self, module: nn.Module, batches: Iterable[int]) -> list[Call]:
        """How `module` is called for each of some batches; what comes after it is not computed."""
        found: list[Call] = []

        def keep(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            found.append(Call(batch, arguments, named))
            raise Reached

        handle = module.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            for batch in batches:
                self._run(batch)
        finally:
            handle.remove()
        return found

    def last_inputs_of_experts(self, batch: int, record: Recorder) -> None:
        """Tell `record` what the last linear of each expert is given of a batch."""
        with self.block.listening(record, after_gate=True):
            self._run(batch)

    def of_cache(self, measure: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        """``measure(keys, values)`` of each batch. Both are [rows, heads, tokens, head size], keys after rotation."""
        found: list[Tensor] = []

        def record(keys: Tensor, values: Tensor) -> None:
            found.append(measure(keys, values))
            raise Reached

        with self.block.hearing_cache(record):
            for batch in range(len(self.hidden)):
                self._run(batch)
        return found

    def of_attention(self, note: Callable[[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]], None]) -> None:
        """Tell `note` queries, keys and values of each batch, [rows, heads, tokens, head size] and rotated, and cosines and sines of the rotation."""

        def record(query: Tensor, keys: Tensor, values: Tensor, rotation: tuple[Tensor, Tensor]) -> None:
            note(query, keys, values, rotation)
            raise Reached

        with self.block.hearing_attention(record):
            for batch in range(len(self.hidden)):
                self._run(batch)

    def _run(self, batch: int) -> None:
        with suppress(Reached):
            self.block.forward(self.hidden[batch], self.kwargs[batch])
