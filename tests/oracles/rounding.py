"""Grids, one number at a time."""

from __future__ import annotations

import struct

import torch


def as_stored(value: float, dtype: torch.dtype) -> float:
    """What is left of a float32 after it was stored in `dtype`."""
    return float(torch.tensor(value, dtype=torch.float32).to(dtype))


def float32(value: float) -> float:
    """A Python float cut to 32 bits."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def minmax_group(values: list[float], bits: int, symmetric: bool, stored: torch.dtype, shrink: float = 1.0, sign: float = 1.0) -> tuple[float, int]:
    """Scale and zero point of one group whose range is shrunk."""
    low_code = -(2 ** (bits - 1))
    high_code = 2 ** (bits - 1) - 1
    if symmetric:
        high = max(abs(value) for value in values)
        low = -high
    else:
        low = min(0.0, min(values))
        high = max(0.0, max(values))
    low, high = float32(low * float32(shrink)), float32(high * float32(shrink))
    scale = as_stored(max(float32(float32(high - low) / (2**bits - 1)), float32(1e-8)), stored)
    if symmetric:
        return scale * sign, 0
    zero = round(float32(low_code - float32(low / scale)))
    return scale, min(max(zero, low_code), high_code)


def round_group(values: list[float], scale: float, zero: int, bits: int) -> list[int]:
    """Codes of one group, ties to even."""
    low_code, high_code = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    inverse = float32(1 / scale)
    return [min(max(round(float32(float32(value * inverse) + zero)), low_code), high_code) for value in values]


def group_error(values: list[float], scale: float, zero: int, bits: int, importance: list[float]) -> float:
    """Weighted squared error of rounding one group."""
    codes = round_group(values, scale, zero, bits)
    return sum(weight * ((code - zero) * scale - value) ** 2 for value, code, weight in zip(values, codes, importance, strict=True))


def best_group(values: list[float], bits: int, symmetric: bool, stored: torch.dtype, importance: list[float], coarse: int, smallest: float) -> float:
    """The least error over `coarse` evenly shrunk ranges (and both signs), then over half and quarter steps around the best."""
    spacing = (1 - smallest) / coarse
    signs = (1.0, -1.0) if symmetric else (1.0,)
    candidates = [(1 - index * spacing, sign) for sign in signs for index in range(coarse)]

    def error(candidate: tuple[float, float]) -> float:
        scale, zero = minmax_group(values, bits, symmetric, stored, *candidate)
        return group_error(values, scale, zero, bits, importance)

    best = min(candidates, key=error)
    for step in (spacing / 2, spacing / 4):
        centre, sign = best
        best = min([best, (centre + step, sign), (centre - step, sign)], key=error)
    return error(best)
