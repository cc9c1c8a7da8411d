"""GPTQ by GPTQModel, for comparison. Runs inside that tool's own virtual environment.

Variants: ``default`` is what the tool does when told nothing (group-aware reordering, min-max grid); ``mse`` adds its
searched grid (exponent 2.4, as in the GPTQ paper's code); ``gptaq`` adds its correction for the error of earlier blocks;
``act-order`` is the order that permutes across groups.
"""

import os

from protocol import measure, parse_arguments, read_windows


def main() -> None:
    arguments = parse_arguments(__doc__, "gptqmodel")
    windows = read_windows(arguments.tokens)
    # Its worker pools need two workers even where it counts fewer, and they are sized at import.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, os.cpu_count() or 2)))
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization import FORMAT
    from gptqmodel.quantization.config import GPTAQConfig

    options = {
        "default": {},
        "mse": {"mse": 2.4},
        "gptaq": {"gptaq": GPTAQConfig()},
        "act-order": {"desc_act": True, "act_group_aware": False},
    }
    config = QuantizeConfig(
        bits=arguments.bits,
        group_size=arguments.group_size,
        sym=arguments.symmetric,
        # The older layout stores each zero point minus one, and so cannot hold the zero point 0 of an asymmetric grid.
        format=FORMAT.GPTQ if arguments.symmetric else FORMAT.GPTQ_V2,
        **options[arguments.variant],
    )

    def work() -> None:
        model = GPTQModel.load(str(arguments.model), config, device="cpu", dtype=arguments.dtype)
        model.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in windows], batch_size=1)
        model.save(str(arguments.out))

    measure("gptqmodel", work)


if __name__ == "__main__":
    main()
