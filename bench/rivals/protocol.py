"""What every rival's script shares: the grids, one command line, one measurement, one line of JSON.

The scripts beside this file run inside the rival's own virtual environment, where this project is not installed, so this
module imports the standard library only.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path


@dataclass(frozen=True)
class Grid:
    """What the linears of every block are rounded to; embeddings, head and norms stay as they are."""

    format: str
    """``int``, ``fp8`` (E4M3), ``nvfp4``, ``mxfp4``; ``mixed``: integers, each linear its own."""
    bits: float
    """Of one code; of a mixed grid the stored bits per weight, scales and zero points included, that may not be exceeded."""
    group_size: int
    """Weights along the input that share a scale; 0: all of an output channel."""
    symmetric: bool = True
    activations: str | None = None
    """What the inputs of the linears are rounded to at run time (``int8`` and ``fp8`` per token, else as the weights); None: nothing."""


GRIDS = {
    "w4g128": Grid("int", 4, 128),
    "w4g128-asym": Grid("int", 4, 128, symmetric=False),
    "w3g128": Grid("int", 3, 128),
    "w3g128-asym": Grid("int", 3, 128, symmetric=False),
    "w2g64": Grid("int", 2, 64),
    "w2g64-asym": Grid("int", 2, 64, symmetric=False),
    "mixed-2.5": Grid("mixed", 2.5, 64),
    "w8a8": Grid("int", 8, 0, activations="int8"),
    "fp8": Grid("fp8", 8, 0, activations="fp8"),
    "nvfp4": Grid("nvfp4", 4, 16),
    "mxfp4": Grid("mxfp4", 4, 32),
    "nvfp4-a4": Grid("nvfp4", 4, 16, activations="nvfp4"),
    "mxfp4-a4": Grid("mxfp4", 4, 32, activations="mxfp4"),
}

INTEGER = ("w4g128", "w4g128-asym", "w3g128", "w3g128-asym", "w2g64", "w2g64-asym")
SYMMETRIC, ASYMMETRIC = (tuple(name for name in INTEGER if GRIDS[name].symmetric is is_it) for is_it in (True, False))
FLOAT4 = ("nvfp4", "mxfp4", "nvfp4-a4", "mxfp4-a4")
EIGHT = ("w8a8", "fp8")

METHODS: dict[str, dict[str, tuple[str, ...]]] = {
    "llmcompressor": {
        "gptq": (*INTEGER, *EIGHT, *FLOAT4),
        "gptq-mse": (*INTEGER, *FLOAT4),
        "gptq-imatrix": INTEGER,
        "awq": INTEGER,
        "rtn": (*EIGHT, *FLOAT4),
        "rtn-mse": FLOAT4,
        "smoothquant": ("w8a8",),
        "smoothquant-gptq": ("w8a8",),
    },
    "gptqmodel": {
        "gptq": INTEGER,
        "gptq-mse": (*INTEGER, "mixed-2.5"),
        "gptaq": INTEGER,
        "act-order": INTEGER,
        "awq": ("w4g128-asym",),
    },
    "autoround": {
        "rtn": (*INTEGER, *FLOAT4, *EIGHT),
        "light": (*INTEGER, *FLOAT4, "mixed-2.5"),
        "default": (*INTEGER, *FLOAT4, *EIGHT, "mixed-2.5"),
        "best": (*INTEGER, *FLOAT4, "mixed-2.5"),
        "best-ext": (*SYMMETRIC, *FLOAT4, "mixed-2.5"),
        "default-attention": ("mixed-2.5",),
        "default-down": ("mixed-2.5",),
    },
    "hqq": {"hqq": ASYMMETRIC},
    "torchao": {"rtn": (*INTEGER, *EIGHT, "nvfp4"), "hqq": SYMMETRIC},
}
"""The grids for which each tool's own methods are rows of the table, its default first; what they mean stands in the tool's script."""

PACKAGES = {tool: tool for tool in METHODS} | {"autoround": "auto-round"}
"""What each tool's package is called."""

DATA_FREE = {("hqq", "hqq"), ("torchao", "rtn"), ("torchao", "hqq")}
"""Methods that read no calibration tokens, so that one draw of them is all there is."""


def read_windows(path: Path) -> list[list[int]]:
    """The token windows of a JSONL file of ``{"input_ids": [...]}``; refuses windows of unequal length.

    Equal lengths mean no padding, and padding is where two tools would silently calibrate on different tokens.
    """
    windows = [json.loads(line)["input_ids"] for line in path.read_text().splitlines() if line]
    lengths = {len(window) for window in windows}
    if len(lengths) != 1:
        raise SystemExit(f"{path}: windows of lengths {sorted(lengths)}; exactly one length is needed")
    return windows


def parse_arguments(description: str | None, tool: str) -> argparse.Namespace:
    """The command line every rival's script has; ``grid`` comes back as a `Grid`."""
    methods = METHODS[tool]
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--tokens", type=Path, required=True, help='calibration windows, JSONL of {"input_ids": [...]}')
    parser.add_argument("--out", type=Path, required=True, help="where the quantised checkpoint goes")
    parser.add_argument("--grid", choices=GRIDS, default="w4g128")
    parser.add_argument("--method", choices=methods, default=next(iter(methods)))
    parser.add_argument("--dtype", choices=("auto", "float32"), default="auto", help="what the model is computed in; auto: the checkpoint's")
    arguments = parser.parse_args()
    if arguments.grid not in methods[arguments.method]:
        parser.error(f"{arguments.method} is not compared on {arguments.grid}; it is on {', '.join(methods[arguments.method])}")
    arguments.grid = GRIDS[arguments.grid]
    return arguments


def _cpu_seconds() -> float:
    """User plus system seconds of this process and of the children it has waited for."""
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _peak_rss_bytes() -> int:
    """The most this process ever held resident. Read from /proc: getrusage also counts the process that started this one."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024


def measure(tool: str, work: Callable[[], None]) -> None:
    """Run `work` (load, quantise, save; imports excluded) and print what it cost as the last line of stdout."""
    started, cpu_started = time.perf_counter(), _cpu_seconds()
    work()
    cost = {
        "tool": tool,
        "version": version(PACKAGES[tool]),
        "seconds": round(time.perf_counter() - started, 3),
        "cpu_seconds": round(_cpu_seconds() - cpu_started, 3),
        "peak_rss_bytes": _peak_rss_bytes(),
    }
    print(json.dumps(cost), flush=True)
