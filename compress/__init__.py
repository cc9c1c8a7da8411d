"""compress: a compiler for LLM and VLM checkpoints."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`load` on demand: it needs torch, which most of what imports this package does not."""
    if name == "load":
        from compress.runtime import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
