"""SmolVLM: a SigLIP tower and a connector that packs neighbouring patches, in front of a small Llama language model."""

from compress.arch.base import (
    ATTENTION,
    ATTENTION_BIASES,
    ATTENTION_FOLDS,
    ATTENTION_UNITS,
    GATED_MLP,
    GATED_MLP_BIASES,
    GATED_MLP_FOLDS,
    GATED_MLP_UNITS,
    Arch,
    Outside,
)

ARCH = Arch(
    model_type="smolvlm",
    groups=ATTENTION + GATED_MLP,
    folds=ATTENTION_FOLDS + GATED_MLP_FOLDS,
    units=ATTENTION_UNITS + GATED_MLP_UNITS,
    outside=Outside(
        embedding=("model.text_model.embed_tokens", "model.text_model.embed_tokens"),
        norm=("model.text_model.norm", "model.text_model.norm"),
        writers=(("model.connector.modality_projection.proj", "model.connector.modality_projection.proj"),),
    ),
    blocks="model.text_model.layers",
    module_blocks="model.text_model.layers",
    text_config="text_config",
    image=True,
    biases=(ATTENTION_BIASES, GATED_MLP_BIASES),
    whole_heads=True,
)
