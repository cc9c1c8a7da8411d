"""The report of a run: everything measured, as JSON and as a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compress.checkpoint import write_text


def write(result: dict[str, Any], folder: Path) -> None:
    """Write `report.json` into `folder`."""
    write_text(folder / "report.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
