"""What the records of a report say of linears, caches and tensors."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from compress.report.text import DASH

DTYPE_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16}
"""Bits of an element, by safetensors' names; every other type it knows has 8."""


@dataclass(frozen=True)
class Place:
    """Where a linear stands: ``panel`` is the module that holds it, ``expert`` its number among routed ones."""

    block: int
    panel: str
    kind: str
    expert: int | None


def place(name: str, block: int) -> Place:
    """What a linear's name says: `model.layers.3.mlp.experts.17.up_proj` is kind `up_proj` of `mlp.experts`, expert 17."""
    local = name.partition(f".{block}.")[2] or name
    if match := re.fullmatch(r"(.+?)\.(\d+)\.(.+)", local):
        return Place(block, match[1], match[3], int(match[2]))
    parts = local.split(".")
    last = len(parts) - (2 if parts[-1].isdigit() else 1)  # of two factors both have the name of the linear they were
    return Place(block, ".".join(parts[:last]), ".".join(parts[last:]), None)


def treatment(record: dict[str, Any]) -> str:
    if record.get("format", "int") != "int":
        return str(record["format"])
    return f"{record['bits']} bits, group {record['group_size']}{'' if record['symmetric'] else ', asymmetric'}"


def measured(step: str) -> str:
    """What the error of a linear's record is one of, by its pass; errors of different things do not compare."""
    return "outputs, on calibration data" if step.startswith(("gptq", "low_rank")) else "weights"


def factored(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Records of linears that became two of low rank."""
    return [record for record in result.get("transforms") or [] if "rank" in record and record["rank"][1] < record["rank"][0]]


def caches(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Records of blocks whose keys and values are quantised, or kept as latents."""
    return [record for record in result.get("transforms") or [] if "key_error" in record]


def caching(record: dict[str, Any]) -> str:
    if "granularity" in record:
        return f"in FP8, a scale per {record['granularity'].replace('tensor', 'block')}"
    told = f"in {record['latent_bits']} bits, " if record["latent_bits"] < 16 else ""
    return f"as latents, {told}the newest {record['window']} tokens as they are"


def special(record: dict[str, Any]) -> bool:
    """Whether what a pass did that quantised nothing is told elsewhere on the page."""
    return any(key in record for key in ("key_error", "sensitivity", "completeness", "pattern", "after", "rank", "loss"))


def tensor_bytes(item: dict[str, Any]) -> int:
    elements: int = math.prod(item["shape"])
    return elements * DTYPE_BITS.get(item["dtype"], 8) // 8


def with_ranges(pattern: str, names: list[str]) -> str:
    """`pattern` with every # replaced by the numbers that stand there in `names`."""
    columns = zip(*(map(int, re.findall(r"\d+", name)) for name in names), strict=True)
    texts = iter([f"{{{ranges(each)}}}" if len(each := sorted(set(column))) > 1 else str(each[0]) for column in columns])
    return re.sub("#", lambda _: next(texts), pattern)


def ranges(numbers: list[int], between: str = ",") -> str:
    """Numbers in ascending order, neighbours as ranges."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return between.join(str(low) if low == high else f"{low}{DASH}{high}" for low, high in runs)
