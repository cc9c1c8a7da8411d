"""Decoding behind a cache of latents, in Triton's interpreter; `test_triton` starts these tests in a process where $TRITON_INTERPRET is set."""

from __future__ import annotations

import pytest
import torch
from oracles import latents as oracle
from torch import Tensor

from compress.kernels.gpu import Device
from compress.kernels.latents import Cut
from compress.latents import Held, Kept, Latents
from compress.numerics.blocks import BLOCK

DEVICE = Device("any", 32, 4)
WIDTH = 12  # no power of two
ONE = Cut(BLOCK, 1, 1, 1)


def held(
    *, heads: int = 2, each: int = 2, old: int = 2 * BLOCK, new: int = 5, rows: int = 1, ranks: tuple[int, int] | None = (10, 7), bits: int = 16,
    dtype: torch.dtype = torch.float32, width: int = WIDTH,
) -> tuple[Held, Tensor]:  # fmt: skip
    """A cache of random states, and the query of one token for `each` times the heads; without ``ranks`` all channels are kept."""
    channels = heads * width

    def pair(rank: int) -> tuple[Tensor, Tensor]:
        return torch.randn(rank, channels) / channels**0.5, torch.randn(channels, rank) / rank**0.5

    latents = Latents(ranks and pair(ranks[0]), ranks and pair(ranks[1]), new, bits, commuting=True).to(dtype)
    latents.turns = lambda *_: (torch.empty(0), torch.empty(0))  # type: ignore[assignment]  # of keys that are not turned
    kept = tuple(Kept(coding) for coding in latents.codings() or (None, None))
    for one, rank in zip(kept, ranks or (channels, channels), strict=True):
        one.append((torch.randn(rows, old, rank) + torch.randn(rank)).to(dtype))
    keys, values = (torch.randn(rows, heads, new, width).to(dtype) for _ in range(2))
    positions = torch.arange(old + new).expand(rows, -1)
    return Held(latents, kept, positions, keys, values), torch.randn(rows, heads * each, 1, width).to(dtype)


def expected(view: Held, query: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    count, total = view.positions.shape[1] - view.keys.shape[2], view.positions.shape[1]
    ups = view.latents.key_up, view.latents.value_up
    found = []
    for row in range(len(query)):
        old = [kept.read(0, count)[row].double() for kept in view.old]
        old = [states if up is None else states @ up.double().T for states, up in zip(old, ups, strict=True)]
        hidden = torch.zeros(total, dtype=torch.bool) if mask is None else mask[row, 0, 0, :total]
        hidden = ~hidden if mask is not None and mask.dtype == torch.bool else hidden < 0
        found.append(oracle.step(query[row, :, 0], (old[0], old[1]), (view.keys[row], view.values[row]), hidden, scaling))
    return torch.stack(found)[:, None]


def agree(view: Held, query: Tensor, mask: Tensor | None = None, cuts: tuple[Cut, Cut] | None = None, tolerance: float = 2e-6) -> None:
    found = view.by_kernel(query, mask, 0.3, DEVICE, cuts)
    exact = expected(view, query, mask, 0.3)
    assert found.shape == exact.shape and float((found.double() - exact).abs().max()) < tolerance * float(exact.abs().max())
    by_torch = view.by_torch(query, mask, 0.3)
    assert float((by_torch.double() - exact).abs().max()) < max(1e-5, 20 * tolerance) * float(exact.abs().max())


@pytest.mark.parametrize("ranks", [(10, 7), None])
@pytest.mark.parametrize("bits", [16, 4, 2])
def test_steps_are_those_of_a_loop_over_tokens_and_of_torch(bits: int, ranks: tuple[int, int] | None) -> None:
    agree(*held(bits=bits, ranks=ranks))


@pytest.mark.parametrize("each", range(1, 9))
def test_any_number_of_query_heads_shares_keys(each: int) -> None:
    agree(*held(each=each, old=BLOCK, **({"ranks": None, "bits": 4} if each % 2 else {})))  # type: ignore[arg-type]


@pytest.mark.parametrize(("old", "new"), [(1, 1), (2, 1), (BLOCK - 1, 1), (BLOCK + 1, 31), (3 * BLOCK, 33), (77, 70)])
def test_contexts_that_are_no_multiple_of_a_tile(old: int, new: int) -> None:
    """A window of 0 keeps the new token alone exactly."""
    agree(*held(old=old, new=new, rows=2))


@pytest.mark.parametrize("heads", [9, 20])
def test_more_query_heads_than_one_program_takes(heads: int) -> None:
    agree(*held(heads=heads, each=2, old=BLOCK, new=1))


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("added", [False, True])
def test_padding_on_the_left_is_not_seen(added: bool, bits: int) -> None:
    """Rows have none, some, a whole part and all old tokens of it; masks may be longer than the context."""
    view, query = held(rows=4, old=2 * BLOCK, new=3, bits=bits)
    mask = torch.ones(4, 1, 1, 2 * BLOCK + 8, dtype=torch.bool)
    for row, padding in enumerate((0, 5, BLOCK, 2 * BLOCK)):
        mask[row, :, :, :padding] = False
    given = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min) if added else mask
    for parts in (1, 2):
        agree(view, query, given, (Cut(BLOCK, 1, parts, 1), ONE))
    assert torch.equal(view.by_kernel(query, given[:, :, :, : 2 * BLOCK + 3], 0.3, DEVICE), view.by_kernel(query, given, 0.3, DEVICE))


def test_one_mask_serves_all_rows() -> None:
    view, query = held(rows=3)
    mask = torch.ones(1, 1, 1, 2 * BLOCK + 5, dtype=torch.bool)
    mask[..., :9] = False
    assert torch.allclose(view.by_kernel(query, mask, 0.3, DEVICE), view.by_torch(query, mask.expand(3, -1, -1, -1), 0.3), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [16, 4])
def test_states_of_two_bytes(dtype: torch.dtype, bits: int) -> None:
    """Queries for latents are rounded to their dtype; nothing else is."""
    agree(*held(dtype=dtype, bits=bits, old=3 * BLOCK + (1 if bits == 16 else 0), rows=2), tolerance=2 * torch.finfo(dtype).eps)


def test_results_do_not_depend_on_the_cut() -> None:
    view, query = held(old=7 * BLOCK, new=2 * BLOCK + 1)
    found = [
        view.by_kernel(query, None, 0.3, DEVICE, (Cut(tokens, 1, parts, 1), Cut(BLOCK, 1, recent, 1)))
        for tokens, parts, recent in ((BLOCK, 1, 1), (BLOCK, 3, 2), (16, 7, 3), (BLOCK, 9, 5))  # the last has more parts than tiles
    ]
    assert all(torch.allclose(each, found[0], atol=1e-6) for each in found)
    again = view.by_kernel(query, None, 0.3, DEVICE, (Cut(16, 1, 7, 1), Cut(BLOCK, 1, 3, 1)))
    assert torch.equal(again, found[2])


def test_scores_of_any_size_are_not_too_large() -> None:
    view, query = held(old=3 * BLOCK)
    agree(view, query * 1000, None, (Cut(BLOCK, 1, 3, 1), ONE), tolerance=1e-4)


def test_caches_that_were_reordered_or_rolled_back() -> None:
    view, query = held(rows=3, old=3 * BLOCK)
    for kept in view.old:
        kept.parts = tuple(part[torch.tensor([2, 0, 1])] for part in kept.parts)
        kept.parts = tuple(part[:, : 2 * BLOCK + 7].clone() for part in kept.parts)
    shorter = Held(
        view.latents, view.old, view.positions[:, : 2 * BLOCK + 7 + 5], view.keys.transpose(1, 2).contiguous().transpose(1, 2), view.values
    )
    agree(shorter, query)
