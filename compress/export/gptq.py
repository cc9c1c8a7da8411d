"""A finished artifact in GPTQ's layout: for GPTQModel, and through it for transformers, and for vLLM and SGLang."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
BITS = (2, 3, 4, 8)
MULTIPLE = 32
"""Of the inputs and outputs of a linear, so that codes fill their words."""


def check(place: str, layout: Layout, plan: dict[str, Scheme], problems: Problems) -> None:
    """Report what this layout or its readers cannot express."""
    base.whole_numbers(place, "gptq", plan, BITS, problems)
    base.fills(place, "gptq", layout, plan, problems, rows=MULTIPLE, columns=MULTIPLE)


def verdicts(layout: Layout, plan: dict[str, Scheme], cache: Caching | None = None) -> dict[str, str]:
    """For each engine, whether and how it reads the folder."""
    found = {"GPTQModel": "loads", "transformers": "loads with gptqmodel and optimum", "vLLM": "loads", "SGLang": "loads on GPUs since Ampere"}
    if layout.arch.image:
        found["transformers"] = "refuses GPTQ in models that read images"
    if any(scheme.bits != 4 for scheme in plan.values()):
        found["vLLM"] = "GPU only: its CPU kernel wants 4 bits"
    if layout.of_experts & plan.keys():
        found["transformers"] = "refuses experts in GPTQ: makes up numbers for them (seen with 5.23.0)"
    if len(set(_kinds(layout, plan).values())) > 1:
        found["transformers"] = "refuses linears of different bits or groups in GPTQ"
    if any(not scheme.symmetric for scheme in plan.values()):
        found["GPTQModel"] = "loads in 16 bits; in float32 it answers wrongly where GPTQ is asymmetric (seen with 7.6.0)"
        found |= dict.fromkeys(("vLLM", "SGLang"), "refuses asymmetric GPTQ")
    if odd := "/".join(map(str, sorted({scheme.bits for scheme in plan.values()} - {4, 8}))):
        found |= dict.fromkeys(("vLLM", "SGLang"), f"refuses {odd}-bit GPTQ: only 4 and 8")
    return found


def write(model: Model, plan: dict[str, Scheme], cache: Caching | None, folder: Path) -> None:
    """Write weights, a shard for each block, config.json and quantize_config.json into `folder`."""
    from compress.formats import gptq

    version = _version(plan)

    def pack(linear: str) -> dict[str, Tensor]:
        weight = model.quantized(linear)
        assert weight
        return gptq.pack(linear, weight, version)

    base.write_by_block(model, base.converted(model, pack), folder)
    quantization = _quantization(model.layout, plan)
    write_text(folder / "config.json", json.dumps(base.settings(model, quantization), indent=2) + "\n")
    write_text(folder / "quantize_config.json", json.dumps(quantization, indent=2) + "\n")


def weights(model: Model, plan: dict[str, Scheme], folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every weight, as `folder` says it."""
    from compress.formats import gptq

    def read(written: Checkpoint, linear: str) -> Tensor:
        parts = {f"{linear}.{part}": written.read(f"{linear}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")}
        return gptq.unpack(linear, parts, plan[linear].bits, _version(plan))

    return base.unpacked(model, folder, read)


def _version(plan: dict[str, Scheme]) -> int:
    """Of the layout: all readers know the first, which has no place for every zero point."""
    return 1 if all(scheme.symmetric for scheme in plan.values()) else 2


def _kinds(layout: Layout, plan: dict[str, Scheme]) -> dict[str, tuple[int, int]]:
    """Bits and inputs per scale, by linear."""
    sizes = base.group_sizes(layout, plan)
    return {name: (scheme.bits, sizes[name]) for name, scheme in plan.items()}


def _quantization(layout: Layout, plan: dict[str, Scheme]) -> dict[str, Any]:
    """What engines are told: what most linears have, and by name what differs."""
    kinds = _kinds(layout, plan)
    (bits, group_size), _ = Counter(kinds.values()).most_common(1)[0]
    other = {name: {"bits": kind[0], "group_size": kind[1]} for name, kind in kinds.items() if kind != (bits, group_size)}
    dynamic = {f"+:^{re.escape(name)}$": changes for name, changes in other.items()}
    dynamic |= {f"-:^{re.escape(name)}$": {} for name in layout.linears if name not in plan}
    layout_name = "gptq" if _version(plan) == 1 else "gptq_v2"
    return {
        "quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": False, "sym": _version(plan) == 1, "lm_head": False,
        "format": layout_name, "checkpoint_format": layout_name, "pack_dtype": "int32", "meta": {"quantizer": ["compress"]},
    } | ({"dynamic": dynamic} if dynamic else {})  # fmt: skip
