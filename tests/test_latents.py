"""Caches of latents: projections against decompositions, attention against loops, generation against the dense model, and the whole pass."""

from __future__ import annotations

from collections.abc import Callable
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
from compress.numerics.latents import basis, commuting_basis, cost_of_keys, cost_of_values, ranks, rotate, rotate_back, side_by_side

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
    measured = float(torch.einsum("tn,nm,tm->", lost, spread(cost), lost)) / len(kept)
    total = float(found.energy.sum())
    assert measured == pytest.approx(float(found.energy[rank:].sum()), abs=1e-3 * total)  # the cost is mended by 1e-4 of its mean
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
    kept = runtime.Kept(Coding(4, along_tokens=True), 6)
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
    return Latents(found.down[:key_rank], found.up[:, :key_rank], other.down[:value_rank], other.up[:, :value_rank], window, bits)


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
    far = latents.key_up @ latents.key_down, latents.value_up @ latents.value_down
    expected = oracle.attend(query[0], keys[0], values[0], far, window, THETA, 0.3)
    assert torch.allclose(found[0].double(), expected, atol=2e-4)


# The whole pass -------------------------------------------------------------------------------------------------------------


def recipe_of(**options: Any) -> dict[str, Any]:
    return {"calibration": {"samples": 4, "length": 64}, "evaluate": None, "passes": [{"kv_shrink": {"multiple_of": 4} | options}]}


@pytest.fixture(scope="module")
def shrunk(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """A model of `load`, of a kind with options; made once."""
    made: dict[str, Path] = {}

    def make(kind: str, **options: Any) -> Any:
        key = f"{kind} {sorted(options.items())}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("shrunk") / "out"
            compress(recipe_of(**options), checkpoint(kind), made[key])
        return packed.load(made[key])

    return make


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


@pytest.mark.parametrize(("bits", "keys"), [(16, "joint"), (16, "commuting"), (4, "joint")])
def test_decoding_is_what_whole_sequences_are_measured_as(bits: int, keys: str, shrunk: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement lets each query see `window` tokens exactly; a cache from which tokens leave one by one does just that."""
    ids = prompts(1, 100)
    model = shrunk("llama", keep=0.25, window=20, bits=bits, keys=keys)
    if bits == 16:
        monkeypatch.setattr(runtime, "BLOCK", 1)
    found = chunked(model, ids, 1, DynamicCache())
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
