"""Models that see: every architecture walked block by block, balanced, quantised and opened again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from oracles import gradients
from safetensors.torch import load_file
from test_run import KillAfter, Killed, contents

from compress import balance, demo, pipeline, recipe
from compress.backsweep import backsweep
from compress.calibrate import Workspace
from compress.checkpoint import Checkpoint
from compress.data import Sample, Samples, Tokenizer, calibration, windows
from compress.errors import InputError
from compress.evaluate.scoring import last_hidden
from compress.layout import Layout
from compress.model import Model
from compress.passes import mbq, rtn, smooth
from compress.passes.base import Quantize

GRID = {"bits": 4, "group_size": 32}


def open_model(folder: Path, grid: dict[str, Any] | None = None) -> Model:
    layout = Layout(Checkpoint(folder))
    return Model(layout, rtn.Pass(**grid).plan(layout) if grid else {})


def answers_of(kind: str) -> Samples:
    """Samples with images, of which the last tokens are scored."""
    whole = tiny.samples(image=True, kind=kind)
    items = []
    for item in whole.items:
        scored = torch.zeros_like(item.scored)
        scored[-3:] = True
        items.append(Sample(item.ids, scored, item.extra, item.vision))
    return Samples(whole.source, tuple(items))


def carried_out(step: Any, model: Model, samples: Samples, folder: Path) -> list[dict[str, Any]]:
    """Run a pass over a model that then is what it made; its records."""
    folder.mkdir(parents=True)
    workspace = Workspace(folder, tiny.Silent())
    step.run(model, samples, workspace)
    return [record for layout in model.blocks for record in model.adopt(workspace.block_file(layout.index))]


@torch.no_grad()
def logits(model: Model, samples: Samples) -> list[torch.Tensor]:
    return [model.logits(hidden) for hidden in last_hidden(model, samples)]


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest."""
    assert float((ours - theirs).abs().max()) < 1e-5 * float(theirs.abs().max().clamp_min(1e-6))


@pytest.mark.parametrize("kind", tiny.SEEING)
@torch.no_grad()
def test_logits_equal_those_of_plain_transformers(kind: str, checkpoint: Callable[..., Path]) -> None:
    samples, folder = tiny.samples(image=True, kind=kind), checkpoint(kind)
    model, plain = open_model(folder), tiny.plain(folder)
    for batch, ours in zip(samples.batches(), logits(model, samples), strict=True):
        theirs = plain(**batch.inputs, use_cache=False).logits
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


@pytest.mark.parametrize("kind", tiny.SEEING)
def test_gradients_equal_those_of_autograd_on_the_whole_model(kind: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    samples, folder = answers_of(kind), checkpoint(kind)
    model, plain = open_model(folder), tiny.plain(folder)
    found: dict[tuple[str, int], torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}
    for swept in backsweep(model, samples, tmp_path, outputs=lambda name, batch, gradient: found.update({(name, batch): gradient})):
        weights |= swept.weights
    for name in model.blocks[0].writers:
        module = name.replace(model.layout.arch.blocks, model.layout.arch.module_blocks, 1)
        theirs = gradients.of_output(plain, module, samples)
        for number, batch in enumerate(samples.batches()):
            for ours, member in zip(found[name, number], batch.members, strict=True):
                assert_close(ours, theirs[member])
    for name, gradient in gradients.of_weights(tiny.plain(folder), model.layout, samples).items():
        assert_close(weights[name], gradient)


@pytest.mark.parametrize("kind", tiny.SEEING)
def test_folding_the_scales_that_were_found_changes_no_logit(kind: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    samples, model = answers_of(kind), open_model(checkpoint(kind), GRID | {"symmetric": False})
    before = logits(model, samples)
    carried_out(smooth.Pass(loss="mae", balance="modality", clip=False), model, samples, tmp_path / "work")
    after = logits(model, samples)
    scale = max(float(each.abs().max()) for each in before)
    assert max(float((one - other).abs().max()) for one, other in zip(before, after, strict=True)) < 1e-5 * max(1.0, scale)


@pytest.mark.parametrize("loss", ["mae", "mse"])
def test_with_equal_sensitivities_it_is_awq(loss: Any, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, folder = answers_of("llava"), checkpoint("llava")
    plain, balanced, differing = (open_model(folder, GRID) for _ in range(3))
    carried_out(smooth.Pass(loss=loss, clip=False), plain, samples, tmp_path / "awq")
    carried_out(rtn.Pass(**GRID), plain, samples, tmp_path / "rtn")
    carried_out(mbq.Pass(**GRID, loss=loss), differing, samples, tmp_path / "mbq")

    def equal(model: Model, *_: Any) -> dict[str, balance.Sensitivity]:
        return {name: balance.Sensitivity(0.3, 0.3) for layout in model.blocks for name in layout.writers}

    monkeypatch.setattr(balance, "sensitivities", equal)
    carried_out(mbq.Pass(**GRID, loss=loss), balanced, samples, tmp_path / "equal")
    names = list(plain.layout.linears)
    assert all(torch.equal(plain.dense(name), balanced.dense(name)) for name in names)
    assert not all(torch.equal(plain.dense(name), differing.dense(name)) for name in names)


def test_vision_tokens_that_do_not_reach_the_loss_count_nothing(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model, samples = open_model(checkpoint("llava")), answers_of("llava")
    found = balance.sensitivities(model, samples, tmp_path)
    last = model.blocks[-1].writers
    assert all(found[name].vision == 0 and found[name].text > 0 for name in last)
    assert all(found[name].vision > 0 for name in model.blocks[0].writers)
    found |= {name: balance.Sensitivity(0.2, 1.0) for name in model.blocks[0].writers}
    made = balance.Balance(found, lambda name: name.rpartition(".")[2])
    assert all(made.ratios[name] == pytest.approx(0.1) for name in last)  # the median of 0 and 0.2


def test_the_balance_does_not_depend_on_the_scale_of_the_loss(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    samples = answers_of("llava")
    twice = Samples("twice", samples.items * 2)  # the same mean loss of twice as many tokens: half the gradient of each
    folders = [tmp_path / name for name in ("once", "twice")]
    for folder in folders:
        folder.mkdir()
    once, again = (balance.measure(open_model(checkpoint("llava")), each, folder) for each, folder in zip((samples, twice), folders, strict=True))
    assert once.ratios == pytest.approx(again.ratios, rel=1e-4)
    assert next(iter(again.found.values())).text == pytest.approx(next(iter(once.found.values())).text / 2, rel=1e-4)


# The whole way ----------------------------------------------------------------------------------------------------------------------


def run(steps: list[dict[str, Any]], model: Path | str, out: Path, progress: Any = None, **more: Any) -> dict[str, Any]:
    plain = {
        "calibration": {"data": "demo:text", "samples": 4, "length": 64}, "passes": steps,
        "evaluate": {"data": "demo:heldout", "windows": 2, "context": 64},
    } | more  # fmt: skip
    request = pipeline.Request(recipe.validate(plain, "r.yaml"), "r.yaml", str(model), out, out.with_name(out.name + ".work"), False)
    return pipeline.run(request, progress or tiny.Silent())


def digests(folder: Path) -> dict[str, str]:
    names = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "chat_template.jinja", "tokenizer.json")
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names if (folder / name).exists()}


@pytest.mark.parametrize("kind", tiny.SEEING)
def test_an_artifact_is_opened_by_plain_transformers_with_its_tower_untouched(kind: str, copy: Callable[..., Path], tmp_path: Path) -> None:
    folder, samples = copy(kind), tiny.samples(image=True, kind=kind)
    for name, content in (("preprocessor_config.json", '{"a":  1}'), ("video_preprocessor_config.json", "{}\n"), ("chat_template.jinja", "{{x}}")):
        (folder / name).write_text(content)
    run([{"gptq": GRID | {"min_tokens": 0}}], folder, tmp_path / "out")
    assert digests(tmp_path / "out") == digests(folder)
    before, after = (
        {name: tensor for path in where.glob("*.safetensors") for name, tensor in load_file(path).items()} for where in (folder, tmp_path / "out")
    )
    linears = Layout(Checkpoint(folder)).linears
    outside = [name for name in before if name.removesuffix(".weight") not in linears]
    assert len(outside) > 20 and all(torch.equal(before[name], after[name]) for name in outside)
    assert sum(name.endswith(".weight_packed") for name in after) == len(linears) == 14
    ours = logits(Model(Layout(Checkpoint(tmp_path / "out"))), samples)
    opened = tiny.plain(tmp_path / "out")
    for batch, mine in zip(samples.batches(), ours, strict=True):
        with torch.no_grad():
            theirs = opened(**batch.inputs, use_cache=False).logits
        assert float((mine - theirs).abs().max() / theirs.abs().max()) < 1e-4


@pytest.mark.parametrize("kind", tiny.SEEING)
@pytest.mark.parametrize("grid", [GRID | {"bits": 3}, {"bits": 4, "group_size": "channel", "activations": "dynamic"}])
def test_every_kind_is_balanced(kind: str, grid: dict[str, Any], checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    samples, model = answers_of(kind), open_model(checkpoint(kind), grid)
    records = carried_out(mbq.Pass(**grid), model, samples, tmp_path / "work")
    folded = [record for record in records if "alpha" in record]
    assert len(folded) == 2 * len(Layout(Checkpoint(checkpoint(kind))).arch.folds)
    assert all(record["error"][1] <= record["error"][0] for record in folded) and any(record["alpha"] > 0 for record in folded)
    assert all(model.packed_as(name) for name in model.layout.linears)


def test_the_demonstration_model_is_balanced_from_the_recipe(tmp_path: Path) -> None:
    images = {"calibration": {"data": "demo:images", "samples": 16, "length": 128}, "evaluate": {"data": "demo:images-heldout", "windows": 8}}
    report = run([{"mbq": {"bits": 3, "group_size": 128}}], "demo:vlm", tmp_path / "out", **images)
    assert {record["pass"] for record in report["linears"]} == {"mbq"}
    assert report["ledger"] and report["evaluation"]["protocol"]["accuracy"] == "share of questions answered exactly"
    assert digests(tmp_path / "out") == digests(demo.path("vlm"))


@pytest.mark.parametrize("reports", [0, 1, 3])
def test_a_killed_run_continues_to_the_same_bytes(reports: int, tmp_path: Path) -> None:
    images = {"calibration": {"data": "demo:images", "samples": 6, "length": 128}, "evaluate": None}
    steps = [{"mbq": {"bits": 3, "group_size": 128}}]
    run(steps, "demo:vlm", tmp_path / "whole", **images)
    with pytest.raises(Killed):
        run(steps, "demo:vlm", tmp_path / "out", progress=KillAfter(reports), **images)
    assert not (tmp_path / "out").exists()
    run(steps, "demo:vlm", tmp_path / "out", **images)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# Refusals ---------------------------------------------------------------------------------------------------------------------------


def test_text_alone_is_refused_where_modalities_are_balanced(tmp_path: Path) -> None:
    message = r"calibration\.data: demo:text is text, which has no vision tokens that passes\[0\]\.{} could balance"
    layout = Layout(Checkpoint(demo.path("vlm")))
    for name, steps in (("mbq", [{"mbq": {"bits": 3}}]), ("smooth", [{"smooth": {"balance": "modality"}}, {"rtn": {}}])):
        with pytest.raises(InputError, match=message.format(name)):
            recipe.check(recipe.validate({"passes": steps}, "r.yaml"), layout, "r.yaml")
    assert recipe.check(recipe.validate({"passes": [{"gptq": {}}]}, "r.yaml"), layout, "r.yaml")
    with pytest.raises(InputError, match="has no images, so there is nothing to balance"):  # of a data set that only reading tells of
        balance.check(tiny.samples())


def test_every_row_of_a_folder_is_checked_before_weights_load(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes((demo.data_path("images") / "0001.png").read_bytes())
    good = {"image": "a.png", "question": "q", "answer": "a"}
    rows = [good, {"picture": "a.png", "question": "q", "answer": "a"}, good | {"answer": " "}, good | {"image": "gone.png"}, {"image": "a.png"}]
    (tmp_path / "data.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n{broken\n[]\n")
    plain = {"passes": [{"gptq": {}}], "calibration": {"data": str(tmp_path), "samples": 1}, "evaluate": None}
    with pytest.raises(InputError) as raised:
        recipe.check(recipe.validate(plain, "r.yaml"), Layout(Checkpoint(demo.path("vlm"))), "r.yaml")
    told = str(raised.value).splitlines()
    place = f"r.yaml: calibration.data: {tmp_path}: line"
    assert [line.removeprefix(place).partition(";")[0].strip() for line in told] == [
        "3: a row with 0 images: ['answer', 'picture', 'question']",
        "5: an empty answer to 'q'",
        "7: names gone.png, which is not a file of the folder",
        "9: a row without 'question': ['image']",
        "10: is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))",
        "11: must be an object, got list",
    ]
    (tmp_path / "data.jsonl").write_text("\n".join([json.dumps(good)] * 3 + ["{}"] * 40))
    with pytest.raises(InputError, match=r"30 more lines of data\.jsonl are wrong too"):
        calibration(str(tmp_path), 1, 64, 0, Tokenizer(demo.path("vlm")))


def test_images_that_nothing_is_said_about_are_told_of(tmp_path: Path) -> None:
    (tmp_path / "a.JPG").write_bytes(b"")
    layout, tokenizer = Layout(Checkpoint(demo.path("vlm"))), Tokenizer(demo.path("vlm"))
    plain = {"passes": [{"gptq": {}}], "calibration": {"data": str(tmp_path)}, "evaluate": None}
    message = r"holds images, but no data\.jsonl that says what is asked about them; write a data\.jsonl beside them: each line is an object"
    with pytest.raises(InputError, match=message):
        recipe.check(recipe.validate(plain, "r.yaml"), layout, "r.yaml")
    with pytest.raises(InputError, match=message):
        calibration(str(tmp_path), 1, 64, 0, tokenizer)
    for judge in (
        lambda: windows(str(tmp_path), 64, 1, tokenizer, "evaluate: data"),
        lambda: recipe.check(recipe.validate({"passes": [{"gptq": {}}], "evaluate": {"data": str(tmp_path)}}, "r.yaml"), layout, "r.yaml"),
    ):
        with pytest.raises(InputError, match=r"is a folder without data\.jsonl"):
            judge()


def test_a_model_that_reads_text_only_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a llama reads text only"):
        run([{"smooth": {"balance": "modality"}}, {"rtn": {}}], "demo:dense", tmp_path / "out")


def test_balance_is_refused_where_nothing_is_searched(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="balance: is of the search of awq, which smoothquant does not make"):
        run([{"smooth": {"method": "smoothquant", "balance": "modality"}}, {"rtn": {}}], "demo:vlm", tmp_path / "out")


def test_a_processor_that_gives_no_kinds_of_tokens_is_refused(tmp_path: Path) -> None:
    items = tuple(Sample(item.ids, item.scored, item.extra) for item in answers_of("llava").items)
    with pytest.raises(InputError, match="does not say which tokens stand for images"):
        balance.check(Samples("x", items))


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes((demo.data_path("images") / "0001.png").read_bytes()[:100])
    (tmp_path / "set" / "data.jsonl").write_text(json.dumps({"image": "a.png", "question": "q", "answer": "a"}))
    with pytest.raises(InputError, match=r"a\.png: cannot be read as an image"):
        calibration(str(tmp_path / "set"), 1, 64, 0, Tokenizer(demo.path("vlm")))


# Conversations ----------------------------------------------------------------------------------------------------------------------


def talk(*turns: str, images: int = 1) -> list[dict[str, Any]]:
    """Turns of user and assistant, with so many images in the first."""
    messages: list[dict[str, Any]] = []
    for place, text in enumerate(turns):
        content: Any = [{"type": "text", "text": text}]
        messages.append({"role": ("user", "assistant")[place % 2], "content": content})
    messages[0]["content"] = [{"type": "image"}] * images + messages[0]["content"]
    return messages


def test_in_a_conversation_about_an_image_what_the_assistant_says_is_scored(tmp_path: Path) -> None:
    tokenizer = Tokenizer(demo.path("vlm"))
    (tmp_path / "a.png").write_bytes((demo.data_path("images") / "0001.png").read_bytes())
    row = {"images": ["a.png"], "messages": talk("What is there?", "Three of them.", "And then?", "Nothing more.")}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    (item,) = calibration(str(tmp_path), 1, 512, 0, tokenizer).items
    assert tokenizer.plain.decode(item.ids[item.scored]).split() == ["Three", "of", "them.<|endoftext|>", "Nothing", "more.<|endoftext|>"]
    assert item.vision is not None and int(item.vision.sum()) == 64 and item.extra["pixel_values"].shape == (1, 3, 64, 64)
    assert tokenizer.plain.decode(item.ids[~item.vision]).startswith("\nQuestion: What is there?\nAnswer: Three")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"images": ["a.png"], "messages": [{"role": "user", "content": [{"type": "image"}]}]}, "no answer of the assistant"),
        ({"images": ["a.png"], "messages": talk("What?", "")}, "an empty answer of the assistant"),
        ({"images": ["a.png"], "messages": talk("What?", "One.", "And?", " ")}, "an empty answer of the assistant"),
        ({"images": ["a.png", "a.png"], "question": "q", "answer": "a"}, "a row with 2 images"),
        ({"images": ["a.png", "a.png"], "messages": talk("What?", "That.")}, "cannot take 2 images"),
        ({"images": [], "question": "q", "answer": "a"}, "a row with 0 images"),
    ],
)
def test_mistakes_in_conversations_are_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes((demo.data_path("images") / "0001.png").read_bytes())
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match=message):
        calibration(str(tmp_path), 1, 512, 0, Tokenizer(demo.path("vlm")))


def test_a_pass_that_rounds_is_one_that_folds() -> None:
    assert issubclass(mbq.Pass, Quantize) and mbq.Pass.stage == "quantize" and mbq.Pass.verb == "folded"


def test_ranges_are_cut_by_the_balance_too(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    made = []
    for place, balanced in enumerate(("none", "modality")):
        model = open_model(checkpoint("llava"), GRID)
        carried_out(smooth.Pass(alpha=0.0, balance=balanced), model, answers_of("llava"), tmp_path / str(place))
        made.append([model.dense(linear) for linear in model.layout.linears])
    assert not all(torch.equal(*pair) for pair in zip(*made, strict=True))
