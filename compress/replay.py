"""What is final inside a block while it is compressed, kept so that it is computed once.

The data runs through a block once per input group. When the projection that ends a submodule (attention, a dense MLP) is quantised,
nothing in that submodule changes any more, and what it gives is that projection of the very inputs the projection was measured with.
Those inputs are kept, and from then on the submodule answers from them: the same bytes, for less than half of the work of a sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from compress.block import Block
from compress.expert_forward import Reached
from compress.layout import Group

Wrap = Callable[[Tensor], Any]
KEPT_BYTES = 192 << 20
"""Inputs kept per submodule; where the data needs more, the submodule is computed anew each time."""


class Replay:
    """Runs the batches of a sweep through block after block.

    ``hidden`` [batches] of [rows, tokens, hidden] is what the present block is given, ``kwargs`` its keyword arguments by batch and block.
    """

    def __init__(self, hidden: list[Tensor], kwargs: list[list[dict[str, Any]]]) -> None:
        self.hidden = hidden
        self._kwargs = kwargs
        self.batch = 0
        """Which batch is running."""
        self._answers: dict[str, Wrap | None] = {}
        """By the name of a linear within its block: how its submodule gives on what the linear gives, None if it does more."""
        self._replaced: list[Any] = []

    @contextmanager
    def within(self) -> Iterator[None]:
        """While inside, submodules of one block may answer from what was kept."""
        try:
            yield
        finally:
            for module in self._replaced:
                del module.forward
            self._replaced.clear()

    def run(self, block: Block) -> None:
        """Run every batch through `block` up to where something in it raises `Reached`."""
        for batch, each in enumerate(self.hidden):
            self.batch = batch
            try:
                block.forward(each, self._kwargs[batch][block.layout.index])
            except Reached:
                continue
            raise AssertionError(f"{block.layout.prefix} never reached the linear to be measured")

    def advance(self, block: Block) -> None:
        """Replace what `block` is given by what it gives."""
        for batch, each in enumerate(self.hidden):
            self.batch = batch
            self.hidden[batch] = block.forward(each, self._kwargs[batch][block.layout.index])

    def measure(self, block: Block, group: Group, record: Callable[[Tensor], None]) -> Callable[[], None]:
        """Give `record` what `group` reads of every batch. Returns what to call once the group is final."""
        linear = group.linears[0].name
        local = linear.removeprefix(block.layout.prefix)
        projection, parent = block.submodule(linear), block.parent(linear)
        if len(group.linears) > 1:
            self._answers[local] = None  # something must still combine them
        fits = sum(each.numel() // each.shape[-1] * group.columns * each.element_size() for each in self.hidden) <= KEPT_BYTES
        kept: list[Tensor] = []
        given: list[Tensor] = []

        def before(_: Any, arguments: tuple[Tensor]) -> None:
            record(arguments[0])
            if fits and self._answers.get(local, _alone):
                kept.append(arguments[0])
            if local in self._answers:
                raise Reached

        def after(_: Any, arguments: Any, output: Tensor) -> None:
            given.append(output)

        def end(_: Any, arguments: Any, output: Any) -> None:
            # The first batch of the first block runs on to here, to see whether the submodule gives what its projection gives.
            self._answers[local] = next((wrap for wrap in (_alone, _first_of_two) if _same(output, wrap(given[0]))), None)
            raise Reached

        handles = [projection.register_forward_pre_hook(before), projection.register_forward_hook(after), parent.register_forward_hook(end)]
        try:
            self.run(block)
        finally:
            for handle in handles:
                handle.remove()
        wrap = self._answers[local]
        if wrap is None or not fits:
            return lambda: None
        for module in parent.children():
            if module is not projection:
                module.to("meta")  # it has done its work
        return lambda: self._answer(parent, projection, kept, wrap)

    def _answer(self, module: Any, projection: Any, kept: list[Tensor], wrap: Wrap) -> None:
        """From here on `module` gives what `projection` gives for the inputs `kept`, and its weights are freed."""
        for index, inputs in enumerate(kept):
            kept[index] = projection(inputs)
        projection.to("meta")
        module.forward = lambda *_, **__: wrap(kept[self.batch])
        self._replaced.append(module)


def _alone(output: Tensor) -> Any:
    return output


def _first_of_two(output: Tensor) -> Any:
    """What attention gives: no weights beside its output."""
    return output, None


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(mine is theirs for mine, theirs in zip(one, other, strict=True))
    return one is other
