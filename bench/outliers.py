"""Give a checkpoint outlier channels without changing what it computes, for measuring what quantised inputs cost then.

    python bench/outliers.py MODEL OUT

Large models grow a few channels behind every norm that are tens of times as large as the others (arXiv 2208.07339, section 4);
small ones do not. Here the weight of every norm before linears is multiplied in three channels, and the columns of the linears
that read it are divided, by a power of two, which every floating-point format holds exactly.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

FACTOR = 32
CHANNELS = 3
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""The linears that read each norm of a block of the Llama kind."""


def plant(model: Path, out: Path) -> dict[str, Any]:
    """Write a copy of the checkpoint in `model` with outliers to `out`; returns what was planted. Other families are refused."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, out)
    planted = 0
    for file in sorted(out.glob("*.safetensors")):
        tensors = load_file(file)
        for name in [name for name in tensors if name.split(".")[-2] in READERS and name.endswith(".weight")]:
            block, norm, _ = name.rsplit(".", 2)
            width = tensors[name].numel()
            channels = [width * (index + 1) // (CHANNELS + 1) for index in range(CHANNELS)]
            tensors[name][channels] *= FACTOR
            for linear in READERS[norm]:
                tensors[f"{block}.{linear}.weight"][:, channels] /= FACTOR  # KeyError: another family, or split between files
            planted += 1
        save_file(tensors, file, metadata={"format": "pt"})
    if not planted:
        raise SystemExit(f"{model}: no norm named {' or '.join(READERS)}")
    return {"factor": FACTOR, "channels": CHANNELS, "norms": planted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    print(plant(arguments.model, arguments.out))


if __name__ == "__main__":
    main()
