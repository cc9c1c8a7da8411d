"""Pruned weights packed with their places: smaller on disk, for `compress` alone.

Everything else is as in `compressed-tensors`. Weights lie in a folder of their own, where no other engine looks: one that found them under names it
does not know would go on with random numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from compress.checkpoint import PACKED, Entry, entry, read_entry, write_text
from compress.errors import InputError, Problems
from compress.export import compressed_tensors
from compress.export.base import by_block, write_by_block
from compress.export.compressed_tensors import bits
from compress.formats.base import BRANCH_PARTS
from compress.layout import Layout
from compress.scheme import Caching, Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from compress.model import Model

__all__ = ["check", "compare", "verdicts", "write"]
READABLE = True
ALONE = "refuses: only compress reads nm-packed"


def check(place: str, layout: Layout, plan: dict[str, Scheme], problems: Problems) -> None:
    """Report what this layout cannot express."""
    if floats := sorted({scheme.format for scheme in plan.values()} - {"int"}):
        problems.add(place, f"nm-packed holds integers and weights that are not quantised, not {', '.join(floats)}", "choose compressed-tensors")
    if any(scheme.residuals for scheme in plan.values()):
        problems.add(place, "nm-packed has no place for residuals", "choose compressed-tensors, or leave out detach")


def verdicts(layout: Layout, plan: dict[str, Scheme], cache: Caching | None = None) -> dict[str, str]:
    """For each engine, whether and how it reads the artifact."""
    return {"compress": "loads"} | dict.fromkeys(("transformers", "vLLM", "SGLang"), ALONE)


def write(model: Model, plan: dict[str, Scheme], cache: Caching | None, folder: Path) -> None:
    """Write weights, a shard for each block and one for the rest, and config.json into `folder`; no more than a block is held."""
    (folder / PACKED).mkdir()
    write_by_block(model, partial(_entries, model), folder / PACKED)
    config = model.config
    config["quantization_config"] = compressed_tensors.quantization_config(model.layout, plan, cache) | {"quant_method": "compress"}
    config["quantization_config"]["weights"] = PACKED
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def _entries(model: Model, names: list[str]) -> Iterator[Entry]:
    """What becomes of the tensors called `names`."""
    for name in names:
        linear, _, part = name.rpartition(".")
        if linear not in model.patterns or part == "bias":
            yield model.final(name)
        elif part in ("weight", "weight_packed"):
            yield from (entry(packed, tensor) for packed, tensor in _packed(model, linear).items())
        elif part in ("input_scale", *BRANCH_PARTS):
            yield model.final(name)


def _packed(model: Model, linear: str) -> dict[str, Tensor]:
    """The tensors of a linear that was pruned."""
    from compress.formats import nm_packed

    pattern, codes = model.patterns[linear], model.quantized(linear)
    return (
        nm_packed.pack_dense(linear, read_entry(model.final(f"{linear}.weight")), pattern)
        if codes is None
        else nm_packed.pack(linear, codes, pattern)
    )


def compare(model: Model, folder: Path) -> int:
    """Compare every tensor of the artifact with what was meant, unpacked. Returns how many weights compressed-tensors unpacked: none.

    Raises `InputError` on the first difference: nothing may be handed over that differs.
    """
    import torch

    from compress.checkpoint import Checkpoint, read_tensor

    written = type(model)(Layout(Checkpoint(folder)))
    expected = {item.name for names in by_block(model) for item in _entries(model, names)}
    if set(written.tensors) != expected:
        raise InputError.one(str(folder), f"tensors differ from those meant: {sorted(set(written.tensors) ^ expected)[:3]}", "report this")
    for name in sorted(expected & model.tensors.keys()):
        found, meant = read_tensor(written.tensors[name]), read_entry(model.final(name))
        if not torch.equal(bits(found), bits(meant)):
            raise InputError.one(name, "reads back differently from what was written", "is the disk sound?")
    for linear in model.patterns:
        meant = model.dense(linear) if model.packed_as(linear) else read_entry(model.final(f"{linear}.weight"))
        if not torch.equal(written.dense(linear), meant):
            raise InputError.one(linear, "is unpacked to other values than those meant", "report this")
    return 0
