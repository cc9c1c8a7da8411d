"""Which V:N:M pattern is as fast on this machine as is wanted, and of those which leaves pruning the most ways to go (arXiv 2410.16135, section 4).

How fast a pattern is depends on the processor and on the shapes of the model's linears, so it is measured: products of one token with V:N:M weights
beside products with dense ones as `compress.load` would make both. What is chosen is a pattern to write into a recipe; a recipe measures nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

from compress.checkpoint import Checkpoint
from compress.errors import InputError
from compress.layout import Layout
from compress.numerics.pattern import CHOSEN, Pattern
from compress.source import locate_model
from compress.speed import cache_bytes, check_threads, computing_on

if TYPE_CHECKING:
    import torch
    from torch import Tensor

KEPT = 2
V = (16, 32, 64, 128)
M = (5, 6, 8, 16)
REPEATS, SECONDS = 9, 0.2
"""A product is timed at least so many times and, with the one it is compared with, so long."""
BEYOND_CACHE = 96 << 20
"""Bytes read between two uses of a weight, at most, where the system does not say how large its cache is."""

Shape = tuple[int, int]
Timer = Callable[[Shape, Pattern], tuple[float, float]]
"""Seconds of a dense product of this shape, [out, in], and of one with the pattern."""


class Progress(Protocol):
    """What a search reports to."""

    def step(self, name: str, total: int) -> None: ...

    def done(self, units: int) -> None: ...


@dataclass(frozen=True)
class Measured:
    """A pattern, and how many times as fast as dense ones the products of a token with all linears of a model are."""

    pattern: Pattern
    speedup: float

    def record(self, itemsize: int) -> dict[str, Any]:
        """As JSON, for weights of so many bytes."""
        v, m = self.pattern.v or 1, self.pattern.m
        read = CHOSEN / m * (itemsize + 4 / v)
        return {"pattern": str(self.pattern), "speedup": self.speedup, "diversity": self.pattern.diversity, "bytes_per_weight": read}


def choose(measured: Sequence[Measured], speedup: float) -> Measured | None:
    """Of those that are so many times as fast the one with the largest mask diversity, or None."""
    return max((each for each in measured if each.speedup >= speedup), key=lambda each: (each.pattern.diversity, each.speedup), default=None)


def candidates(shapes: Iterable[Shape]) -> tuple[list[Pattern], list[str]]:
    """The patterns that divide all ``shapes`` [out, in], and why others do not."""
    why = [f"V = {v} does not divide {rows} outputs" for v in V for rows in _odd((rows for rows, _ in shapes), v)]
    why += [f"M = {m} does not divide {columns} inputs" for m in M for columns in _odd((columns for _, columns in shapes), m)]
    out = {line.partition(" does")[0] for line in why}
    return [Pattern(KEPT, m, v) for m in M for v in V if not {f"V = {v}", f"M = {m}"} & out], why


def _odd(sizes: Iterable[int], divisor: int) -> list[int]:
    """Those that it does not divide."""
    return sorted({size for size in sizes if size % divisor})


def weigh(shapes: Counter[Shape], patterns: Sequence[Pattern], timer: Timer, progress: Progress) -> list[Measured]:
    """Each pattern with its speed-up over all linears, of which there are so many of each shape."""
    progress.step("measure", len(patterns) * len(shapes))
    found: list[Measured] = []
    for pattern in patterns:
        dense = sparse = 0.0
        for place, (shape, count) in enumerate(sorted(shapes.items()), 1):
            before, after = timer(shape, pattern)
            dense, sparse = dense + count * before, sparse + count * after
            progress.done(len(found) * len(shapes) + place)
        found.append(Measured(pattern, dense / sparse))
    return found


def search(name: str, speedup: float, threads: int | None, progress: Progress) -> dict[str, Any]:
    """Measure the patterns that divide the linears of a model, and choose one that is `speedup` times as fast as none; `chosen` is None if none is.

    Linears of routed experts are left out, since theirs are unpacked when they are loaded. Raises `InputError` for models that are quantised
    already, of which no pattern divides the shapes, or where nothing would be gained: without kernels, and on a GPU.
    """
    import torch

    from compress.kernels import native
    from compress.model import Model

    if not 1 < speedup < math.inf:
        raise InputError.one("--speedup", f"must be a number above 1, got {speedup:g}")
    check_threads(threads)
    layout = Layout(Checkpoint(locate_model(name)))
    layout.refuse_quantized()
    counted = {linear: (each.rows, each.columns) for linear, each in layout.linears.items() if linear not in layout.of_experts}
    shapes = Counter(counted.values())
    patterns, why = candidates(shapes)
    if not patterns:
        raise InputError.one(name, f"no V of {_listed(V)} and M of {_listed(M)} divides its linears", "; ".join(why))
    model = Model(layout)
    if missing := native.missing_why() or (f"the model is on {model.device}" if model.device.type != "cpu" else None):
        raise InputError.one(name, f"V:N:M would not be faster here: {missing}")
    if model.stored not in native.FLOATS:
        raise InputError.one(name, f"V:N:M is not faster in {model.stored}", "convert it to bfloat16")
    with computing_on(threads), torch.no_grad():
        measured = weigh(shapes, patterns, Stopwatch(shapes, model.stored, model.dtype).seconds, progress)
        used = torch.get_num_threads()
    chosen = choose(measured, speedup)
    experts = len(layout.linears) - len(counted)
    return {
        "model": name,
        "speedup": speedup,
        "threads": used,
        "kernel": native.tier(),
        "dtype": str(model.stored).removeprefix("torch."),
        "linears": [{"rows": rows, "columns": columns, "count": count} for (rows, columns), count in sorted(shapes.items())],
        "patterns": [each.record(model.stored.itemsize) for each in measured],
        "chosen": str(chosen.pattern) if chosen else None,
        "remarks": [*why, *([f"{experts} linears of experts are not counted: they are unpacked when they are loaded"] if experts else [])],
    }


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


class Stopwatch:
    """Measures products of one token with weights in the dtype ``stored``, inputs in the dtype ``computed``.

    Between two uses of a weight so many others are read as in decoding, up to what no cache holds. Values do not matter for speed: all weights
    lie in the same memory.
    """

    def __init__(self, shapes: Counter[Shape], stored: torch.dtype, computed: torch.dtype) -> None:
        from compress.kernels import memory

        self._computed = computed
        self._all = sum(count * rows * columns for (rows, columns), count in shapes.items()) * stored.itemsize
        self._beyond = min(self._all, 2 * cache_bytes() or BEYOND_CACHE)
        largest = max(rows * columns for rows, columns in shapes) * stored.itemsize
        self._memory = memory.empty(-(-(self._beyond + largest) // stored.itemsize), dtype=stored).normal_()

    def seconds(self, shape: Shape, pattern: Pattern) -> tuple[float, float]:
        """Of a dense product and of one with the pattern, in turn: medians."""
        import torch

        x = torch.randn(1, 1, shape[1], dtype=self._computed)
        sides = self.dense(shape), self.sparse(shape, pattern)
        taken: list[list[float]] = []
        start = perf_counter()
        while len(taken) <= REPEATS or perf_counter() - start < SECONDS:
            taken.append([_seconds(side, x) for side in sides])
        dense, sparse = (median(times[1:]) for times in zip(*taken, strict=True))  # the first warms up
        return dense, sparse

    def dense(self, shape: Shape) -> list[Callable[[Tensor], Tensor]]:
        """Products with weights of a shape, [out, in], made as `compress.load` makes them."""
        from functools import partial

        from torch.nn import functional

        from compress.kernels.dense import DenseLinear

        weights = self._weights(shape, 1)
        if self._memory.dtype.itemsize < self._computed.itemsize:
            return [DenseLinear(weight) for weight in weights]
        return [partial(functional.linear, weight=weight) for weight in weights]

    def sparse(self, shape: Shape, pattern: Pattern) -> list[Callable[[Tensor], Tensor]]:
        """The same with a pattern, whose groups are the whole ones among the inputs."""
        import torch

        from compress.formats.nm_packed import Compact
        from compress.kernels.memory import placed
        from compress.kernels.vnm import VNMLinear

        (rows, columns), v, m = shape, pattern.v or 1, pattern.m
        groups = columns // m
        places = torch.rand(rows // v, groups, m).argsort(-1)[..., :CHOSEN].sort(-1).values + m * torch.arange(groups)[:, None]
        read = places.flatten(1).int()
        weights = self._weights((rows // v, v, CHOSEN * groups), CHOSEN / m)
        return [VNMLinear(Compact(weight, placed(read), columns, pattern)) for weight in weights]

    def _weights(self, shape: tuple[int, ...], share: float) -> list[Tensor]:
        """As many weights of this shape as are read before the first is read again, where all take so large a `share` of what they take dense."""
        size = math.prod(shape)
        count = math.ceil(min(self._beyond, share * self._all) / (size * self._memory.dtype.itemsize))
        return [self._memory[place * size : (place + 1) * size].view(shape) for place in range(count)]


def _seconds(products: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> float:
    """Of each, on average."""
    start = perf_counter()
    for product in products:
        product(x)
    return (perf_counter() - start) / len(products)
