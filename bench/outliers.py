"""Give a checkpoint outlier channels without changing what it computes, for measuring what quantised inputs cost then.

    python bench/outliers.py MODEL OUT

Large models grow a few channels behind every norm that are tens of times as large as the others (arXiv 2208.07339, section 4);
small ones do not. Here the weight of every norm before linears is multiplied in three channels, and the columns of the linears
that read it are divided, by a power of two, which every floating-point format holds exactly.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

FACTOR = 32
CHANNELS = 3
FAMILIES = {"llama": "model.", "mistral": "model.", "qwen2": "model.", "llava": "language_model."}
"""Model types whose blocks have the names below, and nothing else that reads the norms; where names of the language model begin."""
NORMS = ("input_layernorm", "post_attention_layernorm")
READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def plant(model: Path, out: Path) -> dict[str, Any]:
    """Write a copy of the checkpoint in `model` with outliers to `out`, and return what was planted; other families are refused."""
    from safetensors.torch import load_file, save_file  # here, so that quality.py's --help answers at once

    family = json.loads((model / "config.json").read_text())["model_type"]
    if family not in FAMILIES:
        raise SystemExit(f"{model} is a {family}; outliers are planted in {', '.join(FAMILIES)} only")
    shutil.copytree(model, out)
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            owner = name.removesuffix(".weight").rpartition(".")[2]
            if name.startswith(FAMILIES[family]) and name.endswith(".weight") and owner in NORMS + READERS:
                width = tensor.shape[-1]
                channels = [width * (index + 1) // (CHANNELS + 1) for index in range(CHANNELS)]
                tensor[..., channels] *= FACTOR if owner in NORMS else 1 / FACTOR
        save_file(tensors, file, metadata={"format": "pt"})
    return {"factor": FACTOR, "channels": CHANNELS, "norms": list(NORMS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    print(json.dumps(plant(arguments.model, arguments.out)))


if __name__ == "__main__":
    main()
