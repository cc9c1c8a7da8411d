"""DeepSeek-V3: attention by latent vectors (MLA), routed experts beside shared ones after some dense blocks, a sigmoid router with groups.

Heads cannot be taken out, nor values scaled by head: one linear makes a head's values together with its keys. Nor can channels of experts: one
number in the config is the width of routed and shared experts alike.
"""

from compress.arch.base import GATED_MLP, GATED_MLP_FOLDS, GATED_MLP_UNITS, Arch, Experts, Fold, InputGroup

ARCH = Arch(
    model_type="deepseek_v3",
    groups=(
        InputGroup("qkv", ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"), unless="self_attn.q_proj"),
        InputGroup("qkv", ("self_attn.q_proj", "self_attn.kv_a_proj_with_mqa"), unless="self_attn.q_a_proj"),
        InputGroup("latent.q", ("self_attn.q_b_proj",)),
        InputGroup("latent.kv", ("self_attn.kv_b_proj",)),
        InputGroup("o", ("self_attn.o_proj",)),
        *GATED_MLP,
        InputGroup("shared.gate_up", ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")),
        InputGroup("shared.down", ("mlp.shared_experts.down_proj",)),
    ),
    folds=(
        Fold("qkv", "input_layernorm", ("self_attn.q_a_proj", "self_attn.q_proj", "self_attn.kv_a_proj_with_mqa")),
        Fold("q.qkv", "self_attn.q_a_layernorm", ("self_attn.q_b_proj",), inner=True),
        Fold("kv.qkv", "self_attn.kv_a_layernorm", ("self_attn.kv_b_proj",), inner=True),
        *GATED_MLP_FOLDS,
        Fold(
            "experts.gate_up",
            "post_attention_layernorm",
            (
                "mlp.gate",
                "mlp.shared_experts.gate_proj",
                "mlp.shared_experts.up_proj",
                "mlp.experts.*.gate_proj",
                "mlp.experts.*.up_proj",
            ),
        ),
        Fold("shared.down", "mlp.shared_experts.up_proj", ("mlp.shared_experts.down_proj",)),
        Fold("experts.down", "mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",)),
    ),
    writers=("self_attn.o_proj", "mlp.down_proj", "mlp.shared_experts.down_proj", "mlp.experts.*.down_proj"),
    units=GATED_MLP_UNITS,
    scores=(
        "self_attn.q_proj",
        "self_attn.q_a_proj",
        "self_attn.q_b_proj",
        "self_attn.kv_a_proj_with_mqa",
        "self_attn.kv_b_proj",
    ),
    latent=("kv_lora_rank", "qk_rope_head_dim"),
    more_blocks="num_nextn_predict_layers",
    experts=Experts(
        prefix="mlp.experts",
        module="mlp.experts",
        gate="gate_proj",
        up="up_proj",
        down="down_proj",
        router="mlp.gate",
        counts=("n_routed_experts", "num_local_experts"),
        groups=("n_group", "topk_group"),
    ),
    unquantized=("mlp.gate",),
)
