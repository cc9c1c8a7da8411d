"""What an artifact says of itself in its manifest: the hashes of its files, and whether its gates passed."""

from __future__ import annotations

from pathlib import Path

from pydantic import ConfigDict, Field

from compress.checkpoint import sha256
from compress.errors import InputError, Problems
from compress.options import Options, parse, read_json

FILE = "manifest.json"
BESIDE = ("recipe.yaml", "plan.json", "report.json", "report.html")
"""Files that a run writes and no other program does: where they lie without a manifest, it was lost."""
REMEDY = "fetch the artifact again, or make it anew"


class Manifest(Options):
    """As much of it as anything goes by: ``files`` by name to sha256, of all but itself and the report."""

    model_config = ConfigDict(extra="ignore")

    accepted: bool
    files: dict[str, str] = Field(min_length=1)

    def differing(self, folder: Path) -> dict[str, str]:
        """What is wrong with each file of `folder` that is not as the manifest says."""
        there = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        return {
            name: "differs" if name in there else "is missing"
            for name, digest in sorted(self.files.items())
            if name not in there or sha256(there[name]) != digest
        }

    def check(self, folder: Path, problems: Problems) -> None:
        """Report the files of `folder` that are not as the manifest says."""
        for name, fault in self.differing(folder).items():
            problems.add(str(folder / name), "is not the file that manifest.json tells of" if fault == "differs" else fault, REMEDY)


def read(folder: Path) -> Manifest | None:
    """That of an artifact, None if it has none. Raises `InputError` with everything that is wrong with it."""
    path = folder / FILE
    if not path.exists():
        return None
    return parse(Manifest, read_json(path, REMEDY), str(path), "accepted and files", remedy=REMEDY)


def check(folder: Path, problems: Problems) -> None:
    """Report a manifest that cannot be read, or files that are not as it says; an artifact without one is taken as it is."""
    try:
        told = read(folder)
    except InputError as error:
        problems.absorb(error)
    else:
        if told:
            told.check(folder, problems)


def lost(folder: Path) -> bool:
    """Whether `folder` is an artifact of ours whose manifest is gone."""
    return not (folder / FILE).exists() and any((folder / name).is_file() for name in BESIDE)
