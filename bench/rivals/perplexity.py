"""Perplexity of a checkpoint directory, by one and the same code for every tool.

Protocol: non-overlapping windows, no BOS, every token of a window but its first is predicted from those before it, float32
arithmetic, loss = mean negative log-likelihood in nats over all predicted tokens. Prints one JSON line per windows file.

The script is told nothing about who wrote the checkpoint: it is read by transformers where its format allows that, and by
GPTQModel where its config says ``quant_method: gptq``.
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


def load_gptq(directory: Path, config: Any) -> Any:
    """The model in `directory`, whose linears GPTQModel packed, as a dense float32 model.

    GPTQModel decodes in half precision only, which would charge the checkpoint for the reader's rounding. So it is asked for
    the decoded weights alone, with the scales widened first; everything else comes from the file as stored.
    """
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, os.cpu_count() or 2)))  # as in run_gptqmodel.py
    from gptqmodel import BACKEND, GPTQModel

    packed = GPTQModel.load(str(directory), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model.eval()
    state = {}
    for name, module in packed.named_modules():
        if hasattr(module, "dequantize_weight"):
            module.scales = module.scales.float()
            state[f"{name}.weight"] = module.dequantize_weight().T.contiguous()
    for file in directory.glob("*.safetensors"):
        state |= {name: tensor for name, tensor in load_file(file).items() if tensor.dtype.is_floating_point}
    state = {name: tensor.float() for name, tensor in state.items() if not name.endswith(".scales")}
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - set(model.all_tied_weights_keys):
        raise SystemExit(f"{directory}: missing {missing}, unexpected {unexpected}")
    return model.eval()


def load(directory: Path) -> Any:
    """The model in `directory`, in float32, as something callable on ``input_ids`` that returns ``.logits``."""
    config = AutoConfig.from_pretrained(directory)
    if getattr(config, "quantization_config", {}).get("quant_method") == "gptq":
        return load_gptq(directory, config)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@torch.inference_mode()
def evaluate(model: Any, windows: list[list[int]]) -> dict[str, float | int]:
    """Mean loss of `model` over `windows`, summed in float64 so that the order of the windows does not matter."""
    total = 0.0
    for window in windows:
        ids = torch.tensor([window])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").double().sum().item()
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
