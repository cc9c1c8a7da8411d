"""Turn the residual stream and the heads' values by random Hadamard matrices (QuaRot, arXiv 2404.00456; R1 and R2 of SpinQuant, 2405.16406).

The model computes the same, and no channel stands out any more: what was concentrated in a few is spread over all. Both matrices are
multiplied into the weights beforehand, in float64, so nothing is left to do when the model runs. The weights of norms go into the linears
that read them, and a head that shares its weights with the embedding gets its own, since what reads the stream is turned unlike what
writes it. Nothing is subtracted from the embedding: that leaves a model with LayerNorm as it was, but not one with RMSNorm.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from compress.arch.base import Outside
from compress.errors import InputError, Problems
from compress.layout import BlockLayout, Layout
from compress.passes.base import Transform

if TYPE_CHECKING:
    from torch import Tensor

    from compress.block import Block
    from compress.calibrate import Workspace
    from compress.data import Samples
    from compress.model import Model
    from compress.numerics.rotation import Rotation

    Read = Callable[[str], Tensor]
    Write = Callable[[str, Tensor], None]

ELEMENTS_AT_ONCE = 1 << 22
"""Of an embedding, turned at a time."""


class Pass(Transform):
    """Multiply rotations into the weights."""

    needs_data: ClassVar[bool] = False
    verb: ClassVar[str] = "rotated"
    mixes: ClassVar[bool] = True

    r1: bool = Field(default=True, description="turn the residual stream; unties a head that shares the embedding's weights")
    r2: bool = Field(default=True, description="turn the values of each head, by one matrix per block")
    seed: int = Field(default=0, ge=0, description="of the random signs")

    @model_validator(mode="before")
    @classmethod
    def _nothing_at_run_time(cls, options: Any) -> Any:
        if isinstance(options, dict) and options.keys() & {"r3", "r4"}:
            raise ValueError("r3 and r4 are rotations at run time, which no engine that reads our exports does; r1 and r2 need nothing")
        return options

    @model_validator(mode="after")
    def _something(self) -> Pass:
        if not self.r1 and not self.r2:
            raise ValueError("r1 and r2 are both false, so nothing would be done")
        return self

    def check(self, place: str, layout: Layout, problems: Problems) -> None:
        super().check(place, layout, problems)
        if self.r2 and not any(edge.heads for block in layout.blocks for edge in block.edges):
            reason = f"nothing scales or turns the values of a {layout.arch.model_type}'s heads without changing what it computes"
            problems.add(f"{place}: r2", reason, "set r2: false")
        if not self.r1:
            return
        tensors, outside, size = layout.checkpoint.tensors, layout.arch.outside, layout.text_config.get("hidden_size")
        if isinstance(size, int) and size % 2:
            problems.add(place, f"a residual stream of {size} channels cannot be turned: the size is odd", "set r1: false")
        norms = [edge.producer for block in layout.blocks for edge in block.edges if len(tensors[f"{edge.producer}.weight"].shape) == 1]
        if centred := next((norm for norm in norms if f"{norm}.bias" in tensors), None):
            problems.add(place, f"{centred} has a bias, so it is a LayerNorm, which subtracts a mean that turning would move", "set r1: false")
        if layout.arch.image and not outside.writers:
            problems.add(place, f"the table of {layout.arch.model_type} does not say what writes images to the residual stream", "set r1: false")
        for disk, _ in (outside.embedding, outside.norm, *outside.writers):
            if f"{disk}.weight" not in tensors:
                problems.add(place, f"{disk}.weight is not in the checkpoint, but writes to or reads from the residual stream", "set r1: false")

    def added_bytes(self, layout: Layout) -> int:
        embedding, head = (layout.checkpoint.tensors.get(f"{name}.weight") for name, _ in (layout.arch.outside.embedding, layout.arch.outside.head))
        return embedding.nbytes if self.r1 and embedding and not head else 0

    def run(self, model: Model, samples: Samples, workspace: Workspace) -> None:
        from compress.calibrate import walk
        from compress.numerics.rotation import Rotation

        stream = Rotation(model.hidden_size, self.seed) if self.r1 else None
        if stream and not workspace.outside_file.exists():
            record = {"name": model.layout.arch.outside.embedding[0], "pass": "rotate", "kind": f"residual stream of {stream}"}
            turned = turn_outside(model.layout.arch.outside, model.tied, set(model.tensors), model.read, stream)
            model.write_outside(workspace.outside_file, turned, {"tie_word_embeddings": False}, [record])
        for block in walk(model, workspace):
            self._turn(block, stream)

    def _turn(self, block: Block, stream: Rotation | None) -> None:
        from compress.numerics.rotation import Rotation

        heads = Rotation(block.head_dim, self.seed + 1 + block.layout.index) if self.r2 else None
        turn_block(block.layout, lambda name: block.tensor(name).double(), block.set_dense, stream, heads)
        block.add_record(block.layout.prefix, {"pass": "rotate", "kind": f"values of heads of {heads}" if heads else "linears"})


def turn_block(layout: BlockLayout, read: Read, write: Write, stream: Rotation | None, heads: Rotation | None) -> None:
    """Turn the linears of a block, one at a time. ``read`` gives a tensor as it is now in float64, by name; ``write`` takes it turned.

    ``stream`` is R1, ``heads`` R2. Of what reads the stream, through a norm whose weight it takes over, the columns are turned, of what writes
    to it the rows and the bias.
    """
    import torch

    for edge in layout.edges:
        if edge.inner:
            continue
        produced, read_by = f"{edge.producer}.weight", [f"{linear}.weight" for linear in edge.consumers]
        weight = read(produced)
        if weight.ndim == 1:
            if stream:
                for name in read_by:
                    write(name, stream.columns(read(name) * weight))
                write(produced, torch.ones_like(weight))
            continue
        if edge.heads and heads:
            write(produced, _per_head(weight.T, heads).T.contiguous())
            if f"{edge.producer}.bias" in layout.tensors:
                write(f"{edge.producer}.bias", _per_head(read(f"{edge.producer}.bias"), heads))
            for name in read_by:
                write(name, _per_head(read(name), heads))
    if stream:
        for linear in layout.writers:
            _turn_writer(linear, layout.tensors, read, write, stream)


def turn_outside(outside: Outside, tied: bool, names: Collection[str], read: Read, stream: Rotation) -> dict[str, Tensor]:
    """Embedding, last norm, head and whatever else writes to the stream, turned; in the dtypes they have. ``names`` are all there are."""
    import torch

    embedding, norm, head = (f"{name}.weight" for name, _ in (outside.embedding, outside.norm, outside.head))
    scale = read(norm)
    turned = {
        embedding: _turned(read(embedding), stream, torch.ones_like(scale)),
        head: _turned(read(embedding if tied else head), stream, scale),
        norm: torch.ones_like(scale),
    }
    for linear, _ in outside.writers:
        _turn_writer(linear, names, lambda name: read(name).double(), lambda name, value: turned.update({name: value.to(read(name).dtype)}), stream)
    if broken := next((name for name, tensor in turned.items() if not tensor.isfinite().all()), None):
        raise InputError.one(broken, f"holds values that {turned[broken].dtype} cannot hold once it is turned", "set r1: false")
    return turned


def _turn_writer(linear: str, names: Collection[str], read: Read, write: Write, stream: Rotation) -> None:
    write(f"{linear}.weight", stream.rows(read(f"{linear}.weight")))
    if f"{linear}.bias" in names:
        write(f"{linear}.bias", stream.columns(read(f"{linear}.bias")))


def _per_head(value: Tensor, heads: Rotation) -> Tensor:
    """Turn [..., channels], head after head."""
    import torch

    return heads.columns(torch.unflatten(value, -1, (-1, heads.size))).flatten(-2)


def _turned(value: Tensor, stream: Rotation, scale: Tensor) -> Tensor:
    """``value diag(scale) R`` [rows, size], in the dtype of ``value``."""
    import torch

    result = torch.empty_like(value)
    rows = max(1, ELEMENTS_AT_ONCE // value.shape[1])
    for start in range(0, value.shape[0], rows):
        result[start : start + rows] = stream.columns(value[start : start + rows].double() * scale.double())
    return result
