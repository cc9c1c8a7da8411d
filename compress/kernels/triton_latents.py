"""Triton kernels for one new token that attends to many old ones, kept as latents or codes: parts of the context side by side, then their mean.

Only kernels stand here; `latents` sizes and launches them, and is the only importer, since this file needs triton. The interpreter computes in
bfloat16 wrongly, so under it NUMBER, what products are computed of, is float32; scores and sums always are.

Each program of `attend_kernel` takes a part of the context and keeps the largest score so far, the sum of ``2^(score - largest)``, and the values
so weighted (flash-decoding: arXiv 2205.14135, section 3.1, along a context that is cut); `join_kernel` brings the parts to one largest score.
"""

import triton
import triton.language as tl

_NEVER = tl.constexpr(-1e38)
"""Below every score, and finite: where all is masked, everything counts alike, as it does in torch."""
_AT_ONCE = tl.constexpr(8)
"""Parts that are joined at once."""


@triton.jit
def _unpacked(bytes, BITS: tl.constexpr):
    """The codes of ``bytes`` [tokens, n], in order: [tokens, n * 8 / BITS]."""
    if BITS == 4:
        return tl.interleave(bytes & 15, bytes >> 4)
    else:
        return tl.interleave(tl.interleave(bytes & 3, (bytes >> 4) & 3), tl.interleave((bytes >> 2) & 3, bytes >> 6))


@triton.jit
def _states(
    states, scales, lows, row, group, token, here, tokens, of_row, of_group, of_token,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, BITS: tl.constexpr, BY_CHANNEL: tl.constexpr, BLOCK: tl.constexpr,
    NUMBER: tl.constexpr,
):  # fmt: skip
    """[tokens, PADDED] of one group of channels, zeros where there is nothing: numbers as they are, or codes (`compress.numerics.blocks`).

    A scale is for a channel of a block of BLOCK tokens, in which all tokens are, if BY_CHANNEL, or for a token.
    """
    place = states + row * of_row + group * of_group + token[:, None].to(tl.int64) * of_token
    column = tl.arange(0, PADDED)
    if BITS == 16:
        return tl.load(place + column[None, :], mask=here[:, None] & (column < WIDTH)[None, :], other=0).to(NUMBER)
    else:
        byte = tl.arange(0, PADDED * BITS // 8)
        exists = here[:, None] & (byte < (WIDTH * BITS + 7) // 8)[None, :]
        codes = _unpacked(tl.load(place + byte[None, :], mask=exists, other=0), BITS).to(tl.float32)
        if BY_CHANNEL:
            # The first token of a block is always there.
            block = row * (tokens // BLOCK) + tl.min(token, 0) // BLOCK
            at = ((block * GROUPS + group) * WIDTH + column)[None, :]
            known = (column < WIDTH)[None, :]
        else:
            at = (row * tokens + token)[:, None]
            known = here[:, None]
        return (codes * tl.load(scales + at, mask=known, other=0).to(tl.float32) + tl.load(lows + at, mask=known, other=0).to(tl.float32)).to(NUMBER)


@triton.jit(do_not_specialize=["tokens", "mask_row"])
def attend_kernel(
    query, keys, key_scales, key_lows, values, value_scales, value_lows, mask, sums, limits, rows, heads, tokens, scaling,
    key_row, key_group, key_token, value_row, value_group, value_token, mask_row,
    GROUPS: tl.constexpr, KEY_WIDTH: tl.constexpr, KEYS: tl.constexpr, VALUE_WIDTH: tl.constexpr, VALUES: tl.constexpr,
    BITS: tl.constexpr, BLOCK: tl.constexpr, ADDED: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """Up to HEADS query heads of one group over a part of the context; program ids are the row, the group and which of its heads, and the part.

    ``query`` [rows, GROUPS, heads, KEY_WIDTH]; keys and values [rows, GROUPS, tokens, width] with strides, as `_states` reads them; ``mask``
    [rows, tokens] with a stride, of uint8, where 0 hides a token, or ADDED to scores. To ``sums`` [parts, rows, GROUPS, heads, VALUE_WIDTH] goes
    what values sum to, to ``limits`` [parts, rows, GROUPS, heads, 2] the largest score and the sum of weights; a part without tokens has
    minus infinity and zeros. ``scaling`` is that of scores, times ``log2(e)``.
    """
    row = tl.program_id(0).to(tl.int64)
    chunks = (heads + HEADS - 1) // HEADS
    group = tl.program_id(1) // chunks
    head = tl.program_id(1) % chunks * HEADS + tl.arange(0, HEADS)
    part = tl.program_id(2)
    mine = (row * GROUPS + group) * heads + head
    column, wide = tl.arange(0, KEYS), tl.arange(0, VALUES)
    asked_here = (head < heads)[:, None] & (column < KEY_WIDTH)[None, :]
    asked = tl.load(query + mine[:, None] * KEY_WIDTH + column[None, :], mask=asked_here, other=0).to(NUMBER)
    largest = tl.full([HEADS], float("-inf"), tl.float32)
    weight = tl.zeros([HEADS], tl.float32)
    total = tl.zeros([HEADS, VALUES], tl.float32)
    steps = (tokens + TOKENS - 1) // TOKENS
    share = (steps + tl.num_programs(2) - 1) // tl.num_programs(2)
    for step in range(part * share, tl.minimum((part + 1) * share, steps)):
        token = step * TOKENS + tl.arange(0, TOKENS)
        here = token < tokens
        key = _states(
            keys, key_scales, key_lows, row, group, token, here, tokens, key_row, key_group, key_token,
            GROUPS, KEY_WIDTH, KEYS, BITS, True, BLOCK, NUMBER,
        )  # fmt: skip
        score = tl.dot(asked, tl.trans(key), input_precision="ieee") * scaling
        if mask is not None:
            told = tl.load(mask + row * mask_row + token, mask=here, other=0)[None, :]
            if ADDED:
                score += tl.maximum(told.to(tl.float32), _NEVER) * 1.4426950408889634
            else:
                score = tl.where(told != 0, score, _NEVER)
        score = tl.where(here[None, :], tl.maximum(score, _NEVER), float("-inf"))
        new = tl.maximum(largest, tl.max(score, 1))
        weights, faded = tl.exp2(score - new[:, None]), tl.exp2(largest - new)
        value = _states(
            values, value_scales, value_lows, row, group, token, here, tokens, value_row, value_group, value_token,
            GROUPS, VALUE_WIDTH, VALUES, BITS, False, BLOCK, NUMBER,
        )  # fmt: skip
        total = tl.dot(weights.to(NUMBER), value, total * faded[:, None], input_precision="ieee")
        weight = weight * faded + tl.sum(weights, 1)
        largest = new
    at = part.to(tl.int64) * rows * GROUPS * heads + mine
    tl.store(sums + at[:, None] * VALUE_WIDTH + wide[None, :], total, mask=(head < heads)[:, None] & (wide < VALUE_WIDTH)[None, :])
    tl.store(limits + at * 2, largest, mask=head < heads)
    tl.store(limits + at * 2 + 1, weight, mask=head < heads)


@triton.jit
def _joined(sums, limits, output, parts, mine, asked, most, all, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """The mean of ``parts``, the largest of whose scores is ``most`` and whose weights sum to ``all``."""
    column = tl.arange(0, PADDED)
    result = tl.zeros([PADDED], tl.float32)
    for first in range(0, parts, _AT_ONCE):
        part = first + tl.arange(0, _AT_ONCE)
        at, here = part.to(tl.int64) * asked + mine, part < parts
        share = tl.exp2(tl.load(limits + at * 2, mask=here, other=float("-inf")) - most)
        found = tl.load(sums + at[:, None] * WIDTH + column[None, :], mask=here[:, None] & (column < WIDTH)[None, :], other=0)
        result += tl.sum(share[:, None] * found, 0)
    tl.store(output + mine * WIDTH + column, (result / all).to(output.dtype.element_ty), mask=column < WIDTH)


@triton.jit(do_not_specialize=["old_parts", "new_parts"])
def join_kernel(
    old_sums, new_sums, limits, old, new, old_parts, new_parts, asked,
    OLD_WIDTH: tl.constexpr, OLD: tl.constexpr, NEW_WIDTH: tl.constexpr, NEW: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """What one query head of one row attends to, of ``asked`` in all: the parts of old tokens to ``old`` [asked, OLD_WIDTH], those of new ones to
    ``new`` [asked, NEW_WIDTH], both over all weights there are, so that their sum is the mean; ``limits`` has the old parts first."""
    mine = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    here = part < old_parts + new_parts
    at = (part.to(tl.int64) * asked + mine) * 2
    largest = tl.load(limits + at, mask=here, other=float("-inf"))
    most = tl.max(largest, 0)
    all = tl.sum(tl.exp2(largest - most) * tl.load(limits + at + 1, mask=here, other=0), 0)
    _joined(old_sums, limits, old, old_parts, mine, asked, most, all, OLD_WIDTH, OLD)
    _joined(new_sums, limits + old_parts.to(tl.int64) * asked * 2, new, new_parts, mine, asked, most, all, NEW_WIDTH, NEW)
