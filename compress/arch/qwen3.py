"""Qwen3: grouped-query attention and a gated MLP."""

from compress.arch.base import ATTENTION, ATTENTION_BIASES, ATTENTION_FOLDS, ATTENTION_UNITS, GATED_MLP, GATED_MLP_FOLDS, GATED_MLP_UNITS, Arch

ARCH = Arch(
    model_type="qwen3",
    groups=ATTENTION + GATED_MLP,
    folds=ATTENTION_FOLDS + GATED_MLP_FOLDS,
    units=ATTENTION_UNITS + GATED_MLP_UNITS,
    biases=(ATTENTION_BIASES,),
)
