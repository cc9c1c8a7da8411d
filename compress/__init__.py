"""compress: a compiler for LLM and VLM checkpoints."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`load` and `explain` on demand: they need torch, which most of what imports this package does not."""
    if name in ("load", "explain"):
        from compress import runtime

        return getattr(runtime, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
