"""The T16 layout: codes of 2, 3, 4 or 8 bits in blocks of 16 rows, as every kernel reads them.

A matrix [out, in] is stored as uint8 ``[out / 16, vectors, 16, 4]``. A vector is 64 bytes: lane n, four bytes, belongs to row n of the
block, and byte j of a lane holds one code per bit field:

    bits  columns  bit fields of a byte (most significant first)        field f holds column
    8     4        a a a a a a a a                                      j
    4     8        b b b b a a a a                                      4 f + j   (a: f = 0, b: f = 1)
    2     16       d d c c b b a a                                      4 f + j
    3     32       three vectors: G G b b b a a a | H H d d d c c c | h g f f f e e e
                   a to f are fields 0 to 5; field 6 is G G g, field 7 is H H h

so a weight takes exactly its bits, no field straddles a byte, and four neighbouring columns of a row meet the four bytes of an input that one
multiply-add instruction takes. Rows are padded to 16 and columns to the unit of the width (`COLUMNS`) with codes of zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 16
VECTOR = 32
"""Bits of a row in one vector."""
COLUMNS = {8: 4, 4: 8, 3: 32, 2: 16}
"""Columns of the smallest piece of a row that is stored whole, by bits."""


def padded(size: int, unit: int) -> int:
    """`size`, rounded up to whole units."""
    return -(-size // unit) * unit


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [out, in] uint8, each below ``2 ** bits``, as uint8 [ceil(out / 16), vectors, 16, 4]. Raises `ValueError` for other widths."""
    if bits not in COLUMNS:
        raise ValueError(f"no layout for {bits} bits; there is one for {', '.join(map(str, sorted(COLUMNS)))}")
    out, columns = codes.shape
    rows, wide = padded(out, ROWS), padded(columns, COLUMNS[bits])
    whole = torch.zeros(rows, wide, dtype=torch.uint8, device=codes.device)
    whole[:out, :columns] = codes
    # [block, row, unit, field, byte] to one [block, unit, row, byte] per field.
    fields = whole.view(rows // ROWS, ROWS, wide // COLUMNS[bits], -1, 4).permute(3, 0, 2, 1, 4).unbind(0)
    if bits == 3:
        a, b, c, d, e, f, g, h = fields
        first = a | b << 3 | (g >> 1) << 6
        second = c | d << 3 | (h >> 1) << 6
        third = e | f << 3 | (g & 1) << 6 | (h & 1) << 7
        packed = torch.stack([first, second, third], 2).flatten(1, 2)
    else:
        packed = fields[0].clone()
        for place, field in enumerate(fields[1:], 1):
            packed |= field << bits * place
    return packed.contiguous()


def unpack(packed: Tensor, bits: int, out: int, columns: int) -> Tensor:
    """Codes [out, in] uint8 of what `pack` has packed."""
    blocks = packed.shape[0]
    if bits == 3:
        first, second, third = packed.view(blocks, -1, 3, ROWS, 4).unbind(2)
        low = [value >> shift & 7 for value in (first, second, third) for shift in (0, 3)]
        fields = [*low, first >> 6 << 1 | third >> 6 & 1, second >> 6 << 1 | third >> 7]
    else:
        mask = (1 << bits) - 1
        fields = [packed >> bits * place & mask for place in range(8 // bits)]
    codes = torch.stack(fields, 3)  # [block, unit, row, field, byte]
    return codes.permute(0, 2, 1, 3, 4).reshape(blocks * ROWS, -1)[:out, :columns].contiguous()


def by_block(values: Tensor) -> Tensor:
    """Scales or zero points [out, groups] as [ceil(out / 16), groups, 16]; what is padded is zero."""
    out, groups = values.shape
    whole = torch.zeros(padded(out, ROWS), groups, dtype=values.dtype, device=values.device)
    whole[:out] = values
    return whole.view(-1, ROWS, groups).transpose(1, 2).contiguous()
