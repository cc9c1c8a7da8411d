"""Triton kernels for the T16 layout (`t16`): inputs to digits, a few of them at a time by dot products of four bytes, many by tensor cores.

Only kernels stand here; `gpu` chooses between them, sizes and launches them, and is the only importer, since this file needs triton.
`TARGET` is "cuda" or "hip" for their instructions or "any" for plain arithmetic, which every target and the interpreter have. The interpreter
computes in bfloat16 wrongly, so every value is float32 from when it is loaded until it is stored.

What is summed: with x ~ unit * whole for the inputs of a step, and zero point z and scale s for its weights,
``s * unit * (sum(code * whole) - z * sum(whole))``, so that nothing is larger than it must be. Codes of 8 bits are read as if less by 128, so
that they are signed; without zero points nothing is then left to subtract. Sums of integers are exact: 128 codes times 15 bits stay below 2 ** 30.
"""

import triton
import triton.language as tl

_NEAREST = tl.constexpr(12582912.0)
"""1.5 * 2 ** 23: added to a small float32 and taken away again, it leaves the nearest integer."""
_CLEARED = tl.constexpr(256)


@triton.constexpr_function
def _place(bits, field, in_place):
    """The sum that a field's products go to, so that each is of one power of two."""
    if not in_place or bits == 8:
        return 0
    if bits == 3:
        return 2 if field >= 6 else field % 2
    return field


@triton.constexpr_function
def _places(bits, in_place):
    return (3 if bits == 3 else 8 // bits) if in_place else 1


@triton.constexpr_function
def _shift(bits, place):
    """The power of two by which products of that sum are too large."""
    return (0, 3, 5)[place] if bits == 3 else place * bits


@triton.constexpr_function
def _fields_of(bits):
    return 8 if bits == 3 else 8 // bits


@triton.constexpr_function
def _vectors_of(bits):
    return 3 if bits == 3 else 1


@triton.jit
def _dot4(codes, digits, total, SIGNED: tl.constexpr, TARGET: tl.constexpr):
    """`total` plus the products of four bytes; those of `codes` may only have their highest bit set if SIGNED, or on "cuda" and "any"."""
    if TARGET == "cuda":
        if SIGNED:
            return tl.inline_asm_elementwise("dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, digits, total], tl.int32, is_pure=True, pack=1)
        else:
            return tl.inline_asm_elementwise("dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, digits, total], tl.int32, is_pure=True, pack=1)
    elif TARGET == "hip":
        return tl.inline_asm_elementwise("v_dot4_i32_i8 $0, $1, $2, $3", "=v,v,v,v", [codes, digits, total], tl.int32, is_pure=True, pack=1)
    else:
        place = 8 * tl.arange(0, 4)
        code = ((codes[:, :, None] << (24 - place)) >> 24) if SIGNED else ((codes[:, :, None] >> place) & 255)
        return total + tl.sum(code * ((digits[:, :, None] << (24 - place)) >> 24), 2)


@triton.jit
def _fields(words, BITS: tl.constexpr, IN_PLACE: tl.constexpr):
    """The codes of one unit, four to a word; IN_PLACE, too large by the power of two of their `_place`, which saves shifting each."""
    if BITS == 8:
        return (words[0] ^ -0x7F7F7F80,)
    elif BITS == 4:
        if IN_PLACE:
            return (words[0] & 0x0F0F0F0F, words[0] & -0x0F0F0F10)
        else:
            return (words[0] & 0x0F0F0F0F, (words[0] >> 4) & 0x0F0F0F0F)
    elif BITS == 2:
        if IN_PLACE:
            return (words[0] & 0x03030303, words[0] & 0x0C0C0C0C, words[0] & 0x30303030, words[0] & -0x3F3F3F40)
        else:
            word = words[0]
            return (word & 0x03030303, (word >> 2) & 0x03030303, (word >> 4) & 0x03030303, (word >> 6) & 0x03030303)
    else:
        first, second, third = words
        if IN_PLACE:
            return (
                first & 0x07070707, first & 0x38383838, second & 0x07070707, second & 0x38383838, third & 0x07070707, third & 0x38383838,
                (first & -0x3F3F3F40) | ((third >> 1) & 0x20202020), (second & -0x3F3F3F40) | ((third >> 2) & 0x20202020),
            )  # fmt: skip
        else:
            return (
                first & 0x07070707, (first >> 3) & 0x07070707, second & 0x07070707, (second >> 3) & 0x07070707,
                third & 0x07070707, (third >> 3) & 0x07070707,
                ((first >> 5) & 0x06060606) | ((third >> 6) & 0x01010101), ((second >> 5) & 0x06060606) | ((third >> 7) & 0x01010101),
            )  # fmt: skip


@triton.jit
def digits_kernel(
    x, digits, units, sums, counters, columns, tokens, tiles, counted,
    STEP: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr,
    INPUTS: tl.constexpr, DIGITS: tl.constexpr, STEPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """x [tokens, columns] to digits in the order in which a kernel reads them; one program takes STEPS steps of one token.

    A kernel takes INPUTS tokens and SLOTS / LANES steps, a tile, at a time. Of a step, unit ``LANES * j + lane``, each COLUMNS wide, is
    lane's: so digits are [tokens / INPUTS][tiles][INPUTS][DIGITS][j][COLUMNS / 4][SLOTS][4], and ``units`` and ``sums`` are
    [tokens / INPUTS][tiles][INPUTS][SLOTS]. Tokens and steps that are there only to fill these are zero. Clears ``counters``.
    """
    token = tl.program_id(0)
    step = tl.program_id(1) * STEPS + tl.arange(0, STEPS)
    within = tl.arange(0, WIDE)
    column = step[:, None] * STEP + within[None, :]
    here = (within < STEP)[None, :] & (step < tiles * (SLOTS // LANES))[:, None]
    given = here & (column < tl.where(token < tokens, columns, 0))
    value = tl.load(x + token.to(tl.int64) * columns + column, mask=given, other=0).to(tl.float32)
    largest = tl.max(tl.abs(value), 1)
    reach: tl.constexpr = 16256.0 if DIGITS == 2 else 127.0
    # A smaller number has no inverse, and such inputs count as zero.
    usable = largest > reach / 3e38
    unit = tl.where(usable, largest / reach, 0.0)
    factor = tl.where(usable, reach / tl.where(usable, largest, 1.0), 0.0)
    whole = ((value * factor[:, None] + _NEAREST) - _NEAREST).to(tl.int32)
    # Zero, but not a number if one of the inputs is not.
    unit += tl.sum(value * 0.0, 1)
    total = tl.sum(whole, 1).to(tl.float32)

    chunk, each = token // INPUTS, token % INPUTS
    tile, slot = step // (SLOTS // LANES), step % (SLOTS // LANES) * LANES
    part = within // COLUMNS
    words: tl.constexpr = STEP // LANES // 4
    field = (part // LANES * (COLUMNS // 4) + within % COLUMNS // 4)[None, :]
    place = ((chunk * tiles + tile) * INPUTS + each)[:, None]
    inner = slot[:, None] + (part % LANES)[None, :]
    if DIGITS == 2:
        first = (whole + 64) >> 7
        at = ((place * 2 * words + field) * SLOTS + inner) * 4 + (within % 4)[None, :]
        tl.store(digits + at, first.to(tl.int8), mask=here)
        tl.store(digits + at + words * SLOTS * 4, (whole - first * 128).to(tl.int8), mask=here)
    else:
        at = ((place * words + field) * SLOTS + inner) * 4 + (within % 4)[None, :]
        tl.store(digits + at, whole.to(tl.int8), mask=here)
    # A step's sum is subtracted by each of its lanes.
    lane = tl.arange(0, LANES)[None, :]
    at = place * SLOTS + slot[:, None] + lane
    exists = (step < tiles * (SLOTS // LANES))[:, None] & (lane < LANES)
    tl.store(units + at, unit[:, None] + tl.zeros([STEPS, LANES], tl.float32), mask=exists)
    tl.store(sums + at, (total / LANES)[:, None] + tl.zeros([STEPS, LANES], tl.float32), mask=exists)
    if counters is not None:
        program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        for start in range(program * _CLEARED, counted, tl.num_programs(0) * tl.num_programs(1) * _CLEARED):
            counter = start + tl.arange(0, _CLEARED)
            tl.store(counters + counter, tl.zeros([_CLEARED], tl.int32), mask=counter < counted)


@triton.jit
def _store(results, at, here, y, partials, counters, size, SPLIT: tl.constexpr):
    """Each result to its places in y; of SPLIT programs that share them the last to arrive adds up all parts, in order: results never vary."""
    if SPLIT == 1:
        for m in tl.static_range(len(results)):
            tl.store(y + at[m], results[m].to(y.dtype.element_ty), mask=here[m])
    else:
        for m in tl.static_range(len(results)):
            tl.store(partials + tl.program_id(2) * size + at[m], results[m], mask=here[m])
        # All threads must have stored before one of them says so.
        tl.debug_barrier()
        if tl.atomic_add(counters + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), 1, sem="acq_rel") == SPLIT - 1:
            for m in tl.static_range(len(results)):
                total = tl.load(partials + at[m], mask=here[m], other=0, cache_modifier=".cg")
                for part in tl.static_range(1, SPLIT):
                    total += tl.load(partials + part * size + at[m], mask=here[m], other=0, cache_modifier=".cg")
                tl.store(y + at[m], total.to(y.dtype.element_ty), mask=here[m])


@triton.jit
def _after_loads(value, TARGET: tl.constexpr):
    """`value`, but only once all loads before it are on their way: the assembler for "cuda" would start each when it is needed."""
    if TARGET == "cuda":
        return tl.inline_asm_elementwise("bar.warp.sync 0xffffffff; mov.b32 $0, $1;", "=r,r", [value], tl.int32, is_pure=False, pack=1)
    else:
        return value


@triton.jit
def vector_kernel(
    codes, scales, zeros, digits, units, sums, partials, counters, y, rows, steps, tiles, tokens,
    BITS: tl.constexpr, UNITS: tl.constexpr, PER_GROUP: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr,
    INPUTS: tl.constexpr, DIGITS: tl.constexpr, SPLIT: tl.constexpr, IN_PLACE: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """One block of rows times INPUTS tokens; program ids are the block, which tokens, and which of SPLIT parts of the columns.

    Moved: every code and scale once per INPUTS tokens; digits once per block, from the cache. A thread holds four rows of a slot, that is of
    every LANES-th unit of a step: 16 bytes a load, neighbouring threads 64 * LANES bytes, all loads of a tile before the first product. It
    scales its sum once a step, and threads meet only at the end.
    """
    fields_of: tl.constexpr = _fields_of(BITS)
    vectors: tl.constexpr = _vectors_of(BITS)
    each: tl.constexpr = UNITS // LANES
    places: tl.constexpr = _places(BITS, IN_PLACE)
    block, chunk = tl.program_id(0), tl.program_id(1)
    slot, row = tl.arange(0, SLOTS), tl.arange(0, 16)[None, :]
    codes += block.to(tl.int64) * steps * (UNITS * vectors * 16)
    share = (tiles + SPLIT - 1) // SPLIT
    results = ()
    for _ in tl.static_range(INPUTS):
        results = results + (tl.zeros([SLOTS, 16], tl.float32),)
    for tile in range(tl.program_id(2) * share, tl.minimum((tl.program_id(2) + 1) * share, tiles)):
        # Beyond the last step digits are zero: any weight will do, and no load needs a mask.
        step = tl.minimum(tile * (SLOTS // LANES) + slot // LANES, steps - 1)
        at = codes + ((step * UNITS + slot % LANES) * (vectors * 16))[:, None] + row
        totals = ()
        for _ in tl.static_range(INPUTS * DIGITS * places):
            totals = totals + (tl.zeros([SLOTS, 16], tl.int32),)
        words = ()
        for j in tl.static_range(each * vectors):
            words = words + (tl.load(at + (j // vectors * LANES * vectors + j % vectors) * 16, eviction_policy="evict_first"),)
        at_digits = digits + _after_loads(chunk * tiles + tile, TARGET) * (INPUTS * DIGITS * each * fields_of * SLOTS) + slot
        for j in tl.static_range(each):
            fields = _fields(words[j * vectors : (j + 1) * vectors], BITS, IN_PLACE)
            sums_so_far = ()
            for c in tl.static_range(INPUTS * DIGITS):
                for place in tl.static_range(places):
                    total = totals[c * places + place]
                    for f in tl.static_range(fields_of):
                        if _place(BITS, f, IN_PLACE) == place:
                            digit = tl.load(at_digits + ((c * each + j) * fields_of + f) * SLOTS)
                            total = _dot4(fields[f], digit[:, None], total, BITS == 8, TARGET)
                    sums_so_far = sums_so_far + (total,)
            totals = sums_so_far
        at_scales = (block * (steps // PER_GROUP) + step // PER_GROUP)[:, None] * 16 + row
        scale = tl.load(scales + at_scales).to(tl.float32)
        if zeros is not None:
            zero = tl.load(zeros + at_scales).to(tl.float32) - (128.0 if BITS == 8 else 0.0)
        scaled = ()
        for m in tl.static_range(INPUTS):
            whole = tl.zeros([SLOTS, 16], tl.int32)
            for d in tl.static_range(DIGITS):
                total = totals[(m * DIGITS + d) * places]
                for place in tl.static_range(1, places):
                    total += totals[(m * DIGITS + d) * places + place] >> _shift(BITS, place)
                whole = whole * 128 + total
            at_unit = ((chunk * tiles + tile) * INPUTS + m) * SLOTS + slot
            part = whole.to(tl.float32)
            if zeros is not None:
                part -= zero * tl.load(sums + at_unit)[:, None]
            elif BITS != 8:
                part -= (tl.load(sums + at_unit) * (1 << (BITS - 1)))[:, None]
            scaled = scaled + (results[m] + scale * (part * tl.load(units + at_unit)[:, None]),)
        results = scaled
    outputs, places_of, here = (), (), ()
    for m in tl.static_range(INPUTS):
        token, at_rows = chunk * INPUTS + m, block * 16 + tl.arange(0, 16)
        outputs = outputs + (tl.sum(results[m], 0),)
        places_of = places_of + (token * rows + at_rows,)
        here = here + (at_rows < tl.where(token < tokens, rows, 0),)
    _store(outputs, places_of, here, y, partials, counters, tokens * rows, SPLIT)


@triton.constexpr_function
def _masking(shift, mask):
    return f"shr.u32 $0, $1, {shift}; and.b32 $0, $0, {mask * 0x01010101};"


@triton.jit
def _part(bytes, SHIFT: tl.constexpr, MASK: tl.constexpr, TARGET: tl.constexpr):
    """Bits of each byte, four bytes at a time where the compiler would not see that it can."""
    if TARGET == "cuda":
        return tl.inline_asm_elementwise(_masking(SHIFT, MASK), "=r,r", [bytes], tl.uint8, is_pure=True, pack=4)
    else:
        return (bytes >> SHIFT) & MASK


@triton.jit
def _either(low, high, TARGET: tl.constexpr):
    if TARGET == "cuda":
        return tl.inline_asm_elementwise("or.b32 $0, $1, $2;", "=r,r,r", [low, high], tl.uint8, is_pure=True, pack=4)
    else:
        return low | high


@triton.jit
def _signed(bytes, TARGET: tl.constexpr):
    if TARGET == "cuda":
        return tl.inline_asm_elementwise("xor.b32 $0, $1, 0x80808080;", "=r,r", [bytes], tl.uint8, is_pure=True, pack=4)
    else:
        return bytes ^ 128


@triton.jit
def _lanes(at):
    """Vectors [blocks, units, 16, 4], loaded whole, so that a load takes 16 bytes."""
    return tl.load(at, eviction_policy="evict_first").reshape(at.shape[0], at.shape[1], 16, 4)


@triton.jit
def _matrix(codes, at, BITS: tl.constexpr, TARGET: tl.constexpr):
    """Codes [16 * blocks, columns] int8 of some units, from the places of their first vectors' bytes, [blocks, units, 64]."""
    first = _lanes(codes + at)
    if BITS == 8:
        tile = _signed(first, TARGET).permute(0, 2, 1, 3)
    elif BITS == 4:
        tile = tl.join(_part(first, 0, 15, TARGET), _part(first, 4, 15, TARGET)).permute(0, 2, 1, 4, 3)
    elif BITS == 2:
        low = tl.join(_part(first, 0, 3, TARGET), _part(first, 2, 3, TARGET))
        high = tl.join(_part(first, 4, 3, TARGET), _part(first, 6, 3, TARGET))
        tile = tl.join(low, high).permute(0, 2, 1, 5, 4, 3)
    else:
        second = _lanes(codes + at + 64)
        third = _lanes(codes + at + 128)
        seventh = _either(_part(first, 5, 6, TARGET), _part(third, 6, 1, TARGET), TARGET)
        eighth = _either(_part(second, 5, 6, TARGET), _part(third, 7, 1, TARGET), TARGET)
        low = tl.join(_part(first, 0, 7, TARGET), _part(first, 3, 7, TARGET))
        middle = tl.join(_part(second, 0, 7, TARGET), _part(second, 3, 7, TARGET))
        high = tl.join(tl.join(_part(third, 0, 7, TARGET), _part(third, 3, 7, TARGET)), tl.join(seventh, eighth))
        tile = tl.join(tl.join(low, middle), high).permute(0, 2, 1, 6, 5, 4, 3)
    rows: tl.constexpr = at.shape[0] * 16
    return tile.reshape(rows, tile.numel // rows).to(tl.int8, bitcast=True)


@triton.jit
def matrix_kernel(
    codes, scales, zeros, digits, units, sums, partials, counters, y, rows, steps, tokens,
    BITS: tl.constexpr, UNITS: tl.constexpr, COLUMNS: tl.constexpr, AT_ONCE: tl.constexpr, PER_GROUP: tl.constexpr, BLOCKS: tl.constexpr,
    INPUTS: tl.constexpr, DIGITS: tl.constexpr, SPLIT: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks of rows times INPUTS tokens on tensor cores; program ids are those of `vector_kernel`, digits as if it had one slot.

    AT_ONCE units, a power of two and 32 columns or more, are one product of integers; a step is one or several of them.
    """
    chunk = tl.program_id(1)
    last = (rows + 15) // 16 - 1
    row = tl.arange(0, BLOCKS * 16)
    block = tl.minimum(tl.program_id(0) * BLOCKS + row // 16, last)
    vectors: tl.constexpr = _vectors_of(BITS)
    wide: tl.constexpr = AT_ONCE * COLUMNS
    some = tl.minimum(tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS), last).to(tl.int64) * steps * (UNITS * vectors * 64)
    at = some[:, None, None] + (tl.arange(0, AT_ONCE) * (vectors * 64))[None, :, None] + tl.arange(0, 64)[None, None, :]
    token = tl.arange(0, INPUTS)
    digits += chunk * steps * (INPUTS * DIGITS * UNITS * COLUMNS)
    at_digits = digits + tl.arange(0, wide)[:, None] + (token * (DIGITS * UNITS * COLUMNS))[None, :]
    result = tl.zeros([BLOCKS * 16, INPUTS], tl.float32)
    share = (steps + SPLIT - 1) // SPLIT
    for step in range(tl.program_id(2) * share, tl.minimum((tl.program_id(2) + 1) * share, steps)):
        total = tl.zeros([BLOCKS * 16, INPUTS], tl.int32)
        for digit in tl.static_range(DIGITS):
            total = total * 128
            for part in tl.static_range(UNITS // AT_ONCE):
                weight = _matrix(codes, at + (step * UNITS + part * AT_ONCE) * (vectors * 64), BITS, TARGET)
                given = tl.load(at_digits + ((step * INPUTS * DIGITS + digit) * UNITS + part * AT_ONCE) * COLUMNS)
                total = tl.dot(weight, given, total, out_dtype=tl.int32)
        at_scales = (block * (steps // PER_GROUP) + step // PER_GROUP) * 16 + row % 16
        scale = tl.load(scales + at_scales).to(tl.float32)
        at_units = (chunk * steps + step) * INPUTS + token
        product = total.to(tl.float32)
        if zeros is not None:
            zero = tl.load(zeros + at_scales).to(tl.float32) - (128.0 if BITS == 8 else 0.0)
            product -= zero[:, None] * tl.load(sums + at_units)[None, :]
        elif BITS != 8:
            product -= (tl.load(sums + at_units) * (1 << (BITS - 1)))[None, :]
        result += scale[:, None] * (product * tl.load(units + at_units)[None, :])
    at_rows, tokens_here = tl.program_id(0) * BLOCKS * 16 + row, chunk * INPUTS + token
    here = (at_rows < rows)[:, None] & (tokens_here < tokens)[None, :]
    _store((result,), (tokens_here[None, :] * rows + at_rows[:, None],), (here,), y, partials, counters, tokens * rows, SPLIT)
