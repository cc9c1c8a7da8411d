"""Blocks of GGML: integer codes with their scales in the layouts that a GGUF file holds, moved and never rounded anew.

A weight of ours is ``(code - zero_point) * scale``. Every layout divides a row into blocks and holds, for the weights of a block, unsigned fields
``q`` and what they are multiplied by; a row of a file is its blocks one after the other, little-endian.

=======  =======  =====  ==================================  ===================================================================
type     weights  bytes  a weight is                         stored beside the fields
=======  =======  =====  ==================================  ===================================================================
Q4_0     32       18     ``d * (q - 8)``                     float16 ``d``
Q4_1     32       20     ``d * q + m``                       float16 ``d``, ``m``
Q5_0     32       22     ``d * (q - 16)``                    float16 ``d``
Q5_1     32       24     ``d * q + m``                       float16 ``d``, ``m``
Q8_0     32       34     ``d * q``, ``q`` signed             float16 ``d``
Q2_K     256      84     ``d * s * q - e * t``               float16 ``d``, ``e``; for every 16 weights ``s``, ``t`` of 4 bits
Q3_K     256      110    ``d * (s - 32) * (q - 4)``          float16 ``d``; for every 16 weights ``s`` of 6 bits
Q4_K     256      144    ``d * s * q - e * t``               float16 ``d``, ``e``; for every 32 weights ``s``, ``t`` of 6 bits
Q5_K     256      176    ``d * s * q - e * t``               float16 ``d``, ``e``; for every 32 weights ``s``, ``t`` of 6 bits
Q6_K     256      210    ``d * s * (q - 32)``                float16 ``d``; for every 16 weights ``s``, int8
MXFP4    32       17     ``2^(x - 127) *`` E2M1 of ``q``     the exponent ``x``
=======  =======  =====  ==================================  ===================================================================

Where each bit lies is in docs/formats.md. `choose` takes the smallest type that holds codes and scales exactly. A scale of bfloat16 is a float16 as
long as it is neither above 65504 nor below 2^-17; scales that share a block of 256 must be small multiples of one number, which they are when they
are equal, so these types are for groups of 256 and more. The non-uniform types (IQ4_NL and its like) hold no grid of ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import InputError
from compress.formats.mxfp4_pack_quantized import pack_nibbles
from compress.formats.sizes import ggml_refusal
from compress.numerics.grid import E2M1, Integer, Quantized

SUPER = 256
"""Weights of a block whose scales are themselves quantised."""
HALF_MAX = 65504.0


@dataclass(frozen=True)
class Type:
    """One layout: a field has `bits`, one multiplier serves `each` of the `width` weights of a block, which takes `nbytes`.

    With `offset` a field is that much above the signed code; None, fields are unsigned and a minimum is stored. `limits` are the ends of what
    multiplies the scale of the block in blocks of 256, None in others.
    """

    name: str
    width: int
    nbytes: int
    bits: int
    each: int
    offset: int | None
    limits: tuple[int, int] | None = None


TYPES = {
    each.name: each
    for each in (
        Type("Q2_K", SUPER, 84, 2, 16, None, (0, 15)),
        Type("Q3_K", SUPER, 110, 3, 16, 4, (-32, 31)),
        Type("Q4_0", 32, 18, 4, 32, 8),
        Type("Q4_K", SUPER, 144, 4, 32, None, (0, 63)),
        Type("Q4_1", 32, 20, 4, 32, None),
        Type("Q5_0", 32, 22, 5, 32, 16),
        Type("Q5_K", SUPER, 176, 5, 32, None, (0, 63)),
        Type("Q5_1", 32, 24, 5, 32, None),
        Type("Q6_K", SUPER, 210, 6, 16, 32, (-128, 127)),
        Type("Q8_0", 32, 34, 8, 32, 128),
    )
}
"""By name, those of integers, in the order in which they are tried: by bits per weight, and of two equal ones the one with the smaller blocks."""
MXFP4 = "MXFP4"
BYTES = {name: (kind.width, kind.nbytes) for name, kind in TYPES.items()} | {MXFP4: (32, 17)}
"""Weights and bytes of a block, by name."""


@dataclass(frozen=True)
class Fields:
    """What a layout stores of a weight [rows, columns], as numbers, before bits are put in their places.

    ``q`` uint8 [rows, columns]; ``d`` and ``e`` float32 [rows, blocks], holding numbers of float16; ``s`` and ``t`` int16
    [rows, blocks, multipliers], None where a block has none; ``e`` is ``-m`` where a minimum is added.
    """

    kind: Type
    q: Tensor
    d: Tensor
    s: Tensor | None
    e: Tensor | None
    t: Tensor | None


def choose(weights: Iterable[Quantized]) -> str:
    """The type with the fewest bits that holds each of ``weights`` exactly; where none does, the smallest that holds their codes.

    That one rounds scales to float16, so that a weight is off by a factor of at most 1 +- 2^-11, or by its code times 2^-25 where scales are below
    2^-14. Of ``weights`` no more than one is held. Raises `InputError` for what no type holds.
    """
    exact = {*TYPES, MXFP4}
    close = {name for name, kind in TYPES.items() if kind.limits is None and kind.offset is not None}
    for weight in weights:
        if reason := ggml_refusal(weight.codes.shape[1], weight.group_size):
            raise InputError.one("GGUF", reason, "choose another target")
        if isinstance(weight.grid, Integer):
            exact = {name for name in exact if name in TYPES and _exact(weight, TYPES[name])}
            close = {name for name in close if _fit(weight, TYPES[name])}
        elif isinstance(weight.grid, E2M1) and weight.scale.dtype == torch.float8_e8m0fnu:
            exact, close = exact & {MXFP4}, set()
        else:
            raise InputError.one("GGUF", "holds no floats of 8 bits, nor of 4 with scales of 8", "choose another target")
    for name in (MXFP4, *TYPES):
        if name in exact:
            return name
    for name in TYPES:
        if name in close:
            return name
    raise InputError.one("GGUF", "no type holds codes of 8 bits with a zero point", "set symmetric: true")


def pack(weight: Quantized, name: str) -> Tensor:
    """Rows of blocks, uint8 [rows, bytes]. Raises `InputError` for scales that float16 does not hold at all."""
    return _mxfp4(weight) if name == MXFP4 else _packed(fields(weight, TYPES[name]))


def fields(weight: Quantized, kind: Type) -> Fields:
    """What ``kind`` stores of ``weight``, whose codes must fit."""
    if float(weight.scale.abs().max()) > HALF_MAX:
        raise InputError.one("GGUF", f"scales are float16 there, which ends at {HALF_MAX:.0f}", "choose another target")
    shared, zero = _per_multiplier(weight, kind)
    signed = weight.codes.to(torch.int16)
    if kind.offset is not None:
        if weight.zero_point is not None:
            signed = signed - weight.zero_point.to(torch.int16).repeat_interleave(weight.group_size, 1)
        q = signed + kind.offset
    else:
        q = signed - int(weight.grid.low)
    d, s, e, t = _scales(shared, zero, kind)
    return Fields(kind, q.to(torch.uint8), d.half().float(), s, None if e is None else e.half().float(), t)


def _per_multiplier(weight: Quantized, kind: Type) -> tuple[Tensor, Tensor]:
    """Scales float32 and, above the lowest code, zero points int64, for every `each` weights: [rows, blocks, multipliers]."""
    rows, columns = weight.codes.shape
    shape = rows, columns // kind.width, kind.width // kind.each
    zero = torch.zeros_like(weight.scale, dtype=torch.int64) if weight.zero_point is None else weight.zero_point.long()
    repeated = (part.repeat_interleave(weight.group_size // kind.each, 1).view(shape) for part in (weight.scale.float(), zero - int(weight.grid.low)))
    scale, zero = repeated
    return scale, zero


def _scales(scale: Tensor, zero: Tensor, kind: Type) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """``d``, ``s``, ``e``, ``t`` of `Fields` for ``scale`` and ``zero`` [rows, blocks, multipliers], before rounding to float16."""
    if kind.limits is None:
        d = scale[..., 0]
        return d, None, None if kind.offset is not None else d * zero[..., 0], None
    d, s = _common(scale)
    if kind.offset is not None:
        return d, s, None, None
    downwards = (s <= 0).all(2)
    d, s = torch.where(downwards, -d, d), torch.where(downwards[..., None], -s, s)
    # The least multiple is the scale itself, whose float16 is exact wherever that of d is; a larger one makes multipliers small enough to be stored.
    t = s * zero
    divisor = torch.where(t.amax(2) <= kind.limits[1], 1, _divisor(t).clamp_min(1))
    return d, s, d * divisor, t // divisor[..., None]


def _common(scale: Tensor) -> tuple[Tensor, Tensor]:
    """The largest number float32 [...] of which ``scale`` float32 [..., n] are multiples, and the multipliers int64 [..., n]."""
    fraction, exponent = torch.frexp(scale)
    whole = torch.ldexp(fraction, torch.tensor(24)).long()
    lowest = (whole & -whole).clamp_min(1)
    exponent = exponent - 24 + lowest.double().log2().int()  # of an odd number: what is left of `whole` is divided below
    exponent = torch.where(whole == 0, torch.iinfo(torch.int32).max, exponent)
    least = exponent.amin(-1, keepdim=True)
    shift = torch.where(whole == 0, 0, exponent - least).clamp_max(38)  # more is no multiplier of 8 bits anyway
    multiples = (whole // lowest) << shift
    divisor = _divisor(multiples)
    least = torch.where(divisor == 0, 0, least[..., 0])
    return torch.ldexp(divisor.float(), least), multiples // divisor.clamp_min(1)[..., None]


def _divisor(whole: Tensor) -> Tensor:
    """The greatest common divisor of ``whole`` int64 [..., n] along the last dimension."""
    found = whole[..., 0].abs()
    for place in range(1, whole.shape[-1]):
        found = torch.gcd(found, whole[..., place])
    return found


def _exact(weight: Quantized, kind: Type) -> bool:
    """Whether ``kind`` holds ``weight`` to the bit, as far as scales, zero points and the range of codes tell."""
    if weight.codes.shape[1] % kind.width or weight.group_size % kind.each or not _fit(weight, kind):
        return False
    d, s, e, t = _scales(*_per_multiplier(weight, kind), kind)
    if any(part is not None and not torch.equal(part.half().float(), part) for part in (d, e)):
        return False
    low, high = kind.limits or (0, 0)
    return all(part is None or bool(((part >= low) & (part <= high)).all()) for part in (s, t))


def _fit(weight: Quantized, kind: Type) -> bool:
    """Whether a field of ``kind`` holds every code that ``weight`` may have."""
    if kind.offset is None:
        return weight.bits <= kind.bits
    low, high = int(weight.grid.low), int(weight.grid.high)
    if weight.zero_point is not None:
        low, high = low - int(weight.zero_point.max()), high - int(weight.zero_point.min())
    return -kind.offset <= low and high < (1 << kind.bits) - kind.offset


# Bits ---------------------------------------------------------------------------------------------------------------------------


def _packed(found: Fields) -> Tensor:
    """Rows of blocks, uint8 [rows, bytes]."""
    rows, blocks = found.d.shape
    kind, q = found.kind, found.q.view(rows, blocks, -1)
    d = _half(found.d)
    ends = [d] if found.e is None else [d, _half(found.e)]
    match kind.name:
        case "Q4_0":
            parts = [d, _nibbles(q)]
        case "Q4_1":
            parts = [d, _half(-_some(found.e)), _nibbles(q)]
        case "Q5_0":
            parts = [d, _bits(q >> 4), _nibbles(q & 15)]
        case "Q5_1":
            parts = [d, _half(-_some(found.e)), _bits(q >> 4), _nibbles(q & 15)]
        case "Q8_0":
            parts = [d, q ^ 128]
        case "Q2_K":
            parts = [_bytes(_some(found.s) | _some(found.t) << 4), _pairs(q), *ends]
        case "Q3_K":
            parts = [_planes(q >> 2, 32), _pairs(q & 3), _sixteen_of_six(_bytes(_some(found.s) + 32)), d]
        case "Q4_K":
            parts = [*ends, _twice_eight_of_six(_bytes(_some(found.s)), _bytes(_some(found.t))), _nibbles(q, 64)]
        case "Q5_K":
            parts = [*ends, _twice_eight_of_six(_bytes(_some(found.s)), _bytes(_some(found.t))), _planes(q >> 4, 32), _nibbles(q & 15, 64)]
        case _:
            parts = [_nibbles(q & 15, 128), _pairs(q >> 4), _bytes(_some(found.s)), d]
    return torch.cat(parts, 2).view(rows, -1)


def _some(part: Tensor | None) -> Tensor:
    assert part is not None
    return part


def _half(numbers: Tensor) -> Tensor:
    """float16 as bytes, [..., 2]."""
    return numbers.half()[..., None].view(torch.uint8)


def _bytes(whole: Tensor) -> Tensor:
    """Small whole numbers as bytes, negative ones as int8 has them."""
    return whole.to(torch.int16).bitwise_and_(255).to(torch.uint8)


def _nibbles(q: Tensor, chunk: int = 32) -> Tensor:
    """Of every `chunk` fields of 4 bits the first half in the low bits of bytes, the second in the high ones."""
    halves = torch.unflatten(q, 2, (-1, 2, chunk // 2))
    return (halves[:, :, :, 0] | halves[:, :, :, 1] << 4).flatten(2)


def _pairs(q: Tensor) -> Tensor:
    """Of every 128 fields of 2 bits each quarter in two bits of 32 bytes, the first in the lowest."""
    quarters = torch.unflatten(q, 2, (-1, 4, 32))
    return (quarters[:, :, :, 0] | quarters[:, :, :, 1] << 2 | quarters[:, :, :, 2] << 4 | quarters[:, :, :, 3] << 6).flatten(2)


def _planes(q: Tensor, width: int) -> Tensor:
    """Single bits: byte ``i`` holds those of the fields ``i``, ``i + width``, and so on, the first in the lowest bit."""
    parts = torch.unflatten(q, 2, (-1, width))
    packed = torch.zeros_like(parts[:, :, 0])
    for place in range(parts.shape[2]):
        packed |= parts[:, :, place] << place
    return packed


def _bits(q: Tensor) -> Tensor:
    """Single bits, eight fields that follow each other to a byte, the first in the lowest bit."""
    return _planes(torch.unflatten(q, 2, (-1, 8)).transpose(2, 3).flatten(2), q.shape[2] // 8)


def _sixteen_of_six(s: Tensor) -> Tensor:
    """Q3_K's: low nibbles of the first eight and of the second eight in 8 bytes, then the upper two bits of each four in 4 bytes."""
    upper = torch.unflatten(s >> 4, 2, (4, 4))
    last = upper[:, :, 0] | upper[:, :, 1] << 2 | upper[:, :, 2] << 4 | upper[:, :, 3] << 6
    return torch.cat([s[..., :8] & 15 | (s[..., 8:] & 15) << 4, last], 2)


def _twice_eight_of_six(s: Tensor, t: Tensor) -> Tensor:
    """Q4_K's and Q5_K's: four of each whole, with the upper two bits of the other four above them, then the others' low nibbles."""
    return torch.cat([*(part[..., :4] | part[..., 4:] >> 4 << 6 for part in (s, t)), s[..., 4:] & 15 | (t[..., 4:] & 15) << 4], 2)


def _mxfp4(weight: Quantized) -> Tensor:
    rows = len(weight.codes)
    octets = pack_nibbles(weight.codes)
    q = torch.stack([octets & 15, octets >> 4], -1).view(rows, -1, 32)
    return torch.cat([weight.scale.contiguous().view(torch.uint8)[..., None], _nibbles(q)], 2).view(rows, -1)
