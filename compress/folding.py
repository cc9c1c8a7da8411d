"""Moving scale between the two ends of an edge: divided where channels are produced, multiplied where they are read.

In exact arithmetic a block computes the same for any positive factors (SmoothQuant, arXiv 2211.10438, section 4; AWQ, arXiv 2306.00978,
section 3.2). In a checkpoint the producer's vector (the weight of a norm, the bias of a linear) must end in the dtype it is stored in, so
it is rounded to that first and the readers are multiplied by what it was really divided by: nothing is lost but float32 rounding.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.block import Block
from compress.layout import Edge


class Folding:
    """One edge with its weights.

    ``tensors`` are those of the edge by name on disk, floating point of one dtype, not changed; ``stored`` the dtypes they go back to.
    ``producer`` channels are counted once, ``columns`` are those of the readers: with grouped-query attention each group of query heads
    reads one head of values, so a channel of the producer is read by several columns.
    """

    def __init__(self, edge: Edge, tensors: Mapping[str, Tensor], stored: Mapping[str, torch.dtype], head_dim: int) -> None:
        self._tensors = tensors
        self._stored = stored
        self._head_dim = head_dim
        self._produced = [name for name in (f"{edge.producer}.weight", f"{edge.producer}.bias") if name in tensors]
        self._read = [f"{linear}.weight" for linear in edge.consumers]
        self._vector = next((name for name in self._produced if tensors[name].ndim == 1), None)
        self.channels = tensors[self._produced[0]].shape[0]
        self.columns = tensors[self._read[0]].shape[1]

    def spread(self, channels: Tensor) -> Tensor:
        """From a value per channel of the producer to one per column of the readers."""
        if self.columns == self.channels:
            return channels
        return channels.view(-1, self._head_dim).repeat_interleave(self.columns // self.channels, 0).flatten()

    def heads(self, columns: Tensor) -> Tensor:
        """The inverse: [readers of a channel, channels] from a value per column."""
        if self.columns == self.channels:
            return columns[None]
        return columns.view(-1, self.columns // self.channels, self._head_dim).transpose(0, 1).flatten(1)

    def exact(self, scale: Tensor) -> Tensor:
        """The factors nearest to ``scale`` [channels] that can be folded without loss; 1 for a channel that would leave its dtype's range."""
        scale = torch.where(scale.isfinite() & (scale > 0) & self._within_range(scale), scale, 1.0)
        if self._vector is None:
            return scale
        vector = self._tensors[self._vector]
        rounded = (vector / scale).to(self._stored[self._vector]).to(vector.dtype)
        usable = rounded.isfinite() & (rounded != 0)
        return torch.where(usable, vector / rounded, torch.where(vector == 0, scale, 1.0))

    def _within_range(self, scale: Tensor) -> Tensor:
        fits = torch.ones_like(scale, dtype=torch.bool)
        for name in self._read:
            largest = self.heads(self._tensors[name].abs().amax(0)).amax(0)
            fits &= largest * scale < torch.finfo(self._stored[name]).max / 2
        for name in self._produced:
            largest = self._tensors[name].abs().flatten(1).amax(1) if self._tensors[name].ndim > 1 else self._tensors[name].abs()
            fits &= largest / scale < torch.finfo(self._stored[name]).max / 2
        return fits

    def folded(self, factor: Tensor) -> dict[str, Tensor]:
        """All tensors of the edge with ``factor`` [channels], which `exact` gave, folded in."""
        changed = {}
        for name in self._produced:
            value = self._tensors[name]
            changed[name] = value / (factor if value.ndim == 1 else factor[:, None])
        if self._vector is not None:
            changed[self._vector] = changed[self._vector].to(self._stored[self._vector]).to(changed[self._vector].dtype)
        columns = self.spread(factor)
        return changed | {name: self._tensors[name] * columns for name in self._read}


def open_edge(block: Block, edge: Edge) -> Folding:
    """The edge of a block with its weights as they are now, in float32."""
    names = [f"{edge.producer}.weight", f"{edge.producer}.bias", *(f"{linear}.weight" for linear in edge.consumers)]
    present = [name for name in names if name in block.layout.tensors]
    return Folding(edge, {name: block.tensor(name) for name in present}, {name: block.source_dtype(name) for name in present}, block.head_dim)
