"""`pack-quantized` of compressed-tensors: integer weights of 2 to 8 bits as one continuous stream of bits.

========================  =======================================  ======================================================
tensor                    dtype, shape                             content
========================  =======================================  ======================================================
``X.weight_packed``       int32 [out, ceil(in * bits / 32)]        ``q + 2^(b-1)``, little-endian along ``in``; a code may straddle words
``X.weight_scale``        model dtype [out, groups]                multiply
``X.weight_shape``        int64 [2]                                ``[out, in]``
``X.weight_zero_point``   int32 [ceil(out * bits / 32), groups]    asymmetric only; the same stream along ``out``
========================  =======================================  ======================================================

A weight is ``(q - zero_point) * scale``. Checked bit by bit against the packer of compressed-tensors in the tests.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compress.errors import InputError
from compress.numerics.grid import Integer, Quantized

NAME = "pack-quantized"
PACKED, SCALE, SHAPE, ZERO_POINT = "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"


def holds(dtypes: dict[str, str]) -> bool:
    """Whether parts of these dtypes, by name, are a linear in this layout."""
    return dtypes.get(PACKED) == "I32"


def pack_stream(codes: Tensor, bits: int) -> Tensor:
    """Signed codes int8 [rows, n] to int32 [rows, ceil(n * bits / 32)], a little-endian bit stream per row."""
    rows, count = codes.shape
    together, octets = _unit(bits)
    units = -(-count // together)
    unsigned = torch.zeros(rows, units * together, dtype=torch.uint8, device=codes.device)
    torch.add(codes.view(torch.uint8), 1 << (bits - 1), out=unsigned[:, :count])
    fields = unsigned.view(rows, units, together)
    stream = torch.zeros(rows, units, octets, dtype=torch.uint8, device=codes.device)
    for position in range(together):
        octet, shift = divmod(position * bits, 8)
        stream[..., octet] |= fields[..., position] << shift
        if shift + bits > 8:
            stream[..., octet + 1] |= fields[..., position] >> (8 - shift)
    packed = torch.zeros(rows, -(-count * bits // 32) * 4, dtype=torch.uint8, device=codes.device)
    width = min(units * octets, packed.shape[1])
    packed[:, :width] = stream.view(rows, units * octets)[:, :width]
    return packed.view(torch.int32) if count else torch.empty(rows, 0, dtype=torch.int32, device=codes.device)


def unpack_stream(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_stream`: signed codes int8 [rows, count]."""
    rows = packed.shape[0]
    together, octets = _unit(bits)
    units = -(-count // together)
    stored = packed.contiguous().view(torch.uint8)
    if stored.shape[1] < units * octets:
        stored = torch.nn.functional.pad(stored, (0, units * octets - stored.shape[1]))
    stream = stored[:, : units * octets].view(rows, units, octets)
    codes = torch.empty(rows, units, together, dtype=torch.uint8, device=packed.device)
    for position in range(together):
        octet, shift = divmod(position * bits, 8)
        field = stream[..., octet] >> shift
        if shift + bits > 8:
            field |= stream[..., octet + 1] << (8 - shift)
        torch.bitwise_and(field, (1 << bits) - 1, out=codes[..., position])
    codes -= 1 << (bits - 1)
    return codes.view(torch.int8).view(rows, units * together)[:, :count].contiguous()


def pack_zero_points(zero_points: Tensor, bits: int) -> Tensor:
    """Zero points int8 [rows, groups] to int32 [ceil(rows * bits / 32), groups], a stream per group."""
    return pack_stream(zero_points.T, bits).T.contiguous()


def unpack_zero_points(packed: Tensor, bits: int, rows: int) -> Tensor:
    """The inverse of `pack_zero_points`: int8 [rows, groups]."""
    return unpack_stream(packed.T.contiguous(), bits, rows).T.contiguous()


def _unit(bits: int) -> tuple[int, int]:
    """How many codes fill whole bytes, and how many of them: arithmetic in bytes is several times faster than in words."""
    shared = math.gcd(bits, 8)
    return 8 // shared, bits // shared


def pack(linear: str, weight: Quantized) -> dict[str, Tensor]:
    """The tensors of one linear under their names on disk."""
    tensors = {
        f"{linear}.{PACKED}": pack_stream(weight.codes, weight.bits),
        f"{linear}.{SCALE}": weight.scale.contiguous(),
        f"{linear}.{SHAPE}": torch.tensor(weight.codes.shape, dtype=torch.int64),
    }
    if weight.zero_point is not None:
        tensors[f"{linear}.{ZERO_POINT}"] = pack_zero_points(weight.zero_point, weight.bits)
    return tensors


def unpack(linear: str, tensors: dict[str, Tensor]) -> Quantized:
    """The inverse of `pack`. Bits are read off the shapes. Raises `InputError` if they contradict each other."""
    packed, scale = tensors[f"{linear}.{PACKED}"], tensors[f"{linear}.{SCALE}"]
    rows, columns = tensors[f"{linear}.{SHAPE}"].tolist()
    fitting = [bits for bits in range(2, 9) if -(-columns * bits // 32) == packed.shape[1]]
    if len(fitting) != 1 or packed.shape[0] != rows or scale.shape[0] != rows or columns % scale.shape[1]:
        raise InputError.one(linear, f"packed {list(packed.shape)} and scale {list(scale.shape)} do not fit a weight of {[rows, columns]}")
    bits = fitting[0]
    zero_point = tensors.get(f"{linear}.{ZERO_POINT}")
    if zero_point is not None:
        zero_point = unpack_zero_points(zero_point, bits, rows)
    return Quantized(unpack_stream(packed, bits, columns), scale, zero_point, Integer(bits, zero_point is None))
