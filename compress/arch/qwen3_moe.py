"""Qwen3-MoE: routed experts, alternating with dense MLPs where the config says so."""

from compress.arch.base import (
    ATTENTION,
    ATTENTION_BIASES,
    ATTENTION_FOLDS,
    ATTENTION_UNITS,
    GATED_MLP,
    GATED_MLP_FOLDS,
    GATED_MLP_UNITS,
    Arch,
    Experts,
    Fold,
    Unit,
)

ARCH = Arch(
    model_type="qwen3_moe",
    groups=ATTENTION + GATED_MLP,
    folds=(
        *ATTENTION_FOLDS,
        *GATED_MLP_FOLDS,
        Fold("experts.gate_up", "post_attention_layernorm", ("mlp.gate", "mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")),
        Fold("experts.down", "mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",)),
    ),
    writers=("self_attn.o_proj", "mlp.down_proj", "mlp.experts.*.down_proj"),
    units=(
        *ATTENTION_UNITS,
        *GATED_MLP_UNITS,
        Unit("expert_channel", ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"), "mlp.experts.*.down_proj", "moe_intermediate_size"),
    ),
    biases=(ATTENTION_BIASES,),
    experts=Experts(
        prefix="mlp.experts",
        module="mlp.experts",
        gate="gate_proj",
        up="up_proj",
        down="down_proj",
        router="mlp.gate",
        counts=("num_experts", "num_local_experts"),
        renormalise="norm_topk_prob",
    ),
    unquantized=("mlp.gate",),
)
