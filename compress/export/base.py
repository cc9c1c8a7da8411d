"""What export targets have in common.

A target is one file beside this one. All have ``check`` and ``verdicts``, which need headers alone, and ``write``. Those that are ``READABLE`` are
layouts of artifacts: `compress` opens them, and they ``compare`` what lies on disk with what was meant. The others are made of a finished artifact,
from its codes and without calibration, for engines that read other layouts; their ``weights`` read a written folder by the rules of its layout and
nothing else, so that what it lost is measured rather than believed. Where these need the files beside the weights, such as the tokenizer's, they say
``FILES``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint import INDEX, Checkpoint, Entry, entry, read_entry, read_tensor, write_safetensors, write_text
from compress.errors import InputError, Problems
from compress.layout import Layout
from compress.scheme import CacheScheme, Caching, Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from compress.model import Model

MOST = 1e-2
"""Relative squared error of a weight that no rounding of scales explains: beyond it the writer or the reader is wrong."""


def refuse(place: str, target: str, layout: Layout, plan: dict[str, Scheme], cache: Caching | None, problems: Problems) -> None:
    """Report what no layout but our own has a place for."""
    remedy = "choose compressed-tensors"
    if cache is not None or layout.latents or layout.cache_scales:
        what = "scales of an FP8 cache" if isinstance(cache, CacheScheme) or layout.cache_scales else "a cache of latents"
        problems.add(place, f"{target} has no place for {what}", f"leave out the pass that makes them, or {remedy}")
    if layout.of_blocks:
        problems.add(place, f"{target} has no place for blocks of different widths", remedy)
    if layout.uneven or layout.mapped:
        what = "experts of different widths" if layout.uneven else "routers with maps"
        problems.add(place, f"{target} has no place for {what}", remedy)
    if layout.factored:
        problems.add(place, f"{target} has no place for linears that are two of low rank", remedy)
    if beyond := sorted(plan.keys() & layout.outside.keys()):
        problems.add(place, f"{target} has no place for quantised linears outside the decoder blocks, such as {beyond[0]}", remedy)
    if any(scheme.residuals for scheme in plan.values()):
        problems.add(place, f"{target} has no place for residuals", f"leave out detach, or {remedy}")


def whole_numbers(place: str, target: str, plan: dict[str, Scheme], bits: Iterable[int], problems: Problems) -> None:
    """Report codes that are no integers of one of so many `bits`, or whose inputs are rounded."""
    if floats := sorted({scheme.format for scheme in plan.values()} - {"int"}):
        problems.add(place, f"{target} holds integers, not {', '.join(floats)}", "choose compressed-tensors")
    if any(scheme.activations != "none" for scheme in plan.values()):
        problems.add(place, f"{target} has no place for rounded inputs", "set activations: none, or choose compressed-tensors")
    if odd := sorted({scheme.bits for scheme in plan.values() if scheme.format == "int"} - set(bits)):
        problems.add(place, f"{target} holds {_listed(bits)} bits, not {_listed(odd)}", "choose other bits, or compressed-tensors")
    if not plan:
        problems.add(place, f"{target} holds quantised weights, and no linear is quantised", "export the checkpoint as it is")


def fills(place: str, target: str, layout: Layout, plan: dict[str, Scheme], problems: Problems, *, rows: int, columns: int) -> None:
    """Report linears whose codes would not fill their words: outputs and inputs must be multiples of ``rows`` and ``columns``."""
    odd = [name for name in plan if layout.all_linears[name].rows % rows or layout.all_linears[name].columns % columns]
    if odd:
        first = layout.all_linears[odd[0]]
        more = f" (and {len(odd) - 1} more)" if odd[1:] else ""
        what = f"{odd[0]}{more} is {first.rows} x {first.columns}; {target} takes multiples of {rows} x {columns}"
        problems.add(place, what, "leave it out of quantisation, or choose compressed-tensors")


def group_sizes(layout: Layout, plan: dict[str, Scheme]) -> dict[str, int]:
    """Inputs per scale by linear; -1 for one scale per output. A group that happens to be as wide as some linears, but not as all, is a group."""
    grouped = {scheme.group_size for name, scheme in plan.items() if scheme.group_size < layout.all_linears[name].columns}
    return {name: scheme.group_size if scheme.group_size in grouped else -1 for name, scheme in plan.items()}


def outside(layout: Layout) -> list[str]:
    """What lies beside the language model, by the last part of `Layout.towers`: what stands before it differs between engines."""
    return sorted(tower.rpartition(".")[2] for tower in layout.towers)


def by_block(model: Model) -> list[list[str]]:
    """Names of the tensors outside the blocks, then of those of each block."""
    found: dict[int, list[str]] = {index: [] for index in (-1, *(block.index for block in model.blocks))}
    prefix = model.layout.arch.blocks + "."
    for name in sorted(model.tensors):
        if not model.layout.dropped(name):
            found[int(name.removeprefix(prefix).partition(".")[0]) if name.startswith(prefix) else -1].append(name)
    return list(found.values())


def write_by_block(model: Model, made: Callable[[list[str]], Iterable[Entry]], folder: Path) -> None:
    """Write what `made` makes of the names of tensors outside the blocks, then of each block: a shard for each, no more than one of which is held."""
    weight_map: dict[str, str] = {}
    total = 0
    blocks = by_block(model)
    for number, names in enumerate(blocks, 1):
        entries = list(made(names))
        file = f"model-{number:05d}-of-{len(blocks):05d}.safetensors"
        write_safetensors(folder / file, entries, {"format": "pt"})
        weight_map |= {item.name: file for item in entries}
        total += sum(item.nbytes for item in entries)
    write_text(folder / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n")


def converted(model: Model, pack: Callable[[str], dict[str, Tensor]]) -> Callable[[list[str]], Iterator[Entry]]:
    """For `write_by_block`: what `pack` makes of each quantised linear, in place of its tensors; everything else as it is."""

    def made(names: list[str]) -> Iterator[Entry]:
        done = set()
        for name in names:
            linear, _, part = name.rpartition(".")
            if model.packed_as(linear) is None or part == "bias":
                yield model.final(name)
            elif linear not in done:
                done.add(linear)
                yield from (entry(packed, tensor) for packed, tensor in pack(linear).items())

    return made


def unpacked(model: Model, folder: Path, read: Callable[[Checkpoint, str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The weights of a folder that `converted` wrote: `read` gives those of quantised linears, [out, in] float32."""
    written = Checkpoint(folder)
    for name in model.tensors:
        linear, _, part = name.rpartition(".")
        if model.layout.dropped(name) or (model.packed_as(linear) and part != "bias"):
            continue
        if name in written.tensors:
            yield name, read_tensor(written.tensors[name])
    for linear in model.layout.linears:
        if model.packed_as(linear):
            yield f"{linear}.weight", read(written, linear)


def losses(model: Model, found: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
    """Relative squared error of every weight `found`, by name: zero where all its numbers in float32 are those that the artifact's codes mean.

    Raises `InputError` if a tensor is missing, if one was made up, or if one is far off: then the writer is wrong.
    """
    import torch

    wanted = {name for name in model.tensors if not model.layout.dropped(name) and not model.packed_as(name.rpartition(".")[0])}
    wanted |= {name for name in model.tensors if name.endswith(".bias")}
    wanted |= {f"{linear}.weight" for linear in model.layout.linears}
    errors: dict[str, float] = {}
    for name, tensor in found:
        weight = model.quantized(name.removesuffix(".weight")) if name.endswith(".weight") else None
        meant = (weight.dequantize(torch.float32) if weight else read_entry(model.final(name))).float()
        if tensor.shape != meant.shape:
            raise InputError.one(name, f"was written as {list(tensor.shape)} in place of {list(meant.shape)}", "report this")
        if not bool(meant.isfinite().all()):
            raise InputError.one(name, "holds NaN or infinity", "the artifact is damaged; fetch it again")
        energy = float(meant.double().square().sum())
        off = float((tensor.double() - meant.double()).square().sum())
        errors[name] = 0.0 if torch.equal(tensor.float(), meant) else max(off, torch.finfo(torch.float64).tiny) / (energy or 1.0)
        if not errors[name] <= MOST:
            raise InputError.one(name, f"reads back differently from what the artifact means (off by {errors[name]:.1e})", "report this")
    if errors.keys() != wanted:
        raise InputError.one(model.checkpoint.folder.name, f"tensors differ from those meant: {sorted(errors.keys() ^ wanted)[:3]}", "report this")
    return errors


def settings(model: Model, quantization: dict[str, Any]) -> dict[str, Any]:
    """config.json of the model with this `quantization_config` in place of its own."""
    return {key: value for key, value in model.config.items() if key != "quantization_config"} | {"quantization_config": quantization}


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
