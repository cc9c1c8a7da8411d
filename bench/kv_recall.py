"""Caches with fewer channels on a model that has to look things up: associative recall, accuracy and cross-entropy of the answers.

    python bench/kv_recall.py --json bench/results/kv-recall.json

The model is the fixture of the tests (tests/recall.py), 64 pairs, every token scored with what decoding without a window would find, so that all
lookups go through latents. Only one head of each layer is of use in it: these are relations, not figures for real models. `random` projects
on random orthonormal directions, the mean of several draws; what does no better than that has kept nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(harness.BENCH.parent / "tests"))

import recall

from compress import pipeline, recipe
from compress.checkpoint import Checkpoint
from compress.data import Sample, Samples
from compress.evaluate import scoring
from compress.evaluate.retrieval import associative_recall
from compress.layout import Layout
from compress.model import Model

CHANNELS = 2 * recall.HEAD
RANKS = (64, 48, 32, 24, 16)
METHODS: dict[str, dict[str, Any]] = {
    "svd": {"method": "svd"},
    "asvd": {"method": "asvd"},
    "whitened": {"method": "whitened"},
    "aware": {},
    "aware, ranks shared out": {"ranks": "water_filling"},
    "aware, commuting keys": {"keys": "commuting"},
    "aware, 4 bits": {"bits": 4},
    "aware, 2 bits": {"bits": 2},
}


class Silent:
    """Progress that nobody watches."""

    def step(self, name: str, total: int) -> None: ...
    def done(self, units: int) -> None: ...
    def blocks(self, done: int, total: int) -> None: ...
    def note(self, text: str) -> None: ...


def sequences(pairs: int, seed: int) -> Samples:
    made = associative_recall(pairs, sequences=16, seed=seed)
    return Samples("recall", tuple(map(Sample, made.sequences, made.scored)))


def answered(source: Path, model: Path, pairs: int, seeds: int) -> tuple[float, float]:
    """Accuracy and cross-entropy, nats, of the answers."""
    base, shrunk = Model(Layout(Checkpoint(source))), Model(Layout(Checkpoint(model)))
    scores = [scoring.compare(base, shrunk, sequences(pairs, 1000 + seed)) for seed in range(seeds)]
    right, loss = (torch.cat([getattr(each, name) for each in scores]).double().mean() for name in ("right", "loss"))
    return float(right), float(loss)


def shrink(source: Path, work: Path, options: dict[str, Any]) -> Path:
    """The artifact that `options` of kv_shrink make of the fixture."""
    data = work / "calibration.jsonl"
    harness.write_windows(data, [ids.tolist() for seed in range(4) for ids in associative_recall(64, sequences=16, seed=seed).sequences])
    length = associative_recall(64, sequences=1).sequences.shape[1]
    plain = {
        "calibration": {"data": str(data), "samples": 64, "length": length},
        "evaluate": None,
        "passes": [{"kv_shrink": {"window": 0} | options}],
    }
    out = work / "out"
    pipeline.run(pipeline.Request(recipe.validate(plain, "r.yaml"), "r.yaml", str(source), out, work / "work", True), Silent())
    return out


def randomised(source: Path, work: Path, rank: int, seed: int) -> Path:
    """As `shrink`, with random orthonormal directions."""
    from safetensors.torch import load_file, save_file

    out = shrink(source, work, {"keep": rank / CHANNELS})
    tensors = load_file(out / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(tensors):
        if name.endswith("_down"):
            basis = torch.linalg.qr(torch.randn(CHANNELS, rank, generator=generator)).Q
            tensors[name], tensors[f"{name.removesuffix('_down')}_up"] = basis.T.contiguous(), basis.contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the numbers go")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3, help="sets of 16 sequences of 32 questions")
    arguments = parser.parse_args()
    results: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="kv-recall-") as name:
        work = Path(name)
        source = recall.save(work / "source")
        results["dense"] = {"128": list(answered(source, source, arguments.pairs, arguments.seeds))}
        for method, options in METHODS.items():
            for rank in RANKS:
                made = shrink(source, work, {"keep": rank / CHANNELS} | options)
                results.setdefault(method, {})[str(rank)] = list(answered(source, made, arguments.pairs, arguments.seeds))
        for side in ("keys", "values"):
            only = {"keep": (8 + CHANNELS) / 2 / CHANNELS, "keep_keys": (8 if side == "keys" else CHANNELS) / CHANNELS}
            results[f"{side} alone, rank 8"] = {"8": list(answered(source, shrink(source, work, only), arguments.pairs, arguments.seeds))}
        for rank in RANKS:
            draws = [answered(source, randomised(source, work, rank, seed), arguments.pairs, 1) for seed in range(6)]
            results.setdefault("random", {})[str(rank)] = [statistics.mean(each) for each in zip(*draws, strict=True)]
    protocol = {"pairs": arguments.pairs, "seeds": arguments.seeds, "questions": arguments.seeds * 16 * 32, "window": 0, "draws of random": 6}
    document = {"benchmark": "kv-recall", "protocol": protocol, "results": results, "stamp": harness.stamp({})}
    arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    table = Table("method", *(f"{rank} of {CHANNELS}" for rank in RANKS), title="accuracy, cross-entropy in nats")
    for method, by_rank in results.items():
        table.add_row(method, *(f"{right:.3f}, {loss:.4f}" for right, loss in by_rank.values()))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
