"""How far what a linear reads, and what it is added to, have moved from what they were before the pass began.

QEP (arXiv 2504.09629, section 4) lets each linear correct the errors of those before it. With ``x`` the input in the model as it was and
``y`` that in the model as it is, it needs the mean of ``(x - y) y^T`` over tokens. Where the output of a linear is added to the residual
stream, what that stream has lost can be made good in the same way: with ``r`` and ``s`` the stream then and now, by the mean of
``(r - s) y^T``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.block import Block
from compress.expert_forward import Reached
from compress.hardware import widened
from compress.layout import DOWN, OUT
from compress.model import Model

ADDED = (OUT, DOWN)
"""Stages whose output is added to the residual stream."""


@dataclass(frozen=True)
class Moved:
    """``inputs`` [in, in], the mean of ``(x - y) y^T``; ``stream`` [out, in], that of ``(r - s) y^T``, where there is one; float32."""

    inputs: Tensor
    stream: Tensor | None


class Drift:
    """The model as it was, run beside the model as it is, block by block.

    ``hidden`` [batches] of [rows, tokens, hidden] is what the present block was given then, ``kwargs`` as for `Replay`.
    """

    def __init__(self, hidden: list[Tensor], kwargs: list[list[dict[str, Any]]]) -> None:
        self.hidden = hidden
        self._kwargs = kwargs
        self._block: Block
        self._inputs: Tensor
        self._stream: Tensor | None
        self._tokens = 0
        self._sums = torch.promote_types(hidden[0].dtype, torch.float32)

    @contextmanager
    def beside(self, model: Model, index: int) -> Iterator[None]:
        """While inside, the block as it was is in memory too. To be entered before the block itself."""
        with model.block(index, beside=True) as self._block:
            yield

    @contextmanager
    def following(self, block: Block, linear: str, columns: int, device: torch.device) -> Iterator[None]:
        """While inside, `add` counts inputs of `linear`, a projection of `block`, the block as it is."""
        stages = [(stage.name, stage.groups[0].linears[0].name) for stage in block.layout.stages]
        place = [name for _, name in stages].index(linear)
        self._linear, self._ends = linear, [name for stage, name in stages[:place] if stage in ADDED]
        self._inputs, self._stream, self._tokens = torch.zeros(columns, columns, device=device, dtype=self._sums), None, 0
        self._is_added = stages[place][0] in ADDED
        with _listening(block, self._ends) as self._outputs:
            yield

    def add(self, batch: int, inputs: Tensor, hidden: Tensor) -> None:
        """Count ``inputs`` [..., in] of the linear in the model as it is, whose block is given ``hidden`` in this batch."""
        now = widened(inputs.reshape(-1, inputs.shape[-1]))
        with _listening(self._block, self._ends) as outputs:
            before = widened(self._reads(batch).reshape(now.shape))
        self._inputs.addmm_((before - now).T, now)
        self._tokens += len(now)
        if self._is_added:
            lost = _sum(self.hidden[batch], outputs).sub_(_sum(hidden, self._outputs))
            cross = lost.flatten(0, -2).T @ now
            self._stream = cross if self._stream is None else self._stream.add_(cross)
        self._outputs.clear()

    def mean(self) -> Moved:
        """What was counted; in place, call once."""
        count = max(1, self._tokens)
        return Moved(self._inputs.div_(count), None if self._stream is None else self._stream.div_(count))

    def advance(self) -> None:
        """Replace what the block was given by what it gave."""
        self._block.advance(self.hidden, [each[self._block.layout.index] for each in self._kwargs])

    def _reads(self, batch: int) -> Tensor:
        reached: list[Tensor] = []

        def stop(_: Any, arguments: tuple[Tensor]) -> None:
            reached.append(arguments[0])
            raise Reached

        handle = self._block.submodule(self._linear).register_forward_pre_hook(stop)
        try:
            self._block.forward(self.hidden[batch], self._kwargs[batch][self._block.layout.index])
        except Reached:
            return reached[0]
        finally:
            handle.remove()
        raise AssertionError(f"{self._linear} was never reached")


@contextmanager
def _listening(block: Block, ends: list[str]) -> Iterator[list[Tensor]]:
    """While inside, a list that takes what the submodules that end with the linears `ends` give."""
    outputs: list[Tensor] = []

    def note(_: Any, __: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.parent(linear).register_forward_hook(note) for linear in ends]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _sum(hidden: Tensor, outputs: list[Tensor]) -> Tensor:
    """The residual stream [rows, tokens, hidden] float32: what the block was given and what its submodules have added."""
    total = hidden.to(torch.promote_types(hidden.dtype, torch.float32), copy=True)
    for output in outputs:
        total += output
    return total
