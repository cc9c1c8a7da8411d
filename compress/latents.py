"""Attention over a cache of two branches: recent tokens exactly, older ones as latents (CSKV, arXiv 2409.10593, section 3).

Attention of transformers hands rotated keys and values to its cache, and whatever the cache gives back to an attention function that its
config names. Under `KERNEL` that function leaves the work to what the cache gave back, if that is no tensor. So no module is replaced, and
normalised keys, biases and layouts of linears are nothing special. Keys are turned back before they are projected: only before rotation do they
lie in few directions. Steps of one token on a GPU are those of `compress.kernels.latents`, where there are kernels; all else is torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from compress.errors import InputError, Problems
from compress.kernels import gpu
from compress.kernels import latents as kernels
from compress.kernels.latents import Cut, States
from compress.numerics.blocks import BLOCK, Coding
from compress.numerics.latents import by_head, rotate_back, side_by_side

KERNEL = "compress_latents"
PARTS = ("key_down", "key_up", "value_down", "value_up", "window", "bits", "commuting")
"""Tensors of a `Latents`."""
QUERIES, TOKENS = 256, 1024
"""Queries, and old tokens whose keys are restored, worked on at once."""

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines [rows or 1, tokens, d]."""


class View(Protocol):
    """What a cache gives attention in place of keys and values."""

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """[rows, tokens, query heads, d] for ``query`` [rows, query heads, tokens, d]."""


def attention(module: nn.Module, query: Tensor, key: Any, value: Any, mask: Tensor | None, scaling: float | None = None, **named: Any) -> Any:
    """What transformers calls, under the name `KERNEL`."""
    if isinstance(key, Tensor):
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **named)
    return key.attend(query, mask, query.shape[-1] ** -0.5 if scaling is None else scaling), None


AttentionInterface.register(KERNEL, attention)
AttentionMaskInterface.register(KERNEL, sdpa_mask)


def own_kernel(module: nn.Module) -> None:
    """Have ``module``, attention of transformers, call `attention`; others that share its config are not touched."""
    config = copy(module.config)
    config._attn_implementation = KERNEL  # type: ignore[union-attr]
    module.config = config


class Latents(nn.Module):
    """How the keys and values of a block are kept when they are older than the newest `window` tokens.

    ``key_down`` [key rank, n], ``key_up`` [n, key rank], for values alike; n are the channels of all heads. Where there are none, channels stay as
    they are. Latents are kept as such, or in `bits`: keys by channel over blocks of tokens, values by token. Projections of keys that are `commuting`
    with rotation are of rotated keys.
    """

    key_down: Tensor | None
    key_up: Tensor | None
    value_down: Tensor | None
    value_up: Tensor | None
    turns: Turns
    """Set where it is attached to attention."""

    def __init__(
        self,
        keys: tuple[Tensor, Tensor] | None,
        values: tuple[Tensor, Tensor] | None,
        window: int,
        bits: int = 16,
        commuting: bool = False,
    ) -> None:
        super().__init__()
        for names, projections in ((PARTS[:2], keys), (PARTS[2:4], values)):
            for name, projection in zip(names, projections or (None, None), strict=True):
                self.register_buffer(name, projection)
        self.window, self.bits, self.commuting = window, bits, commuting

    @staticmethod
    def stored(tensors: Mapping[str, Tensor]) -> Latents:
        """The inverse of `tensors`."""
        keys, values = ((tensors[down], tensors[up]) if down in tensors else None for down, up in (PARTS[:2], PARTS[2:4]))
        window, bits, commuting = (int(tensors[name]) for name in PARTS[4:])
        return Latents(keys, values, window, bits, bool(commuting))

    def project_keys(self, keys: Tensor, rotation: Rotation) -> Tensor:
        """[rows, tokens, key rank] of rotated ``keys`` [rows, heads, tokens, d]."""
        exact = keys if self.commuting else rotate_back(keys.float(), *(part.float() for part in rotation))
        states = side_by_side(exact)
        return (states if self.key_down is None else states @ self.key_down.to(states.dtype).T).to(keys.dtype)

    def restore_keys(self, latents: Tensor, heads: int, rotation: Rotation) -> Tensor:
        """About what `project_keys` was given."""
        restored = latents if self.key_up is None else latents @ self.key_up.to(latents.dtype).T
        if not self.commuting:
            # Token by token, so that halves are turned where they lie: for a long context this is most of the work.
            first, second = torch.unflatten(restored, 2, (heads, 2, -1)).unbind(3)
            half = first.shape[3]
            cos, sin = (part[:, :, None, :half] for part in rotation)
            turned = torch.empty_like(restored)
            left, right = torch.unflatten(turned, 2, (heads, 2, -1)).unbind(3)
            torch.mul(first, cos, out=left).addcmul_(second, sin, value=-1)
            torch.mul(second, cos, out=right).addcmul_(first, sin)
            restored = turned
        return by_head(restored, heads)

    @property
    def absorbs(self) -> bool:
        """Whether queries can be told the projection of keys, so that these are never restored."""
        return self.commuting and self.key_up is not None

    def project_queries(self, query: Tensor, heads: int) -> Tensor:
        """[rows, query heads, tokens, key rank], whose products with latents are those of ``query`` with restored keys; for those that `absorbs`."""
        assert self.key_up is not None
        up = torch.unflatten(self.key_up.to(query.dtype), 0, (heads, -1))
        return torch.einsum("rhgtd,hdk->rhgtk", torch.unflatten(query, 1, (heads, -1)), up).flatten(1, 2)

    def project_values(self, values: Tensor) -> Tensor:
        """[rows, tokens, value rank] of ``values`` [rows, heads, tokens, d]."""
        states = side_by_side(values)
        return states if self.value_down is None else states @ self.value_down.to(values.dtype).T

    def summable(self, latents: Tensor, heads: int) -> Tensor:
        """``latents`` of values as [rows, heads or 1, tokens, width], of which attention takes weighted sums."""
        return by_head(latents, heads) if self.value_up is None else latents[:, None]

    def sums(self, summed: Tensor, heads: int) -> Tensor:
        """[rows, query heads, tokens, d] of weighted sums [rows, query heads, tokens, width] of what `summable` gave.

        That the projection is applied to the sums, not to what is summed, spares doing it for every token of the context.
        """
        if self.value_up is None:
            return summed
        up = torch.unflatten(self.value_up.to(summed.dtype), 0, (heads, -1))
        return torch.einsum("rhgtk,hdk->rhgtd", torch.unflatten(summed, 1, (heads, -1)), up).flatten(1, 2)

    def why_torch(self, width: int, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why a step of one token is computed by torch, for heads of `width` channels, or None where it is a kernel's."""
        if device.type != "cuda":
            return f"no kernel for latents on a {device.type}"
        if self.absorbs and self.value_up is not None:
            assert self.key_up is not None
            return kernels.refusal(self.key_up.shape[1], self.value_up.shape[1], self.bits, dtype.itemsize)
        if self.commuting and self.key_up is None and self.value_up is None:
            return kernels.refusal(width, width, self.bits, dtype.itemsize)
        return "old keys have to be restored"

    def codings(self) -> tuple[Coding, Coding] | None:
        """How keys and values are coded, None if they are not."""
        return (Coding(self.bits, along_tokens=True), Coding(self.bits, along_tokens=False)) if self.bits < 16 else None

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What is stored, by local name; projections in `dtype`."""
        numbers = zip(PARTS[4:], (self.window, self.bits, self.commuting), strict=True)
        projections = {name: projection.to(dtype) for name in PARTS[:4] if (projection := getattr(self, name)) is not None}
        return projections | {name: torch.tensor([number], dtype=torch.int32) for name, number in numbers}


def shapes(channels: int, tensors: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """What the shapes of ``tensors``, by local name, have to be, for `channels` of all heads; ranks are those of the projections down."""
    wanted: dict[str, tuple[int, ...]] = dict.fromkeys(PARTS[4:], (1,))
    for down, up in (PARTS[:2], PARTS[2:4]):
        if down in tensors or up in tensors:
            # Of one that is missing or no matrix the other tells the rank.
            told = tensors[down][0] if len(tensors.get(down, ())) == 2 else tensors.get(up, (1,))[-1]
            rank = min(max(1, told), channels)
            wanted |= {down: (rank, channels), up: (channels, rank)}
    return wanted


def check_values(start: str, tensors: Mapping[str, Tensor], problems: Problems) -> None:
    """Report values that no pass writes; names of ``tensors`` begin with `start`."""
    numbers = {part: int(tensors[part]) for part in PARTS[4:]}
    for part, sound, what in (
        ("window", numbers["window"] >= 0, "must be at least 0"), ("bits", numbers["bits"] in (16, 4, 2), "must be 16, 4 or 2"),
        ("commuting", numbers["commuting"] in (0, 1), "must be 0 or 1"),
    ):  # fmt: skip
        if not sound:
            problems.add(start + part, f"{what}, got {numbers[part]}", "fetch the checkpoint again")
    for part in PARTS[:4]:
        if part in tensors and not bool(tensors[part].isfinite().all()):
            problems.add(start + part, "holds NaN or infinity", "the artifact is damaged; fetch it again")


class Turns:
    """Cosines and sines of every position so far, for all blocks: to take them anew at each step costs as much as attention itself.

    ``rotary`` of transformers gives them, [rows, tokens, d], for something of their dtype and positions [rows, tokens].
    """

    def __init__(self, rotary: Callable[[Tensor, Tensor], Rotation]) -> None:
        self._rotary = rotary
        self._table: Rotation | None = None

    def __call__(self, like: Tensor, positions: Tensor) -> Rotation:
        """In the dtype of ``like``."""
        longest = int(positions.max()) + 1
        if self._table is None or len(self._table[0]) < longest or self._table[0].dtype != like.dtype or self._table[0].device != like.device:
            every = torch.arange(1 << (longest - 1).bit_length(), device=like.device)[None]
            cos, sin = self._rotary(like, every)
            self._table = cos[0], sin[0]
        return self._table[0][positions], self._table[1][positions]


def held_bytes(cache: Any) -> int:
    """Memory of every tensor that a cache of transformers holds, each counted with all of the storage behind it."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for layer in cache.layers
        for tensor in (layer.held() if isinstance(layer, LatentLayer) else (layer.keys, layer.values))
        if tensor is not None
    }
    return sum(storages.values())


def _probabilities(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Of ``scores`` [rows, query heads, queries, tokens]; a ``mask`` is bool, or added."""
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, -1, dtype=torch.float32).to(scores.dtype)


def _causal(queries: int, tokens: int, device: torch.device) -> Tensor:
    """[1, 1, queries, tokens] bool: the last query sees all."""
    return torch.ones(queries, tokens, dtype=torch.bool, device=device).tril_(tokens - queries)[None, None]


def _products(query: Tensor, keys: Tensor) -> Tensor:
    """[rows, query heads, queries, tokens], each key head with the several query heads it serves."""
    grouped = torch.unflatten(query, 1, (keys.shape[1], -1)).flatten(2, 3)
    return torch.unflatten(grouped @ keys.transpose(2, 3), 2, (-1, query.shape[2])).flatten(1, 2)


def _weighted(probabilities: Tensor, values: Tensor) -> Tensor:
    """[rows, query heads, queries, d] of ``values`` [rows, heads, tokens, d]."""
    grouped = torch.unflatten(probabilities, 1, (values.shape[1], -1)).flatten(2, 3)
    return torch.unflatten(grouped @ values, 2, (-1, probabilities.shape[2])).flatten(1, 2)


@dataclass(frozen=True)
class Heard:
    """Tells `listener` queries, keys and values, all rotated, and ends there."""

    keys: Tensor
    values: Tensor
    listener: Callable[[Tensor, Tensor, Tensor], None]

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """Of `View`."""
        self.listener(query, self.keys, self.values)
        raise AssertionError("whoever listens ends the forward")


@dataclass(frozen=True)
class Blended:
    """Whole sequences as decoding them token by token finds them: each query sees itself and `window` tokens before it exactly, older ones restored.

    ``keys`` and ``values`` [rows, heads, tokens, d] as they are.
    """

    latents: Latents
    keys: Tensor
    values: Tensor
    rotation: Rotation

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """Of `View`."""
        heads, tokens = self.keys.shape[1:3]
        kept_keys, kept_values = self.latents.project_keys(self.keys, self.rotation), self.latents.project_values(self.values)
        if codings := self.latents.codings():
            kept_keys, kept_values = (coding.round(kept) for coding, kept in zip(codings, (kept_keys, kept_values), strict=True))
        restored = self.latents.restore_keys(kept_keys, heads, self.rotation)
        distance = torch.arange(tokens, device=query.device)[:, None] - torch.arange(tokens, device=query.device)
        seen = mask if mask is not None else _causal(tokens, tokens, query.device)
        parts = []
        for start in range(0, tokens, QUERIES):
            part = slice(start, start + QUERIES)
            old = distance[part] > self.latents.window
            scores = torch.where(old, _products(query[:, :, part], restored), _products(query[:, :, part], self.keys)) * scaling
            probabilities = _probabilities(scores, seen[:, :, part])
            summed = _weighted(probabilities.masked_fill(~old, 0), self.latents.summable(kept_values, heads))
            parts.append(_weighted(probabilities.masked_fill(old, 0), self.values) + self.latents.sums(summed, heads))
        return torch.cat(parts, 2).transpose(1, 2)


class Kept:
    """Latents of old tokens, [rows, tokens, rank], in the order in which they came."""

    def __init__(self, coding: Coding | None) -> None:
        self._coding = coding
        self._rank = 0
        self.parts: tuple[Tensor, ...] = ()
        """Each [rows, ...]; of coded ones the second dimension counts blocks of `BLOCK` tokens."""

    def append(self, latents: Tensor) -> None:
        """``latents`` [rows, tokens, rank]; what was kept before is never coded again."""
        self._rank = latents.shape[2]
        new = (latents,) if self._coding is None else self._coding.encode(latents)
        self.parts = tuple(torch.cat(pair, 1) for pair in zip(self.parts, new, strict=True)) if self.parts else new

    def in_groups(self, groups: int) -> States:
        """All of them, the channels in so many groups."""
        states = self.parts[0] if self._coding is None else self.parts[0].flatten(1, 2)
        return States(by_head(states, groups), self._rank // groups, *(part.contiguous() for part in self.parts[1:]))

    def read(self, start: int, end: int) -> Tensor:
        """Those of some tokens; where they are coded `start` and `end` are at the borders of blocks."""
        if self._coding is None:
            return self.parts[0][:, start:end]
        return self._coding.decode(tuple(part[:, start // BLOCK : -(-end // BLOCK)] for part in self.parts), self._rank)


class LatentLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of transformers' cache: ``keys`` and ``values`` of the newest tokens as attention gave them, latents of those before.

    At least `Latents.window` tokens are exact, and up to `BLOCK` - 1 more, since they leave by blocks. What attention sees of a call is made before
    anything leaves, so a prompt that comes in one piece is computed exactly.
    """

    def __init__(self, latents: Latents) -> None:
        super().__init__()
        self._latents = latents
        self._old = tuple(Kept(coding) for coding in latents.codings() or (None, None))
        self._positions: Tensor | None = None
        self.old_tokens = 0

    def update(self, key_states: Tensor, value_states: Tensor, positions: Tensor | None = None, **_: Any) -> tuple[Any, Any]:
        """Keep new keys and values [rows, heads, tokens, d] at ``positions`` [rows or 1, tokens]; what to attend to, or one `View` twice."""
        if positions is None:
            raise InputError.one("cache", "keeps latents of another model", "begin with no cache")
        if key_states.requires_grad:
            raise InputError.one("cache", "of latents is not differentiable", "compute without gradients, or with use_cache=False")
        positions = positions.expand(len(key_states), -1).to(torch.int32)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values, self._positions = key_states, value_states, positions
        else:
            assert self._positions is not None
            self.keys, self.values = torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)
            self._positions = torch.cat([self._positions, positions], 1)
        given: Any = (self.keys, self.values)
        if self.old_tokens:
            view = Held(self._latents, tuple(copy(kept) for kept in self._old), self._positions, *given)
            given = (view, view)
        leaving = max(0, self.keys.shape[2] - self._latents.window) // BLOCK * BLOCK
        if leaving:
            self._leave(leaving)
        return cast("tuple[Any, Any]", given)

    def _leave(self, count: int) -> None:
        assert self.keys is not None and self.values is not None and self._positions is not None
        keys, values = self.keys[:, :, :count], self.values[:, :, :count]
        positions = self._positions[:, self.old_tokens : self.old_tokens + count]
        self._old[0].append(self._latents.project_keys(keys, self._latents.turns(keys, positions)))
        self._old[1].append(self._latents.project_values(values))
        # A slice would keep the memory of all of it.
        self.keys, self.values = self.keys[:, :, count:].clone(), self.values[:, :, count:].clone()
        self.old_tokens += count

    def held(self) -> Iterator[Tensor]:
        """Every tensor that the cache holds of this layer."""
        if self.is_initialized:
            assert self._positions is not None and self.keys is not None and self.values is not None
            yield from (self.keys, self.values, self._positions, *self._old[0].parts, *self._old[1].parts)

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace everything by what `change` makes of it, whose first dimension is rows."""
        if self.is_initialized:
            assert self._positions is not None and self.keys is not None and self.values is not None
            self.keys, self.values, self._positions = change(self.keys), change(self.values), change(self._positions)
            for kept in self._old:
                kept.parts = tuple(change(part) for part in kept.parts)

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.old_tokens + self.keys.shape[2] if self.is_initialized and self.keys is not None else 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, as many as `tokens_to_remove` is below zero. Raises `InputError` where that reaches into coded blocks."""
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        if tokens_to_remove > 0:
            raise ValueError(f"how many tokens to forget is given as a negative number, got {tokens_to_remove}")
        assert self._positions is not None and self.keys is not None and self.values is not None
        count = min(-tokens_to_remove, self.get_seq_length())
        recent = min(count, self.keys.shape[2])
        if count > recent and self._latents.bits < 16:
            raise InputError.one("cache", f"cannot forget {count} tokens, of which {count - recent} are in coded blocks", "generate without rollback")
        end = self.keys.shape[2] - recent
        self.keys, self.values = self.keys[:, :, :end].clone(), self.values[:, :, :end].clone()
        self._positions = self._positions[:, : self.get_seq_length() - (count - recent)].clone()
        self.old_tokens -= count - recent
        for kept in self._old:
            kept.parts = tuple(part[:, : self.old_tokens].clone() if self._latents.bits == 16 else part for part in kept.parts)

    def reset(self) -> None:
        """Forget everything."""
        self.__init__(self._latents)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows as ``beam_idx`` [rows] says."""
        self._each(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times."""
        self._each(lambda part: part.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some rows."""
        self._each(lambda part: part[indices])

    def offload(self) -> None:
        """To the memory of the processor."""
        self._each(lambda part: part.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Back to where it came from."""
        self._each(lambda part: part.to(self.device, non_blocking=True))


@dataclass(frozen=True)
class Held:
    """What a `LatentLayer` holds: ``keys`` and ``values`` [rows, heads, tokens, d] of the newest tokens, those before in ``old``;
    ``positions`` [rows, tokens] of all."""

    latents: Latents
    old: tuple[Kept, ...]
    positions: Tensor
    keys: Tensor
    values: Tensor

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """Of `View`."""
        if query.shape[2] == 1 and self.latents.why_torch(query.shape[3], query.device, query.dtype) is None:
            return self.by_kernel(query, mask, scaling, gpu.device_of(query.device.index))
        return self.by_torch(query, mask, scaling)

    def by_kernel(self, query: Tensor, mask: Tensor | None, scaling: float, device: gpu.Device, cuts: tuple[Cut, Cut] | None = None) -> Tensor:
        """`attend` for one new token, ``cuts`` as `compress.kernels.latents.cut` says unless told."""
        heads, total = self.keys.shape[1], self.positions.shape[1]
        absorbs = self.latents.absorbs
        old_keys, old_values = (kept.in_groups(1 if absorbs else heads) for kept in self.old)
        summed, recent = kernels.attend(
            query, self.latents.project_queries(query, heads) if absorbs else query, (old_keys, old_values),
            (States(self.keys, self.keys.shape[3]), States(self.values, self.values.shape[3])),
            None if mask is None else mask[..., :total], scaling, self.latents.bits, device, cuts,
        )  # fmt: skip
        return (recent + self.latents.sums(summed, heads)).transpose(1, 2)

    def by_torch(self, query: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """`attend`. Keys of old tokens are restored some at a time, and never all there."""
        heads, total = self.keys.shape[1], self.positions.shape[1]
        count = total - self.keys.shape[2]
        if mask is None and query.shape[2] > 1:
            mask = _causal(query.shape[2], total, query.device)
        parts = []
        for start in range(0, query.shape[2], QUERIES):
            queries = query[:, :, start : start + QUERIES]
            scores = torch.empty(*queries.shape[:3], total, dtype=query.dtype, device=query.device)
            scores[..., count:] = _products(queries, self.keys)
            asked = self.latents.project_queries(queries, heads) if self.latents.absorbs else queries
            for first, last, latents in self._old(0, count, query.dtype):
                if self.latents.absorbs:
                    scores[..., first:last] = _products(asked, latents[:, None])
                else:
                    turn = self.latents.turns(latents, self.positions[:, first:last])
                    scores[..., first:last] = _products(asked, self.latents.restore_keys(latents, heads, turn))
            seen = mask[:, :, start : start + QUERIES, :total] if mask is not None else None
            probabilities = _probabilities(scores.mul_(scaling), seen)
            summed: Tensor | None = None
            for first, last, latents in self._old(1, count, query.dtype):
                part = _weighted(probabilities[..., first:last], self.latents.summable(latents, heads))
                summed = part if summed is None else summed.add_(part)
            assert summed is not None, "without old tokens attention is given tensors"
            parts.append(_weighted(probabilities[..., count:], self.values) + self.latents.sums(summed, heads))
        return torch.cat(parts, 2).transpose(1, 2)

    def _old(self, which: int, count: int, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        """Latents of keys (0) or values (1) of old tokens, some at a time, with the first token and the one after the last."""
        for first in range(0, count, TOKENS):
            last = min(first + TOKENS, count)
            yield first, last, self.old[which].read(first, last).to(dtype)
