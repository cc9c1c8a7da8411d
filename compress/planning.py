"""What a run will cost and give, from headers alone."""

from __future__ import annotations

from compress.formats.sizes import packed_bytes
from compress.layout import Layout
from compress.passes.base import Scheme


def output_bytes(layout: Layout, plan: dict[str, Scheme]) -> int:
    """Bytes of all tensors of the artifact."""
    total = layout.checkpoint.nbytes
    for name, scheme in plan.items():
        linear, info = layout.linears[name], layout.checkpoint.tensors[f"{name}.weight"]
        total += packed_bytes(linear.rows, linear.columns, scheme.bits, scheme.group_size, scheme.symmetric, info.nbytes // (linear.rows * linear.columns))
        total -= info.nbytes
    return total
