"""A branch beside a linear that was pruned, whatever the layout of its weight.

===================  ========================================  ====================================================================
tensor               dtype, shape                              content
===================  ========================================  ====================================================================
``X.branch_weight``  dtype of the weight in the source         what the sum of each run of inputs is multiplied with
                     [out, ceil(in / run)]
``X.branch_run``     int32 [1]                                 inputs in a run; the last may be shorter
===================  ========================================  ====================================================================

What the linear gives is that of its weight plus ``branch_weight`` times the sums, which are taken and multiplied in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import InputError
from compress.formats.base import BRANCH_PARTS
from compress.numerics.branch import count, run_sums

WEIGHT, RUN = BRANCH_PARTS


@dataclass(frozen=True)
class Branch:
    """``weight`` [out, runs] in the dtype it is stored in; ``run`` inputs each."""

    weight: Tensor
    run: int

    def of(self, x: Tensor) -> Tensor:
        """What it gives for ``x`` [..., in], [..., out], float32 or the dtype of ``x``, whichever is wider; differentiable in ``x``."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return run_sums(wide, self.run) @ self.weight.to(wide).T


def pack(linear: str, branch: Branch) -> dict[str, Tensor]:
    """The tensors of one linear under their names on disk."""
    return {f"{linear}.{WEIGHT}": branch.weight.contiguous(), f"{linear}.{RUN}": torch.tensor([branch.run], dtype=torch.int32)}


def unpack(linear: str, tensors: dict[str, Tensor], shape: tuple[int, int]) -> Branch:
    """The inverse of `pack` for a weight of ``shape`` [out, in]. Raises `InputError` if the tensors contradict each other or that."""
    weight, run = tensors[f"{linear}.{WEIGHT}"], tensors[f"{linear}.{RUN}"]
    if run.shape != (1,) or int(run) < 1 or weight.shape != (shape[0], count(shape[1], int(run))):
        raise InputError.one(linear, f"its branch does not fit a weight of {list(shape)}", "the artifact is damaged; fetch it again")
    return Branch(weight, int(run))
