"""Experts that a checkpoint holds in two 3-D tensors, seen as if each had tensors of its own, and put together again.

A checkpoint has either ``{prefix}.{expert}.{linear}.weight``, or what transformers holds in memory: ``{prefix}.gate_up_proj`` and
``{prefix}.down_proj``, with experts as the first dimension, and perhaps biases. Everything else in this program knows the first form only. A
view of an expert is a range of bytes, with strides where outputs do not come one row after the other; nothing is read to make it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from compress.arch.base import Arch, Experts
from compress.checkpoint import DTYPE_BYTES, TensorInfo
from compress.errors import Problems

if TYPE_CHECKING:
    from torch import Tensor

BOTH, LAST = "gate_up_proj", "down_proj"
BIAS = "_bias"


@dataclass(frozen=True)
class Member:
    """One of the matrices that a 3-D tensor holds for an expert, or the vector that a 2-D tensor of biases does.

    ``half`` is 0 for the gate and 1 for what is multiplied with it, None where the whole is one matrix.
    """

    table: Experts
    half: int | None

    def strided(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """Shape, strides and offset in elements of the member in a contiguous tensor of one expert: [out, in], or [out] of biases."""
        strides = (shape[-1], 1)[-len(shape) :]
        if self.table.transposed:
            shape, strides = shape[::-1], strides[::-1]
        if self.half is None:
            return shape, strides, 0
        outputs = shape[0] // 2
        step, start = (2, self.half) if self.table.interleaved else (1, self.half * outputs)
        return (outputs, *shape[1:]), (step * strides[0], *strides[1:]), start * strides[0]

    def view(self, expert: Tensor) -> Tensor:
        """The member in ``expert``, the tensor of one expert."""
        outputs = expert.T if self.table.transposed and expert.ndim == 2 else expert
        if self.half is None:
            return outputs
        return outputs[self.half :: 2] if self.table.interleaved else outputs.chunk(2)[self.half]


def members(table: Experts, tensor: str) -> dict[str, Member]:
    """What the tensor of experts of this name in memory holds of each, by name on disk behind the number of the expert."""
    part = "bias" if tensor.endswith(BIAS) else "weight"
    if tensor.removesuffix(BIAS) == LAST:
        return {f"{table.down}.{part}": Member(table, None)}
    return {f"{table.gate}.{part}": Member(table, 0), f"{table.up}.{part}": Member(table, 1)}


def names(table: Experts) -> tuple[str, ...]:
    """The tensors that hold all experts of a block, as transformers calls them."""
    return (BOTH, LAST, BOTH + BIAS, LAST + BIAS) if table.biased else (BOTH, LAST)


def apart(tensors: Mapping[str, TensorInfo], arch: Arch, hidden: object, problems: Problems) -> dict[str, TensorInfo]:
    """`tensors` with those of each expert in place of those of all; ``hidden`` is what the config says of the channels of the residual stream."""
    table = arch.experts
    if table is None:
        return dict(tensors)
    fused = re.compile(rf"({re.escape(arch.blocks)}\.\d+\.{re.escape(table.prefix)})\.({'|'.join(names(table))})")
    found: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        if not (match := fused.fullmatch(name)):
            found[name] = info
        elif wrong := _misshapen(table, match[2], info, hidden):
            problems.add(name, wrong, "save the checkpoint with one tensor per expert")
        else:
            views = {f"{match[1]}.{local}": view for local, view in _views(table, match[2], info)}
            if twice := next((view for view in views if view in tensors), None):
                problems.add(name, f"holds what {twice} holds too", "fetch the checkpoint again")
            found |= views
    return found


def _misshapen(table: Experts, tensor: str, info: TensorInfo, hidden: object) -> str | None:
    """Why a tensor is not laid out as the table says, or None if it may be."""
    wanted = 2 if tensor.endswith(BIAS) else 3
    if len(info.shape) != wanted or not all(info.shape):
        return f"is {list(info.shape)}, not of {wanted} dimensions"
    last = tensor.removesuffix(BIAS) == LAST
    # Where outputs are counted differs from where inputs are; the residual stream is the input of the first and the output of the last.
    outputs = -1 if table.transposed or wanted == 2 else -2
    stream = outputs if last else -3 - outputs
    if (wanted == 3 or last) and info.shape[stream] != hidden:
        return f"is {list(info.shape)}, where dimension {stream % wanted} must be the {hidden} channels of the residual stream"
    return f"is {list(info.shape)}, where half of dimension {outputs % wanted} must be gates" if not last and info.shape[outputs] % 2 else None


def _views(table: Experts, tensor: str, info: TensorInfo) -> Iterator[tuple[str, TensorInfo]]:
    width, of_expert = DTYPE_BYTES[info.dtype], info.shape[1:]
    for local, member in members(table, tensor).items():
        shape, strides, offset = member.strided(of_expert)
        extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        contiguous = extent == math.prod(shape) and list(strides) == sorted(strides, reverse=True)
        for expert in range(info.shape[0]):
            begin = info.begin + width * (expert * math.prod(of_expert) + offset)
            name = f"{expert}.{local}"
            yield name, replace(info, name=name, shape=shape, begin=begin, end=begin + width * extent, strides=None if contiguous else strides)


def joined(table: Experts, parts: Sequence[Tensor]) -> Tensor:
    """The tensor of one expert that holds ``parts``, of which there are as many as `members`, in that order."""
    import torch

    whole = parts[0] if len(parts) == 1 else torch.stack(tuple(parts), 1).flatten(0, 1) if table.interleaved else torch.cat(tuple(parts))
    return whole.T if table.transposed and whole.ndim == 2 else whole
