"""The compiled kernels: found, never built, when first asked for; where there are none, `tier` says so and torch does the work."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, byref, c_char_p, c_int32, c_int64, c_uint64, c_void_p
from functools import cache, lru_cache
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import InputError

LIBRARY = Path(__file__).parent / "cpu" / "libt16.so"
FORCE = "COMPRESS_CPU"
"""The environment variable that names the one to use, or `torch` for none."""
FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SCALES = FLOATS | {torch.float8_e8m0fnu: 3, torch.float8_e4m3fn: 4}
"""What scales of small floats may be."""
CODES = {"e4m3": 4, "e2m1": 5}
STEP = 128
"""Inputs that share a scale, at most: their products must be summed without overflow."""


class _Matrix(ctypes.Structure):
    _fields_ = [
        ("codes", c_void_p), ("scales", c_void_p), ("zeros", c_void_p),
        ("rows", c_int64), ("columns", c_int64), ("group", c_int64), ("step", c_int64), ("bits", c_int32), ("scale", c_int32),
    ]  # fmt: skip


class _Small(ctypes.Structure):
    _fields_ = [
        ("codes", c_void_p), ("scales", c_void_p), ("unit", c_void_p),
        ("rows", c_int64), ("columns", c_int64), ("group", c_int64), ("code", c_int32), ("scale", c_int32),
    ]  # fmt: skip


class _Inputs(ctypes.Structure):
    _fields_ = [("digits", c_void_p), ("scales", c_void_p), ("sums", c_void_p), ("count", c_int32), ("per_input", c_int32)]


@cache
def library() -> ctypes.CDLL | None:
    """The library, or None where it was not built. Raises `InputError` for one that other sources were compiled to."""
    if not LIBRARY.exists():
        return None
    found = ctypes.CDLL(str(LIBRARY))
    try:
        found.t16_tier.restype = c_char_p
        found.t16_tier.argtypes = found.t16_present.argtypes = [c_int32]
        found.t16_read.restype = c_uint64
        found.t16_read.argtypes = [c_void_p, c_int64, c_int32]
        found.t16_linear.argtypes = [c_int32, POINTER(_Matrix), c_void_p, c_int64, c_int64, c_int32, c_void_p, c_int32]
        found.t16_experts.argtypes = [c_int32, POINTER(_Matrix), c_int64, c_void_p, c_void_p, c_int64, c_int32, c_void_p, c_int32]
        found.t16_multiply.argtypes = [c_int32, POINTER(_Matrix), POINTER(_Inputs), c_void_p, c_int32]
        found.t16_dense.argtypes = [c_int32, c_void_p, c_int32, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_int32]
        found.t16_vnm.argtypes = [
            c_int32, c_void_p, c_int32, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int32,
        ]  # fmt: skip
        found.t16_small_floats.argtypes = [c_int32, POINTER(_Small), c_void_p, c_int64, c_void_p, c_int32]
    except AttributeError as error:
        raise InputError.one(str(LIBRARY), f"is of another version ({error})", "run python -m compress.kernels.build") from error
    return found


@cache
def built() -> dict[str, bool]:
    """The instruction sets of the library, the fastest last, and whether this processor has them; none without a library."""
    found = library()
    names = takewhile(bool, map(found.t16_tier, count())) if found else ()
    return {name.decode(): bool(found and found.t16_present(number)) for number, name in enumerate(names)}


def tier() -> str:
    """The one in use: the fastest, or what $COMPRESS_CPU names; `torch` if there is none. Raises `InputError` for one that is not there."""
    return _chosen(os.environ.get(FORCE))


@cache
def _chosen(wanted: str | None) -> str:
    present = [name for name, here in built().items() if here]
    if wanted and wanted not in (*present, "torch"):
        raise InputError.one(f"${FORCE}", f"no kernels called {wanted!r} here", f"there are {', '.join((*present, 'torch'))}")
    return wanted or (present[-1] if present else "torch")


def missing_why() -> str | None:
    """Why torch does the work on this machine, or None if a kernel does."""
    if tier() != "torch":
        return None
    return f"${FORCE} is torch" if built() else "no kernels were built (python -m compress.kernels.build)"


@cache
def _number(name: str) -> int:
    return list(built()).index(name)


@cache
def step_of(group: int, unit: int) -> int | None:
    """How many inputs share a scale where weights share one by `group`: the most that divide it, whole units, or None if there is no such number."""
    return next((step for step in range(min(STEP, group), 0, -1) if group % step == 0 and step % unit == 0), None)


def multiply(
    inputs: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, *, bits: int, rows: int, columns: int, step: int, digits: int, tier: str
) -> Tensor:
    """``inputs`` [tokens, in] float32, contiguous, times the packed weight; [tokens, out] float32.

    ``columns`` are those that are stored. Each input is rounded to so many digits of 8 bits, `step` of them to one scale.
    """
    found = library()
    assert found is not None
    tokens, given = inputs.shape
    outputs, threads = torch.empty(tokens, rows), torch.get_num_threads()
    matrix = _matrix(
        codes.data_ptr(), scales.data_ptr(), _pointer(zeros), rows, columns, columns // scales.shape[1], step, bits, FLOATS[scales.dtype]
    )
    found.t16_linear(_number(tier), matrix, inputs.data_ptr(), tokens, given, digits, outputs.data_ptr(), threads)
    return outputs


def experts(
    inputs: Tensor,
    ends: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    bits: int,
    rows: int,
    columns: int,
    step: int,
    digits: int,
    tier: str,
) -> Tensor:
    """`multiply` by the weights [experts, ...] of several, each with its own ``inputs``: those from the end before up to its own of ``ends``.

    ``ends`` int64 [experts] ascend to at most the number of inputs; outputs of inputs beyond are zero. Raises `ValueError` for others.
    """
    found = library()
    assert found is not None
    tokens, given = inputs.shape
    values = ends.tolist()
    if ends.dtype != torch.int64 or len(values) != len(codes) or sorted([0, *values, tokens]) != [0, *values, tokens]:
        raise ValueError(f"ends must be int64 [{len(codes)}], ascending to at most {tokens}, got {values}")
    outputs, threads = torch.zeros(tokens, rows), torch.get_num_threads()
    matrix = _matrix(
        codes.data_ptr(), scales.data_ptr(), _pointer(zeros), rows, columns, columns // scales.shape[2], step, bits, FLOATS[scales.dtype]
    )
    at = ends.contiguous()
    found.t16_experts(_number(tier), matrix, len(ends), at.data_ptr(), inputs.data_ptr(), given, digits, outputs.data_ptr(), threads)
    return outputs


def products(
    rounded: Tensor, units: Tensor, sums: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, *, bits: int, rows: int, step: int, tier: str
) -> Tensor:
    """`multiply` for inputs that are rounded already; float32 [tokens, out].

    ``rounded`` int8 [tokens, digits, columns], from -127 to 127; ``units`` float32 [tokens, digits, steps], what each digit counts; ``sums`` float32
    [tokens, steps] of the inputs. All contiguous.
    """
    found = library()
    assert found is not None
    tokens, digits, columns = rounded.shape
    outputs = torch.empty(tokens, rows)
    matrix = _matrix(
        codes.data_ptr(), scales.data_ptr(), _pointer(zeros), rows, columns, columns // scales.shape[1], step, bits, FLOATS[scales.dtype]
    )
    right = _Inputs(rounded.data_ptr(), units.data_ptr(), sums.data_ptr(), tokens * digits, digits)
    found.t16_multiply(_number(tier), matrix, byref(right), outputs.data_ptr(), torch.get_num_threads())
    return outputs


def dense(inputs: Tensor, weight: Tensor, tier: str) -> Tensor:
    """``inputs`` [tokens, in] float32 times ``weight`` [out, in] in a dtype of `FLOATS`, both contiguous; [tokens, out] float32."""
    found = library()
    assert found is not None
    (tokens, columns), rows, kind = inputs.shape, weight.shape[0], FLOATS[weight.dtype]
    outputs, threads = torch.empty(tokens, rows), torch.get_num_threads()
    found.t16_dense(_number(tier), weight.data_ptr(), kind, rows, columns, inputs.data_ptr(), tokens, outputs.data_ptr(), threads)
    return outputs


def vnm(inputs: Tensor, values: Tensor, columns: Tensor, tier: str) -> Tensor:
    """``inputs`` [tokens, in] float32 times a weight of blocks of V outputs, of which each reads some inputs only; [tokens, out] float32.

    ``values`` [blocks, V, kept] in a dtype of `FLOATS`, ``columns`` int32 [blocks, kept], which inputs these belong to. All contiguous.
    """
    found = library()
    assert found is not None
    (tokens, width), (blocks, height, kept), kind = inputs.shape, values.shape, FLOATS[values.dtype]
    outputs, threads = torch.empty(tokens, blocks * height), torch.get_num_threads()
    weight = values.data_ptr(), kind, blocks * height, kept, height, columns.data_ptr()
    found.t16_vnm(_number(tier), *weight, inputs.data_ptr(), width, tokens, outputs.data_ptr(), threads)
    return outputs


def small_floats(inputs: Tensor, codes: Tensor, scales: Tensor, units: Tensor | None, coding: str, tier: str) -> Tensor:
    """``inputs`` [tokens, in] float32 times a weight of small floats, all contiguous; [tokens, out] float32.

    ``codes``, ``scales`` in a dtype of `SCALES` and ``units`` are as `compress.kernels.unpacked` says for `coding`, one of `CODES`.
    """
    found = library()
    assert found is not None
    (tokens, columns), (rows, groups) = inputs.shape, scales.shape
    outputs, threads = torch.empty(tokens, rows), torch.get_num_threads()
    matrix = _small(codes.data_ptr(), scales.data_ptr(), _pointer(units), rows, columns, columns // groups, CODES[coding], SCALES[scales.dtype])
    found.t16_small_floats(_number(tier), matrix, inputs.data_ptr(), tokens, outputs.data_ptr(), threads)
    return outputs


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@lru_cache(1 << 14)
def _matrix(*fields: int | None) -> Any:
    """The C structure of these fields: a token asks for the same ones as the token before it."""
    return byref(_Matrix(*fields))


@lru_cache(1 << 14)
def _small(*fields: int | None) -> Any:
    return byref(_Small(*fields))


def read(data: Tensor, threads: int) -> None:
    """Read ``data``, contiguous, as fast as the processor can: what kernels are measured against."""
    found = library()
    assert found is not None
    found.t16_read(data.data_ptr(), data.numel() * data.element_size() // 4096 * 4096, threads)
