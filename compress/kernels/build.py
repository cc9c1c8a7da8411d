"""Compile the CPU kernels: what installing the package does, and `python -m compress.kernels.build` after a change to them.

Only the standard library is imported, since this runs before anything else is installed.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "cpu"
X86 = {"avx2": ["-mavx2", "-mfma", "-mf16c"], "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c"]}
"""By source, the instructions it may use: those it is named after, never all that the building machine has."""
FLAGS = ["-std=c++17", "-fPIC", "-fno-math-errno", "-ffp-contract=off"]


def compiler() -> str | None:
    """The C++ compiler, or None."""
    return os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def compile_library(called: str, target: Path, extra: Sequence[str] = ()) -> None:
    """Compile the kernels to `target` by the compiler so `called`. Raises `CalledProcessError` with what it said."""
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    common = [*extra, *(["-fopenmp"] if sys.platform.startswith("linux") else [])]
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects, commands = [], []
        for name in (*(X86 if on_x86 else ()), "plain", "t16"):
            # The plain kernels are there to compare with: what -O3 would add to them is half of the time to compile.
            speed = "-O1" if name == "plain" else "-O3"
            flags = [speed, *FLAGS, *common, *X86.get(name, []), *(["-DT16_X86"] if on_x86 else [])]
            objects.append(f"{folder}/{name}.o")
            commands.append([called, *flags, "-c", str(SOURCES / f"{name}.cpp"), "-o", objects[-1]])
        with ThreadPoolExecutor() as pool:
            list(pool.map(_run, commands))
        whole = f"{folder}/{target.name}"
        _run([called, "-shared", *common, *objects, "-o", whole])
        os.replace(whole, target)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def main() -> None:
    found = compiler()
    if found is None:
        raise SystemExit("no C++ compiler found; set $CXX")
    try:
        compile_library(found, SOURCES / "libt16.so")
    except subprocess.CalledProcessError as error:
        raise SystemExit(error.stderr) from error


if __name__ == "__main__":
    main()
