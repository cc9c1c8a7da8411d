"""Peak memory of compressing a model of 3e9 parameters, beside the size of its checkpoint.

    python bench/memory.py --tokenizer DIR --json memory.json

The model is never held as a whole: the run fails (exit 1) where the peak of the whole process tree reaches a third of the
checkpoint's bytes. The checkpoint is random, GPTQ's work does not depend on what is in it.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import harness
import yaml
from make_random_llama import add_shape_arguments, make, shape_from
from rich.console import Console
from rich.table import Table

LIMIT = 1 / 3
"""The share of the checkpoint's bytes that the peak has to stay below."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_arguments(parser, preset="3b")
    parser.add_argument("--json", type=Path, required=True, help="where the numbers go")
    parser.add_argument("--pass", dest="options", default="{}", help="more options of the gptq pass, as YAML")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    shape = shape_from(arguments)
    stamp = harness.stamp({})
    grid = {"bits": arguments.bits, "group_size": arguments.group_size, "symmetric": False}
    with tempfile.TemporaryDirectory(prefix="memory-") as name:
        work = Path(name)
        model, tokens = work / "model", work / "tokens.jsonl"
        checkpoint_bytes = make(shape, arguments.tokenizer, model)
        harness.write_windows(tokens, harness.random_ids(arguments.samples, arguments.length))
        options = grid | yaml.safe_load(arguments.options)
        recipe = harness.write_recipe(work / "recipe.yaml", [{"gptq": options}], tokens, arguments.samples, arguments.length)
        done = harness.run(harness.our_command(recipe, model, work / "out"))
    if done.returncode not in harness.OUR_SUCCESS:
        print(done.stderr, file=sys.stderr)
        raise SystemExit(done.error())
    ratio = done.peak_rss_bytes / checkpoint_bytes
    table = Table(title=f"GPTQ W{arguments.bits} g{arguments.group_size}, {arguments.samples} x {arguments.length} tokens")
    for heading in ("checkpoint GB", "peak RSS GB", "peak / checkpoint", "wall s per block", "CPU s per block"):
        table.add_column(heading, justify="right")
    per_block = {"seconds": done.seconds / shape.layers, "cpu_seconds": done.cpu_seconds / shape.layers}
    numbers = (checkpoint_bytes / 1e9, done.peak_rss_bytes / 1e9, ratio, per_block["seconds"], per_block["cpu_seconds"])
    table.add_row(*(f"{number:.3f}" for number in numbers))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    report = {
        "benchmark": "memory",
        "stamp": stamp,
        "protocol": {key: value for key, value in vars(arguments).items() if key not in ("json", "tokenizer")},
        "parameters": checkpoint_bytes // 2,
        "checkpoint_bytes": checkpoint_bytes,
        "ratio": ratio,
        "limit": LIMIT,
        "per_block": per_block,
        "run": done.cost(),
    }
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if ratio >= LIMIT:
        print(f"peak / checkpoint is {ratio:.3f}; it has to stay below {LIMIT:.3f}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
