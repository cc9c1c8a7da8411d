"""Qwen2-VL: a vision transformer that merges patches, in front of a Qwen2 language model whose positions have three dimensions."""

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
    model_type="qwen2_vl",
    groups=ATTENTION + GATED_MLP,
    folds=ATTENTION_FOLDS + GATED_MLP_FOLDS,
    units=ATTENTION_UNITS + GATED_MLP_UNITS,
    outside=Outside(
        embedding=("model.embed_tokens", "model.language_model.embed_tokens"),
        norm=("model.norm", "model.language_model.norm"),
        writers=(("visual.merger.mlp.2", "model.visual.merger.mlp.2"),),
    ),
    module_blocks="model.language_model.layers",
    text_config="text_config",
    image=True,
    flat_tower=True,
)
