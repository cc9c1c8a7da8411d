"""The product with the residuals that a few weights have beside their codes, which stay as they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.formats.sparse_residual import Residual

AT_ONCE = 1 << 22
"""Products held at a time."""

_library: Any = torch.library.Library("compress", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("residual_product(Tensor x, Tensor? ends, Tensor offsets, Tensor columns, Tensor values, int rows) -> Tensor")


def _product(x: Tensor, ends: Tensor | None, offsets: Tensor, columns: Tensor, values: Tensor, rows: int) -> Tensor:
    given = x.reshape(-1, x.shape[-1]).float()
    outputs = given.new_zeros(len(given), rows)
    start = 0
    for member, end in enumerate([len(given)] if ends is None else ends.tolist()):
        own = offsets[member * rows : (member + 1) * rows + 1]
        part = slice(int(own[0]), int(own[-1]))
        if start < end and part.start < part.stop:
            at, inputs, factors = torch.repeat_interleave(own.diff()), columns[part].int(), values[part].float()
            for few in torch.split(given[start:end], max(1, AT_ONCE // len(at))):
                outputs[start : start + len(few)].index_add_(1, at, few[:, inputs] * factors)
                start += len(few)
        start = end
    return outputs.view(*x.shape[:-1], rows)


def _fake(x: Tensor, ends: Tensor | None, offsets: Tensor, columns: Tensor, values: Tensor, rows: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows, dtype=torch.float32)


_library.impl("residual_product", _product, "CompositeExplicitAutograd")
torch.library.register_fake("compress::residual_product", _fake, lib=_library)


class Residuals(nn.Module):
    """Residuals of a linear, or of the same linear of every expert: ``offsets`` int32 [members * out + 1], ``columns`` and ``values`` [entries]."""

    offsets: Tensor
    columns: Tensor
    values: Tensor

    def __init__(self, parts: Sequence[Residual], rows: int) -> None:
        """Of ``parts`` one below the other, which make members of `rows` outputs each; at least one has entries."""
        super().__init__()
        self.rows, width = rows, parts[0].shape[1]
        counts = torch.cat([torch.bincount(part.rows, minlength=part.shape[0]) for part in parts])
        found = [part for part in parts if len(part.values)]
        self.register_buffer("offsets", torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int())
        self.register_buffer("columns", torch.cat([part.columns for part in found]).to(torch.int16 if width <= 1 << 15 else torch.int32))
        self.register_buffer("values", torch.cat([part.values for part in found]))

    def forward(self, x: Tensor, ends: Tensor | None = None) -> Tensor:
        """[..., in] to float32 [..., out]; with ``ends`` [members], rows of ``x`` [tokens, in] up to each belong to one member after the other."""
        product: Tensor = torch.ops.compress.residual_product(x, ends, self.offsets, self.columns, self.values, self.rows)
        return product
