"""Sizes of layouts without torch, for plans made before any weight is read."""


def stored_bytes(
    layout: str, rows: int, columns: int, bits: int, group_size: int, *, symmetric: bool = True, scale_bytes: int = 2, scale_rows: int = 1
) -> int:
    """Bytes of one linear in `layout`; ``scale_bytes`` those of the model's dtype, ``scale_rows`` how many outputs share a scale."""
    groups = columns // group_size
    if layout == "pack-quantized":
        zero_points = 0 if symmetric else -(-rows * bits // 32) * groups * 4
        shape = 16
        return rows * -(-columns * bits // 32) * 4 + rows * groups * scale_bytes + zero_points + shape
    codes = rows * columns * bits // 8
    if layout in ("int-quantized", "float-quantized"):
        return codes + -(-rows // scale_rows) * groups * scale_bytes
    overall = 4 if layout == "nvfp4-pack-quantized" else 0
    return codes + rows * groups + overall


def residual_bytes(rows: int, columns: int, entries: int, value_bytes: int) -> int:
    """Bytes of so many residuals of one linear."""
    return 4 * (rows + 1) + entries * (value_bytes + (2 if columns <= 1 << 15 else 4))


def ggml_refusal(columns: int, group_size: int) -> str | None:
    """Why no block of GGML holds rows of `columns` weights with a scale for every `group_size` of them, or None."""
    if columns % 32:
        return f"rows of {columns} weights are no whole number of GGML's blocks of 32"
    return f"groups of {group_size} do not end where GGML's blocks of 32 do" if group_size % 32 else None
