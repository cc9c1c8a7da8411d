#!/usr/bin/env python3
"""Make the demonstration models and data that ship in ``compress/demo``.

    train_demo.py data    --data DIR            calibration and held-out data
    train_demo.py dense   --data DIR --out DIR  a 4.2M-parameter Llama
    train_demo.py moe     --data DIR --out DIR  an 8.1M-parameter Qwen3 mixture of experts
    train_demo.py vlm     --data DIR --out DIR  the Llama with a small vision tower (LLaVA)
    train_demo.py measure DIR ...               the figures in compress/demo/README.md

``--data`` is a folder with ``books-train.txt.xz``, ``books-valid.txt.xz`` (paragraphs one per
line, books parted by ``<|endoftext|>``), ``wikitext2-test.txt`` and ``minimal-pairs.jsonl``.

Everything is sized for one CPU core and less than an hour a model. With glibc, keeping freed
memory in the process (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_) speeds training by half.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from demo_data import (
    encode_books,
    load_tokenizer,
    read_books,
    text_batches,
    training_tokens,
    write_data,
)
from demo_measure import measure, window_loss
from demo_models import (
    TowerTeacher,
    build_processor,
    build_text_model,
    build_vlm,
    scene_batch,
    scene_loss,
    tower_batch,
)
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

DEMO = Path(__file__).resolve().parent.parent / "compress" / "demo"
MAX_SHARD = "8600KB"  # with the header, every file stays below 9,000,000 bytes

# Without the instructions for it, bfloat16 takes twenty times as long as float32.
COMPUTE = torch.bfloat16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else torch.float32

ModelT = TypeVar("ModelT", bound=torch.nn.Module)


def mixed_precision() -> torch.autocast:
    """Autocast to bfloat16 where the processor has it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=COMPUTE is torch.bfloat16)


# --- optimisation -----------------------------------------------------------------------------


def orthogonalise(stack: Tensor) -> Tensor:
    """Push the singular values of every matrix in ``stack`` towards 1 (Newton-Schulz)."""
    x = stack.to(COMPUTE)
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates; stacks equal shapes so that few large calls are made.

    Three-dimensional parameters are stacks of expert matrices; a fused gate and up projection is
    treated as the two matrices that it holds.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: defaultdict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])
                rows, columns = p.shape[-2:]
                if p.ndim == 3 and rows == columns:  # fused gate and up projections
                    rows //= 2
                shape = (-1, rows, columns)
                by_shape[rows, columns].append((p.view(shape), update.view(shape)))
            for (rows, columns), pairs in by_shape.items():
                stack = orthogonalise(torch.cat([update for _, update in pairs]))
                scale = group["lr"] * math.sqrt(max(1.0, rows / columns))
                parts = stack.split([p.size(0) for p, _ in pairs])
                for (p, _), part in zip(pairs, parts, strict=True):
                    p.add_(part, alpha=-scale)


def make_optimisers(model: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings, norms, biases, routers and the rest."""
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        hidden = p.ndim in (2, 3) and not any(s in name for s in ("embed", "lm_head", "mlp.gate."))
        (matrices if hidden else rest).append(p)
    return [
        Muon(matrices, lr=lr),
        torch.optim.AdamW(rest, lr=0.15 * lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


@dataclass(frozen=True)
class Budget:
    """A run ends at whichever comes first."""

    tokens: int
    minutes: float

    def progress(self, tokens: int, seconds: float) -> float:
        """Return the share of the budget that is spent."""
        return min(1.0, max(tokens / self.tokens, seconds / (60 * self.minutes)))


def schedule(progress: float, step: int) -> float:
    """Learning-rate factor: a short warm-up, constant, then linear to zero over the last 45 %."""
    return min(1.0, (step + 1) / 50, (1 - progress) / 0.45)


def fit(
    model: ModelT,
    losses: Callable[[], tuple[Tensor, int]],
    budget: Budget,
    lr: float,
    export: Callable[[ModelT, int], None],
    export_minutes: float = 8.0,
) -> None:
    """Train ``model`` in place, handing averaged weights to ``export`` now and then.

    ``losses`` draws a batch and returns its loss and its token count. The exponential average of
    the weights stands for a decayed learning rate long before the schedule gets there, so that an
    early export is a usable model.
    """
    optimisers = make_optimisers(model, lr)
    base = [[group["lr"] for group in o.param_groups] for o in optimisers]
    average = copy.deepcopy(model)
    start = exported = time.monotonic()
    tokens, smooth = 0, math.nan
    for step in itertools.count():
        progress = budget.progress(tokens, time.monotonic() - start)
        if progress >= 1:
            break
        for optimiser, rates in zip(optimisers, base, strict=True):
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(progress, step)
        loss, count = losses()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        tokens += count
        with torch.no_grad():
            for a, p in zip(average.parameters(), model.parameters(), strict=True):
                a.lerp_(p, max(0.005, min(0.1, 10 / (step + 1))))
        smooth = loss.item() if step == 0 else 0.98 * smooth + 0.02 * loss.item()
        if step % 50 == 0:
            rate = tokens / (time.monotonic() - start)
            line = f"{step:6d} {progress:6.1%} loss {smooth:.4f} {tokens:,} tokens {rate:.0f}/s"
            print(line, flush=True)
        if time.monotonic() - exported > 60 * export_minutes:
            export(average, tokens)
            exported = time.monotonic()
    export(average, tokens)
    export(model, tokens)


# --- checkpoints ------------------------------------------------------------------------------


def copy_matching(model: PreTrainedModel, directory: Path) -> None:
    """Copy every tensor of the checkpoint whose name and shape the model shares."""
    kind = json.loads((directory / "config.json").read_text())["model_type"]
    loader = AutoModelForImageTextToText if kind == "llava" else AutoModelForCausalLM
    source = loader.from_pretrained(directory, dtype=torch.float32).state_dict()
    # A language model inside a vision-language model carries one more prefix.
    bare = {name.replace("language_model.", ""): tensor for name, tensor in source.items()}
    own = {name: name.replace("language_model.", "") for name in model.state_dict()}
    shared = {name: bare[key] for name, key in own.items() if key in bare and bare[key].shape == model.state_dict()[name].shape}
    model.load_state_dict(shared, strict=False)
    print(f"{len(shared)} of {len(own)} tensors start from {directory.name}")


def balance_loss(routers: tuple[Tensor, ...], chosen: int) -> Tensor:
    """Load-balancing loss of logits [tokens, experts] a layer, summed over layers (arXiv 2101.03961, section 2.2); 1 a layer is even.

    transformers pools the layers before it multiplies shares by probabilities, so that an expert idle in one layer is
    outweighed by its namesake in another: demonstration models trained with that loss left experts of single layers unused.
    """
    total = torch.zeros(())
    for logits in routers:
        probabilities = logits.float().softmax(-1)
        experts = logits.shape[-1]
        share = torch.bincount(probabilities.topk(chosen).indices.flatten(), minlength=experts) / (len(logits) * chosen)
        total = total + experts * (share * probabilities.mean(0)).sum()
    return total


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    processor: LlavaProcessor | None = None,
) -> None:
    """Write a bf16 checkpoint; ``out`` is replaced only once the new one is complete."""
    fresh = out.with_name(out.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    copy.deepcopy(model).bfloat16().save_pretrained(fresh, max_shard_size=MAX_SHARD)
    if processor is not None:
        processor.save_pretrained(fresh)
        # Releases that read no processor_config.json look for the image settings here.
        processor.image_processor.save_pretrained(fresh)
    save_tokenizer(tokenizer, fresh)
    for file in fresh.iterdir():
        file.chmod(0o644)
    swap_in(fresh, out)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write the tokenizer under the class name that every transformers version knows."""
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for key in ("backend", "is_local", "local_files_only"):
        config.pop(key, None)
    config["padding_side"] = tokenizer.padding_side
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n")


def swap_in(fresh: Path, out: Path) -> None:
    """Put ``fresh`` where ``out`` is, with no moment at which ``out`` is half written."""
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old, ignore_errors=True)


# --- text models ------------------------------------------------------------------------------


def train_text(args: argparse.Namespace) -> None:
    """Train ``dense`` or ``moe`` on the books."""
    tokenizer = load_tokenizer(args.tokenizer)
    model = build_text_model(args.command)
    for directory in args.init:
        copy_matching(model, directory)
    stream = training_tokens(args.data, tokenizer, args.cache)
    batches = text_batches(stream, batch=8, seed=args.seed)
    valid = encode_books(tokenizer, read_books(args.data / "books-valid.txt.xz"))
    best = math.inf

    def losses() -> tuple[Tensor, int]:
        batch = next(batches)
        with mixed_precision():
            if args.command == "dense":
                return model(input_ids=batch, labels=batch).loss, batch.numel()
            # The factor of zero keeps transformers' own balancing loss, which pools the layers, out of the sum.
            outputs = model(input_ids=batch, labels=batch, output_router_logits=True)
            balance = balance_loss(outputs.router_logits, model.config.num_experts_per_tok)
            return outputs.loss + args.balance * balance, batch.numel()

    def export(candidate: PreTrainedModel, tokens: int) -> None:
        nonlocal best
        loss = window_loss(candidate, valid, limit=64)
        print(f"after {tokens:,} tokens: loss {loss:.4f} on the first 64 windows", flush=True)
        if loss < best:
            best = loss
            save(candidate, tokenizer, args.out)

    fit(model, losses, Budget(args.tokens, args.minutes), args.lr, export)


# --- vision-language model --------------------------------------------------------------------


def train_tower(model: LlavaForConditionalGeneration, rng: np.random.Generator, minutes: float) -> None:
    """Teach the vision tower what stands where before the language model learns to read it.

    From the answers alone, tower and language model would have to find a common code at once,
    which takes many times more steps.
    """
    teacher = TowerTeacher(model.model.vision_tower)

    def losses() -> tuple[Tensor, int]:
        pixels, labels = tower_batch(rng, 64)
        with mixed_precision():
            return teacher(pixels, labels), labels.numel()

    def report(candidate: torch.nn.Module, tokens: int) -> None:
        with torch.no_grad():
            loss = candidate(*tower_batch(rng, 256)).item()
        print(f"tower after {tokens:,} labels: loss {loss:.4f}", flush=True)

    fit(teacher, losses, Budget(sys.maxsize, minutes), 0.01, report)


def train_vlm(args: argparse.Namespace) -> None:
    """Train the whole vision-language model; some batches are plain text."""
    processor = build_processor(args.tokenizer)
    model = build_vlm()
    # On a CPU, the fused attention's backward pass takes half of a step at these short lengths.
    model.set_attn_implementation("eager")
    for directory in args.init:
        copy_matching(model, directory)
    stream = training_tokens(args.data, processor.tokenizer, args.cache)
    texts = text_batches(stream, batch=4, seed=args.seed)
    rng = np.random.default_rng((args.seed, 0))
    if args.tower_minutes > 0:
        train_tower(model, rng, args.tower_minutes)
    check = scene_batch(np.random.default_rng((args.seed, 3)), processor.tokenizer, 128)
    step, best = itertools.count(), math.inf

    def losses() -> tuple[Tensor, int]:
        with mixed_precision():
            if next(step) % args.text_every == args.text_every - 1:
                batch = next(texts)
                return model(input_ids=batch, labels=batch).loss, batch.numel()
            pixels, ids, labels = scene_batch(rng, processor.tokenizer, 16)
            return scene_loss(model, pixels, ids, labels), ids.numel()

    def export(candidate: PreTrainedModel, tokens: int) -> None:
        nonlocal best
        with torch.no_grad():
            loss = scene_loss(candidate, *check).item()
        print(f"after {tokens:,} tokens: loss {loss:.4f} on 128 other scenes", flush=True)
        if loss < best:
            best = loss
            save(candidate, processor.tokenizer, args.out, processor)

    fit(model, losses, Budget(args.tokens, args.minutes), args.lr, export, export_minutes=5)


# --- command line -----------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="write calibration and held-out data")
    data.add_argument("--data", type=Path, required=True)
    data.add_argument("--out", type=Path, default=DEMO / "data")
    data.add_argument("--seed", type=int, default=0)
    for name in ("dense", "moe", "vlm"):
        command = commands.add_parser(name, help=f"train the {name} model")
        command.add_argument("--data", type=Path, required=True)
        command.add_argument("--out", type=Path, required=True)
        command.add_argument("--tokenizer", type=Path, default=DEMO / "dense")
        command.add_argument("--init", type=Path, nargs="*", default=[], help="checkpoints to start from, in turn")
        if name == "moe":
            command.add_argument("--balance", type=float, default=0.01, help="factor of the routers' load-balancing loss")
        if name == "vlm":
            command.add_argument("--tower-minutes", type=float, default=4.0)
            command.add_argument("--text-every", type=int, default=3, help="every n-th batch is plain text")
        command.add_argument("--tokens", type=int, default=40_000_000)
        command.add_argument("--minutes", type=float, default=40.0)
        command.add_argument("--lr", type=float, default=0.02, help="of the hidden matrices")
        command.add_argument("--seed", type=int, default=0)
        cache = Path(tempfile.gettempdir()) / "train-demo-tokens.npy"
        command.add_argument("--cache", type=Path, default=cache, help="the tokenised books, kept between runs")
    figures = commands.add_parser("measure", help="print the figures of trained models")
    figures.add_argument("models", type=Path, nargs="+")
    figures.add_argument("--data", type=Path, help="adds the WikiText-2 perplexity")
    figures.add_argument("--shipped", type=Path, default=DEMO / "data")
    return parser.parse_args()


def main() -> None:
    """Run one command."""
    args = parse_args()
    if args.command == "measure":
        for directory in args.models:
            measure(directory, args.shipped, args.data)
        return
    torch.manual_seed(args.seed)
    if args.command == "data":
        write_data(args.data, args.out, args.seed)
    elif args.command == "vlm":
        train_vlm(args)
    else:
        train_text(args)


if __name__ == "__main__":
    main()
