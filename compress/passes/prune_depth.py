"""Take whole blocks out: those after which the residual stream points where it pointed before (ShortGPT, arXiv 2403.03853 section 3.2).

A block's influence is one minus the mean cosine, over tokens, between what it is given and what it gives. The one of least influence goes, and
the rest are measured again without it. What remains is a model with fewer layers, which every engine loads.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from compress.errors import Problems
from compress.layout import Layout
from compress.passes.base import Restructure

if TYPE_CHECKING:
    from compress.calibrate import Workspace
    from compress.data import Samples
    from compress.model import Model


class Pass(Restructure):
    """Remove the blocks of least influence."""

    verb: ClassVar[str] = "removed"
    needs_data: ClassVar[bool] = True

    drop: int = Field(default=1, ge=1, description="how many blocks to remove")
    iterative: bool = Field(default=True, description="measure again after each one removed; otherwise all go by the first measurement")

    def sweeps(self, samples: int, length: int) -> float:
        return float(self.drop if self.iterative else 1)

    def check(self, place: str, layout: Layout, problems: Problems) -> None:
        count = len(layout.blocks)
        if self.drop >= count:
            problems.add(f"{place}: drop", f"{self.drop} of {count} blocks leaves none", f"drop at most {count - 1}")
        if layout.text_config.get("decoder_sparse_step", 1) != 1:
            problems.add(
                place, "which blocks have experts follows from their number (decoder_sparse_step), which would change", "prune experts instead"
            )

    def expected(self, layout: Layout) -> Layout:
        from compress.reshape import without_blocks

        count = len(layout.blocks)
        return without_blocks(layout, range(count - self.drop, count))  # any will do as long as it is not known which

    def outcome(self, layout: Layout, workspace: Workspace) -> Layout:
        from compress.checkpoint import read_header
        from compress.reshape import without_blocks

        records = json.loads(read_header(workspace.outside_file)[1]["records"])
        return without_blocks(layout, {record["block"] for record in records})

    def run(self, model: Model, samples: Samples, workspace: Workspace) -> None:
        if workspace.outside_file.exists():
            return
        records = []
        dropped: dict[int, float] = {}
        while len(dropped) < self.drop:
            influence = _influence(model, samples, workspace, dropped)
            order = sorted(influence, key=lambda index: (influence[index], index))
            dropped |= {index: influence[index] for index in order[: 1 if self.iterative else self.drop]}
        for index, value in sorted(dropped.items()):
            prefix = model.blocks[index].prefix
            record = {"pass": "prune_depth", "method": f"influence {value:.4f}", "kind": f"block {index}", "before": 1, "after": 0}
            records.append({"name": prefix, "block": index, **record, "influence": value})
        model.write_outside(workspace.outside_file, {}, {}, records)


def _influence(model: Model, samples: Samples, workspace: Workspace, dropped: dict[int, float]) -> dict[int, float]:
    """Of each block that is left, by number."""
    import torch

    from compress.calibrate import look

    influence: dict[int, float] = {}
    before: list[torch.Tensor] = []
    current = None
    hidden: list[torch.Tensor] = []

    def close() -> None:
        if current is not None:
            cosines = [torch.cosine_similarity(one.double(), other.double(), dim=-1).flatten() for one, other in zip(before, hidden, strict=True)]
            influence[current] = 1 - float(torch.cat(cosines).mean())

    for probe in look(model, samples, workspace.progress, dropped):
        hidden = probe.hidden
        close()
        before, current = list(hidden), probe.block.layout.index
    close()
    return influence
