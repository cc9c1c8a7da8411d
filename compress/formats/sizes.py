"""Sizes of layouts without torch, for plans made before any weight is read."""


def packed_bytes(rows: int, columns: int, bits: int, group_size: int, symmetric: bool, scale_bytes: int) -> int:
    """Bytes of one linear in `pack-quantized`: codes, scales, zero points and the shape."""
    groups = columns // group_size
    zero_points = 0 if symmetric else -(-rows * bits // 32) * groups * 4
    return rows * -(-columns * bits // 32) * 4 + rows * groups * scale_bytes + 16 + zero_points
