"""How a linear is found on disk: every layout is one file beside this one, named after what compressed-tensors calls it.

A layout that `compress` reads has ``NAME``, ``holds`` (is this one of mine, by the dtypes of its parts), ``pack`` and ``unpack``; those that are
written for other engines alone have no ``holds``.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType

NM_PARTS = ("nm_values", "nm_indices", "nm_columns", "nm_pattern")
"""What `nm_packed` stores of a linear that was pruned, quantised or not."""
PARTS = ("weight_packed", "weight", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale", "input_scale", *NM_PARTS)
"""What the tensors of a quantised linear are called, after its name."""
RESIDUAL_PARTS = ("sparse_row_offsets", "sparse_columns", "sparse_values")
"""What `sparse_residual` stores beside them."""
BRANCH_PARTS = ("branch_weight", "branch_run")
"""What `branch` stores beside a linear, quantised or not."""
LEFT_OUT = {"residuals": RESIDUAL_PARTS, "branch": BRANCH_PARTS}
"""What engines leave out, by what it is called in reports."""
BESIDE_PARTS = (*RESIDUAL_PARTS, *BRANCH_PARTS)


@cache
def layouts() -> tuple[ModuleType, ...]:
    """Every layout, found by file name."""
    names = [module.name for module in pkgutil.iter_modules(importlib.import_module("compress.formats").__path__) if module.name != "base"]
    modules = [importlib.import_module(f"compress.formats.{name}") for name in names]
    return tuple(module for module in modules if hasattr(module, "holds"))


def find(dtypes: dict[str, str]) -> ModuleType | None:
    """The layout of a linear whose parts have these dtypes (safetensors names), or None if it is not quantised."""
    return next((layout for layout in layouts() if layout.holds(dtypes)), None)


def called(name: str) -> ModuleType:
    """The layout of this `NAME`."""
    return next(layout for layout in layouts() if name == layout.NAME)
