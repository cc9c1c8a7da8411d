"""A checkpoint that parts have been taken out of: smaller tensors or fewer blocks, and a config that fits them.

What comes out is a checkpoint like any other. Passes that follow, exports and engines see nothing but that, and where all blocks have equal
widths, any engine loads it.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.arch.base import Unit
from compress.checkpoint import PER_LAYER, UNEVEN, Checkpoint, TensorInfo
from compress.layout import MAP, BlockLayout, Layout, Units


def taken_from(units: Units, kept: Tensor, scale: Tensor | None, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is left of the tensors of ``units`` when only those at the indices ``kept`` [n] int64 stay, each read times ``scale`` [n].

    ``tensors`` are the weights [rows, columns] and biases [rows] of its linears, by name; the order of what stays does not change.
    """
    left = {}
    for linear in units.rows:
        for name in (f"{linear}.weight", f"{linear}.bias"):
            if name in tensors:
                left[name] = _runs(tensors[name], units)[kept].flatten(0, 1)
    name = f"{units.columns}.weight"
    columns = _runs(tensors[name].T, units)[kept]
    left[name] = (columns if scale is None else columns * scale[:, None, None]).flatten(0, 1).T
    return left


def made_up(
    units: Units, kept: Tensor, mean: Tensor, tensors: Mapping[str, Tensor], together: Iterable[str], left: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Biases [rows] of the linears `together`, of which the one that reads ``units`` gets what those not ``kept`` gave on average.

    ``mean`` [columns] is that of its inputs, ``tensors`` are weights and biases before, ``left`` those after (arXiv 2312.11983 section 3.4). The
    others get zeros where they had none.
    """
    removed = torch.ones(units.count, dtype=torch.bool, device=mean.device)
    removed[kept] = False
    weight = tensors[f"{units.columns}.weight"]
    lost = weight @ (mean * removed.repeat_interleave(len(mean) // units.count)).to(weight.dtype)
    found = {}
    for linear in together:
        name = f"{linear}.bias"
        rows = left.get(f"{linear}.weight", tensors.get(f"{linear}.weight"))
        assert rows is not None
        found[name] = left.get(name, tensors.get(name, rows.new_zeros(len(rows))))
        if linear == units.columns:
            found[name] = found[name] + lost
    return found


def _runs(tensor: Tensor, units: Units) -> Tensor:
    """[rows, ...] as [units, run, ...]."""
    return tensor.reshape(units.count, -1, *tensor.shape[1:])


def parameters(layout: Layout, units: Units) -> int:
    """How many parameters one of ``units`` has."""
    tensors = layout.checkpoint.tensors
    names = [f"{linear}.{part}" for linear in units.rows for part in ("weight", "bias")] + [f"{units.columns}.weight"]
    return sum(torch.Size(tensors[name].shape).numel() for name in names if name in tensors) // units.count


def biases(layout: Layout, columns: Collection[str]) -> dict[str, list[str]]:
    """By linear among `columns` that may be given a bias: all linears, itself too, that then have one, since the config says so of all of them."""
    found: dict[str, list[str]] = {}
    for block in layout.blocks:
        for _, locals_ in layout.arch.biases:
            together = [name for local in locals_ if (name := f"{block.prefix}.{local}") in layout.linears]
            found |= {name: together for name in together if name in columns}
    return found


def narrowed(layout: Layout, counts: Mapping[str, int], biased: Collection[str] = ()) -> dict[str, TensorInfo]:
    """What the tensors of units will be when of those of each name so many are left, and all linears in `biased` have a bias.

    There is nothing to read yet where they say they lie.
    """
    tensors = layout.checkpoint.tensors
    missing = [linear for linear in biased if f"{linear}.bias" not in tensors]
    found = {f"{linear}.bias": _of_shape(tensors[f"{linear}.weight"], tensors[f"{linear}.weight"].shape[:1]) for linear in missing}
    for block in layout.blocks:
        for units in block.units:
            if (count := counts.get(units.name, units.count)) == units.count:
                continue
            for linear, axis in [*((linear, 0) for linear in units.rows), (units.columns, 1)]:
                for name in (f"{linear}.weight", f"{linear}.bias")[: 2 - axis]:
                    if (info := found.get(name, tensors.get(name))) is not None:
                        found[name] = _of_shape(info, [size * count // units.count if at == axis else size for at, size in enumerate(info.shape)])
    return found


def _of_shape(info: TensorInfo, shape: Iterable[int]) -> TensorInfo:
    shape = tuple(shape)
    width = info.nbytes // max(1, torch.Size(info.shape).numel())
    return replace(info, shape=shape, file=Path(), begin=0, end=width * torch.Size(shape).numel(), strides=None)


def reshaped(layout: Layout, tensors: Mapping[str, TensorInfo]) -> Layout:
    """The layout with `tensors` in place of those of the same names, and in its config the widths that they have."""
    checkpoint = layout.checkpoint
    config, text = _copy_of_config(layout)
    merged = checkpoint.tensors | dict(tensors)
    declared: dict[int, dict[str, Any]] = {index: dict(changes) for index, changes in layout.of_blocks.items()}
    for unit in layout.arch.units:
        counts = {block.index: count for block in layout.blocks if (count := _count(block, unit.kind, checkpoint, merged)) is not None}
        if any(len(widths) > 1 for block in layout.blocks if (widths := set(_counts(block, unit.kind, checkpoint, merged)))):
            text[UNEVEN] = True
            counts = dict.fromkeys(counts, max(max(_counts(block, unit.kind, checkpoint, merged), default=0) for block in layout.blocks))
        if all(count == layout.setting(unit.count, index) for index, count in counts.items()):
            continue
        sole = set(counts.values())
        if len(sole) == 1 and _may_be_for_all(layout, unit, *sole):  # blocks that have none of the kind do not ask
            text[unit.count] = next(iter(counts.values()))
            counts = {}
        for index in range(len(layout.blocks)):
            declared.setdefault(index, {}).pop(unit.count, None)
            if index in counts and counts[index] != text.get(unit.count):
                declared[index][unit.count] = counts[index]
        if unit.heads and layout.head_dim:
            text["head_dim"] = layout.head_dim  # otherwise it would be worked out from the number of heads
    for key, locals_ in layout.arch.biases:
        if any(f"{block.prefix}.{local}.bias" in tensors for block in layout.blocks for local in locals_):
            text[key] = True
    _declare(text, declared, len(layout.blocks))
    return Layout(checkpoint.altered(merged, config))


def _may_be_for_all(layout: Layout, unit: Unit, count: int) -> bool:
    """Whether transformers takes a config that says so of all blocks."""
    return not (layout.arch.whole_heads and unit.count == "num_attention_heads" and layout.text_config["hidden_size"] % count)


def _count(block: BlockLayout, kind: str, before: Checkpoint, now: Mapping[str, TensorInfo]) -> int | None:
    """How many units of a kind a block is left with, by the shape of their rows; None if it has none of the kind."""
    return next(_counts(block, kind, before, now), None)


def _counts(block: BlockLayout, kind: str, before: Checkpoint, now: Mapping[str, TensorInfo]) -> Iterator[int]:
    """The same of each expert of the block."""
    for units in block.units:
        if units.kind == kind:
            name = f"{units.rows[-1]}.weight"
            yield now[name].shape[0] * units.count // before.tensors[name].shape[0]


def without_blocks(layout: Layout, dropped: Collection[int]) -> Layout:
    """The layout without some blocks; those behind them move up."""
    kept = [block for block in layout.blocks if block.index not in dropped]
    moved = {block.index: index for index, block in enumerate(kept)}
    config, text = _copy_of_config(layout)
    for key, value in text.items():
        if key == "mlp_only_layers" and isinstance(value, list):
            text[key] = [moved[index] for index in value if index in moved]
        elif isinstance(value, list) and len(value) == len(layout.blocks):
            text[key] = [value[block.index] for block in kept]
    for key in ("max_window_layers", "first_k_dense_replace"):
        if isinstance(first := text.get(key), int):
            text[key] = sum(block.index < first for block in kept)
    if text.get("decoder_sparse_step", 1) != 1:  # counts through all blocks which of them have experts
        text |= {"decoder_sparse_step": 1, "mlp_only_layers": [moved[block.index] for block in kept if not block.experts]}
    text["num_hidden_layers"] = len(kept)
    _declare(text, {moved[index]: changes for index, changes in layout.of_blocks.items() if index in moved}, len(kept))
    tensors = {name: info for name, info in layout.checkpoint.tensors.items() if not name.startswith(f"{layout.arch.blocks}.")}
    for block in kept:
        prefix = f"{layout.arch.blocks}.{moved[block.index]}"
        tensors |= {prefix + name.removeprefix(block.prefix): layout.checkpoint.tensors[name] for name in block.tensors}
    return Layout(layout.checkpoint.altered(tensors, config))


def fewer_experts(layout: Layout, kept: Mapping[int, Sequence[int]], active: int | None, tensors: Mapping[str, TensorInfo]) -> Layout:
    """The layout with the experts ``kept`` by block, as many in each, which are counted through anew; `active` of them serve a token.

    `tensors` take the place of those of the same names, experts by their old number.
    """
    table = layout.arch.experts
    assert table
    config, text = _copy_of_config(layout)
    for key in [key for key in table.counts if key in text] or table.counts[:1]:
        text[key] = len(next(iter(kept.values())))
    if active is not None:
        text[table.active] = active
    numbers = {
        f"{block.prefix}.{table.prefix}.{old}": f"{block.prefix}.{table.prefix}.{new}"
        for block in layout.blocks
        for new, old in enumerate(kept.get(block.index, ()))
    }
    gone = {f"{block.prefix}.{table.prefix}.{old}" for block in layout.blocks if block.index in kept for old in block.experts} - numbers.keys()
    left = {}
    for name, info in (layout.checkpoint.tensors | dict(tensors)).items():
        expert = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[0]
        if expert not in gone:
            left[numbers.get(expert, expert) + name.removeprefix(expert)] = info
    return Layout(layout.checkpoint.altered(left, config))


def routers(layout: Layout, count: int) -> dict[str, TensorInfo]:
    """What has a row for each expert, once there are so many. There is nothing to read yet where they say they lie."""
    table = layout.arch.experts
    assert table
    starts = tuple(f"{block.prefix}.{table.router}." for block in layout.blocks if block.experts)
    return {name: _of_shape(info, (count, *info.shape[1:])) for name, info in layout.checkpoint.tensors.items() if name.startswith(starts)}


def maps(layout: Layout, count: int) -> dict[str, TensorInfo]:
    """The maps of routers to so many experts. There is nothing to read yet where they say they lie."""
    table = layout.arch.experts
    assert table
    names = {f"{block.prefix}.{table.router}": len(block.experts) for block in layout.blocks if block.experts}
    return {f"{name}.{MAP}": TensorInfo(f"{name}.{MAP}", "F32", (count, experts), Path(), 0, 4 * count * experts) for name, experts in names.items()}


def in_two(layout: Layout, ranks: Mapping[str, int]) -> dict[str, TensorInfo]:
    """What the factors of linears will be, by rank and name. There is nothing to read yet where they say they lie."""
    found: dict[str, TensorInfo] = {}
    for name, rank in ranks.items():
        info, linear = layout.checkpoint.tensors[f"{name}.weight"], layout.linears[name]
        found[f"{name}.0.weight"] = _of_shape(info, (rank, linear.columns))
        found[f"{name}.1.weight"] = _of_shape(info, (linear.rows, rank))
    return found


def with_factors(layout: Layout, tensors: Mapping[str, TensorInfo]) -> Layout:
    """The layout with `tensors` in place of those of the same names. Where they are factors, the whole goes and its bias is the second's."""
    pairs = {name.removesuffix(".0.weight") for name in tensors if name.endswith(".0.weight")}
    biases = {f"{name}.bias": f"{name}.1.bias" for name in pairs}
    wholes = {f"{name}.weight" for name in pairs}
    kept = {biases.get(name, name): info for name, info in layout.checkpoint.tensors.items() if name not in wholes}
    return Layout(layout.checkpoint.altered(kept | dict(tensors), layout.checkpoint.config))


def unmade(layout: Layout, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, TensorInfo]:
    """What tensors will be, by name, in the dtype of a known one and of a shape. There is nothing to read yet where they say they lie."""
    return {name: _of_shape(layout.checkpoint.tensors[like], shape) for name, (like, shape) in shapes.items()}


def with_attention(layout: Layout, tensors: Mapping[str, TensorInfo], gone: Collection[str], config: dict[str, Any]) -> Layout:
    """The layout of another architecture, as `config` says: with `tensors`, and without the linears `gone` of each block, by local name."""
    lost = {f"{block.prefix}.{local}.weight" for block in layout.blocks for local in gone}
    kept = {name: info for name, info in layout.checkpoint.tensors.items() if name not in lost}
    return Layout(layout.checkpoint.altered(kept | dict(tensors), config))


def _copy_of_config(layout: Layout) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config and the part of it that the blocks go by, to be changed."""
    config = copy.deepcopy(layout.checkpoint.config)
    return config, config[layout.arch.text_config] if layout.arch.text_config else config


def _declare(text: dict[str, Any], of_blocks: dict[int, dict[str, Any]], count: int) -> None:
    text.pop(PER_LAYER, None)
    if differing := {str(index).zfill(len(str(count - 1))): changes for index, changes in sorted(of_blocks.items()) if changes}:
        text[PER_LAYER] = differing
