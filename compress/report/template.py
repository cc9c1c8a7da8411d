"""Pages from templates: whatever is filled in is escaped, and one file is all there is."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

AT_ONCE = 16
"""Rows of a table that are seen without a click."""


@cache
def _environment() -> Environment:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals["at_once"] = AT_ONCE
    environment.filters["rows"] = lambda records, *keys: [[record[key] for key in keys] for record in records]
    environment.filters["filled"] = lambda headings, rows: [index for index in range(len(headings)) if any(row[index] for row in rows)]
    return environment


def render(name: str, **values: Any) -> str:
    """The template of this folder called `name`, with `values`."""
    html = _environment().get_template(name).render(**values)
    # ASCII reads the same in whatever encoding the file is written and opened.
    return html.encode("ascii", "xmlcharrefreplace").decode("ascii") + "\n"
