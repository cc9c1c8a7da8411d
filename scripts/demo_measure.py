"""Measure the demonstration models; every figure in compress/demo/README.md comes from here."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_data import WINDOW, load_tokenizer
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)


@torch.no_grad()
def window_loss(model: PreTrainedModel, tokens: np.ndarray, limit: int | None = None) -> float:
    """Mean loss over non-overlapping windows of 512 tokens without BOS."""
    windows = tokens[: len(tokens) // WINDOW * WINDOW].reshape(-1, WINDOW)[:limit]
    total = 0.0
    for start in range(0, len(windows), 8):
        batch = torch.from_numpy(windows[start : start + 8].astype(np.int64))
        logits = model(input_ids=batch).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        total += loss.item() * len(batch)
    return total / len(windows)


def encode_file(tokenizer: PreTrainedTokenizerFast, path: Path) -> np.ndarray:
    """Tokenise a text file into one stream."""
    text = path.read_text(encoding="utf-8")
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return np.asarray(ids, dtype=np.uint16)


def print_perplexity(model: PreTrainedModel, tokens: np.ndarray, label: str) -> None:
    """Print the perplexity of one text."""
    loss = window_loss(model, tokens)
    windows = len(tokens) // WINDOW
    print(f"{label}: loss {loss:.4f}, perplexity {np.exp(loss):.2f}, {windows} windows")


@torch.no_grad()
def sentence_scores(model: PreTrainedModel, sentences: list[list[int]]) -> list[float]:
    """Sum of token log-probabilities; the first token, having no context, is not scored."""
    scores: list[float] = []
    for start in range(0, len(sentences), 64):
        rows = sentences[start : start + 64]
        width = max(map(len, rows))
        # Padding stands on the right, where causal attention keeps it out of every score.
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        logprobs = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
        picked = logprobs.gather(-1, ids[:, 1:, None]).squeeze(-1)
        scores += [float(p[: len(row) - 1].sum()) for p, row in zip(picked, rows, strict=True)]
    return scores


def pairs_accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, path: Path) -> float:
    """Share of pairs whose grammatical sentence gets the higher score."""
    pairs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    good = sentence_scores(model, [tokenizer.encode(pair["good"]) for pair in pairs])
    bad = sentence_scores(model, [tokenizer.encode(pair["bad"]) for pair in pairs])
    return float(np.mean(np.array(good) > np.array(bad)))


def round_to_nearest(weight: Tensor, bits: int, group: int = 128) -> Tensor:
    """Plain asymmetric rounding in groups along the input."""
    w = weight.reshape(-1, group)
    low, high = w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low).clamp(min=1e-8) / (2**bits - 1)
    zero = (-low / scale).round()
    codes = (w / scale + zero).round().clamp(0, 2**bits - 1)
    return ((codes - zero) * scale).reshape(weight.shape)


@torch.no_grad()
def rounded(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    """A copy of the model with every linear layer but the output projection rounded."""
    copied = copy.deepcopy(model)
    for name, module in copied.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.copy_(round_to_nearest(module.weight, bits))
    return copied


@torch.no_grad()
def expert_shares(model: PreTrainedModel, tokens: np.ndarray) -> Tensor:
    """How often each expert of each layer is chosen, as a share of all choices of the layer."""
    config = model.config
    batch = torch.from_numpy(tokens[: 16 * WINDOW].reshape(16, WINDOW).astype(np.int64))
    routers = model(input_ids=batch, output_router_logits=True).router_logits
    chosen = [logits.topk(config.num_experts_per_tok).indices.flatten() for logits in routers]
    counts = [torch.bincount(c, minlength=config.num_experts) for c in chosen]
    return torch.stack(counts) / len(chosen[0])


def scene_chat(question: str) -> list[dict[str, Any]]:
    """A conversation that asks about one image."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


@torch.no_grad()
def scene_accuracy(model: PreTrainedModel, processor: Any, folder: Path) -> tuple[float, int]:
    """Share of questions about the scenes answered exactly, greedily, and their number."""
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    right = 0
    for start in range(0, len(rows), 32):
        part = rows[start : start + 32]
        chats = [scene_chat(r["question"]) for r in part]
        prompts = processor.apply_chat_template(chats, add_generation_prompt=True)
        images = [Image.open(folder / r["image"]) for r in part]
        inputs = processor(text=prompts, images=images, padding=True, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=32, do_sample=False)
        replies = out[:, inputs["input_ids"].shape[1] :]
        answers = processor.batch_decode(replies, skip_special_tokens=True)
        right += sum(a.strip() == r["answer"] for a, r in zip(answers, part, strict=True))
    return right / len(rows), len(rows)


def measure(directory: Path, shipped: Path, data: Path | None) -> None:
    """Print every figure for one model; ``data`` adds the WikiText-2 perplexity."""
    kind = json.loads((directory / "config.json").read_text())["model_type"]
    loader = AutoModelForImageTextToText if kind == "llava" else AutoModelForCausalLM
    model = loader.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(directory)
    print(f"== {directory.name}: {kind}, {model.num_parameters():,} parameters")
    heldout = encode_file(tokenizer, shipped / "heldout.txt")
    print_perplexity(model, heldout, "heldout.txt")
    if data is not None:
        wikitext = encode_file(tokenizer, data / "wikitext2-test.txt")
        print_perplexity(model, wikitext, "wikitext2-test.txt")
    print(f"minimal pairs: {pairs_accuracy(model, tokenizer, shipped / 'pairs.jsonl'):.2%}")
    if kind == "llama":
        loss = window_loss(model, heldout)
        for bits in (4, 3):
            excess = window_loss(rounded(model, bits), heldout) - loss
            print(f"round-to-nearest W{bits} asym g128: excess loss {excess:.4f} on heldout.txt")
    if kind == "qwen3_moe":
        shares = expert_shares(model, heldout)
        print(f"expert shares of a layer: {shares.min():.2%} to {shares.max():.2%}")
    if kind == "llava":
        processor = AutoProcessor.from_pretrained(directory)
        accuracy, count = scene_accuracy(model, processor, shipped / "shapes" / "heldout")
        print(f"shapes/heldout: {accuracy:.2%} of {count} answers exactly right")
