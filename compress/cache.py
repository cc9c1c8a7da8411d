"""What attention gets back from a cache in FP8 or of latents, and whether a checkpoint holds all that one takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from compress.checkpoint import FLOATS, LATENT, TensorInfo, read_tensor
from compress.errors import InputError, Problems
from compress.latents import PARTS, Blended, Heard, LatentLayer, Latents, Rotation, Turns, View, check_values, own_kernel, shapes
from compress.layout import Layout
from compress.numerics.cache import as_cached
from compress.scheme import LatentScheme

BUFFERS = ("k_scale", "v_scale")
"""Of attention in a model that is kept whole: the scales of its cache, if that is quantised."""


@dataclass
class Cache:
    """Stands where attention expects its cache: for forwards over whole sequences, or before the one of transformers, `kept`.

    `listener` is told what the cache is given: keys, after rotation, and values, [rows, heads, tokens, head size]. With `scales`, one for
    keys and one for values, attention gets both back as `as_cached` says. With `latents` it gets them as `Blended` does. `queries` is told queries,
    keys, values and the `rotation` of the forward, and has to end it.
    """

    scales: tuple[Tensor, Tensor] | None = None
    listener: Callable[[Tensor, Tensor], None] | None = None
    kept: Any = None
    latents: Latents | None = None
    queries: Callable[..., None] | None = None
    rotation: Rotation | None = None

    @property
    def idle(self) -> bool:
        """Whether attention may as well do without."""
        return self.scales is None and self.listener is None and self.latents is None and self.queries is None

    def update(self, keys: Tensor, values: Tensor, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """What attention of transformers calls."""
        if self.listener:
            self.listener(keys, values)
        if self.queries is not None or self.latents is not None:
            assert self.rotation is not None
            view: View
            if self.queries is not None:
                view = Heard(keys, values, partial(self.queries, rotation=self.rotation))
            else:
                assert self.latents is not None
                view = Blended(self.latents, keys, values, self.rotation)
            return view, view  # type: ignore[return-value]
        if self.scales is not None:
            keys, values = as_cached(keys, self.scales[0]), as_cached(values, self.scales[1])
        return (keys, values) if self.kept is None else self.kept.update(keys, values, *more, **named)


@dataclass(frozen=True)
class Latent:
    """Stands before transformers' cache `kept` for one call of attention."""

    latents: Latents
    kept: Any
    positions: Tensor

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """What attention of transformers calls. Raises `InputError` for caches that are not of layers that grow."""
        layers = self.kept.layers
        while self.kept.layer_class_to_replicate is not None and len(layers) <= layer:
            layers.append(self.kept.layer_class_to_replicate())
        if not isinstance(layers[layer], LatentLayer):
            if type(layers[layer]) is not DynamicLayer or layers[layer].is_initialized:
                kind = type(layers[layer]).__name__
                raise InputError.one("cache", f"a {kind} of transformers keeps no latents", "leave cache_implementation out, and begin with no cache")
            layers[layer] = LatentLayer(self.latents)
        found: tuple[Any, Any] = self.kept.update(keys, values, layer, self.positions)
        return found


def attach_scales(attention: nn.Module, scales: tuple[Tensor, Tensor]) -> None:
    """Have ``attention`` of transformers read its cache as FP8 under ``scales``, which become its buffers."""
    for name, scale in zip(BUFFERS, scales, strict=True):
        attention.register_buffer(name, scale)
    attention.register_forward_pre_hook(_before, with_kwargs=True)


def attach_latents(attention: nn.Module, latents: Latents, turns: Turns) -> None:
    """Have ``attention`` of transformers keep old tokens as ``latents``, which become a module of it; blocks of a model share ``turns``."""
    latents.turns = turns
    attention.latents = latents
    own_kernel(attention)
    attention.register_forward_pre_hook(_before, with_kwargs=True)


def _before(attention: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Put what the checkpoint says of the cache before the one of transformers; without one there are no old tokens, but numbers are rounded."""
    kept, latents = named.get("past_key_values"), getattr(attention, "latents", None)
    if latents is None:
        keys, values = (attention.get_buffer(name) for name in BUFFERS)
        return given, named | {"past_key_values": Cache((keys, values), kept=kept)}
    return given, named if kept is None else named | {"past_key_values": Latent(latents, kept, named["position_ids"])}


def check_scales(layout: Layout, tensors: Mapping[str, TensorInfo], problems: Problems) -> None:
    """Whether all scales that config.json speaks of are there and are scales."""
    for name in sorted(layout.cache_scales):
        info = tensors.get(name)
        if info is None:
            problems.add(name, "is missing from the checkpoint, though config.json says that the cache is quantised", "is the download complete?")
        elif info.dtype not in FLOATS or info.shape not in ((1,), (layout.kv_heads, 1, 1)):
            problems.add(name, f"is {info.dtype} {list(info.shape)}, which is no scale of a tensor or of heads", "this variant is not supported")


def check_latents(layout: Layout, tensors: Mapping[str, TensorInfo], problems: Problems) -> None:
    """Whether each block that is to keep latents has all they take, in shapes and dtypes that fit together."""
    for block in layout.blocks:
        start = f"{block.prefix}.{layout.arch.latents}."
        found = {name.removeprefix(start): tensors[name] for name in block.tensors if name in layout.latents}
        if not found and (layout.checkpoint.wrapped_as != LATENT or block.index not in LatentScheme.blocks(layout)):
            continue
        before = len(problems)
        wanted = shapes(layout.cached_channels // 2, {part: info.shape for part, info in found.items()})
        for part in sorted(found.keys() | wanted.keys()):
            if part not in found:
                problems.add(start + part, "is missing from the checkpoint", "is the download complete?")
            elif part not in wanted:
                problems.add(start + part, "is not accounted for", "this variant is not supported")
            elif found[part].shape != wanted[part]:
                problems.add(start + part, f"has the shape {list(found[part].shape)}, not {list(wanted[part])}", "fetch the checkpoint again")
            elif found[part].dtype not in (FLOATS if part in PARTS[:4] else ("I32",)):
                problems.add(start + part, f"is {found[part].dtype}, which is none of its dtypes", "fetch the checkpoint again")
        if len(problems) == before:
            check_values(start, {part: read_tensor(info) for part, info in found.items()}, problems)
    if layout.latents:
        LatentScheme.refuse("config.json", layout, problems)
