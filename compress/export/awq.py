"""A finished artifact in AWQ's layout: for vLLM and SGLang, and for GPTQModel and through it for transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from compress.checkpoint import Checkpoint, write_text
from compress.errors import Problems
from compress.export import base
from compress.layout import Layout
from compress.scheme import Caching, Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from compress.model import Model

READABLE = False
FILES = True
PER_WORD = 8


def check(place: str, layout: Layout, plan: dict[str, Scheme], problems: Problems) -> None:
    """Report what this layout or its readers cannot express."""
    base.whole_numbers(place, "awq", plan, (4,), problems)
    base.fills(place, "awq", layout, plan, problems, rows=PER_WORD, columns=1)
    if len(sizes := set(base.group_sizes(layout, plan).values())) > 1:
        problems.add(place, f"awq has one group size for all linears, not {sorted(sizes)} (-1: a scale per output)", "choose gptq")


def verdicts(layout: Layout, plan: dict[str, Scheme], cache: Caching | None = None) -> dict[str, str]:
    """For each engine, whether and how it reads the folder."""
    found = {"GPTQModel": "loads", "transformers": "loads with gptqmodel", "vLLM": "loads", "SGLang": "loads on GPUs since Turing"}
    if layout.of_experts & plan.keys():
        found["transformers"] = "refuses experts in AWQ: makes up numbers for them (seen with 5.23.0)"
        found["vLLM"] = "GPU only: its build for CPUs has no kernel for experts in AWQ"
    return found


def write(model: Model, plan: dict[str, Scheme], cache: Caching | None, folder: Path) -> None:
    """Write weights, a shard for each block, and config.json into `folder`."""
    from compress.formats import awq

    def pack(linear: str) -> dict[str, Tensor]:
        weight = model.quantized(linear)
        assert weight
        return awq.pack(linear, weight)

    base.write_by_block(model, base.converted(model, pack), folder)
    kept = sorted(name for name in model.layout.linears if name not in plan)
    quantization = {
        "quant_method": "awq", "bits": 4, "group_size": next(iter(base.group_sizes(model.layout, plan).values())), "zero_point": True,
        "version": "gemm", "format": "gemm", "modules_to_not_convert": ["lm_head", *base.outside(model.layout), *kept],
    }  # fmt: skip
    write_text(folder / "config.json", json.dumps(base.settings(model, quantization), indent=2) + "\n")


def weights(model: Model, plan: dict[str, Scheme], folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every weight, as `folder` says it."""
    from compress.formats import awq

    def read(written: Checkpoint, linear: str) -> Tensor:
        return awq.unpack(linear, {f"{linear}.{part}": written.read(f"{linear}.{part}") for part in ("qweight", "qzeros", "scales")})

    return base.unpacked(model, folder, read)
