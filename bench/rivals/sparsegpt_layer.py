"""SparseGPT of llm-compressor beside ours: one linear, the same inputs, the error of its outputs on them.

python bench/rivals/sparsegpt_layer.py prepare layer.safetensors          # our environment
python bench/rivals/sparsegpt_layer.py theirs layer.safetensors theirs.safetensors   # llm-compressor's
python bench/rivals/sparsegpt_layer.py compare layer.safetensors theirs.safetensors  # ours
"""

from __future__ import annotations

import argparse

import torch
from safetensors.torch import load_file, save_file

LINEARS = ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj")
PATTERNS = ((2, 4), (4, 8), (1, 4))
DAMP, BLOCK = 0.01, 128


def prepare(layer: str) -> None:
    """Weights and inputs of linears of `demo:dense` on 8,192 tokens of the demonstration text."""
    from transformers import AutoModelForCausalLM

    from compress import data, demo

    model = AutoModelForCausalLM.from_pretrained(demo.path("dense"), dtype=torch.float32)
    found: dict[str, torch.Tensor] = {}
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in LINEARS}
    for name in LINEARS:
        found[f"{name}.weight"] = model.get_submodule(name).weight.data
        model.get_submodule(name).register_forward_pre_hook(lambda _, given, name=name: inputs[name].append(given[0].flatten(0, -2)))
    samples = data.calibration("demo:text", 16, 512, 0, data.Tokenizer(demo.path("dense")))
    with torch.no_grad():
        for batch in samples.batches():
            model(**batch.inputs)
    save_file(found | {f"{name}.inputs": torch.cat(parts) for name, parts in inputs.items()}, layer)


def theirs(layer: str, out: str) -> None:
    from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import accumulate_hessian, make_empty_hessian, sparsify_weight

    stored, result = load_file(layer), {}
    for name in LINEARS:
        for n, m in PATTERNS:
            module = torch.nn.Linear(*stored[f"{name}.weight"].shape[::-1], bias=False)
            module.weight.data = stored[f"{name}.weight"].clone()
            hessian, _ = accumulate_hessian(stored[f"{name}.inputs"], module, make_empty_hessian(module), 0)
            # It counts what is removed.
            _, weight = sparsify_weight(module, {module: hessian}, 0.5, m - n, m, BLOCK, DAMP, False)
            result[f"{name}.{n}:{m}"] = weight.detach()
    save_file(result, out)


def compare(layer: str, out: str) -> None:
    from compress.numerics.feedback import factorize
    from compress.numerics.pattern import Pattern
    from compress.numerics.sparsegpt import prune_with_feedback

    stored, result = load_file(layer), load_file(out)
    for name in LINEARS:
        weight, inputs = stored[f"{name}.weight"], stored[f"{name}.inputs"]
        hessian = (inputs.T @ inputs / len(inputs))[None]
        dead, factor = hessian.diagonal(dim1=1, dim2=2) == 0, factorize(hessian, DAMP, False)
        for n, m in PATTERNS:
            ours = prune_with_feedback(weight[None], factor, dead, Pattern(n, m))[0][0]
            exact = inputs.double() @ weight.double().T
            lost = [float((inputs.double() @ each.double().T - exact).norm() / exact.norm()) for each in (ours, result[f"{name}.{n}:{m}"])]
            same = float(((ours != 0) == (result[f"{name}.{n}:{m}"] != 0)).float().mean())
            print(f"{name} {n}:{m}: ours {lost[0]:.6f}, llm-compressor {lost[1]:.6f}, {100 * same:.3f} % of the mask equal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["prepare", "theirs", "compare"])
    parser.add_argument("layer")
    parser.add_argument("out", nargs="?")
    arguments = parser.parse_args()
    {"prepare": prepare, "theirs": theirs, "compare": compare}[arguments.step](*filter(None, (arguments.layer, arguments.out)))


if __name__ == "__main__":
    main()
