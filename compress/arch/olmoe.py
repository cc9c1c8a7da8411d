"""OLMoE: routed experts in every block; queries and keys are normed over all heads at once, so that no head can go without the others noticing."""

from compress.arch.base import ATTENTION, Arch, Experts, Fold, Unit

ARCH = Arch(
    model_type="olmoe",
    groups=ATTENTION,
    folds=(
        Fold("qkv", "input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Fold("o", "self_attn.v_proj", ("self_attn.o_proj",), heads=True, unless="clip_qkv"),
        Fold("experts.gate_up", "post_attention_layernorm", ("mlp.gate", "mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")),
        Fold("experts.down", "mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",)),
    ),
    writers=("self_attn.o_proj", "mlp.experts.*.down_proj"),
    units=(Unit("expert_channel", ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"), "mlp.experts.*.down_proj", "intermediate_size"),),
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
