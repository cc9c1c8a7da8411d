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
from compress.numerics.grid import Quantized

NAME = "pack-quantized"
PACKED, SCALE, SHAPE, ZERO_POINT = "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"


def pack_stream(codes: Tensor, bits: int) -> Tensor:
    """Signed codes int8 [rows, n] to int32 [rows, ceil(n * bits / 32)], a little-endian bit stream per row."""
    rows, count = codes.shape
    per_period, words = 32 // math.gcd(bits, 32), bits // math.gcd(bits, 32)
    periods = -(-count // per_period)
    unsigned = torch.zeros(rows, periods * per_period, dtype=torch.int64, device=codes.device)
    unsigned[:, :count] = codes.to(torch.int64) + (1 << (bits - 1))
    unsigned = unsigned.view(rows, periods, per_period)
    packed = torch.zeros(rows, periods, words, dtype=torch.int64, device=codes.device)
    for position in range(per_period):
        word, shift = divmod(position * bits, 32)
        packed[..., word] |= unsigned[..., position] << shift
        if shift + bits > 32:
            packed[..., word + 1] |= unsigned[..., position] >> (32 - shift)
    packed &= 0xFFFFFFFF
    packed -= (packed >> 31) << 32  # the same 32 bits as a signed number
    return packed.view(rows, -1)[:, : -(-count * bits // 32)].to(torch.int32).contiguous()


def unpack_stream(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_stream`: signed codes int8 [rows, count]."""
    rows, stored = packed.shape
    per_period, words = 32 // math.gcd(bits, 32), bits // math.gcd(bits, 32)
    periods = -(-count // per_period)
    stream = torch.zeros(rows, periods * words, dtype=torch.int64, device=packed.device)
    stream[:, :stored] = packed
    stream = (stream & 0xFFFFFFFF).view(rows, periods, words)
    codes = torch.empty(rows, periods, per_period, dtype=torch.int8, device=packed.device)
    for position in range(per_period):
        word, shift = divmod(position * bits, 32)
        value = stream[..., word] >> shift
        if shift + bits > 32:
            value |= stream[..., word + 1] << (32 - shift)
        codes[..., position] = (value & ((1 << bits) - 1)) - (1 << (bits - 1))
    return codes.view(rows, -1)[:, :count].contiguous()


def pack(linear: str, weight: Quantized) -> dict[str, Tensor]:
    """The tensors of one linear under their names on disk."""
    tensors = {
        f"{linear}.{PACKED}": pack_stream(weight.codes, weight.bits),
        f"{linear}.{SCALE}": weight.scale.contiguous(),
        f"{linear}.{SHAPE}": torch.tensor(weight.codes.shape, dtype=torch.int64),
    }
    if weight.zero_point is not None:
        tensors[f"{linear}.{ZERO_POINT}"] = pack_stream(weight.zero_point.T, weight.bits).T.contiguous()
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
        zero_point = unpack_stream(zero_point.T.contiguous(), bits, rows).T.contiguous()
    return Quantized(unpack_stream(packed, bits, columns), scale, zero_point, bits)
