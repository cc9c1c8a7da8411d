"""Open an artifact as its users will, with plain transformers, and compare it with the model that was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from compress.checkpoint import Checkpoint
from compress.data import Sample, Samples, Tokenizer
from compress.errors import InputError
from compress.evaluate.scoring import last_hidden
from compress.hardware import return_freed_memory
from compress.layout import Layout
from compress.model import Model
from compress.numerics.sparsity import violations

PROBE = "The quick brown fox jumps over the lazy dog, and the model that was compressed must still say the same as before."
TOLERANCE = 2.0**-7
"""Of the largest logit. Both sides compute in one dtype, but kernels may sum in another order; a wrong weight is far beyond it."""

TOLERANCE_BFLOAT16 = 2.0**-4
"""The same where one side computes in bfloat16 and the other need not."""


def verify_patterns(model: Model, folder: Path) -> dict[str, Any]:
    """Count, in the files of an artifact, whether every linear that was pruned keeps what its pattern promises.

    Raises AssertionError if one does not: no pass may put back what was removed.
    """
    written = Model(Layout(Checkpoint(folder)))
    kept = total = 0
    for linear, pattern in model.patterns.items():
        weight = written.dense(linear)
        if broken := violations(weight, pattern):
            raise AssertionError(f"{linear} has {broken} groups in {folder} that are not {pattern}")
        kept, total = kept + int(weight.count_nonzero()), total + weight.numel()
    return {"pruned_linears": len(model.patterns), "pruned_density": kept / total}


@torch.no_grad()
def compare_logits(model: Model, folder: Path, tokenizer: Tokenizer, *, bfloat16_only: bool) -> dict[str, Any]:
    """Load `folder` with transformers alone and compare next-token logits with those of `model`; on request in bfloat16, whatever the model is in.

    Raises `InputError` if they differ by more than rounding, if a weight was not found or if one was invented. Where transformers unpacks
    weights while it loads them, it ignores the scales of a quantised cache; then both compute with an exact one, and the result says so.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto: Any = AutoModelForImageTextToText if model.layout.arch.image else AutoModelForCausalLM
    declared = Checkpoint(folder).config.get("quantization_config", {})
    dtype, tolerance = (torch.bfloat16, TOLERANCE_BFLOAT16) if bfloat16_only else (model.dtype, TOLERANCE)
    # Experts one after the other, as blocks have them: in another order sums differ in a bit, which a rounded cache makes a step of.
    order = {"experts_implementation": "eager"} if model.layout.arch.experts else {}
    opened, info = auto.from_pretrained(folder, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True, **order)
    cache_ignored = bool(declared.get("kv_cache_scheme") and declared.get("dequantize"))
    if cache_ignored:
        info["unexpected_keys"] = [name for name in info["unexpected_keys"] if not name.endswith(model.layout.arch.cache_scales)]
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            raise InputError.one(str(folder), f"transformers reports {kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[:3]}", "report this")
    for parameter in opened.parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.to(dtype)  # it leaves unpacked experts in the dtype of their scales
    ids = tokenizer.encode(PROBE)
    theirs = opened.to(model.device)(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0].float()
    outside = model.outside_difference(opened, None if declared.get("dequantize") else dtype)
    if outside is not None and not outside <= tolerance:
        what = f"transformers has other linears outside the decoder blocks than meant (off by {outside:.2e} of the largest output)"
        raise InputError.one(str(folder), what, "report this")
    del opened
    return_freed_memory()
    with model.as_transformers(None if declared.get("dequantize") else dtype, exact_cache=cache_ignored):
        ours = model.logits(last_hidden(model, Samples("probe", (Sample.of(ids),)))[0][0])
    by_position = (ours - theirs).abs().amax(-1) / ours.abs().max()
    difference = float(by_position.max())
    # In two dtypes rounding decides between experts that are nearly tied, and that position differs; a wrong weight differs everywhere.
    decisive = float(by_position.median()) if model.layout.arch.experts and bfloat16_only else difference
    if not decisive <= tolerance:
        raise InputError.one(str(folder), f"transformers computes other logits than meant (off by {decisive:.2e} of the largest)", "report this")
    ignored = {"kv_cache": "ignored by transformers, so compared with an exact one"} if cache_ignored else {}
    beyond = {} if outside is None else {"outside_max_difference": outside}
    return {"logits_max_difference": difference} | beyond | ignored
