"""Perplexity of a checkpoint directory, by one and the same code for every tool.

Protocol: non-overlapping windows, no BOS, every token of a window but its first is predicted from those before it, float32
arithmetic, loss = mean negative log-likelihood in nats over all predicted tokens. Prints one JSON line per windows file.

The script is told nothing about who wrote the checkpoint. What is packed is decoded here to float32, code minus zero point times
scale, with the unpacking code of the library that defines the layout, and then runs as a plain dense model: so no checkpoint is
charged for a loader that rounds decoded weights to half precision, and the versions of the loaders do not matter.
"""

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from protocol import read_windows
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

AT_ONCE = 8
"""Windows in one forward."""


def decode_gptq(directory: Path) -> dict[str, torch.Tensor]:
    """The weights that GPTQModel packed in `directory`, by their dense names, unpacked by GPTQModel."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, os.cpu_count() or 2)))  # as in run_gptqmodel.py
    from gptqmodel import BACKEND, GPTQModel

    packed = GPTQModel.load(str(directory), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model.eval()
    weights = {}
    for name, module in packed.named_modules():
        if hasattr(module, "dequantize_weight"):
            module.scales = module.scales.float()  # or it decodes in half precision
            weights[f"{name}.weight"] = module.dequantize_weight().T.contiguous()
    return weights


def decode_pack_quantized(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights in `tensors` that are packed as compressed-tensors packs them, by their dense names."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    weights = {}
    for name, packed in tensors.items():
        linear, _, kind = name.rpartition(".")
        if kind != "weight_packed":
            continue
        rows, columns = shape = torch.Size(tensors[f"{linear}.weight_shape"].tolist())
        bits = packed.shape[1] * 32 // columns
        scale = tensors[f"{linear}.weight_scale"].float()
        codes = unpack_from_int32(packed, bits, shape).float().unflatten(1, (scale.shape[1], -1))
        if f"{linear}.weight_zero_point" in tensors:
            zero = tensors[f"{linear}.weight_zero_point"]
            codes -= unpack_from_int32(zero, bits, torch.Size((rows, scale.shape[1])), packed_dim=0).float()[..., None]
        weights[f"{linear}.weight"] = (codes * scale[..., None]).flatten(1)
    return weights


def load(directory: Path) -> Any:
    """The model in `directory`, in float32, as something callable on ``input_ids`` that returns ``.logits``."""
    config = AutoConfig.from_pretrained(directory)
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tensors = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
    weights = decode_gptq(directory) if quantization["quant_method"] == "gptq" else decode_pack_quantized(tensors)
    dense = {name: tensor.float() for name, tensor in tensors.items() if name.rpartition(".")[2] in ("weight", "bias")}
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(dense | weights, strict=False)
    if unexpected or set(missing) - set(model.all_tied_weights_keys):
        raise SystemExit(f"{directory}: missing {missing}, unexpected {unexpected}")
    return model.eval()


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
    model = load(arguments.model)
    for path in arguments.windows:
        print(json.dumps({"file": path.name, **evaluate(model, read_windows(path))}), flush=True)


if __name__ == "__main__":
    main()
