#!/usr/bin/env python3
"""Make the weights of the model in ``tests/recall.py``, which ship beside it: ``PYTHONPATH=.:tests python scripts/train_recall.py``.

Starts from the formula and trains on fresh sequences of 4 to 96 pairs with AdamW, its rate falling from 1e-3 to 0. Three minutes on one core; one
thread and fixed seeds, so that the same versions on the same processor give the same bytes.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import recall
import torch
from safetensors.torch import save_file

from compress.evaluate.retrieval import associative_recall

STEPS = 600
BATCH = 16
RATE = 1e-3
PAIRS = (4, 8, 16, 32, 64, 96)
"""Few more often than many: the formula misses the first two pairs of a sequence."""
TRAINING_SEED = 1 << 32
"""Seeds from here on are for training; tests take small ones."""


def train(steps: int = STEPS) -> Any:
    """The formula's model after so many steps."""
    model = recall.constructed().train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    pairs = random.Random(0)
    for step in range(steps):
        drawn = associative_recall(pairs.choice(PAIRS), sequences=BATCH, seed=TRAINING_SEED + step)
        wanted = drawn.scored[:, 1:]
        said = model(input_ids=drawn.sequences).logits[:, :-1][wanted]
        loss = torch.nn.functional.cross_entropy(said, drawn.sequences[:, 1:][wanted])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0 or step + 1 == steps:
            print(f"step {step}: {loss.item():.6f} nats", flush=True)
    return model.eval()


@torch.no_grad()
def measure(model: Any, name: str) -> None:
    """Print accuracy and loss at 16, 64 and 96 pairs, each on 16 sequences x 3 seeds x 32 queries."""
    for pairs in (16, 64, 96):
        drawn = [associative_recall(pairs, seed=seed) for seed in range(3)]
        rows, scored = (torch.cat([getattr(each, part) for each in drawn]) for part in ("sequences", "scored"))
        logits = model(input_ids=rows).logits
        right, loss = recall.accuracy(logits, rows, scored), recall.cross_entropy(logits, rows, scored)
        print(f"{name}, {pairs} pairs: {right:.4f} right, {loss:.3g} nats")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=recall.WEIGHTS)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    measure(recall.constructed(), "formula")
    start = time.perf_counter()
    model = train(arguments.steps)
    print(f"trained in {time.perf_counter() - start:.0f} s")
    rounded = model.to(torch.bfloat16)
    save_file({name: tensor.contiguous() for name, tensor in rounded.state_dict().items()}, arguments.out, {"format": "pt"})
    measure(rounded.float(), "trained, stored in bfloat16")


if __name__ == "__main__":
    main()
