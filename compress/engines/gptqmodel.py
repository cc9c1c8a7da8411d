"""GPTQModel, the successor of AutoGPTQ and AutoAWQ, whose layouts it reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.engines.launch import Session

NAME = "gptqmodel"
TITLE = "GPTQModel"
PACKAGES = ("gptqmodel",)
MODULE = None
"""It starts threads when it is imported, which a fork would wait for without end."""
VERSIONS = {"7.6": "run"}
READS = ("gptq", "awq")
DTYPES = ("float16",)
"""Told to compute in float32 it is as far off as in 16 bits."""
INSTALL = ("torch==2.13.0", "gptqmodel==7.6.0", "optimum")
REMOVE = ("torchvision",)
ENVIRONMENT = {"GPTQMODEL_CPU_WORKERS": "2"}
"""With two cores it asks for two workers of a pool of one."""


def run(session: Session) -> dict[str, Any]:
    import torch
    from gptqmodel import BACKEND, GPTQModel

    model = GPTQModel.load(session.folder, device="cpu", backend=BACKEND.AUTO, dtype=getattr(torch, session.dtype), trust_remote_code=False)
    return session.by_torch(model.model.eval())
