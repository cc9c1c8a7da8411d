"""GPTQ by llm-compressor, for comparison. Runs inside that tool's own virtual environment.

Variants: ``default`` is what the tool does when told nothing (static activation order, min-max grid); ``mse`` and
``imatrix`` replace the min-max grid by the tool's searched grids. It no longer has the order that permutes across groups.
"""

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from protocol import measure, parse_arguments, read_windows
from transformers import AutoModelForCausalLM, AutoTokenizer

OBSERVERS = {"mse": "memoryless_mse", "imatrix": "imatrix_mse"}


def main() -> None:
    arguments = parse_arguments(__doc__, "llmcompressor")
    windows = read_windows(arguments.tokens)
    weights = QuantizationArgs(
        num_bits=arguments.bits,
        type="int",
        strategy="group",
        group_size=arguments.group_size,
        symmetric=arguments.symmetric,
        observer=OBSERVERS.get(arguments.variant),
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    modifier = GPTQModifier(config_groups={"linears": scheme}, ignore=["lm_head"])

    def work() -> None:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        oneshot(
            model=model,
            tokenizer=tokenizer,
            dataset=Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in windows]),
            recipe=[modifier],
            max_seq_length=len(windows[0]),
            num_calibration_samples=len(windows),
            pipeline="sequential",
        )
        model.save_pretrained(arguments.out, save_compressed=True)
        tokenizer.save_pretrained(arguments.out)

    measure("llmcompressor", work)


if __name__ == "__main__":
    main()
