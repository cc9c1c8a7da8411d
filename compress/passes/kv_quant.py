"""Fixed FP8 scales for the KV cache, measured on calibration data: half the memory of a 16-bit cache at next to no loss.

Keys are measured as a cache holds them, after rotation. A scale is the largest magnitude seen, divided by 448, the largest number of E4M3;
a larger one met later saturates. Blocks are measured in order, each with the caches before it quantised already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.errors import InputError, Problems
from compress.layout import Layout
from compress.options import Options
from compress.scheme import CacheScheme, Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from compress.calibrate import Workspace
    from compress.data import Samples
    from compress.model import Model
    from compress.probe import Probe


class Pass(Options):
    """Give every block one scale for its keys and one for its values, or one for each head."""

    stage: ClassVar[str] = "cache"
    needs_data: ClassVar[bool] = True

    format: Literal["fp8"] = Field(default="fp8", description="`fp8`: E4M3, what engines' caches hold")
    granularity: Literal["tensor", "head"] = Field(
        default="tensor", description="what shares a scale: all heads of a block, which every engine reads, or a head each, which SGLang ignores"
    )
    headroom: float = Field(
        default=2.0, ge=1, description="how far beyond the largest magnitude seen the range reaches: a float loses nothing by it, up to 16 and more"
    )

    def check(self, place: str, layout: Layout, problems: Problems) -> None:
        if layout.arch.latent:
            reason = f"a {layout.arch.model_type} caches one latent vector for all heads, neither keys nor values"
            problems.add(place, reason, "leave kv_quant out")

    def plan(self, layout: Layout) -> dict[str, Scheme]:
        return {}

    def cache(self) -> CacheScheme:
        """How the cache is stored."""
        return CacheScheme(format=self.format, granularity=self.granularity)

    def run(self, model: Model, samples: Samples, workspace: Workspace) -> None:
        from compress.calibrate import visit

        for probe in visit(model, samples, workspace):
            self._calibrate(probe, samples.tokens)

    def _calibrate(self, probe: Probe, tokens: int) -> None:
        import torch

        from compress.numerics.cache import errors, ranges, scale_for, squares

        largest = torch.stack(probe.of_cache(lambda keys, values: torch.stack([ranges(keys), ranges(values)]))).amax(0)
        if not largest.isfinite().all():
            raise InputError.one(probe.block.layout.prefix, "keys or values are not finite on the calibration data", "is the model sound?")
        if self.granularity == "tensor":
            largest = largest.amax(1, keepdim=True)
        shape = (1,) if self.granularity == "tensor" else (-1, 1, 1)
        scales = [scale_for(each * self.headroom).view(shape) for each in largest]

        def lost(*states: Tensor) -> Tensor:
            return torch.stack([torch.stack([errors(each, scale), squares(each)]) for each, scale in zip(states, scales, strict=True)])

        sums = torch.stack(probe.of_cache(lost)).sum(0).clamp_min(1e-30)
        key_error, value_error = (sums[:, 0] / sums[:, 1]).tolist()
        record = {"pass": "kv_quant", "tokens": tokens, "granularity": self.granularity, "key_error": key_error, "value_error": value_error}
        probe.block.set_cache_scales(scales[0], scales[1], record)
