"""Write a random-weight Llama or Qwen3-MoE checkpoint of a real model's shape, one block at a time, for measuring time and memory.

    python bench/make_random_llama.py --preset 3b --tokenizer DIR --out DIR

Speed and memory do not depend on what the weights say, so nothing has to be downloaded. The file is streamed: one block is in
memory at a time, and each is a shard of its own.
"""

import argparse
import dataclasses
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

SPREAD = 0.02
"""Standard deviation of every weight: what Llama is initialised with."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Shape:
    """The sizes that make a Llama or, with so many ``experts`` of the width `ffn` of which ``active`` serve a token, a Qwen3-MoE."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool
    experts: int = 0
    active: int = 0


PRESETS = {
    "0.9b": Shape(hidden=2048, layers=16, heads=32, kv_heads=32, head_dim=64, ffn=5632, vocab=32000, tied=True),
    "3b": Shape(hidden=3072, layers=28, heads=24, kv_heads=8, head_dim=128, ffn=8192, vocab=32000, tied=False),
    "moe": Shape(hidden=2048, layers=48, heads=32, kv_heads=4, head_dim=128, ffn=768, vocab=32000, tied=True, experts=128, active=8),
}
"""0.9b: attention without grouping. moe: the shape of Qwen3-30B-A3B, whose experts of one block are 6.0e8 parameters.
3b: the shape of Llama 3.2 3B, untied so that 32,000 tokens still make 3.0e9 parameters."""


def block(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The tensors of one decoder block, bf16, by their names inside the block."""
    attention, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    linears = {
        "self_attn.q_proj": (attention, shape.hidden),
        "self_attn.k_proj": (kv, shape.hidden),
        "self_attn.v_proj": (kv, shape.hidden),
        "self_attn.o_proj": (shape.hidden, attention),
    }
    for place in [f"mlp.experts.{expert}" for expert in range(shape.experts)] or ["mlp"]:
        linears |= {f"{place}.gate_proj": (shape.ffn, shape.hidden), f"{place}.up_proj": (shape.ffn, shape.hidden)}
        linears[f"{place}.down_proj"] = shape.hidden, shape.ffn
    norms = {"input_layernorm": shape.hidden, "post_attention_layernorm": shape.hidden}
    if shape.experts:
        linears["mlp.gate"] = shape.experts, shape.hidden
        norms |= {"self_attn.q_norm": shape.head_dim, "self_attn.k_norm": shape.head_dim}
    return {f"{name}.weight": random_weight(size, generator) for name, size in linears.items()} | {
        f"{name}.weight": torch.ones(size, dtype=torch.bfloat16) for name, size in norms.items()
    }


def random_weight(size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return torch.empty(size, dtype=torch.bfloat16).normal_(0.0, SPREAD, generator=generator)


def shards(shape: Shape, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """The checkpoint's tensors, one shard at a time: the blocks, then what stands outside them."""
    generator = torch.Generator().manual_seed(seed)
    for layer in range(shape.layers):
        yield {f"model.layers.{layer}.{name}": tensor for name, tensor in block(shape, generator).items()}
    outer = {"model.embed_tokens.weight": random_weight((shape.vocab, shape.hidden), generator)}
    outer["model.norm.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
    if not shape.tied:
        outer["lm_head.weight"] = random_weight((shape.vocab, shape.hidden), generator)
    yield outer


def config(shape: Shape) -> dict[str, object]:
    """The config.json of the checkpoint."""
    routed = {
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.active,
        "moe_intermediate_size": shape.ffn,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    return {
        "architectures": ["Qwen3MoeForCausalLM" if shape.experts else "LlamaForCausalLM"],
        "model_type": "qwen3_moe" if shape.experts else "llama",
        "dtype": "bfloat16",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "hidden_act": "silu",
        "initializer_range": SPREAD,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "bos_token_id": 0,
        "eos_token_id": 0,
        "attention_bias": False,
        **(routed if shape.experts else {"mlp_bias": False}),
    }


def make(shape: Shape, tokenizer: Path, out: Path, seed: int = 0) -> int:
    """Write the checkpoint to `out` and return the bytes of its tensors."""
    out.mkdir(parents=True, exist_ok=False)
    where: dict[str, str] = {}
    size = 0
    for number, tensors in enumerate(shards(shape, seed), start=1):
        file = f"model-{number:05d}-of-{shape.layers + 1:05d}.safetensors"
        save_file(tensors, out / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (out / "config.json").write_text(json.dumps(config(shape), indent=1))
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copyfile(tokenizer / name, out / name)
    return size


def add_shape_arguments(parser: argparse.ArgumentParser, preset: str | None) -> None:
    """Let a command line choose a preset and override any of its sizes."""
    parser.add_argument("--preset", choices=list(PRESETS), default=preset)
    for field in dataclasses.fields(Shape):
        if field.name != "tied":
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, help="instead of the preset's")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory whose tokenizer files are copied")


def shape_from(arguments: argparse.Namespace) -> Shape:
    """The shape that a command line of `add_shape_arguments` asks for."""
    asked = {field.name: getattr(arguments, field.name, None) for field in dataclasses.fields(Shape)}
    return dataclasses.replace(PRESETS[arguments.preset], **{key: value for key, value in asked.items() if value is not None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_arguments(parser, preset="0.9b")
    parser.add_argument("--out", type=Path, required=True, help="a directory that does not exist yet")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    size = make(shape_from(arguments), arguments.tokenizer, arguments.out, arguments.seed)
    print(f"{arguments.out}: {size / 2 / 1e9:.3f}e9 parameters, {size / 1e9:.3f} GB")


if __name__ == "__main__":
    main()
