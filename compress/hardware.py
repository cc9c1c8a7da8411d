"""What this machine can do, asked of the machine rather than assumed."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


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


MMAP_BYTES = 32 << 20
"""Blocks from this size on are mapped one by one: the most glibc allows."""
IDLE_BYTES = 512 << 20


def tune_allocator() -> None:
    """Have freed memory reused within a step, and take it from the system in large pages. To be called before any is taken.

    By default each freed block of up to 32 MiB goes back to the system at once and comes again zeroed, page by page: a quarter of the
    time of a pass. `return_freed_memory` gives it back where a step ends. Where the C library is not glibc, it does as it likes.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        mmap_threshold, trim_threshold = -3, -1
        libc.mallopt(mmap_threshold, MMAP_BYTES)
        libc.mallopt(trim_threshold, IDLE_BYTES)


def return_freed_memory() -> None:
    """Give freed memory back to the system, also what lies between blocks in use."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def in_parallel(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """``work`` of each of `items`, in order; on CPU as many at a time as torch uses threads, each of them computing on one.

    For operations of about a million elements each: smaller ones wait for Python's lock longer than they take.
    """
    items = list(items)
    threads = torch.get_num_threads()
    if len(items) < 2 or threads < 2 or torch.cuda.is_available():
        return [work(item) for item in items]
    return list(_workers(threads).map(work, items))


@contextmanager
def one_thread() -> Iterator[None]:
    """While inside, torch computes on one thread: for many short operations in a row, which would wait for the other cores longer than they take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@cache
def _workers(threads: int) -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(threads, "compress")
    everyone = Barrier(threads)

    def begin() -> None:
        torch.get_num_threads()  # has a new thread take over the caller's number, which it would do later otherwise
        torch.set_num_threads(1)
        everyone.wait()

    list(pool.map(lambda _: begin(), range(threads)))
    torch.set_num_threads(threads)  # what was set last is what threads started by others begin with
    return pool


def compute_dtype(stored: torch.dtype) -> torch.dtype:
    """The dtype blocks run in: the stored one where the hardware computes in it, float32 elsewhere."""
    if stored == torch.float64:
        return stored
    if stored == torch.bfloat16 and bf16_is_native():
        return stored
    if stored == torch.float16 and torch.cuda.is_available():
        return stored
    return torch.float32


def widened(value: torch.Tensor) -> torch.Tensor:
    """`value` in the dtype that sums are kept in: float64 if it is that, else float32."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def peak_bytes() -> int:
    """Most resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
