"""What lies in a checkpoint folder, read from headers alone."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from compress import manifest
from compress.checkpoint import Checkpoint
from compress.formats.base import BESIDE_PARTS, PARTS

KINDS = {("U8", "U8"): "mxfp4", ("U8", "F8_E4M3"): "nvfp4", ("F8_E4M3", "U8"): "mxfp8", ("F8_E4M3", "BF16"): "fp8", ("F8_E4M3", "F16"): "fp8",
         ("F8_E4M3", "F32"): "fp8"}  # fmt: skip
"""What small floats are called, by the dtypes of codes and scales."""


def inspect(folder: Path) -> dict[str, Any]:
    """Each weight with its shape, what it became and its bytes; `accepted` is None for folders we did not write."""
    checkpoint = Checkpoint(folder)
    tensors: dict[str, dict[str, Any]] = {}
    for name, info in checkpoint.tensors.items():
        linear, _, part = name.rpartition(".")
        packed = any(f"{linear}.{sign}" in checkpoint.tensors for sign in ("weight_scale", "nm_values"))
        if part not in (*PARTS, *BESIDE_PARTS) or not packed:
            tensors[name] = {"name": name, "shape": list(info.shape), "became": info.dtype, "bytes": info.nbytes}
            continue
        item = tensors.setdefault(linear, {"name": linear, "shape": [], "became": "", "bytes": 0})
        item["bytes"] += info.nbytes
        if part in ("weight", "weight_packed", "nm_values"):
            item["shape"] = _shape(checkpoint, linear)
            item["became"] = _scheme(checkpoint, linear, item["shape"]) + _residuals(checkpoint, linear) + _branch(checkpoint, linear)
    told = manifest.read(folder)
    ordered = [tensors[name] for name in sorted(tensors)]
    return {"folder": str(folder), "accepted": told.accepted if told else None, "bytes": checkpoint.nbytes, "tensors": ordered}


def _shape(checkpoint: Checkpoint, linear: str) -> list[int]:
    if stored := checkpoint.tensors.get(f"{linear}.weight_shape"):
        with stored.file.open("rb") as file:
            file.seek(stored.begin)
            return list(struct.unpack("<2q", file.read(16)))
    if plain := checkpoint.tensors.get(f"{linear}.weight"):
        return list(plain.shape)
    rows, half = checkpoint.tensors[f"{linear}.weight_packed"].shape
    return [rows, 2 * half]


def _scheme(checkpoint: Checkpoint, linear: str, shape: list[int]) -> str:
    if stored := checkpoint.tensors.get(f"{linear}.nm_pattern"):
        with stored.file.open("rb") as file:
            file.seek(stored.begin)
            v, n, m, bits = struct.unpack("<4i", file.read(16))
        packed = checkpoint.tensors[f"{linear}.nm_values"].dtype
        return f"{f'{v}:' if v else ''}{n}:{m}, " + (f"int{bits}, {_integers(checkpoint, linear, shape)}" if bits else packed)
    scale = checkpoint.tensors[f"{linear}.weight_scale"]
    dtypes = {part: info.dtype for part in PARTS if (info := checkpoint.tensors.get(f"{linear}.{part}"))}
    layout = KINDS.get((dtypes.get("weight_packed", dtypes.get("weight", "")), scale.dtype))
    if layout:
        return f"{layout}, group {shape[1] // scale.shape[1]}"
    bits = 8 if "weight" in dtypes else checkpoint.tensors[f"{linear}.weight_packed"].shape[1] * 32 // shape[1]
    return f"int{bits}, {_integers(checkpoint, linear, shape)}"


def _integers(checkpoint: Checkpoint, linear: str, shape: list[int]) -> str:
    scale = checkpoint.tensors[f"{linear}.weight_scale"]
    kind = "asymmetric" if f"{linear}.weight_zero_point" in checkpoint.tensors else "symmetric"
    return f"group {shape[1] // scale.shape[1]}, {kind}, {scale.dtype} scales"


def _residuals(checkpoint: Checkpoint, linear: str) -> str:
    values = checkpoint.tensors.get(f"{linear}.sparse_values")
    return f", {values.shape[0]} residuals" if values else ""


def _branch(checkpoint: Checkpoint, linear: str) -> str:
    if not (stored := checkpoint.tensors.get(f"{linear}.branch_run")):
        return ""
    with stored.file.open("rb") as file:
        file.seek(stored.begin)
        return f", branch per {struct.unpack('<i', file.read(4))[0]} inputs"
