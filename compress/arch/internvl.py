"""InternVL: a vision transformer and a projector in front of a Qwen2, Qwen3 or Llama language model."""

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
    model_type="internvl",
    groups=ATTENTION + GATED_MLP,
    folds=ATTENTION_FOLDS + GATED_MLP_FOLDS,
    units=ATTENTION_UNITS + GATED_MLP_UNITS,
    outside=Outside(
        embedding=("language_model.model.embed_tokens", "model.language_model.embed_tokens"),
        norm=("language_model.model.norm", "model.language_model.norm"),
        head=("language_model.lm_head", "lm_head"),
        writers=(("multi_modal_projector.linear_2", "model.multi_modal_projector.linear_2"),),
    ),
    blocks="language_model.model.layers",
    module_blocks="model.language_model.layers",
    text_config="text_config",
    image=True,
    whole_heads=True,
)
