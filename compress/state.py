"""Files that a killed run continues from. Of each the sha256 is noted beside it before it takes its place, so that damage shows.

What is no state - what a kill left unfinished, and what is made anew each time - ends in `PASSING`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from compress.checkpoint import Entry, sha256, sync_folder, write_safetensors, write_text

SUMS = "sha256sums"
"""By folder: a line for each file that was ever written there, digest and name."""
PASSING = (".partial", ".scratch")
LINES = ".jsonl"
"""Files that grow line by line: each begins with its own digest."""


def write_state(path: Path, entries: Iterable[Entry], metadata: Mapping[str, str]) -> None:
    """`write_safetensors`, noted."""
    write_safetensors(path, entries, metadata, before=lambda partial: _note(path, sha256(partial)))


def write_state_text(path: Path, text: str) -> None:
    """`write_text`, noted."""
    write_text(path, text, before=lambda partial: _note(path, sha256(partial)))


def line(text: str) -> str:
    """What a file of `LINES` gets for a text without line breaks."""
    return f"{hashlib.sha256(text.encode()).hexdigest()} {text}\n"


def lines(path: Path) -> list[str]:
    """The texts in a file of `LINES`, of which one that was not finished is taken off."""
    if not path.exists():
        return []
    whole, end, _ = path.read_text(encoding="utf-8").rpartition("\n")
    with path.open("r+", encoding="utf-8") as file:
        file.truncate(len((whole + end).encode()))
    return [each.partition(" ")[2] for each in whole.splitlines()]


def intact(path: Path) -> bool:
    """Whether a file is there as it was written, last or before: a kill may have come between the note and what it is about."""
    return path.is_file() and sha256(path) in _noted(path.parent).get(path.name, ())


def damaged(folder: Path) -> list[str]:
    """What is wrong with the state in a folder and those inside it, a sentence for each file, by name; empty if nothing is."""
    found = []
    for each in sorted((folder, *(path for path in folder.rglob("*") if path.is_dir()))):
        noted = _noted(each)
        for path in sorted(path for path in each.iterdir() if path.is_file() and path.name != SUMS and path.suffix not in PASSING):
            name = path.relative_to(folder)
            if path.suffix == LINES:
                found += [f"{name} is not what was written" for _ in [path] if not _sound(path)]
            elif path.name not in noted:
                found.append(f"{name} was not written by a run")
            elif not intact(path):
                found.append(f"{name} is not what was written")
        # One that is noted and not there may have been about to come when the run was killed.
        gone = sorted(name for name in noted if not (each / name).exists() and not (each / f"{name}.partial").exists())
        found += [f"{(each / name).relative_to(folder)} is gone" for name in gone]
    return found


def _note(path: Path, digest: str) -> None:
    # A line that was not finished has the next one begin behind it.
    with (path.parent / SUMS).open("a", encoding="utf-8") as sums:
        sums.write(f"\n{digest}  {path.name}\n")
        sums.flush()
        os.fsync(sums.fileno())
    sync_folder(path.parent)


def _noted(folder: Path) -> dict[str, set[str]]:
    """Digests by name."""
    sums = folder / SUMS
    found: dict[str, set[str]] = {}
    for each in sums.read_text(encoding="utf-8", errors="replace").splitlines() if sums.is_file() else ():
        digest, _, name = each.partition("  ")
        if name:
            found.setdefault(name, set()).add(digest)
    return found


def _sound(path: Path) -> bool:
    """Whether every finished line of a file of `LINES` is as it was written."""
    whole = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")[0]
    return all(line(each.partition(" ")[2]) == f"{each}\n" for each in whole.splitlines())
