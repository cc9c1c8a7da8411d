"""Where branches beside pruned linears start: what least squares make of the calibration data."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from compress.calibrate import Progress, look
from compress.checkpoint import entry, read_header, read_tensor
from compress.data import Samples
from compress.formats.branch import WEIGHT, Branch
from compress.layout import Group
from compress.model import Model
from compress.numerics.branch import count, least_squares, run_sums
from compress.state import write_state


@torch.no_grad()
def starts(model: Model, samples: Samples, run: int, path: Path, progress: Progress) -> dict[str, Tensor]:
    """For every linear with a pattern the branch that takes its outputs nearest to what they were before it was pruned, [out, runs] float32.

    By the name of its tensor. Blocks are given what those before them give with their branches; those of experts are left out there. Found once
    and kept in the file ``path``.
    """
    if not path.exists():
        found: dict[str, Tensor] = {}
        for probe in look(model, samples, progress):
            moments: dict[str, Tensor] = {}

            def note(group: Group, inputs: Tensor, moments: dict[str, Tensor] = moments) -> None:
                if any(linear.name in model.patterns for linear in group.linears):
                    rows = inputs.reshape(-1, group.columns).float()
                    total = moments.setdefault(group.name, rows.new_zeros(group.columns, count(group.columns, run)))
                    total.addmm_(rows.T, run_sums(rows, run))

            probe.observe(note)
            for group in (group for stage in probe.block.layout.stages for group in stage.groups):
                for name in [linear.name for linear in group.linears if linear.name in model.patterns]:
                    weight = probe.block.weight(name)
                    moment = moments.get(group.name, weight.new_zeros(group.columns, count(group.columns, run)))  # an expert that nobody asked
                    branch = least_squares(model.checkpoint.read(f"{name}.weight").to(weight) - weight, moment, run)
                    found[f"{name}.{WEIGHT}"] = branch
                    if group.expert is None:
                        probe.block.add_branch(name, Branch(branch, run))
        write_state(path, [entry(name, branch) for name, branch in found.items()], {})
    return {name: read_tensor(info).to(model.device) for name, info in read_header(path)[0].items()}
