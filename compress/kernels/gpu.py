"""Products with packed weights on GPUs: which kernel of `triton_t16` takes a product, in which tiles, and its launch.

Triton is imported by the first product on a GPU and not before. Nothing is tuned by trying: `tile` is a rule, so that the same product always
runs, and rounds, the same way. Scratch memory comes from torch's allocator, as outputs do, so a CUDA graph can capture a product once it ran.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import product
from typing import Any

import torch
from torch import Tensor

from compress.kernels import t16
from compress.kernels.native import step_of

MANY = 64
"""Tokens up to which a packed weight is multiplied as it lies."""
COLUMNS_OF_A_DOT = 32
"""The fewest columns that tensor cores take of integers of 8 bits."""
LANES = {8: 4, 4: 2, 3: 1, 2: 2}
"""Neighbouring units of a step go to so many neighbours among threads: whole lines of memory, and still eight loads each, or four for 2 bits."""
VECTORS = 4
"""Inputs times digits up to which dot products of four bytes cost fewer instructions than tensor cores do with what they must be given:
8 cost 3.6 per weight of 4 bits on sm_90, where tensor cores take 1.8 for 16."""

# What `tile` weighs, in cycles of a processor: orders of magnitude, which is all it takes to compare tiles.
BYTES_PER_CYCLE = 16
LATENCY = 1000
MEETING = 2000
"""What programs that share outputs spend on adding them up."""
WARPS_AT_ONCE = 16


@dataclass(frozen=True)
class Device:
    """A GPU, as kernels see it; `target` as in `triton_t16`."""

    target: str
    warp: int
    processors: int


@dataclass(frozen=True)
class Tile:
    """How a product is cut: `inputs` tokens and `blocks` blocks of rows per program of so many warps, `split` programs along the columns.

    Tensor cores do the work if `dots`, else dot products of four bytes.
    """

    dots: bool
    inputs: int
    blocks: int
    warps: int
    split: int


@cache
def device_of(index: int) -> Device:
    """GPU number `index`."""
    found = torch.cuda.get_device_properties(index)
    if torch.version.hip is None:
        return Device("cuda", 32, found.multi_processor_count)
    # Others name the instruction differently; plain arithmetic serves them.
    target = "hip" if found.gcnArchName.startswith("gfx9") else "any"
    return Device(target, found.warp_size, found.multi_processor_count)


@cache
def missing() -> str | None:
    """Why there are no kernels for GPUs here, or None."""
    return None if find_spec("triton") else "triton is not installed"


@cache
def say_once(reason: str) -> None:
    """Warn that products are slow, once for each `reason`."""
    warnings.warn(f"packed weights are unpacked for every product on this GPU: {reason}", stacklevel=2)


def refusal(bits: int, group: int) -> str | None:
    """Why a weight whose groups are `group` stored columns wide is not multiplied as it lies, or None."""
    if step_of(group, t16.COLUMNS[bits]) is None:
        return f"no number of up to 128 inputs is a part of a group of {group} and whole units of {t16.COLUMNS[bits]}"
    return missing()


def units_at_once(bits: int, step: int) -> int:
    """Units that tensor cores take of a step in one go, the most that is a power of two; 0 if that would be too few columns."""
    units = step // t16.COLUMNS[bits]
    most = units & -units
    return most if most * t16.COLUMNS[bits] >= COLUMNS_OF_A_DOT else 0


@cache
def tile(device: Device, bits: int, blocks: int, steps: int, step: int, tokens: int, digits: int) -> Tile:
    """The tile for a weight of so many blocks of rows and steps of `step` columns.

    The cheapest by a rule: bytes that the busiest processor loads, rounds of waiting for them, and meeting where programs share outputs.
    """
    dots = tokens * digits > VECTORS and units_at_once(bits, step) > 0
    least = 16 if device.target == "hip" else 8
    inputs = max(least, 1 << (tokens - 1).bit_length()) if dots else min(tokens, VECTORS // digits)
    chunks = -(-tokens // inputs)

    def blocks_of(warps: int) -> int:
        return (2 * warps if inputs <= 16 else warps) if dots else 1

    def cost(warps: int, split: int) -> float:
        taken = step if dots else slots(device, warps) // lanes(bits, step) * step
        programs, rounds = -(-blocks // blocks_of(warps)) * chunks * split, math.ceil(math.ceil(steps * step / taken) / split)
        size = blocks_of(warps) * t16.ROWS * taken * bits // 8
        reading = -(-programs // device.processors) * rounds * size / BYTES_PER_CYCLE
        waiting = -(-programs * warps // (device.processors * WARPS_AT_ONCE)) * rounds * LATENCY
        return max(reading, waiting) + MEETING * (split > 1)

    warps, split = min(product((4, 2) if dots else (4, 8, 2, 1), (1, 2, 4, 8)), key=lambda pair: cost(*pair))
    return Tile(dots, inputs, blocks_of(warps), warps, split)


def slots(device: Device, warps: int) -> int:
    """Units that a program of `vector_kernel` takes at once: four threads hold the rows of each."""
    return device.warp * warps // 4


def lanes(bits: int, step: int) -> int:
    return math.gcd(LANES[bits], step // t16.COLUMNS[bits])


def multiply(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, *, bits: int, rows: int, digits: int, device: Device, cut: Tile | None = None
) -> Tensor:
    """``x`` [tokens, in], contiguous, times the packed weight, cut as `tile` says unless told; [tokens, out] in the dtype of ``x``.

    On a CPU, where only Triton's interpreter runs, outputs are float32, since it rounds to bfloat16 wrongly.
    """
    from compress.kernels import triton_t16

    tokens, given = x.shape
    blocks, unit = codes.shape[0], t16.COLUMNS[bits]
    columns = codes[0].numel() * 8 // bits // t16.ROWS
    group = columns // scales.shape[1]
    step = step_of(group, unit)
    assert step is not None
    steps = columns // step
    cut = cut or tile(device, bits, blocks, steps, step, tokens, digits)
    lane, slot = (1, 1) if cut.dots else (lanes(bits, step), slots(device, cut.warps))
    tiles, chunks = -(-steps * lane // slot), -(-tokens // cut.inputs)
    places = tiles * slot // lane
    padded = chunks * cut.inputs

    y = x.new_empty(tokens, rows, dtype=x.dtype if x.is_cuda else torch.float32)
    rounded = x.new_empty(padded * digits * places * step, dtype=torch.int8)
    units, sums = x.new_empty(2, padded * places * lane, dtype=torch.float32).unbind()
    programs = -(-blocks // cut.blocks) * chunks
    partials = counters = None
    if cut.split > 1:
        partials = x.new_empty(cut.split * tokens * rows, dtype=torch.float32)
        counters = x.new_empty(programs, dtype=torch.int32)
    at_once = 4  # steps that a program rounds
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        triton_t16.digits_kernel[padded, -(-places // at_once)](
            x, rounded, units, sums, counters, given, tokens, tiles, programs,
            STEP=step, COLUMNS=step if cut.dots else unit, LANES=lane, SLOTS=slot, INPUTS=cut.inputs, DIGITS=digits,
            STEPS=at_once, WIDE=1 << (step - 1).bit_length(), num_warps=4, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
        grid, fixed = (-(-blocks // cut.blocks), chunks, cut.split), constants(device, cut, bits, step, group, digits)
        if cut.dots:
            triton_t16.matrix_kernel[grid](codes, scales, zeros, rounded, units, sums, partials, counters, y, rows, steps, tokens, **fixed)
        else:
            words, given_words = codes.view(torch.int32), rounded.view(torch.int32)
            triton_t16.vector_kernel[grid](words, scales, zeros, given_words, units, sums, partials, counters, y, rows, steps, tiles, tokens, **fixed)
    return y


def constants(device: Device, cut: Tile, bits: int, step: int, group: int, digits: int) -> dict[str, Any]:
    """What a kernel is compiled for, and Triton's options."""
    unit = t16.COLUMNS[bits]
    common = {
        "BITS": bits, "UNITS": step // unit, "PER_GROUP": group // step, "INPUTS": cut.inputs, "DIGITS": digits, "SPLIT": cut.split,
        "TARGET": device.target, "num_warps": cut.warps, "enable_fp_fusion": True,
    }  # fmt: skip
    if cut.dots:
        return common | {"COLUMNS": unit, "AT_ONCE": units_at_once(bits, step), "BLOCKS": cut.blocks, "num_stages": 2}
    # Fields multiplied where they lie in their bytes need no shifts but more sums, and a target that takes a highest bit for part of a code.
    in_place = device.target != "hip" and cut.inputs * digits <= 2
    own = {"LANES": lanes(bits, step), "SLOTS": slots(device, cut.warps), "IN_PLACE": in_place}
    return common | own | {"num_stages": 1}
