"""Fewer bits for the KV cache: fixed FP8 scales, measured on calibration data, or whole numbers of few bits as tokens grow old.

Keys are measured as a cache holds them, after rotation. A scale is the largest magnitude seen, divided by 448, the largest number of E4M3;
a larger one met later saturates. Blocks are measured in order, each with the caches before it quantised already.

Whole numbers need no data (KIVI, arXiv 2402.02750, section 3): keys are coded by channel, after rotation, values by token, in blocks of 32 tokens
once these leave the window of the newest, and never again. Engines have no such cache; `compress.load` runs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.errors import InputError, Problems
from compress.layout import Layout
from compress.options import Options
from compress.scheme import WIDEST, CacheScheme, Caching, LatentScheme, Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from compress.block import Block
    from compress.calibrate import Workspace
    from compress.data import Samples
    from compress.model import Model
    from compress.probe import Probe


class Pass(Options):
    """Give every block one scale for its keys and one for its values, or one for each head; or have old tokens coded in few bits."""

    stage: ClassVar[str] = "cache"

    format: Literal["fp8", "int4", "int2"] = Field(
        default="fp8", description="`fp8`: E4M3, what engines' caches hold; `int4`, `int2`: whole numbers, which only this program runs"
    )
    window: int = Field(default=32, ge=0, le=WIDEST, description="`int4`, `int2`: newest tokens that stay exactly as they are, and up to 31 more")
    granularity: Literal["tensor", "head"] = Field(
        default="tensor", description="what shares a scale: all heads of a block, which every engine reads, or a head each, which SGLang ignores"
    )
    headroom: float = Field(
        default=2.0, ge=1, description="how far beyond the largest magnitude seen the range reaches: a float loses nothing by it, up to 16 and more"
    )

    @property
    def needs_data(self) -> bool:
        """Whether it runs calibration data through the model."""
        return self.format == "fp8"

    def check(self, place: str, layout: Layout, problems: Problems) -> None:
        read = ("granularity", "headroom") if self.format == "fp8" else ("window",)
        for option in sorted(self.model_fields_set & {"granularity", "headroom", "window"} - {*read}):
            problems.add(f"{place}: {option}", f"is no option of {self.format}", "leave it out")
        if self.format != "fp8" and not layout.arch.latent:
            LatentScheme.refuse(place, layout, problems)
        if layout.arch.latent:
            reason = f"a {layout.arch.model_type} caches one latent vector for all heads, neither keys nor values"
            problems.add(place, reason, "leave kv_quant out")

    def plan(self, layout: Layout) -> dict[str, Scheme]:
        return {}

    def cache(self) -> Caching:
        """How the cache is stored."""
        if self.format != "fp8":
            return LatentScheme(keep=None, multiple_of=1, window=self.window, bits=self._bits)
        return CacheScheme(format=self.format, granularity=self.granularity)

    def run(self, model: Model, samples: Samples, workspace: Workspace) -> None:
        from compress.calibrate import visit, walk

        if self.format != "fp8":
            for block in walk(model, workspace):
                self._code(block, model)
            return
        for probe in visit(model, samples, workspace):
            self._calibrate(probe, samples.tokens)

    @property
    def _bits(self) -> int:
        return int(self.format.removeprefix("int"))

    def _code(self, block: Block, model: Model) -> None:
        from compress.latents import Latents

        place = f"{block.layout.prefix}.{model.layout.arch.attention}"
        if block.layout.index in LatentScheme.blocks(model.layout):
            record = {"pass": "kv_quant", "latent_bits": self._bits, "window": self.window, "fallback": None}
            block.set_latents(Latents(None, None, self.window, self._bits, commuting=True), record)
        else:
            block.add_record(place, {"pass": "kv_quant", "kind": "left whole", "fallback": None})

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
