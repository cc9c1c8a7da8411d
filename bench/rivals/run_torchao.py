"""Rounding to nearest by torchao, for comparison. Runs inside that tool's own virtual environment.

Methods: ``rtn`` is what the tool does when told nothing; ``hqq`` chooses the scales as HQQ does. Codes below 8 bits are kept in
a byte each, the only layout it has for every CPU.
"""

import torch
from protocol import Grid, measure, parse_arguments
from torchao.core.config import AOBaseConfig
from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Int8DynamicActivationInt8WeightConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerGroup,
    PerRow,
    quantize_,
)
from transformers import AutoModelForCausalLM


def config(grid: Grid, method: str) -> AOBaseConfig:
    """The tool's configuration for `grid`."""
    if grid.format == "nvfp4":
        return NVFP4WeightOnlyConfig()
    if grid.format == "fp8":
        return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    if grid.activations:
        return Int8DynamicActivationInt8WeightConfig()
    return IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{grid.bits}"),
        granularity=PerGroup(grid.group_size),
        mapping_type=MappingType.SYMMETRIC if grid.symmetric else MappingType.ASYMMETRIC,
        intx_choose_qparams_algorithm="hqq_scale_only" if method == "hqq" else "affine",
    )


def main() -> None:
    arguments = parse_arguments(__doc__, "torchao")

    def work() -> None:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype)
        quantize_(model, config(arguments.grid, arguments.method), lambda module, name: isinstance(module, torch.nn.Linear) and name != "lm_head")
        model.config.save_pretrained(arguments.out)
        torch.save(model.state_dict(), arguments.out / "torchao.pt")

    measure("torchao", work)


if __name__ == "__main__":
    main()
