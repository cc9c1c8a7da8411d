"""A linear with a branch beside it, which torch multiplies."""

from __future__ import annotations

from torch import Tensor, nn

from compress.formats.branch import Branch
from compress.kernels.packed import Kept
from compress.numerics.activations import Activations


class BranchProduct(Kept):
    """A branch on its own: ``weight`` [out, runs] as it is stored."""

    weight: Tensor

    def __init__(self, branch: Branch) -> None:
        super().__init__()
        self.run = branch.run
        self.register_buffer("weight", branch.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], at least float32."""
        return Branch(self.weight, self.run).of(x)


class Branched(nn.Module):
    """``linear``, packed or not, with ``branch`` added, which is given inputs rounded as those of the linear are."""

    def __init__(self, linear: nn.Module, branch: Branch, inputs: Activations | None) -> None:
        super().__init__()
        self.linear, self.branch, self.inputs = linear, BranchProduct(branch), inputs

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], in the dtype of ``x``."""
        outputs: Tensor = self.linear(x)
        beside: Tensor = self.branch(x if self.inputs is None else self.inputs.round(x))
        return outputs + beside.to(outputs.dtype)
