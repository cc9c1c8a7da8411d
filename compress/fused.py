"""Experts that a checkpoint holds in two 3-D tensors, seen as if each had tensors of its own, and put together again.

A checkpoint has either ``{prefix}.{expert}.{linear}.weight``, or what transformers holds in memory: ``{prefix}.gate_up_proj`` and
``{prefix}.down_proj``, with experts as the first dimension, and perhaps biases. Everything else in this program knows the first form only. A
view of an expert is a range of bytes, with strides where outputs do not come one row after the other; nothing is read to make it.

Those of gpt-oss are published in MXFP4: ``{prefix}.gate_up_proj_blocks`` uint8 [experts, out, in/32, 16] and ``.._scales`` uint8
[experts, out, in/32], never transposed. An expert of them is seen as `compress.formats.mxfp4_pack_quantized` stores a linear.
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
PACKED = {"_blocks": "weight_packed", "_scales": "weight_scale"}
"""What the tensors of experts in MXFP4 hold of a linear, by what follows their name."""


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
    """What the tensor of all experts of this name holds of each, by name on disk behind the number of the expert."""
    whole, kind = _parted(tensor)
    part = {"": "weight", BIAS: "bias", **PACKED}[kind]
    if kind in PACKED:
        table = replace(table, transposed=False)
    if whole == LAST:
        return {f"{table.down}.{part}": Member(table, None)}
    return {f"{table.gate}.{part}": Member(table, 0), f"{table.up}.{part}": Member(table, 1)}


def names(table: Experts, *, packed: bool = False) -> tuple[str, ...]:
    """The tensors that hold all experts of a block, as transformers calls them, with weights `packed` in MXFP4 or not."""
    weights = [whole + kind for whole in (BOTH, LAST) for kind in PACKED] if packed else [BOTH, LAST]
    return (*weights, *((BOTH + BIAS, LAST + BIAS) if table.biased else ()))


def _parted(tensor: str) -> tuple[str, str]:
    """`BOTH` or `LAST`, and what follows it."""
    whole = LAST if tensor.startswith(LAST) else BOTH
    return whole, tensor.removeprefix(whole)


def apart(tensors: Mapping[str, TensorInfo], arch: Arch, hidden: object, problems: Problems) -> dict[str, TensorInfo]:
    """`tensors` with those of each expert in place of those of all; ``hidden`` is what the config says of the channels of the residual stream."""
    table = arch.experts
    if table is None:
        return dict(tensors)
    known = dict.fromkeys((*names(table), *(names(table, packed=True) if table.mxfp4 else ())))
    fused = re.compile(rf"({re.escape(arch.blocks)}\.\d+\.{re.escape(table.prefix)})\.({'|'.join(known)})")
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
    whole, kind = _parted(tensor)
    if kind in PACKED:
        return _mispacked(whole, kind, info, hidden)
    wanted = 2 if kind == BIAS else 3
    if len(info.shape) != wanted or not all(info.shape):
        return f"is {list(info.shape)}, not of {wanted} dimensions"
    last = whole == LAST
    # Where outputs are counted differs from where inputs are; the residual stream is the input of the first and the output of the last.
    outputs = -1 if table.transposed or wanted == 2 else -2
    stream = outputs if last else -3 - outputs
    if (wanted == 3 or last) and info.shape[stream] != hidden:
        return f"is {list(info.shape)}, where dimension {stream % wanted} must be the {hidden} channels of the residual stream"
    return f"is {list(info.shape)}, where half of dimension {outputs % wanted} must be gates" if not last and info.shape[outputs] % 2 else None


def _mispacked(whole: str, kind: str, info: TensorInfo, hidden: object) -> str | None:
    """The same of a tensor in MXFP4."""
    blocks = kind == "_blocks"
    if info.dtype != "U8" or len(info.shape) != 3 + blocks or not all(info.shape) or (blocks and info.shape[3] != 16):
        return f"is {info.dtype} {list(info.shape)}, where bytes [experts, outputs, inputs/32{', 16' if blocks else ''}] must be"
    stream, what = (info.shape[1], "outputs") if whole == LAST else (32 * info.shape[2], "inputs")
    if stream != hidden:
        return f"is {list(info.shape)}, where {what} must be the {hidden} channels of the residual stream"
    return f"is {list(info.shape)}, where half of dimension 1 must be gates" if whole == BOTH and info.shape[1] % 2 else None


def _views(table: Experts, tensor: str, info: TensorInfo) -> Iterator[tuple[str, TensorInfo]]:
    # The bytes of an output's blocks lie one after the other.
    width, of_expert = DTYPE_BYTES[info.dtype], (*info.shape[1:2], math.prod(info.shape[2:4])) if len(info.shape) == 4 else info.shape[1:]
    for local, member in members(table, tensor).items():
        shape, strides, offset = member.strided(of_expert)
        extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        contiguous = extent == math.prod(shape) and list(strides) == sorted(strides, reverse=True)
        for expert in range(info.shape[0]):
            begin = info.begin + width * (expert * math.prod(of_expert) + offset)
            name = f"{expert}.{local}"
            yield name, replace(info, name=name, shape=shape, begin=begin, end=begin + width * extent, strides=None if contiguous else strides)


def joined(table: Experts, tensor: str, parts: Sequence[Tensor]) -> Tensor:
    """What the tensor of this name holds of one expert that has ``parts``, as many as `members` and in that order."""
    import torch

    _, kind = _parted(tensor)
    whole = parts[0] if len(parts) == 1 else torch.stack(tuple(parts), 1).flatten(0, 1) if table.interleaved else torch.cat(tuple(parts))
    if kind in PACKED:
        return whole.view(len(whole), -1, 16) if kind == "_blocks" else whole
    return whole.T if table.transposed and whole.ndim == 2 else whole
