"""Tokens per second of a whole model, one token at a time, beside llama.cpp: a Llama of random weights, each side packed in its own way.

    python bench/decode.py --tokenizer compress/demo/dense --folder DIR --venvs DIR --json decode.json [--quick]

The checkpoint is made and compressed once by the shipped command line and stays in --folder, and so do llama.cpp's files. Both sides then run
in turn, several rounds each; embeddings and the head are 16 bits wide on both. A share is bytes of packed weights and head read per second,
of what this machine reads in the same run. Llama.cpp's types have scales for 16 or 32 weights, ours for 128: what is compared is speed.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
import yaml
from make_random_llama import PRESETS, make
from rich.console import Console
from rich.table import Table

import compress
from compress.kernels import memory, native
from compress.kernels.packed import Packed

RIVALS = {4: "Q4_0", 3: "Q3_K", 2: "Q2_K"}
GROUP = 128
READ = 512 << 20
"""Bytes that are read to measure the roofline: larger than any last-level cache."""

Decode = Callable[[int], list[float]]


def packed(folder: Path, checkpoint: Path, bits: int) -> Path:
    """The checkpoint in so many bits, made if it is not there yet."""
    out = folder / f"w{bits}"
    if not out.exists():
        recipe = folder / f"w{bits}.yaml"
        recipe.write_text(yaml.safe_dump({"evaluate": None, "passes": [{"rtn": {"bits": bits, "group_size": GROUP}}]}))
        subprocess.run(["compress", "run", str(recipe), str(checkpoint), "--out", str(out)], check=True)
    return out


def ours(folder: Path) -> tuple[Decode, int, list[Packed]]:
    """What decodes by our runtime, the bytes it reads for a token, and the modules that are packed."""
    model = compress.load(folder)
    modules = [module for module in model.modules() if isinstance(module, Packed)]
    read = sum(buffer.nbytes for module in modules for buffer in module.buffers())

    @torch.inference_mode()
    def decode(tokens: int) -> list[float]:
        cache, seconds = None, []
        for token in range(tokens):
            began = time.perf_counter()
            done = model(input_ids=torch.tensor([[token + 1]]), past_key_values=cache, use_cache=True)
            cache = done.past_key_values
            seconds.append(time.perf_counter() - began)
        return seconds

    return decode, read, modules


def theirs(folder: Path, kind: str, shape: dict[str, Any], threads: int, python: Path) -> tuple[Decode, dict[str, Any], subprocess.Popen[str]]:
    """What decodes by llama.cpp, what it says of itself, and its process."""
    script = Path(__file__).parent / "rivals" / "run_llamacpp.py"
    command = [str(python), str(script), "--type", kind, "--gguf", str(folder / f"{kind}.gguf"), "--threads", str(threads)]
    process = subprocess.Popen(
        [*command, "--shape", json.dumps(shape)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdin and process.stdout
    told = json.loads(process.stdout.readline())

    def decode(tokens: int) -> list[float]:
        assert process.stdin and process.stdout
        process.stdin.write(f"{tokens}\n")
        process.stdin.flush()
        return list(json.loads(process.stdout.readline()))

    return decode, told, process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="3b")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory whose tokenizer files are copied")
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints go, some 12 GB of them; what is there already is used")
    parser.add_argument("--venvs", type=Path, default=os.environ.get("COMPRESS_RIVALS"), help="the rivals' environments (or $COMPRESS_RIVALS)")
    parser.add_argument("--json", type=Path, required=True, help="where the numbers go")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--bits", type=int, nargs="+", default=list(RIVALS), choices=list(RIVALS))
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and the small preset")
    arguments = parser.parse_args()
    preset, rounds, tokens = ("0.9b", 3, 6) if arguments.quick else (arguments.preset, 7, 8)
    folder, shape = arguments.folder / preset, PRESETS[preset]
    python = arguments.venvs / "llamacpp" / "bin" / "python" if arguments.venvs else None
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        make(shape, arguments.tokenizer, checkpoint)
    read = memory.empty(READ).fill_(1)
    results = []
    for bits in arguments.bits:
        artifact = packed(folder, checkpoint, bits)
        decode, size, modules = ours(artifact)
        for digits in (2, 1):
            for module in modules:
                module.digits = digits
            for threads in arguments.threads:
                torch.set_num_threads(threads)
                row: dict[str, Any] = {"bits": bits, "digits": digits, "threads": threads, "bytes_per_token": size, "rival": RIVALS[bits]}
                rival, process = None, None
                if python and python.exists():
                    rival, row["llamacpp"], process = theirs(folder, RIVALS[bits], dataclasses.asdict(shape), threads, python)
                seconds: dict[str, list[float]] = {"ours": [], "llamacpp": [], "read": []}
                for _ in range(rounds):
                    began = time.perf_counter()
                    native.read(read, threads)
                    seconds["read"].append((time.perf_counter() - began) / READ)
                    # The first token of a round warms up.
                    seconds["ours"] += decode(tokens)[1:]
                    seconds["llamacpp"] += rival(tokens)[1:] if rival else []
                if process and process.stdin:
                    process.stdin.close()
                    process.wait()
                median = {side: statistics.median(values) for side, values in seconds.items() if values}
                row |= {"seconds": seconds, "tokens_per_second": {side: 1 / median[side] for side in ("ours", "llamacpp") if side in median}}
                row["share"] = size / median["ours"] * median["read"]
                row["ratio"] = median["llamacpp"] / median["ours"] if "llamacpp" in median else None
                results.append(row)
                print(json.dumps({key: value for key, value in row.items() if key not in ("seconds", "llamacpp")}), flush=True)
        del decode, modules
    document = {"benchmark": "decode", "tier": native.tier(), "preset": preset, "group": GROUP, "stamp": harness.stamp({}), "results": results}
    arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    table = Table(title=f"{preset}, {native.tier()}: tokens per second, medians")
    for heading in ("bits", "digits", "threads", "ours", "share of reading", "llama.cpp", "ratio"):
        table.add_column(heading, justify="right")
    for row in results:
        rate = row["tokens_per_second"]
        other = f"{row['rival']} {rate['llamacpp']:.2f}" if "llamacpp" in rate else "not installed"
        ratio = f"{row['ratio']:.2f}" if row["ratio"] else ""
        table.add_row(str(row["bits"]), str(row["digits"]), str(row["threads"]), f"{rate['ours']:.2f}", f"{row['share']:.0%}", other, ratio)
    Console().print(table)


if __name__ == "__main__":
    main()
