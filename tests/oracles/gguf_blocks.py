"""Blocks of GGML, written field by field: each place follows from how ggml's own `dequantize_row_*` reads it."""

from __future__ import annotations

import struct
from collections.abc import Sequence


def half(number: float) -> list[int]:
    return list(struct.pack("<e", number))


def nibbles(q: Sequence[int], chunk: int) -> list[int]:
    out = []
    for start in range(0, len(q), chunk):
        for place in range(chunk // 2):
            out.append(q[start + place] + 16 * q[start + chunk // 2 + place])
    return out


def quarters(q: Sequence[int]) -> list[int]:
    out = [0] * (len(q) // 4)
    for index, field in enumerate(q):
        chunk, rest = divmod(index, 128)
        quarter, place = divmod(rest, 32)
        out[chunk * 32 + place] += field << 2 * quarter
    return out


def plane(bits: Sequence[int]) -> list[int]:
    """Byte ``i % 32``, bit ``i // 32``."""
    out = [0] * 32
    for index, bit in enumerate(bits):
        out[index % 32] += bit << index // 32
    return out


def straight(bits: Sequence[int]) -> list[int]:
    return list(struct.pack("<I", sum(bit << index for index, bit in enumerate(bits))))


def six_and_six(s: Sequence[int], t: Sequence[int]) -> list[int]:
    out = [0] * 12
    for j in range(4):
        out[j] += s[j]
        out[j + 4] += t[j]
    for j in range(4, 8):
        out[j + 4] += (s[j] & 15) + ((t[j] & 15) << 4)
        out[j - 4] += (s[j] >> 4) << 6
        out[j] += (t[j] >> 4) << 6
    return out


def sixteen_six(s: Sequence[int]) -> list[int]:
    out = [0] * 12
    for j, scale in enumerate(s):
        out[j % 8] += (scale & 15) << (0 if j < 8 else 4)
        out[8 + j % 4] += (scale >> 4) << 2 * (j // 4)
    return out


def block(kind: str, q: Sequence[int], d: float, s: Sequence[int] = (), e: float = 0.0, t: Sequence[int] = ()) -> list[int]:
    """Bytes of one block: unsigned fields ``q``, and what `Fields` of compress.formats.gguf_blocks calls ``d``, ``s``, ``e``, ``t``."""
    low = [field & 15 for field in q]
    match kind:
        case "Q4_0":
            return half(d) + nibbles(q, 32)
        case "Q4_1":
            return half(d) + half(-e) + nibbles(q, 32)
        case "Q5_0":
            return half(d) + straight([field >> 4 for field in q]) + nibbles(low, 32)
        case "Q5_1":
            return half(d) + half(-e) + straight([field >> 4 for field in q]) + nibbles(low, 32)
        case "Q8_0":
            return half(d) + [(field - 128) % 256 for field in q]
        case "Q2_K":
            return [one + 16 * two for one, two in zip(s, t, strict=True)] + quarters(q) + half(d) + half(e)
        case "Q3_K":
            return plane([field >> 2 for field in q]) + quarters([field & 3 for field in q]) + sixteen_six([each + 32 for each in s]) + half(d)
        case "Q4_K":
            return half(d) + half(e) + six_and_six(s, t) + nibbles(q, 64)
        case "Q5_K":
            return half(d) + half(e) + six_and_six(s, t) + plane([field >> 4 for field in q]) + nibbles(low, 64)
        case "Q6_K":
            return nibbles(low, 128) + quarters([field >> 4 for field in q]) + [each % 256 for each in s] + half(d)
    raise ValueError(kind)
