"""transformers: unpacks weights of compressed-tensors, and gives GPTQ and AWQ to GPTQModel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.engines.launch import Session

NAME = "transformers"
TITLE = "transformers"
PACKAGES = ("transformers",)
MODULE = "transformers"
VERSIONS = {"5.23": "run"}
READS = ("compressed-tensors", "mxfp4", "gptq", "awq")
DTYPES = ("float32", "bfloat16")
ROUNDS = True
"""It unpacks experts, and what is asymmetric, while loading, and rounds them to the dtype of their scales whatever it is told to compute in."""
INSTALL = ("torch==2.13.0", "transformers==5.23.0", "compressed-tensors==0.20.0", "accelerate", "gptqmodel==7.6.0", "optimum")
REMOVE = ("torchvision", "torchaudio", "torchcodec")
ENVIRONMENT = {"GPTQMODEL_CPU_WORKERS": "2"}


def run(session: Session) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, session.dtype)
    model = AutoModelForCausalLM.from_pretrained(session.folder, dtype=dtype, local_files_only=True, trust_remote_code=False)
    for parameter in model.parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.to(dtype)  # experts, which it leaves in the dtype of their scales
    return session.by_torch(model.eval())
