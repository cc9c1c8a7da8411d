"""Attention rewritten as attention to a latent: nothing lost at full width, what an explicit low-rank model loses below, and a smaller cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from oracles import latent as oracle
from test_run import compress
from typer.testing import CliRunner

import compress as package
from compress import demo, recipe
from compress.checkpoint import Checkpoint
from compress.cli import app
from compress.data import Tokenizer, calibration
from compress.errors import InputError
from compress.layout import Layout
from compress.numerics import latent_attention as mla
from compress.planning import plan

QUICK: dict[str, Any] = {"calibration": {"samples": 4, "length": 48}, "evaluate": None}
GROUPS = (1, 2, 4)
FULL = {1: 16, 2: 32, 4: 64}
"""Keys, and values, of all heads together, by heads of keys."""


def config_of(groups: int, **changes: Any) -> Any:
    config = tiny.config("llama")
    config.num_key_value_heads = groups
    return type(config)(**config.to_dict() | changes)


def saved(folder: Path, config: Any, dtype: torch.dtype = torch.float32) -> Path:
    """A random model with this configuration, and a tokenizer."""
    import transformers as hf

    torch.manual_seed(3)
    model = hf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
            elif "embed" not in name:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
    model.to(dtype).save_pretrained(folder)
    for name in tiny.TOKENIZER:
        shutil.copy(demo.path("dense") / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny Llama by heads of keys; made once."""
    made: dict[str, Path] = {}

    def make(groups: int, **changes: Any) -> Path:
        key = f"{groups} {sorted(changes.items())}"
        if key not in made:
            made[key] = saved(tmp_path_factory.mktemp("llama"), config_of(groups, **changes))
        return made[key]

    return make


def recipe_of(rope: int, rank: int, *more: dict[str, Any], **options: Any) -> dict[str, Any]:
    return QUICK | {"passes": [{"mla": {"rope": rope, "rank": rank, **options}}, *more]}


def converted(folder: Path | str, out: Path, rope: int, rank: int, *more: dict[str, Any], **options: Any) -> dict[str, Any]:
    return compress(recipe_of(rope, rank, *more, **options), folder, out)


IDS = torch.randint(4, tiny.VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def difference(one: Any, other: Any) -> float:
    return float((logits(one) - logits(other)).abs().max())


@torch.no_grad()
def cached_bytes(model: Any) -> int:
    """Bytes that the cache of a model really holds after `IDS`."""
    cache = model(input_ids=IDS, use_cache=True).past_key_values
    return sum(tensor.untyped_storage().nbytes() for layer in cache.layers for tensor in (layer.keys, layer.values))


@torch.no_grad()
def continued(model: Any) -> torch.Tensor:
    """Tokens that a model goes on with after prompts of different lengths, padded on the left."""
    mask = torch.ones_like(IDS)
    mask[0, :11], mask[1, :3] = 0, 0
    found: torch.Tensor = model.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    return found


# The mathematics --------------------------------------------------------------------------------------------------------------------


def problem(heads: int, groups: int, size: int, hidden: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Weights of queries, keys and values and of the output, and inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (heads * size, hidden), (groups * size, hidden), (groups * size, hidden), (hidden, heads * size), (3 * hidden, hidden)
    *weights, inputs = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return *weights, inputs * torch.logspace(-1, 1, hidden, dtype=torch.float64)


@given(st.sampled_from([(1, 1), (4, 1), (4, 2), (3, 3), (6, 2)]), st.integers(1, 4), st.integers(3, 9), st.integers(0, 9))
def test_with_all_directions_scores_are_the_same_at_any_distance(shape: tuple[int, int], half: int, hidden: int, seed: int) -> None:
    (heads, groups), size = shape, 2 * half
    query, key, _, _, inputs = problem(heads, groups, size, hidden, seed)
    moment = inputs.T @ inputs / len(inputs)
    found = mla.directions(mla.key_moments(key, groups, moment), mla.query_energies(query, heads, moment))
    counts = torch.full((half,), groups)
    frequency, _ = mla.kept(counts)
    rates = np.exp(-np.arange(half) / 3)
    new_key, new_query = mla.key_rows(key, groups, found, counts), mla.query_rows(query, heads, found, counts)
    at = {"q": 7, "k": 3}
    for head in range(heads):
        q, k = (query @ inputs[0]).reshape(heads, size)[head].numpy(), (key @ inputs[1]).reshape(groups, size)[head // (heads // groups)].numpy()
        wanted = oracle.turned(q, rates, at["q"]) @ oracle.turned(k, rates, at["k"])
        # Pairs stand side by side now, and each has a frequency of its own.
        apart = [np.concatenate([side[0::2], side[1::2]]) for side in ((new_query[head] @ inputs[0]).numpy(), (new_key @ inputs[1]).numpy())]
        scored = oracle.turned(apart[0], rates[frequency.numpy()], at["q"]) @ oracle.turned(apart[1], rates[frequency.numpy()], at["k"])
        assert scored == pytest.approx(wanted, rel=1e-6, abs=1e-6 * float(np.linalg.norm(q) * np.linalg.norm(k)))


@given(st.integers(1, 3), st.integers(1, 4), st.integers(3, 9), st.integers(0, 9))
def test_moments_are_those_of_the_tokens(groups: int, half: int, hidden: int, seed: int) -> None:
    query, key, value, _, inputs = problem(2 * groups, groups, 2 * half, hidden, seed)
    moment = inputs.T @ inputs / len(inputs)
    tokens = [(inputs @ weight.T).reshape(len(inputs), -1, 2 * half).numpy() for weight in (key, query)]
    energies, _, weights = oracle.spectra(*tokens)
    found = mla.directions(mla.key_moments(key, groups, moment), mla.query_energies(query, 2 * groups, moment))
    np.testing.assert_allclose(found.energies.numpy(), energies, rtol=1e-7, atol=1e-9 * energies.max())
    np.testing.assert_allclose((found.down / found.up).abs().mean(-1).sqrt().numpy(), weights, rtol=1e-6)
    values = (inputs @ value.T).numpy()
    np.testing.assert_allclose(mla.value_moment(value, moment).numpy(), values.T @ values / len(inputs), rtol=1e-9, atol=1e-9)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(3, 9), st.integers(0, 9), st.data())
def test_values_lose_the_least_after_the_output(groups: int, half: int, hidden: int, seed: int, data: st.DataObject) -> None:
    size = 2 * half
    rank = data.draw(st.integers(1, groups * size))
    _, _, value, output, inputs = problem(2 * groups, groups, size, hidden + 2 * groups * size, seed)  # enough outputs that every error shows
    values = inputs @ value.T
    moment, metric = mla.value_moment(value, inputs.T @ inputs / len(inputs)), mla.output_metric(output, groups, size)
    found = mla.value_latent(moment, metric, rank)
    np.testing.assert_allclose((found.up @ found.down).numpy(), oracle.value_projection(values.numpy(), output.numpy(), groups, rank), atol=1e-3)
    assert float((values @ found.down.T).square().mean()) == pytest.approx(1, rel=1e-3)
    every = torch.cat([values.reshape(-1, groups, size)[:, head // 2] for head in range(2 * groups)], 1) @ output.T
    left = (values @ (found.up @ found.down).T).reshape(-1, groups, size)
    missed = torch.cat([left[:, head // 2] for head in range(2 * groups)], 1) @ output.T - every
    heads = [slice(head * size, (head + 1) * size) for head in range(2 * groups)]
    alone = sum(float(((left - values.reshape(left.shape))[:, head // 2] @ output[:, place].T).square().sum()) for head, place in enumerate(heads))
    whole = sum(float((values.reshape(left.shape)[:, head // 2] @ output[:, place].T).square().sum()) for head, place in enumerate(heads))
    assert found.lost == pytest.approx(alone / whole, abs=1e-5) and missed.isfinite().all()


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.integers(0, 9), st.data())
def test_frequencies_are_those_chosen_one_by_one(blocks: int, half: int, groups: int, seed: int, data: st.DataObject) -> None:
    pairs = data.draw(st.integers(1, half * groups))
    generator = np.random.default_rng(seed)
    energies = [-np.sort(-(generator.random((half, groups)) ** 4)) * 10**index for index in range(blocks)]
    assert mla.allot([torch.from_numpy(each) for each in energies], pairs).tolist() == oracle.most(energies, pairs)


def test_a_head_that_nothing_reads_does_not_break_anything() -> None:
    query, key, _, _, inputs = problem(2, 2, 4, 5, 0)
    query[:4] = 0
    moment = inputs.T @ inputs
    for alive in (query, 0 * query):
        found = mla.directions(mla.key_moments(key, 2, moment), mla.query_energies(alive, 2, moment))
        product = found.up @ found.down.mH
        assert torch.allclose(product, torch.eye(2, dtype=product.dtype).expand(2, 2, 2), atol=1e-6)


def test_evenly_spread_frequencies_are_geometric() -> None:
    assert mla.evenly_spread(8, 4).tolist() == [1, 0] * 4 and mla.evenly_spread(4, 4).tolist() == [1] * 4


# Nothing is lost at full width -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", GROUPS)
def test_at_full_width_plain_transformers_computes_the_same(groups: int, source: Callable[..., Path], tmp_path: Path) -> None:
    result = converted(source(groups), tmp_path / "out", FULL[groups], FULL[groups])
    before, after = tiny.plain(source(groups)), tiny.plain(tmp_path / "out")
    assert type(after).__name__ == "DeepseekV3ForCausalLM"
    assert difference(before, after) < 2e-4 and result["verification"]["mode"] == "full"
    assert torch.equal(continued(before), continued(after))
    assert all(record["lost"] < 1e-9 for record in result["transforms"])


def test_the_trained_model_computes_the_same(tmp_path: Path, in_float32: None) -> None:
    folder = Path(shutil.copytree(demo.path("dense"), tmp_path / "source"))
    tiny.plain(folder).save_pretrained(folder)  # as float32, so that nothing is rounded on the way
    converted(folder, tmp_path / "out", 128, 128)
    before, after = tiny.plain(folder), tiny.plain(tmp_path / "out")
    assert difference(before, after) < 2e-4 and torch.equal(continued(before), continued(after))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_other_static_frequencies_are_carried_over(rope: dict[str, Any], tmp_path: Path) -> None:
    folder = saved(tmp_path / "source", config_of(2, rope_parameters=rope | {"rope_theta": 10000.0}))
    converted(folder, tmp_path / "out", 32, 32)
    assert difference(tiny.plain(folder), tiny.plain(tmp_path / "out")) < 2e-4


def test_a_tied_mistral_computes_the_same(tmp_path: Path) -> None:
    import transformers as hf

    config = hf.MistralConfig(**config_of(2).to_dict() | {"model_type": "mistral", "sliding_window": None, "tie_word_embeddings": True})
    folder = saved(tmp_path / "source", config)
    converted(folder, tmp_path / "out", 32, 32)
    assert difference(tiny.plain(folder), tiny.plain(tmp_path / "out")) < 2e-4
    assert not [name for name in tiny.weights(tmp_path / "out") if name.startswith("lm_head")]


def test_what_config_leaves_out_no_other_class_makes_up(source: Callable[..., Path], tmp_path: Path, edit_config: Callable[..., None]) -> None:
    folder = Path(shutil.copytree(source(2), tmp_path / "source"))
    edit_config(folder, rms_norm_eps=None, max_position_embeddings=None, bos_token_id=None, eos_token_id=None, hidden_act=None)
    converted(folder, tmp_path / "out", 32, 32)
    before, after = tiny.plain(folder), tiny.plain(tmp_path / "out")
    assert difference(before, after) < 2e-4
    for key in ("max_position_embeddings", "eos_token_id", "bos_token_id"):
        assert getattr(before.config, key) == getattr(after.config, key)


def test_in_bfloat16_it_is_no_further_off_than_bfloat16_is(source: Callable[..., Path], tmp_path: Path) -> None:
    folder = saved(tmp_path / "source", config_of(2), torch.bfloat16)
    converted(folder, tmp_path / "out", 32, 32)
    exact = logits(tiny.plain(folder))
    off = [(logits(tiny.plain(path, torch.bfloat16)).float() - exact).square().mean().sqrt() for path in (folder, tmp_path / "out")]
    assert off[1] < 1.5 * off[0]


# The cache is smaller ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("groups", "rope", "rank"), [(2, 32, 32), (2, 16, 16), (2, 6, 10), (4, 32, 16), (1, 8, 4)])
def test_the_cache_holds_as_much_less_as_said(groups: int, rope: int, rank: int, source: Callable[..., Path], tmp_path: Path) -> None:
    converted(source(groups), tmp_path / "out", rope, rank)
    before, after = cached_bytes(tiny.plain(source(groups))), cached_bytes(tiny.plain(tmp_path / "out"))
    assert after * 2 * FULL[groups] == before * (rope + rank) and after == 2 * IDS.numel() * 4 * (rope + rank)
    assert Layout(Checkpoint(tmp_path / "out")).cached_channels == rope + rank


# Below full width it is what an explicit model of low rank is ------------------------------------------------------------------------


def drawn(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [batch.inputs for batch in calibration("demo:text", 4, 48, 0, Tokenizer(folder)).batches()]


@pytest.mark.parametrize(("groups", "rope", "rank"), [(1, 16, 5), (2, 32, 12), (2, 14, 32), (2, 10, 9), (4, 24, 40), (4, 64, 64)])
def test_it_is_the_explicit_model_of_low_rank(groups: int, rope: int, rank: int, source: Callable[..., Path], tmp_path: Path) -> None:
    converted(source(groups), tmp_path / "out", rope, rank)
    explicit = tiny.plain(source(groups))
    unchanged = logits(explicit)
    oracle.project(explicit, drawn(source(groups)), rope, rank)
    assert difference(explicit, tiny.plain(tmp_path / "out")) < 1e-4
    assert rope == rank == FULL[groups] or float((logits(explicit) - unchanged).abs().max()) > 0.05


@pytest.mark.parametrize("what", ["rope", "rank"])
def test_the_wider_the_less_is_lost(what: str, tmp_path: Path) -> None:
    lost, shares = [], []
    before = tiny.plain(demo.path("dense"))
    ids = calibration("demo:heldout", 2, 128, 0, Tokenizer(demo.path("dense")))
    rows = torch.stack([item.ids for item in ids.items if len(item.ids) == 128])
    wanted = logits(before, rows).log_softmax(-1)
    for width in (16, 32, 64, 128):
        out = tmp_path / str(width)
        widths = {"rope": 128, "rank": 128} | {what: width}
        result = compress(recipe_of(**widths) | {"calibration": {"samples": 16, "length": 128}}, "demo:dense", out)
        lost.append(float((wanted.exp() * (wanted - logits(tiny.plain(out), rows).log_softmax(-1))).sum(-1).mean()))
        shares.append(sum(record["lost"] for record in result["transforms"]))
    assert all(more > 1.5 * less for more, less in pairwise(lost)) and lost[-1] < 1e-3
    assert shares == sorted(shares, reverse=True)


# Whole runs -------------------------------------------------------------------------------------------------------------------------


def of_blocks(folder: Path, local: str) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in tiny.weights(folder) if f"{local}." in name})


@pytest.mark.parametrize("step", [{"rtn": {"group_size": 16}}, {"gptq": {"group_size": 16, "min_tokens": 0}}, None], ids=str)
def test_from_the_command_line(step: dict[str, Any] | None, source: Callable[..., Path], tmp_path: Path) -> None:
    steps = [step] if step else []
    path = tmp_path / "mla.yaml"
    path.write_text(yaml.safe_dump(recipe_of(16, 32, *steps) | {"evaluate": {"context": 64, "windows": 2}}))
    done = CliRunner().invoke(app, ["run", str(path), str(source(2)), "--out", str(tmp_path / "out")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["verification"]["mode"] == "full" and report["verification"]["logits_max_difference"] < 1e-3
    assert len(report["linears"]) == (12 if step else 0)
    assert of_blocks(tmp_path / "out", "kv_a_proj_with_mqa") == ["weight"]
    assert of_blocks(tmp_path / "out", "kv_b_proj") == (["weight_packed", "weight_scale", "weight_shape"] if step else ["weight"])
    assert continued(tiny.plain(tmp_path / "out")).shape == (3, 52)
    fates = {item["name"].removeprefix("model.layers.0.self_attn."): item["action"] for item in report["ledger"]}
    assert fates["k_proj.weight"] == fates["v_proj.weight"] == "removed" and fates["kv_a_proj_with_mqa.weight"] == "added"
    assert not list((tmp_path / "out").glob("*.py"))


def test_what_was_quantised_afterwards_is_read_by_everything_of_ours(source: Callable[..., Path], tmp_path: Path) -> None:
    converted(source(2), tmp_path / "out", 32, 32, {"rtn": {"bits": 8, "group_size": 16}})
    exact, packed = tiny.plain(source(2)), package.load(str(tmp_path / "out"))
    assert float((logits(packed) - logits(exact)).abs().max()) < 0.2 * float(logits(exact).abs().max())
    with pytest.raises(InputError, match="already quantised"):
        converted(tmp_path / "out", tmp_path / "again", 16, 16)


@pytest.mark.parametrize(
    "step",
    [
        {"smooth": {"min_tokens": 0}},
        {"rotate": {"r2": False}},
        {"prune_structured": {"keep": {"ffn_channel": 0.67}, "multiple_of": 32}},
        {"prune_depth": {"drop": 1}},
    ],
    ids=lambda step: next(iter(step)),
)
def test_passes_that_follow_take_it_for_any_other(step: dict[str, Any], source: Callable[..., Path], tmp_path: Path) -> None:
    converted(source(2), tmp_path / "out", 32, 32, step, {"rtn": {"bits": 8, "group_size": 16}})
    assert of_blocks(tmp_path / "out", "kv_a_proj_with_mqa") == ["weight"]
    if next(iter(step)) in ("smooth", "rotate"):
        assert difference(tiny.plain(source(2)), tiny.plain(tmp_path / "out")) < 0.2 * float(logits(tiny.plain(source(2))).abs().max())


def test_pruned_models_are_converted(source: Callable[..., Path], tmp_path: Path) -> None:
    pruned, mla_of = {"prune_structured": {"keep": {"kv_group": 0.5}, "method": "magnitude"}}, {"mla": {"rope": 16, "rank": 16}}
    compress(QUICK | {"passes": [pruned]}, source(2), tmp_path / "pruned")
    compress(QUICK | {"passes": [pruned, {"prune_depth": {"drop": 1}}]}, source(2), tmp_path / "shallow")
    compress(QUICK | {"passes": [pruned, {"prune_depth": {"drop": 1}}, mla_of]}, source(2), tmp_path / "out")
    assert difference(tiny.plain(tmp_path / "shallow"), tiny.plain(tmp_path / "out")) < 2e-4


def test_inputs_in_8_bits_are_possible_where_no_block_has_experts(source: Callable[..., Path], tmp_path: Path) -> None:
    step = {"bits": 8, "group_size": "channel", "activations": "dynamic"}
    with pytest.raises(InputError, match=r"activations: transformers gives .*kv_b_proj the latents of all tokens in a form .*; exclude it, or set"):
        converted(source(2), tmp_path / "out", 32, 32, {"rtn": step})
    converted(source(2), tmp_path / "static", 32, 32, {"rtn": step | {"activations": "static"}})
    converted(source(2), tmp_path / "out", 32, 32, {"rtn": step | {"exclude": ["*.kv_b_proj"]}})
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert any("kv_a_proj_with_mqa" in name for name in config["ignore"])


def test_a_plan_knows_what_comes_out(source: Callable[..., Path], tmp_path: Path) -> None:
    layout = Layout(Checkpoint(source(2)))
    checked = recipe.validate(recipe_of(16, 8, {"rtn": {"group_size": 16, "exclude": ["*kv_b_proj"]}}), "r.yaml")
    told = plan(checked, layout, recipe.check(checked, layout, "r.yaml"))
    compress(recipe_of(16, 8, {"rtn": {"group_size": 16, "exclude": ["*kv_b_proj"]}}), source(2), tmp_path / "out")
    assert told["instead"] is None
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert told["engines"]["vLLM"].startswith("refuses: knows no list of periods") and manifest["loadable_by"] == ["transformers"]
    assert told["size"]["after_bytes"] == Layout(Checkpoint(tmp_path / "out")).checkpoint.nbytes


# For vLLM ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def for_vllm(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A model in bfloat16 with heads of 64."""
    made: dict[int, Path] = {}

    def make(groups: int) -> Path:
        if groups not in made:
            config = config_of(groups, head_dim=64, rms_norm_eps=1e-6, num_attention_heads=2)
            made[groups] = saved(tmp_path_factory.mktemp("vllm"), config, torch.bfloat16)
        return made[groups]

    return make


def test_one_head_of_keys_is_exact_for_vllm(for_vllm: Callable[[int], Path], tmp_path: Path, in_float32: None) -> None:
    result = converted(for_vllm(1), tmp_path / "out", 64, 256, target="vllm")
    assert result["engines"]["vLLM"] == "unproven: attention to latents; loads: no weight is quantised"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert config["kv_lora_rank"] + config["qk_rope_head_dim"] == 320 and config["qk_nope_head_dim"] == 128
    before, after = tiny.plain(for_vllm(1)), tiny.plain(tmp_path / "out")
    assert difference(before, after) < 0.02 * float(logits(before).abs().max())  # weights are rounded to bfloat16
    assert int((tiny.weights(tmp_path / "out")["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"][:256] != 0).any(1).sum()) == 64


def test_for_vllm_frequencies_are_every_so_many_th(for_vllm: Callable[[int], Path], tmp_path: Path, in_float32: None) -> None:
    converted(for_vllm(2), tmp_path / "out", 32, 288, target="vllm")
    explicit = tiny.plain(for_vllm(2))
    oracle.project(explicit, drawn(for_vllm(2)), 32, 128, counts=[1, 0] * 16)
    assert difference(explicit, tiny.plain(tmp_path / "out")) < 0.02 * float(logits(explicit).abs().max())


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        (
            {"rope": 64, "rank": 64},
            {},
            r"rank: with rope 64 it is a cache of 128; vLLM has kernels for 320, 512, 576; set it to one of 256, 448, 512",
        ),
        ({"rope": 48, "rank": 272}, {}, r"rope: 48 does not divide the head size 64, .*; set it to one of 2, 4, 8, 16, 32, 64, or target: hf"),
        (
            {"rope": 64, "rank": 256},
            {"rms_norm_eps": 1e-5},
            r"target: vLLM takes rms_norm_eps 1e-05 for the norm of the latent and transformers 1e-06",
        ),
        ({"rope": 64, "rank": 256}, {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, r"target: vLLM's class gives linear frequencies"),
        ({"rope": 64, "rank": 256}, {"dtype": torch.float32}, r"target: vLLM's kernels compute in bfloat16, and the model is stored as F32"),
        ({"rope": 256, "rank": 256}, {"head_dim": 256}, r"rope: with a head of 256 leaves no width up to 256"),
    ],
)
def test_what_vllm_does_not_run_is_refused(options: dict[str, int], changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    dtype = changes.pop("dtype", torch.bfloat16)
    folder = saved(tmp_path / "source", config_of(1, **{"head_dim": 64, "rms_norm_eps": 1e-6} | changes), dtype)
    with pytest.raises(InputError, match=message):
        converted(folder, tmp_path / "out", target="vllm", **options)


# What is refused ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("llama-bias", r"mla: model\.layers\.0\.mlp\.down_proj\.bias has no place in a deepseek_v3"),
        ("qwen2", r"mla: model\.layers\.0\.self_attn\.k_proj\.bias has no place"),
        ("qwen3", r"mla: model\.layers\.0\.self_attn\.k_norm\.weight stands before the scores of each head \(QK-norm\)"),
        ("mistral", r"mla: attention looks back through a sliding window"),
        ("mixtral", r"mla: a mixtral has experts, which it routes in another way"),
        ("llava", r"mla: a llava sees"),
        ("deepseek_v3", r"mla: a deepseek_v3 caches a latent already; leave mla out"),
    ],
)
def test_other_kinds_are_refused_with_the_reason(kind: str, message: str, checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=message):
        recipe.check(recipe.validate(recipe_of(16, 16), "r.yaml"), Layout(Checkpoint(checkpoint(kind))), "r.yaml")


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, {}, r"the frequencies of dynamic rotary embedding change"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, {}, r"turns only a part of each head"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, {}, r"the frequencies of dynamic rotary embedding change"),
        ({}, {"rope": 34}, r"rope: 34 is more than the 32 of the keys of all heads; set it to 32 or less"),
        ({}, {"rank": 33}, r"rank: 33 is more than the 32 of the values of all heads; set it to 32 or less"),
    ],
)
def test_what_cannot_be_is_refused_beforehand(
    changes: dict[str, Any], options: dict[str, int], message: str, source: Callable[..., Path], tmp_path: Path, edit_config: Callable[..., None]
) -> None:
    folder = Path(shutil.copytree(source(2), tmp_path / "source"))
    edit_config(folder, **changes)
    with pytest.raises(InputError, match=message):
        recipe.check(recipe.validate(recipe_of(**{"rope": 16, "rank": 16} | options), "r.yaml"), Layout(Checkpoint(folder)), "r.yaml")


def test_a_mistral_that_says_nothing_of_windows_has_one(copy: Callable[..., Path], edit_config: Callable[..., None]) -> None:
    folder = copy("mistral")
    edit_config(folder, sliding_window=None)
    with pytest.raises(InputError, match="sliding window"):
        recipe.check(recipe.validate(recipe_of(16, 16), "r.yaml"), Layout(Checkpoint(folder)), "r.yaml")


def test_half_precision_is_refused(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"stored as F16, in which the small numbers vanish.*; start from a checkpoint in bfloat16 or float32"):
        recipe.check(recipe.validate(recipe_of(16, 16), "r.yaml"), Layout(Checkpoint(checkpoint("llama", torch.float16))), "r.yaml")


@pytest.mark.parametrize(("options", "message"), [({}, "rope: is missing"), ({"rope": 7, "rank": 8}, "rope: input should be a multiple of 2")])
def test_widths_have_to_be_given(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipe.validate({"passes": [{"mla": options}]}, "r.yaml")


def test_linears_of_low_rank_are_refused(source: Callable[..., Path]) -> None:
    plain = QUICK | {"passes": [{"low_rank": {"keep": 0.5, "multiple_of": 4}}, {"mla": {"rope": 16, "rank": 16}}]}
    with pytest.raises(InputError, match="blocks differ in width, or have linears of low rank; put mla before"):
        recipe.check(recipe.validate(plain, "r.yaml"), Layout(Checkpoint(source(2))), "r.yaml")


def test_names_of_linears_that_are_none_are_refused(copy: Callable[..., Path], edit_config: Callable[..., None]) -> None:
    folder = copy("llama")
    edit_config(folder, exact_linears="all")
    with pytest.raises(InputError, match="exact_linears: must list names of linears, got 'all'"):
        Layout(Checkpoint(folder))
