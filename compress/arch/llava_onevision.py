"""LLaVA-OneVision: a SigLIP tower, a projector and a learnt end of image rows, in front of a Qwen2 language model."""

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
    model_type="llava_onevision",
    groups=ATTENTION + GATED_MLP,
    folds=ATTENTION_FOLDS + GATED_MLP_FOLDS,
    units=ATTENTION_UNITS + GATED_MLP_UNITS,
    outside=Outside(
        embedding=("language_model.model.embed_tokens", "model.language_model.embed_tokens"),
        norm=("language_model.model.norm", "model.language_model.norm"),
        head=("language_model.lm_head", "lm_head"),
    ),
    blocks="language_model.model.layers",
    module_blocks="model.language_model.layers",
    text_config="text_config",
    image=True,
)
