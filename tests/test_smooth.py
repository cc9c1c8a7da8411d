"""Smoothing against loops, and what must be true of it: nothing gets worse by the measure that is searched, and the model stays the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import smoothing as oracle
from oracles import statistics
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress import data, demo, pipeline, recipe
from compress.calibrate import Workspace, visit
from compress.checkpoint import Checkpoint
from compress.errors import InputError
from compress.layout import Layout
from compress.model import Model
from compress.numerics import clip
from compress.numerics.grid import Integer, minmax_scales, quantized, round_to_nearest
from compress.numerics.scaling import salient, shared_out
from compress.objective import losses
from compress.passes import smooth
from compress.passes.smooth import Pass
from compress.probe import Probe, Seen
from compress.scheme import Scheme

KINDS = ("llama-bias", "mistral", "qwen2", "qwen3", "qwen3_moe-dense-first", "mixtral", "qwen2_moe", "olmoe", "deepseek_v3", "llava")
QUICK: dict[str, Any] = {"calibration": {"samples": 4, "length": 48}, "evaluate": None, "verify": "full"}
GRID = {"bits": 3, "group_size": 32}


def open_model(folder: Path, **scheme: Any) -> Model:
    """A model all of whose linears will be stored alike."""
    layout = Layout(Checkpoint(folder))
    options = {"bits": 3, "group_size": 16, "symmetric": True} | scheme
    return Model(layout, dict.fromkeys(layout.linears, Scheme(**options)))


def probes(model: Model, work: Path, samples: data.Samples) -> Iterator[Probe]:
    """Every block in turn; to be used before the next is asked for."""
    work.mkdir(exist_ok=True)
    return visit(model, samples, Workspace(work, tiny.Silent()))


@contextmanager
def first_probe(model: Model, work: Path, samples: data.Samples) -> Iterator[Probe]:
    """The first block, as long as it lasts."""
    walk = probes(model, work, samples)
    yield next(walk)
    walk.close()


def smoothed(model: Model, work: Path, samples: data.Samples, **options: Any) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Every tensor of the blocks and the records, after the pass."""
    work.mkdir(exist_ok=True)
    Pass(**{"min_tokens": 0} | options).run(model, samples, Workspace(work, tiny.Silent()))
    records = [record for layout in model.blocks for record in model.adopt(work / f"block-{layout.index:05d}.safetensors")]
    tensors = {}
    for layout in model.blocks:
        with model.block(layout.index) as block:
            tensors |= {name: block.tensor(name) for name in layout.tensors}
    return tensors, records


def run(steps: list[dict[str, Any]], model: Path | str, out: Path, **more: Any) -> dict[str, Any]:
    plain = QUICK | {"passes": steps} | more
    request = pipeline.Request(recipe.validate(plain, "r.yaml"), "r.yaml", str(model), out, out.with_name(out.name + ".work"), False)
    return pipeline.run(request, tiny.Silent())


def all_counted(probe: Probe) -> list[Tensor]:
    return [torch.ones(hidden.shape[:2]) for hidden in probe.hidden]


# Factors ----------------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 100), min_size=1, max_size=20), st.floats(0, 1))
def test_salient_scales_are_powers_spread_evenly_around_one(magnitudes: list[float], alpha: float) -> None:
    scale = salient(torch.tensor(magnitudes), alpha)
    used = [(max(value**alpha, 1e-4), float(each)) for value, each in zip(torch.tensor(magnitudes).tolist(), scale, strict=True) if value > 0]
    assert all(float(each) == 1 for value, each in zip(magnitudes, scale, strict=True) if torch.tensor(value) == 0)
    if used:
        middle = (min(power for power, _ in used) * max(power for power, _ in used)) ** 0.5
        assert all(found == pytest.approx(power / middle, rel=1e-4) for power, found in used)


def test_an_exponent_of_nothing_scales_nothing() -> None:
    assert torch.equal(salient(torch.tensor([0.0, 1e-9, 3.0]), 0.0), torch.ones(3))
    assert torch.equal(salient(torch.tensor([0.5, 1e-9, 3.0]), 0.0, torch.tensor([2.0, 0.1, 0.0]), 0.0), torch.ones(3))


@given(
    st.lists(st.tuples(st.floats(0.01, 100), st.floats(0.01, 1), st.integers(-6, 6)), min_size=1, max_size=20),
    st.integers(0, 20).map(lambda n: n / 20),
)
def test_powers_that_make_one_follow_whatever_scale_is_moved_between_inputs_and_weights(
    channels: list[tuple[float, float, int]], alpha: float
) -> None:
    """Where inputs are some times as large and weights as much smaller, the factors take it back, whatever the power."""
    inputs, weights, moved = torch.tensor(channels).T
    moved = moved.exp2()
    before, after = salient(inputs, alpha, weights, 1 - alpha), salient(inputs * moved, alpha, weights / moved, 1 - alpha)
    ratio = after / (before * moved)
    assert torch.allclose(ratio, ratio[:1].expand_as(ratio), rtol=1e-4)


def test_shared_out_scales_make_inputs_as_large_as_weights() -> None:
    inputs, weights = torch.tensor([8.0, 0.5, 0.0, 3.0]), torch.tensor([2.0, 2.0, 1.0, 0.0])
    scale = shared_out(inputs, weights, 0.5)
    assert torch.allclose((inputs / scale)[:2], (weights * scale)[:2]) and scale[2:].tolist() == [1.0, 1.0]
    assert torch.allclose(shared_out(inputs, weights, 1.0)[:2], inputs[:2])


# What is measured -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2_moe", "deepseek_v3", "llava"])
def test_magnitudes_are_those_of_loops_over_plain_transformers(kind: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    samples, folder = tiny.samples(image=kind == "llava"), checkpoint(kind)
    seen = statistics.inputs_of_linears(tiny.plain(folder), [batch.inputs for batch in samples.batches()])
    model = open_model(folder)
    for probe in probes(model, tmp_path, samples):
        smoothing = smooth.Smoothing(Pass(), model, probe, samples, None)
        for group in (each for each in smoothing.groups if each.expert is None):
            name = group.linears[-1].name.replace(model.layout.arch.blocks, model.layout.arch.module_blocks, 1)
            mean, largest, count = oracle.magnitudes(seen[name])
            found = smoothing.seen[group.name]
            assert count == found.tokens and found.mean().tolist() == pytest.approx(mean, rel=1e-4)
            assert found.largest.tolist() == pytest.approx(largest, rel=1e-4)
            moment = statistics.second_moment(seen[name]).view(-1, 16, group.columns // 16, 16)
            inside = torch.stack([moment[place, :, place] for place in range(group.columns // 16)])
            assert torch.allclose(found.moment().double(), inside, rtol=1e-3, atol=1e-5 * float(inside.abs().max()))


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_what_all_experts_were_given_is_what_their_norm_gives(kind: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    samples, folder = tiny.samples(), checkpoint(kind)
    given: list[Tensor] = []
    plain = tiny.plain(folder)
    plain.model.layers[0].post_attention_layernorm.register_forward_hook(lambda _, arguments, output: given.append(output.detach()))
    for batch in samples.batches():
        plain(**batch.inputs)
    mean, largest, count = oracle.magnitudes(given)
    model = open_model(folder)
    with first_probe(model, tmp_path, samples) as probe:
        smoothing = smooth.Smoothing(Pass(), model, probe, samples, None)
    whole = Seen.together([smoothing.seen[f"model.layers.0.experts.gate_up.{expert}"] for expert in range(4 if kind == "mixtral" else 8)])
    assert whole.tokens == 2 * count and whole.mean().tolist() == pytest.approx(mean, rel=1e-4)
    assert whole.largest.tolist() == pytest.approx(largest, rel=1e-4)


def test_dividing_what_was_seen_is_seeing_what_was_divided() -> None:
    inputs, factor = torch.randn(3, 7, 32), torch.rand(32) + 0.5
    before, after = Seen(32, 8, torch.device("cpu")), Seen(32, 8, torch.device("cpu"))
    before.add(inputs)
    before.divide(factor)
    after.add(inputs / factor)
    for one, other in ((before.mean(), after.mean()), (before.largest, after.largest), (before.moment(), after.moment())):
        assert torch.allclose(one, other, rtol=1e-5)


JUDGED = {"qkv": "self_attn", "gate_up": "mlp", "experts.gate_up": "mlp"}


@pytest.mark.parametrize("kind", ["llama-bias", "mistral", "qwen3_moe", "mixtral", "qwen2_moe", "deepseek_v3", "llava"])
def test_the_loss_is_that_of_plain_transformers_with_other_weights(kind: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    samples, folder = tiny.samples(image=kind == "llava"), checkpoint(kind)
    batches = [batch.inputs for batch in samples.batches()]
    plain, other = tiny.plain(folder), open_model(folder)
    prefix = f"{other.layout.arch.module_blocks}.0"
    with first_probe(other, tmp_path, samples) as probe:
        counted = all_counted(probe)
        counted[0][1] = 0  # a row, and tokens in others, that do not count
        counted[-1][:, :3] = 0
        counted[-1][:, 3:5] = 0.3  # and some that count for less
        for edge in probe.block.layout.edges:
            if edge.expert is not None:
                continue
            weights = {name: probe.block.weight(name) * 0.9 + 0.01 for name in edge.consumers if name in other.layout.linears}
            alone = edge.consumers[0].removeprefix(f"{probe.block.layout.prefix}.")
            judged = f"{prefix}.{JUDGED[edge.kind] if len(edge.consumers) > 1 else alone}"
            before = oracle.outputs(plain, judged, batches)
            changed = tiny.plain(folder)
            with torch.no_grad():
                for name, weight in weights.items():
                    other._slots[0][f"{name}.weight"].view(changed.get_submodule(prefix)).copy_(weight)
            after = oracle.outputs(changed, judged, batches)
            for error, power in (("mse", 2), ("mae", 1)):
                found = losses(probe, [edge], counted, error)[edge.name](weights)
                assert found == pytest.approx(oracle.relative_error(before, after, [each.tolist() for each in counted], power), rel=1e-3), edge.name


def test_the_loss_of_an_expert_is_that_of_the_tokens_it_is_given(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    samples, folder = tiny.samples(), checkpoint("qwen3_moe")
    _, seconds = statistics.inputs_of_experts(tiny.plain(folder), "model.layers.0.mlp.experts", [batch.inputs for batch in samples.batches()])
    with first_probe(open_model(folder), tmp_path, samples) as probe:
        edges = [edge for edge in probe.block.layout.edges if edge.kind == "experts.down"]
        found = losses(probe, edges, all_counted(probe))
        for edge, rows in zip(edges, seconds, strict=True):
            weight = probe.block.weight(edge.consumers[0])
            changed = weight * 1.1 - 0.02
            lost = sum(float((changed @ row - weight @ row).double().square().sum()) for row in rows)
            energy = sum(float((weight @ row).double().square().sum()) for row in rows)
            assert found[edge.name]({edge.consumers[0]: changed}) == pytest.approx(lost / energy, rel=1e-3)


def test_inputs_are_rounded_where_the_channels_are_divided(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Against the linear that would be stored, given what it would be given: both with the factors folded in."""
    samples, folder = tiny.samples(), checkpoint("llama")
    model = open_model(folder, bits=4, group_size=96, activations="dynamic")
    given: list[torch.Tensor] = []
    with first_probe(model, tmp_path, samples) as probe:
        smoothing = smooth.Smoothing(Pass(clip=False), model, probe, samples, None)
        edge = next(edge for edge in probe.block.layout.edges if edge.kind == "down")
        (name,) = edge.consumers
        factor = torch.linspace(0.5, 2, model.layout.linears[name].columns)
        probe.observe(lambda group, inputs: given.append(inputs.flatten(0, -2)) if group.linears[0].name == name else None)
        weight, rows = probe.block.weight(name), torch.cat(given)
        changed = smoothing._rounded({name: weight}, factor)
        divided = rows / factor
        steps = divided.abs().amax(-1, keepdim=True) / 127.5
        rounded = (divided / steps).round().clamp(-128, 127) * steps
        before, after = [rows @ weight.T], [rounded @ (changed[name] * factor).T]
        (loss,) = losses(probe, [edge], all_counted(probe)).values()
        found = loss(changed, smoothing._inputs(edge, [name], factor))
        assert found == pytest.approx(oracle.relative_error(before, after, [[[1.0] * len(rows)]]), rel=1e-3)


def test_trying_weights_leaves_no_trace(checkpoint: Callable[..., Path]) -> None:
    model = open_model(checkpoint("qwen3_moe"))
    with model.block(0) as block:
        before = {name: parameter.clone() for name, parameter in block.module.named_parameters()}
        names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.3.up_proj"]
        with block.trying({name: torch.zeros_like(block.weight(name)) for name in names}):
            assert (
                not block.submodule(names[0]).weight.any()
                and not block.experts.gate_up_proj[3, 32:].any()
                and block.experts.gate_up_proj[3, :32].all()
            )
        assert all(torch.equal(parameter, before[name]) for name, parameter in block.module.named_parameters())


# Ranges -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_ranges_are_cut_where_loops_over_tokens_say(bits: int, symmetric: bool, stored: torch.dtype) -> None:
    weight, inputs = torch.randn(4, 24) * torch.rand(24).exp2(), torch.randn(50, 24) @ torch.randn(24, 24)
    seen = Seen(24, 8, torch.device("cpu"))
    seen.add(inputs)
    grid = Integer(bits, symmetric)
    cut = clip.clipped(weight, seen.moment(), grid, stored)
    scales = minmax_scales(cut, grid, 8, stored)
    rounded = quantized(round_to_nearest(cut, scales, grid), scales, grid, stored).dequantize().float()
    shares = [1 - 0.05 * step for step in range(10)]
    for row in range(4):
        for start in range(0, 24, 8):
            part = slice(start, start + 8)
            lost = float((inputs[:, part] @ (rounded - weight)[row, part]).square().mean())
            tokens = inputs[:, part].tolist()
            assert lost == pytest.approx(oracle.best_clip(weight[row, part].tolist(), shares, bits, symmetric, stored, tokens), rel=2e-2)
            assert lost <= oracle.clip_error(weight[row, part].tolist(), 1, 1, bits, symmetric, stored, tokens) * 1.001


def test_clipping_does_not_depend_on_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = torch.randn(7, 32), torch.eye(16).repeat(2, 1, 1) + 0.5
    whole = clip.clipped(weight, moment, Integer(3, False), torch.bfloat16)
    monkeypatch.setattr(clip, "TILE", 1)
    assert torch.equal(clip.clipped(weight, moment, Integer(3, False), torch.bfloat16), whole)


def test_queries_and_keys_are_not_clipped(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    _, records = smoothed(open_model(checkpoint("llama"), bits=2), tmp_path, tiny.samples(), alpha=0.0)
    clipped = {record["name"].rpartition(".")[2]: record["clipped"] for record in records if record["kind"] == "clip"}
    assert set(clipped) == {"v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"} and all(clipped.values())


# The pass ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama-bias", "qwen3_moe-dense-first", "llava"])
def test_what_is_chosen_loses_no_more_than_doing_nothing(kind: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    _, records = smoothed(open_model(checkpoint(kind)), tmp_path, tiny.samples(image=kind == "llava"))
    errors = [record["error"] for record in records if record["kind"] != "clip"]
    assert all(best <= nothing for nothing, best in errors) and sum(best for _, best in errors) < sum(nothing for nothing, _ in errors)


def test_an_edge_whose_readers_nobody_rounds_is_left_alone(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model = open_model(checkpoint("llama"))
    model.schemes = {name: scheme for name, scheme in model.schemes.items() if ".mlp." in name}
    tensors, records = smoothed(model, tmp_path, tiny.samples())
    alphas = {record["name"]: record["alpha"] for record in records if record["kind"] in ("qkv", "o")}
    assert len(alphas) == 4 and not any(alphas.values())
    assert all(torch.equal(tensor, model.checkpoint.read(name)) for name, tensor in tensors.items() if "self_attn" in name)


def test_a_fine_grid_loses_next_to_nothing(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    _, records = smoothed(open_model(checkpoint("llama"), bits=8), tmp_path, tiny.samples(), clip=False)
    assert all(record["error"][1] < 1e-4 for record in records)


@pytest.mark.parametrize(("method", "kind"), [*(("awq", kind) for kind in KINDS), ("smoothquant", "qwen2"), ("smoothquant", "mixtral")])
def test_the_model_computes_the_same_afterwards(method: str, kind: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    samples, folder = tiny.samples(image=kind == "llava"), checkpoint(kind)
    model = open_model(folder)
    before = _logits(model, samples)
    tensors, _ = smoothed(model, tmp_path, samples, method=method, clip=False, alpha=0.7)
    assert any(not torch.equal(tensor, model.checkpoint.read(name)) for name, tensor in tensors.items())
    for one, other in zip(before, _logits(model, samples), strict=True):
        assert float((one - other).abs().max() / one.abs().max()) < 1e-4


def _logits(model: Model, samples: data.Samples) -> list[Tensor]:
    from compress.evaluate.scoring import last_hidden

    return [model.logits(hidden) for hidden in last_hidden(model, samples)]


@pytest.mark.parametrize(("kind", "per_batch"), [("llama", 1), ("mixtral", 60)])
def test_nothing_depends_on_the_batch(
    kind: str, per_batch: int, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smooth, "JUDGED_TOKENS", 40)
    folder = checkpoint(kind)
    # On a symmetric grid the largest weight of a group is a tie between two codes, which any rounding of its scale decides.
    whole, records = smoothed(open_model(folder, symmetric=False), tmp_path / "whole", tiny.samples(), min_tokens=0.25)
    monkeypatch.setattr(data, "TOKENS_PER_BATCH", per_batch)
    parts, of_parts = smoothed(open_model(folder, symmetric=False), tmp_path / "parts", tiny.samples(), min_tokens=0.25)
    assert [record.get("alpha") for record in records] == [record.get("alpha") for record in of_parts]
    assert all(torch.allclose(parts[name], tensor, rtol=1e-4, atol=1e-6) for name, tensor in whole.items())


def test_samples_beyond_those_judged_do_not_change_the_loss(checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smooth, "JUDGED_TOKENS", 48)
    folder, samples = checkpoint("llama"), tiny.samples()
    found = []
    for name, items in (("few", samples.items[:2]), ("many", samples.items)):
        model = open_model(folder)
        part = data.Samples("part", items)
        with first_probe(model, tmp_path / name, part) as probe:
            edge = probe.block.layout.edges[0]
            found.append(losses(probe, [edge], smooth._counted(probe, part))[edge.name]({edge.consumers[0]: torch.zeros(64, 64)}))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_an_expert_that_saw_too_little_is_left_alone_and_recorded(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model = open_model(checkpoint("qwen3_moe"))
    tensors, records = smoothed(model, tmp_path, tiny.samples((12, 9)), min_tokens=0.25)
    starved = {record["name"] for record in records if record["fallback"]}
    assert starved and all(".experts." in name for name in starved)
    expert = next(name for name in sorted(starved) if ".experts.down." in name)
    block, number = expert.split(".")[2], expert.rpartition(".")[2]
    name = f"model.layers.{block}.mlp.experts.{number}.down_proj.weight"
    assert torch.equal(tensors[name], model.checkpoint.read(name))


@pytest.mark.parametrize(("kind", "dtype"), [("qwen2", torch.float32), ("qwen3_moe", torch.bfloat16), ("llava", torch.bfloat16)])
def test_a_recipe_that_only_folds_makes_a_dense_model_that_plain_transformers_opens(
    kind: str, dtype: torch.dtype, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = checkpoint(kind, dtype)
    result = run([{"smooth": {"method": "smoothquant"}}], folder, tmp_path / "out")
    written, source = Checkpoint(tmp_path / "out"), Checkpoint(folder)
    assert {name: (info.dtype, info.shape) for name, info in written.tensors.items()} == {
        name: (info.dtype, info.shape) for name, info in source.tensors.items()
    }
    folded = {item["name"] for item in result["ledger"] if item["action"] == "folded"}
    changed = {name for name in source.tensors if not torch.equal(source.read(name), written.read(name))}
    assert changed and changed <= folded and "quantization_config" not in written.config
    assert any(name.endswith("mlp.gate.weight") for name in folded) == (kind == "qwen3_moe")


def test_what_is_folded_and_then_rounded_is_said_to_be_both(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    result = run([{"smooth": {}}, {"rtn": GRID}], checkpoint("llama", torch.bfloat16), tmp_path / "out")
    why = {item["name"]: (item["action"], item["why"]) for item in result["ledger"]}
    assert why["model.layers.0.self_attn.q_proj.weight"] == ("quantized", "rtn: 3 bits, group 32, folded by smooth before")
    assert why["model.layers.0.input_layernorm.weight"] == ("folded", "by smooth, stored in its own dtype again")
    assert why["lm_head.weight"][0] == "kept"
    assert {record["kind"] for record in result["transforms"]} == {"qkv", "o", "gate_up", "down", "clip"}
    assert "byte for byte" not in (tmp_path / "out" / "README.md").read_text()


def test_cut_ranges_are_those_that_plain_rounding_finds(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """The error that clipping measured is the one rounding makes afterwards: the range it cut to is the range of the group."""
    model = open_model(checkpoint("llama"), bits=2)
    tensors, _ = smoothed(model, tmp_path, tiny.samples(), alpha=0.0)
    name = "model.layers.1.mlp.up_proj.weight"
    cut, before = tensors[name], model.checkpoint.read(name)
    moved = (cut != before).view(96, 4, 16).any(-1)
    largest = cut.abs().view(96, 4, 16).amax(-1)
    assert moved.any() and (largest[moved] < before.abs().view(96, 4, 16).amax(-1)[moved]).all()


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([{"smooth": {}}], "prepares for rounding, but no pass after it rounds anything; add one"),
        ([{"smooth": {"method": "smoothquant", "clip": True}}], "prepares for rounding"),
        ([{"smooth": {"edges": ["qk"]}}, {"rtn": GRID}], r"smooth: edges\.0: input should be 'qkv', 'o', 'gate_up' or 'down', got 'qk'"),
        ([{"smooth": {"edges": []}}, {"rtn": GRID}], "smooth: edges"),
        ([{"rtn": GRID}, {"smooth": {}}], "smooth belongs to stage transform, but comes after a pass of stage quantize"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(steps: list[dict[str, Any]], message: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        run(steps, checkpoint("llama"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


# Outliers ---------------------------------------------------------------------------------------------------------------------------


def plant_outliers(source: Path, target: Path, factor: float = 32.0, channels: tuple[int, ...] = (3, 77, 190)) -> Path:
    """The same function with a few channels of every norm `factor` times as large, and the weights that read them as much smaller.

    A power of two, so that nothing is rounded even in bfloat16.
    """
    shutil.copytree(source, target)
    layout = Layout(Checkpoint(source))
    tensors = {name: tensor for path in source.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for block in layout.blocks:
        for edge in block.edges:
            if f"{edge.producer}.weight" in tensors and tensors[f"{edge.producer}.weight"].ndim == 1:
                tensors[f"{edge.producer}.weight"][list(channels)] *= factor
                for linear in edge.consumers:
                    tensors[f"{linear}.weight"][:, list(channels)] /= factor
    for path in target.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def test_planted_outliers_change_nothing_but_the_magnitudes(tmp_path: Path) -> None:
    planted = plant_outliers(demo.path("dense"), tmp_path / "planted")
    ids = torch.arange(5, 45)[None]
    one, other = (tiny.plain(folder)(input_ids=ids).logits.detach() for folder in (demo.path("dense"), planted))
    assert float((one - other).abs().max() / one.abs().max()) < 1e-5


def test_smoothquant_takes_planted_outliers_away(tmp_path: Path) -> None:
    """Largest input of a norm over the median one: with outliers planted far above what it is after smoothing."""
    planted = plant_outliers(demo.path("dense"), tmp_path / "planted")
    samples = tiny.samples()
    ratios: dict[str, list[float]] = {"before": [], "after": []}
    for name, options in (("before", {"alpha": 0.0, "method": "awq"}), ("after", {"method": "smoothquant"})):
        model = Model(Layout(Checkpoint(planted)))
        smoothed(model, tmp_path / name, samples, clip=False, **options)
        for probe in probes(model, tmp_path / f"{name}-again", samples):
            smoothing = smooth.Smoothing(Pass(clip=False), model, probe, samples, None)
            largest = [smoothing.seen[f"{probe.block.layout.prefix}.{group}"].largest for group in ("qkv", "gate_up")]
            ratios[name] += [float(each.max() / each.median()) for each in largest]
    assert min(ratios["before"]) > 20 and max(ratios["after"]) < 10


def lost(steps: list[dict[str, Any]], model: Path | str, out: Path) -> float:
    """Mean divergence from the source in nats."""
    measured = {"calibration": {"samples": 6, "length": 128}, "evaluate": {"context": 128, "windows": 4}, "verify": "streamed"}
    return float(run(steps, model, out, **measured)["evaluation"]["compressed"]["kl"])


def test_smoothquant_makes_good_what_outliers_do_to_rounded_inputs(tmp_path: Path) -> None:
    rounding = {"rtn": {"bits": 8, "group_size": "channel", "activations": "dynamic"}}
    planted = plant_outliers(demo.path("dense"), tmp_path / "planted")
    plain = lost([rounding], planted, tmp_path / "plain")
    smooth = lost([{"smooth": {"method": "smoothquant"}}, rounding], planted, tmp_path / "smooth")
    assert smooth < 0.1 * plain and smooth < 0.003


def test_outliers_hardly_change_what_awq_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Submodule by submodule: with powers of inputs alone the error behind norms is a fifth larger than without outliers."""
    monkeypatch.setattr(smooth, "JUDGED_TOKENS", 256)
    monkeypatch.setattr(smooth, "CANDIDATES", 5)
    planted = plant_outliers(demo.path("dense"), tmp_path / "planted")
    found, of_inputs = [], []
    for folder in (demo.path("dense"), planted):
        layout = Layout(Checkpoint(folder))
        model = Model(layout, dict.fromkeys(layout.linears, Scheme(bits=3, group_size=128, symmetric=True)))
        _, records = smoothed(model, tmp_path / f"work-{folder.name}", tiny.samples((120, 100)), clip=False)
        found.append(sum(record["error"][1] for record in records if record["kind"] in ("qkv", "gate_up")))
        of_inputs.append([record["name"] for record in records if record["kind"] in ("qkv", "gate_up") and not record["beta"]])
    assert found[1] < 1.1 * found[0] and not of_inputs[1]


def test_awq_loses_less_than_plain_rounding_on_a_trained_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smooth, "JUDGED_TOKENS", 256)
    monkeypatch.setattr(smooth, "CANDIDATES", 4)
    rounding = {"rtn": {"bits": 3, "group_size": 128}}
    assert lost([{"smooth": {}}, rounding], "demo:dense", tmp_path / "awq") < 0.6 * lost([rounding], "demo:dense", tmp_path / "plain")


def test_the_artifact_says_what_the_recipe_says(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    run([{"smooth": {"method": "smoothquant", "alpha": 0.8}}], checkpoint("llama"), tmp_path / "out")
    again = recipe.load(tmp_path / "out" / "recipe.yaml")
    assert again.hash == json.loads((tmp_path / "out" / "manifest.json").read_text())["recipe_hash"]
