"""How fast an artifact runs here, beside how fast this machine reads memory, which is what decoding one sequence can hope for at most."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from compress.checkpoint import Checkpoint
from compress.errors import InputError
from compress.layout import Layout
from compress.source import locate_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

REPEATS = 3
READS = 5
PROMPT = 16
PREFILL = 512
LEAST_READ = 256 << 20


def measure(name: str, tokens: int, threads: int | None = None) -> dict[str, Any]:
    """Decode so many `tokens` after a short prompt, three times; read 512 tokens at once, three times; read memory, five times: medians of all.

    `threads` are those to compute with, by default as many as torch takes, at most as many as there are processors. What decoding reads is each
    weight once per token, of experts the share that is chosen, of the embedding nothing.
    """
    import torch

    from compress import runtime
    from compress.kernels import memory, native
    from compress.latents import held_bytes

    check_threads(threads)
    layout = Layout(Checkpoint(locate_model(name)))
    model = runtime.load(name)
    config = model.config.get_text_config()
    most = int(getattr(config, "max_position_embeddings", PROMPT + tokens))
    if PROMPT + tokens > most:
        raise InputError.one("--tokens", f"must be at most {most - PROMPT}, which is what the model takes after a prompt of {PROMPT}, got {tokens}")
    with computing_on(threads), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, config.vocab_size, (1, min(PREFILL, most)), generator=generator).to(model.device)
        steps = [seconds for repeat in range(REPEATS + 1) for seconds in _decode(model, ids[:, :PROMPT], tokens) if repeat]
        prefill = _seconds(lambda: model(input_ids=ids, use_cache=True), REPEATS)
        held = held_bytes(model(input_ids=ids, use_cache=True).past_key_values)
        read, cache = read_bytes(model, layout), cache_bytes()
        data = memory.empty(max(LEAST_READ, 2 * cache) // 8, dtype=torch.int64).fill_(1).to(model.device)
        why = f"the model is on {model.device}" if model.device.type != "cpu" else native.missing_why()
        reads = _seconds(data.sum if why else lambda: native.read(data, torch.get_num_threads()), READS)
        used = torch.get_num_threads()
    step, roofline = median(steps), data.nbytes / median(reads)
    remarks = runtime.remarks(model)
    if why:
        remarks.append(f"memory was read by torch's sum: {why}")
    if read < cache:
        remarks.append("what a token reads fits into the processor's cache, which is faster than memory: the roofline does not bind")
    return {
        "model": name,
        "kernel": native.tier(),
        "threads": used,
        "decode": {"tokens": tokens, "repeats": REPEATS, "tokens_per_second": 1 / step, "bytes_per_token": read, "bytes_per_second": read / step},
        "roofline": {"bytes_per_second": roofline, "by": "torch" if why else "kernel", "fraction": read / step / roofline},
        "prefill": {"tokens": ids.shape[1], "repeats": REPEATS, "tokens_per_second": ids.shape[1] / median(prefill)},
        "cache": {"tokens": ids.shape[1], "held_bytes": held, "bytes_per_token": held / ids.shape[1]},
        "memory": {"resident_bytes": resident_bytes(model), "file_bytes": layout.checkpoint.nbytes},
        "remarks": remarks,
    }


def resident_bytes(model: Any) -> int:
    """Of all weights of ``model``, those that share memory counted once."""
    held = {data.untyped_storage().data_ptr(): data.untyped_storage().nbytes() for data in (*model.parameters(), *model.buffers())}
    return sum(held.values())


def read_bytes(model: Any, layout: Layout) -> int:
    """What decoding a token reads of the weights of ``model``."""
    from torch import nn

    arch, config = layout.arch, model.config.get_text_config()
    decoder, experts = arch.module_blocks.rpartition(".")[0], arch.experts
    total = 0.0
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or not name.startswith((decoder, arch.outside.head[1])):
            continue
        own = sum(data.nbytes for data in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
        routed = experts is not None and f".{experts.module}." in f"{name}."
        total += own * (getattr(config, experts.active) / getattr(config, experts.counts[0]) if experts and routed else 1)
    return round(total)


def check_threads(threads: int | None) -> None:
    """Raise `InputError` for more than there are processors."""
    if threads is not None and threads > (most := processors()):
        raise InputError.one("--threads", f"must be at most {most}, the processors that this program may use, got {threads}")


def processors() -> int:
    """Those that this program may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_bytes() -> int:
    """Of the last level, as far as the system says."""
    try:
        return max(0, os.sysconf("SC_LEVEL3_CACHE_SIZE"))
    except (ValueError, OSError):
        return 0


def _decode(model: Any, ids: Tensor, tokens: int) -> list[float]:
    """Seconds of each token but the first, which the prompt gives."""
    given = model(input_ids=ids, use_cache=True)
    cache, seconds = given.past_key_values, []
    for _ in range(tokens):
        ids, start = given.logits[:, -1:].argmax(-1), _now()
        given = model(input_ids=ids, past_key_values=cache, use_cache=True)
        seconds.append(_now() - start)
    return seconds


def _seconds(work: Callable[[], Any], repeats: int) -> list[float]:
    """Of each time but the first, which warms up."""
    found = []
    for _ in range(repeats + 1):
        start = _now()
        work()
        found.append(_now() - start)
    return found[1:]


def _now() -> float:
    """The time, once all work is done that was begun."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter()


@contextmanager
def computing_on(count: int | None) -> Iterator[None]:
    """While inside, torch and the kernels compute on so many threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
