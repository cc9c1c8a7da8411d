"""What a run will cost and give, from headers alone.

Memory is counted; time is counted in operations and divided by a speed that is an assumption, so it is an order of magnitude.
"""

from __future__ import annotations

import math
from typing import Any

from compress.layout import BlockLayout, Group, Layout
from compress.passes.base import Allocator, Differentiating, Pass, Prunes, Quantize, Restructure, Rewrite
from compress.recipe import Recipe, cache_scheme, expected, keeps_branches, verdicts
from compress.scheme import Scheme, dense_bytes, output_bytes
from compress.source import locate_data
from compress.tradeoff import against_fewer_bits

RUNTIME_BYTES = 600 << 20
"""Python with torch and transformers, before any tensor."""
STREAMS_BYTES = 1 << 30
"""Activations of variants of a model that run side by side, at most."""
ASSUMED_FLOPS = 2.5e11
"""Sustained, on a small CPU with wide vectors; see bench/ for what is measured."""


BYTES_PER_TOKEN = 4
"""Of text, about."""


def added_bytes(recipe: Recipe, layout: Layout) -> int:
    """Bytes of tensors that a recipe's transforms add."""
    return sum(step.added_bytes(layout) for _, step in recipe.instances() if isinstance(step, Rewrite))


def rewritten_bytes(layout: Layout) -> int:
    """Bytes of all tensors in blocks in float32, as a pass that changes them without quantising leaves them."""
    return sum(4 * math.prod(layout.checkpoint.tensors[name].shape) for name in layout.in_blocks)


def gradient_bytes(recipe: Recipe, layout: Layout) -> int:
    """Disk for what every block is given, and for the mean gradients of all linears, while a pass takes gradients; 0 if none does."""
    if not any(_gradients(step) for _, step in recipe.instances()):
        return 0
    tokens = recipe.calibration.samples * recipe.calibration.length
    return 2 * tokens * _hidden(layout) * len(layout.blocks) + 4 * sum(linear.rows * linear.columns for linear in layout.linears.values())


def _gradients(step: Pass) -> float:
    """What a pass that takes gradients of the model's loss costs, in forward passes; 0 for others."""
    return step.forwards if isinstance(step, Differentiating) else 0.0


def evaluation_bytes(recipe: Recipe, layout: Layout) -> int:
    """Disk for what the last blocks of both models give, in float32, while they are compared; 0 if they are not. Of data that are not to be cut
    short, which only their tokenizer counts, it is an estimate."""
    options = recipe.evaluate
    if options is None:
        return 0
    tokens = options.context * options.windows if options.windows is not None else _text_bytes(options.data) // BYTES_PER_TOKEN
    return 2 * 4 * tokens * _hidden(layout)


def _text_bytes(name: str) -> int:
    path = locate_data(name)
    return path.stat().st_size if path.is_file() else 0


def cache_bytes(layout: Layout, tokens: int, bits: int) -> int:
    """Bytes of the keys and values of one sequence; where attention has a window, of no more tokens than that."""
    return sum(layout.cached_channels * bits * min(tokens, window or tokens) // 8 for window in layout.windows)


def plan(recipe: Recipe, layout: Layout, schemes: dict[str, tuple[str, Scheme]]) -> dict[str, Any]:
    """Per pass peak memory, disk and time; size and bits per weight of the artifact; a verdict per engine.

    Of linears whose bits are yet to be allocated the size is that of the most, and engines judge a mix.
    """
    source, layouts = layout, expected(recipe, layout)
    layout = layouts[-1]
    per_linear = {name: scheme for name, (_, scheme) in schemes.items()}
    weights = sum(layout.all_linears[name].rows * layout.all_linears[name].columns for name in per_linear)
    stored = sum(_packed(layout, name, scheme) - scheme.shape_bytes for name, scheme in per_linear.items())
    passes: list[dict[str, Any]] = []
    mixed = mixture(recipe, source, schemes)
    trying: tuple[int, dict[str, Any]] | None = None
    for name, step in recipe.instances():
        mine = {linear: scheme for linear, (by, scheme) in schemes.items() if by == name}
        samples = (step.own_samples if isinstance(step, Rewrite) else None) or recipe.calibration.samples
        tokens = samples * recipe.calibration.length if step.needs_data else 0
        taken = {*mine, *(step.prunes(layout) if isinstance(step, Prunes) else ())}
        rewrites = isinstance(step, Rewrite | Prunes | Restructure)
        operations = _operations(layout, taken, tokens)
        operations = max(operations, _forward(source, tokens) * _gradients(step))
        if tokens and isinstance(step, Rewrite | Restructure):
            operations = max(operations, _forward(source, tokens) * step.sweeps(samples, recipe.calibration.length))
        if isinstance(step, Allocator):
            operations = _forward(layout, step.sequences(layout) * recipe.calibration.length)
        passes.append(
            {
                "name": name,
                "peak_bytes": (step.resident_bytes(source) if isinstance(step, Rewrite | Restructure) else 0)
                + _peak(source if isinstance(step, Restructure) else layout, taken, tokens, rewrites)
                + _gradient_memory(layout, tokens) * bool(_gradients(step))
                + (STREAMS_BYTES + _gradient_memory(layout, tokens)) * isinstance(step, Allocator),
                "disk_bytes": rewritten_bytes(layout) * rewrites
                + gradient_bytes(recipe, layout) * bool(_gradients(step))
                + sum(_packed(layout, linear, scheme) for linear, scheme in mine.items())
                + 2 * tokens * _hidden(layout),
                "seconds": operations / ASSUMED_FLOPS + (step.seconds if isinstance(step, Rewrite) else 0.0),
            }
        )
        if isinstance(step, Allocator):
            trying = step.trials, passes[-1]
        elif trying and isinstance(step, Quantize) and step.bits == "allocated":
            times, allocating = trying
            allocating["seconds"] += times * passes[-1]["seconds"]
            allocating["disk_bytes"] += times * passes[-1]["disk_bytes"]
    estimated = any(isinstance(step, Restructure) and step.estimated for _, step in recipe.instances())
    after_bytes = output_bytes(layout, per_linear, cache_scheme(recipe)) + added_bytes(recipe, layout)
    return {
        "passes": passes,
        "instead": against_fewer_bits(recipe, source, layout, mixed, after_bytes),
        "size": {
            "before_bytes": source.checkpoint.nbytes,
            "after_bytes": after_bytes,
            "bits_per_weight": 8 * stored / weights if weights else None,
            "at_most": mixed != per_linear or recipe.export[0] == "nm-packed" or keeps_branches(recipe) or estimated,
        },
        "outside": len(layout.outside.keys() & per_linear.keys()),
        "cache": caching.text if (caching := cache_scheme(recipe)) else None,
        "engines": verdicts(recipe, layout, mixed),
    }


def mixture(recipe: Recipe, layout: Layout, schemes: dict[str, tuple[str, Scheme]]) -> dict[str, Scheme]:
    """How each linear is stored; where bits are yet to be allocated, a mix of all that may be chosen."""
    found = {name: scheme for name, (_, scheme) in schemes.items()}
    made = expected(recipe, layout)[-1]
    for _, step in recipe.instances():
        if isinstance(step, Allocator):
            found |= {name: found[name].model_copy(update={"bits": bits}) for name, bits in step.examples(made)[-1].items()}
    return found


def _packed(layout: Layout, name: str, scheme: Scheme) -> int:
    return scheme.stored_bytes(layout.all_linears[name], dense_bytes(layout, name))


def _hidden(layout: Layout) -> int:
    return int(layout.text_config.get("hidden_size", 0))


def _block_bytes(layout: Layout, block: BlockLayout) -> int:
    return sum(layout.checkpoint.tensors[name].nbytes for name in block.tensors)


def _peak(layout: Layout, mine: set[str], tokens: int, rewrites: bool) -> int:
    """The largest block, everything outside the blocks, the activations between two blocks, and the largest group's statistics and weights."""
    outside = sum(info.nbytes for name, info in layout.checkpoint.tensors.items() if name not in layout.in_blocks)
    block = max(_block_bytes(layout, block) for block in layout.blocks)
    activations = 2 * tokens * _hidden(layout)
    groups = [group for block in layout.blocks for stage in block.stages for group in stage.groups if group.linears[0].name in mine]
    # Second moment and its factor; weights in float32 with their targets, errors and codes.
    work = max((2 * 4 * group.columns**2 * bool(tokens) + 14 * _elements(group) for group in groups), default=0)
    # Linears outside the blocks are rounded one by one, and their codes held until all are.
    beyond = [linear.rows * linear.columns for name, linear in layout.outside.items() if name in mine]
    work = max(work, 14 * max(beyond, default=0)) + sum(beyond)
    # A block that is rewritten is there in float32 as it was and as it is to be.
    work += 8 * max(sum(math.prod(layout.checkpoint.tensors[name].shape) for name in block.tensors) for block in layout.blocks) * rewrites
    return RUNTIME_BYTES + outside + block + activations + work


def _gradient_memory(layout: Layout, tokens: int) -> int:
    """Gradients of the activations, and a block's weights in float32 at both ends of a change, between them, and their gradients."""
    elements = max(sum(linear.rows * linear.columns for linear in block.linears) for block in layout.blocks)
    return 2 * tokens * _hidden(layout) + 4 * 4 * elements


def _elements(group: Group) -> int:
    return sum(linear.rows * linear.columns for linear in group.linears)


def _active(layout: Layout, block: BlockLayout, group: Group) -> float:
    """Share of the tokens that a group sees."""
    if group.expert is None:
        return 1.0
    experts = max(len(stage.groups) for stage in block.stages)
    return int(layout.text_config.get("num_experts_per_tok") or experts) / experts


def _forward(layout: Layout, tokens: int) -> float:
    """Floating-point operations of the linears of all blocks in a forward pass."""
    return sum(
        2 * _elements(group) * tokens * _active(layout, block, group) for block in layout.blocks for stage in block.stages for group in stage.groups
    )


def _operations(layout: Layout, mine: set[str], tokens: int) -> float:
    """Floating-point operations: about two and a half forward passes, second moments, factors and feedback."""
    total = 0.0
    for block in layout.blocks:
        for stage in block.stages:
            for group in stage.groups:
                share, columns, elements = _active(layout, block, group), group.columns, _elements(group)
                total += 5 * elements * tokens * share
                if group.linears[0].name in mine:
                    total += 100 * elements
                    if tokens:
                        total += columns**2 * tokens * share + columns**3 / 3 + 2 * elements * columns
    return total
