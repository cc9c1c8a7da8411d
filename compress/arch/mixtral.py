"""Mixtral: on disk `block_sparse_moe` with experts w1 (gate), w3 (up) and w2 (down); transformers calls the module `mlp`."""

from compress.arch.base import ATTENTION, ATTENTION_FOLDS, ATTENTION_UNITS, Arch, Experts, Fold, Unit

ARCH = Arch(
    model_type="mixtral",
    groups=ATTENTION,
    folds=(
        *ATTENTION_FOLDS,
        Fold(
            "experts.gate_up",
            "post_attention_layernorm",
            ("block_sparse_moe.gate", "block_sparse_moe.experts.*.w1", "block_sparse_moe.experts.*.w3"),
        ),
        Fold("experts.down", "block_sparse_moe.experts.*.w3", ("block_sparse_moe.experts.*.w2",)),
    ),
    writers=("self_attn.o_proj", "block_sparse_moe.experts.*.w2"),
    units=(
        *ATTENTION_UNITS,
        Unit(
            "expert_channel",
            ("block_sparse_moe.experts.*.w1", "block_sparse_moe.experts.*.w3"),
            "block_sparse_moe.experts.*.w2",
            "intermediate_size",
        ),
    ),
    experts=Experts(
        prefix="block_sparse_moe.experts",
        module="mlp.experts",
        gate="w1",
        up="w3",
        down="w2",
        router="block_sparse_moe.gate",
        counts=("num_local_experts",),
        renormalise=True,
    ),
    rename=(("block_sparse_moe.", "mlp."),),
    unquantized=("block_sparse_moe.gate",),
)
