"""What a run has measured so far, in files, so that one that is killed goes on measuring where it was, to the same figures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.checkpoint import entry, read_header, read_tensor
from compress.state import intact, write_state, write_state_text

SOURCE, ARTIFACT, IN_ENGINES = "source", "artifact", "artifact in engines"
"""What the models of a run are called."""


@dataclass(frozen=True)
class Kept:
    """``folder`` holds a file for each kind of measurement and protocol, None keeps nothing. ``models`` says of each of the models that are measured,
    by what it is called here, what it is made of: a figure of other bytes is no figure of it. ``redone`` is told of each file that is not what was
    written, which is measured again."""

    folder: Path | None = None
    models: Mapping[str, Any] | None = None
    redone: Callable[[str], None] = lambda name: None

    def figures(self, kind: str, of: tuple[str, ...], protocol: Any, measure: Callable[[], Any]) -> Any:
        """What `measure` gives, which JSON can hold, of a ``kind`` ``of`` some of the models by a ``protocol``, plain data that decides it."""
        path = self._path(kind, of, protocol, ".json")
        if path is None:
            return measure()
        if not self._there(path):
            write_state_text(path, json.dumps(measure()))
        return json.loads(path.read_text(encoding="utf-8"))

    def tensors(
        self, kind: str, of: tuple[str, ...], protocol: Any, measure: Callable[[], dict[str, Tensor]], spared: Callable[[], None] = lambda: None
    ) -> dict[str, Tensor]:
        """The same of tensors, which are then on the CPU; `spared` is called where nothing had to be measured."""
        path = self._path(kind, of, protocol, ".safetensors")
        if path is None:
            return measure()
        if not self._there(path):
            write_state(path, [entry(name, tensor) for name, tensor in measure().items()], {})
        else:
            spared()
        return {name: read_tensor(info) for name, info in read_header(path)[0].items()}

    def _path(self, kind: str, of: tuple[str, ...], protocol: Any, ending: str) -> Path | None:
        if self.folder is None or self.models is None:
            return None
        decisive = json.dumps([kind, {name: self.models[name] for name in of}, protocol], sort_keys=True)
        self.folder.mkdir(exist_ok=True)
        return self.folder / f"{kind}-{hashlib.sha256(decisive.encode()).hexdigest()[:16]}{ending}"

    def _there(self, path: Path) -> bool:
        there = intact(path)
        if path.exists() and not there:
            self.redone(path.name)
        return there


NOTHING = Kept()
