"""What every rival's script shares: one command line, one measurement, one line of JSON.

The scripts beside this file run inside the rival's own virtual environment, where this project is not installed, so this
module imports the standard library only.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

VARIANTS = {
    "llmcompressor": ("default", "mse", "imatrix"),
    "gptqmodel": ("default", "mse", "gptaq", "act-order"),
}
"""Each tool's own ways of doing GPTQ, its default first; what they mean stands in the tool's script."""


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
    """The command line every rival's script has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--tokens", type=Path, required=True, help='calibration windows, JSONL of {"input_ids": [...]}')
    parser.add_argument("--out", type=Path, required=True, help="where the quantised checkpoint goes")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--variant", choices=VARIANTS[tool], default="default")
    parser.add_argument("--dtype", choices=("auto", "float32"), default="auto", help="what the model is computed in; auto: the checkpoint's")
    grid = parser.add_mutually_exclusive_group()
    grid.add_argument("--sym", dest="symmetric", action="store_true", default=True, help="symmetric grid (default)")
    grid.add_argument("--asym", dest="symmetric", action="store_false", help="asymmetric grid")
    return parser.parse_args()


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
        "version": version(tool),
        "seconds": round(time.perf_counter() - started, 3),
        "cpu_seconds": round(_cpu_seconds() - cpu_started, 3),
        "peak_rss_bytes": _peak_rss_bytes(),
    }
    print(json.dumps(cost), flush=True)
