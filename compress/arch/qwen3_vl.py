"""Qwen3-VL: a vision transformer that writes to the residual stream behind the first blocks too (DeepStack), in front of a Qwen3 language model."""

from compress.arch.base import (
    ATTENTION,
    ATTENTION_FOLDS,
    ATTENTION_UNITS,
    GATED_MLP,
    GATED_MLP_FOLDS,
    GATED_MLP_UNITS,
    Arch,
    Outside,
)

ARCH = Arch(
    model_type="qwen3_vl",
    groups=ATTENTION + GATED_MLP,
    folds=ATTENTION_FOLDS + GATED_MLP_FOLDS,
    units=ATTENTION_UNITS + GATED_MLP_UNITS,
    outside=Outside(
        embedding=("model.language_model.embed_tokens", "model.language_model.embed_tokens"),
        norm=("model.language_model.norm", "model.language_model.norm"),
    ),
    blocks="model.language_model.layers",
    module_blocks="model.language_model.layers",
    text_config="text_config",
    image=True,
    flat_tower=True,
)
