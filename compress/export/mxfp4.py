"""Experts in MXFP4 as gpt-oss is published: what transformers, vLLM and SGLang look for in a model of that type.

The experts of a block lie in two tensors of blocks and two of scales (`compress.fused`), everything else stays in the dtype of the source.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import fused
from compress.checkpoint import write_text
from compress.errors import InputError, Problems
from compress.export.compressed_tensors import bits, joined, of_experts, write_shards
from compress.layout import Layout
from compress.scheme import Caching, Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from compress.model import Model

__all__ = ["check", "compare", "verdicts", "write"]
READABLE = True
FORMAT = "mxfp4"


def check(place: str, layout: Layout, plan: dict[str, Scheme], problems: Problems) -> None:
    """Report what this layout cannot express."""
    table = layout.arch.experts
    if table is None or not table.mxfp4:
        problems.add(place, f"no engine looks for MXFP4 in a {layout.arch.model_type} under these names", "choose compressed-tensors")
        return
    if beside := sorted(plan.keys() - layout.of_experts):
        problems.add(place, f"mxfp4 holds quantised experts alone, not {beside[0]}", "set include: ['*.experts.*'], or choose compressed-tensors")
    if others := sorted({plan[name].format for name in plan.keys() & layout.of_experts} - {FORMAT}):
        problems.add(place, f"mxfp4 holds nothing in {', '.join(others)}", "set format: mxfp4, or choose compressed-tensors")
    if left := sorted(layout.of_experts - plan.keys()):
        what = f"mxfp4 holds the experts of all blocks or none, and {left[0]} is not quantised"
        problems.add(place, what, "quantise it too, or choose compressed-tensors")
    if any(scheme.residuals for scheme in plan.values()):
        problems.add(place, "mxfp4 has no place for residuals", "choose compressed-tensors, or leave out detach")
    if layout.wrapped_as or layout.of_blocks:
        problems.add(place, "mxfp4 is for engines that open no such linears or widths", "choose compressed-tensors")


def verdicts(layout: Layout, plan: dict[str, Scheme], cache: Caching | None = None) -> dict[str, str]:
    """For each engine, whether and how it reads the artifact."""
    ignored = "; ignores the scales of the cache" if cache else ""
    return {
        "compress": "loads",
        "transformers": f"loads{ignored}, decompresses while loading where there is no kernel",
        "vLLM": f"GPU only (unproven){ignored}",
        "SGLang": f"GPU only (unproven){ignored}",
    }


def write(model: Model, plan: dict[str, Scheme], cache: Caching | None, folder: Path) -> None:
    """Write weights and config.json into `folder`; no more than an expert is held."""
    table = model.layout.arch.experts
    assert table
    sparse = [block for block in model.blocks if block.experts]
    owners = {name for block in sparse for name in of_experts(block)}
    rest = [model.final(name) for name in model.tensors if name.rpartition(".")[0] not in owners and not model.layout.dropped(name)]
    write_shards(model, [*joined(model, table, sparse, fused.names(table, packed=True)), *rest], folder)
    config = model.config
    config["quantization_config"] = quantization_config(model.layout)
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def quantization_config(layout: Layout) -> dict[str, Any]:
    """As published: what is not converted is named by patterns."""
    arch = layout.arch
    kept = [f"{arch.blocks}.*.{arch.attention}", *(f"{arch.blocks}.*.{name}" for name in arch.unquantized), "model.embed_tokens", "lm_head"]
    return {"modules_to_not_convert": kept, "quant_method": FORMAT}


def compare(model: Model, folder: Path) -> int:
    """Compare every tensor of the artifact with what was meant, and the experts with what transformers itself unpacks.

    Returns how many weights were compared. Raises `InputError` on the first difference: nothing may be handed over that differs.
    """
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    from compress.checkpoint import Checkpoint, read_entry, read_tensor

    stored = Checkpoint(folder)
    written = Layout(stored).checkpoint
    expected = {name for name in model.tensors if not model.layout.dropped(name)}
    if set(written.tensors) != expected:
        raise InputError.one(str(folder), f"tensors differ from those meant: {sorted(set(written.tensors) ^ expected)[:3]}", "report this")
    for name in sorted(expected):
        if not torch.equal(bits(read_tensor(written.tensors[name])), bits(read_entry(model.final(name)))):
            raise InputError.one(name, "reads back differently from what was written", "is the disk sound?")
    table, compared = model.layout.arch.experts, 0
    assert table
    for block in model.blocks:
        for whole in (fused.BOTH, fused.LAST) if block.experts else ():
            name = f"{block.prefix}.{table.prefix}.{whole}"
            unpacked = convert_moe_packed_tensors(stored.read(f"{name}_blocks"), stored.read(f"{name}_scales"))
            for expert, tensor in enumerate(unpacked):
                for local, member in fused.members(table, whole).items():
                    linear = f"{block.prefix}.{table.prefix}.{expert}.{local}".removesuffix(".weight")
                    if not torch.equal(member.view(tensor).float(), _meant(model, linear)):
                        raise InputError.one(linear, "transformers unpacks other values than those meant", "report this")
                    compared += 1
    return compared


def _meant(model: Model, linear: str) -> Tensor:
    codes = model.quantized(linear)
    assert codes
    return codes.dequantize().float()
