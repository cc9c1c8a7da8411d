"""gpt-oss: biased experts that transformers holds, on disk too, in two transposed tensors with gates interleaved; attention with a sink per head.

Heads cannot be taken out, since their sinks would have to go with them, nor can a scale pass through the gated product, which adds and clamps.
"""

from compress.arch.base import ATTENTION, ATTENTION_FOLDS, Arch, Experts, Fold, Unit

ARCH = Arch(
    model_type="gpt_oss",
    groups=ATTENTION,
    folds=(
        *ATTENTION_FOLDS,
        Fold("experts.gate_up", "post_attention_layernorm", ("mlp.router", "mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")),
    ),
    writers=("self_attn.o_proj", "mlp.experts.*.down_proj"),
    units=(Unit("expert_channel", ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"), "mlp.experts.*.down_proj", "intermediate_size"),),
    kernel="eager",
    experts=Experts(
        prefix="mlp.experts",
        module="mlp.experts",
        gate="gate_proj",
        up="up_proj",
        down="down_proj",
        router="mlp.router",
        counts=("num_local_experts", "num_experts"),
        transposed=True,
        interleaved=True,
        biased=True,
        fused=True,
        mxfp4=True,
    ),
    unquantized=("mlp.router",),
)
