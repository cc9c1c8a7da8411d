"""Learned rounding by AutoRound, for comparison. Runs inside that tool's own virtual environment.

Methods: ``rtn`` is its rounding to nearest with a searched grid (no iterations); ``light``, ``default`` and ``best`` are its presets
of 50, 200 and 1000 iterations, the last with as many windows as there are instead of the preset's 512; ``best-ext`` adds the
extension it recommends at 2 bits and for 4-bit floats, which changes nothing on asymmetric grids. On the mixed grid its AutoScheme
chooses each linear's bits.
"""

import json
import shutil
from pathlib import Path

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
INTEGERS = [QuantizationScheme(bits=bits, group_size=group, act_bits=16) for bits, group in ((2, 128), (2, 64), (2, 32), (3, 128), (4, 128))]
"""What AutoScheme chooses from."""


def what(grid: Grid, texts: Path) -> dict[str, object]:
    """The tool's options for `grid`."""
    if grid.format == "mixed":
        return {"scheme": AutoScheme(avg_bits=grid.bits, options=INTEGERS, dataset=str(texts), low_gpu_mem_usage=False)}
    if grid.format == "int" and grid.activations is None:
        return {"scheme": f"W{grid.bits}A16", "group_size": grid.group_size, "sym": grid.symmetric}
    scheme = {"scheme": SCHEMES[grid.activations or grid.format]}
    return scheme if grid.activations else scheme | {"act_bits": 16}


def main() -> None:
    arguments = parse_arguments(__doc__, "autoround")
    grid = arguments.grid
    windows = read_windows(arguments.tokens)
    arguments.out.mkdir(parents=True)
    texts = arguments.out / "texts.jsonl"  # AutoScheme takes its calibration data as text only

    def work() -> None:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        texts.write_text("".join(json.dumps({"text": tokenizer.decode(ids)}) + "\n" for ids in windows))
        AutoRound(
            model,
            tokenizer,
            dataset=[{"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)} for ids in windows],
            nsamples=len(windows),
            seqlen=len(windows[0]),
            batch_size=8,
            device_map="cpu",
            enable_torch_compile=False,
            **what(grid, texts),
            **PRESETS[arguments.method],
        ).quantize_and_save(str(arguments.out), format="auto_round" if grid.format in ("int", "mixed") and not grid.activations else "llm_compressor")
        texts.unlink()
        for file in [file for folder in arguments.out.iterdir() for file in folder.iterdir()]:  # it names a folder after the grid
            shutil.move(file, arguments.out)

    measure("auto-round", work)


if __name__ == "__main__":
    main()
