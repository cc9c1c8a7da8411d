"""LLaVA: a CLIP vision tower and a projector, kept as they are, in front of a Llama or Mistral language model."""

from compress.arch.base import ATTENTION, GATED_MLP, Arch

ARCH = Arch(
    model_type="llava",
    groups=ATTENTION + GATED_MLP,
    blocks="language_model.model.layers",
    module_blocks="model.language_model.layers",
    text_config="text_config",
    image=True,
)
