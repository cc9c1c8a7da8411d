"""The choice of a pattern, by timings that are made up; and the whole command, by timings that are not."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from compress import patterns, speed
from compress.cli import app
from compress.kernels import native
from compress.numerics.pattern import Pattern
from compress.patterns import Measured, Shape, choose

built = pytest.mark.skipif(native.tier() == "torch", reason="needs the compiled kernels")


class Listener:
    def __init__(self) -> None:
        self.heard: list[tuple[str, int] | int] = []

    def step(self, name: str, total: int) -> None:
        self.heard.append((name, total))

    def done(self, units: int) -> None:
        self.heard.append(units)


def measured(**speedups: float) -> list[Measured]:
    return [Measured(Pattern.parse(text.strip("_").replace("_", ":")), value) for text, value in speedups.items()]


def test_of_those_fast_enough_the_one_with_most_masks_is_chosen() -> None:
    found = measured(_16_2_8=1.4, _64_2_8=1.6, _32_2_8=1.5, _16_2_16=2.9)
    for wanted, text in ((1.2, "16:2:8"), (1.5, "32:2:8"), (1.55, "64:2:8"), (2, "16:2:16"), (3, None)):
        chosen = choose(found, wanted)
        assert (str(chosen.pattern) if chosen else None) == text
    # More outputs that share inputs and more inputs to a group both leave fewer masks.
    assert [each.pattern.m for each in sorted(found, key=lambda each: -each.pattern.diversity)] == [8, 8, 8, 16]


def test_only_what_divides_every_linear_is_measured() -> None:
    found, why = patterns.candidates([(64, 80), (96, 240)])
    assert {str(each) for each in found} == {f"{v}:2:{m}" for v in (16, 32) for m in (5, 8, 16)}
    assert why == [
        "V = 64 does not divide 96 outputs", "V = 128 does not divide 64 outputs", "V = 128 does not divide 96 outputs",
        "M = 6 does not divide 80 inputs",
    ]  # fmt: skip


def test_speed_is_that_of_all_linears_together() -> None:
    taken: dict[Shape, tuple[float, float]] = {(16, 8): (1.0, 1.0), (16, 80): (10.0, 4.0)}
    listener = Listener()
    found = patterns.weigh(Counter({(16, 8): 2, (16, 80): 3}), [Pattern(2, 8, 16), Pattern(2, 8, 64)], lambda shape, _: taken[shape], listener)
    assert [each.speedup for each in found] == [32 / 14, 32 / 14]
    assert listener.heard == [("measure", 4), 1, 2, 3, 4]


@built
def test_bytes_are_those_of_what_is_multiplied() -> None:
    watch = patterns.Stopwatch(Counter({(64, 128): 3}), torch.bfloat16, torch.float32)
    pattern = Pattern(2, 8, 16)
    products = watch.sparse((64, 128), pattern)
    assert len(products) == len(watch.dense((64, 128))) == 3
    held = sum(data.nbytes for data in products[0].buffers())  # type: ignore[attr-defined]
    assert Measured(pattern, 1).record(2)["bytes_per_weight"] * 64 * 128 == held


@built
def test_the_command_names_a_pattern_and_says_where_there_is_none(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(checkpoint("llama", torch.bfloat16))
    monkeypatch.setattr(patterns, "REPEATS", 1)
    monkeypatch.setattr(patterns, "SECONDS", 0)
    done = CliRunner().invoke(app, ["pattern", folder, "--speedup", "1000", "--json"])
    result = json.loads(done.stdout)
    assert done.exit_code == 1 and result["chosen"] is None and {each["pattern"] for each in result["patterns"]} >= {"16:2:8", "32:2:16"}
    assert all(each["speedup"] > 0 for each in result["patterns"])
    times = {"16:2:8": 1.5, "32:2:8": 1.25, "16:2:16": 1.0, "32:2:16": 1.0}
    monkeypatch.setattr(patterns.Stopwatch, "seconds", lambda self, shape, pattern: (2.0, times[str(pattern)]))
    done = CliRunner().invoke(app, ["pattern", folder, "--speedup", "1.5"])
    assert done.exit_code == 0 and 'for a recipe: prune_nm: {pattern: "32:2:8"} and export: [nm-packed]' in done.stdout
    done = CliRunner().invoke(app, ["pattern", folder, "--speedup", "2.5"])
    assert done.exit_code == 1 and "none is 2.5 times as fast here; 16:2:16 comes closest with 2.00" in done.stdout


@built
def test_experts_are_not_counted(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns.Stopwatch, "seconds", lambda self, shape, pattern: (2.0, 1.0))
    done = CliRunner().invoke(app, ["pattern", str(checkpoint("qwen3_moe", torch.bfloat16)), "--speedup", "1.5", "--json"])
    result = json.loads(done.stdout)
    assert sum(each["count"] for each in result["linears"]) == 8
    assert result["remarks"][-1] == "48 linears of experts are not counted: they are unpacked when they are loaded"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--speedup", "1"], "--speedup: must be a number above 1, got 1"),
        (["--speedup", "nan"], "--speedup: must be a number above 1, got nan"),
        (["--speedup", "1.5", "--threads", str(speed.processors() + 1)], f"--threads: must be at most {speed.processors()}"),
    ],
)
def test_mistakes_are_told(options: list[str], message: str, checkpoint: Callable[..., Path]) -> None:
    done = CliRunner().invoke(app, ["pattern", str(checkpoint("llama")), *options])
    assert done.exit_code == 2 and message in done.stderr


def test_where_nothing_would_be_faster_is_told(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.FORCE, "torch")
    done = CliRunner().invoke(app, ["pattern", str(checkpoint("llama")), "--speedup", "1.5"])
    assert done.exit_code == 2 and "V:N:M would not be faster here: $COMPRESS_CPU is torch" in done.stderr
