"""Fewer experts: what is left computes as if routers could not choose the others, and what is chosen is what the slow version chooses."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import scipy.cluster.hierarchy
import scipy.spatial.distance
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import experts as oracle
from safetensors.torch import load_file, save_file
from test_run import KillAfter, Killed, compress, contents, weights
from transformers import AutoModelForCausalLM

from compress import recipe
from compress.calibrate import look
from compress.checkpoint import Checkpoint
from compress.data import Samples, Tokenizer, calibration
from compress.errors import InputError
from compress.experts import Reconstruction, restricted, tally
from compress.layout import Layout
from compress.model import Model
from compress.numerics import experts as numerics
from compress.passes import prune_experts
from compress.report.records import ranges

QUICK: dict[str, Any] = {"calibration": {"samples": 6, "length": 48}, "evaluate": None}
MODELS = ["qwen3_moe", "mixtral", "qwen3_moe-dense-first"]


def pruning(**options: Any) -> dict[str, Any]:
    return QUICK | {"passes": [{"prune_experts": {"keep": 0.5} | options}]}


def records(out: Path) -> dict[int, dict[str, Any]]:
    found = json.loads((out / "report.json").read_text())["transforms"]
    return {record["block"]: record for record in found if record["pass"] == "prune_experts"}


def opened(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()


def sparse(model: Any, index: int) -> Any:
    return model.model.layers[index].mlp


def routed_to(module: Any, kept: list[int]) -> None:
    """Have the router of a module of transformers choose among some experts only."""

    def forward(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden = hidden.reshape(-1, hidden.shape[-1])
        values, index = oracle.gates(module, hidden, kept).topk(module.gate.top_k, dim=-1)
        return hidden, values, index

    module.gate.forward = forward


def samples_of(folder: Path) -> Samples:
    return calibration("demo:text", 6, 48, 0, Tokenizer(folder))


@torch.no_grad()
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", ["reap", "random", "naee", "stun"])
def test_what_is_left_is_a_router_that_cannot_choose_the_others(model: str, method: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(pruning(method=method), checkpoint(model), tmp_path / "out")
    small, masked = opened(tmp_path / "out"), opened(checkpoint(model))
    found = records(tmp_path / "out")
    assert found and all(len(record["kept"]) == record["after"] == record["before"] // 2 for record in found.values())
    for index, record in found.items():
        routed_to(sparse(masked, index), record["kept"])
    ids = torch.randint(0, 200, (3, 40))
    logits = small(ids).logits
    assert (logits - masked(ids).logits).abs().max() < 1e-6 * logits.abs().max()
    kwargs: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    assert small.generate(ids, **kwargs).equal(masked.generate(ids, **kwargs))


@torch.no_grad()
@pytest.mark.parametrize("name", numerics.SCORES)
@pytest.mark.parametrize("model", ["qwen3_moe", "mixtral"])
def test_scores_are_those_of_a_loop_over_all_tokens_and_experts(name: str, model: str, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint(model)
    whole, samples = opened(folder), samples_of(folder)
    seen: dict[int, list[torch.Tensor]] = {}
    for index in range(len(whole.model.layers)):
        sparse(whole, index).register_forward_pre_hook(lambda _, inputs, index=index: seen.setdefault(index, []).append(inputs[0].flatten(0, 1)))
    for batch in samples.batches():
        whole(**batch.inputs)
    kind = numerics.SCORES[name]
    for probe in look(Model(Layout(Checkpoint(folder))), samples, tiny.Silent()):
        module, hidden = sparse(whole, probe.block.layout.index), torch.cat(seen[probe.block.layout.index])
        expected = oracle.score(oracle.gates(module, hidden), oracle.outputs(module, hidden), mean=kind.mean, alpha=kind.alpha, beta=kind.beta)
        measured = tally(probe)
        assert int(measured.tokens.sum()) == len(hidden) * module.gate.top_k
        assert measured.score(kind, guard=0.0).tolist() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_the_best_choice_is_that_of_trying_all_and_dropping_one_by_one_finds_it(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("qwen3_moe")
    whole, samples = opened(folder), samples_of(folder)
    for probe in look(Model(Layout(Checkpoint(folder))), samples, tiny.Silent()):
        module = sparse(whole, probe.block.layout.index)
        seen: list[torch.Tensor] = []
        handle = module.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].flatten(0, 1)))
        for batch in samples.batches():
            whole(**batch.inputs)
        handle.remove()
        hidden, measured = torch.cat(seen), Reconstruction(probe, None)
        kept, error = numerics.subset(8, 5, 1, measured.error, 100)
        expected, least = oracle.best_subset(module, hidden, 5)
        assert kept.tolist() == expected and error == pytest.approx(least, rel=1e-4)
        greedy, _ = numerics.subset(8, 5, 1, measured.error, 1)
        assert greedy.tolist() == expected


def with_duplicates(folder: Path, shuffle: bool = False) -> Path:
    """Expert 2n + 1 becomes a copy of expert 2n, behind an equal router row; with `shuffle`, its neurons in another order."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if name.endswith("mlp.gate.weight"):
                tensors[name][1::2] = tensors[name][::2]
        save_file(tensors, path, {"format": "pt"})
    everything = {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}
    order = torch.randperm(32, generator=torch.Generator().manual_seed(3)) if shuffle else torch.arange(32)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if ".experts." in name:
                head, tail = name.split(".experts.")
                number, part = tail.split(".", 1)
                if int(number) % 2:
                    twin = everything[f"{head}.experts.{int(number) - 1}.{part}"]
                    tensors[name] = (twin[:, order] if part.startswith("down") else twin[order]).contiguous()
        save_file(tensors, path, {"format": "pt"})
    return folder


@torch.no_grad()
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("method", ["hc_smoe", "stun"])  # to M-SMoE two copies that are used most are two dominant experts
def test_copies_become_one_without_loss(method: str, shuffle: bool, copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = with_duplicates(copy("qwen3_moe"), shuffle)
    compress(pruning(method=method, active=1), folder, tmp_path / "out")
    ids = torch.randint(0, 200, (3, 40))
    before, after = (opened(path)(ids).logits for path in (folder, tmp_path / "out"))
    assert (before - after).abs().max() < 1e-5
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_experts_per_tok"] == 1


@torch.no_grad()
def test_neurons_have_to_be_matched_before_experts_are_averaged(copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = with_duplicates(copy("qwen3_moe"), shuffle=True)
    compress(pruning(method="hc_smoe", active=1, align=False), folder, tmp_path / "out")
    ids = torch.randint(0, 200, (3, 40))
    before, after = (opened(path)(ids).logits for path in (folder, tmp_path / "out"))
    assert (before - after).abs().max() > 1e-3


def test_fewer_active_experts_alone_change_no_tensor(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(pruning(keep=1.0, active=1), checkpoint("qwen3_moe"), tmp_path / "out")
    before, after = weights(checkpoint("qwen3_moe")), weights(tmp_path / "out")
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    assert Layout(Checkpoint(tmp_path / "out")).text_config["num_experts_per_tok"] == 1


@pytest.mark.parametrize("method", ["reap", "hc_smoe"])
def test_every_expert_is_accounted_for_and_quantising_goes_on(method: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    steps = [{"prune_experts": {"keep": 0.5, "method": method}}, {"gptq": {"group_size": 32, "fallback": "round"}}]
    compress(QUICK | {"passes": steps}, checkpoint("qwen3_moe"), tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    layout = Layout(Checkpoint(checkpoint("qwen3_moe")))
    fates = {item["name"]: item for item in report["ledger"]}
    for index, record in records(tmp_path / "out").items():
        for name in layout.blocks[index].tensors:
            number = int(name.split(".experts.")[1].split(".")[0]) if ".experts." in name else None
            if number is not None:
                assert fates[name]["action"] == ("quantized" if number in record["kept"] else "removed")
            if number in record["kept"] and (new := record["kept"].index(number)) != number:
                assert f"now called model.layers.{index}.mlp.experts.{new}." in fates[name]["why"]
        assert sum(record["tokens"]) == 2 * 6 * 48
        if method == "hc_smoe":
            assert set(record["merged_into"]) == set(record["kept"])
    stored = {record["name"]: record["tokens"] for record in report["linears"] if ".experts." in record["name"]}
    assert len(stored) == 2 * 4 * 3 and all(isinstance(tokens, int) for tokens in stored.values())


@pytest.mark.parametrize("reports", range(6))
def test_a_killed_run_goes_on_to_the_same_bytes(reports: int, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    steps = QUICK | {"passes": [{"prune_experts": {"keep": 0.5, "method": "hc_smoe"}}, {"rtn": {"group_size": 32}}]}
    compress(steps, checkpoint("qwen3_moe"), tmp_path / "undisturbed")
    with pytest.raises(Killed):
        compress(steps, checkpoint("qwen3_moe"), tmp_path / "out", KillAfter(reports))
    compress(steps, checkpoint("qwen3_moe"), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("llama", {}, "the model has no routed experts"),
        ("qwen3_moe", {"keep": 0.01}, "0.01 of 8 experts in steps of 1 is 0: none would be left"),
        ("qwen3_moe", {"keep": 0.99}, "is 8: none would be removed"),
        ("qwen3_moe", {"keep": 0.125}, "2 experts are to serve a token, but only 1 stay"),
        ("qwen3_moe", {"keep": 1.0}, "keeps all experts and changes nothing"),
        ("qwen3_moe", {"keep": 1.0, "active": 9}, "9 experts are to serve a token, but only 8 stay"),
        ("qwen3_moe", {"method": "frequency", "guard": 0.5}, "guard: is an option of reap, man, msan, which frequency does not read"),
        ("qwen3_moe", {"align": False}, "align: is an option of hc_smoe, m_smoe"),
    ],
)
def test_what_cannot_be_is_refused(model: str, options: dict[str, Any], message: str, checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(InputError) as caught:
        recipe.check(recipe.validate(pruning(**options), "r.yaml"), Layout(Checkpoint(checkpoint(model))), "r.yaml")
    assert message in str(caught.value)


# Numerics ---------------------------------------------------------------------------------------------------------------------------


@given(st.integers(2, 12), st.data())
def test_clusters_are_those_of_scipy_and_exactly_as_many_as_wanted(count: int, data: st.DataObject) -> None:
    points = torch.randn(count, 5, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    wanted = data.draw(st.integers(1, count))
    distances = torch.cdist(points, points)
    for method in ("complete", "average"):
        found = numerics.clusters(distances, wanted, method)
        tree = scipy.cluster.hierarchy.linkage(scipy.spatial.distance.squareform(distances.double().numpy(), checks=False), method)
        expected = scipy.cluster.hierarchy.fcluster(tree, wanted, "maxclust")
        assert len(set(found.tolist())) == wanted
        assert all((found[one] == found[other]) == (expected[one] == expected[other]) for one in range(count) for other in range(count))


@given(groups=st.sampled_from([1, 2, 4]), seed=st.integers(0, 50))
def test_of_each_group_equally_many_stay(groups: int, seed: int) -> None:
    score = torch.rand(16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for kept in (numerics.best(score, 8, groups), numerics.subset(16, 8, groups, lambda left: -float(score[left].sum()), 1)[0]):
        assert kept.tolist() == sorted(kept.tolist())
        for group in range(groups):
            mine = [one for one in kept.tolist() if one // (16 // groups) == group]
            part = score[group * 16 // groups : (group + 1) * 16 // groups]
            assert sorted(mine) == sorted((part.topk(8 // groups).indices + group * 16 // groups).tolist())


def test_an_expert_that_few_tokens_reached_counts_less() -> None:
    measured = numerics.Tally(3, 2, torch.device("cpu"))
    for expert, tokens, size in ((0, 1, 10.0), (1, 40, 1.0), (2, 40, 2.0)):
        measured.add(expert, torch.ones(tokens), torch.full((tokens, 2), size))
    man = numerics.SCORES["man"]
    assert measured.score(man, 0.0).argmax() == 0
    assert measured.score(man, 1.0).argmax() == 2
    assert measured.score(man, 1.0)[2] == pytest.approx(2 * math.sqrt(2) * 40 / (40 + 27))


def test_super_experts_stay_whatever_they_score() -> None:
    peaks = [torch.full((150,), 1.0, dtype=torch.float64), torch.full((150,), 1.0, dtype=torch.float64)]
    peaks[1][7] = 1000.0
    protected = numerics.super_experts(peaks)
    assert not protected[0].any() and protected[1].nonzero().flatten().tolist() == [7]
    score = torch.arange(150.0).flip(0)
    score[7] = -1
    assert 7 in numerics.best(score, 10, protected=protected[1]).tolist()


@torch.no_grad()
def test_routing_among_fewer_is_undone(checkpoint: Callable[..., Path]) -> None:
    model = Model(Layout(Checkpoint(checkpoint("qwen3_moe"))))
    with model.block(0) as block:
        hidden = torch.randn(5, 64)
        before = block.router(hidden)
        with restricted(block, torch.tensor([1, 4, 6]), 1):
            assert set(block.router(hidden)[2].flatten().tolist()) <= {1, 4, 6} and block.router(hidden)[2].shape == (5, 1)
        assert all(one.equal(other) for one, other in zip(before, block.router(hidden), strict=True))


def test_the_pass_names_every_method_that_is_scored() -> None:
    assert set(numerics.SCORES) == set(prune_experts.SCORED) < set(get_args(prune_experts.Method))
    assert {name for name, score in numerics.SCORES.items() if score.mean} == set(prune_experts.MEANS)


def test_an_expert_that_saw_nothing_is_a_fallback_and_named(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    plain = {"calibration": {"samples": 1, "length": 2}, "evaluate": None, "passes": [{"prune_experts": {"keep": 0.5}}]}
    result = compress(plain, checkpoint("qwen3_moe"), tmp_path / "out")
    records = [record for record in result["transforms"] if record.get("kind") == "expert"]
    unseen = [[expert for expert, count in enumerate(record["tokens"]) if not count] for record in records]
    assert all(unseen)
    assert [record["fallback"].split(" saw")[0] for record in result["fallbacks"]] == [f"experts {', '.join(map(str, each))}" for each in unseen]
    assert f"none: {ranges(unseen[0], ', ')}" in html.unescape((tmp_path / "out" / "report.html").read_text())


def test_a_pass_that_takes_away_what_one_before_it_rounds_is_told_its_place() -> None:
    plain = {"passes": [{"rtn": {}}, {"prune_experts": {"keep": 0.5}}]}
    with pytest.raises(InputError, match="prune_experts belongs to stage restructure, but comes after a pass of stage quantize"):
        recipe.validate(plain, "r.yaml")
