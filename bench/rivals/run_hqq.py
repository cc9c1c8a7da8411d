"""HQQ, for comparison: ranges that minimise a sparse error, found without data. Runs inside that tool's own virtual environment.

Its zero points are real numbers, so its grids are the asymmetric ones.
"""

from hqq.core.quantize import BaseQuantizeConfig
from hqq.models.hf.base import AutoHQQHFModel
from protocol import measure, parse_arguments
from transformers import AutoModelForCausalLM


def main() -> None:
    arguments = parse_arguments(__doc__, "hqq")
    options = BaseQuantizeConfig(nbits=arguments.grid.bits, group_size=arguments.grid.group_size, axis=1)

    def work() -> None:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype)
        AutoHQQHFModel.quantize_model(model, quant_config=options, compute_dtype=model.dtype, device="cpu")
        AutoHQQHFModel.save_quantized(model, str(arguments.out))

    measure("hqq", work)


if __name__ == "__main__":
    main()
