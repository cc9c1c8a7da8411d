"""GPTQModel, for comparison. Runs inside that tool's own virtual environment.

Methods: ``gptq`` is its GPTQ when told nothing (group-aware reordering, min-max grid); ``gptq-mse`` adds its searched grid (exponent
2.4, as in the GPTQ paper's code); ``gptaq`` adds its correction for the error of earlier blocks; ``act-order`` is the order that
permutes across groups; ``awq`` is its AWQ. On the mixed grid, its `dynamic` option gives 3 bits to what `HIGHER` names.
"""

import os

from protocol import Grid, measure, parse_arguments, read_windows

HIGHER = r"+:.*\.(v_proj|k_proj|o_proj|q_proj)$"


def main() -> None:
    arguments = parse_arguments(__doc__, "gptqmodel")
    windows = read_windows(arguments.tokens)
    # Its worker pools need two workers even where it counts fewer, and they are sized at import.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, os.cpu_count() or 2)))
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.quantization import FORMAT, METHOD
    from gptqmodel.quantization.config import GPTAQConfig

    methods = {
        "gptq": {},
        "gptq-mse": {"mse": 2.4},
        "gptaq": {"gptaq": GPTAQConfig()},
        "act-order": {"desc_act": True, "act_group_aware": False},
        "awq": {"quant_method": METHOD.AWQ, "format": FORMAT.GEMM},
    }

    def what(grid: Grid) -> dict[str, object]:
        """The tool's options for `grid`."""
        # The older layout stores each zero point minus one, and so cannot hold the zero point 0 of an asymmetric grid.
        layout = {"sym": grid.symmetric, "format": FORMAT.GPTQ if grid.symmetric else FORMAT.GPTQ_V2}
        if grid.format == "mixed":
            return layout | {"bits": 2, "group_size": 128, "dynamic": {HIGHER: {"bits": 3}}}
        return layout | {"bits": grid.bits, "group_size": grid.group_size}

    config = QuantizeConfig(**(what(arguments.grid) | methods[arguments.method]))

    def work() -> None:
        model = GPTQModel.load(str(arguments.model), config, device="cpu", dtype=arguments.dtype)
        model.quantize(
            [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in windows],
            batch_size=1,
            backend=BACKEND.AWQ_TORCH if arguments.method == "awq" else BACKEND.AUTO,  # what it takes for AWQ by itself needs CUDA
        )
        model.save(str(arguments.out))

    measure("gptqmodel", work)


if __name__ == "__main__":
    main()
