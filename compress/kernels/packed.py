"""What every module of a packed weight does around its product: rounds inputs as the checkpoint says, adds residuals and the bias.

A way to multiply is a subclass of `Packed` in a file of its own, with an operator of torch that takes what it stores.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.formats.sparse_residual import Residual
from compress.kernels.residuals import Residuals
from compress.numerics.activations import Activations
from compress.numerics.grid import Integer, Quantized

Cast = Callable[[Tensor], Tensor]


def moved(cast: Cast) -> Cast:
    """What ``cast``, which torch applies to each tensor of a model, does but for changing dtypes."""

    def move(tensor: Tensor) -> Tensor:
        found = cast(tensor)
        return found if found.dtype == tensor.dtype else tensor.to(found.device)

    return move


class Kept(nn.Module):
    """A module whose tensors keep their dtypes when the model around it is cast to another one: they are no numbers to compute with."""

    def _apply(self, fn: Cast, recurse: bool = True) -> Kept:
        super()._apply(moved(fn), recurse)  # type: ignore[no-untyped-call]
        return self


@dataclass(frozen=True)
class Extras:
    """What a linear has beside its codes: a bias [out], how its inputs are rounded, residuals."""

    bias: Tensor | None = None
    inputs: Activations | None = None
    residual: Residual | None = None


NOTHING = Extras()


class Packed(Kept):
    """A linear whose weight stays packed in memory.

    ``codes``, ``scales``, ``zeros`` and ``units`` (None where the layout `coding` has none) are what its operator takes; `digits` are those that
    it writes inputs with, 0 if it takes them as they are.
    """

    codes: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    units: Tensor | None
    bias: Tensor | None
    coding: str
    digits: int

    def __init__(self, shape: Sequence[int], stored: str, extras: Extras) -> None:
        """``shape`` [out, in]; ``stored`` says for people how."""
        super().__init__()
        self.out_features, self.in_features = shape
        self.stored = stored
        self.inputs = extras.inputs
        self.register_buffer("bias", extras.bias)
        residual = extras.residual
        self.residuals = Residuals([residual], self.out_features) if residual and len(residual.values) else None

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out] by the codes alone, inputs rounded as the checkpoint says, in the dtype of ``x``."""

    @staticmethod
    @abstractmethod
    def why_unpacked(stored: str, device: torch.device) -> str | None:
        """Why weights so `stored` are unpacked for each product on ``device``, or None if a kernel multiplies them where they lie, by few tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], in the dtype of ``x``. Raises `ValueError` for inputs of another width or no floats, or that want gradients."""
        refuse(x, self.in_features)
        outputs = self.product(x)
        if self.residuals is not None:
            given = x if self.inputs is None else self.inputs.round(x)
            outputs = outputs + self.residuals(given).to(outputs.dtype)
        return outputs if self.bias is None else outputs + self.bias.to(outputs.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.stored}"


def refuse(x: Tensor, columns: int) -> None:
    """Raise `ValueError` for what products with packed weights would silently get wrong."""
    if x.shape[-1] != columns or not x.is_floating_point():
        raise ValueError(f"inputs must be floats [..., {columns}], got {str(x.dtype).removeprefix('torch.')} {list(x.shape)}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("products with packed weights have no gradient: run under torch.no_grad()")


def described(weight: Quantized) -> str:
    """For people: `4 bits, group 128`."""
    name = f"{weight.bits} bits" if isinstance(weight.grid, Integer) else type(weight.grid).__name__
    group = "channel" if weight.group_size == weight.codes.shape[1] else weight.group_size
    return f"{name}, group {group}{'' if weight.symmetric else ', asymmetric'}"
