"""compress itself: `compress.load`, which runs every artifact packed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.engines.launch import Session

NAME = "compress"
TITLE = "compress"
PACKAGES = ("compress",)
MODULE = "compress"
VERSIONS: dict[str, str] = {}
READS = ("compressed-tensors", "mxfp4", "nm-packed")
DTYPES = ("float32",)
BESIDE = True
"""It computes with residuals and branches, which others leave out."""
INSTALL: tuple[str, ...] = ()
REMOVE: tuple[str, ...] = ()
ENVIRONMENT: dict[str, str] = {}


def run(session: Session) -> dict[str, Any]:
    import torch

    import compress

    return session.by_torch(compress.load(session.folder).to(getattr(torch, session.dtype)))
