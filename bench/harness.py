"""What the benchmarks share: a subprocess whose cost is measured, token windows, and the stamp that goes into every JSON.

Each side of a comparison is a process of its own, in its own virtual environment, so that neither side's imports, caches or
memory are charged to the other.
"""

import hashlib
import json
import lzma
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import yaml
from rivals.protocol import PACKAGES, Grid

BENCH = Path(__file__).resolve().parent
SAMPLE_SECONDS = 0.25
"""How often memory is sampled: often enough to see one block come and go, seldom enough not to be load itself."""

OUR_SUCCESS = (0, 3)
"""Our exit codes that leave an artifact: 3 says that a gate failed."""

Windows = list[list[int]]


@dataclass(frozen=True)
class Usage:
    """What one subprocess cost. CPU seconds and memory are those of the whole process tree."""

    returncode: int
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    load_average: float
    """The machine's one-minute load average when the process ended (its own load included)."""
    others_cores: float
    """Mean number of cores that were busy with something else meanwhile; near 0 on a quiet machine."""
    stdout: str
    stderr: str

    def error(self) -> str:
        """The last line the process wrote to stderr that says something, for a table cell."""
        lines = [line.strip() for line in self.stderr.splitlines() if line.strip()]
        return f"exit {self.returncode}: {lines[-1] if lines else 'no output on stderr'}"

    def cost(self) -> dict[str, float | int]:
        """The numbers alone, for JSON."""
        return {
            "seconds": round(self.seconds, 3),
            "cpu_seconds": round(self.cpu_seconds, 3),
            "peak_rss_bytes": self.peak_rss_bytes,
            "load_average": round(self.load_average, 2),
            "others_cores": round(self.others_cores, 2),
        }


def environment() -> dict[str, str]:
    """The environment every side runs in: as many threads as $OMP_NUM_THREADS says, or else as there are cores, no network, and
    threads that sleep while they wait.

    Without the last, OpenMP threads spin at every barrier; on a machine with anything else to do that costs one side an
    order of magnitude, and which side is chance.
    """
    threads = os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count() or 1)
    fixed = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **fixed}


def _memory(process: psutil.Process) -> tuple[int, int]:
    """Resident bytes of a process now, and at its highest since it was started; zeros once it is gone.

    The second is read from /proc, since what wait4 calls the maximum also counts the process that started this one.
    """
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024  # /proc counts KiB
    except (OSError, KeyError):
        return 0, 0


def _tree_peak(pid: int) -> int:
    """Bytes that a process and its descendants hold together now, or that one of them held at its highest, if that is more."""
    try:
        root = psutil.Process(pid)
        sizes = [_memory(process) for process in (root, *root.children(recursive=True))]
    except psutil.Error:  # the process may end between being listed and being asked
        return 0
    return max(sum(now for now, _ in sizes), max(highest for _, highest in sizes))


def _busy_seconds() -> float:
    """CPU seconds the whole machine has spent on anything since it started."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)


def run(command: Sequence[str | Path], timeout: float = 7200.0) -> Usage:
    """Run `command` to its end (or kill it and its children after `timeout` seconds) and measure it.

    It runs in the project's root, so that `python -m compress` is this checkout; paths in it have to be absolute.
    The peak is the larger of the sampled sum over the tree and the kernel's exact high-water mark of its largest process:
    the first sees helpers, the second sees what fell between two samples (all but the very last).
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        busy, started = _busy_seconds(), time.perf_counter()
        words = [str(part) for part in command]
        process = subprocess.Popen(words, stdout=out, stderr=err, env=environment(), cwd=BENCH.parent, start_new_session=True)
        ended, sampled = threading.Event(), [0]

        def watch() -> None:
            while not ended.wait(SAMPLE_SECONDS):
                sampled[0] = max(sampled[0], _tree_peak(process.pid))
                if time.perf_counter() - started > timeout:
                    os.killpg(process.pid, signal.SIGKILL)
                    return

        watcher = threading.Thread(target=watch)
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        ended.set()
        watcher.join()
        process.returncode = os.waitstatus_to_exitcode(status)
        cpu_seconds = usage.ru_utime + usage.ru_stime
        out.seek(0)
        err.seek(0)
        return Usage(
            returncode=process.returncode,
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            peak_rss_bytes=sampled[0],
            load_average=os.getloadavg()[0],
            others_cores=max(0.0, _busy_seconds() - busy - cpu_seconds) / seconds,
            stdout=out.read().decode(errors="replace"),
            stderr=err.read().decode(errors="replace"),
        )


def json_lines(text: str) -> list[dict[str, Any]]:
    """The lines of `text` that are JSON objects; the tools' own chatter on stdout is left out."""
    found = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def venv_python(venvs: Path | None, tool: str) -> Path | None:
    """The interpreter of a rival's virtual environment, or None where it is not installed."""
    python = venvs.absolute() / tool / "bin" / "python" if venvs else None  # not resolved: the link is what makes it a venv
    return python if python and python.exists() else None


def rival_command(python: Path, tool: str, model: Path, tokens: Path, out: Path, **options: object) -> list[str | Path]:
    """The command that lets `tool` quantise `model`; `options` are those of rivals/protocol.py."""
    flags = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    script = BENCH / "rivals" / f"run_{tool}.py"
    return [python, script, "--model", model, "--tokens", tokens, "--out", out, *flags]


def our_grid(grid: Grid) -> dict[str, Any]:
    """The options of our passes that round which mean `grid`."""
    if grid.format == "int":
        options: dict[str, Any] = {"bits": grid.bits, "group_size": grid.group_size or "channel", "symmetric": grid.symmetric}
    elif grid.format == "mixed":
        options = {"symmetric": grid.symmetric}
    else:
        options = {"format": grid.format}
    return options | ({"activations": "dynamic"} if grid.activations else {})


def write_recipe(path: Path, passes: Sequence[dict[str, Any]], tokens: Path, samples: int, length: int) -> Path:
    """Write the recipe that says for us what the flags of `rival_command` say for the others; returns its path."""
    recipe = {
        "calibration": {"data": str(tokens), "samples": samples, "length": length, "seed": 0},
        "passes": list(passes),
        "evaluate": None,
        "export": ["compressed-tensors"],
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


def our_command(recipe: Path, model: Path | str, out: Path) -> list[str | Path]:
    """The command that lets this project compress `model`."""
    return [sys.executable, "-m", "compress", "run", recipe, str(model), "--out", out]


def read_text(path: Path) -> str:
    """A text file, plain or ``.xz``."""
    return lzma.open(path, "rt", encoding="utf-8").read() if path.suffix == ".xz" else path.read_text(encoding="utf-8")


def random_windows(text: str, tokenizer: Any, samples: int, length: int, seed: int) -> Windows:
    """`samples` windows of `length` tokens from random places of `text`, each starting at a word, without BOS.

    Only what is needed is tokenised, so the text may be large.
    """
    span = 8 * length  # characters: more than `length` tokens of nearly any text; where not, another place is tried
    if len(text) <= span:
        raise SystemExit(f"calibration text: {len(text)} characters are too few for windows of {length} tokens")
    chooser, windows = random.Random(seed), []
    for _ in range(10 * samples):
        start = chooser.randrange(len(text) - span)
        ids = tokenizer(text[start : start + span].partition(" ")[2], add_special_tokens=False)["input_ids"]
        if len(ids) > length:  # the last token of a piece may be half a word, and is never used
            windows.append(ids[:length])
        if len(windows) == samples:
            return windows
    raise SystemExit(f"calibration text: {span} characters of it rarely hold {length} tokens")


def random_ids(samples: int, length: int) -> Windows:
    """Windows for measuring cost alone. Ids below 1,000 are in any vocabulary; which they are does not change the work."""
    chooser = random.Random(0)
    return [[chooser.randrange(1000) for _ in range(length)] for _ in range(samples)]


def consecutive_windows(text: str, tokenizer: Any, length: int, limit: int | None) -> Windows:
    """The first `limit` (None: all) non-overlapping windows of `length` tokens of `text`, without BOS; the rest is dropped."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)][:limit]


def write_windows(path: Path, windows: Iterable[list[int]]) -> str:
    """Write windows as JSONL and return the file's SHA-256, by which two results can be known to be about the same tokens."""
    text = "".join(json.dumps({"input_ids": ids}) + "\n" for ids in windows)
    path.write_text(text)
    return hashlib.sha256(text.encode()).hexdigest()


def _git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(BENCH), *arguments], check=False, capture_output=True, text=True).stdout.strip()


def _versions(python: Path | str, packages: Sequence[str]) -> dict[str, str]:
    """Versions of `packages` in the environment of `python`; what is not installed there is left out."""
    code = (
        "import json, sys\nfrom importlib.metadata import PackageNotFoundError, version\nfound = {}\n"
        "for name in sys.argv[1:]:\n    try: found[name] = version(name)\n    except PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run([str(python), "-c", code, *packages], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def stamp(rivals: dict[str, Path | None]) -> dict[str, Any]:
    """Where, when and with what a benchmark ran. A rival that is not installed stays in the list, as null."""
    cpuinfo = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    common = ("torch", "transformers", "compressed-tensors", "numpy")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "hardware": {
            "cpu": models[0] if models else platform.processor(),
            "cores": os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
        },
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "threads": int(environment()["OMP_NUM_THREADS"]),
        "omp_wait_policy": environment()["OMP_WAIT_POLICY"],
        "versions": {
            "ours": _versions(sys.executable, common),
            **{tool: _versions(python, (PACKAGES[tool], *common)) if python else None for tool, python in rivals.items()},
        },
    }
