"""Does the gate fail what got worse, and pass what did not? Planted regressions and unchanged models, each judged as `compress gate` judges.

    python bench/gate.py --work gate-work --json gate.json [--models demo:dense] [--seeds 20]

**Planted** in an artifact (GPTQ, 4 bits, groups of 64) of one calibration seed, and judged beside the stored baseline of another seed's:

* `layer`: the scales of all linears of a block, chosen by the seed, times 1.05; `linear`: those of one linear;
* `expert`: one expert of a block, chosen by the seed, puts out zeros; `tokenizer`: one merge of the tokenizer, chosen by the seed, is gone.

In a planted artifact the manifest is written anew, as a compressor at fault would have: hashes alone would catch everything. How many runs each check
fails is in the JSON, and so is how many fail by tests alone, without any exact check.

**Unchanged** are

* `seeds`: artifacts of the same recipe that differ in the calibration's seed, beside each other, on windows drawn with replacement, at bounds that
  were set on one pair of seeds that is left out of the runs;
* `order`: the uncompressed model beside itself with the channels of its MLPs in another order, which changes nothing but how sums are rounded, with
  bounds of 0, every run on windows of its own.
"""

import argparse
import itertools
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compress import demo
from compress.checkpoint import Checkpoint, sha256
from compress.gate import decide, rules, run
from compress.layout import Layout
from compress.source import locate_model

CALIBRATIONS, PLANTED_IN = 5, 2
CONTEXT, WINDOWS = 256, 16
FACTOR = 1.05
OVER_NOISE = 1.25
"""How far above what two seeds differ by the bound of the divergence is."""
LOSS = 0.005
GAIN = 0.02
PLANTED = {"demo:dense": ("layer", "tokenizer", "linear"), "demo:moe": ("expert", "layer", "tokenizer")}


class Silent:
    """Progress that nobody watches."""

    def step(self, name: str, total: int) -> None: ...
    def done(self, units: int) -> None: ...


def artifact(model: str, seed: int, work: Path) -> Path:
    """The model in 4 bits, calibrated with a seed; made once."""
    name = f"{model.removeprefix('demo:')}-{seed}"
    out = work / name
    if not out.exists():
        options = {"bits": 4, "group_size": 64} | ({"fallback": "round"} if model == "demo:moe" else {})
        recipe = {
            "calibration": {"data": "demo:text", "samples": 128, "length": 256, "seed": seed},
            "passes": [{"gptq": options}],
            "evaluate": None,
            "verify": "streamed",
        }
        (work / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        command = [sys.executable, "-m", "compress", "run", work / f"{name}.yaml", model, "--out", out, "--json"]
        subprocess.run(list(map(str, command)), check=True, capture_output=True, env=harness.environment(), cwd=harness.BENCH.parent)
    return out


def plant(kind: str, source: Path, target: Path, seed: int) -> str:
    """A copy of an artifact with a regression in it, and a manifest that says all is well; returns what was done."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    generator = np.random.default_rng(seed)
    weights = target / "model.safetensors"
    if kind == "tokenizer":
        tokenizer = json.loads((target / "tokenizer.json").read_text())
        merges = tokenizer["model"]["merges"]
        told = f"merge {merges.pop(int(generator.integers(len(merges))))} gone"
        (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    else:
        tensors = load_file(weights)
        with safe_open(weights, "pt") as file:
            metadata = file.metadata()
        blocks = sorted({name.split(".")[2] for name in tensors if name.startswith("model.layers.")})
        prefix = f"model.layers.{generator.choice(blocks)}."
        scales = sorted(name for name in tensors if name.startswith(prefix) and name.endswith(".weight_scale"))
        if kind == "expert":
            last = [name for name in scales if ".experts." in name and ".down_proj." in name]
            chosen, factor = [str(generator.choice(last))], 0.0
        else:
            chosen, factor = (scales if kind == "layer" else [str(generator.choice(scales))]), FACTOR
        for name in chosen:
            tensors[name] = (tensors[name].double() * factor).to(tensors[name].dtype)
        save_file(tensors, weights, metadata)
        told = f"{chosen[0] if len(chosen) == 1 else f'{len(chosen)} linears of {prefix}'} x {factor}"
    manifest = json.loads((target / "manifest.json").read_text())
    manifest["files"] = {name: sha256(target / name) for name in manifest["files"]}
    (target / "manifest.json").write_text(json.dumps(manifest))
    return told


def gate_file(max_loss_increase: float = LOSS, **more: float) -> rules.Rules:
    """What everything is judged by, with `more` bounds."""
    text = {"data": "demo:heldout", "context": CONTEXT, "windows": WINDOWS, "max_loss_increase": max_loss_increase}
    return rules.validate({"integrity": {"max_gain": GAIN}, "text": [text | more]}, "bench/gate.py")


def measure(chosen: rules.Rules, name: str, model: str | Path, base: Any) -> Any:
    found = Layout(Checkpoint(locate_model(str(model))))
    return run.measured(chosen, name, found, run.inputs(chosen, found, Silent()), base, Silent())


def drawn(arrays: dict[str, decide.Arrays], windows: np.ndarray) -> dict[str, decide.Arrays]:
    """The measurements of some windows, each as if it had been given as often as it was drawn."""
    ((title, text),) = arrays.items()
    places = [np.flatnonzero(text["member"] == window) for window in windows]
    some = {name: np.concatenate([values[each] for each in places]) for name, values in text.items()}
    some["member"] = np.concatenate([np.full(len(each), index, np.int32) for index, each in enumerate(places)])
    return {title: some}


def judged(chosen: rules.Rules, base: Any, found: Any, seed: int) -> list[decide.Check]:
    """The tests of one run on windows drawn by its seed."""
    windows = np.random.default_rng(seed).integers(WINDOWS, size=WINDOWS)
    return decide.decide(chosen.model_copy(update={"seed": seed}), drawn(base.arrays, windows), drawn(found.arrays, windows))


def unchanged(runs: int, max_kl: float, records: dict[int, Any], folders: dict[int, Path]) -> dict[str, Any]:
    """Artifacts of other seeds beside each other."""
    chosen = gate_file(max_kl=max_kl)
    pairs = [pair for pair in itertools.permutations(range(CALIBRATIONS), 2) if set(pair) != {0, 1}]
    failed, by, seen, gains = 0, Counter[str](), {}, []
    for index in range(runs):
        first, second = pairs[index % len(pairs)]
        if (first, second) not in seen:
            seen[first, second] = measure(chosen, "candidate", folders[second], records[first])
            before, after = records[first].norms, seen[first, second].norms
            gains.append(max(abs(after[name] / before[name] - 1) for name in before))
        checks = judged(chosen, records[first], seen[first, second], index)
        failed += decide.verdict(checks) == "failed"
        by.update(f"{check.suite}: {check.name}" for check in checks if check.status == "failed")
    return {"runs": runs, "failed": failed, "by": dict(by), "pairs": len(seen), "largest_gain": max(gains)}


def reordered(model: str, target: Path, seed: int) -> Path:
    """The model with the channels of each MLP in another order: the same function."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(demo.path(model.removeprefix("demo:")), target)
    tensors = load_file(target / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name in [name for name in tensors if name.endswith(".down_proj.weight")]:
        start = name.removesuffix("down_proj.weight")
        order = torch.randperm(tensors[name].shape[1], generator=generator)
        tensors[name] = tensors[name][:, order].contiguous()
        for part in ("gate_proj", "up_proj"):
            tensors[f"{start}{part}.weight"] = tensors[f"{start}{part}.weight"][order].contiguous()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def order(model: str, runs: int, work: Path) -> dict[str, Any]:
    """The model beside itself with sums in another order, bounds of 0: every run has windows of its own, half as long, of ten orders."""
    bounds = {"max_loss_increase": 0.0, "max_accuracy_drop": 0.0}
    text = {"data": "demo:heldout", "context": CONTEXT // 2, "windows": WINDOWS * runs // 10}
    chosen = rules.validate({"text": [text | bounds]}, "bench/gate.py")
    base = measure(chosen, "base", model, None)
    failed, different = 0, []
    for number in range(10):
        found = measure(chosen, "candidate", reordered(model, work / "reordered", number), None)
        title = "text demo:heldout"
        different.append(float((found.arrays[title]["loss"] != base.arrays[title]["loss"]).mean()))
        for part in range(runs // 10):
            windows = np.arange(WINDOWS * part, WINDOWS * (part + 1))
            checks = decide.decide(chosen, drawn(base.arrays, windows), drawn(found.arrays, windows))
            failed += decide.verdict(checks) == "failed"
    return {"runs": 10 * (runs // 10), "failed": failed, "share_of_losses_that_differ": min(different)}


def planted(model: str, kind: str, seeds: int, baseline: Path, chosen: rules.Rules, source: Path, work: Path) -> dict[str, Any]:
    """Runs of the whole command's code on planted artifacts."""
    caught, by_tests, by, told = 0, 0, Counter[str](), []
    for seed in range(seeds):
        target = work / f"planted-{model.removeprefix('demo:')}"
        what = plant(kind, source, target, seed)
        result = run.judge(chosen, str(target), str(baseline), Silent())
        failed = sorted({f"{check['suite']}: {check['name']}" for check in result["checks"] if check["status"] == "failed"})
        caught += result["verdict"] == "failed"
        by_tests += any(not each.startswith("integrity") for each in failed)
        by.update(failed)
        told.append({"seed": seed, "planted": what, "failed": failed})
        print(f"{model} {kind} {seed}: {what}: {', '.join(failed) or 'NOT CAUGHT'}", flush=True)
    return {"runs": seeds, "caught": caught, "caught_by_tests": by_tests, "by": dict(by), "each": told}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for artifacts, which are made once")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=list(PLANTED), choices=list(PLANTED))
    parser.add_argument("--seeds", type=int, default=20, help="planted regressions of each kind")
    parser.add_argument("--runs", type=int, default=100, help="of each unchanged model")
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    for model in arguments.models:
        for found in measured(model, arguments.seeds, arguments.runs, work):
            write(arguments.json, model, found)


def write(path: Path, model: str, found: dict[str, Any]) -> None:
    """Put what was found of a model into the file, beside what it says of others under the same protocol."""
    document = json.loads(path.read_text()) if path.exists() else {"benchmark": "gate", "results": {}}
    protocol = {"context": CONTEXT, "windows": WINDOWS, "factor": FACTOR, "over_noise": OVER_NOISE}
    document["results"] = {name: each for name, each in document["results"].items() if document["protocol"] == protocol} | {model: found}
    document |= {"stamp": harness.stamp({}), "protocol": protocol}
    path.write_text(json.dumps(document, indent=1) + "\n")


def measured(model: str, seeds: int, runs: int, work: Path) -> Iterator[dict[str, Any]]:
    """Everything about a model, more each time."""
    folders = {seed: artifact(model, seed, work) for seed in range(CALIBRATIONS)}
    probe = gate_file(max_kl=1.0)
    records = {seed: measure(probe, "baseline", folder, None) for seed, folder in folders.items()}
    other = measure(probe, "candidate", folders[1], records[0])
    noise = {check.name: check.value for check in decide.decide(probe, records[0].arrays, other.arrays)}
    max_kl = round(OVER_NOISE * noise["kl"], 4)
    chosen = gate_file(max_kl=max_kl)
    baseline = work / f"baseline-{model.removeprefix('demo:')}.json"
    for path in (baseline, baseline.with_suffix(".safetensors")):
        path.unlink(missing_ok=True)
    run.save_baseline(chosen, str(folders[0]), baseline, Silent())
    found: dict[str, Any] = {"noise": noise, "alpha": chosen.alpha, "max_kl": max_kl, "max_loss_increase": LOSS, "max_gain": GAIN}
    found["same"] = run.judge(chosen, str(folders[0]), str(baseline), Silent())["verdict"]
    found["another"] = run.judge(chosen, str(folders[PLANTED_IN]), str(baseline), Silent())["verdict"]
    found |= {"planted": {}, "unchanged": {}}
    for kind in PLANTED[model]:
        found["planted"][kind] = planted(model, kind, seeds, baseline, chosen, folders[PLANTED_IN], work)
        yield found
    found["unchanged"]["seeds"] = unchanged(runs, max_kl, records, folders)
    if model == "demo:dense":
        found["unchanged"]["order"] = order(model, runs, work)
    yield found


if __name__ == "__main__":
    main()
