"""Whether llama.cpp makes of a GGUF file the tokens that its weights mean: what remains is how it rounds inputs, and by how much.

    python scripts/gguf_tokens.py ARTIFACT --python $COMPRESS_RIVALS/llamacpp/bin/python   # a folder of compressed-tensors; prints JSON

The reference is plain transformers in float32 with the weights that the artifact's codes mean. llama.cpp is run three times: on those weights in a
file of float32, where it rounds nothing; on the file that `compress export --to gguf` writes, whose products it computes from inputs in blocks of 32
of 8 bits (and the head from inputs in the head's dtype); and there with its cache in float16, its default. Beside it runs the reference with inputs
rounded in that way.

Prompts are the beginnings of 20 windows of demo:heldout, 32 tokens each, and 64 tokens follow. `full` counts prompts all of whose tokens are the
reference's. The rest is teacher-forced along the reference's own tokens, so that one flip does not hide what follows: `positions` whose best token is
the reference's; of the others, `unexplained` are those where the reference is surer than twice what rounding its own inputs does to any logit there.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from compress.checkpoint import Checkpoint, entry, write_safetensors, write_text
from compress.data import Tokenizer, windows
from compress.declared import schemes
from compress.export import gguf
from compress.layout import Layout
from compress.model import Model

RUNNER = Path(__file__).parent / "engines" / "llama_cpp_logits.py"
PROMPTS, PROMPT, TOKENS = 20, 32, 64
BLOCK = 32


def dense(artifact: Path, folder: Path) -> tuple[Path, set[str]]:
    """A checkpoint of what the artifact's codes mean, in float32, and the names of the linears that were quantised."""
    layout = Layout(Checkpoint(artifact))
    model = Model(layout)
    folder.mkdir()
    config = {key: value for key, value in model.config.items() if key != "quantization_config"} | {"dtype": "float32"}
    tensors, quantised = {}, set(schemes(layout))
    for name in model.tensors:
        owner, _, part = name.rpartition(".")
        if owner not in quantised or part == "bias":
            tensors[name] = layout.checkpoint.read(name).float()
    for linear in quantised:
        weight = model.quantized(linear)
        assert weight
        tensors[f"{linear}.weight"] = weight.dequantize(torch.float32)
    write_safetensors(folder / "model.safetensors", [entry(name, tensor) for name, tensor in sorted(tensors.items())], {"format": "pt"})
    write_text(folder / "config.json", json.dumps(config))
    for path in artifact.glob("*token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder, quantised


def rounded(inputs: Tensor) -> Tensor:
    """Inputs in blocks of 32 of 8 bits with a scale of float16, as llama.cpp multiplies them (Q8_0)."""
    blocks = inputs.unflatten(-1, (-1, BLOCK))
    peak = blocks.abs().amax(-1, keepdim=True)
    codes = (blocks * torch.where(peak > 0, 127 / peak, 0)).round()
    return (codes * (peak / 127).half().float()).flatten(-2)


class Rounding:
    """While entered, products with quantised weights of ``model`` are of rounded inputs, and that with the head of inputs in the dtype ``head``."""

    def __init__(self, model: Any, quantised: set[str], head: torch.dtype) -> None:
        def store(tensor: Tensor) -> int:
            return tensor.untyped_storage().data_ptr()

        parts = {name: store(parameter) for name, parameter in model.named_parameters()}
        owners = {name.removesuffix(".weight") for name in parts}
        fused = {name.rpartition(".experts.")[0] for name in quantised if ".experts." in name}
        self.narrow = {parts[f"{name}.weight"] for name in quantised & owners}
        self.narrow |= {where for name, where in parts.items() if name.rpartition(".experts.")[0] in fused - {""}}
        self.head, self.head_dtype, self.store = store(model.lm_head.weight), head, store
        assert len(self.narrow) >= len(quantised & owners)

    def __enter__(self) -> None:
        self.plain: Callable[..., Tensor] = functional.linear

        def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            where = self.store(weight)
            if where in self.narrow:
                inputs = rounded(inputs)
            elif where == self.head:
                inputs = inputs.to(self.head_dtype).float()
            return self.plain(inputs, weight, bias)

        functional.linear = linear

    def __exit__(self, *_: object) -> None:
        functional.linear = self.plain


def ask(python: str, work: Path, **request: Any) -> dict[str, Any]:
    """What llama.cpp answers."""
    (work / "request.json").write_text(json.dumps(request))
    subprocess.run([python, RUNNER, work / "request.json", work / "answer.npz"], check=True)
    return dict(np.load(work / "answer.npz"))


def export(folder: Path, out: Path) -> dict[str, float]:
    """Write the file and return, by type, how many weights are in it."""
    import gguf as package

    layout = Layout(Checkpoint(folder))
    model, plan = Model(layout), schemes(layout) if layout.packed else {}
    out.mkdir()
    gguf.write(model, plan, None, out)
    kinds: dict[str, float] = {}
    for tensor in package.GGUFReader(out / gguf.FILE).tensors:
        kinds[tensor.tensor_type.name] = kinds.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    return kinds


def compare(found: list[Tensor], meant: list[Tensor], spread: list[Tensor]) -> dict[str, Any]:
    """Logits ``found`` [positions, vocabulary] of each text beside those ``meant``; ``spread`` are those meant with rounded inputs."""
    same = flips = unexplained = 0
    margins, largest, off = [], 0.0, []
    for one, two, other in zip(found, meant, spread, strict=True):
        agree = one.argmax(-1) == two.argmax(-1)
        same += int(agree.sum())
        flips += int((~agree).sum())
        top = two.topk(2).values
        margin = top[:, 0] - two.gather(1, one.argmax(-1, keepdim=True))[:, 0]
        reach = 2 * (other - two).abs().amax(-1)
        unexplained += int((~agree & (margin > reach)).sum())
        margins += margin[~agree].tolist()
        largest = max(largest, float((one - two).abs().max()))
        off.append(float((one - two).square().mean().sqrt()))
    return {
        "positions": same, "of": same + flips, "unexplained": unexplained, "largest_margin_of_a_flip": max(margins, default=0.0),
        "largest_difference_of_a_logit": largest, "rms_of_a_text": statistics.median(off),
    }  # fmt: skip


def main() -> None:
    import transformers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--python", required=True, help="the interpreter llama-cpp-python is installed for")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        plain, quantised = dense(arguments.artifact, work / "dense")
        model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32, experts_implementation="eager").eval()
        stored = Checkpoint(arguments.artifact).tensors[f"{Layout(Checkpoint(arguments.artifact)).arch.outside.embedding[0]}.weight"].dtype
        head = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[stored]
        samples = windows("demo:heldout", PROMPT, PROMPTS, Tokenizer(arguments.artifact), "prompts")
        prompts = [sample.ids.tolist() for sample in samples.items]
        texts = [model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)[0].tolist() for ids in prompts]

        def logits() -> list[Tensor]:
            return [model(torch.tensor([ids])).logits[0, PROMPT - 1 : -1] for ids in texts]

        meant = logits()
        with Rounding(model, quantised, head):
            spread = logits()
        answers: dict[str, Any] = {}
        files = {"float32": work / "f32", "exported": work / "gguf"}
        kinds = {"float32": export(plain, files["float32"]), "exported": export(arguments.artifact, files["exported"])}
        for name, file, cache in (("float32", "float32", "f32"), ("exported", "exported", "f32"), ("exported, cache in float16", "exported", "f16")):
            request = {"file": str(files[file] / gguf.FILE), "prompts": prompts, "tokens": TOKENS, "forced": texts, "cache": cache}
            got = ask(arguments.python, work, **request)
            found = [torch.from_numpy(got[f"logits_{number}"])[PROMPT - 1 : -1] for number in range(PROMPTS)]
            full = sum(made.tolist() == text[PROMPT:] for made, text in zip(got["tokens"], texts, strict=True))
            answers[name] = {
                "types": kinds[file], "full": full, "of_prompts": PROMPTS, "llama_cpp_python": str(got["version"]),
                "beside the reference": compare(found, meant, spread),
                "beside the reference with rounded inputs": compare(found, spread, spread),
            }  # fmt: skip
        answers["reference with rounded inputs, beside the reference"] = compare(spread, meant, spread)
    json.dump(answers, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
