"""What lies in a checkpoint folder, read from headers alone."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from compress.checkpoint import Checkpoint

PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


def inspect(folder: Path) -> dict[str, Any]:
    """Each weight with its shape, what it became and its bytes; `accepted` is None for folders we did not write."""
    checkpoint = Checkpoint(folder)
    tensors: dict[str, dict[str, Any]] = {}
    for name, info in checkpoint.tensors.items():
        linear, _, part = name.rpartition(".")
        if part not in PARTS:
            tensors[name] = {"name": name, "shape": list(info.shape), "became": info.dtype, "bytes": info.nbytes}
            continue
        item = tensors.setdefault(linear, {"name": linear, "shape": [], "became": "", "bytes": 0})
        item["bytes"] += info.nbytes
        if part == "weight_shape":
            with info.file.open("rb") as file:
                file.seek(info.begin)
                item["shape"] = list(struct.unpack("<2q", file.read(16)))
            item["became"] = _scheme(checkpoint, linear, item["shape"])
    manifest = folder / "manifest.json"
    accepted = json.loads(manifest.read_text(encoding="utf-8")).get("accepted") if manifest.is_file() else None
    ordered = [tensors[name] for name in sorted(tensors)]
    return {"folder": str(folder), "accepted": accepted, "bytes": checkpoint.nbytes, "tensors": ordered}


def _scheme(checkpoint: Checkpoint, linear: str, shape: list[int]) -> str:
    packed, scale = checkpoint.tensors[f"{linear}.weight_packed"], checkpoint.tensors[f"{linear}.weight_scale"]
    bits = packed.shape[1] * 32 // shape[1]
    kind = "asymmetric" if f"{linear}.weight_zero_point" in checkpoint.tensors else "symmetric"
    return f"int{bits}, group {shape[1] // scale.shape[1]}, {kind}, {scale.dtype} scales"
