"""What a run will cost and give, from headers alone.

Memory is counted; time is counted in operations and divided by a speed that is an assumption, so it is an order of magnitude.
"""

from __future__ import annotations

import math
from typing import Any

from compress.layout import BlockLayout, Group, Layout
from compress.passes.base import Transform
from compress.recipe import Recipe, cache_scheme, export_module
from compress.scheme import CacheScheme, Scheme

RUNTIME_BYTES = 600 << 20
"""Python with torch and transformers, before any tensor."""
STATISTICS_BYTES = 1 << 30
ASSUMED_FLOPS = 2.5e11
"""Sustained, on a small CPU with wide vectors; see bench/ for what is measured."""


def output_bytes(layout: Layout, plan: dict[str, Scheme], cache: CacheScheme | None = None) -> int:
    """Bytes of all tensors of the artifact, but for `added_bytes`."""
    total = layout.checkpoint.nbytes
    if cache:
        total += 4 * len(layout.blocks) * len(layout.arch.cache_scales) * (1 if cache.granularity == "tensor" else layout.kv_heads)
    for name, scheme in plan.items():
        linear, info = layout.linears[name], layout.checkpoint.tensors[f"{name}.weight"]
        total += _packed(layout, name, scheme) - info.nbytes
        assert info.shape == (linear.rows, linear.columns)
    return total


def added_bytes(recipe: Recipe, layout: Layout) -> int:
    """Bytes of tensors that a recipe's transforms add."""
    return sum(step.added_bytes(layout) for _, step in recipe.instances() if isinstance(step, Transform))


def rewritten_bytes(layout: Layout) -> int:
    """Bytes of all tensors in blocks in float32, as a pass that changes them without quantising leaves them."""
    return sum(4 * math.prod(layout.checkpoint.tensors[name].shape) for name in layout.in_blocks)


def cache_bytes(layout: Layout, tokens: int, bits: int) -> int:
    """Bytes of the keys and values of one sequence; where attention has a window, of no more tokens than that."""
    config = layout.text_config
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return sum(2 * layout.kv_heads * size * bits * min(tokens, window or tokens) // 8 for window in layout.windows)


def plan(recipe: Recipe, layout: Layout, schemes: dict[str, tuple[str, Scheme]]) -> dict[str, Any]:
    """Per pass peak memory, disk and time; size and bits per weight of the artifact; a verdict per engine."""
    per_linear = {name: scheme for name, (_, scheme) in schemes.items()}
    weights = sum(layout.linears[name].rows * layout.linears[name].columns for name in per_linear)
    stored = sum(_packed(layout, name, scheme) - (16 if scheme.layout == "pack-quantized" else 0) for name, scheme in per_linear.items())
    passes = []
    for name, step in recipe.instances():
        mine = {linear: scheme for linear, (by, scheme) in schemes.items() if by == name}
        tokens = recipe.calibration.samples * recipe.calibration.length if step.needs_data else 0
        passes.append(
            {
                "name": name,
                "peak_bytes": _peak(layout, mine, tokens, isinstance(step, Transform)),
                "disk_bytes": rewritten_bytes(layout) * isinstance(step, Transform)
                + sum(_packed(layout, linear, scheme) for linear, scheme in mine.items())
                + 2 * tokens * _hidden(layout),
                "seconds": _operations(layout, mine, tokens) / ASSUMED_FLOPS,
            }
        )
    return {
        "passes": passes,
        "size": {
            "before_bytes": layout.checkpoint.nbytes,
            "after_bytes": output_bytes(layout, per_linear, cache_scheme(recipe)) + added_bytes(recipe, layout),
            "bits_per_weight": 8 * stored / weights if weights else None,
        },
        "engines": export_module(recipe.export[0]).verdicts(layout, per_linear, cache_scheme(recipe)),
    }


def _packed(layout: Layout, name: str, scheme: Scheme) -> int:
    linear, info = layout.linears[name], layout.checkpoint.tensors[f"{name}.weight"]
    return scheme.stored_bytes(linear, info.nbytes // (linear.rows * linear.columns))


def _hidden(layout: Layout) -> int:
    return int(layout.text_config.get("hidden_size", 0))


def _block_bytes(layout: Layout, block: BlockLayout) -> int:
    return sum(layout.checkpoint.tensors[name].nbytes for name in block.tensors)


def _peak(layout: Layout, mine: dict[str, Scheme], tokens: int, rewrites: bool) -> int:
    """The largest block, everything outside the blocks, the activations between two blocks, and the largest group's statistics and weights."""
    outside = sum(info.nbytes for name, info in layout.checkpoint.tensors.items() if name not in layout.in_blocks)
    block = max(_block_bytes(layout, block) for block in layout.blocks)
    activations = 2 * tokens * _hidden(layout)
    groups = [group for block in layout.blocks for stage in block.stages for group in stage.groups if group.linears[0].name in mine]
    # Second moment and its factor; weights in float32 with their targets, errors and codes.
    work = max((2 * 4 * group.columns**2 * bool(tokens) + 14 * _elements(group) for group in groups), default=0)
    # A block that is rewritten is there in float32 as it was and as it is to be.
    work += 8 * max(sum(math.prod(layout.checkpoint.tensors[name].shape) for name in block.tensors) for block in layout.blocks) * rewrites
    return RUNTIME_BYTES + outside + block + activations + work


def _elements(group: Group) -> int:
    return sum(linear.rows * linear.columns for linear in group.linears)


def _operations(layout: Layout, mine: dict[str, Scheme], tokens: int) -> float:
    """Floating-point operations: about two and a half forward passes, second moments, factors and feedback."""
    total = 0.0
    for block in layout.blocks:
        experts = max((len(stage.groups) for stage in block.stages), default=1)
        active = int(layout.text_config.get("num_experts_per_tok") or experts)
        for stage in block.stages:
            for group in stage.groups:
                share = active / experts if group.expert is not None else 1.0
                columns, elements = group.columns, _elements(group)
                total += 5 * elements * tokens * share
                if group.linears[0].name in mine:
                    total += 100 * elements
                    if tokens:
                        total += columns**2 * tokens * share + columns**3 / 3 + 2 * elements * columns
    return total
