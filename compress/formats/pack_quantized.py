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
    words = -(-count * bits // 32)
    # Eight codes fill `bits` whole bytes, whatever the width.
    unsigned = codes.new_zeros(rows, -(-count // 8) * 8)
    unsigned[:, :count] = codes + (1 << (bits - 1))
    octets = unsigned.view(torch.uint8).view(rows, -1, 8)
    stream = torch.zeros(octets.shape[:2], dtype=torch.int64, device=codes.device)
    for position in range(8):
        stream |= octets[..., position].to(torch.int64) << (position * bits)
    packed = torch.zeros(rows, words * 4, dtype=torch.uint8, device=codes.device)
    filled = stream.view(torch.uint8).view(rows, -1, 8)[..., :bits].reshape(rows, -1)
    width = min(filled.shape[1], packed.shape[1])
    packed[:, :width] = filled[:, :width]
    return packed.view(torch.int32)


def unpack_stream(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_stream`: signed codes int8 [rows, count]."""
    rows = packed.shape[0]
    octets = -(-count // 8)
    stored = packed.contiguous().view(torch.uint8)
    filled = torch.zeros(rows, octets * bits, dtype=torch.uint8, device=packed.device)
    width = min(filled.shape[1], stored.shape[1])
    filled[:, :width] = stored[:, :width]
    stream = torch.zeros(rows, octets, 8, dtype=torch.uint8, device=packed.device)
    stream[..., :bits] = filled.view(rows, octets, bits)
    words = stream.view(torch.int64)[..., 0]
    codes = torch.empty(rows, octets, 8, dtype=torch.int8, device=packed.device)
    for position in range(8):
        codes[..., position] = ((words >> (position * bits)) & ((1 << bits) - 1)) - (1 << (bits - 1))
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
    return Quantized(unpack_stream(packed, bits, columns), scale, zero_point, Integer(bits, zero_point is None))
