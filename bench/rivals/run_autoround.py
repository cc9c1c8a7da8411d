"""Learned rounding by AutoRound, for comparison. Runs inside that tool's own virtual environment.

Methods: ``rtn`` is its rounding to nearest with a searched grid (no iterations); ``light``, ``default`` and ``best`` are its presets
of 50, 200 and 1000 iterations, the last with as many windows as there are instead of the preset's 512; ``best-ext`` adds the
extension it recommends at 2 bits and for 4-bit floats, which changes nothing on asymmetric grids. On the mixed grid its AutoScheme
chooses each linear's bits, or ``-attention`` and ``-down`` name the linears that get 3 bits in groups of 128 among others that get 2.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound, AutoScheme
from auto_round.schemes import QuantizationScheme
from protocol import Grid, measure, parse_arguments, read_windows
from transformers import AutoModelForCausalLM, AutoTokenizer

PRESETS = {
    "rtn": {"iters": 0},
    "light": {"iters": 50, "lr": 5e-3},
    "default": {"iters": 200},
    "best": {"iters": 1000},
    "best-ext": {"iters": 1000, "enable_alg_ext": True},
}
SCHEMES = {"nvfp4": "NVFP4", "mxfp4": "MXFP4", "int8": "INT8", "fp8": "FP8_DYNAMIC"}
CHOICE = [QuantizationScheme(bits=bits, group_size=group, act_bits=16) for bits, group in ((2, 128), (2, 64), (2, 32), (3, 128), (4, 128))]
"""What AutoScheme chooses from."""
HIGHER = {"attention": ("q_proj", "k_proj", "v_proj", "o_proj"), "down": ("down_proj",)}
PLAIN = {"device_map": "cpu", "enable_torch_compile": False}


def auto_scheme(model: Any, tokenizer: Any, grid: Grid, windows: list[list[int]]) -> dict[str, dict[str, Any]]:
    """Each linear's grid as AutoScheme chooses it; it takes its calibration data as text only."""
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder) / "texts.jsonl"
        texts.write_text("".join(json.dumps({"text": tokenizer.decode(ids)}) + "\n" for ids in windows))
        scheme = AutoScheme(avg_bits=grid.bits, options=CHOICE, low_gpu_mem_usage=False)
        chooser = AutoRound(model, tokenizer, scheme=scheme, dataset=str(texts), seqlen=len(windows[0]) // 2, iters=0, **PLAIN)
        chooser.post_init()
    return {name: {key: found[key] for key in ("bits", "group_size", "sym")} for name, found in chooser.layer_config.items()}


def what(grid: Grid) -> dict[str, Any]:
    """The tool's options for `grid`, where it is one and the same for all linears."""
    if grid.format in ("int", "mixed") and grid.activations is None:
        return {"scheme": f"W{int(grid.bits)}A16", "group_size": grid.group_size, "sym": grid.symmetric}
    scheme = {"scheme": SCHEMES[grid.activations or grid.format]}
    return scheme if grid.activations else scheme | {"act_bits": 16}


def main() -> None:
    arguments = parse_arguments(__doc__, "autoround")
    grid, method = arguments.grid, arguments.method
    preset, _, higher = (method, "", "") if method in PRESETS else method.rpartition("-")
    windows = read_windows(arguments.tokens)

    def opened() -> Any:
        return AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype)

    def work() -> None:
        model, tokenizer = opened(), AutoTokenizer.from_pretrained(arguments.model)
        mixed = {name: {"bits": 3, "group_size": 128} for name, _ in model.named_modules() if name.endswith(HIGHER.get(higher, ()))}
        if grid.format == "mixed" and not mixed:
            mixed = auto_scheme(opened(), tokenizer, grid, windows)
        AutoRound(
            model,
            tokenizer,
            dataset=[{"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)} for ids in windows],
            nsamples=len(windows),
            seqlen=len(windows[0]),
            batch_size=8,
            layer_config=mixed,
            **PLAIN,
            **what(grid),
            **PRESETS[preset],
        ).quantize_and_save(str(arguments.out), format="auto_round" if "group_size" in what(grid) else "llm_compressor")
        for file in [file for folder in arguments.out.iterdir() for file in folder.iterdir()]:  # it names a folder after the grid
            shutil.move(file, arguments.out)

    measure("autoround", work)


if __name__ == "__main__":
    main()
