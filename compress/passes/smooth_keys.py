"""Fold factors per channel of keys into the weights, so that no channel stands out in a cache (SmoothAttention: QServe, arXiv 2405.04532, 4.2).

Keys are divided by them, and queries multiplied. Rotary embedding turns channels i and i + d / 2 of a head together, so both have one factor; query
heads have those of the head of keys they read. Factors are powers of two, which every dtype takes without rounding: scores stay what they were, and
so do codes of weights whose scales are for outputs or groups of inputs. Where keys are normalised, the weights of the norms take them.

A coding with a scale for all channels of a token gains, as engines have it in their caches of whole numbers. One with a scale for each channel,
like `kv_quant`'s own, does not notice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from compress.errors import InputError, Problems
from compress.layout import Layout
from compress.passes.base import Transform

if TYPE_CHECKING:
    from torch import Tensor

    from compress.block import Block
    from compress.calibrate import Workspace
    from compress.data import Samples
    from compress.model import Model
    from compress.probe import Probe


class Pass(Transform):
    """Divide channels of keys, multiply those of queries."""

    needs_data: ClassVar[bool] = True
    verb: ClassVar[str] = "folded"

    strength: float = Field(default=0.5, gt=0, le=1, description="exponent of the largest magnitudes of keys; 1 makes all channels equally large")

    def check(self, place: str, layout: Layout, problems: Problems) -> None:
        kind, config = layout.arch.model_type, layout.text_config
        rope = config.get("rope_parameters") or {}
        if layout.arch.latent:
            problems.add(place, f"a {kind} makes keys of one latent vector for all heads", "leave smooth_keys out")
        elif rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1):
            problems.add(place, "rotary embedding turns only a part of each head", "leave smooth_keys out")

    def run(self, model: Model, samples: Samples, workspace: Workspace) -> None:
        from compress.calibrate import visit

        for probe in visit(model, samples, workspace):
            self._fold(probe, model)

    def _fold(self, probe: Probe, model: Model) -> None:
        import torch

        from compress.numerics.scaling import tied

        block, arch = probe.block, model.layout.arch
        attention = f"{block.layout.prefix}.{arch.attention}"
        largest = torch.stack(probe.of_cache(lambda keys, _: keys.abs().amax((0, 2)).float())).amax(0)
        if not largest.isfinite().all():
            raise InputError.one(block.layout.prefix, "keys are not finite on the calibration data", "is the model sound?")
        query, key = (_makers(block, attention, norm, linear) for norm, linear in zip(("q_norm", "k_norm"), arch.scores, strict=True))
        if any(len(tensor) == block.head_dim for tensor in key.values()):  # a norm of heads has the same weights for all
            largest = largest.amax(0, keepdim=True)
        wanted = tied(largest, self.strength)
        fits = torch.ones_like(wanted, dtype=torch.bool)
        for name, tensor, by in [(name, query[name], wanted) for name in query] + [(name, key[name], 1 / wanted) for name in key]:
            fits &= _peaks(tensor, wanted) * by < torch.finfo(block.source_dtype(name)).max / 2
        half = wanted.shape[1] // 2
        factor = torch.where(fits & fits.roll(half, 1), wanted, 1.0)
        for name, tensor in query.items():
            block.set_dense(name, tensor * _rows(factor, tensor))
        for name, tensor in key.items():
            block.set_dense(name, tensor / _rows(factor, tensor))
        record = {"pass": "smooth_keys", "kind": "keys", "strength": self.strength, "factors": [float(factor.min()), float(factor.max())]}
        block.add_record(f"{attention}.keys", record | {"left_alone": int((factor != wanted).sum()), "fallback": None})


def _makers(block: Block, attention: str, norm: str, linear: str) -> dict[str, Tensor]:
    """What makes queries, or keys, as large as they are, by name: weights of a norm, or else of a linear, and its bias. Rows are channels."""
    names = [f"{attention}.{norm}.weight"]
    if names[0] not in block.layout.tensors:  # of two factors the second makes the channels
        names = [f"{block.layout.prefix}.{linear}{factor}.{part}" for factor in ("", ".1") for part in ("weight", "bias")]
    return {name: block.tensor(name) for name in names if name in block.layout.tensors}


def _rows(factor: Tensor, tensor: Tensor) -> Tensor:
    """``factor`` [heads, d] for the rows of ``tensor`` [heads or query heads * d, ...]."""
    rows = factor.repeat_interleave(len(tensor) // factor.numel(), 0).flatten()
    return rows if tensor.ndim == 1 else rows[:, None]


def _peaks(tensor: Tensor, factor: Tensor) -> Tensor:
    """The largest magnitude, [heads, d], in the rows that each of ``factor`` is for."""
    rows = tensor.abs() if tensor.ndim == 1 else tensor.abs().amax(1)
    return rows.view(len(factor), -1, factor.shape[1]).amax(1)
