"""Vision tower and projector quantised on request: opened by plain transformers and by `compress.load`, told, and never by chance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_run import KillAfter, Killed, contents
from test_vision import logits, run

import compress
from compress import declared, planning, recipe
from compress.checkpoint import Checkpoint
from compress.errors import InputError
from compress.inspection import inspect
from compress.layout import Layout
from compress.model import Model

LANGUAGE = {"rtn": {"bits": 4, "group_size": 32}}
WEIGHTS = {"bits": 4, "group_size": 32}
SHORT = {"calibration": {"length": 64}, "evaluate": {"context": 64}}
INPUTS = {"bits": 8, "group_size": "channel", "activations": "dynamic"}


def asked(folder: Path, **options: Any) -> dict[str, Any]:
    """The pass that rounds every linear outside the decoder blocks."""
    layout = Layout(Checkpoint(folder))
    return {"rtn": options | {"include": [f"{tower}.*" for tower in layout.towers if any(name.startswith(tower) for name in layout.outside)]}}


def found(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("kind", tiny.SEEING)
def test_linears_outside_the_blocks_are_those_that_transformers_has(kind: str, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint(kind)
    model = Model(Layout(Checkpoint(folder)))
    modules = {name: module for name, module in tiny.plain(folder).named_modules() if type(module) is torch.nn.Linear}
    beside = {name for name in modules if not name.startswith(f"{model.layout.arch.module_blocks}.")} - {"lm_head"}
    beside -= {name for name in beside if name.startswith("model.vision_tower.head.")}  # which pools, and no model reads
    assert set(model._outside.values()) == beside and set(model._outside) == set(model.layout.outside)
    for name, path in model._outside.items():
        assert torch.equal(model.read(f"{name}.weight"), modules[path].weight)


@pytest.mark.parametrize("grid", [WEIGHTS, INPUTS, {"format": "fp8"}], ids=["weights", "inputs", "fp8"])
@pytest.mark.parametrize("kind", tiny.SEEING)
def test_a_quantised_tower_is_what_transformers_and_load_compute(
    kind: str, grid: dict[str, Any], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder, samples = checkpoint(kind), tiny.samples(image=True, kind=kind)
    layout = Layout(Checkpoint(folder))
    out = tmp_path / "out"
    if layout.arch.flat_tower and grid == INPUTS:
        with pytest.raises(InputError, match="the patches of all images in a form that compressed-tensors rounds one number at a time"):
            run([LANGUAGE, asked(folder, **grid)], folder, out)
        return
    siglip = kind == "llava_onevision" and grid == WEIGHTS
    if siglip:
        with pytest.raises(InputError, match="transformers, which refuses packed codes in a SigLIP tower"):
            run([LANGUAGE, asked(folder, **grid)], folder, out, verify="full")
    report = run([LANGUAGE, asked(folder, **grid)], folder, out, verify="auto" if siglip else "full")
    assert len(report["linears"]) == len(layout.all_linears) and len(layout.outside) > 5
    if grid.get("format") != "fp8" and not siglip:  # which transformers unpacks in bfloat16
        assert report["verification"]["outside_max_difference"] < 1e-5
    written = Model(Layout(Checkpoint(out)))
    declared.check(written.layout)
    assert all(written.packed_as(name) for name in layout.all_linears)
    assert declared.schemes(written.layout).keys() == layout.all_linears.keys()
    ours = logits(written, samples)
    packed = compress.load(out)
    opened = packed if siglip else tiny.plain(out)
    source = logits(Model(layout), samples)
    for batch, mine, before in zip(samples.batches(), ours, source, strict=True):
        with torch.no_grad():
            theirs = opened(**batch.inputs, use_cache=False).logits
            loaded = packed(**batch.inputs, use_cache=False).logits
        scale = float(mine.abs().max())
        assert float((mine - theirs).abs().max()) < (2e-2 if siglip else 1e-3) * scale
        assert float((mine - loaded).abs().max()) < 2e-2 * scale
        assert float((mine - before).abs().max()) > 1e-3 * scale
    records = {record["module"]: record for record in compress.explain(packed)}
    assert all(written._outside[name] in records for name in layout.outside)


def test_nothing_outside_is_taken_by_chance(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Patterns that fit names of the tower too, but do not begin with it, take linears of the language model alone."""
    folder = checkpoint("llava")
    run([{"rtn": WEIGHTS | {"include": ["*.q_proj", "re:v_proj$", "re:.*", "*"]}}], folder, tmp_path / "out")
    before, after = found(folder), found(tmp_path / "out")
    outside = [name for name in before if not name.startswith("language_model.")]
    assert len(outside) > 20 and all(torch.equal(before[name], after[name]) for name in outside)


def test_each_part_is_addressed_alone(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Of the tower one linear of each block and none of the rest; linears of the language model have the same local names."""
    folder, samples = checkpoint("llava"), tiny.samples(image=True)
    steps = [
        {"rtn": {"bits": 8, "group_size": 32, "include": ["re:^vision_tower\\..*q_proj$"]}},
        {"rtn": {"bits": 4, "group_size": "channel", "include": ["multi_modal_projector.*"], "exclude": ["*.linear_1"]}},
        {"rtn": {"bits": 3, "group_size": 32, "include": ["language_model.*"], "exclude": ["*.layers.0.mlp.down_proj"]}},
    ]
    report = run(steps, folder, tmp_path / "out", verify="full")
    layout = Layout(Checkpoint(tmp_path / "out"))
    bits = {name: scheme.bits for name, scheme in declared.schemes(layout).items()}
    assert {name: number for name, number in bits.items() if name in layout.outside} == {
        "multi_modal_projector.linear_2": 4,
        "vision_tower.encoder.layers.0.self_attn.q_proj": 8,
        "vision_tower.encoder.layers.1.self_attn.q_proj": 8,
    }
    assert len(bits) == 3 + 13 and set(bits.values()) == {3, 4, 8}
    ledger = {item["name"]: item for item in report["ledger"]}
    assert ledger["vision_tower.encoder.layers.0.self_attn.q_proj.weight"]["why"] == "rtn: 8 bits, group 32"
    assert ledger["vision_tower.encoder.layers.0.self_attn.k_proj.weight"]["why"] == "outside the decoder blocks"
    config = layout.checkpoint.config["quantization_config"]
    for name, module in tiny.plain(tmp_path / "out").named_modules():
        if type(module) is torch.nn.Linear:
            groups = [group for group in config["config_groups"].values() if any(declared.fits(target, name) for target in group["targets"])]
            assert len(groups) + any(declared.fits(target, name) for target in config["ignore"]) == 1, name
    opened, ours = tiny.plain(tmp_path / "out"), logits(Model(layout), samples)
    for batch, mine in zip(samples.batches(), ours, strict=True):
        with torch.no_grad():
            theirs = opened(**batch.inputs, use_cache=False).logits
        assert float((mine - theirs).abs().max()) < 1e-4 * float(mine.abs().max())


def test_a_tower_that_has_a_level_more_on_disk(copy: Callable[..., Path], tmp_path: Path) -> None:
    """As published checkpoints of LLaVA have it."""
    folder = copy("llava")
    tensors = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in found(folder).items()}
    tiny.write(tensors, folder)
    report = run([LANGUAGE, asked(folder, **WEIGHTS)], folder, tmp_path / "out", verify="full")
    assert report["verification"]["outside_max_difference"] < 1e-5
    samples = tiny.samples(image=True)
    opened, ours = tiny.plain(tmp_path / "out"), logits(Model(Layout(Checkpoint(tmp_path / "out"))), samples)
    for batch, mine in zip(samples.batches(), ours, strict=True):
        with torch.no_grad():
            theirs = opened(**batch.inputs, use_cache=False).logits
        assert float((mine - theirs).abs().max()) < 1e-4 * float(mine.abs().max())


def test_passes_behind_it_are_given_what_the_rounded_tower_gives(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder, samples = checkpoint("llava"), tiny.samples(image=True)
    run([asked(folder, **WEIGHTS | {"bits": 2})], folder, tmp_path / "out")
    batch = next(samples.batches()).inputs
    exact, _ = Model(Layout(Checkpoint(folder))).embed(batch)
    rounded, _ = Model(Layout(Checkpoint(tmp_path / "out"))).embed(batch)
    vision = batch["input_ids"] == tiny.IMAGE_TOKEN
    assert torch.equal(exact[~vision], rounded[~vision]) and float((exact - rounded)[vision].abs().max()) > 0.01


def test_the_plan_knows_the_size_and_inspect_what_became_of_it(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("llava", torch.bfloat16)
    layout, steps = Layout(Checkpoint(folder)), [LANGUAGE, asked(folder, **WEIGHTS)]
    chosen = recipe.validate(SHORT | {"passes": steps}, "r.yaml")
    planned = planning.plan(chosen, layout, recipe.check(chosen, layout, "r.yaml"))
    report = run(steps, folder, tmp_path / "out")
    assert planned["outside"] == len(layout.outside) == 14
    assert planned["size"]["after_bytes"] == report["size"]["after_bytes"]
    assert planned["size"]["bits_per_weight"] == pytest.approx(report["size"]["bits_per_weight"])
    became = {item["name"]: item["became"] for item in inspect(tmp_path / "out")["tensors"]}
    assert became["vision_tower.encoder.layers.1.mlp.fc2"] == "int4, group 32, symmetric, BF16 scales"
    assert "14 linears" not in (tmp_path / "out" / "README.md").read_text()
    assert "Quantised linears outside the decoder blocks" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("reports", [0, 3])
def test_a_killed_run_continues_to_the_same_bytes(reports: int, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("llava")
    steps = [asked(folder, **WEIGHTS), LANGUAGE]
    run(steps, folder, tmp_path / "whole")
    with pytest.raises(Killed):
        run(steps, folder, tmp_path / "out", progress=KillAfter(reports))
    run(steps, folder, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_residuals_are_for_decoder_blocks_alone(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("llava")
    layout = Layout(Checkpoint(folder))
    chosen = recipe.validate(SHORT | {"passes": [LANGUAGE, asked(folder, **WEIGHTS), {"detach": {}}]}, "r.yaml")
    plan = recipe.check(chosen, layout, "r.yaml")
    assert {bool(scheme.residuals) for name, (_, scheme) in plan.items() if name in layout.outside} == {False}
    assert {bool(scheme.residuals) for name, (_, scheme) in plan.items() if name in layout.linears} == {True}


TOWER = {"include": ["vision_tower.*"]}


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"gptq": TOWER | {"group_size": 32}}, "is outside the decoder blocks, and this pass goes by what linears are given"),
        ({"mbq": TOWER | {"group_size": 32}}, "is outside the decoder blocks, and this pass goes by what linears are given"),
        ({"autoround": TOWER | {"group_size": 32}}, "is outside the decoder blocks, and this pass goes by what linears are given"),
        ({"rtn": TOWER | WEIGHTS | {"scales": "imatrix"}}, "is outside the decoder blocks, and this pass goes by what linears are given"),
        ({"rtn": TOWER | INPUTS | {"activations": "static"}}, "is outside the decoder blocks, and this pass goes by what linears are given"),
        ({"rtn": TOWER | WEIGHTS | {"bits": "allocated"}}, "has its bits allocated, which is done for decoder blocks alone"),
        ({"rtn": {"include": ["*.fc1"]}}, r"matches only what lies outside the decoder blocks, such as vision_tower\..*; rtn rounds there"),
        ({"prune_nm": TOWER}, "matches only what lies outside the decoder blocks, such as vision_tower"),
        ({"rtn": WEIGHTS | {"include": ["vision_tower.nothing*"]}}, "'vision_tower.nothing\\*' matches none of"),
        ({"rtn": TOWER | {"group_size": 128}}, "group_size: 128 does not divide the width 32 of vision_tower"),
    ],
)
def test_what_cannot_be_done_outside_the_blocks_is_refused(step: dict[str, Any], message: str, checkpoint: Callable[..., Path]) -> None:
    chosen = recipe.validate({"passes": [step], "calibration": {"data": "demo:images"}}, "r.yaml")
    with pytest.raises(InputError, match=message):
        recipe.check(chosen, Layout(Checkpoint(checkpoint("llava"))), "r.yaml")


def test_layouts_without_a_place_for_it_say_so(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from compress import exporting

    run([asked(checkpoint("llava"), **WEIGHTS)], checkpoint("llava"), tmp_path / "out")
    with pytest.raises(InputError, match="gptq has no place for quantised linears outside the decoder blocks, such as multi_modal_projector"):
        exporting.check(tmp_path / "out", {"gptq": tmp_path / "gptq"})
