"""Whether what config.json says of quantised linears is what their tensors are. Engines read by the one, `compress.load` by the other.

Only headers are read, so it costs nothing beside the weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from compress.checkpoint import FLOATS
from compress.errors import Problems
from compress.formats.base import PARTS, RESIDUAL_PARTS, find
from compress.layout import DECLARED, Layout, Linear
from compress.scheme import LAYOUTS, CacheScheme, Scheme

REMEDY = "do config.json and the weights belong together?"
PACKED = "pack-quantized"
NM_PACKED = "nm-packed"
MXFP4 = "mxfp4-pack-quantized"
FIXED: dict[str, tuple[int, int | None]] = {
    "int-quantized": (8, None), "float-quantized": (8, None), "mxfp8-quantized": (8, 32), "mxfp4-pack-quantized": (4, 32),
    "nvfp4-pack-quantized": (4, 16),
}  # fmt: skip
"""Bits and inputs per scale of the layouts that leave no choice, None where they do."""


@dataclass(frozen=True)
class Weights:
    """What one of `config_groups` says of its weights. A scale is for a block of so many `outputs` and `inputs`, None for all of them."""

    group: str
    format: str
    type: str
    bits: int
    symmetric: bool
    outputs: int
    inputs: int | None

    def __str__(self) -> str:
        block = "channel" if self.inputs is None else f"{self.inputs}" if self.outputs == 1 else f"{self.outputs} x {self.inputs}"
        return f"{self.group}: {self.type}, {self.bits} bits, group {block}{'' if self.symmetric else ', asymmetric'}"

    def shapes(self, linear: Linear) -> dict[str, tuple[int, ...]]:
        """The tensors that make a linear, by what follows its name."""
        rows, columns = linear.rows, linear.columns
        groups = -(-columns // self.inputs) if self.inputs else 1
        found: dict[str, tuple[int, ...]] = {"weight_scale": (-(-rows // self.outputs), groups)}
        if self.format == PACKED:
            found |= {"weight_packed": (rows, -(-columns * self.bits // 32)), "weight_shape": (2,)}
            if not self.symmetric:
                found["weight_zero_point"] = (-(-rows * self.bits // 32), groups)
        elif self.bits == 4:
            found["weight_packed"] = rows, columns // 2
        else:
            found["weight"] = rows, columns
        return found | ({"weight_global_scale": (1,)} if self.format.startswith("nvfp4") else {})


def check(layout: Layout) -> None:
    """Raise `InputError` with every linear whose tensors are not what config.json says."""
    problems = Problems()
    if not layout.quantized:
        layout.refuse_declared_floats()
    config = layout.declared
    groups = _groups(config, problems)
    problems.raise_if_any()
    for name, linear in layout.all_linears.items():
        parts = {part: info for part in PARTS if (info := layout.checkpoint.tensors.get(f"{name}.{part}"))}
        says = next((says for targets, says in groups if any(fits(target, name) for target in targets)), None)
        if dense := next((parts[part] for part in ("weight", "nm_values") if part in parts and parts[part].dtype in FLOATS), None):
            if says and name in layout.linears and not any(_means(target, name) for target in config.get("ignore") or ()):
                problems.add(name, f"is of {dense.dtype}, but config.json ({says.group}) says {says.format}", REMEDY)
            continue
        stored = find({part: info.dtype for part, info in parts.items()})
        if says is None or any(fits(target, name) for target in config.get("ignore") or ()):
            problems.add(name, "is quantised, but config.json does not say so", REMEDY)
        elif stored is None or stored.NAME not in (says.format, NM_PACKED):
            kinds = ", ".join(f"{part} {info.dtype}" for part, info in parts.items())
            problems.add(name, f"is stored as {stored.NAME if stored else kinds}, but config.json ({says.group}) says {says.format}", REMEDY)
        else:
            _compare(linear, says, {part: (info.dtype, info.shape) for part, info in parts.items()}, problems)
    problems.raise_if_any()


def schemes(layout: Layout) -> dict[str, Scheme]:
    """How each quantised linear of a checkpoint that `check` finds sound is stored, by name."""
    config = layout.checkpoint.config.get("quantization_config", {})
    groups = _groups(config, Problems())
    inputs = {name: group.get("input_activations") for name, group in config.get("config_groups", {}).items()}
    found = {}
    for name, linear in layout.all_linears.items():
        dtypes = {part: info.dtype for part in PARTS if (info := layout.checkpoint.tensors.get(f"{name}.{part}"))}
        if any(dtypes.get(part, "") in FLOATS for part in ("weight", "nm_values")) or not dtypes:
            continue
        says = next(says for targets, says in groups if any(fits(target, name) for target in targets))
        rounded = inputs.get(says.group)
        found[name] = Scheme(
            format=_format(says),
            bits=says.bits,
            group_size=says.inputs or linear.columns,
            symmetric=says.symmetric,
            activations="none" if not rounded else "dynamic" if rounded.get("dynamic") else "static",
            residuals=_residuals(layout, linear),
        )
    return found


def cache(layout: Layout) -> CacheScheme | None:
    """How keys and values are stored by a checkpoint whose config tells of their scales."""
    scheme = layout.checkpoint.config.get("quantization_config", {}).get("kv_cache_scheme")
    return CacheScheme(format="fp8", granularity="tensor" if scheme.get("strategy") == "tensor" else "head") if scheme else None


def _residuals(layout: Layout, linear: Linear) -> float:
    values = layout.checkpoint.tensors.get(f"{linear.name}.{RESIDUAL_PARTS[-1]}")
    return values.shape[0] / (linear.rows * linear.columns) if values else 0.0


def _format(says: Weights) -> str:
    """What a scheme calls a layout."""
    if says.type == "int":
        return "int"
    blocks = says.outputs > 1
    return next(name for name, layout in LAYOUTS.items() if layout == says.format and blocks == (name == "fp8-block"))


def _compare(linear: Linear, says: Weights, parts: dict[str, tuple[str, tuple[int, ...]]], problems: Problems) -> None:
    wanted = says.shapes(linear)
    if "nm_values" in parts:  # in place of all codes, and checked as they are unpacked
        wanted = {part: shape for part, shape in wanted.items() if part not in ("weight", "weight_packed")}
    for part, shape in wanted.items():
        name = f"{linear.name}.{part}"
        if part not in parts:
            problems.add(name, "is missing from the checkpoint", "is the download complete?")
        elif parts[part][1] != shape:
            problems.add(name, f"has the shape {list(parts[part][1])}, config.json ({says}) makes it {list(shape)}", REMEDY)
        elif part == "weight_scale" and says.format in (PACKED, "int-quantized", "float-quantized") and parts[part][0] not in FLOATS:
            problems.add(name, f"is {parts[part][0]}, which is no scale", "the artifact is damaged; fetch it again")
    if "weight_zero_point" in parts.keys() - wanted.keys():
        problems.add(f"{linear.name}.weight_zero_point", f"is there, but config.json ({says}) says symmetric", REMEDY)


def fits(target: str, name: str) -> bool:
    """Whether `target` means the linear `name`: as their class, by a pattern, or by name."""
    return target in ("Linear", name) or (target.startswith("re:") and re.match(target.removeprefix("re:"), name) is not None)


def _means(target: str, name: str) -> bool:
    """Whether `target` means a linear of a block that is called `name` on disk, and something else before the block by some who write it."""
    return fits(target, name) or target.rpartition(".layers.")[2] == name.rpartition(".layers.")[2]


def _groups(config: Any, problems: Problems) -> list[tuple[list[str], Weights]]:
    """The targets of each of `config_groups` and what it says of them; or of what the experts of gpt-oss are published as, in a word."""
    if isinstance(config, dict) and config.get("quant_method") == "mxfp4":
        return [([r"re:.*\.experts\..*"], Weights("mxfp4", MXFP4, "float", 4, True, 1, 32))]
    if not isinstance(config, dict) or not isinstance(groups := config.get("config_groups", {}), dict):
        problems.add(DECLARED, "is not what compressed-tensors writes: config_groups must hold a mapping", "fetch it again")
        return []
    found = []
    for name, group in groups.items():
        try:
            for target in (*group["targets"], *(config.get("ignore") or ())):
                re.compile(target)
            found.append((group["targets"], _weights(name, group["weights"], group.get("format") or config["format"])))
        except (KeyError, TypeError, ValueError, re.error) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            problems.add(f"{DECLARED}.config_groups.{name}", what, "fetch it again")
    return found


def _weights(group: str, says: dict[str, Any], layout: str) -> Weights:
    """Raises `KeyError`, `TypeError` or `ValueError` for what cannot be."""
    bits, kind, symmetric, size = says["num_bits"], says["type"], says.get("symmetric", True), says.get("group_size")
    strategy = says.get("strategy") or ("channel" if size == -1 else "group")
    outputs, inputs = (1, None) if strategy == "channel" else (1, size) if strategy in ("group", "tensor_group") else (None, None)
    if strategy == "block":
        outputs, inputs = says["block_structure"]
    if outputs is None:
        raise ValueError(f"has the strategy {strategy!r}, which this program does not read")
    if any(type(size) is not int or size < 1 for size in (bits, outputs, 1 if inputs is None else inputs)):
        raise ValueError(f"has a num_bits of {bits!r} and scales for {outputs!r} x {inputs!r} weights, which must be positive numbers")
    wanted_bits, wanted_inputs = FIXED.get(layout, (bits, None))
    wanted_type = "int" if layout in (PACKED, "int-quantized") else "float"
    if (bits, kind) != (wanted_bits, wanted_type) or (wanted_inputs and inputs != wanted_inputs) or (layout != PACKED and not symmetric):
        said = Weights(group, layout, kind, bits, symmetric, outputs, inputs)
        raise ValueError(f"says {said}, which {layout} cannot hold")
    return Weights(group, layout, kind, bits, symmetric, outputs, inputs)
