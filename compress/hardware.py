"""What this machine can do, asked of the machine rather than assumed."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from functools import cache

import torch


def device() -> torch.device:
    """Where blocks are computed: a CUDA device if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@cache
def bf16_is_native() -> bool:
    """Whether bfloat16 products run in hardware here.

    Virtual machines have been seen to advertise AMX and then kill the process on its first use, so the claim is tried in a child first.
    """
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    if not (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return False
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # the parent's thread pool does not survive a fork
        tile = torch.ones(64, 64, dtype=torch.bfloat16)
        os._exit(0 if float((tile @ tile)[0, 0]) == 64 else 1)
    return os.waitpid(child, 0)[1] == 0


LARGE_BYTES = 4 << 20


def return_freed_memory() -> None:
    """Have the C library give large blocks back to the system when they are freed.

    glibc raises its threshold for doing so each time a large block is freed, up to 32 MiB; sequences of many lengths then leave more
    than a gigabyte of holes. Elsewhere this does nothing.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        mmap_threshold, trim_threshold = -3, -1
        libc.mallopt(mmap_threshold, LARGE_BYTES)
        libc.mallopt(trim_threshold, LARGE_BYTES)


def compute_dtype(stored: torch.dtype) -> torch.dtype:
    """The dtype blocks run in: the stored one where the hardware computes in it, float32 elsewhere."""
    if stored == torch.bfloat16 and bf16_is_native():
        return stored
    if stored == torch.float16 and torch.cuda.is_available():
        return stored
    return torch.float32


def peak_bytes() -> int:
    """Most resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
