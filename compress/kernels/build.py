"""Compile the CPU kernels: what installing the package does, and `python -m compress.kernels.build` after a change to them.

Each file in `cpu` but `t16.cpp` is one instruction set; its line `// Needs:` names the machine and the features it is compiled for, and
asks of a processor, so that another one is another file and nothing else. One that needs more is taken to be faster.

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
NEEDS = "// Needs:"
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
"""What some systems call machines that have another name here."""
FLAGS = ["-std=c++17", "-fPIC", "-fno-math-errno", "-ffp-contract=off"]


def compiler() -> str | None:
    """The C++ compiler, or None."""
    return os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def compile_library(called: str, target: Path, extra: Sequence[str] = (), machine: str = platform.machine()) -> None:
    """Compile the kernels for `machine` to `target` by the compiler so `called`. Raises `CalledProcessError` with what it said."""
    machine = MACHINES.get(machine.lower(), machine)
    common = [*extra, *(["-fopenmp"] if sys.platform.startswith("linux") else [])]
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        tiers = _tiers(machine)
        Path(folder, "tiers.inc").write_text("".join(f"TIER({name}, {_question(features)})\n" for name, features in tiers.items()))
        objects, commands = [], []
        for name, features in (*reversed(tiers.items()), ("t16", ())):  # those that take longest first
            # The plain kernels are there to compare with: what -O3 would add to them is half of the time to compile.
            flags = ["-O3" if features or name == "t16" else "-O1", *FLAGS, *common, *_options(machine, features)]
            objects.append(f"{folder}/{name}.o")
            commands.append([called, *flags, f"-I{folder}", "-c", str(SOURCES / f"{name}.cpp"), "-o", objects[-1]])
        with ThreadPoolExecutor() as pool:
            list(pool.map(_run, commands))
        whole = f"{folder}/{target.name}"
        _run([called, "-shared", *common, *objects, "-o", whole])
        os.replace(whole, target)


def _tiers(machine: str) -> dict[str, tuple[str, ...]]:
    """The files that can be compiled for `machine` and the features each needs, the fastest last."""
    found = {}
    for path in SOURCES.glob("*.cpp"):
        if path.stem != "t16":
            needs = next(line for line in path.read_text().splitlines() if line.startswith(NEEDS)).removeprefix(NEEDS).split()
            if needs[0] in ("any", machine):
                found[path.stem] = tuple(needs[1:])
    return dict(sorted(found.items(), key=lambda item: len(item[1])))


def _options(machine: str, features: Sequence[str]) -> list[str]:
    """What lets a compiler use `features`."""
    if machine == "aarch64":
        return ["-march=armv8.2-a" + "".join(f"+{feature}" for feature in features)]
    return [f"-m{feature}" for feature in features]


def _question(features: Sequence[str]) -> str:
    """Whether a processor has `features`, in C++."""
    return " && ".join(f'HAS("{feature}")' for feature in features) or "true"


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
