"""Weights that are not quantised, in fewer bits than the model computes in: a kernel for a few tokens, torch for many, some rows at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compress.kernels import native
from compress.kernels.packed import NOTHING, Cast, Extras, Packed, moved
from compress.kernels.unpacked import by_rows

FEW = 8
"""Tokens from which on widening a weight costs less than reading it once more for each."""

_library: Any = torch.library.Library("compress", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("dense_linear(Tensor x, Tensor weight) -> Tensor")


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return by_rows(x, weight.shape[0], lambda part: weight[part].float())


def _on_cpu(x: Tensor, weight: Tensor) -> Tensor:
    tier, given = native.tier(), x.reshape(-1, x.shape[-1])
    if tier == "torch" or len(given) > FEW or weight.dtype not in native.FLOATS or not weight.is_contiguous():
        return _product(x, weight)
    return native.dense(given.float().contiguous(), weight, tier).to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def _fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_library.impl("dense_linear", _on_cpu, "CPU")
_library.impl("dense_linear", _product, "CUDA")
torch.library.register_fake("compress::dense_linear", _fake, lib=_library)


class DenseLinear(Packed):
    """A linear that is not quantised: ``codes`` is its weight [out, in]."""

    coding, digits = "dense", 0

    def __init__(self, weight: Tensor, extras: Extras = NOTHING) -> None:
        super().__init__(weight.shape, str(weight.dtype).removeprefix("torch."), extras)
        self.register_buffer("codes", weight)
        for name in ("scales", "zeros", "units"):
            self.register_buffer(name, None)

    def product(self, x: Tensor) -> Tensor:
        outputs: Tensor = torch.ops.compress.dense_linear(x, self.codes)
        return outputs

    @staticmethod
    def why_unpacked(stored: str, device: torch.device) -> str | None:
        return native.missing_why() if device.type == "cpu" else f"{stored} is widened on {device.type}"


class DenseEmbedding(nn.Embedding):
    """An embedding [rows, width] that gives its rows in another dtype than it keeps them in."""

    def __init__(self, weight: Tensor, padding: int | None, gives: torch.dtype) -> None:
        super().__init__(weight.shape[0], weight.shape[1], padding, _weight=weight, _freeze=True)
        self.gives = gives

    def forward(self, input: Tensor) -> Tensor:
        """Rows [..., width] of indices [...]."""
        return super().forward(input).to(self.gives)

    def _apply(self, fn: Cast, recurse: bool = True) -> DenseEmbedding:
        self.gives = fn(torch.empty(0, dtype=self.gives)).dtype
        super()._apply(moved(fn), recurse)  # type: ignore[no-untyped-call]
        return self
