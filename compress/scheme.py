"""How a linear is stored: what passes that quantise decide, passes before them prepare for, and exports write."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from compress.errors import Problems
from compress.formats.sizes import residual_bytes, stored_bytes
from compress.layout import Layout, Linear

if TYPE_CHECKING:
    import torch

    from compress.numerics.activations import Activations
    from compress.numerics.grid import Grid

FLOAT_FORMATS: dict[str, dict[str, Any]] = {
    "fp8": {"bits": 8, "group_size": "channel", "symmetric": True},
    "fp8-block": {"bits": 8, "group_size": 128, "symmetric": True, "scales": "minmax"},
    "mxfp8": {"bits": 8, "group_size": 32, "symmetric": True},
    "mxfp4": {"bits": 4, "group_size": 32, "symmetric": True},
    "nvfp4": {"bits": 4, "group_size": 16, "symmetric": True},
}
"""What a format of small floats leaves no choice about."""
LAYOUTS = {
    "fp8": "float-quantized",
    "fp8-block": "float-quantized",
    "mxfp8": "mxfp8-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
}
NVFP4_ROOM = 1.75
"""How much wider than its largest weight needs a block's scale may become before E4M3 ends."""


class Scheme(BaseModel):
    """How one linear is stored, and how its input is rounded before it is multiplied."""

    model_config = ConfigDict(frozen=True)

    format: str = "int"
    bits: int
    group_size: int
    symmetric: bool
    activations: str = "none"
    residuals: float = 0.0
    """Share of the weights, over all linears that may have any, that have a residual beside their code."""

    @property
    def coded(self) -> Scheme:
        """The scheme without residuals."""
        return self.model_copy(update={"residuals": 0.0})

    @property
    def layout(self) -> str:
        """The name of the layout on disk, residuals aside."""
        if self.format == "int":
            return "int-quantized" if self.bits == 8 and self.symmetric and self.activations != "none" else "pack-quantized"
        return LAYOUTS[self.format]

    def stored_bytes(self, linear: Linear, dense_bytes: int) -> int:
        """What `linear` takes on disk; ``dense_bytes`` per weight in the source."""
        size = stored_bytes(
            self.layout, linear.rows, linear.columns, self.bits, self.group_size,
            symmetric=self.symmetric, scale_bytes=dense_bytes, scale_rows=self.scale_rows,
        )  # fmt: skip
        if self.residuals:
            size += residual_bytes(linear.rows, linear.columns, round(self.residuals * linear.rows * linear.columns), dense_bytes)
        return size + (dense_bytes if self.activations == "static" else 0)

    @property
    def shape_bytes(self) -> int:
        """Those of `stored_bytes` that are not the weight's, but tell its shape."""
        return 16 if self.layout == "pack-quantized" else 0

    @property
    def scale_rows(self) -> int:
        """Outputs that share a scale."""
        return self.group_size if self.format == "fp8-block" else 1

    @property
    def text(self) -> str:
        """For people: `4 bits, group 128, asymmetric`."""
        stored = f"{self.bits} bits, group {self.group_size}{'' if self.symmetric else ', asymmetric'}" if self.format == "int" else self.format
        stored += f", residuals for {100 * self.residuals:g} %" if self.residuals else ""
        return stored + ("" if self.activations == "none" else f", inputs in 8 bits ({self.activations})")

    def grid(self, peak: float) -> Grid:
        """The points of a weight; ``peak`` is the largest magnitude among all linears that are fused with it."""
        from compress.numerics.grid import E2M1, E4M3, E4M3_MAX, Integer

        match self.format:
            case "int":
                return Integer(self.bits, self.symmetric)
            case "nvfp4":
                widest = NVFP4_ROOM * max(peak, 1e-30) / 6
                return E2M1(2.0 ** math.floor(math.log2(E4M3_MAX / widest)))
            case "mxfp4":
                return E2M1()
            case _:
                return E4M3(self.scale_rows)

    def stored(self, dense: torch.dtype) -> torch.dtype:
        """The dtype of scales; ``dense`` that of the weight in the source."""
        import torch

        return {"nvfp4": torch.float8_e4m3fn, "mxfp4": torch.float8_e8m0fnu, "mxfp8": torch.float8_e8m0fnu}.get(self.format, dense)

    def input_rounding(self, peak: float | None, dense: torch.dtype) -> Activations | None:
        """How inputs are rounded; ``peak`` is the largest magnitude seen of them, needed where the scale is fixed beforehand."""
        from compress.numerics.activations import Activations

        if self.activations == "none":
            return None
        kind: Literal["int8", "fp8"] = "int8" if self.format == "int" else "fp8"
        if self.activations == "dynamic":
            return Activations(kind, self.group_size if self.format == "fp8-block" else None)
        assert peak is not None
        return Activations(kind, None, Activations.static_scale(kind, peak, dense))


class CacheScheme(BaseModel):
    """How keys and values are stored: E4M3 with a scale for all heads of a block, or for each."""

    model_config = ConfigDict(frozen=True)

    format: Literal["fp8"]
    granularity: Literal["tensor", "head"]

    @property
    def text(self) -> str:
        """For people."""
        return f"{self.format}, a scale per {'block' if self.granularity == 'tensor' else 'head'}"

    def added_bytes(self, layout: Layout) -> int:
        """Of the scales."""
        return 4 * len(layout.blocks) * len(layout.arch.cache_scales) * (1 if self.granularity == "tensor" else layout.kv_heads)


WIDEST = 1 << 24
"""The longest window there may be, in tokens."""
SPINNING = ("dynamic", "longrope")
"""Kinds of rotation whose frequencies depend on how long a text has become: what was rotated by others cannot be turned back."""


class LatentScheme(BaseModel):
    """Keys and values older than the newest `window` tokens in `bits`, as latents that have the share `keep` of their channels; None, all of them."""

    model_config = ConfigDict(frozen=True)

    keep: float | None
    multiple_of: int
    window: int
    bits: int

    @property
    def text(self) -> str:
        """For people."""
        what = "all channels" if self.keep is None else f"latents of {100 * self.keep:g} % of the channels"
        return f"{what}{f' in {self.bits} bits' if self.bits < 16 else ''}, the newest {self.window} tokens exactly"

    @staticmethod
    def refuse(place: str, layout: Layout, problems: Problems) -> None:
        """Report what keeps the cache of a model from keeping old tokens in another way than attention gave them."""
        kind = layout.arch.model_type
        remedy = f"leave {place.rpartition('.')[2]} out"
        if layout.arch.kernel != "sdpa":
            problems.add(place, f"attention of a {kind} needs a kernel of its own ({layout.arch.kernel}), which knows no latents", remedy)
        rotation = layout.text_config.get("rope_parameters") or layout.text_config.get("rope_scaling") or {}
        turned = rotation.get("rope_type", rotation.get("type"))
        if turned in SPINNING:
            problems.add(place, f"rotation of the kind {turned} changes as a text grows, so keys cannot be turned back", remedy)
        if "mrope_section" in rotation:
            problems.add(place, f"a {kind} turns keys by three positions at once, which is not supported", remedy)
        if not LatentScheme.blocks(layout):
            problems.add(place, "attention of every block has a window, so no cache grows", remedy)

    @staticmethod
    def blocks(layout: Layout) -> list[int]:
        """Numbers of the blocks it is for: those whose attention looks back without end."""
        return [index for index, window in enumerate(layout.windows) if window is None]

    def channels(self, layout: Layout) -> int:
        """Of latents, of keys and values of all blocks together."""
        if self.keep is None:
            return 0
        return int(self.keep * layout.cached_channels // 2 // self.multiple_of) * self.multiple_of * 2 * len(self.blocks(layout))

    def added_bytes(self, layout: Layout) -> int:
        """Of the projections, there and back, and three numbers per block."""
        block = layout.blocks[0]
        dense = dense_bytes(layout, next(block.linears).name)
        return dense * 2 * self.channels(layout) * (layout.cached_channels // 2) + 12 * len(self.blocks(layout))


Caching = CacheScheme | LatentScheme
"""What becomes of keys and values."""


def dense_bytes(layout: Layout, linear: str) -> int:
    """Of a weight of a linear in the source."""
    return layout.checkpoint.tensors[f"{linear}.weight"].nbytes // (layout.all_linears[linear].rows * layout.all_linears[linear].columns)


def output_bytes(layout: Layout, plan: Mapping[str, Scheme], cache: Caching | None = None) -> int:
    """Bytes of all tensors of the artifact, but for those that transforms add."""
    total = layout.checkpoint.nbytes + (cache.added_bytes(layout) if cache else 0)
    for name, scheme in plan.items():
        linear, info = layout.all_linears[name], layout.checkpoint.tensors[f"{name}.weight"]
        assert info.shape == (linear.rows, linear.columns)
        total += scheme.stored_bytes(linear, dense_bytes(layout, name)) - info.nbytes
    return total
