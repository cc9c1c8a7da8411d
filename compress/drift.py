"""How far what a linear reads has moved from what it read before the pass began.

QEP (arXiv 2504.09629, section 4) lets each linear correct the errors of those before it. With ``x`` the input in the model as it was and
``y`` that in the model as it is, it needs the mean of ``(x - y) y^T`` over tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from compress.model import Block, Model, Reached


class Drift:
    """The model as it was, run beside the model as it is, block by block.

    ``hidden`` [batches] of [rows, tokens, hidden] is what the present block was given then, ``kwargs`` as for `Replay`.
    """

    def __init__(self, hidden: list[Tensor], kwargs: list[list[dict[str, Any]]]) -> None:
        self.hidden = hidden
        self._kwargs = kwargs
        self._block: Block
        self._total: Tensor
        self._tokens = 0

    @contextmanager
    def beside(self, model: Model, index: int) -> Iterator[None]:
        """While inside, the block as it was is in memory too. To be entered before the block itself."""
        with model.block(index, beside=True) as self._block:
            yield

    def begin(self, columns: int, device: torch.device) -> None:
        """Forget what was added."""
        self._total = torch.zeros(columns, columns, device=device)
        self._tokens = 0

    def add(self, linear: str, batch: int, inputs: Tensor) -> None:
        """Count ``inputs`` [..., in] of `linear`, those of `batch` in the model as it is."""
        now = inputs.reshape(-1, inputs.shape[-1]).float()
        before = self._reads(linear, batch).reshape(now.shape).float()
        self._total.addmm_((before - now).T, now)
        self._tokens += len(now)

    def mean(self) -> Tensor:
        """[in, in] float32; in place, call once."""
        return self._total.div_(max(1, self._tokens))

    def advance(self) -> None:
        """Replace what the block was given by what it gave."""
        self._block.advance(self.hidden, [each[self._block.layout.index] for each in self._kwargs])

    def _reads(self, linear: str, batch: int) -> Tensor:
        reached: list[Tensor] = []

        def stop(_: Any, arguments: tuple[Tensor]) -> None:
            reached.append(arguments[0])
            raise Reached

        handle = self._block.submodule(linear).register_forward_pre_hook(stop)
        try:
            self._block.forward(self.hidden[batch], self._kwargs[batch][self._block.layout.index])
        except Reached:
            return reached[0]
        finally:
            handle.remove()
        raise AssertionError(f"{linear} was never reached")
