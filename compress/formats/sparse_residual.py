"""Residuals of a few weights beside a quantised linear, by rows; whatever the layout of its codes.

========================  =============================================  ==============================================================
tensor                    dtype, shape                                   content
========================  =============================================  ==============================================================
``X.sparse_row_offsets``  int32 [out + 1]                                row ``r`` owns entries ``offsets[r]`` up to ``offsets[r + 1]``
``X.sparse_columns``      int16 [entries]; int32 for ``in`` above 32768  their inputs, ascending within a row
``X.sparse_values``       dtype of the weight in the source [entries]    their residuals
========================  =============================================  ==============================================================

A weight with an entry is that of the codes plus the residual, added in float32 and rounded once to the dtype of the weight of the codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import InputError
from compress.formats.base import RESIDUAL_PARTS

OFFSETS, COLUMNS, VALUES = RESIDUAL_PARTS


@dataclass(frozen=True)
class Residual:
    """``rows`` and ``columns`` int64 [entries], in ascending order; ``values`` [entries] in the dtype they are stored in; of a weight [out, in]."""

    rows: Tensor
    columns: Tensor
    values: Tensor
    shape: tuple[int, int]

    def add_to(self, coded: Tensor) -> Tensor:
        """The weight [out, in] that ``coded``, what the codes say, and the residuals make together, in its dtype; a copy."""
        weight = coded.clone()
        at = self.rows.to(coded.device), self.columns.to(coded.device)
        weight[at] = (coded[at].float() + self.values.to(coded.device).float()).to(coded.dtype)
        return weight


def residual(exact: Tensor, coded: Tensor, positions: Tensor, stored: torch.dtype) -> Residual:
    """What takes ``coded`` [out, in] to ``exact`` float32 at ``positions`` bool, in the dtype ``stored``."""
    rows, columns = torch.nonzero(positions, as_tuple=True)
    values = (exact[rows, columns] - coded[rows, columns].float()).to(stored)
    return Residual(rows, columns, values, (coded.shape[0], coded.shape[1]))


def none(coded: Tensor) -> Residual:
    """That of ``coded`` [out, in] if nothing lies beside it."""
    places = torch.empty(0, dtype=torch.int64)
    return Residual(places, places, torch.empty(0), (coded.shape[0], coded.shape[1]))


def pack(linear: str, residual: Residual) -> dict[str, Tensor]:
    """The tensors of one linear under their names on disk."""
    rows, columns = residual.shape
    offsets = torch.zeros(rows + 1, dtype=torch.int32)
    offsets[1:] = torch.bincount(residual.rows.cpu(), minlength=rows).cumsum(0)
    return {
        f"{linear}.{OFFSETS}": offsets,
        f"{linear}.{COLUMNS}": residual.columns.to(_index_dtype(columns)),
        f"{linear}.{VALUES}": residual.values,
    }


def unpack(linear: str, tensors: dict[str, Tensor], shape: tuple[int, int]) -> Residual:
    """The inverse of `pack` for a weight of ``shape`` [out, in]. Raises `InputError` if the tensors contradict each other or that."""
    offsets, columns, values = (tensors[f"{linear}.{part}"] for part in RESIDUAL_PARTS)
    counts, columns = offsets.long().diff(), columns.long()  # int16 compares wrongly with a width it cannot hold
    whole = offsets.shape == (shape[0] + 1,) and columns.shape == values.shape == (int(offsets[-1]),) and not int(offsets[0])
    if not whole or bool((counts < 0).any()) or bool((columns < 0).any()) or bool((columns >= shape[1]).any()):
        raise InputError.one(linear, f"its residuals do not fit a weight of {list(shape)}", "the artifact is damaged; fetch it again")
    rows = torch.repeat_interleave(torch.arange(shape[0]), counts)
    return Residual(rows, columns, values, shape)


def _index_dtype(columns: int) -> torch.dtype:
    return torch.int16 if columns <= 1 << 15 else torch.int32
