"""Qwen3: grouped-query attention and a gated MLP."""

from compress.arch.base import ATTENTION, GATED_MLP, Arch

ARCH = Arch(model_type="qwen3", groups=ATTENTION + GATED_MLP)
