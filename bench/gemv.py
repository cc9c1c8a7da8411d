"""Products with one packed weight: what share of the speed of reading memory the kernels reach, and how torch's own compare.

    python bench/gemv.py --json gemv.json [--quick]

For each width, number of digits of the inputs, number of threads and shape, copies of the weight that together exceed the last-level cache are
multiplied in turn. Between these runs the same amount of memory is only read, by the same threads; the share is the ratio of the medians, with
the least and the greatest beside it. Bytes are those of codes and scales. Then several inputs at once, one thread: our products with 4 bits and
torch's with 4 bits (its own kernel for CPUs), bfloat16 and float32, in turn, copies of each again larger than the cache.
"""

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
from rich.console import Console
from rich.table import Table

from compress.kernels import memory as memory_of
from compress.kernels import native, t16

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
WIDTHS = (4, 8, 3, 2)
GROUP = 128
BATCHES = (1, 4, 16, 64, 512)
BEYOND_CACHE = 160 << 20
"""Bytes of all copies of a weight together."""


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(bits: int, rows: int, columns: int, digits: int, threads: int, memory: torch.Tensor, repeats: int) -> dict[str, Any]:
    """One row: gigabytes per second of products and of reading alone, by repeat."""
    size = rows * columns * bits // 8
    copies = max(2, -(-BEYOND_CACHE // size))
    codes = [memory[place * size : (place + 1) * size].view(rows // t16.ROWS, -1, t16.ROWS, 4) for place in range(copies)]
    scales = torch.rand(rows // t16.ROWS, columns // GROUP, t16.ROWS).bfloat16()
    x, tier = torch.randn(1, columns), native.tier()
    torch.set_num_threads(threads)

    def multiply() -> None:
        for each in codes:
            native.multiply(x, each, scales, None, bits=bits, rows=rows, columns=columns, step=GROUP, digits=digits, tier=tier)

    part = memory[: copies * size]
    multiply()
    pairs = [(seconds(lambda: native.read(part, threads)), seconds(multiply)) for _ in range(repeats)]
    reads = [part.numel() / read / 1e9 for read, _ in pairs]
    products = [copies * (size + scales.nbytes) / product / 1e9 for _, product in pairs]
    shares = [product / read for product, read in zip(products, reads, strict=True)]
    return {
        "bits": bits, "rows": rows, "columns": columns, "digits": digits, "threads": threads, "repeats": repeats,
        "gigabytes_per_second": statistics.median(products), "roofline": statistics.median(reads),
        "share": statistics.median(products) / statistics.median(reads), "share_range": [min(shares), max(shares)],
    }  # fmt: skip


def error(digits: int, rows: int, columns: int) -> float:
    """Of outputs, relative to those of float64, for inputs of so many digits."""
    codes, scales = torch.randint(0, 16, (rows, columns), dtype=torch.uint8), torch.rand(rows, columns // GROUP).add(0.1).bfloat16()
    x, packed = torch.randn(8, columns), t16.pack(codes, 4)
    found = native.multiply(x, packed, t16.by_block(scales), None, bits=4, rows=rows, columns=columns, step=GROUP, digits=digits, tier=native.tier())
    exact = x.double() @ ((codes.double() - 8).view(rows, -1, GROUP) * scales.double()[..., None]).view(rows, columns).T
    return float((found - exact).norm() / exact.norm())


def several(inputs: int, rows: int, columns: int, memory: torch.Tensor, repeats: int) -> dict[str, Any]:
    """One row: milliseconds of a product of so many inputs, by what multiplies."""
    size = rows * columns // 2
    packed = [memory[place * size : (place + 1) * size] for place in range(BEYOND_CACHE // size)]
    blocked, scales = (
        [each.view(rows // t16.ROWS, -1, t16.ROWS, 4) for each in packed],
        torch.rand(rows // t16.ROWS, columns // GROUP, t16.ROWS).bfloat16(),
    )
    dense = [torch.randn(rows, columns) for _ in range(3)]
    halves = [each.bfloat16() for each in dense]
    theirs = [torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (rows, columns), dtype=torch.int32), 2) for _ in range(8)]
    scales_and_zeros = torch.rand(columns // GROUP, rows, 2).bfloat16()
    x, tier = torch.randn(inputs, columns), native.tier()
    half = x.bfloat16()
    torch.set_num_threads(1)

    def ours(digits: int) -> Callable[[int], object]:
        return lambda turn: native.multiply(
            x, blocked[turn % len(blocked)], scales, None, bits=4, rows=rows, columns=columns, step=GROUP, digits=digits, tier=tier
        )

    sides: dict[str, Callable[[int], object]] = {
        "two digits": ours(2),
        "one digit": ours(1),
        "torch int4": lambda turn: torch.ops.aten._weight_int4pack_mm_for_cpu(half, theirs[turn % len(theirs)], GROUP, scales_and_zeros),
        "torch bfloat16": lambda turn: torch.nn.functional.linear(half, halves[turn % len(halves)]),
        "torch float32": lambda turn: torch.nn.functional.linear(x, dense[turn % len(dense)]),
    }
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, product in sides.items():
            taken[name].append(seconds(partial(product, turn)))
    # The first of each warms up.
    return {"inputs": inputs, "rows": rows, "columns": columns, "milliseconds": {name: statistics.median(of[1:]) * 1e3 for name, of in taken.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the numbers go")
    parser.add_argument("--quick", action="store_true", help="one shape, one thread, few repeats")
    arguments = parser.parse_args()
    if not native.built():
        raise SystemExit("the kernels were not built: python -m compress.kernels.build")
    shapes, threads, repeats = (SHAPES[:1], (1,), 5) if arguments.quick else (SHAPES, tuple(sorted({1, os.cpu_count() or 1})), 15)
    # As much as the largest weight and its copies take, each page touched.
    memory = memory_of.empty(BEYOND_CACHE + 2 * max(rows * columns for rows, columns in shapes)).random_(0, 256)
    results = [
        measure(bits, *shape, digits, count, memory, repeats)
        for count, bits, digits, shape in itertools.product(threads, WIDTHS, (1, 2), shapes)
    ]  # fmt: skip
    batches = [several(inputs, *SHAPES[0], memory, 5 if inputs > 64 else 3 * repeats) for inputs in (BATCHES[1:3] if arguments.quick else BATCHES)]
    document = {"benchmark": "gemv", "tier": native.tier(), "group": GROUP, "stamp": harness.stamp({}), "results": results, "batches": batches}
    document["errors"] = {str(digits): error(digits, 256, SHAPES[0][1]) for digits in (1, 2)}
    arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    table = Table(title=f"{native.tier()}: share of the speed of reading, median [least to greatest]")
    for heading in ("threads", "bits", "digits", *(f"{rows} x {columns}" for rows, columns in shapes)):
        table.add_column(heading, justify="right")
    for (count, bits, digits), rows in itertools.groupby(results, lambda row: (row["threads"], row["bits"], row["digits"])):
        cells = [f"{row['share']:.0%} \\[{row['share_range'][0]:.0%}-{row['share_range'][1]:.0%}]" for row in rows]
        table.add_row(str(count), str(bits), str(digits), *cells)
    Console().print(table)
    table = Table(title=f"milliseconds, 4 bits, {SHAPES[0][0]} x {SHAPES[0][1]}, one thread, medians")
    for heading in ("inputs", *batches[0]["milliseconds"]):
        table.add_column(heading, justify="right")
    for row in batches:
        table.add_row(str(row["inputs"]), *(f"{value:.2f}" for value in row["milliseconds"].values()))
    Console().print(table)
    Console().print("relative error of outputs: " + ", ".join(f"{value:.0e} with {digits} digit(s)" for digits, value in document["errors"].items()))


if __name__ == "__main__":
    main()
