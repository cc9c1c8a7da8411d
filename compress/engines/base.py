"""What is known of serving engines before any of them runs: a table per engine, one file each beside this one.

Whether an engine reads what an export wrote is said by that export's `verdicts`, or by the engine's own `verdict` where it has one; here stand which
exports it reads at all, and which of its versions the rules were read off (`read`: its loader's source; `run`: it was run, see docs/engines.md).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from compress.errors import InputError, Problems

if TYPE_CHECKING:
    from compress.layout import Layout
    from compress.scheme import Caching, Scheme

NOT_ENGINES = ("__init__", "base", "guard", "launch")
REFUSES = "refuses"
"""What a verdict begins with that means no."""


@dataclass(frozen=True)
class Engine:
    """One engine, in the version asked for, None if none was; ``file`` is what `launch.py` runs it by."""

    name: str
    title: str
    version: str | None
    file: Path
    table: ModuleType

    @property
    def text(self) -> str:
        """As it was asked for."""
        return self.name if self.version is None else f"{self.name}=={self.version}"

    @property
    def runs(self) -> bool:
        """Whether it can be started here at all."""
        return hasattr(self.table, "run")

    def verdict(self, export: str, said: dict[str, str]) -> str:
        """Whether and how it reads `export`, whose `verdicts` are `said`."""
        if export not in self.table.READS:
            return f"{REFUSES} {export}: reads {', '.join(self.table.READS)} alone"
        return said.get(self.title, "loads")


@cache
def tables() -> dict[str, ModuleType]:
    """The engines' files by the names that users give them, in alphabetical order."""
    files = (path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in NOT_ENGINES)
    found = {table.NAME: table for table in (import_module(f"compress.engines.{stem}") for stem in files)}
    return dict(sorted(found.items()))


def verdicts(export: str, layout: Layout, plan: dict[str, Scheme], cache: Caching | None, said: dict[str, str]) -> dict[str, str]:
    """For each engine, whether and how it reads what `export` wrote: `said`, which are the export's verdicts, and those of engines that judge."""
    own = [table for table in tables().values() if export in table.READS and hasattr(table, "verdict")]
    return said | {table.TITLE: table.verdict(export, layout, plan, cache, said) for table in own}


def find(text: str, place: str = "--engine") -> Engine:
    """The engine that `vllm` or `vllm==0.33` names. Raises `InputError` for one, or for a version, that nothing is known of."""
    match = re.fullmatch(r"\s*([^=<>!~\s]+)\s*(?:==\s*([0-9][0-9.]*)\s*)?", text)
    if match is None:
        raise InputError.one(place, f"{text!r} is no engine", "write a name such as vllm, or a name and a version such as vllm==0.33")
    name, version = match[1].lower(), match[2]
    if name not in tables():
        raise InputError.one(place, f"{name} is not known", f"known are {', '.join(tables())}")
    table = tables()[name]
    # What is known of 0.33 holds for its patches, not for a 0 that is less than it says.
    if version is not None and table.VERSIONS and not any(f"{version}.".startswith(f"{known}.") for known in table.VERSIONS):
        raise InputError.one(place, f"nothing is known of version {version} of {name}", f"known are {', '.join(table.VERSIONS)}; or leave it out")
    assert table.__file__
    return Engine(name, table.TITLE, version, Path(table.__file__), table)


def find_all(texts: Sequence[str], problems: Problems) -> list[Engine]:
    """All of `texts` that name an engine; of those that do not `problems` is told."""
    found = []
    for text in texts:
        try:
            found.append(find(text))
        except InputError as error:
            problems.absorb(error)
    return found
