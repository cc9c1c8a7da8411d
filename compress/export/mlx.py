"""A finished artifact in MLX's layout, for mlx-lm on Apple silicon and on CPUs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint import Checkpoint, Entry, entry, write_text
from compress.errors import Problems
from compress.export import base
from compress.layout import Layout
from compress.scheme import Caching, Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from compress.model import Model

READABLE = False
FILES = True
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (128, 64, 32)
"""Those that its kernels know. A group of ours may be several of theirs."""
MULTIPLE = 32
"""Of the inputs of a linear, so that codes fill their words."""
KINDS = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "qwen2_moe", "olmoe")
"""Model types whose names in mlx-lm are known here."""
EXPERTS = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj", "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
"""What mlx-lm calls the linears of an expert."""


def check(place: str, layout: Layout, plan: dict[str, Scheme], problems: Problems) -> None:
    """Report what this layout or its reader cannot express."""
    base.whole_numbers(place, "mlx", plan, BITS, problems)
    base.fills(place, "mlx", layout, plan, problems, rows=1, columns=MULTIPLE)
    if layout.arch.model_type not in KINDS:
        problems.add(place, f"how mlx-lm calls the parts of a {layout.arch.model_type} is not known here", f"known are {', '.join(KINDS)}")
    if odd := sorted({scheme.group_size for scheme in plan.values() if all(scheme.group_size % size for size in GROUP_SIZES)}):
        problems.add(
            place, f"mlx knows groups of {', '.join(map(str, GROUP_SIZES[::-1]))} and their multiples, not {odd}", "choose another group_size"
        )
    for block in layout.blocks:
        for role in {name.rpartition(".")[2] for name in layout.of_experts}:
            found = {plan.get(name) for name in layout.of_experts if name.startswith(f"{block.prefix}.") and name.endswith(f".{role}")}
            if len(found) > 1:
                problems.add(place, f"mlx holds the experts of {block.prefix} in one tensor, but they get different schemes", "treat them alike")


def verdicts(layout: Layout, plan: dict[str, Scheme], cache: Caching | None = None) -> dict[str, str]:
    """For each engine, whether and how it reads the folder."""
    return {"MLX": "loads"}


def write(model: Model, plan: dict[str, Scheme], cache: Caching | None, folder: Path) -> None:
    """Write weights, a shard for each block, and config.json into `folder`."""
    from compress.formats import mlx

    def pack(linear: str) -> dict[str, Tensor]:
        weight = model.quantized(linear)
        assert weight
        return mlx.pack(linear, weight, _size(plan[linear]))

    made = base.converted(model, pack)
    base.write_by_block(model, lambda names: _stacked(model.layout, list(made(names))), folder)
    kinds = {_called(model.layout, name): (scheme.bits, _size(scheme)) for name, scheme in plan.items()}
    common = Counter(kinds.values()).most_common(1)[0][0]
    quantization: dict[str, Any] = _told(common) | {name: _told(kind) for name, kind in sorted(kinds.items()) if kind != common}
    config = base.settings(model, quantization) | {"quantization": quantization}
    write_text(folder / "config.json", json.dumps(_spelled_out(config), indent=2) + "\n")


def weights(model: Model, plan: dict[str, Scheme], folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every weight, as `folder` says it."""
    from compress.formats import mlx

    def read(written: Checkpoint, linear: str) -> Tensor:
        parts = {part: _read(model.layout, written, f"{linear}.{part}") for part in ("weight", "scales", "biases")}
        return mlx.unpack(linear, {f"{linear}.{part}": tensor for part, tensor in parts.items()}, plan[linear].bits, _size(plan[linear]))

    written = Checkpoint(folder)
    for name in model.tensors:
        if name.endswith(".weight") and name.removesuffix(".weight") in model.layout.of_experts and not model.packed_as(name.removesuffix(".weight")):
            yield name, _read(model.layout, written, name)
    yield from base.unpacked(model, folder, read)


def _spelled_out(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with what transformers 5 nests or renamed under the older keys too.

    Most models of mlx-lm read those alone, and where one is missing they fail or, for the base of rotation, take a default of their own silently
    (seen with 0.32.2).
    """
    rope = config.get("rope_parameters") or {}
    older: dict[str, Any] = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if "num_local_experts" in config:
        older["num_experts"] = config["num_local_experts"]
    inner = {"text_config": _spelled_out(config["text_config"])} if "text_config" in config else {}
    return older | config | inner


def _told(kind: tuple[int, int]) -> dict[str, Any]:
    return {"group_size": kind[1], "bits": kind[0], "mode": "affine"}


def _size(scheme: Scheme) -> int:
    """Inputs per scale in MLX."""
    return next(size for size in GROUP_SIZES if scheme.group_size % size == 0)


def _called(layout: Layout, linear: str) -> str:
    """What mlx-lm calls a linear: the experts of a block are one."""
    table = layout.arch.experts
    if table is None or linear not in layout.of_experts:
        return linear
    block = next(block.prefix for block in layout.blocks if linear.startswith(f"{block.prefix}."))
    parent = table.prefix.rpartition(".")[0]
    return f"{block}.{parent}.switch_mlp.{EXPERTS[linear.rpartition('.')[2]]}"


def _stacked(layout: Layout, entries: list[Entry]) -> list[Entry]:
    """What lies in a block, the experts' tensors put together in the order of their numbers."""
    import torch

    from compress.checkpoint import read_entry

    found: list[Entry] = []
    together: dict[str, dict[int, Entry]] = {}
    for item in entries:
        linear, _, part = item.name.rpartition(".")
        if linear in layout.of_experts:
            number = int(linear.rpartition(".")[0].rpartition(".")[2])
            together.setdefault(f"{_called(layout, linear)}.{part}", {})[number] = item
        else:
            found.append(item)
    for name, items in together.items():
        found.append(entry(name, torch.stack([read_entry(items[number]) for number in sorted(items)])))
    return found


def _read(layout: Layout, written: Checkpoint, name: str) -> Tensor:
    """A tensor of a linear, that of one expert out of those that lie together."""
    linear, _, part = name.rpartition(".")
    if linear not in layout.of_experts:
        return written.read(name)
    number = int(linear.rpartition(".")[0].rpartition(".")[2])
    return written.read(f"{_called(layout, linear)}.{part}")[number]
