"""Memory in large pages: tensors side by side, each of its own."""

from __future__ import annotations

import copy
import gc
import mmap
import weakref
from pathlib import Path

import pytest
import torch

from compress.kernels import memory


def test_tensors_lie_side_by_side_and_are_their_own() -> None:
    given = [memory.empty(3, size, dtype=torch.int16).fill_(size % 99) for size in (1, 100, 70_000)]
    big = memory.empty(memory.PIECE + 5).fill_(7)
    for tensor, size in zip(given, (1, 100, 70_000), strict=True):
        assert tensor.eq(size % 99).all() and tensor.data_ptr() % memory.LINE == 0
        assert tensor.untyped_storage().nbytes() == copy.deepcopy(tensor).untyped_storage().nbytes() == 6 * size
    assert big.eq(7).all() and memory.empty(0, 3).shape == (0, 3)
    assert memory.placed(given[1].T).equal(given[1].T)


def test_a_module_is_moved_as_it_is() -> None:
    module = torch.nn.BatchNorm1d(5)
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    memory.place(module)
    assert all(buffer.equal(before[name]) and buffer.data_ptr() % memory.LINE == 0 for name, buffer in module.named_buffers())


def test_a_piece_lives_as_long_as_its_tensors() -> None:
    piece = memory._Piece(1 << 20)
    tensor, alive = piece.give(100), weakref.ref(piece)
    assert tensor is not None and piece.give(8 << 20) is None
    tensor.fill_(3)
    del piece
    gc.collect()
    assert alive() is None and tensor.eq(3).all()


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="needs Linux, where one can ask for large pages; ran there on 2026-11-22")
def test_large_pages_are_asked_for() -> None:
    tensor = memory.empty(memory.PIECE + 1).fill_(1)
    start = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            low, high = (int(number, 16) for number in line.split()[0].split("-"))
            start = line if low <= tensor.data_ptr() < high else None
        elif start and line.startswith("VmFlags:"):
            assert "hg" in line.split()
            return
    raise AssertionError("the tensor lies nowhere")
