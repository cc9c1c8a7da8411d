"""LLaVA: a CLIP vision tower and a projector, kept as they are, in front of a Llama or Mistral language model."""

from compress.arch.base import ATTENTION, ATTENTION_FOLDS, GATED_MLP, GATED_MLP_FOLDS, Arch

ARCH = Arch(
    model_type="llava",
    groups=ATTENTION + GATED_MLP,
    folds=ATTENTION_FOLDS + GATED_MLP_FOLDS,
    blocks="language_model.model.layers",
    module_blocks="model.language_model.layers",
    text_config="text_config",
    image=True,
)
