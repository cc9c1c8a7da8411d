"""Run an artifact as it is stored: a model of transformers whose packed weights stay packed in memory."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint import Checkpoint
from compress.errors import InputError, Problems
from compress.layout import Layout
from compress.source import locate_model

if TYPE_CHECKING:
    from torch import Tensor

    from compress.kernels.linear import PackedLinear
    from compress.model import Model


def load(name: str | Path, *, digits: int = 2) -> Any:
    """The model in a folder, a hub id or ``demo:NAME``, ready for `generate`; linears quantised to integers of 2, 3, 4 or 8 bits stay packed.

    Their inputs are rounded to so many `digits` of 8 bits while few tokens are computed (`compress.kernels.linear`). Raises `InputError`, with
    everything that stands in the way, for what there are no kernels for: experts, small floats, rounded inputs, residuals, a quantised cache.
    """
    from compress.kernels.linear import PackedLinear
    from compress.model import Model

    if digits not in (1, 2):
        raise InputError.one("digits", f"must be 1 or 2, got {digits}")
    model = Model(Layout(Checkpoint(locate_model(str(name)))))
    _refuse(model, str(name))

    def made(linear: str, bias: Tensor | None) -> PackedLinear:
        weight = model.quantized(linear)
        assert weight is not None
        return PackedLinear(weight, bias, digits, name=linear)

    return model.settled(made)


def stream(name: str, prompt: str, tokens: int, *, digits: int = 2) -> Iterator[str]:
    """The likeliest continuation of ``prompt`` by the model `name`, in pieces of text as they come."""
    from transformers import AutoTokenizer, TextIteratorStreamer

    model = load(name, digits=digits)
    tokenizer = AutoTokenizer.from_pretrained(locate_model(name), local_files_only=True, trust_remote_code=False)
    given = tokenizer(prompt, return_tensors="pt").to(model.device)
    if not given["input_ids"].numel():
        raise InputError.one("PROMPT", "is empty", "give at least a word")
    pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with ThreadPoolExecutor(1) as pool:
        # The token ids alone: some tokenizers give more than their model takes.
        done = pool.submit(
            model.generate, given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=tokens, do_sample=False, streamer=pieces
        )
        done.add_done_callback(lambda _: pieces.end() if done.exception() else None)
        yield from pieces
        done.result()


def _refuse(model: Model, name: str) -> None:
    problems, advice = Problems(), "open it with transformers"
    packed = [linear for linear in model.layout.linears if model.packed_as(linear)]
    if model.layout.arch.experts and packed:
        problems.add(name, "has experts, whose packed weights no kernel here multiplies yet", advice)
        packed = []
    if any(model.inputs(linear) for linear in packed):
        problems.add(name, "rounds the inputs of linears by itself, which the kernels here do in their own way", advice)
    if model.has_residuals:
        problems.add(name, "has residuals beside its codes, which no kernel here adds yet", advice)
    if any(model.cache_scales(block) for block in model.blocks):
        problems.add(name, "has a quantised cache, which is not supported here yet", advice)
    problems.raise_if_any()
