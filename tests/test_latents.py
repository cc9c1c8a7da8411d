"""Caches of latents: projections against decompositions, attention against loops, generation against the dense model, and the whole pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import latents as oracle
from test_run import compress
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import compress.latents as runtime
from compress import runtime as packed
from compress.errors import InputError
from compress.latents import Blended, LatentLayer, Latents, held_bytes
from compress.numerics.blocks import BLOCK, Coding
from compress.numerics.latents import ROOM, basis, commuting_basis, cost_of_keys, cost_of_values, ranks, rotate, rotate_back, side_by_side
from compress.numerics.tuned_latents import Lesson, Projections, attended, tuned

HEADS, WIDTH, QUERY_HEADS = 2, 8, 4
CHANNELS = HEADS * WIDTH
THETA = 10000.0


def rotation(tokens: int, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    config = LlamaConfig(hidden_size=4 * width, num_attention_heads=4, head_dim=width, rope_parameters={"rope_type": "default", "rope_theta": THETA})
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1, dtype=torch.float64), torch.arange(tokens)[None])
    return cos.double(), sin.double()


def states(tokens: int, heads: int = HEADS) -> Tensor:
    """Correlated between channels, as keys are."""
    mixed = torch.randn(tokens, heads * WIDTH, dtype=torch.float64) @ torch.randn(heads * WIDTH, heads * WIDTH, dtype=torch.float64)
    return mixed.view(1, tokens, heads, WIDTH).transpose(1, 2)


def spread(cost: Tensor) -> Tensor:
    return torch.block_diag(*cost)


# Projections ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 5, 15, 16])
@pytest.mark.parametrize("aware", [False, True])
def test_a_projection_loses_the_tail_of_the_spectrum_and_no_projection_less(rank: int, aware: bool) -> None:
    kept = side_by_side(states(200))[0]
    root = torch.randn(HEADS, WIDTH, WIDTH, dtype=torch.float64) if aware else torch.eye(WIDTH, dtype=torch.float64).repeat(HEADS, 1, 1)
    cost = root.transpose(1, 2) @ root
    found = basis(kept.T @ kept / len(kept), cost if aware else None)
    lost = kept - kept @ (found.up[:, :rank] @ found.down[:rank]).T
    total = float(found.energy.sum())
    mended = spread(cost + ROOM * cost.diagonal(dim1=1, dim2=2).mean() * torch.eye(WIDTH, dtype=torch.float64)) if aware else spread(cost)
    assert float(torch.einsum("tn,nm,tm->", lost, mended, lost)) / len(kept) == pytest.approx(float(found.energy[rank:].sum()), abs=1e-9 * total)
    measured = float(torch.einsum("tn,nm,tm->", lost, spread(cost), lost)) / len(kept)
    assert measured <= oracle.least_loss(kept, spread(root), rank) + 1e-3 * total
    if not aware:
        assert measured == pytest.approx(oracle.least_loss(kept, torch.eye(CHANNELS, dtype=torch.float64), rank), abs=1e-9 * total)


def test_at_full_rank_nothing_is_lost_whatever_the_cost() -> None:
    moment = torch.randn(CHANNELS, CHANNELS, dtype=torch.float64)
    for cost in (None, torch.zeros(HEADS, WIDTH, WIDTH), cost_of_values(torch.randn(3, QUERY_HEADS * WIDTH), HEADS, WIDTH)):
        found = basis(moment @ moment.T, cost)
        assert torch.allclose(found.up @ found.down, torch.eye(CHANNELS, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("rank", [2, 6, 16])
def test_commuting_projections_commute_and_lose_what_they_say(rank: int) -> None:
    keys, energy = states(300), torch.rand(QUERY_HEADS, WIDTH // 2, dtype=torch.float64) + 0.1
    kept, cost = side_by_side(keys)[0], cost_of_keys(energy, HEADS)
    moment = kept.T @ kept / len(kept)
    found = commuting_basis(moment, cost)
    through = found.up[:, :rank] @ found.down[:rank]
    cos, sin = rotation(300)
    turned = side_by_side(rotate(keys, cos, sin))[0]
    assert torch.allclose(
        side_by_side(rotate((kept @ through.T).view(1, 300, HEADS, WIDTH).transpose(1, 2), cos, sin))[0], turned @ through.T, atol=1e-4
    )
    lost = kept - kept @ through.T
    measured = float(torch.einsum("tn,nm,tm->", lost, spread(cost), lost)) / len(kept)
    assert measured == pytest.approx(float(found.energy[rank:].sum()), abs=1e-3 * float(found.energy.sum()))
    assert measured >= float(basis(moment, cost).energy[rank:].sum()) * (1 - 1e-3)
    if rank == CHANNELS:
        assert torch.allclose(through, torch.eye(CHANNELS, dtype=torch.float64), atol=1e-9)


def test_the_cost_of_values_is_what_the_output_loses() -> None:
    out = torch.randn(20, QUERY_HEADS * WIDTH, dtype=torch.float64)
    error = torch.randn(HEADS, WIDTH, dtype=torch.float64)
    by_query = error.repeat_interleave(QUERY_HEADS // HEADS, 0)
    lost = sum(float((out[:, head * WIDTH : (head + 1) * WIDTH] @ by_query[head]).square().sum()) for head in range(QUERY_HEADS))
    cost = cost_of_values(out, HEADS, WIDTH)
    assert float(torch.einsum("hd,hde,he->", error, cost, error)) == pytest.approx(lost)


def test_the_cost_of_keys_is_the_mean_over_all_distances() -> None:
    """Of many distances, for pairs that turn at different speeds: what scores lose is the sum over pairs of both energies."""
    queries = torch.randn(QUERY_HEADS, WIDTH, dtype=torch.float64)
    error = torch.randn(HEADS, WIDTH, dtype=torch.float64)
    pairs = queries.square().view(QUERY_HEADS, 2, WIDTH // 2).sum(1)
    cost = cost_of_keys(pairs, HEADS)
    angles = torch.rand(20000, WIDTH // 2, dtype=torch.float64) * 2 * torch.pi
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    turned = rotate(error[None].expand(20000, -1, -1)[:, :, None], cos[:, None], sin[:, None])[:, :, 0]
    scores = torch.einsum("hgd,thd->thg", queries.view(HEADS, -1, WIDTH), turned)
    assert float(scores.square().sum((1, 2)).mean()) == pytest.approx(float(torch.einsum("hd,hde,he->", error, cost, error)), rel=0.05)


@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_rotation_is_that_of_the_oracle_and_turns_back(factor: float) -> None:
    cos, sin = (part * factor for part in rotation(40))
    given = states(40)
    turned = rotate(given, cos, sin)
    assert torch.allclose(turned[0, 1, 17] / factor, oracle.turned(given[0, 1, 17], 17, THETA), atol=1e-5)
    assert torch.allclose(rotate_back(turned, cos, sin), given, atol=1e-12)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.data())
def test_ranks_sum_to_the_total_and_follow_the_energies(steps: list[int], data: Any) -> None:
    spectra = {str(index): sorted((torch.rand(4 * count) + 0.01).tolist(), reverse=True) for index, count in enumerate(steps)}
    total = 4 * data.draw(st.integers(len(steps), sum(steps)))
    found = ranks(spectra, total, 4, dict.fromkeys(spectra, 1.0))
    assert sum(found.values()) == total
    assert all(rank % 4 == 0 and 4 <= rank <= len(spectra[name]) for name, rank in found.items())
    gain = {name: [sum(energy[at : at + 4]) / sum(energy) for at in range(0, len(energy), 4)] for name, energy in spectra.items()}
    taken = [gain[name][step] for name, rank in found.items() for step in range(1, rank // 4)]
    left = [gain[name][step] for name, rank in found.items() for step in range(rank // 4, len(gain[name]))]
    assert not taken or not left or min(taken) >= max(left) - 1e-12


def test_ranks_that_do_not_fit_are_refused() -> None:
    for total in (4, 20, 7):
        with pytest.raises(ValueError, match="cannot be shared out"):
            ranks({"a": [1.0] * 8, "b": [1.0] * 8}, total, 4, {"a": 1.0, "b": 1.0})


# Codes ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("along", [True, False])
@pytest.mark.parametrize("channels", [1, 5, 24])
def test_codes_are_within_half_a_step_and_only_packed(bits: int, along: bool, channels: int) -> None:
    given = torch.randn(2, 2 * BLOCK, channels) + 10 * torch.randn(channels)  # far from zero: where a clamped zero point fails
    coding = Coding(bits, along_tokens=along)
    parts = coding.encode(given)
    assert parts[0].shape == (2, 2, BLOCK, -(-channels * bits // 8)) and parts[0].dtype == torch.uint8
    blocks = given.view(2, 2, BLOCK, channels)
    reach = blocks.amax(2 if along else 3, keepdim=True) - blocks.amin(2 if along else 3, keepdim=True)
    step = (reach + 0.02 * blocks.abs().amax()) / (2**bits - 1)  # lows are float16
    assert bool(((coding.decode(parts, channels).view_as(blocks) - blocks).abs() <= 0.51 * step + 1e-3 * blocks.abs()).all())


def test_what_is_coded_once_is_never_coded_again() -> None:
    kept = runtime.Kept(Coding(4, along_tokens=True))
    kept.append(torch.randn(1, BLOCK, 6))
    first = [part.clone() for part in kept.parts]
    for _ in range(10):
        kept.append(torch.randn(1, BLOCK, 6))
    assert all(torch.equal(part[:, :1], was) for part, was in zip(kept.parts, first, strict=True))


def test_a_constant_channel_and_zeros_survive() -> None:
    given = torch.zeros(1, BLOCK, 3)
    given[..., 1] = 7.0
    assert torch.equal(Coding(2, along_tokens=True).round(given), given)


# Attention ------------------------------------------------------------------------------------------------------------------


def projections(key_rank: int, value_rank: int, window: int, bits: int = 16) -> Latents:
    found = basis(*[side_by_side(states(100))[0].T @ side_by_side(states(100))[0]])
    other = basis(side_by_side(states(100))[0].T @ side_by_side(states(100))[0])
    return Latents((found.down[:key_rank], found.up[:, :key_rank]), (other.down[:value_rank], other.up[:, :value_rank]), window, bits)


@pytest.mark.parametrize("window", [0, 3, 40])
@pytest.mark.parametrize("queries", [7, 256])
def test_whole_sequences_are_what_loops_over_tokens_say(window: int, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "QUERIES", queries)
    tokens = 23
    query, keys, values = states(tokens, QUERY_HEADS), states(tokens), states(tokens)
    cos, sin = rotation(tokens)
    latents = projections(5, 9, window)
    view = Blended(latents, rotate(keys, cos, sin), values, (cos, sin))
    found = view.attend(rotate(query, cos, sin), None, 0.3)
    parts = latents.tensors(torch.float64)
    far = parts["key_up"] @ parts["key_down"], parts["value_up"] @ parts["value_down"]
    expected = oracle.attend(query[0], keys[0], values[0], far, window, THETA, 0.3)
    assert torch.allclose(found[0].double(), expected, atol=2e-4)


# Training -------------------------------------------------------------------------------------------------------------------


def lessons(count: int, tokens: int = 40) -> list[Lesson]:
    cos, sin = rotation(tokens)
    mixed = torch.randn(CHANNELS, CHANNELS, dtype=torch.float64) * torch.logspace(0, -2, CHANNELS)
    parts = [[side_by_side(states(tokens)) @ mixed for _ in range(2)] for _ in range(count)]
    split = [[each.view(1, tokens, HEADS, WIDTH).transpose(1, 2) / 4 for each in pair] for pair in parts]
    return [Lesson(rotate(states(tokens, QUERY_HEADS) / 9, cos, sin), rotate(keys, cos, sin), values, (cos, sin)) for keys, values in split]


def closed(given: list[Lesson], rank: int) -> Projections:
    keys, values = (torch.cat([side_by_side(states)[0] for states in parts]) for parts in (
        [rotate_back(each.keys, *each.rotation) for each in given], [each.values for each in given]))  # fmt: skip
    found = [basis(rows.T @ rows) for rows in (keys, values)]
    return found[0].down[:rank], found[0].up[:, :rank], found[1].down[:rank], found[1].up[:, :rank]


@pytest.mark.parametrize("window", [0, 5, 50])
def test_what_is_trained_on_is_what_is_measured(window: int) -> None:
    (given,) = lessons(1)
    made = tuple(part.float() for part in closed([given], 5))
    view = Blended(Latents((made[0], made[1]), (made[2], made[3]), window), given.keys.float(), given.values.float(), given.rotation)
    expected = view.attend(given.query.float(), None, 0.3)[0].flatten(1)
    assert torch.allclose(attended(made, given, window, 0.3), expected.float(), atol=1e-4)  # type: ignore[arg-type]
    whole = Blended(Latents((made[0], made[1]), (made[2], made[3]), 40), given.keys.float(), given.values.float(), given.rotation)
    assert torch.allclose(attended(None, given, window, 0.3), whole.attend(given.query.float(), None, 0.3)[0].flatten(1).float(), atol=1e-4)


def test_training_lowers_what_was_not_trained_on_and_never_varies() -> None:
    given, out = lessons(12), torch.randn(20, QUERY_HEADS * WIDTH)
    start = closed(given, 4)
    found, (before, after) = tuned(start, given, out, 5, 0.3, 30)
    assert after < before and [part.shape for part in found] == [part.shape for part in start]
    for made, told in ((start, before), (found, after)):
        held_out = [given[0], given[8]]
        pairs = [[attended(which, each, 5, 0.3) @ out.T for which in (tuple(part.float() for part in made), None)] for each in held_out]  # type: ignore[arg-type]
        error = sum(float((one - other).square().sum()) for one, other in pairs) / sum(float(other.square().sum()) for _, other in pairs)
        assert told == pytest.approx(error, rel=1e-3)
    again, errors = tuned(start, given, out, 5, 0.3, 30)
    assert errors == (before, after) and all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_what_training_does_not_better_stays_as_it_was() -> None:
    given = lessons(3)
    start = closed(given, CHANNELS)  # nothing is lost
    found, (before, after) = tuned(start, given, torch.randn(20, QUERY_HEADS * WIDTH), 5, 0.3, 3)
    assert before == after < 1e-6 and all(torch.equal(one, other) for one, other in zip(found, start, strict=True))


def test_a_run_trains_and_says_what_it_gained(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    result = compress(recipe_of(keep=0.25, window=8, tune=10), checkpoint("llama"), tmp_path / "out")
    records = [record for record in result["transforms"] if record["pass"] == "kv_shrink"]
    assert all(record["steps"] == 10 and record["output_error"][1] <= record["output_error"][0] for record in records)
    assert any(record["output_error"][1] < record["output_error"][0] for record in records)
    with pytest.raises(InputError, match="no calibration text is longer than the window of 64"):
        compress(recipe_of(window=64, tune=1), checkpoint("llama"), tmp_path / "again")


# The whole pass -------------------------------------------------------------------------------------------------------------


def recipe_of(**options: Any) -> dict[str, Any]:
    return {"calibration": {"samples": 4, "length": 64}, "evaluate": None, "passes": [{"kv_shrink": {"multiple_of": 4} | options}]}


@pytest.fixture(scope="module")
def loaded(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """The model of `load` that a recipe makes of a kind; made once."""
    made: dict[str, Path] = {}

    def make(kind: str, plain: dict[str, Any]) -> Any:
        key = f"{kind} {json.dumps(plain, sort_keys=True)}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("made") / "out"
            compress(plain, checkpoint(kind), made[key])
        return packed.load(made[key])

    return make


@pytest.fixture
def shrunk(loaded: Callable[..., Any]) -> Callable[..., Any]:
    """A model whose cache `kv_shrink` shrank, of a kind with options."""
    return lambda kind, **options: loaded(kind, recipe_of(**options))


@pytest.fixture
def coded(loaded: Callable[..., Any]) -> Callable[..., Any]:
    """One whose cache `kv_quant` codes."""
    return lambda kind, **options: loaded(kind, {"evaluate": None, "passes": [{"kv_quant": options}]})


def dense(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def prompts(rows: int = 1, tokens: int = 60) -> Tensor:
    return torch.randint(5, tiny.VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(3))


KINDS = ("llama", "llama-bias", "qwen2", "qwen3", "qwen3_moe", "mixtral", "olmoe")


@torch.no_grad()
def chunked(model: Any, ids: Tensor, first: int, cache: Any) -> Tensor:
    """Logits of all tokens, the `first` in one piece and the rest one by one."""
    parts = [model(ids[:, :first], past_key_values=cache, use_cache=True).logits]
    parts += [model(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits for at in range(first, ids.shape[1])]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("window", "keys"), [(0, "joint"), (16, "joint"), (16, "commuting")])
def test_at_full_rank_logits_are_those_of_the_dense_model(
    kind: str, window: int, keys: str, shrunk: Callable[..., Any], checkpoint: Callable[..., Path]
) -> None:
    ids = prompts(2, 120)
    with torch.no_grad():
        expected = dense(checkpoint(kind))(ids).logits
    cache = DynamicCache()
    found = chunked(shrunk(kind, keep=1.0, window=window, keys=keys), ids, 70, cache)
    assert all(isinstance(layer, LatentLayer) and layer.old_tokens for layer in cache.layers)
    assert float((found - expected).abs().max()) <= 1e-4 * max(1.0, float(expected.abs().max()))


def test_a_prompt_is_exact_at_any_rank_and_what_follows_is_not(shrunk: Callable[..., Any], checkpoint: Callable[..., Path]) -> None:
    ids = prompts(1, 120)
    with torch.no_grad():
        expected = dense(checkpoint("llama"))(ids).logits
    found = chunked(shrunk("llama", keep=0.125, window=0), ids, 100, DynamicCache())
    difference = (found - expected).abs().amax((0, 2))
    assert float(difference[:100].max()) <= 1e-4
    assert float(difference[100:].min()) > 1e-4


def test_a_window_as_long_as_the_text_is_exact_at_any_rank(shrunk: Callable[..., Any], checkpoint: Callable[..., Path]) -> None:
    ids = prompts(1, 90)
    with torch.no_grad():
        expected = dense(checkpoint("llama"))(ids).logits
    assert float((chunked(shrunk("llama", keep=0.125, window=128), ids, 10, DynamicCache()) - expected).abs().max()) <= 1e-4


def as_measured(model: Any) -> None:
    """From here on ``model``, of `load`, computes whole sequences as latents are measured, each query with a window of its own."""
    for block in model.model.layers:
        attention = block.self_attn
        plain = type(attention).forward

        def measured(self: Any = attention, plain: Any = plain, **named: Any) -> Any:
            def update(keys: Tensor, values: Tensor, *_: Any) -> tuple[Any, Any]:
                view = Blended(self.latents, keys, values, named["position_embeddings"])
                return view, view

            whole = SimpleNamespace(update=update)
            return plain(self, **named | {"past_key_values": whole})

        attention.forward = measured
        attention._forward_pre_hooks.clear()


@pytest.mark.parametrize(("bits", "keys"), [(16, "joint"), (16, "commuting"), (4, "joint")])
def test_decoding_is_what_whole_sequences_are_measured_as(bits: int, keys: str, shrunk: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement lets each query see `window` tokens exactly; a cache from which tokens leave one by one does just that."""
    ids = prompts(1, 100)
    model = shrunk("llama", keep=0.25, window=20, bits=bits, keys=keys)
    if bits == 16:
        monkeypatch.setattr(runtime, "BLOCK", 1)
    found = chunked(model, ids, 1, DynamicCache())
    as_measured(model)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    if bits == 16:
        assert torch.allclose(found, expected, atol=1e-4)
    else:  # blocks that are not full are exact in a cache, so only early tokens agree
        assert torch.allclose(found[:, :21], expected[:, :21], atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_generation_is_the_dense_models(kind: str, shrunk: Callable[..., Any], checkpoint: Callable[..., Path]) -> None:
    full, plain = shrunk(kind, keep=1.0, window=16), dense(checkpoint(kind))
    ids, mask = prompts(3, 50), torch.ones(3, 50, dtype=torch.long)
    ids[0, :20], mask[0, :20] = 0, 0  # padded on the left
    ids[1, :1], mask[1, :1] = 0, 0
    for options in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}, {"num_beams": 3, "num_return_sequences": 2, "do_sample": False}):
        expected = plain.generate(ids, attention_mask=mask, max_new_tokens=60, pad_token_id=0, **options)
        assert torch.equal(full.generate(ids, attention_mask=mask, max_new_tokens=60, pad_token_id=0, **options), expected)


def test_a_padded_row_is_what_the_row_alone_is(shrunk: Callable[..., Any]) -> None:
    model = shrunk("llama", keep=0.5, window=0)
    alone = prompts(1, 64)
    ids = torch.cat([torch.zeros(1, 32, dtype=torch.long), alone], 1).repeat(2, 1)
    ids[1] = prompts(1, 96)
    mask = torch.ones_like(ids)
    mask[0, :32] = 0
    expected = model.generate(alone, max_new_tokens=40, do_sample=False, pad_token_id=0)
    found = model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False, pad_token_id=0)
    assert torch.equal(found[:1, 32:], expected)


def test_a_cache_is_continued_and_rolled_back(shrunk: Callable[..., Any], checkpoint: Callable[..., Path]) -> None:
    full, plain = shrunk("llama", keep=1.0, window=16), dense(checkpoint("llama"))
    ids = prompts(1, 80)
    cache, theirs = DynamicCache(), DynamicCache()
    for model, kept in ((full, cache), (plain, theirs)):
        first = model.generate(ids, past_key_values=kept, max_new_tokens=40, do_sample=False, pad_token_id=0)
        kept.crop(-70)
        again = model.generate(first[:, :-60], past_key_values=kept, max_new_tokens=40, do_sample=False, pad_token_id=0)
        if model is full:
            ours = first, again
    assert torch.equal(ours[0], first) and torch.equal(ours[1], again)


def test_assisted_generation_works_or_is_refused_by_name(shrunk: Callable[..., Any], checkpoint: Callable[..., Path]) -> None:
    ids = prompts(1, 80)
    expected = dense(checkpoint("llama")).generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=0)
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "prompt_lookup_num_tokens": 5}
    assert torch.equal(shrunk("llama", keep=1.0, window=16).generate(ids, **options), expected)
    model = shrunk("llama", keep=1.0, window=0, bits=4)
    cache = DynamicCache()
    chunked(model, ids, 80, cache)
    with pytest.raises(InputError, match="cannot forget 30 tokens, of which 14 are in coded blocks"):
        cache.crop(-30)


def test_caches_that_keep_no_latents_are_refused(shrunk: Callable[..., Any]) -> None:
    model = shrunk("llama", keep=0.5)
    static = StaticCache(config=model.config, max_cache_len=128)
    with pytest.raises(InputError, match="a StaticLayer of transformers keeps no latents"):
        model(prompts(), past_key_values=static)


@pytest.mark.parametrize(("bits", "each"), [(16, None), (4, 4), (2, 2)])
def test_held_bytes_are_those_of_window_latents_and_positions(bits: int, each: int | None, shrunk: Callable[..., Any]) -> None:
    model = shrunk("llama", keep=0.25, window=20, bits=bits)
    cache = DynamicCache()
    chunked(model, prompts(1, 100), 90, cache)
    old = 64  # 90 - 20 rounded down to blocks; 16 of the rest leave no further block
    channels, layers = 2 * 16, len(cache.layers)
    ranks_ = [(len(block.self_attn.latents.key_down), len(block.self_attn.latents.value_down)) for block in model.model.layers]
    assert sum(map(sum, ranks_)) == layers * 2 * channels // 4
    expected = sum(
        (100 - old) * 2 * channels * 4 + 100 * 4
        + (old * (k + v) * 4 if each is None else old * (-(-k * each // 8) + -(-v * each // 8)) + old // BLOCK * k * 4 + old * 4)
        for k, v in ranks_
    )  # fmt: skip
    assert held_bytes(cache) == expected


# Few bits for all channels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("format_", ["int4", "int2"])
def test_coded_caches_are_rotated_keys_and_values_of_blocks_rounded_once(
    kind: str, format_: str, coded: Callable[..., Any], checkpoint: Callable[..., Path]
) -> None:
    """Beside transformers' own cache, whose oldest blocks are replaced by what their codes stand for as they leave the window."""
    ids = prompts(1, 100)
    cache = DynamicCache()
    found = chunked(coded(kind, format=format_, window=8), ids, 50, cache)
    plain, theirs, parts = dense(checkpoint(kind)), DynamicCache(), []
    codings = [Coding(int(format_[3:]), along_tokens=along) for along in (True, False)]
    done = 0
    with torch.no_grad():
        for first, last in [(0, 50), *((at, at + 1) for at in range(50, 100))]:
            parts.append(plain(ids[:, first:last], past_key_values=theirs, use_cache=True).logits)
            while last - done >= BLOCK + 8:
                for layer in theirs.layers:
                    for held, coding in zip((layer.keys, layer.values), codings, strict=True):
                        block = held[:, :, done : done + BLOCK]
                        held[:, :, done : done + BLOCK] = runtime.by_head(coding.round(side_by_side(block)), block.shape[1])
                done += BLOCK
        exact = dense(checkpoint(kind))(ids).logits
    assert done == 64
    assert torch.allclose(found, torch.cat(parts, 1), atol=1e-4)
    assert float((found[:, -1] - exact[:, -1]).abs().max()) > 1e-3


# Runs ---------------------------------------------------------------------------------------------------------------------------


def test_a_run_says_what_became_of_the_cache_and_what_it_plans_is_what_it_writes(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from compress import planning, recipe
    from compress.checkpoint import Checkpoint
    from compress.layout import Layout

    plain = recipe_of(keep=0.25) | {
        "passes": [{"rtn": {"group_size": 32}}, {"kv_shrink": {"keep": 0.25, "multiple_of": 4, "ranks": "water_filling"}}]
    }
    result = compress(plain, checkpoint("llama"), tmp_path / "out")
    records = [record for record in result["transforms"] if record["pass"] == "kv_shrink"]
    assert [record["key_rank"][0] for record in records] == [32, 32]
    assert sum(record["key_rank"][1] + record["value_rank"][1] for record in records) == 2 * 2 * 8
    assert all(0 < record[key] < 1 for record in records for key in ("key_error", "value_error"))
    asked = recipe.validate(plain, "r.yaml")
    layout = Layout(Checkpoint(checkpoint("llama")))
    planned = planning.plan(asked, layout, recipe.check(asked, layout, "r.yaml"))
    assert planned["size"]["after_bytes"] == result["size"]["after_bytes"] == Checkpoint(tmp_path / "out").nbytes
    assert planned["engines"]["transformers"] == "refuses a cache of latents"
    assert planned["cache"] == "latents of 25 % of the channels, the newest 32 tokens exactly"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Keys and values cached as latents, the newest 32 tokens as they are." in page
    assert "latents of 25 % of the channels" in (tmp_path / "out" / "README.md").read_text()


def test_transformers_refuses_what_it_would_run_with_a_dense_cache(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(recipe_of(), checkpoint("llama"), tmp_path / "out")
    with pytest.raises(ValueError, match="compress_latent_cache"):
        dense(tmp_path / "out")
    with pytest.raises(InputError, match="keeps latents already"):
        compress(recipe_of(), tmp_path / "out", tmp_path / "again")


def test_blocks_with_a_window_of_their_own_are_left_whole_and_told(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    result = compress(recipe_of(keep=0.5), checkpoint("qwen2-sliding"), tmp_path / "out")
    kinds = [record.get("kind") for record in result["transforms"]]
    assert "left whole" in kinds and None in kinds
    ids = prompts(1, 100)
    cache = DynamicCache(config=packed.load(tmp_path / "out").config)
    found = packed.load(tmp_path / "out").generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert found.shape == (1, 105)
    assert {type(layer).__name__ for layer in cache.layers} == {"LatentLayer", "DynamicSlidingWindowLayer"}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("mistral", {}, "attention of every block has a window"),
        ("deepseek_v3", {}, "caches one latent vector for all heads already"),
        ("gpt_oss", {}, r"attention of a gpt_oss needs a kernel of its own \(eager\)"),
        ("qwen2_vl", {}, "turns keys by three positions at once"),
        ("qwen3", {"method": "svd"}, "svd goes by weights, but a qwen3 normalises keys after them"),
        ("llama", {"keep": 0.05}, "0.05 of 32 channels is less than multiple_of, 4"),
        ("llama", {"multiple_of": 5}, "5 does not divide the 32 channels"),
        ("llama", {"multiple_of": 1, "keys": "commuting"}, "1 would part channels that rotate together"),
        ("llama", {"keys": "commuting", "method": "whitened"}, "commuting is of method aware"),
        ("llama", {"keys": "commuting", "tune": 5}, "trained keys would no longer commute with rotation"),
        ("llama", {"keep_keys": 0.5, "ranks": "water_filling"}, "is an option of ranks: uniform"),
        ("llama", {"keep_keys": 1.0}, "leaves values 0"),
        ("llama", {"bits": 3}, "bits: input should be 16, 4 or 2"),
        ("llama", {"window": 10**12}, "window: input should be less than or equal to"),
    ],
)
def test_what_cannot_be_is_refused_before_weights_load(
    kind: str, options: dict[str, Any], message: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        compress(recipe_of(**options), checkpoint(kind), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_keys_and_values_may_have_unlike_shares(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    result = compress(recipe_of(keep=0.5, keep_keys=0.25), checkpoint("llama"), tmp_path / "out")
    assert {(record["key_rank"][1], record["value_rank"][1]) for record in result["transforms"]} == {(8, 24)}


def test_a_damaged_artifact_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    compress(recipe_of(), checkpoint("llama"), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.self_attn.latents.key_up"
    for damaged, message in (
        ({key: value for key, value in tensors.items() if key != name}, "key_up is missing from the checkpoint|key_up: is missing"),
        (tensors | {name: tensors[name][:, 1:].contiguous()}, "key_up.* has the shape"),
        (tensors | {"model.layers.1.self_attn.latents.more": torch.zeros(1)}, "more.* is not accounted for"),
        (
            {key: value for key, value in tensors.items() if ".1.self_attn.latents." not in key},
            "latents.bits is missing|latents.bits: is missing",
        ),
        (tensors | {name: tensors[name] * torch.nan}, "key_up: holds NaN or infinity"),
        (tensors | {name: tensors[name].to(torch.int8)}, "key_up: is I8"),
        *(
            (tensors | {f"model.layers.1.self_attn.latents.{part}": torch.tensor([value], dtype=torch.int32)}, f"{part}: must be .*, got {value}")
            for part, value in (("bits", 3), ("bits", 0), ("window", -1), ("commuting", 2))
        ),
        (tensors | {"model.layers.1.self_attn.latents.window": torch.tensor([1.5])}, "window: is F32"),
    ):
        save_file(damaged, file, metadata={"format": "pt"})
        with pytest.raises(InputError, match=message):
            packed.load(tmp_path / "out")


def test_on_recall_methods_stand_in_their_order_and_starved_keys_collapse(retriever: Path, tmp_path: Path) -> None:
    """Without a window, so that every lookup goes through latents. 64 pairs; chance is 1 of 128."""
    from compress.checkpoint import Checkpoint
    from compress.data import Sample, Samples
    from compress.evaluate import scoring
    from compress.evaluate.retrieval import associative_recall
    from compress.layout import Layout
    from compress.model import Model

    data = tmp_path / "calibration.jsonl"
    learned = associative_recall(64, sequences=16, seed=0).sequences
    data.write_text("".join(json.dumps({"input_ids": ids.tolist()}) + "\n" for ids in learned))
    asked = associative_recall(64, sequences=8, seed=7)
    samples = Samples("recall", tuple(map(Sample, asked.sequences, asked.scored)))

    def answered(**options: Any) -> tuple[float, float]:
        plain = {"calibration": {"data": str(data), "samples": 16, "length": learned.shape[1]}, "evaluate": None}
        out = tmp_path / "out"
        compress(plain | {"passes": [{"kv_shrink": {"window": 0} | options}]}, retriever, out, overwrite=True)
        scores = scoring.compare(Model(Layout(Checkpoint(retriever))), Model(Layout(Checkpoint(out))), samples)
        return float(scores.right.double().mean()), float(scores.loss.double().mean())

    assert answered(keep=0.5)[0] >= 0.995
    losses = [answered(keep=24 / 128, **options)[1] for options in ({}, {"method": "whitened"}, {"method": "asvd"}, {"method": "svd"})]
    assert losses[0] <= losses[1] <= min(losses[2:])
    assert answered(keep=(8 + 128) / 256, keep_keys=8 / 128)[0] < 0.3
    by_rank = [losses[0], *(answered(keep=rank / 128)[1] for rank in (16, 8))]
    assert by_rank == sorted(by_rank)


def test_on_recall_errors_of_logits_fall_with_the_window(retriever: Path, tmp_path: Path) -> None:
    """The loss need not: near tokens, scored exactly, then stand beside far ones whose scores are too small. But with the same projections logits of
    answers come nearer to what they were, and so does what the first block gives, which looks one token back."""
    from compress.evaluate.retrieval import associative_recall

    data = tmp_path / "calibration.jsonl"
    learned = associative_recall(64, sequences=16, seed=0).sequences
    data.write_text("".join(json.dumps({"input_ids": ids.tolist()}) + "\n" for ids in learned))
    calibration = {"data": str(data), "samples": 16, "length": learned.shape[1]}
    plain = {"calibration": calibration, "evaluate": None, "passes": [{"kv_shrink": {"window": 0, "keep": 16 / 128}}]}
    compress(plain, retriever, tmp_path / "out")
    asked = associative_recall(64, sequences=8, seed=7)
    answers = torch.stack([*asked.scored])[:, 1:].bool()
    ids = torch.stack([*asked.sequences])
    model, given = packed.load(tmp_path / "out"), dense(retriever)
    as_measured(model)
    attended: list[Tensor] = []
    for each in (given, model):
        each.model.layers[0].self_attn.register_forward_hook(lambda module, inputs, output: attended.append(output[0]))

    def answered(which: Any) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits = which(ids, use_cache=False).logits[:, :-1][answers]
        return attended.pop()[:, :-1][answers], logits

    exact, errors = answered(given), []
    for window in (0, 32, 64, 96, 128, ids.shape[1]):
        for block in model.model.layers:
            block.self_attn.latents.window = window
        errors.append([float((found - wanted).square().sum() / wanted.square().sum()) for found, wanted in zip(answered(model), exact, strict=True)])
    for falling in zip(*errors, strict=True):
        assert falling[0] > 0.3 and all(after < 0.9 * before for before, after in pairwise(falling)) and falling[-1] < 1e-8


def test_four_bit_latents_of_a_fifth_hold_less_than_a_tenth_of_a_dense_cache_and_the_window(tmp_path: Path) -> None:
    """After 1,024 tokens, counted in tensors held; the dense cache is in bfloat16."""
    plain = {"calibration": {"samples": 4, "length": 128}, "evaluate": None, "passes": [{"kv_shrink": {"keep": 0.2, "bits": 4}}]}
    compress(plain, "demo:dense", tmp_path / "out")
    model = packed.load(tmp_path / "out")
    cache = DynamicCache()
    with torch.no_grad():
        model(prompts(1, 1024), past_key_values=cache, use_cache=True)
    config = model.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    window = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert all(layer.keys.shape[2] < 64 for layer in cache.layers)
    assert held_bytes(cache) - window <= 0.1 * 2 * per_token * 1024


def test_a_window_that_nothing_measured_is_older_than_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    plain = recipe_of(window=64) | {"evaluate": {"context": 64, "windows": 2}}
    with pytest.raises(InputError, match="in 64 tokens nothing is older than the window of 64"):
        compress(plain, checkpoint("llama"), tmp_path / "out")


def test_caches_of_other_models_and_gradients_are_refused(shrunk: Callable[..., Any], checkpoint: Callable[..., Path]) -> None:
    model, cache = shrunk("llama", keep=0.5), DynamicCache()
    chunked(model, prompts(1, 60), 60, cache)
    with pytest.raises(InputError, match="keeps latents of another model"):
        dense(checkpoint("llama"))(prompts(1, 4), past_key_values=cache)
    given = model.get_input_embeddings()(prompts(1, 60)).requires_grad_()
    with pytest.raises(InputError, match="is not differentiable"):
        model(inputs_embeds=given, use_cache=True)
    model(inputs_embeds=given, use_cache=False).logits.sum().backward()
    assert given.grad is not None


def test_on_text_less_is_lost_with_more_channels_and_with_longer_windows(tmp_path: Path) -> None:
    def lost(**options: Any) -> float:
        plain = {"calibration": {"samples": 8, "length": 128}, "evaluate": {"context": 192, "windows": 6}, "passes": [{"kv_shrink": options}]}
        result = compress(plain, "demo:dense", tmp_path / "out", overwrite=True)
        return float(result["evaluation"]["figures"]["kl"])

    by_window = [lost(keep=0.2, window=window) for window in (0, 8, 32, 128)]
    by_keep = [lost(keep=keep, window=0) for keep in (0.125, 0.2, 0.5, 1.0)]
    assert by_window == sorted(by_window, reverse=True) and by_window[-1] < 0.1 * by_window[0]
    assert by_keep == sorted(by_keep, reverse=True) and by_keep[-1] < 0.01 * by_keep[0]
