"""N:M pruning in whole runs: what is removed stays removed through every later pass, and in the files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from oracles import sparsity as oracle
from oracles import statistics
from test_run import QUICK, compress, weights
from torch import Tensor

from compress import recipe
from compress.block import Block
from compress.calibrate import Workspace
from compress.checkpoint import Checkpoint
from compress.errors import InputError
from compress.layout import Layout
from compress.model import Model
from compress.numerics.grid import Integer, minmax_scales, quantized, round_to_nearest
from compress.numerics.pattern import Pattern
from compress.passes.prune_nm import Pass
from compress.reordering import better_order

METHODS = ("sparsegpt", "alps", "wanda", "ria", "magnitude")
Checkpoints = Callable[..., Path]


def opened(folder: Path) -> Model:
    return Model(Layout(Checkpoint(folder)))


def pruned(model: Path | str, out: Path, *later: dict[str, Any], more: dict[str, Any] = QUICK, **options: Any) -> dict[str, Any]:
    return compress(more | {"passes": [{"prune_nm": {"min_tokens": 0, **options}}, *later]}, model, out)


def most_in_a_group(weight: Tensor, size: int) -> int:
    """The most weights that are not zero in any group of so many inputs, by a loop."""
    groups = [row[start : start + size] for row in weight.tolist() for start in range(0, len(row) - len(row) % size, size)]
    return max(sum(value != 0 for value in group) for group in groups)


# What comes out -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "llama-bias", "mistral", "qwen3_moe", "qwen3_moe-dense-first", "mixtral", "llava"])
def test_every_linear_has_two_of_four_weights_and_plain_transformers_opens_it(kind: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = checkpoint(kind)
    result = pruned(folder, tmp_path / "out", more=QUICK | {"verify": "full"})
    model, source = opened(tmp_path / "out"), opened(folder)
    for linear in model.layout.linears:
        weight = model.dense(linear)
        assert most_in_a_group(weight, 4) == 2 and int(weight.count_nonzero()) * 2 == weight.numel()
        assert not torch.equal(weight[weight != 0], source.dense(linear)[weight != 0])
    assert result["verification"]["logits_max_difference"] < 1e-3
    assert (result["verification"]["pruned_linears"], result["verification"]["pruned_density"]) == (len(model.layout.linears), 0.5)
    assert result["engines"]["transformers"] == "loads: no weight is quantised"


@pytest.mark.parametrize("pattern", ["1:4", "4:8", "7:8", "16:2:8", "8:1:4"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_every_pattern(method: str, pattern: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    result = pruned(checkpoint("llama"), tmp_path / "out", method=method, pattern=pattern)
    model = opened(tmp_path / "out")
    for linear in model.layout.linears:
        assert most_in_a_group(model.dense(linear), Pattern.parse(pattern).m) == Pattern.parse(pattern).n
    assert {record["density"] for record in result["transforms"]} == {Pattern.parse(pattern).density}


@pytest.mark.parametrize("method", ["wanda", "ria", "magnitude"])
def test_a_method_that_only_scores_leaves_what_it_keeps_as_it_was(method: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = checkpoint("llama")
    pruned(folder, tmp_path / "out", method=method)
    before, after = weights(folder), weights(tmp_path / "out")
    assert all(torch.equal(after[name][after[name] != 0], before[name][after[name] != 0]) for name in before)
    if method == "magnitude":
        name = "model.layers.1.mlp.down_proj.weight"
        assert torch.equal(after[name] != 0, oracle.keep(before[name].abs(), Pattern(2, 4)))


def test_wanda_goes_by_what_the_linear_is_given(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder, samples = checkpoint("llama"), tiny.samples()
    inputs = statistics.inputs_of_linears(tiny.plain(folder), [batch.inputs for batch in samples.batches()])
    model = opened(folder)
    Pass(method="wanda", min_tokens=0).run(model, samples, Workspace(tmp_path, tiny.Silent()))
    model.adopt(Workspace(tmp_path, tiny.Silent()).block_file(0))
    for name in ("q_proj", "v_proj"):  # the first to be pruned, so that what they are given is as it was
        linear = f"model.layers.0.self_attn.{name}"
        expected = oracle.wanda(weights(folder)[f"{linear}.weight"], torch.cat([each.flatten(0, -2) for each in inputs[linear]]))
        assert torch.equal(model.dense(linear) != 0, oracle.keep(torch.from_numpy(expected), Pattern(2, 4)))


def test_refitting_lowers_the_error_of_every_method(checkpoint: Checkpoints, tmp_path: Path) -> None:
    for method in ("sparsegpt", "wanda", "ria", "magnitude"):
        errors = []
        for refit in (False, True):
            result = pruned(checkpoint("llama"), tmp_path / f"{method}{refit}", method=method, refit=refit, include=["*.0.self_attn.q_proj"])
            errors.append(result["transforms"][0].get("error"))
        assert errors[0] is None or errors[1] < errors[0]


def test_inputs_that_no_group_holds_whole_stay(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = checkpoint("llama")
    result = pruned(folder, tmp_path / "out", pattern="16:2:5", indivisible="tail", method="wanda")
    name = "model.layers.0.self_attn.q_proj.weight"
    before, after = weights(folder)[name], weights(tmp_path / "out")[name]
    assert torch.equal(after[:, 60:], before[:, 60:]) and most_in_a_group(after[:, :60], 5) == 2
    assert next(record for record in result["transforms"] if name.startswith(record["name"] + "."))["density"] == (24 + 4) / 64


def test_widths_that_do_not_fit_are_kept_on_request(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = checkpoint("llama")
    pruned(folder, tmp_path / "out", pattern="2:3", indivisible="keep", method="magnitude")
    before, after = weights(folder), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{block}.mlp.down_proj.weight" for block in range(2)}  # 96 inputs, all others have 64


def test_the_ledger_and_the_card_say_what_was_pruned(checkpoint: Checkpoints, tmp_path: Path) -> None:
    result = pruned(checkpoint("llama"), tmp_path / "out", {"rtn": {"group_size": 32, "include": ["*.mlp.*"]}})
    told = {item["name"].rpartition("layers.0.")[2]: (item["action"], item["why"]) for item in result["ledger"]}
    assert told["self_attn.q_proj.weight"] == ("pruned 2:4", "by prune_nm, stored in its own dtype again")
    assert told["mlp.up_proj.weight"] == ("quantized", "rtn: 4 bits, group 32, pruned 2:4 by prune_nm before")
    assert "Linears were pruned, 14 to 2:4" in (tmp_path / "out" / "README.md").read_text()
    page = " ".join(re.sub(r"<[^>]+>", " ", (tmp_path / "out" / "report.html").read_text()).replace("&#160;", " ").split())
    assert "self_attn.q_proj 2:4 prune_nm, sparsegpt 50.0 %" in page and "all 14 pruned linears keep their pattern" in page


# What later passes make of it ---------------------------------------------------------------------------------------------------------

ROUNDING: dict[str, list[dict[str, Any]]] = {
    "rtn": [{"rtn": {"group_size": 32}}],
    "rtn asymmetric": [{"rtn": {"group_size": 32, "symmetric": False, "bits": 3, "scales": "mse"}}],
    "gptq": [{"gptq": {"group_size": 32, "min_tokens": 0}}],
    "gptq asymmetric": [{"gptq": {"group_size": 32, "symmetric": False, "min_tokens": 0, "bits": 2}}],
    "gptq with qep": [{"gptq": {"group_size": 32, "min_tokens": 0, "qep": 0.5}}],
    "gptq in place": [{"gptq": {"group_size": 32, "min_tokens": 0, "act_order": False, "scales": "minmax"}}],
    "autoround": [{"autoround": {"group_size": 32, "min_tokens": 0, "steps": 5}}],
    "autoround asymmetric": [{"autoround": {"group_size": 32, "min_tokens": 0, "steps": 5, "rate": 0.2, "symmetric": False, "bits": 2}}],
    "fp8": [{"rtn": {"format": "fp8"}}],
    "mxfp4": [{"gptq": {"format": "mxfp4", "min_tokens": 0}}],
    "nvfp4": [{"gptq": {"format": "nvfp4", "min_tokens": 0}}],
    "w8a8": [{"gptq": {"bits": 8, "group_size": "channel", "activations": "dynamic", "min_tokens": 0}}],
    "awq": [{"smooth": {}}, {"rtn": {"group_size": 32, "symmetric": False}}],
    "smoothquant": [{"smooth": {"method": "smoothquant", "clip": True}}, {"rtn": {"group_size": 32}}],
    "residuals": [{"gptq": {"group_size": 32, "min_tokens": 0, "bits": 2}}, {"detach": {"share": 0.1}}],
    "random residuals": [{"rtn": {"group_size": 32, "bits": 2}}, {"detach": {"share": 0.1, "score": "random", "values": "restored"}}],
    "allocated": [
        {"allocate": {"options": [2, 4], "average_bits": 3.0, "samples": 1, "rounds": 0}},
        {"gptq": {"bits": "allocated", "group_size": 32, "min_tokens": 0}},
    ],
}


@pytest.mark.parametrize("which", ROUNDING)
def test_no_later_pass_puts_back_what_was_removed(which: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = checkpoint("llama")
    pruned(folder, tmp_path / "pruned", method="wanda")
    pruned(folder, tmp_path / "out", *ROUNDING[which], method="wanda", more=QUICK | {"verify": "streamed"})
    before, after = opened(tmp_path / "pruned"), opened(tmp_path / "out")
    for linear in before.layout.linears:
        removed, rounded = before.dense(linear) == 0, after.dense(linear)
        assert not rounded[removed].any() and rounded.any()
        assert after.quantized(linear) is not None


def test_experts_keep_their_zeros_too(checkpoint: Checkpoints, tmp_path: Path) -> None:
    for name in ("gptq", "autoround"):
        step = {name: {"group_size": 32, "min_tokens": 0, "fallback": "round"} | ({"steps": 3} if name == "autoround" else {})}
        pruned(checkpoint("qwen3_moe"), tmp_path / name, step)
        model = opened(tmp_path / name)
        assert all(most_in_a_group(model.dense(linear), 4) <= 2 for linear in model.layout.linears)


def test_what_a_removed_weight_cannot_make_good_goes_on(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """A pruned linear loses less by feedback than by rounding alone."""
    errors = {}
    for name in ("rtn", "gptq"):
        result = pruned(
            "demo:dense", tmp_path / name, {name: {"bits": 3, "group_size": 128}}, more=QUICK | {"evaluate": {"context": 64, "windows": 8}}
        )
        errors[name] = result["evaluation"]["compressed"]["kl"]
    assert errors["gptq"] < errors["rtn"]


def attempt(block: Block, linear: str, what: str) -> None:
    """Have a block store a linear that is all ones."""
    ones = torch.ones_like(block.weight(linear))
    scales = minmax_scales(ones, Integer(8, True), 32, torch.float32)
    rounded = quantized(round_to_nearest(ones, scales, Integer(8, True)), scales, Integer(8, True), torch.float32)
    match what:
        case "dense":
            block.set_dense(f"{linear}.weight", ones)
        case "quantized":
            block.set_quantized(linear, rounded, {})
        case "residual":
            block.set_residual(linear, block.residual(linear, ones, ones.bool()), {})


@pytest.mark.parametrize("what", ["dense", "quantized", "residual"])
def test_a_pass_that_puts_weights_back_is_named_with_the_tensor(what: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    model = opened(checkpoint("llama"))
    linear = "model.layers.0.mlp.up_proj"
    with model.block(0) as block:
        attempt(block, linear, "dense")  # not pruned yet
        Pass(method="magnitude")._commit(block, model.layout.linears[linear], Pass()._masked(block.weight(linear), None), None, {})
        block.save(tmp_path / "block")
    model.adopt(tmp_path / "block")
    model.at_work = "vandal"
    if what == "residual":
        with model.block(0) as block:
            weight = block.weight(linear)
            scales = minmax_scales(weight, Integer(8, True), 32, torch.float32)
            block.set_quantized(linear, quantized(round_to_nearest(weight, scales, Integer(8, True)), scales, Integer(8, True), torch.float32), {})
            block.save(tmp_path / "codes")
        model.adopt(tmp_path / "codes")
    with model.block(0) as block, pytest.raises(AssertionError, match=rf"vandal put weights back that were pruned from {re.escape(linear)}"):
        attempt(block, linear, what)


def test_a_pass_that_breaks_its_own_promise_is_named(checkpoint: Checkpoints) -> None:
    model = opened(checkpoint("llama"))
    linear = "model.layers.0.mlp.up_proj"
    with model.block(0) as block, pytest.raises(AssertionError, match=rf"a pass left \d+ groups of {re.escape(linear)} that are not 2:4"):
        block.set_pruned(linear, block.weight(linear), Pattern(2, 4), {})


def test_files_that_break_the_promise_are_never_handed_over(checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Block, "_check_zeros", lambda *_: None)
    real = Block.set_quantized

    def vandal(self: Block, linear: str, weight: Any, *more: Any) -> None:
        weight.codes[0, :4] = 1
        real(self, linear, weight, *more)

    monkeypatch.setattr(Block, "set_quantized", vandal)
    with pytest.raises(AssertionError, match=r"has \d+ groups in .* that are not 2:4"):
        pruned(checkpoint("llama"), tmp_path / "out", {"rtn": {"group_size": 32}})
    assert not (tmp_path / "out").exists()


# Order of inputs ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "llama-bias", "qwen3_moe", "mixtral"])
@torch.no_grad()
def test_inputs_in_another_order_compute_the_same_and_keep_more(kind: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    model, moved = opened(checkpoint(kind)), 0
    hidden, kwargs = model.embed(next(iter(tiny.samples().batches())).inputs)
    with model.block(0) as block:
        for linear in block.layout.linears:
            scores = block.weight(linear.name).abs()
            order = better_order(block, linear.name, scores, Pattern(2, 4))
            assert (order is not None) == linear.name.endswith(("o_proj", "down_proj", "w2"))
            if order:
                weight = Pass()._masked(block.weight(linear.name)[:, order.columns], None)
                assert float(weight.abs().sum()) > float(Pass()._masked(block.weight(linear.name), None).abs().sum())
                Pass(permute=True)._commit(block, linear, weight, order, {})
                moved += 1
        computed = block.forward(hidden, kwargs[0])
        before = {linear.name: block.weight(linear.name) for linear in block.layout.linears}
        block.save(tmp_path / "block")
    model.adopt(tmp_path / "block")
    with model.block(0) as block:
        assert torch.allclose(block.forward(hidden, kwargs[0]), computed, atol=1e-5)
        assert sum(not torch.equal(block.weight(name), weight) for name, weight in before.items()) >= 2 * moved
    assert moved


def test_a_whole_run_with_another_order_keeps_more_of_the_scores(checkpoint: Checkpoints, tmp_path: Path) -> None:
    kept = []
    for permute in (False, True):
        result = pruned(checkpoint("llama"), tmp_path / str(permute), method="magnitude", permute=permute)
        after = weights(tmp_path / str(permute))
        kept.append(sum(float(tensor.abs().sum()) for name, tensor in after.items() if name.endswith(("o_proj.weight", "down_proj.weight"))))
        assert any(record["permuted"] for record in result["transforms"]) == permute
    assert kept[0] < kept[1]


# Experts that saw too little ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"refit": True}, {"method": "alps"}, {"method": "wanda"}], ids=str)
def test_a_starved_expert_stops_the_run_or_is_pruned_by_magnitude_and_recorded(
    options: dict[str, Any], checkpoint: Checkpoints, tmp_path: Path
) -> None:
    few = QUICK | {"calibration": {"samples": 1, "length": 8}}
    folder = checkpoint("qwen3_moe")
    with pytest.raises(InputError, match=r"experts\.gate_up\.\d: saw \d+ of 8 calibration tokens, needs 2; .* set fallback: magnitude"):
        pruned(folder, tmp_path / "out", more=few, min_tokens=2 / 64, include=["*experts*"])
    result = pruned(folder, tmp_path / "out", more=few, min_tokens=0.25, include=["*experts*"], fallback="magnitude", **options)
    pruned(folder, tmp_path / "plain", include=["*experts*"], method="magnitude")
    assert len(result["fallbacks"]) == len(result["transforms"]) == 2 * 8 * 3
    one, other = weights(tmp_path / "out"), weights(tmp_path / "plain")
    assert all(torch.equal(one[name], other[name]) for name in other)


# What is refused ------------------------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "a width": (
        [{"prune_nm": {"pattern": "3:5"}}],
        r"prune_nm: pattern: M = 5 does not divide the width 64 of model\.layers\.0\.self_attn\.q_proj and 11 more; M that work: 2, 4, 8, 16, 32, 64",
    ),
    "another width": ([{"prune_nm": {"pattern": "3:5"}}], r"the width 96 of model\.layers\.0\.mlp\.down_proj and 1 more; .* set indivisible: tail"),
    "a height": (
        [{"prune_nm": {"pattern": "48:2:4"}}],
        r"V = 48 does not divide the height 32 of model\.layers\.0\.self_attn\.k_proj .*V that work: 2, 4, 8, 16, 32",
    ),
    "a pattern that matches nothing": ([{"prune_nm": {"include": ["*.qproj"]}}], r"include: '\*\.qproj' matches none of the 14 linears"),
    "no linear": ([{"prune_nm": {"exclude": ["*"]}}], "takes no linear at all"),
    "moving outputs out of their blocks": ([{"prune_nm": {"pattern": "8:2:4", "permute": True}}], "permute: moves outputs out of the blocks of 8"),
    "moving those of a pass before": (
        [{"prune_nm": {"pattern": "8:2:4", "include": ["*.up_proj"]}}, {"prune_nm": {"permute": True, "exclude": ["*.up_proj"]}}],
        "would move outputs out of the blocks of 8:2:4 that a pass before it made",
    ),
    "pruning twice": ([{"prune_nm": {}}, {"prune_nm": {"pattern": "1:4"}}], r"q_proj is already pruned by prune_nm; use include and exclude"),
    "rotating afterwards": ([{"prune_nm": {}}, {"rotate": {}}], "no weight that prune_nm removed stays zero; leave out rotate, or prune_nm"),
}


@pytest.mark.parametrize("which", REFUSED)
def test_what_cannot_work_is_refused_before_weights_load(which: str, checkpoint: Checkpoints) -> None:
    steps, message = REFUSED[which]
    with pytest.raises(InputError, match=message):
        recipe.check(recipe.validate(QUICK | {"passes": steps}, "r.yaml"), Layout(Checkpoint(checkpoint("llama"))), "r.yaml")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"pattern": "4:2"}, "4:2 is not possible"), ({"pattern": 124}, "must stand in quotes, as '2:4'"), ({"pattern": []}, "valid string")],
)
def test_what_is_no_pattern_is_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipe.validate({"passes": [{"prune_nm": options}]}, "r.yaml")


def test_rounding_before_pruning_is_refused_with_the_reason() -> None:
    with pytest.raises(InputError, match="what may go is chosen by exact weights, and rounding keeps the zeros"):
        recipe.validate({"passes": [{"rtn": {}}, {"prune_nm": {}}]}, "r.yaml")


def test_magnitudes_need_no_data_and_all_else_does() -> None:
    assert {method for method in METHODS if Pass(method=method).needs_data} == {*METHODS} - {"magnitude"}  # type: ignore[arg-type]
    assert Pass(method="magnitude", refit=True).needs_data


def test_the_report_on_disk_has_the_figures_of_the_files(checkpoint: Checkpoints, tmp_path: Path) -> None:
    pruned(checkpoint("llama"), tmp_path / "out", {"gptq": {"group_size": 32, "min_tokens": 0, "bits": 2}})
    report, model = json.loads((tmp_path / "out" / "report.json").read_text()), opened(tmp_path / "out")
    dense = [model.dense(linear) for linear in model.layout.linears]
    assert report["verification"]["pruned_density"] == sum(int(each.count_nonzero()) for each in dense) / sum(each.numel() for each in dense) <= 0.5


# On a trained model ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_methods_lose_in_the_order_that_is_known_of_them(tmp_path: Path) -> None:
    more = {"calibration": {"samples": 64, "length": 256}, "evaluate": {"context": 256, "windows": 20}, "verify": "streamed"}
    rows = {
        "alps": {"method": "alps"}, "refit": {"refit": True}, "sparsegpt": {}, "wanda": {"method": "wanda"}, "magnitude": {"method": "magnitude"},
        "4:8": {"pattern": "4:8"}, "1:4": {"pattern": "1:4"},
    }  # fmt: skip
    lost = {
        name: math.log(pruned("demo:dense", tmp_path / name.replace(":", "-"), more=more, **options)["evaluation"]["figures"]["perplexity_ratio"])
        for name, options in rows.items()
    }
    assert lost["alps"] < lost["refit"] < lost["sparsegpt"] < lost["wanda"] - 0.05
    assert lost["wanda"] <= lost["magnitude"] and lost["4:8"] < lost["sparsegpt"] < lost["1:4"]
