"""Qwen3-MoE: routed experts, alternating with dense MLPs where the config says so."""

from compress.arch.base import ATTENTION, GATED_MLP, Arch, Experts

ARCH = Arch(
    model_type="qwen3_moe",
    groups=ATTENTION + GATED_MLP,
    experts=Experts(prefix="mlp.experts", module="mlp.experts", gate="gate_proj", up="up_proj", down="down_proj"),
    unquantized=("mlp.gate",),
)
