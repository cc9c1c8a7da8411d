"""Residuals beside codes: written, read and added as the specification says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import InputError
from compress.formats.sparse_residual import Residual, pack, residual, unpack


def example(rows: int, columns: int, share: float, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, what its codes say, and which of its elements get a residual."""
    generator = torch.Generator().manual_seed(seed)
    exact = torch.randn(rows, columns, generator=generator).to(dtype).float()
    dense = (exact * 4).round().div(4).to(dtype)
    return exact, dense, torch.rand(rows, columns, generator=generator) < share


def by_hand(dense: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """The weight as docs/formats.md describes it, entry by entry."""
    weight = dense.clone()
    offsets = tensors["X.sparse_row_offsets"].tolist()
    for row in range(len(dense)):
        for entry in range(offsets[row], offsets[row + 1]):
            column = int(tensors["X.sparse_columns"][entry])
            weight[row, column] = (dense[row, column].float() + tensors["X.sparse_values"][entry].float()).to(dense.dtype)
    return weight


@given(st.integers(1, 9), st.integers(1, 70), st.sampled_from([0.0, 0.05, 0.5, 1.0]), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_what_is_read_is_what_was_written_and_adds_up_as_specified(rows: int, columns: int, share: float, dtype: torch.dtype) -> None:
    exact, dense, positions = example(rows, columns, share, dtype)
    meant = residual(exact, dense, positions, dense.dtype)
    tensors = pack("X", meant)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "X.sparse_row_offsets": (torch.int32, (rows + 1,)),
        "X.sparse_columns": (torch.int16, (int(positions.sum()),)),
        "X.sparse_values": (dtype, (int(positions.sum()),)),
    }
    read = unpack("X", tensors, (rows, columns))
    assert torch.equal(read.add_to(dense), meant.add_to(dense)) and torch.equal(read.add_to(dense), by_hand(dense, tensors))
    assert torch.equal(read.add_to(dense)[~positions], dense[~positions])
    assert torch.allclose(read.add_to(dense)[positions].float(), exact[positions], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize(("columns", "dtype"), [(1 << 15, torch.int16), ((1 << 15) + 1, torch.int32)])
def test_the_last_input_of_a_wide_weight_can_be_told(columns: int, dtype: torch.dtype) -> None:
    positions = torch.zeros(2, columns, dtype=torch.bool)
    positions[1, -1] = True
    tensors = pack("X", residual(torch.ones(2, columns), torch.zeros(2, columns), positions, torch.float32))
    assert tensors["X.sparse_columns"].dtype == dtype
    assert unpack("X", tensors, (2, columns)).columns.tolist() == [columns - 1]


def damage(part: str, change: Tensor) -> dict[str, Tensor]:
    exact, dense, _ = example(3, 8, 0.5, torch.float32)
    positions = (torch.arange(24) % 2 == 0).view(3, 8)
    return pack("X", residual(exact, dense, positions, dense.dtype)) | {f"X.{part}": change}


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("sparse_row_offsets", torch.tensor([0, 1, 2], dtype=torch.int32)),
        ("sparse_row_offsets", torch.tensor([1, 4, 4, 12], dtype=torch.int32)),
        ("sparse_row_offsets", torch.tensor([0, 9, 4, 12], dtype=torch.int32)),
        ("sparse_columns", torch.full((12,), 8, dtype=torch.int16)),
        ("sparse_columns", torch.full((12,), -1, dtype=torch.int16)),
        ("sparse_values", torch.zeros(11)),
    ],
)
def test_residuals_that_fit_no_weight_are_refused_by_name(part: str, change: Tensor) -> None:
    with pytest.raises(InputError, match=r"X: its residuals do not fit a weight of \[3, 8\]"):
        unpack("X", damage(part, change), (3, 8))


def test_no_entry_changes_nothing() -> None:
    dense = torch.randn(3, 8)
    none = Residual(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0), (3, 8))
    assert torch.equal(unpack("X", pack("X", none), (3, 8)).add_to(dense), dense)
