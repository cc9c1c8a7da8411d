"""Which weights' changes did what to the model's loss: gradients along the path from the weights as they were to those of now.

A mean gradient is as large as the model, so it is kept on disk, a file per block, and added to block by block.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from compress.backsweep import backsweep
from compress.block import Block
from compress.checkpoint import entry, read_header, read_tensor
from compress.data import Samples
from compress.model import Model
from compress.numerics.quadrature import between, contributions
from compress.state import write_state

Ends = Callable[[Block], dict[str, tuple[Tensor, Tensor]]]
"""The weights [out, in] float32 of a block before and after, by linear."""


class Attribution:
    """Mean gradients of the loss over the path between `ends`, kept in `folder`, which is theirs alone.

    ``places`` on the path, 0 before and 1 after, each with its weight in the mean. A run killed within `measure` continues where it was.
    """

    def __init__(self, folder: Path, ends: Ends, places: list[tuple[float, float]]) -> None:
        self._folder, self._ends, self._places = folder, ends, places

    def measure(self, model: Model, samples: Samples, advance: Callable[[], None]) -> None:
        """Once through the model and back for each place; `advance` is told of each block passed."""
        self._folder.mkdir(exist_ok=True)
        for number, (place, share) in enumerate(self._places):
            if all(self._done(layout.index) > number for layout in model.blocks):
                continue

            def weights(block: Block, place: float = place) -> dict[str, Tensor]:
                return {name: between(before, after, place) for name, (before, after) in self._ends(block).items()}

            for found in backsweep(model, samples, self._folder, weights, advance=advance):
                index = found.block.layout.index
                if self._done(index) == number:
                    self._add(index, number, {name: gradient.mul_(share) for name, gradient in found.weights.items()})

    def of(self, block: Block) -> dict[str, Tensor]:
        """What the change of each weight of `block` did to the loss, signed, [out, in] float32 by linear."""
        kept, _ = read_header(self._path(block.layout.index))
        ends = self._ends(block).items()
        return {name: contributions(read_tensor(kept[name]).to(before.device), before, after) for name, (before, after) in ends}

    def _add(self, index: int, number: int, gradients: dict[str, Tensor]) -> None:
        if number:
            kept, _ = read_header(self._path(index))
            for name, gradient in gradients.items():
                gradient += read_tensor(kept[name]).to(gradient.device)
        entries = [entry(name, gradient) for name, gradient in gradients.items()]
        write_state(self._path(index), entries, {"done": str(number + 1)})

    def _done(self, index: int) -> int:
        """How many places have been added to what is kept of a block."""
        path = self._path(index)
        return int(read_header(path)[1]["done"]) if path.exists() else 0

    def _path(self, index: int) -> Path:
        return self._folder / f"gradients-{index:05d}.safetensors"
