"""Mixtral: on disk `block_sparse_moe` with experts w1 (gate), w3 (up) and w2 (down); transformers calls the module `mlp`."""

from compress.arch.base import ATTENTION, Arch, Experts

ARCH = Arch(
    model_type="mixtral",
    groups=ATTENTION,
    experts=Experts(prefix="block_sparse_moe.experts", module="mlp.experts", gate="w1", up="w3", down="w2"),
    rename=(("block_sparse_moe.", "mlp."),),
    unquantized=("block_sparse_moe.gate",),
)
