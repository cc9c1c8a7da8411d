"""Products with packed weights on a GPU: are they right, how long do they take, and what share of the speed of copying memory do they reach?

    python bench/gpu.py --json gpu.json [--quick]

First each width is compared with float64. Then, for each width, number of digits of the inputs, shape and number of tokens, copies of the weight
that together exceed the cache are multiplied in turn, inside one CUDA graph; a time is the median over replays, per product, with everything that
a product launches. Beside them run torch's bfloat16 product, torch's own kernel for 4 bits and gemlite's where it is installed; one that fails is
a row that says so. Bytes are those of codes and scales (or of the dense weight); the share is theirs per second over those of a copy in the same
run, reads and writes. Then the same of attention of one new token behind a cache of latents, beside torch's path and a dense cache: the shape
of Llama-3-8B, a fifth of the channels, bytes those of the cache. Exit code 1 if a product is wrong, 2 without a GPU.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import harness
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.errors import TritonError

from compress.kernels import gpu, t16
from compress.kernels.linear import unpacked
from compress.latents import Held, Kept, Latents

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (16384, 16384))
WIDTHS, TOKENS, GROUP = (4, 3, 2, 8), (1, 2, 4, 8, 16, 32, 64), 128
CONTEXTS = (8192, 32768, 131072)
TOLERANCE = {1: 2e-2, 2: 5e-3}
"""Of products in bfloat16, relative: 2e-3 of it is the rounding of outputs."""
ATTENTION_TOLERANCE = 2e-2
"""Of attention in bfloat16, whose queries for latents and weights are rounded to it."""
REPLAYS = 9
FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ImportError, OSError, AssertionError, TritonError)
"""What torch, Triton and tools that call them raise; anything else is a mistake of this file."""

Product = Callable[[Tensor], Tensor]
Maker = Callable[[int, int], tuple[Product, int]]
"""From rows and columns a product with a weight of its own, and the bytes of that."""


def packed(bits: int, digits: int) -> Maker:
    def make(rows: int, columns: int) -> tuple[Product, int]:
        codes = torch.randint(0, 256, (rows // t16.ROWS, columns * bits // 32, t16.ROWS, 4), dtype=torch.uint8, device="cuda")
        scales = (torch.rand(rows // t16.ROWS, columns // GROUP, t16.ROWS, device="cuda") + 0.1).bfloat16()
        run = torch.ops.compress.packed_linear
        return lambda x: run(x, codes, scales, None, bits, rows, columns, digits), codes.nbytes + scales.nbytes

    return make


def dense(rows: int, columns: int) -> tuple[Product, int]:
    weight = torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda")
    return lambda x: x @ weight.T, weight.nbytes


def tinygemm(rows: int, columns: int) -> tuple[Product, int]:
    codes = torch.ops.aten._convert_weight_to_int4pack(torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device="cuda"), 8)
    scales = torch.randn(columns // GROUP, rows, 2, dtype=torch.bfloat16, device="cuda")
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, codes, GROUP, scales), codes.nbytes + scales.nbytes


def gemlite(rows: int, columns: int) -> tuple[Product, int]:
    from gemlite.core import DType, GemLiteLinear

    layer = GemLiteLinear(4, group_size=GROUP, in_features=columns, out_features=rows, input_dtype=DType.BF16, output_dtype=DType.BF16)
    scales = torch.rand(rows * columns // GROUP, 1, dtype=torch.bfloat16, device="cuda")
    layer.pack(torch.randint(0, 16, (rows, columns), dtype=torch.uint8, device="cuda"), scales, torch.full_like(scales, 8), None)
    return layer, rows * columns // 2 + scales.nbytes


def per_call(calls: Sequence[Callable[[], object]]) -> float:
    """Seconds of one of `calls`, all of which are captured in one graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls[:2]:  # compiles, and lets libraries choose, before the capture
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) / 1e3 / len(calls))
    return statistics.median(times)


def copy_speed() -> float:
    """Bytes per second read and written by a copy of a gigabyte."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / per_call([lambda: target.copy_(source)] * 4)


def error(bits: int, digits: int, tokens: int, symmetric: bool) -> float:
    """Of one product, against float64, relative."""
    rows, columns = 1000, 4096
    blocks = t16.padded(rows, t16.ROWS) // t16.ROWS
    codes = torch.randint(0, 256, (blocks, columns * bits // 32, t16.ROWS, 4), dtype=torch.uint8, device="cuda")
    scales = (torch.rand(blocks, columns // GROUP, t16.ROWS, device="cuda") + 0.1).bfloat16()
    zeros = None if symmetric else torch.randint(0, 1 << bits, scales.shape, dtype=torch.uint8, device="cuda")
    x = torch.randn(tokens, columns, dtype=torch.bfloat16, device="cuda")
    found = torch.ops.compress.packed_linear(x, codes, scales, zeros, bits, rows, columns, digits).double()
    exact = x.double() @ unpacked(codes, scales, zeros, bits, rows, columns).double().T
    return float((found - exact).norm() / exact.norm())


def behind_latents(context: int, bits: int, channels: int | None) -> tuple[Held, Tensor]:
    """Random states behind a window of 32 tokens, and a query; so many channels of latents, None: all, as `kv_quant` codes them."""
    heads, width, all_heads = 8, 128, 32
    ends = None if channels is None else (torch.randn(channels, heads * width) / 32, torch.randn(heads * width, channels) / channels**0.5)
    latents = Latents(ends, ends, 32, bits, commuting=True).to("cuda", torch.bfloat16)
    latents.turns = lambda *_: (torch.empty(0), torch.empty(0))
    kept = tuple(Kept(coding) for coding in latents.codings() or (None, None))
    for each in kept:
        each.append(torch.randn(1, context, channels or heads * width, dtype=torch.bfloat16, device="cuda"))
    keys, values = (torch.randn(1, heads, 33, width, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    positions = torch.arange(context + 33, device="cuda")[None]
    return Held(latents, kept, positions, keys, values), torch.randn(1, all_heads, 1, width, dtype=torch.bfloat16, device="cuda")


def steps(context: int) -> Iterator[tuple[str, list[Callable[[], Tensor]], int]]:
    """By kernel, steps of a token that attend to so many old ones, each to a cache of its own that exceed the GPU's together; bytes of one."""
    beyond = 2 * torch.cuda.get_device_properties(0).L2_cache_size
    for name, bits, channels in (("latents, 16 bits", 16, 200), ("latents, 4 bits", 4, 200), ("all channels, 4 bits", 4, None)):
        first = behind_latents(context, bits, channels)
        size = sum(part.nbytes for kept in first[0].old for part in kept.parts) + first[0].keys.nbytes + first[0].values.nbytes
        every = [first, *(behind_latents(context, bits, channels) for _ in range(beyond // size + 1))]
        yield name, [lambda view=view, query=query: view.by_kernel(query, None, 0.09, gpu.device_of(0)) for view, query in every], size
        yield f"{name}, torch", [lambda view=view, query=query: view.by_torch(query, None, 0.09) for view, query in every], size
    states = [torch.randn(2, 1, 8, context + 33, 128, dtype=torch.bfloat16, device="cuda")]
    states += [torch.randn_like(states[0]) for _ in range(beyond // states[0].nbytes + 1)]
    query = torch.randn(1, 32, 1, 128, dtype=torch.bfloat16, device="cuda")
    attend = torch.nn.functional.scaled_dot_product_attention
    yield "dense cache", [lambda both=both: attend(query, both[0], both[1], enable_gqa=True) for both in states], states[0].nbytes


def attention_error(bits: int, channels: int | None) -> float:
    """Of one step behind latents, against float64, relative."""
    view, query = behind_latents(4096, bits, channels)
    found = view.by_kernel(query, None, 0.09, gpu.device_of(0))
    exact = Held(view.latents.double(), view.old, view.positions, view.keys.double(), view.values.double()).by_torch(query.double(), None, 0.09)
    return float((found.double() - exact).norm() / exact.norm())


def measure(make: Maker, rows: int, columns: int, tokens: Sequence[int]) -> list[dict[str, Any]]:
    """One row for each number of tokens."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    products = [make(rows, columns)]
    size = products[0][1]
    products += [make(rows, columns) for _ in range(2 * cache // size + 1)]
    found = []
    for count in tokens:
        x = torch.randn(count, columns, dtype=torch.bfloat16, device="cuda")
        taken = per_call([lambda product=product, x=x: product(x) for product, _ in products])
        found.append({"rows": rows, "columns": columns, "tokens": count, "microseconds": taken * 1e6, "bytes": size})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the numbers go")
    parser.add_argument("--quick", action="store_true", help="two shapes, 1 and 16 tokens")
    arguments = parser.parse_args()
    console = Console(width=160)
    if not torch.cuda.is_available():
        console.print("no GPU: torch finds none, so there is nothing to measure")
        sys.exit(2)
    if reason := gpu.missing():
        console.print(f"no kernels: {reason}")
        sys.exit(2)
    shapes, tokens = (SHAPES[:2], (1, 16)) if arguments.quick else (SHAPES, TOKENS)
    errors = [
        {"bits": bits, "digits": digits, "tokens": count, "symmetric": symmetric, "error": error(bits, digits, count, symmetric)}
        for bits, digits, count, symmetric in itertools.product(WIDTHS, (1, 2), (1, 3, *tokens[1:]), (True, False))
    ]
    wrong = [each for each in errors if not each["error"] < TOLERANCE[each["digits"]]]
    attended = [{"bits": bits, "channels": channels, "error": attention_error(bits, channels)} for bits, channels in ((16, 200), (4, 200), (4, None))]
    wrong += [each for each in attended if not each["error"] < ATTENTION_TOLERANCE]
    for each in wrong:
        console.print(f"wrong: {each}")
    copied = copy_speed()
    makers: dict[str, Maker] = {"bfloat16": dense, "tinygemm W4": tinygemm}
    if find_spec("gemlite"):
        makers["gemlite W4"] = gemlite
    makers |= {f"W{bits}, {digits} digit{'s'[: digits - 1]}": packed(bits, digits) for bits in WIDTHS for digits in (1, 2)}
    results: list[dict[str, Any]] = []
    for (name, make), (rows, columns) in itertools.product(makers.items(), shapes):
        try:
            found = measure(make, rows, columns, tokens)
        except FAILURES as problem:  # of a rival's, and of a kernel that was never measured before: a row each
            found = [{"rows": rows, "columns": columns, "error": f"{type(problem).__name__}: {problem}"[:300]}]
        results += [
            {"kernel": name, **row} | ({"share": row["bytes"] / row["microseconds"] * 1e6 / copied} if "bytes" in row else {}) for row in found
        ]
        torch.cuda.empty_cache()
    attention: list[dict[str, Any]] = []
    for context in CONTEXTS[:1] if arguments.quick else CONTEXTS:
        for name, calls, size in steps(context):
            try:
                taken = per_call(calls)
                row = {"microseconds": taken * 1e6, "bytes": size, "share": size / taken / copied}
            except FAILURES as problem:
                row = {"error": f"{type(problem).__name__}: {problem}"[:300]}
            attention.append({"kernel": name, "context": context, **row})
        torch.cuda.empty_cache()
    device = torch.cuda.get_device_properties(0)
    document = {
        "benchmark": "gpu", "device": device.name, "group": GROUP, "copy_bytes_per_second": copied,
        "stamp": harness.stamp({}), "errors": errors, "results": results, "attention_errors": attended, "attention": attention,
    }  # fmt: skip
    arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    for count in tokens:
        table = Table(title=f"{device.name}, {count} tokens: microseconds (share of the {copied / 1e12:.2f} TB/s of a copy)")
        for heading in ("kernel", *(f"{rows} x {columns}" for rows, columns in shapes)):
            table.add_column(heading, justify="right")
        for name in makers:
            own = {(row["rows"], row["columns"]): row for row in results if row["kernel"] == name and row.get("tokens", count) == count}
            cells = (own[shape] for shape in shapes)
            table.add_row(name, *("failed" if "error" in row else f"{row['microseconds']:.1f} ({row['share']:.0%})" for row in cells))
        console.print(table)
    table = Table("cache", "context", "microseconds", "share of a copy's speed", title=f"{device.name}, attention of one token, without its linears")
    for row in attention:
        table.add_row(
            row["kernel"], str(row["context"]), *(("failed", "") if "error" in row else (f"{row['microseconds']:.1f}", f"{row['share']:.0%}"))
        )
    console.print(table)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
