"""Products with one packed weight: what share of the speed of reading memory the kernels reach.

    python bench/gemv.py --json gemv.json [--quick]

For each width, number of digits of the inputs, number of threads and shape, copies of the weight that together exceed the last-level cache are
multiplied in turn. Between these runs the same amount of memory is only read, by the same threads; the share is the ratio of the medians, with
the least and the greatest beside it. Bytes are those of codes and scales.
"""

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from rich.console import Console
from rich.table import Table

from compress.kernels import native, t16

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
WIDTHS = (4, 8, 3, 2)
GROUP = 128
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the numbers go")
    parser.add_argument("--quick", action="store_true", help="one shape, one thread, few repeats")
    arguments = parser.parse_args()
    if not native.built():
        raise SystemExit("the kernels were not built: python -m compress.kernels.build")
    shapes, threads, repeats = (SHAPES[:1], (1,), 5) if arguments.quick else (SHAPES, tuple(sorted({1, os.cpu_count() or 1})), 15)
    # As much as the largest weight and its copies take, each page touched.
    memory = torch.randint(0, 256, (BEYOND_CACHE + 2 * max(rows * columns for rows, columns in shapes),), dtype=torch.uint8)
    results = [
        measure(bits, *shape, digits, count, memory, repeats)
        for count, bits, digits, shape in itertools.product(threads, WIDTHS, (1, 2), shapes)
    ]  # fmt: skip
    document = {"benchmark": "gemv", "tier": native.tier(), "group": GROUP, "stamp": harness.stamp({}), "results": results}
    arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    table = Table(title=f"{native.tier()}: share of the speed of reading, median [least to greatest]")
    for heading in ("threads", "bits", "digits", *(f"{rows} x {columns}" for rows, columns in shapes)):
        table.add_column(heading, justify="right")
    for (count, bits, digits), rows in itertools.groupby(results, lambda row: (row["threads"], row["bits"], row["digits"])):
        cells = [f"{row['share']:.0%} \\[{row['share_range'][0]:.0%}-{row['share_range'][1]:.0%}]" for row in rows]
        table.add_row(str(count), str(bits), str(digits), *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
