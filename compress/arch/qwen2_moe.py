"""Qwen2-MoE: routed experts beside one that every token goes to, alternating with dense MLPs where the config says so."""

from compress.arch.base import (
    ATTENTION,
    ATTENTION_FOLDS,
    ATTENTION_UNITS,
    GATED_MLP,
    GATED_MLP_FOLDS,
    GATED_MLP_UNITS,
    Arch,
    Experts,
    Fold,
    InputGroup,
    Unit,
)

ARCH = Arch(
    model_type="qwen2_moe",
    groups=(
        *ATTENTION,
        *GATED_MLP,
        InputGroup("shared.gate_up", ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")),
        InputGroup("shared.down", ("mlp.shared_expert.down_proj",)),
    ),
    folds=(
        *ATTENTION_FOLDS,
        *GATED_MLP_FOLDS,
        Fold(
            "experts.gate_up",
            "post_attention_layernorm",
            (
                "mlp.gate",
                "mlp.shared_expert_gate",
                "mlp.shared_expert.gate_proj",
                "mlp.shared_expert.up_proj",
                "mlp.experts.*.gate_proj",
                "mlp.experts.*.up_proj",
            ),
        ),
        Fold("shared.down", "mlp.shared_expert.up_proj", ("mlp.shared_expert.down_proj",)),
        Fold("experts.down", "mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",)),
    ),
    writers=("self_attn.o_proj", "mlp.down_proj", "mlp.shared_expert.down_proj", "mlp.experts.*.down_proj"),
    units=(
        *ATTENTION_UNITS,
        *GATED_MLP_UNITS,
        Unit(
            "shared_channel",
            ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
            "mlp.shared_expert.down_proj",
            "shared_expert_intermediate_size",
        ),
        Unit("expert_channel", ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"), "mlp.experts.*.down_proj", "moe_intermediate_size"),
    ),
    experts=Experts(
        prefix="mlp.experts",
        module="mlp.experts",
        gate="gate_proj",
        up="up_proj",
        down="down_proj",
        router="mlp.gate",
        counts=("num_experts",),
        renormalise="norm_topk_prob",
    ),
    unquantized=("mlp.gate", "mlp.shared_expert_gate"),
)
