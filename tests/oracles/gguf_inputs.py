"""Inputs of products as ggml's plain C rounds them, a number at a time in float32; halves to the even integer, as its kernels for AVX2 do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ONE = np.float32


def block_of_32(numbers: Sequence[np.float32]) -> tuple[list[int], np.float32, np.float32, np.float32]:
    """Q8_0 and Q8_1: integers, the scale before and after it is rounded to float16, and the sum that Q8_1 stores."""
    peak = ONE(max(abs(number) for number in numbers))
    scale = ONE(peak / ONE(127))
    inverse = ONE(ONE(127) / peak) if peak else ONE(0)
    codes = [int(np.rint(ONE(number * inverse))) for number in numbers]
    return codes, scale, ONE(np.float16(scale)), ONE(np.float16(ONE(scale * ONE(sum(codes)))))


def block_of_256(numbers: Sequence[np.float32]) -> tuple[list[int], np.float32]:
    """Q8_K: integers and the scale, whose sign is that of the first of the largest numbers, turned round."""
    largest = ONE(0)
    for number in numbers:
        if abs(number) > abs(largest):
            largest = number
    if not largest:
        return [0] * len(numbers), ONE(0)
    inverse = ONE(ONE(-127) / largest)
    return [min(127, int(np.rint(ONE(inverse * number)))) for number in numbers], ONE(ONE(1) / inverse)


def rounded(numbers: Sequence[np.float32], kind: str) -> list[np.float32]:
    """What a row of inputs becomes."""
    found: list[np.float32] = []
    if kind == "F32":
        return list(numbers)
    if kind == "F16":
        return [ONE(np.float16(number)) for number in numbers]
    if kind == "BF16":
        for number in numbers:
            whole = int(np.frombuffer(number.tobytes(), np.uint32)[0])
            kept = (whole + 0x7FFF + (whole >> 16 & 1)) >> 16 << 16
            found.append(np.frombuffer(np.uint32(kept).tobytes(), np.float32)[0])
        return found
    for start in range(0, len(numbers), 256 if kind == "Q8_K" else 32):
        if kind == "Q8_K":
            codes, scale = block_of_256(numbers[start : start + 256])
        else:
            codes, _, scale, _ = block_of_32(numbers[start : start + 32])
        found += [ONE(scale * ONE(code)) for code in codes]
    return found


def product(q: Sequence[int], d: Sequence[float], m: Sequence[float], numbers: Sequence[np.float32]) -> float:
    """Of a row of Q4_1 or Q5_1, weights ``d * q + m`` in blocks of 32, with inputs in Q8_1; the sums are exact."""
    total = 0.0
    for block in range(len(d)):
        place = slice(32 * block, 32 * block + 32)
        codes, _, scale, whole = block_of_32(numbers[place])
        total += d[block] * float(scale) * sum(one * other for one, other in zip(q[place], codes, strict=True)) + m[block] * float(whole)
    return total
