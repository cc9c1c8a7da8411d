"""Products of one token with V:N:M weights in bfloat16: how many times as fast as dense ones, of torch and of `compress`.

    python bench/vnm.py --json vnm.json [--quick]

One thread. Weights are multiplied in turn, copies of each that together exceed the last-level cache; all ways to multiply take turns. A ratio is
that of medians. "bytes" is how much less a product reads, which is what decoding can gain where memory is the limit.
"""

import argparse
import json
import statistics
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional

from compress.kernels import native
from compress.numerics.pattern import CHOSEN, Pattern
from compress.patterns import Stopwatch

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
PATTERNS = tuple(Pattern(2, m, v) for m in (5, 6, 8, 16) for v in (16, 32, 64, 128))
HALF = torch.bfloat16


def measure(shape: tuple[int, int], patterns: tuple[Pattern, ...], repeats: int) -> dict[str, Any]:
    """Median milliseconds of every way to multiply by a weight of a shape [out, in]. Inputs behind the last whole group of M are left out."""
    watch = Stopwatch(Counter({shape: 1000}), HALF, torch.float32)
    x, dense = torch.randn(1, shape[1]), [layer.codes for layer in watch.dense(shape)]
    wide = [weight.float() for weight in dense[:3]]
    sides: dict[str, list[Any]] = {
        "torch float32": [partial(functional.linear, x, weight) for weight in wide],
        "torch bfloat16": [partial(functional.linear, x.to(HALF), weight) for weight in dense],
        "compress bfloat16": [partial(layer, x) for layer in watch.dense(shape)],
    }
    for pattern in patterns:
        sides[str(pattern)] = [partial(layer, x) for layer in watch.sparse(shape, pattern)]
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, products in sides.items():
            began = time.perf_counter()
            products[turn % len(products)]()
            taken[name].append(time.perf_counter() - began)
    # The first of each warms up.
    return {"shape": shape, "repeats": repeats, "milliseconds": {name: 1e3 * statistics.median(times[1:]) for name, times in taken.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the numbers go")
    parser.add_argument("--quick", action="store_true", help="one shape, few repeats")
    arguments = parser.parse_args()
    if not native.built():
        raise SystemExit("the kernels were not built: python -m compress.kernels.build")
    torch.set_num_threads(1)
    with torch.no_grad():
        results = [measure(shape, PATTERNS, 5 if arguments.quick else 31) for shape in SHAPES[: 1 if arguments.quick else None]]
    document = {"benchmark": "vnm", "tier": native.tier(), "stamp": harness.stamp({}), "results": results}
    arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    for result in results:
        rows, columns = result["shape"]
        taken = result["milliseconds"]
        beside = [name for name in taken if "float" in name]
        table = Table(title=f"{native.tier()}, {rows} x {columns}, one thread: " + ", ".join(f"{name} {taken[name]:.2f} ms" for name in beside))
        for heading in ("pattern", "ms", *(f"x {name}" for name in beside), "x bytes"):
            table.add_column(heading, justify="right")
        for pattern in PATTERNS:
            own, v = taken[str(pattern)], pattern.v or 1
            less = pattern.m / CHOSEN / (1 + 2 / v)
            table.add_row(str(pattern), f"{own:.2f}", *(f"{taken[name] / own:.2f}" for name in beside), f"{less:.2f}")
        Console(width=120).print(table)


if __name__ == "__main__":
    main()
