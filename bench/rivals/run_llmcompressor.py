"""LLM Compressor, for comparison. Runs inside that tool's own virtual environment.

Methods: ``gptq`` is its GPTQ when told nothing (static activation order, min-max grid); ``-mse`` and ``-imatrix`` replace the
min-max grid by the tool's searched grids. ``awq`` is AWQ's scaling before rounding to nearest on the grid with the least squared
error, ``smoothquant`` its SmoothQuant of strength 0.8 (as in its examples) before rounding to nearest, or before GPTQ.
"""

import torch
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from protocol import Grid, measure, parse_arguments, read_windows
from transformers import AutoModelForCausalLM, AutoTokenizer

OBSERVERS = {"mse": "memoryless_mse", "imatrix": "imatrix_mse"}
PRESETS = {"fp8": "FP8_DYNAMIC", "nvfp4": "NVFP4", "mxfp4": "MXFP4"}


def scheme(grid: Grid, observer: str | None) -> QuantizationScheme:
    """The tool's own scheme for `grid`, its weights observed by `observer` (None: as it is when told nothing)."""
    if grid.format == "int":
        name = "W8A8" if grid.activations else f"W{grid.bits}A16"
        options = {"symmetric": grid.symmetric} | ({"group_size": grid.group_size} if grid.group_size else {})
    else:
        name = PRESETS[grid.format] + ("" if grid.activations else "A16")
        options = {}
    found = preset_name_to_scheme(name, ["Linear"])
    found.weights = found.weights.model_validate(found.weights.model_dump() | options | ({"observer": observer} if observer else {}))
    return found


def modifiers(method: str, grid: Grid) -> list[object]:
    """The tool's recipe for `method`."""
    first, _, second = method.partition("-")
    chosen = {"config_groups": {"linears": scheme(grid, OBSERVERS.get("mse" if first == "awq" else second))}, "ignore": ["lm_head"]}
    rounding = GPTQModifier(**chosen) if "gptq" in method else QuantizationModifier(**chosen)
    before = {"awq": [AWQModifier()], "smoothquant": [SmoothQuantModifier(smoothing_strength=0.8)]}
    return [*before.get(first, []), rounding]


def main() -> None:
    arguments = parse_arguments(__doc__, "llmcompressor")
    windows = read_windows(arguments.tokens)
    if not torch.accelerator.is_available():
        torch.Tensor.pin_memory = lambda tensor, *_: tensor  # its AWQ pins what it keeps, which without an accelerator is an error

    def work() -> None:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        oneshot(
            model=model,
            tokenizer=tokenizer,
            dataset=Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in windows]),
            recipe=modifiers(arguments.method, arguments.grid),
            max_seq_length=len(windows[0]),
            num_calibration_samples=len(windows),
            pipeline="sequential",
            # Each expert learns from the tokens routed to it, as with the others; from all tokens, which is the default, it takes many times longer.
            moe_calibrate_all_experts=False,
        )
        model.save_pretrained(arguments.out, save_compressed=True)
        tokenizer.save_pretrained(arguments.out)

    measure("llmcompressor", work)


if __name__ == "__main__":
    main()
