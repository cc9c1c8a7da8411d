"""What a sweep measures is what plain transformers would have shown at the same place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
import torch
from oracles import statistics as oracle
from torch import Tensor

from compress import calibrate, data
from compress.backsweep import all_linears, backsweep
from compress.calibrate import Inputs, SecondMoment, Workspace, sweep
from compress.checkpoint import Checkpoint
from compress.layout import Group, Layout
from compress.model import Model
from compress.numerics.grid import Integer, Quantized

MOE = tiny.ROUTED
Measured = dict[str, tuple[Tensor, int]]


def open_model(folder: Path) -> Model:
    return Model(Layout(Checkpoint(folder)))


def swept(folder: Path, samples: data.Samples, work: Path, wanted: Callable[[Group], bool] = lambda group: True) -> Measured:
    """Hessian and tokens by name of the input group, changing nothing."""
    return {
        group.name: (hessian.clone(), tokens)
        for inputs in sweep(open_model(folder), samples, Workspace(work, tiny.Silent()), wanted)
        for group, hessian, tokens in zip(inputs.groups, inputs.hessian, inputs.tokens, strict=True)
    }


def close(measured: Tensor, expected: Tensor) -> bool:
    return bool(torch.allclose(measured.double(), expected.double(), rtol=1e-4, atol=1e-5 * float(expected.abs().max())))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "qwen2_moe", "olmoe", "deepseek_v3", "deepseek_v3-q", "llava"])
def test_second_moments_equal_those_of_hooks_on_plain_transformers(kind: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    samples = tiny.samples(image=kind == "llava")
    folder = checkpoint(kind)
    seen = oracle.inputs_of_linears(tiny.plain(folder), [batch.inputs for batch in samples.batches()])
    layout = Layout(Checkpoint(folder))
    blocks, module_blocks = layout.arch.blocks, layout.arch.module_blocks
    measured = swept(folder, samples, tmp_path)
    shared = [group for block in layout.blocks for stage in block.stages for group in stage.groups if group.expert is None]
    for group in shared:
        expected = oracle.second_moment(seen[group.linears[-1].name.replace(blocks, module_blocks, 1)])
        assert close(measured[group.name][0], expected), group.name


@pytest.mark.parametrize("kind", MOE)
def test_second_moments_of_experts_equal_those_of_loops_over_tokens(kind: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    samples, folder = tiny.samples(), checkpoint(kind)
    batches = [batch.inputs for batch in samples.batches()]
    measured, reference = swept(folder, samples, tmp_path), tiny.plain(folder)
    first, second = oracle.inputs_of_experts(reference, "model.layers.1.mlp.experts", batches)
    for expert in range(len(first)):
        for name, tokens in (("experts.gate_up", first[expert]), ("experts.down", second[expert])):
            hessian, count = measured[f"model.layers.1.{name}.{expert}"]
            assert count == len(tokens) and (not tokens or close(hessian, oracle.second_moment(tokens))), name


@pytest.mark.parametrize("kind", MOE)
def test_tokens_of_all_experts_add_up_to_tokens_times_top_k(kind: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    samples = tiny.samples()
    measured = swept(checkpoint(kind), samples, tmp_path, lambda group: group.expert is not None)
    assert sum(count for name, (_, count) in measured.items() if name.startswith("model.layers.1.experts.down")) == samples.tokens * 2


@pytest.mark.parametrize("per_batch", [1, 30, 60])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3_moe"])
def test_second_moments_do_not_depend_on_the_batch(
    kind: str, per_batch: int, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = tiny.samples()
    whole = swept(checkpoint(kind), samples, tmp_path / "whole")
    monkeypatch.setattr(data, "TOKENS_PER_BATCH", per_batch)
    parts = swept(checkpoint(kind), samples, tmp_path / "parts")
    assert all(close(parts[name][0], hessian) and parts[name][1] == count for name, (hessian, count) in whole.items())


@pytest.mark.parametrize("per_batch", [1, 30])
def test_in_float64_nothing_depends_on_the_batch_but_the_last_digits(
    per_batch: int, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact_norms: None
) -> None:
    """Sequences differ in length here; they are never padded, only batched with their like."""
    folder, samples = checkpoint("llama", torch.float64), tiny.samples()

    def measured(name: str) -> list[Tensor]:
        work = Workspace(tmp_path / name, tiny.Silent())
        swept = [(inputs.hessian, inputs.moved) for inputs in sweep(open_model(folder), samples, work, lambda group: True, drift=True)]
        moved = [each for _, drift in swept if drift for each in (drift.inputs, drift.stream) if each is not None]
        swept_back = backsweep(open_model(folder), samples, tmp_path / name, lambda block: {k: v.double() for k, v in all_linears(block).items()})
        gradients = [gradient for found in swept_back for gradient in found.weights.values()]
        return [*(hessian for hessian, _ in swept), *moved, *gradients]

    whole = measured("whole")
    monkeypatch.setattr(data, "TOKENS_PER_BATCH", per_batch)
    parts = measured("parts")
    assert {each.dtype for each in whole} == {torch.float64} and len(whole) == len(parts)
    assert all(float((one - other).norm()) <= 1e-9 * float(one.norm()) for one, other in zip(whole, parts, strict=True))


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path) -> None:
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()


@pytest.mark.parametrize("room", [1, 3 * 4 * 64 * 64])
def test_experts_measured_in_several_turns_equal_those_of_one(
    room: int, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, samples = checkpoint("qwen3_moe"), tiny.samples()
    whole = swept(folder, samples, tmp_path / "whole")
    monkeypatch.setattr(calibrate, "STATISTICS_BYTES", room)
    parts = swept(folder, samples, tmp_path / "parts")
    assert list(parts) == list(whole) and all(torch.equal(parts[name][0], hessian) for name, (hessian, _) in whole.items())


def test_groups_come_in_the_order_in_which_data_flows(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    names = list(swept(checkpoint("llama"), tiny.samples(), tmp_path))
    assert names == [f"model.layers.{block}.{group}" for block in (0, 1) for group in ("qkv", "o", "gate_up", "down")]


def nothing(rows: int, columns: int) -> Quantized:
    """A weight of zeros."""
    return Quantized(torch.zeros(rows, columns, dtype=torch.int8), torch.ones(rows, 1), None, Integer(4, True))


def quantise_away(inputs: Iterator[Inputs], ends: tuple[str, ...]) -> dict[str, Tensor]:
    """Set linears to zero as the sweep passes them; Hessians by group."""
    seen = {}
    for each in inputs:
        for group, hessian in zip(each.groups, each.hessian, strict=True):
            seen[group.name] = hessian.clone()
            for linear in group.linears:
                if linear.name.endswith(ends):
                    each.block.set_quantized(linear.name, nothing(linear.rows, linear.columns), {})
    return seen


@pytest.mark.parametrize(
    ("ends", "silent"),
    [(("v_proj",), "model.layers.0.o"), (("up_proj",), "model.layers.1.down"), (("w3",), "model.layers.0.experts.down.0")],
)
def test_a_group_sees_what_was_done_to_those_before_it(ends: tuple[str, ...], silent: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model = open_model(checkpoint("mixtral" if "w3" in ends else "llama"))
    seen = quantise_away(sweep(model, tiny.samples(), Workspace(tmp_path, tiny.Silent()), lambda group: True), ends)
    assert not seen[silent].any()


def test_a_block_sees_what_was_done_to_the_blocks_before_it(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder, samples = checkpoint("llama"), tiny.samples()
    everything = ("o_proj", "down_proj")
    model = open_model(folder)
    seen = quantise_away(sweep(model, samples, Workspace(tmp_path, tiny.Silent()), lambda group: True), everything)
    # With nothing written to the residual stream, the second block reads what the first one did, up to the weight of the norm.
    norms = [model.checkpoint.read(f"model.layers.{block}.input_layernorm.weight") for block in (0, 1)]
    ratio = norms[1] / norms[0]
    assert close(seen["model.layers.1.qkv"], seen["model.layers.0.qkv"] * torch.outer(ratio, ratio))


@pytest.mark.parametrize("kind", ["llama", "qwen2-sliding", "mixtral"])
def test_drift_is_measured_against_the_model_as_it_was(kind: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder, samples = checkpoint(kind), tiny.samples()
    changed, before = tiny.plain(folder), tiny.plain(folder)
    changed.model.layers[0].self_attn.v_proj.weight.data.zero_()
    batches = [batch.inputs for batch in samples.batches()]
    old, new = (oracle.inputs_of_linears(model, batches) for model in (before, changed))
    streams = [oracle.residual_streams(model, batches) for model in (before, changed)]
    measured = {}
    for inputs in sweep(open_model(folder), samples, Workspace(tmp_path, tiny.Silent()), lambda group: True, drift=True):
        name = inputs.groups[0].linears[0].name
        if name == "model.layers.0.self_attn.q_proj":
            linear = inputs.groups[0].linears[-1]
            inputs.block.set_quantized(linear.name, nothing(linear.rows, linear.columns), {})
        if inputs.moved is None:
            assert inputs.groups[0].expert is not None
        else:
            measured[name] = inputs.moved
    assert set(measured) == {name for name in old if name.endswith(("q_proj", "o_proj", "gate_proj", "down_proj"))}
    for name, moved in measured.items():
        assert close(moved.inputs, oracle.cross_moment(old[name], new[name], new[name]) / samples.tokens), name
        assert (moved.stream is not None) == name.endswith(("o_proj", "down_proj"))
        if moved.stream is not None:
            assert close(moved.stream, oracle.cross_moment(streams[0][name], streams[1][name], new[name]) / samples.tokens), name
    last = measured["model.layers.1.mlp.down_proj" if kind != "mixtral" else "model.layers.1.self_attn.o_proj"]
    assert not measured["model.layers.0.self_attn.q_proj"].inputs.any() and last.inputs.any() and last.stream is not None and last.stream.any()


def test_only_wanted_groups_are_measured(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    assert list(swept(checkpoint("llama"), tiny.samples(), tmp_path, lambda group: group.name.endswith("1.down"))) == ["model.layers.1.down"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 1030])
def test_a_second_moment_equals_that_of_a_loop(width: int, dtype: torch.dtype) -> None:
    rows = torch.randn(3, 5, width).to(dtype)
    moment = SecondMoment(1, width, torch.device("cpu"))
    for row in rows:
        moment.add(0, row)
    assert close(moment.mean()[0], oracle.second_moment([rows]))


def test_a_second_moment_is_symmetric() -> None:
    moment = SecondMoment(1, 1500, torch.device("cpu"))
    moment.add(0, torch.randn(4, 1500))
    mean = moment.mean()[0]
    assert torch.equal(mean, mean.T)


def test_merged_halves_equal_the_whole() -> None:
    rows = torch.randn(20, 16)
    whole, left, right = (SecondMoment(2, 16, torch.device("cpu")) for _ in range(3))
    for moment, part in ((whole, rows), (left, rows[:7]), (right, rows[7:])):
        moment.add(1, part)
    left.merge(right)
    assert left.tokens == whole.tokens and close(left.mean()[1], whole.mean()[1])


def test_a_member_that_saw_nothing_has_a_second_moment_of_zero() -> None:
    moment = SecondMoment(2, 4, torch.device("cpu"))
    moment.add(0, torch.randn(3, 4))
    assert not moment.mean()[1].any()
