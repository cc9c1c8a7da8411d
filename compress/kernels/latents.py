"""Decoding behind a cache of latents on a GPU: what the kernels of `triton_latents` take, how the context is cut, and their launch.

Triton is imported by the first step on a GPU and not before. Nothing is tuned by trying, so the same step is always cut, and rounded, the same way.
A step is three launches: the old tokens, the newest, and what joins them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.kernels import gpu
from compress.kernels.gpu import Device
from compress.numerics.blocks import BLOCK

HEADS = 16
"""Query heads of a program: the fewest that tensor cores take."""
ROOM = 96 << 10
"""Bytes of keys and values that a program holds at once: what every processor has since 2018 but for a few kilobytes."""
AHEAD = 3
"""Tiles that are on their way at most."""
WIDE = 256
"""Channels of values above which a program takes eight warps, so that sums stay in registers."""
PER_PROCESSOR = 2
"""Programs for each processor, as many as hide the loads of one another."""
LEAST = 4
"""Tiles of a part at least: fewer, and joining takes longer than what is joined."""


@dataclass(frozen=True)
class States:
    """Keys or values [rows, groups, tokens, width]: ``states`` are these numbers, or with ``scales`` and ``lows`` their codes, the last dimension in
    bytes; scales as `compress.numerics.blocks.Coding` has them."""

    states: Tensor
    width: int
    scales: Tensor | None = None
    lows: Tensor | None = None


@dataclass(frozen=True)
class Cut:
    """How a context is cut: `tokens` at once, so many of these `ahead`, in so many `parts`, by programs of so many warps."""

    tokens: int
    ahead: int
    parts: int
    warps: int


def padded(width: int) -> int:
    """Channels as kernels hold them: a power of two, and as many as tensor cores take."""
    return max(16, 1 << (width - 1).bit_length())


def _fitting(keys: int, values: int, number: int) -> tuple[int, int] | None:
    """Tokens at once and tiles ahead that fit, of so many channels with `number` bytes each; tiles of half a block before none ahead."""
    for tokens, ahead in ((BLOCK, AHEAD), (BLOCK, 2), (BLOCK // 2, 2), (BLOCK // 2, 1)):
        if tokens * ahead * (padded(keys) + padded(values)) * number <= ROOM:
            return tokens, ahead
    return None


def refusal(keys: int, values: int, bits: int, number: int) -> str | None:
    """Why no kernel takes groups of so many channels in numbers of `number` bytes, or None."""
    if bits < 16 and (keys * bits % 8 or values * bits % 8):
        return f"heads of {keys} channels in {bits} bits end within a byte"
    if _fitting(keys, values, number) is None:
        return f"{keys} and {values} channels of a token are more than a GPU's processor holds"
    return gpu.missing()


def cut(device: Device, rows: int, groups: int, heads: int, tokens: int, keys: int, values: int, number: int) -> Cut:
    """For `tokens` of so many groups, each read by so many query heads."""
    fitting = _fitting(keys, values, number)
    assert fitting is not None, "refusal says so"
    steps, programs = -(-tokens // fitting[0]), rows * groups * -(-heads // HEADS)
    parts = max(1, min(-(-PER_PROCESSOR * device.processors // programs), steps // LEAST))
    return Cut(*fitting, parts, 8 if padded(values) > WIDE else 4)


def attend(
    query: Tensor, asked: Tensor, old: tuple[States, States], new: tuple[States, States], mask: Tensor | None, scaling: float, bits: int,
    device: Device, cuts: tuple[Cut, Cut] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What attention of one new token gives: [rows, query heads, 1, width] of old tokens and of the newest, whose sum it is.

    ``old`` keys and values, in `bits`, are asked by ``asked`` [rows, query heads, 1, key width], the newest, in numbers, by ``query``. ``mask``
    [rows or 1, 1, 1, tokens] is bool, or added; `scaling` is that of scores. ``cuts`` of both as `cut` says unless told. On a CPU, where only
    Triton's interpreter runs, outputs are float32, since it rounds to bfloat16 wrongly.
    """
    import triton.language as tl

    from compress.kernels import triton_latents

    rows, heads = query.shape[:2]
    count, number = old[0].states.shape[2], query.element_size()
    if cuts is None:
        sides: Any = (old, new)
        cuts = tuple(  # type: ignore[assignment]
            cut(device, rows, (shape := each[0].states.shape)[1], heads // shape[1], shape[2], each[0].width, each[1].width, number) for each in sides
        )
    assert cuts is not None
    numbers = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[query.dtype] if query.is_cuda else tl.float32
    told = None if mask is None else (mask.view(torch.uint8) if mask.dtype == torch.bool else mask).expand(rows, 1, 1, -1)[:, 0, 0]
    parts = [each.parts for each in cuts]
    limits = query.new_empty(sum(parts), rows, heads, 2, dtype=torch.float32)
    sums = []
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        for questions, (keys, values), seen, each, limit, coded in (
            (asked, old, None if told is None else told[:, :count], cuts[0], limits[: parts[0]], bits),
            (query, new, None if told is None else told[:, count:], cuts[1], limits[parts[0] :], 16),
        ):
            groups, tokens = keys.states.shape[1:3]
            sums.append(query.new_empty(each.parts, rows, heads, values.width, dtype=torch.float32))
            triton_latents.attend_kernel[rows, groups * -(-heads // groups // HEADS), each.parts](
                questions.contiguous(), keys.states, keys.scales, keys.lows, values.states, values.scales, values.lows, seen, sums[-1], limit,
                rows, heads // groups, tokens, scaling * math.log2(math.e),
                *keys.states.stride()[:3], *values.states.stride()[:3], 0 if seen is None else seen.stride(0),
                **constants(groups, keys.width, values.width, coded, seen, each, numbers),
            )  # fmt: skip
        results = [query.new_empty(rows, heads, 1, each.shape[3], dtype=query.dtype if query.is_cuda else torch.float32) for each in sums]
        fixed = joining(results[0].shape[3], results[1].shape[3], sum(parts))
        triton_latents.join_kernel[(rows * heads,)](*sums, limits, *results, *parts, rows * heads, **fixed)
    return results[0], results[1]


def constants(groups: int, keys: int, values: int, bits: int, mask: Tensor | None, cut: Cut, number: Any) -> dict[str, Any]:
    """What `attend_kernel` is compiled for, and Triton's options."""
    return {
        "GROUPS": groups, "KEY_WIDTH": keys, "KEYS": padded(keys), "VALUE_WIDTH": values, "VALUES": padded(values), "BITS": bits, "BLOCK": BLOCK,
        "ADDED": mask is not None and mask.dtype.is_floating_point, "HEADS": HEADS, "TOKENS": cut.tokens, "NUMBER": number,
        "num_warps": cut.warps, "num_stages": cut.ahead, "enable_fp_fusion": True,
    }  # fmt: skip


def joining(old: int, new: int, parts: int) -> dict[str, Any]:
    """What `join_kernel` is compiled for, and Triton's options."""
    return {
        "OLD_WIDTH": old, "OLD": padded(old), "NEW_WIDTH": new, "NEW": padded(new), "PARTS": 1 << (parts - 1).bit_length(),
        "num_warps": 4, "num_stages": 1, "enable_fp_fusion": True,
    }  # fmt: skip
