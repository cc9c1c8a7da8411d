"""Perplexity of a checkpoint directory, by one and the same code for every tool.

Protocol: non-overlapping windows, no BOS, every token of a window but its first is predicted from those before it, float32
arithmetic, loss = mean negative log-likelihood in nats over all predicted tokens. Prints one JSON line per windows file, and one
with the bits that each weight of the blocks' linears takes on disk, with all that is stored beside the codes.

The script is told nothing about who wrote the checkpoint. What is packed is decoded to float32 by the library that defines the
layout, its scales turned to float32 first, so that no checkpoint is charged for a loader that rounds decoded weights to half
precision. Where inputs of linears are quantised at run time, that library does so in its own forward, on float32 as well.
"""

import argparse
import functools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from protocol import read_windows
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

AT_ONCE = 8
"""Windows in one forward."""
HQQ_FILE, TORCHAO_FILE = "qmodel.pt", "torchao.pt"

Tensors = dict[str, torch.Tensor]


def read_safetensors(directory: Path) -> Tensors:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def load_dense(directory: Path) -> tuple[Any, Tensors]:
    """A checkpoint that no tool has touched."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), read_safetensors(directory)


def load_compressed_tensors(directory: Path) -> tuple[Any, Tensors]:
    """Decoded by compressed-tensors in the first forward; its forward rounds inputs too, where the checkpoint says so."""
    from compressed_tensors.compressors.nvfp4 import base

    base.unpack_fp4_from_uint8 = functools.partial(base.unpack_fp4_from_uint8, dtype=torch.float32)  # or it decodes in bfloat16
    return load_dense(directory)


def with_weights(directory: Path, weights: Tensors) -> tuple[Any, Tensors]:
    """The model with these weights of its linears, and what else it has from the checkpoint."""
    config, stored = AutoConfig.from_pretrained(directory), read_safetensors(directory)
    del config.quantization_config
    dense = {name: tensor.float() for name, tensor in stored.items() if name.rpartition(".")[2] in ("weight", "bias")}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(dense | weights, strict=False)
    if unexpected or set(missing) - set(model.all_tied_weights_keys):
        raise SystemExit(f"{directory}: missing {missing}, unexpected {unexpected}")
    return model, stored


def load_gptq(directory: Path) -> tuple[Any, Tensors]:
    """Unpacked by GPTQModel."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, os.cpu_count() or 2)))  # as in run_gptqmodel.py
    from gptqmodel import BACKEND, GPTQModel

    packed = GPTQModel.load(str(directory), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model.eval()
    weights = {}
    for name, module in packed.named_modules():
        if hasattr(module, "dequantize_weight"):
            module.scales = module.scales.float()  # or it decodes in half precision
            weights[f"{name}.weight"] = module.dequantize_weight().T.contiguous()
    return with_weights(directory, weights)


@torch.inference_mode()
def load_autoround(directory: Path) -> tuple[Any, Tensors]:
    """Unpacked by AutoRound, whose linears have no function for that: they are given the unit vectors one by one."""
    packed = AutoModelForCausalLM.from_pretrained(directory)
    weights = {}
    for name, module in packed.named_modules():
        if hasattr(module, "qweight"):
            module.scales = module.scales.float()  # or it decodes in half precision
            weights[f"{name}.weight"] = module(torch.eye(module.infeatures)).T.contiguous()
    return with_weights(directory, weights)


def load_hqq(directory: Path) -> tuple[Any, Tensors]:
    """Decoded by HQQ in every forward."""
    from hqq.models.hf.base import AutoHQQHFModel

    model = AutoHQQHFModel.from_quantized(str(directory), compute_dtype=torch.float32, device="cpu")
    modules = torch.load(directory / HQQ_FILE, map_location="cpu").items()
    return model, {f"{name}.{key}": value for name, kept in modules for key, value in kept.items() if isinstance(value, torch.Tensor)}


def parts(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The plain tensors that torchao's `tensor` is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        for key in tensor.__tensor_flatten__()[0]:
            yield from parts(f"{name}.{key}", getattr(tensor, key))
    else:
        yield name, tensor


def load_torchao(directory: Path) -> tuple[Any, Tensors]:
    """Decoded by torchao in every forward, which rounds inputs too, where its tensors say so."""
    import torchao  # noqa: F401, its tensors are what the file holds

    state = torch.load(directory / TORCHAO_FILE, weights_only=False)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.float32)
    model.load_state_dict(state, assign=True)
    return model, {key: part for name, tensor in state.items() for key, part in parts(name, tensor)}


LOADERS = {
    None: load_dense,
    "compressed-tensors": load_compressed_tensors,
    "gptq": load_gptq,
    "auto-round": load_autoround,
    HQQ_FILE: load_hqq,
    TORCHAO_FILE: load_torchao,
}


def load(directory: Path) -> tuple[Any, Tensors]:
    """The model in `directory`, in float32, as something callable on ``input_ids`` that returns ``.logits``; and all it stores."""
    layout = next((name for name in (HQQ_FILE, TORCHAO_FILE) if (directory / name).exists()), None)
    if layout is None:
        layout = (getattr(AutoConfig.from_pretrained(directory), "quantization_config", None) or {}).get("quant_method")
    model, stored = LOADERS[layout](directory)
    return model.eval(), stored


def stored_bits(model: Any, stored: Tensors) -> float:
    """Bits on disk per weight of the linears (but the head), everything counted whose name begins with that of a linear."""
    head = model.get_output_embeddings()
    shapes = [(name, module) for name, module in model.named_modules() if hasattr(module, "in_features") and module is not head]
    linears = {name: module.in_features * module.out_features for name, module in shapes}
    size = sum(tensor.nbytes for name, tensor in stored.items() if any(name.startswith(f"{linear}.") for linear in linears))
    return 8 * size / sum(linears.values())


@torch.inference_mode()
def evaluate(model: Any, windows: list[list[int]]) -> dict[str, float | int]:
    """Mean loss of `model` over `windows`, summed in float64 so that the order of the windows does not matter."""
    total = 0.0
    for start in range(0, len(windows), AT_ONCE):
        ids = torch.tensor(windows[start : start + AT_ONCE])
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        total += losses.double().sum().item()
    tokens = len(windows) * (len(windows[0]) - 1)
    loss = total / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "windows": len(windows),
        "tokens": tokens,
        "context": len(windows[0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--windows", type=Path, nargs="+", required=True, help='JSONL files of {"input_ids": [...]}')
    arguments = parser.parse_args()
    model, stored = load(arguments.model)
    print(json.dumps({"stored_bits_per_weight": stored_bits(model, stored)}), flush=True)
    for path in arguments.windows:
        print(json.dumps({"file": path.name, **evaluate(model, read_windows(path))}), flush=True)


if __name__ == "__main__":
    main()
