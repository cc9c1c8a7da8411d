"""Run an artifact as it is stored: a model of transformers whose packed weights stay packed in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint import Checkpoint
from compress.errors import InputError, Problems
from compress.hardware import return_freed_memory
from compress.layout import BlockLayout, Layout
from compress.source import locate_model

if TYPE_CHECKING:
    from torch import Tensor

    from compress.kernels.experts import PackedExperts, Stack
    from compress.kernels.packed import Extras, Packed
    from compress.model import Model
    from compress.numerics.grid import Quantized


def load(name: str | Path, *, digits: int = 2) -> Any:
    """The model in a folder, a hub id or ``demo:NAME``, ready for `generate`, with every quantised weight packed in memory as it is on disk.

    Kernels multiply integers of 2, 3, 4 and 8 bits, with inputs in so many `digits` of 8 bits (`compress.kernels.linear`), and small floats, with
    inputs as they are (`compress.kernels.small`); other weights, and with 0 digits all of them, are unpacked for each product, some rows at a time,
    and take inputs as they are. `explain` says which is which.
    Linears that `nm-packed` holds in V:N:M and floats keep the inputs that they read, and are multiplied by these alone (`compress.kernels.vnm`).
    What the checkpoint says beside its codes - residuals, branches, inputs in 8 bits, a cache in FP8 - is computed as said. Raises
    `InputError` for what is no such checkpoint.

    Casting the model (`half`, `double`, `to`) changes what is computed in between; packed weights stay as they are stored. It can be copied and
    pickled, but not be saved as a checkpoint: copy the folder.
    """
    if digits not in (0, 1, 2):
        raise InputError.one("digits", f"must be 0, 1 or 2, got {digits}")
    return _loaded(locate_model(str(name)), digits)


def reference(folder: Path, *, beside: bool, as_transformers: bool) -> Any:
    """What programs that run an artifact are compared with: `load` in float32 without kernels, which round in their own way.

    It computes with what lies `beside` the weights - residuals and branches - or leaves it out, as every engine but our own does. On request it has
    weights `as_transformers` has them in float32: what that unpacks while it loads them - integers of experts, and all weights of an artifact that
    says `dequantize` - is rounded to the dtype of their scales (seen with 5.23.0).
    """
    return _loaded(folder, 0, beside=beside, as_transformers=as_transformers).float()


def _loaded(folder: Path, digits: int, *, beside: bool = True, as_transformers: bool = False) -> Any:
    from compress.model import Model

    model = Model(Layout(Checkpoint(folder)))
    model = model if beside else model.in_engines()
    try:
        whole = _Loading(model, digits, as_transformers=as_transformers).whole()
    except KeyError as error:
        name = str(error.args[0])
        if name.rpartition(".")[0] not in model.layout.all_linears:
            raise
        raise InputError.one(name, "is missing from the checkpoint", "is the download complete?") from error
    if model.stored.itemsize < model.dtype.itemsize:
        _narrow(whole, model.stored)
    for method in ("save_pretrained", "push_to_hub"):
        setattr(whole, method, partial(_refuse_to_write, method, str(model.checkpoint.folder)))
    return_freed_memory()
    return whole


def _refuse_to_write(method: str, folder: str, *_: Any, **__: Any) -> None:
    raise InputError.one(method, "weights that run packed are not what transformers would write", f"copy or upload {folder} instead")


def explain(model: Any) -> list[dict[str, Any]]:
    """How each part of a model of `load` is computed that transformers alone would compute otherwise.

    Records have the name of the ``module``, what ``part`` it is (`linear`, `experts`, `dense`, `branch`, `cache`, `latents`), how it is ``stored``,
    the ``kernel`` that multiplies by it (`torch` where it is unpacked for each product), and ``why`` torch does it.
    """
    from compress.cache import BUFFERS
    from compress.kernels import native
    from compress.kernels.branch import BranchProduct
    from compress.kernels.dense import DenseLinear
    from compress.kernels.experts import Stack
    from compress.kernels.packed import Packed
    from compress.latents import Latents

    records: list[dict[str, Any]] = []
    for name, module in model.named_modules():
        if isinstance(module, Packed | Stack):
            why = module.why_unpacked(module.stored, module.codes.device)
            part = "experts" if isinstance(module, Stack) else "dense" if isinstance(module, DenseLinear) else "linear"
            records.append({"module": name, "part": part, "stored": module.stored, "kernel": "torch" if why else native.tier(), "why": why})
        elif isinstance(module, BranchProduct):
            stored = f"{module.weight.dtype}, one per {module.run} inputs".removeprefix("torch.")
            records.append({"module": name, "part": "branch", "stored": stored, "kernel": "torch", "why": "no kernel for branches"})
        elif all(hasattr(module, buffer) for buffer in BUFFERS):
            why = "rounded as the checkpoint says, but kept in the dtype of the model"
            records.append({"module": name, "part": "cache", "stored": "fp8", "kernel": "torch", "why": why})
        elif isinstance(module, Latents):
            why = module.why_torch(model.get_submodule(name.rpartition(".")[0]).head_dim, model.device, model.dtype)
            records.append({"module": name, "part": "latents", "stored": f"{module.bits} bits", "kernel": "torch" if why else "triton", "why": why})
    return records


def remarks(model: Any) -> list[str]:
    """What of `explain` those who wait for the model should know, a line each."""
    records = explain(model)
    packed = [record for record in records if record["part"] in ("linear", "experts")]
    lines = []
    if counted := Counter(record["why"] for record in packed if record["why"]):
        reasons = "; ".join(f"{why} ({count})" for why, count in counted.most_common())
        lines.append(f"{counted.total()} of {len(packed)} packed modules are unpacked for each product: {reasons}")
    if caches := Counter(record["why"] for record in records if record["part"] == "cache"):
        lines += [f"the cache of {count} blocks is {why}" for why, count in caches.items()]
    return lines


def stream(model: Any, name: str, prompt: str, tokens: int) -> Iterator[str]:
    """The likeliest continuation of ``prompt`` by ``model``, which `load` made of `name`, in pieces of text as they come."""
    from transformers import TextIteratorStreamer

    from compress.data import Tokenizer

    tokenizer = Tokenizer(locate_model(name)).plain
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError.one("PROMPT", f"is no text in UTF-8 ({error.reason})", "mend its encoding") from error
    given = tokenizer(prompt, return_tensors="pt").to(model.device)
    length, most = given["input_ids"].numel(), model.config.get_text_config().max_position_embeddings
    if not length:
        raise InputError.one("PROMPT", "is empty", "give at least a word")
    if length + tokens > most:
        raise InputError.one(
            "PROMPT", f"has {length} tokens, with {tokens} new ones more than the {most} that the model takes", "shorten one of them"
        )
    pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with ThreadPoolExecutor(1) as pool:
        # The token ids alone: some tokenizers give more than their model takes.
        done = pool.submit(
            model.generate, given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=tokens, do_sample=False, streamer=pieces
        )
        done.add_done_callback(lambda _: pieces.end() if done.exception() else None)
        yield from pieces
        done.result()


class _Loading:
    """Makes the modules that stand for quantised linears of ``model``."""

    def __init__(self, model: Model, digits: int, *, as_transformers: bool) -> None:
        self._model, self._digits = model, digits
        dequantized = model.checkpoint.config.get("quantization_config", {}).get("dequantize", False)
        self._rounded = (set(model.layout.all_linears) if dequantized else model.layout.of_experts) if as_transformers else set()
        problems = Problems()
        for linear in sorted(model.layout.of_experts):
            if model.inputs(linear):
                problems.add(linear, "rounds the inputs of an expert, which is not supported", "open it with transformers")
        problems.raise_if_any()

    def whole(self) -> Any:
        from compress.kernels.branch import Branched

        return self._model.settled(self._linear, self._experts, Branched)

    def _linear(self, name: str, bias: Tensor | None) -> Packed:
        from compress.kernels.memory import place
        from compress.kernels.packed import Extras
        from compress.kernels.vnm import VNMLinear

        if self._model.is_compact(name):
            found: Packed = VNMLinear(self._model.compact(name), Extras(bias))
        else:
            found = self._packed(name, self._quantized(name), Extras(bias, self._model.inputs(name), self._model.residual(name)))
        place(found)
        return found

    def _packed(self, name: str, weight: Quantized, extras: Extras) -> Packed:
        from compress.kernels.linear import PackedLinear
        from compress.kernels.small import SmallLinear
        from compress.kernels.unpacked import ExactLinear, UnpackedLinear

        if not self._digits:
            return ExactLinear(weight, extras, rounded=name in self._rounded)
        if PackedLinear.takes(weight):
            return PackedLinear(weight, extras, self._digits)
        return (SmallLinear if SmallLinear.takes(weight) else UnpackedLinear)(weight, extras)

    def _experts(self, block: BlockLayout, experts: Any) -> PackedExperts:
        from compress.kernels.experts import PackedExperts
        from compress.layout import EXPERTS_IN, EXPERTS_OUT

        stages = {stage.name: [tuple(linear.name for linear in group.linears) for group in stage.groups] for stage in block.stages}
        first, last = stages[EXPERTS_IN], stages[EXPERTS_OUT]
        table = self._model.layout.arch.experts
        assert table
        biases = (self._biases(first), self._biases(last)) if table.biased else (None, None)
        return PackedExperts(self._stack(first), self._stack(last), partial(_gated, experts), interleaved=table.interleaved, biases=biases)

    def _biases(self, experts: list[tuple[str, ...]]) -> Tensor:
        """[experts, out], as `_stack` has the outputs."""
        import torch

        return torch.stack([torch.cat([self._model.read(f"{name}.bias") for name in names]) for names in experts]).to(self._model.dtype)

    def _stack(self, experts: list[tuple[str, ...]]) -> Stack:
        """Of the linears of each expert that read the same input: they become one, the outputs of one after those of the other."""
        from compress.formats import sparse_residual
        from compress.kernels.experts import Stack
        from compress.kernels.memory import place
        from compress.kernels.packed import Extras
        from compress.kernels.residuals import Residuals
        from compress.numerics.grid import below

        members, residuals, alike = [], [], set()
        for names in experts:
            weights = [self._quantized(name) for name in names]
            residuals += [self._model.residual(name) or sparse_residual.none(weight.codes) for name, weight in zip(names, weights, strict=True)]
            members.append(self._packed(names[0], below(weights), Extras()))
            alike |= {(weights[0].grid == weight.grid, members[-1].coding, members[-1].stored) for weight in weights}
        if len(alike) > 1:
            raise InputError.one(experts[0][0], "is stored in another way than other experts of its block", "open it with transformers")
        stack = Stack(members, Residuals(residuals, members[0].out_features) if any(len(each.values) for each in residuals) else None)
        place(stack)
        return stack

    def _quantized(self, name: str) -> Quantized:
        import torch

        from compress.numerics.grid import E4M3

        weight = self._model.quantized(name)
        assert weight is not None
        # Kernels that widen codes bit by bit know no NaN.
        nan = isinstance(weight.grid, E4M3) and bool((weight.codes.view(torch.uint8).bitwise_and(0x7F) == 0x7F).any())
        if nan or not bool(weight.scale.float().isfinite().all()):
            raise InputError.one(name, "holds NaN or infinity", "the artifact is damaged; fetch it again")
        return weight


def _gated(experts: Any, both: Tensor) -> Tensor:
    """What the last linear of ``experts``, those of transformers, is given: a function that can be pickled, as their bound method cannot."""
    found: Tensor = experts._apply_gate(both)
    return found


def _narrow(model: Any, stored: Any) -> None:
    """Keep linears and embeddings in the dtype they are ``stored`` in, where the processor cannot compute in it and nothing is lost."""
    from torch import nn

    from compress.kernels.dense import DenseEmbedding, DenseLinear
    from compress.kernels.memory import placed
    from compress.kernels.packed import Extras

    narrow: dict[int, Tensor] = {}
    for name, module in list(model.named_modules()):
        if type(module) not in (nn.Linear, nn.Embedding):
            continue
        wide = module.weight
        # A head may be the embedding.
        if id(wide) not in narrow:
            narrow[id(wide)] = placed(wide.data.to(stored))
        if not narrow[id(wide)].to(wide.dtype).equal(wide.data):
            continue
        owner, _, leaf = name.rpartition(".")
        linear = isinstance(module, nn.Linear)
        by = DenseLinear(narrow[id(wide)], Extras(module.bias)) if linear else DenseEmbedding(narrow[id(wide)], module.padding_idx, wide.dtype)
        setattr(model.get_submodule(owner), leaf, by)
