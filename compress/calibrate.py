"""The calibration walk: every block once, each input group measured with everything before it already compressed.

A pass is a plain loop over `sweep`. What it has not quantised when it asks for the next item stays as it is; when a block is done
its new tensors go to disk and its memory is freed. What the next block is given is kept on disk too, so that a killed run continues
with the block it was in and produces the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.block import Block
from compress.checkpoint import entry, read_header, read_tensor
from compress.data import Samples
from compress.drift import Drift, Moved
from compress.expert_forward import Reached
from compress.hardware import in_parallel, return_freed_memory, widened
from compress.layout import EXPERTS_IN, EXPERTS_OUT, Group, Stage
from compress.model import Model
from compress.probe import Probe
from compress.replay import Replay
from compress.state import write_state

TILE = 512
TOKENS_AT_ONCE = 512
"""Tokens that wait for each other before they are counted: a product of few costs what writing the sum costs."""
STATISTICS_BYTES = 1 << 30
"""Statistics held at once; more experts than fit are measured in several turns."""


class Progress(Protocol):
    """What a walk reports to."""

    def blocks(self, done: int, total: int) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass(frozen=True)
class Workspace:
    """Where one pass keeps its finished blocks and what the next block is given; ``source`` is the sha256 of the model's files by name."""

    folder: Path
    progress: Progress
    source: dict[str, str] = field(default_factory=dict)

    def block_file(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    @property
    def outside_file(self) -> Path:
        """What a pass changes outside the blocks."""
        return self.folder / "outside.safetensors"

    @property
    def activations(self) -> Path:
        return self.folder / "activations.safetensors"


class SecondMoment:
    """Sum of ``x x^T`` over tokens, [batch, in, in] float32 or `dtype`, and the tokens counted per member, [batch].

    On request also the largest magnitude seen per member, ``peaks`` [batch], and the sum of magnitudes per input, ``magnitudes`` [batch, in]
    float64. Two of a kind merge, which is what makes them distributable.
    """

    def __init__(
        self, batch: int, size: int, device: torch.device, *, peaks: bool = False, magnitudes: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        self.total = torch.zeros(batch, size, size, device=device, dtype=dtype)
        self.tokens = [0] * batch
        self.peaks: list[float | None] = [0.0 if peaks else None] * batch
        self.magnitudes = torch.zeros(batch, size, device=device, dtype=torch.float64) if magnitudes else None
        self._waiting: list[list[Tensor]] = [[] for _ in range(batch)]

    def add(self, member: int, inputs: Tensor) -> None:
        """Count ``inputs`` [..., in] for `member`."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        if (peak := self.peaks[member]) is not None and rows.numel():
            self.peaks[member] = max(peak, float(rows.abs().max()))
        if self.magnitudes is not None:
            self.magnitudes[member] += rows.abs().sum(0, dtype=torch.float64)
        self.tokens[member] += rows.shape[0]
        self._waiting[member].append(rows)
        if sum(map(len, self._waiting[member])) >= TOKENS_AT_ONCE:
            with fast_exact_products(rows.dtype):
                self._count(member)

    def _count(self, member: int) -> None:
        """Add what waits to the sum."""
        waiting, self._waiting[member] = self._waiting[member], []
        if not waiting:
            return
        rows = torch.cat(waiting).to(self.total.dtype)
        total, size = self.total[member], rows.shape[1]
        # Whole tiles of the upper triangle: about half the work of the full product.
        for start in range(0, size, TILE):
            end = min(start + TILE, size)
            part = total[start:end, start:]
            torch.addmm(part, rows[:, start:end].T, rows[:, start:], out=part)

    def _count_all(self) -> None:
        dtype = next((rows.dtype for waiting in self._waiting for rows in waiting), self.total.dtype)
        with fast_exact_products(dtype):
            in_parallel(self._count, range(len(self._waiting)))

    def merge(self, other: SecondMoment) -> None:
        self._count_all()
        other._count_all()
        self.total += other.total
        self.tokens = [mine + theirs for mine, theirs in zip(self.tokens, other.tokens, strict=True)]
        self.peaks = [None if mine is None or theirs is None else max(mine, theirs) for mine, theirs in zip(self.peaks, other.peaks, strict=True)]
        if self.magnitudes is not None and other.magnitudes is not None:
            self.magnitudes += other.magnitudes

    def mean_magnitude(self) -> Tensor | None:
        """[batch, in] float64, mean of ``|x|``, if it was asked for."""
        if self.magnitudes is None:
            return None
        return self.magnitudes / torch.tensor([max(1, count) for count in self.tokens], device=self.magnitudes.device)[:, None]

    def mean(self) -> Tensor:
        """The Hessian of the squared output error up to a factor of two: mean of ``x x^T``; in place, call once."""
        self._count_all()
        in_parallel(self._finish, range(len(self.tokens)))
        return self.total

    def _finish(self, member: int) -> None:
        """From sums above the diagonal to means everywhere."""
        upper = self.total[member].div_(max(1, self.tokens[member])).triu_()
        # Tile by tile, so that no transposed copy of the whole is held.
        for start in range(0, upper.shape[0], TILE):
            end = min(start + TILE, upper.shape[0])
            corner = upper[start:end, start:end]
            corner += corner.triu(1).T
            upper[end:, start:end] = upper[start:end, end:].T


@contextmanager
def fast_exact_products(dtype: torch.dtype) -> Iterator[None]:
    """While inside, float32 products of values that are exact in bfloat16 use the hardware's bfloat16 products with float32 sums.

    The products are exact, so the result is that of a float32 product. Values of any other `dtype` are multiplied as usual.
    """
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = "bf16" if dtype == torch.bfloat16 else "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = before


@dataclass(frozen=True)
class Inputs:
    """Input groups of equal shape in one block, measured as the model is now.

    ``hessian`` [groups, in, in] float32 (float64 if the model computes in that) is the mean of ``x x^T``, the receiver's to overwrite;
    ``tokens`` how many each group saw.
    """

    block: Block
    groups: tuple[Group, ...]
    hessian: Tensor
    tokens: tuple[int, ...]
    seen: int
    """Tokens of the whole calibration set."""
    peaks: tuple[float | None, ...]
    """Largest magnitude that each group read, on request."""
    magnitude: Tensor | None = None
    """[groups, in] float64, mean of ``|x|``, on request."""
    moved: Moved | None = None
    """How far inputs are from what they were before the pass began; on request, never of experts."""


def walk(model: Model, workspace: Workspace) -> Iterator[Block]:
    """Every unfinished block in turn, without running any data through it."""
    for layout in model.blocks:
        path = workspace.block_file(layout.index)
        if not path.exists():
            with model.block(layout.index) as block:
                yield block
                block.save(path)
        workspace.progress.blocks(layout.index + 1, len(model.blocks))


@torch.no_grad()
def sweep(
    model: Model,
    samples: Samples,
    workspace: Workspace,
    wanted: Callable[[Group], bool],
    *,
    drift: bool = False,
    peaks: bool = False,
    magnitudes: bool = False,
) -> Iterator[Inputs]:
    """Measure every input group for which `wanted` holds, block after block, in the order in which data flows.

    With `peaks`, the largest magnitude too, with `magnitudes` the mean one of each input. With `drift`, also against the model as it was: a second
    block in memory, and about twice the work.
    """
    start, streams, kwargs = _begin(model, samples, workspace, 2 if drift else 1)
    model.release()
    replay = Replay(streams[0], kwargs)
    moved = Drift(streams[1], kwargs) if drift else None
    workspace.progress.blocks(start, len(model.blocks))
    for layout in model.blocks[start:]:
        path = workspace.block_file(layout.index)
        with moved.beside(model, layout.index) if moved else nullcontext(), model.block(layout.index) as block, replay.within():
            for stage in layout.stages:
                for groups in _turns(tuple(group for group in stage.groups if wanted(group))):
                    sums = torch.promote_types(model.dtype, torch.float32)
                    moment = SecondMoment(len(groups), groups[0].columns, model.device, peaks=peaks, magnitudes=magnitudes, dtype=sums)
                    apart = moved if stage.name not in (EXPERTS_IN, EXPERTS_OUT) else None
                    finish = _measure(block, stage, groups, replay, moment, apart)
                    tokens, largest, usual = tuple(moment.tokens), tuple(moment.peaks), moment.mean_magnitude()
                    return_freed_memory()
                    yield Inputs(block, groups, moment.mean(), tokens, samples.tokens, largest, usual, apart.mean() if apart else None)
                    del moment
                    finish()
                    return_freed_memory()
            block.save(path)
            if layout.index + 1 < len(model.blocks):
                replay.advance(block)
                if moved:
                    moved.advance()
                _keep(workspace, layout.index + 1, streams)
        workspace.progress.blocks(layout.index + 1, len(model.blocks))


@dataclass(frozen=True)
class Trainable:
    """A block to be trained to give, for what it is given now, what it gave before the pass began.

    ``inputs`` and ``targets`` [batches] of [rows, tokens, hidden]; ``kwargs`` by batch; ``seen`` the tokens of the whole calibration set.
    """

    block: Block
    inputs: list[Tensor]
    targets: list[Tensor]
    kwargs: list[dict[str, Any]]
    seen: int

    def loss(self, weights: dict[str, Tensor], batch: int, trim: float = 0.0) -> Tensor:
        """Mean squared difference from the target with ``weights`` [out, in] of some linears, by name; differentiable in them.

        A share `trim` of the squares, the largest, is left out.
        """
        given = self.block.forward_with(weights, self.inputs[batch], self.kwargs[batch])
        squared = (widened(given) - widened(self.targets[batch])).square()
        if trim:
            squared = squared.flatten().topk(squared.numel() - int(trim * squared.numel()), largest=False, sorted=False).values
        return squared.mean()

    def tokens(self) -> dict[str, int]:
        """How many tokens each linear of an expert sees, by name; every other linear sees all."""
        counts: dict[str, int] = {}
        for stage in self.block.layout.stages:
            if stage.name in (EXPERTS_IN, EXPERTS_OUT):
                by_expert = self._tokens_of_experts()
                counts |= {linear.name: by_expert.get(group.expert, 0) for group in stage.groups for linear in group.linears}
        return counts

    def _tokens_of_experts(self) -> dict[int | None, int]:
        counts: dict[int | None, int] = {}

        def record(expert: int, token: Tensor, inputs: Tensor) -> None:
            counts[expert] = counts.get(expert, 0) + len(token)

        with self.block.listening(record, after_gate=False), torch.no_grad():
            for hidden, kwargs in zip(self.inputs, self.kwargs, strict=True):
                with suppress(Reached):
                    self.block.forward(hidden, kwargs)
        return counts


def train(model: Model, samples: Samples, workspace: Workspace) -> Iterator[Trainable]:
    """Every unfinished block with what it is given and what it should give, in order."""
    with torch.no_grad():
        start, (now, before), kwargs = _begin(model, samples, workspace, 2)
    model.release()
    workspace.progress.blocks(start, len(model.blocks))
    for layout in model.blocks[start:]:
        of_block = [each[layout.index] for each in kwargs]
        with model.block(layout.index) as block:
            with torch.no_grad():
                block.advance(before, of_block)
            yield Trainable(block, now, before, of_block, samples.tokens)
            block.save(workspace.block_file(layout.index))
            if layout.index + 1 < len(model.blocks):
                with torch.no_grad():
                    block.advance(now, of_block)
                _keep(workspace, layout.index + 1, [now, before])
        workspace.progress.blocks(layout.index + 1, len(model.blocks))


@torch.no_grad()
def visit(model: Model, samples: Samples, workspace: Workspace, finish: Callable[[Block], None] = lambda _: None) -> Iterator[Probe]:
    """Every unfinished block with what it is given, in order; what the next one is given is what it gives once the receiver is done with it.

    `finish` changes the block after that, so that the next one does not see it.
    """
    start, (hidden,), kwargs = _begin(model, samples, workspace, 1)
    members = [batch.members for batch in samples.batches()]
    model.release()
    workspace.progress.blocks(start, len(model.blocks))
    for layout in model.blocks[start:]:
        of_block = [each[layout.index] for each in kwargs]
        with model.block(layout.index) as block:
            yield Probe(block, hidden, of_block, members)
            last = layout.index + 1 == len(model.blocks)
            if not last:
                block.advance(hidden, of_block)
            finish(block)
            block.save(workspace.block_file(layout.index))
            if not last:
                _keep(workspace, layout.index + 1, [hidden])
        workspace.progress.blocks(layout.index + 1, len(model.blocks))


@torch.no_grad()
def look(model: Model, samples: Samples, progress: Progress, without: Collection[int] = ()) -> Iterator[Probe]:
    """Every block but those `without` which it is to be looked at, with what it is given, in order.

    Nothing is kept on disk, so a killed run looks again. What a block gives is the next one's `Probe.hidden`, after the last in the same list.
    """
    hidden, kwargs = model.embed_all(batch.inputs for batch in samples.batches())
    members = [batch.members for batch in samples.batches()]
    model.release()
    for layout in model.blocks:
        if layout.index not in without:
            of_block = [each[layout.index] for each in kwargs]
            with model.block(layout.index) as block:
                yield Probe(block, hidden, of_block, members)
                block.advance(hidden, of_block)
        progress.blocks(layout.index + 1, len(model.blocks))


def _begin(model: Model, samples: Samples, workspace: Workspace, streams: int) -> tuple[int, list[list[Tensor]], list[list[dict[str, Any]]]]:
    """The first unfinished block, what it is given in each of so many `streams`, and the keyword arguments of all blocks."""
    hidden, kwargs = model.embed_all(batch.inputs for batch in samples.batches())
    if not workspace.activations.exists():
        return 0, [list(hidden) for _ in range(streams)], kwargs
    tensors, metadata = read_header(workspace.activations)
    start = int(metadata["block"])
    if workspace.block_file(len(model.blocks) - 1).exists():
        start = len(model.blocks)
    kept = [[read_tensor(tensors[f"{stream}.{index}"]).to(model.device) for index in range(len(hidden))] for stream in range(streams)]
    return start, kept, kwargs


def _keep(workspace: Workspace, block: int, streams: list[list[Tensor]]) -> None:
    """Put on disk what `block` is given; a run killed from here on starts there."""
    entries = [entry(f"{stream}.{index}", each) for stream, hidden in enumerate(streams) for index, each in enumerate(hidden)]
    write_state(workspace.activations, entries, {"block": str(block)})


def _turns(groups: tuple[Group, ...]) -> Iterator[tuple[Group, ...]]:
    """As many groups at a time as their statistics fit into memory, all of one shape."""
    start = 0
    while start < len(groups):
        room = max(1, STATISTICS_BYTES // (4 * groups[start].columns ** 2))
        yield groups[start : start + room]
        start += room


def _measure(block: Block, stage: Stage, groups: tuple[Group, ...], replay: Replay, moment: SecondMoment, moved: Drift | None) -> Callable[[], None]:
    """Run all data through the block up to where `groups` read their input. Returns what to call once they are final."""
    if stage.name not in (EXPERTS_IN, EXPERTS_OUT):

        def note(inputs: Tensor) -> None:
            moment.add(0, inputs)
            if moved:
                moved.add(replay.batch, inputs, replay.hidden[replay.batch])

        with moved.following(block, groups[0].linears[0].name, groups[0].columns, moment.total.device) if moved else nullcontext():
            return replay.measure(block, groups[0], note)
    member = {group.expert: index for index, group in enumerate(groups)}

    def record(expert: int, token: Tensor, inputs: Tensor) -> None:
        if expert in member:
            moment.add(member[expert], inputs)

    with block.listening(record, after_gate=stage.name == EXPERTS_OUT):
        replay.run(block)
    return lambda: None
