"""Whether llama.cpp makes of GGUF files the tokens that their weights mean: writes bench/results/gguf.json.

    python scripts/gguf_tokens.py --work FOLDER --python $COMPRESS_RIVALS/llamacpp/bin/python   # what is in the JSON already is left as it is

Each case is a model rounded to nearest in a way that makes `compress export --to gguf` choose another type. llama.cpp is asked for 64 greedy tokens
after each of 20 prompts, the beginnings of windows of demo:heldout, 32 tokens each, with its cache in float32; then its answers are compared, token
by token, each given the same ones before it, with

* ``float32``: a file of float32 of the same weights, where it rounds nothing, beside the artifact itself;
* ``plain``: the file as it is exported, beside the artifact itself;
* ``alone``: the same file, beside the artifact with inputs rounded in llama.cpp's way (`compress.emulation`), which knows nothing of llama.cpp's run;
* ``following``: the same, where inputs that differ by less than a 32nd of a step are rounded to the side to which llama.cpp rounded them.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from typer.testing import CliRunner

from compress import exporting, runtime, serving
from compress.checkpoint import Checkpoint, entry, write_safetensors, write_text
from compress.cli import app
from compress.data import Tokenizer, windows
from compress.declared import schemes
from compress.engines.base import find
from compress.export import gguf
from compress.layout import Layout
from compress.model import Model

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results" / "gguf.json"
PROMPTS, PROMPT, TOKENS = 20, 32, 64
EVERYWHERE = {
    "w4 g128": {"bits": 4, "group_size": 128},
    "w4 g128 asymmetric": {"bits": 4, "group_size": 128, "symmetric": False},
    "w5 g128": {"bits": 5, "group_size": 128},
    "w8 g128": {"bits": 8, "group_size": 128},
    "mxfp4": {"format": "mxfp4"},
}
BY_256 = {
    "w2 g256": {"bits": 2, "group_size": 256},
    "w3 g256": {"bits": 3, "group_size": 256},
    "w4 g256 asymmetric": {"bits": 4, "group_size": 256, "symmetric": False},
    "w5 g256 asymmetric": {"bits": 5, "group_size": 256, "symmetric": False},
    "w6 g256": {"bits": 6, "group_size": 256},
}
CASES = {("dense", name): [{"rtn": each}] for name, each in (EVERYWHERE | BY_256).items()}
CASES |= {("moe", name): [{"rtn": each}] for name, each in EVERYWHERE.items() if each.get("symmetric", True)}
CASES |= {
    ("moe", f"{name}, of down g128"): [
        {"rtn": each | {"exclude": ["*.down_proj"]}},
        {"rtn": each | {"group_size": 128, "include": ["*.down_proj"]}},
    ]
    for name, each in BY_256.items()
    if each.get("symmetric", True)
}
"""Experts have no zero points, and their last linear has 128 inputs."""
KEPT = ("tokens", "tokens_equal", "largest_margin", "prompt_logprob_difference", "inputs")


class Quiet:
    def step(self, name: str, total: int) -> None:
        pass


def artifact(model: str, case: str, work: Path) -> Path:
    """The folder of a case, made if it is not there."""
    folder = work / f"{model}-{case.replace(' ', '_')}"
    if not folder.exists():
        file = work / f"{folder.name}.yaml"
        file.write_text(yaml.safe_dump({"passes": CASES[model, case], "evaluate": None}))
        made = CliRunner().invoke(app, ["run", str(file), f"demo:{model}", "--out", str(folder), "--json"])
        assert made.exit_code == 0, made.stdout
    return folder


def dense(folder: Path, out: Path) -> Path:
    """A checkpoint of what an artifact's codes mean, in float32."""
    layout = Layout(Checkpoint(folder))
    model = Model(layout)
    out.mkdir()
    config = {key: value for key, value in model.config.items() if key != "quantization_config"} | {"dtype": "float32"}
    tensors, quantised = {}, schemes(layout)
    for name in model.tensors:
        owner, _, part = name.rpartition(".")
        if owner not in quantised or part == "bias":
            tensors[name] = layout.checkpoint.read(name).float()
    for linear in quantised:
        weight = model.quantized(linear)
        assert weight
        tensors[f"{linear}.weight"] = weight.dequantize(torch.float32)
    write_safetensors(out / "model.safetensors", [entry(name, tensor) for name, tensor in sorted(tensors.items())], {"format": "pt"})
    write_text(out / "config.json", json.dumps(config))
    for path in folder.glob("*token*"):
        (out / path.name).write_bytes(path.read_bytes())
    return out


def exported(folder: Path) -> Path:
    """The folder of the file."""
    place = folder.with_name(f"{folder.name}-gguf")
    if not place.exists():
        exporting.export(folder, {"gguf": place}, Quiet())
    return place


def types(place: Path) -> dict[str, int]:
    """How many weights of the products of a file are in each type."""
    import gguf as package

    found: dict[str, int] = {}
    for tensor in package.GGUFReader(place / gguf.FILE).tensors:
        if len(tensor.shape) > 1:
            found[tensor.tensor_type.name] = found.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    return found


def judged(model: Any, asked: list[list[int]], answer: dict[str, Any]) -> dict[str, Any]:
    """What of a comparison is kept, and how many texts are those meant, token for token."""
    found = serving.compare(model, asked, answer)
    return {"texts": sum(not text["other"] for text in found["prompts"])} | {key: found.get(key) for key in KEPT}


def run(model: str, case: str, work: Path, python: Path) -> dict[str, Any]:
    folder = artifact(model, case, work)
    asked = [sample.ids.tolist() for sample in windows("demo:heldout", PROMPT, PROMPTS, Tokenizer(folder), "prompts").items]
    with tempfile.TemporaryDirectory(dir=work) as temporary:
        exact = dense(folder, Path(temporary) / "float32")
        places = [exported(exact), exported(folder)]
        requests = [{"folder": str(place), "prompts": asked, "max_tokens": TOKENS, "dtype": "int8"} for place in places]
        wide, packed = serving.ask_all(find("llama.cpp"), python, requests, 3600)
        unrounded = judged(serving.meant(exact, places[0], find("llama.cpp")), asked, wide)
    answer = {key: value for key, value in packed.items() if key != "inputs"}
    emulated = serving.meant(folder, places[1], find("llama.cpp"))
    return {
        "model": model, "case": case, "types": types(places[1]), "texts": len(asked), "version": packed["version"],
        "float32": unrounded,
        "plain": judged(runtime.load(folder, digits=0).float(), asked, answer),
        "alone": judged(emulated, asked, answer),
        "following": judged(emulated, asked, packed),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="for artifacts, which are kept")
    parser.add_argument("--python", type=Path, required=True, help="the interpreter llama-cpp-python is installed for")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"benchmark": "gguf", "prompt": PROMPT, "tokens": TOKENS, "results": []}
    known = {(row["model"], row["case"]) for row in document["results"]}
    for model, case in [each for each in CASES if each not in known]:
        row = run(model, case, arguments.work.resolve(), arguments.python)
        document["results"].append(row)
        RESULTS.write_text(json.dumps(document, indent=1) + "\n")
        print(model, case, *(f"{name} {row[name]['texts']}" for name in ("float32", "plain", "alone", "following")), flush=True)


if __name__ == "__main__":
    main()
