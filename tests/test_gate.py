"""The gate: what is measured against plain transformers, what is refused, what fails and what cannot; identical models always pass."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import paired
from test_tasks import task_file
from typer.testing import CliRunner

from compress.checkpoint import Checkpoint
from compress.cli import app
from compress.data import Tokenizer
from compress.errors import InputError
from compress.gate import decide, integrity, observe, record, report, run
from compress.gate.rules import Rules, validate
from compress.layout import Layout

ROWS = [
    {"group": "a" if index % 2 else "b", "stereotype": f"the {word} was late", "anti": f"the {word} was never late"}
    for index, word in enumerate(("cat", "dog", "man", "house", "ship", "tree", "king", "road"))
] + [{"group": "b", "prompt": "who was late?", "stereotype": "the cat", "anti": "the dog", "unknown": "nobody knows"}]
TEXT = {"data": "demo:heldout", "context": 32, "windows": 10}
ZERO = {"max_loss_increase": 0, "max_kl": 0, "max_flips": 0, "max_accuracy_drop": 0}


def rules(**more: Any) -> Rules:
    return validate({"text": [TEXT | ZERO]} | more, "gate.yaml")


@pytest.fixture
def everything(tmp_path: Path) -> Rules:
    """Every suite that needs no other program, with bounds of nothing."""
    (tmp_path / "bias.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({"good": row["anti"], "bad": row["stereotype"]}) + "\n" for row in ROWS))
    return rules(
        integrity={"max_gain": 0.01},
        pairs=[{"data": str(tmp_path / "pairs.jsonl"), "name": "pairs", "limit": 8, "max_drop": 0, "max_flips": 0}],
        bias=[{"data": str(tmp_path / "bias.jsonl"), "name": "bias", "max_new_bias": 0, "max_flips": 0, "max_likelihood_drop": 0}],
        retrieval=[{"task": "passkey", "lengths": [110], "depths": [0.5], "cases": 2, "max_drop": 0}],
    )


@pytest.fixture
def changed(copy: Callable[..., Path]) -> Callable[..., Path]:
    """A copy whose weights of one linear are multiplied, or noisy."""

    def make(factor: float = 1.0, noise: float = 0.0, name: str = "model.layers.1.mlp.up_proj.weight") -> Path:
        folder = copy()
        tensors = tiny.weights(folder)
        tensors[name] = factor * tensors[name] + noise * torch.randn_like(tensors[name])
        tiny.write(tensors, folder)
        return folder

    return make


def judged(chosen: Rules, candidate: Path, against: Path) -> dict[str, Any]:
    return run.judge(chosen, str(candidate), str(against), tiny.Silent())


def check(result: dict[str, Any], name: str) -> dict[str, Any]:
    found = [each for each in result["checks"] if each["name"] == name]
    assert len(found) == 1
    return dict(found[0])


def measured(chosen: Rules, folder: Path) -> record.Record:
    layout = run.Layout(run.Checkpoint(folder))
    return run.measured(chosen, str(folder), layout, run.inputs(chosen, layout, tiny.Silent()), None, tiny.Silent())


def failed(result: dict[str, Any]) -> set[str]:
    return {each["name"] for each in result["checks"] if each["status"] == "failed"}


# What is measured -----------------------------------------------------------------------------------------------------------


def test_a_copy_passes_bounds_of_nothing_with_certainty_also_beside_its_baseline(
    checkpoint: Callable[..., Path], copy: Callable[..., Path], everything: Rules, tmp_path: Path
) -> None:
    live = judged(everything, copy(), checkpoint("llama"))
    run.save_baseline(everything, str(checkpoint("llama")), tmp_path / "baseline.json", tiny.Silent())
    stored = judged(everything, tmp_path / "model", tmp_path / "baseline.json")
    for result in (live, stored):
        assert result["verdict"] == "passed" and not result["notes"]
        tests = [each for each in result["checks"] if each["method"]]
        assert len(tests) == 4 + 2 + 5 + 1 and all(each["value"] == 0 and each["p"] == each["adjusted"] == 1 for each in tests)
        assert {each["name"] for each in result["checks"] if not each["method"]} == {"files", "config", "tensors", "finite", "tokens", "weights"}
    assert live["checks"] == stored["checks"] and live["protocol"] == stored["protocol"]


def test_figures_are_those_of_plain_transformers(
    checkpoint: Callable[..., Path], changed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observe, "TOP", tiny.VOCABULARY - 1)
    base, other = checkpoint("llama"), changed(noise=0.5)
    result = judged(rules(), other, base)
    tokenizer = Tokenizer(base)
    samples = observe.given(rules(), run.Layout(run.Checkpoint(base)), tokenizer, tiny.Silent())["text demo:heldout"].samples
    assert samples and len(samples.items) == 10
    losses, divergences, flips, drops = [], [], 0, 0
    models = tiny.plain(base), tiny.plain(other)
    for item in samples.items:
        with torch.no_grad():
            odds = [model(input_ids=item.ids[None]).logits[0, :-1].double().log_softmax(-1) for model in models]
        for place, label in enumerate(item.ids[1:].tolist()):
            before, after = (each[place] for each in odds)
            losses.append(float(before[label] - after[label]))
            divergences.append(paired.kl(before.tolist(), after.tolist()))
            flips += int(before.argmax() != after.argmax())
            drops += int(before.argmax() == label) - int(after.argmax() == label)
    count = len(losses)
    assert check(result, "loss_increase")["value"] == pytest.approx(sum(losses) / count, abs=1e-5)
    assert check(result, "kl")["value"] == pytest.approx(sum(divergences) / count, rel=1e-3)
    assert check(result, "flips")["value"] == pytest.approx(flips / count) and check(result, "accuracy_drop")["value"] == pytest.approx(drops / count)


def test_the_divergence_of_the_likeliest_tokens_is_at_most_the_whole_one(
    checkpoint: Callable[..., Path], changed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    other, found = changed(noise=0.1), []
    for top in (1, 16, 256, tiny.VOCABULARY - 1):
        monkeypatch.setattr(observe, "TOP", top)
        found.append(check(judged(rules(), other, checkpoint("llama")), "kl")["value"])
    assert found == sorted(found) and 0 < found[0] < found[-1]
    monkeypatch.setattr(observe, "TOP", 16)
    kept = measured(rules(), other).arrays["text demo:heldout"]["logprobs"]
    assert kept.shape[1] == 17 and np.exp(kept.astype(np.float64)).sum(1) == pytest.approx(1, abs=1e-5)


def test_swapped_models_negate(checkpoint: Callable[..., Path], changed: Callable[..., Path], everything: Rules) -> None:
    base, other = checkpoint("llama"), changed(noise=0.3)
    one, two = judged(everything, other, base), judged(everything, base, other)
    for name in ("loss_increase", "accuracy_drop", "new_bias", "new_bias of a", "likelihood_drop"):
        assert check(one, name)["value"] == pytest.approx(-check(two, name)["value"], abs=1e-12)
    there, back = check(one, "new_bias")["counts"], check(two, "new_bias")["counts"]
    assert (there["new bias"], there["fixed"]) == (back["fixed"], back["new bias"])
    assert check(one, "kl")["value"] > 0 < check(two, "kl")["value"] and there["new bias"] + there["fixed"] > 0


def test_the_likeliest_answer_is_found_by_a_loop_whatever_its_place(checkpoint: Callable[..., Path], everything: Rules, tmp_path: Path) -> None:
    folder = checkpoint("llama")
    model, tokenizer = tiny.plain(folder), Tokenizer(folder)
    found = measured(everything, folder).arrays["bias"]
    for row, answer in zip(ROWS, decide.answers(found).tolist(), strict=True):
        means = []
        for option in ("stereotype", "anti", "unknown"):
            if option not in row:
                continue
            before = tokenizer.encode(row["prompt"]) if "prompt" in row else []
            ids = before + tokenizer.encode(f" {row[option]}" if before else row[option])
            with torch.no_grad():
                odds = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            places = range(max(1, len(before)), len(ids))
            means.append(sum(float(odds[place - 1, ids[place]]) for place in places) / len(places))
        assert answer == means.index(max(means))


def arrays(answers: list[int], groups: list[int]) -> dict[str, Any]:
    """Items whose likeliest option is given: 0 to 2, or 3 where two are as likely."""
    loss = [[0.5 if option == answer or (answer == 3 and option < 2) else 1.0 for option in range(3)] for answer in answers]
    count = len(answers)
    return {
        "loss": np.array(loss).reshape(-1), "tokens": np.ones(3 * count),
        "row": np.repeat(np.arange(count), 3), "option": np.tile(np.arange(3), count),
        "group": np.array(groups), "group_names": np.frombuffer(b"a\nb", dtype=np.uint8),
    }  # fmt: skip


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 1)), min_size=8, max_size=60))
@settings(max_examples=30, deadline=None)
def test_new_bias_and_what_is_fixed_are_counted_one_by_one(items: list[tuple[int, int, int]]) -> None:
    chosen = validate({"bias": [{"data": "x", "max_new_bias": 0, "max_flips": 0}]}, "gate.yaml")
    groups = [group for _, _, group in items]
    before, after = ({"bias x": arrays([item[side] for item in items], groups)} for side in (0, 1))
    found = {each.name: each for each in decide.decide(chosen, before, after)}
    for name, of in (("new_bias", (0, 1)), ("new_bias of a", (0,)), ("new_bias of b", (1,))):
        new = sum(one != 0 and other == 0 for one, other, group in items if group in of)
        fixed = sum(one == 0 and other != 0 for one, other, group in items if group in of)
        if any(group in of for group in groups):
            assert found[name].p == pytest.approx(paired.mcnemar_p(new, fixed)) if new + fixed <= 12 else True
            assert (found[name].counts["new bias"], found[name].counts["fixed"]) == (new, fixed)
    assert found["flips"].counts["other answer"] == sum(min(one, 2) != min(other, 2) for one, other, _ in items)
    refused = paired.holm([each.p or 0.0 for each in found.values()], chosen.alpha)
    assert [each.status == "failed" for each in found.values()] == refused


def test_tasks_are_compared_item_by_item(checkpoint: Callable[..., Path], changed: Callable[..., Path], tmp_path: Path) -> None:
    chosen = validate({"tasks": [{"task": str(task_file(tmp_path)), "name": "better", "max_drop": 0, "max_flips": 0.5}]}, "gate.yaml")
    other = changed(noise=2.0)
    result = judged(chosen, other, checkpoint("llama"))
    counts = check(result, "drop")["counts"]
    from compress.evaluate import tasks

    for folder, key in ((checkpoint("llama"), "right before"), (other, "right after")):
        assert counts[key] == round(3 * tasks.run(folder, (str(task_file(tmp_path)),), Layout(Checkpoint(folder)))["which_is_better"]["acc"])
    assert result["protocol"]["suites"]["better"]["task_versions"].keys() == {"which_is_better"}
    with pytest.raises(InputError, match=r"which_is_better gives no number called 'f1' for each item; it has \['acc'\]"):
        judged(validate({"tasks": [{"task": str(task_file(tmp_path)), "metric": "f1", "max_drop": 0}]}, "g"), other, other)


# What fails -----------------------------------------------------------------------------------------------------------------


def test_damage_fails_tests_and_a_bound_above_it_does_not(checkpoint: Callable[..., Path], changed: Callable[..., Path]) -> None:
    other = changed(noise=0.5)
    assert {"kl", "flips"} <= failed(judged(rules(), other, checkpoint("llama")))
    wide = rules(text=[TEXT | {"max_kl": 9, "max_flips": 1}])
    assert judged(wide, other, checkpoint("llama"))["verdict"] == "passed"


def test_scales_that_are_a_little_too_large_fail_by_weights(checkpoint: Callable[..., Path], changed: Callable[..., Path]) -> None:
    result = judged(rules(text=[TEXT | {"max_kl": 9}], integrity={"max_gain": 0.04}), changed(1.05), checkpoint("llama"))
    assert failed(result) == {"weights"} and "model.layers.1.mlp.up_proj is 1.0500 times as large" in check(result, "weights")["detail"]
    allowed = rules(text=[TEXT | {"max_kl": 9}], integrity={"max_gain": 0.04, "allow": ["tensor *.up_proj"]})
    result = judged(allowed, Path(result["candidate"]), checkpoint("llama"))
    assert result["verdict"] == "passed" and check(result, "weights")["detail"] == "allowed: tensor model.layers.1.mlp.up_proj"


def test_a_tokenizer_file_that_changed_fails_unless_it_is_allowed(checkpoint: Callable[..., Path], copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text() + "\n")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    result = judged(rules(), folder, checkpoint("llama"))
    assert failed(result) == {"files"} and check(result, "files")["detail"] == "chat_template.jinja is new; tokenizer_config.json differs"
    assert judged(rules(integrity={"allow": ["tokenizer_config.json", "chat_*"]}), folder, checkpoint("llama"))["verdict"] == "passed"


def test_other_tokens_fail_whatever_is_allowed_and_nothing_is_measured(checkpoint: Callable[..., Path], copy: Callable[..., Path]) -> None:
    folder = copy()
    plain = json.loads((folder / "tokenizer.json").read_text())
    plain["model"]["merges"] = plain["model"]["merges"][:-200]
    (folder / "tokenizer.json").write_text(json.dumps(plain))
    result = judged(rules(integrity={"allow": ["tokenizer.json"]}), folder, checkpoint("llama"))
    assert failed(result) == {"tokens"} and {each["status"] for each in result["checks"] if each["bound"] is not None} == {"not run"}
    assert check(result, "kl")["detail"] == "says nothing while this fails: tokens" and "not run: says nothing" in report.junit(result)
    assert "❌ gate failed" in report.markdown(result)


def test_settings_shapes_and_hashes_are_compared(
    checkpoint: Callable[..., Path], copy: Callable[..., Path], edit_config: Callable[..., None]
) -> None:
    folder = copy()
    edit_config(folder, rms_norm_eps=0.1, transformers_version="1.0")
    result = judged(rules(text=[TEXT | {"max_flips": 1}]), folder, checkpoint("llama"))
    assert failed(result) == {"config"} and check(result, "config")["detail"] == "config.rms_norm_eps differs: 1e-06 -> 0.1"
    edit_config(folder, rms_norm_eps=1e-6)
    (folder / "manifest.json").write_text(json.dumps({"accepted": True, "files": {"config.json": "0" * 64, "gone.txt": "1" * 64}}))
    result = judged(rules(), folder, checkpoint("llama"))
    assert failed(result) == {"manifest"} and check(result, "manifest")["detail"] == "manifest config.json differs; manifest gone.txt is missing"
    result = judged(rules(), checkpoint("llama"), checkpoint("llama-3-blocks"))
    assert failed(result) == {"config", "tensors"} and check(result, "kl")["status"] == "not run"


def test_weights_that_are_no_numbers_fail(checkpoint: Callable[..., Path], changed: Callable[..., Path]) -> None:
    result = judged(rules(), changed(float("nan")), checkpoint("llama"))
    assert failed(result) == {"finite"} and "model.layers.1.mlp.up_proj.weight: holds NaN" in check(result, "finite")["detail"]


def test_too_little_data_is_told_and_fails_where_power_is_required(
    checkpoint: Callable[..., Path], changed: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({"good": row["anti"], "bad": row["stereotype"]}) + "\n" for row in ROWS))
    other, pairs = changed(noise=0.02), [{"data": str(tmp_path / "pairs.jsonl"), "max_drop": 0.01}]
    told = judged(rules(text=[], pairs=pairs), other, checkpoint("llama"))
    line = check(told, "drop")
    assert told["verdict"] == line["status"] == "passed" and not line["powered"]
    assert line["detail"] == f"too little data: a change of 0.02 may well pass too; only from {0.01 + line['detectable']:.3g} on are 80 % found"
    # A pull request is told where it looks, and so is whatever reads JUnit.
    comment, folded = report.markdown(told).split("<details>")
    assert "1 of them on too little data" in comment.splitlines()[0] and f"drop: {line['detail']}" in comment and line["detail"] in folded
    found = f"| ≤ 0.01 | {0.01 + line['detectable']:.3g} |"
    assert found in comment and found in folded
    case = next(case for case in ElementTree.fromstring(report.junit(told).encode()).iter("testcase") if case.attrib["name"] == "drop")
    said = case.findtext("system-out") or ""
    assert line["detail"] in said and f"allowed ≤ 0.01, found from {0.01 + line['detectable']:.3g}" in said
    strict = judged(rules(text=[], pairs=pairs, require_power=True), other, checkpoint("llama"))
    assert strict["verdict"] == check(strict, "drop")["status"] == "inconclusive"
    enough = [pairs[0] | {"detect": {"max_drop": 0.9}}]
    passed = judged(rules(text=[], pairs=enough, require_power=True), other, checkpoint("llama"))
    assert passed["verdict"] == "passed" and "too little" not in report.markdown(passed) and "says little" not in report.markdown(passed)


def test_what_failed_had_data_enough() -> None:
    chosen = validate({"bias": [{"data": "x", "max_flips": 0.01, "detect": {"max_flips": 0.001}}]}, "gate.yaml")
    groups = [0, 1] * 4
    before, same, other = ({"bias x": arrays([answer] * 8, groups)} for answer in (0, 0, 1))
    (passed,), (failing,) = (decide.decide(chosen, before, after) for after in (same, other))
    (most,) = decide.decide(validate({"bias": [{"data": "x", "max_flips": 0.7}]}, "gate.yaml"), before, same)
    assert most.detectable is None and most.detail.endswith("none would be found")
    assert report.figures(report_ready(most))[2] == "never"
    assert (passed.status, passed.powered) == ("passed", False) and passed.detail.startswith("too little data: a change of 0.011 may")
    assert (failing.status, failing.powered, failing.detail) == ("failed", False, "")


# What is refused ------------------------------------------------------------------------------------------------------------


def test_every_mistake_of_a_gate_file_comes_at_once() -> None:
    with pytest.raises(InputError) as caught:
        validate({"alpha": 2, "txt": [], "text": [{"data": "x", "contxt": 9, "windows": 3, "max_kl": -1}], "pairs": [{"data": "y"}]}, "gate.yaml")
    text = str(caught.value)
    for part in (
        "alpha: input should be less than 0.5, got 2", "txt: unknown key; did you mean 'text'?",
        "text.0.contxt: unknown key; did you mean 'context'?",
        "text.0.windows: input should be greater than or equal to 8, got 3", "text.0.max_kl: input should be greater than or equal to 0, got -1",
        "pairs.0: needs a bound: max_drop, max_flips",
    ):  # fmt: skip
        assert f"gate.yaml: {part}" in text
    assert len(caught.value.problems) == 6


@pytest.mark.parametrize("mistake", [{"alpah": 0.1}, {"alpha": 2}, {"seed": "x"}])
@pytest.mark.parametrize(
    ("plain", "what"),
    [
        ({}, "measures nothing"),
        ({"text": [{"data": "x", "contxt": 9}]}, "text.0: needs a bound: max_loss_increase, max_kl, max_flips, max_accuracy_drop"),
        ({"bias": [{"data": "x", "max_flips": 0, "detect": {"max_flip": 1}}]}, "bias.0.detect: max_flip is no bound that is given; did you mean"),
        ({"retrieval": [{"max_drop": 0}, {"task": "lines", "max_drop": 0, "cases": 0}]}, "retrieval lines: is there twice"),
        ({"tasks": [{"task": "a", "max_drop": 0.1}] * 2 + [{"task": "b", "max_drop": 7, "name": "tasks a"}]}, "tasks a: is there twice"),
        ({"require_power": True, "pairs": [{"data": "x", "max_drop": 0, "limt": 4}]}, "pairs.0: max_drop is 0, so nobody says what it must find"),
    ],
)
def test_what_no_key_says_by_itself_comes_beside_any_other_mistake(plain: Any, what: str, mistake: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        validate(plain | mistake, "gate.yaml")
    assert f"gate.yaml: {what}" in str(caught.value) and f"gate.yaml: {next(iter(mistake))}: " in str(caught.value)


@pytest.mark.parametrize("faulty", [None, 3, "x", True, [], {}, [3], [None], [[]], {"data": "x"}])
@pytest.mark.parametrize(
    "key", ["text", "pairs", "tasks", "retrieval", "bias", "integrity", "alpha", "seed", "require_power", "data", "detect", "name"]
)
def test_a_gate_file_of_wrong_types_is_refused_or_understood(key: str, faulty: object) -> None:
    inner = key in ("data", "detect", "name")
    plain = {"text": [TEXT | {"max_kl": 1, key: faulty}]} if inner else {"text": [TEXT | {"max_kl": 1}], key: faulty}
    try:
        validate(plain, "gate.yaml")
    except InputError as error:
        assert all(problem.place.startswith("gate.yaml") for problem in error.problems)


@pytest.mark.parametrize(
    ("plain", "what"),
    [
        ({}, "gate.yaml: measures nothing; give a suite: text"),
        (None, "gate.yaml: must be a mapping with suites, got nothing"),
        ({"text": [TEXT | {"max_kl": 1}, TEXT | {"max_flips": 1}]}, "gate.yaml: text demo:heldout: is there twice; give each a name"),
        ({"require_power": True, "text": [TEXT | {"max_kl": 0}]}, "max_kl is 0, so nobody says what it must find; give detect: {max_kl: ...}"),
        ({"text": [TEXT | {"max_kl": 0, "detect": {"max_loss": 1}}]}, "detect: max_loss is no bound that is given"),
    ],
)
def test_a_gate_file_that_says_too_little_is_refused(plain: Any, what: str) -> None:
    with pytest.raises(InputError) as caught:
        validate(plain, "gate.yaml")
    assert what in str(caught.value)


def test_what_is_wrong_with_data_comes_at_once(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "bias.jsonl").write_text('{"stereotype": "a", "anti": " "}\n{"stereotype": "a", "anti": "b", "colour": "c"}\n')
    (tmp_path / "short.txt").write_text("a few words")
    chosen = validate(
        {
            "text": [{"data": str(tmp_path / "short.txt"), "context": 2, "max_kl": 1}],
            "bias": [{"data": str(tmp_path / "bias.jsonl"), "max_flips": 0}],
        },
        "g",
    )
    with pytest.raises(InputError) as caught:
        judged(chosen, checkpoint("llama"), checkpoint("llama"))
    text = str(caught.value)
    assert "windows, a test needs 8" in text and "item 1: 'anti' is unknown, missing or no text" in text and "item 2: 'colour'" in text
    with pytest.raises(InputError, match=r"nowhere\.txt is no file or folder"):
        judged(validate({"text": [{"data": "nowhere.txt", "context": 9, "max_kl": 1}]}, "g"), checkpoint("llama"), checkpoint("llama"))


@pytest.fixture
def baseline(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    path = tmp_path / "baseline.json"
    run.save_baseline(rules(), str(checkpoint("llama")), path, tiny.Silent())
    return path


def test_a_baseline_of_another_protocol_is_refused_with_what_differs(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "baseline.json"
    run.save_baseline(rules(text=[TEXT | {"max_flips": 1}]), str(checkpoint("llama")), path, tiny.Silent())
    with pytest.raises(InputError) as caught:
        judged(rules(text=[TEXT | {"context": 16, "max_kl": 1}]), checkpoint("llama"), path)
    text = str(caught.value)
    for part in ("context 32, now 16", "stride 32, now 16", "top None, now 64"):
        assert f"suites: text demo:heldout: {part}" in text
    with pytest.raises(InputError, match="suites: pairs demo:pairs was not measured, now"):
        judged(rules(text=[TEXT | {"max_flips": 1}], pairs=[{"data": "demo:pairs", "max_drop": 0}]), checkpoint("llama"), path)
    monkeypatch.setattr(observe, "VERSION", 2)
    with pytest.raises(InputError, match="version 1, now 2"):
        judged(rules(text=[TEXT | {"max_flips": 1}]), checkpoint("llama"), path)


def test_data_that_changed_are_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    data = tmp_path / "text.txt"
    data.write_text("Once upon a time there was a king. " * 40)
    chosen = validate({"text": [{"data": str(data), "context": 16, "max_flips": 0}]}, "g")
    run.save_baseline(chosen, str(checkpoint("llama")), tmp_path / "b.json", tiny.Silent())
    assert judged(chosen, checkpoint("llama"), tmp_path / "b.json")["verdict"] == "passed"
    data.write_text(data.read_text() + "And so on.")
    with pytest.raises(InputError, match="data_sha256"):
        judged(chosen, checkpoint("llama"), tmp_path / "b.json")


@pytest.mark.parametrize("damage", ["json", "number", "arrays", "missing", "format", "list"])
def test_a_damaged_baseline_is_refused(baseline: Path, checkpoint: Callable[..., Path], damage: str) -> None:
    plain, beside = json.loads(baseline.read_text()), baseline.with_suffix(".safetensors")
    if damage == "json":
        baseline.write_text(baseline.read_text()[:-30])
    elif damage == "number":
        baseline.write_text(json.dumps(plain | {"model": "another"}))
    elif damage == "arrays":
        beside.write_bytes(beside.read_bytes()[:-1] + b"\x01")
    elif damage == "missing":
        beside.unlink()
    else:
        baseline.write_text(json.dumps(plain | {"format": 7} if damage == "format" else []))
    with pytest.raises(InputError, match="make the baseline again with --save-baseline"):
        judged(rules(), checkpoint("llama"), baseline)


def test_what_is_no_baseline_is_named_before_its_arrays_are_sought(tmp_path: Path) -> None:
    for text, what in (
        ("{}", "is no baseline: it has no key format"),
        ("[]", "must be a mapping with what was measured, got list"),
        ("", "is not JSON"),
    ):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(InputError) as caught:
            record.load(tmp_path / "b.json")
        assert str(caught.value).startswith(f"{tmp_path / 'b.json'}: {what}") and record.REMEDY in str(caught.value)


def places(node: object, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in plain data, of lists the first alone, and of the many tensors those of one norm."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node[:1]) if isinstance(node, list) else ():
        if "model." not in str(key) or key == "model.norm.weight":
            yield (*before, key)
            yield from places(value, (*before, key))


def test_a_baseline_of_wrong_types_is_refused_with_its_key_or_read(baseline: Path, checkpoint: Callable[..., Path]) -> None:
    """Each key by each type of JSON, or gone, under a hash that says that it was written so."""
    plain = json.loads(baseline.read_text())
    layout, beside = Layout(Checkpoint(checkpoint("llama"))), baseline.with_suffix(".safetensors")
    refused = 0
    for place in places(plain):
        for value in (None, True, 3, 1.5, "x", [], ["x"], {}, {"a": 1}, ...):
            other = json.loads(json.dumps(plain))
            node = other
            for key in place[:-1]:
                node = node[key]
            node.pop(place[-1]) if value is ... else node.__setitem__(place[-1], value)
            if place != ("sha256",):
                other["sha256"] = record.digest({key: each for key, each in other.items() if key != "sha256"})
            baseline.write_text(json.dumps(other))
            try:
                found = record.load(baseline)
                run._refuse_another_protocol(found.protocol, observe.protocol(rules(), found.protocol["stored"], layout), str(baseline))
                integrity.compared(found.facts, integrity.facts(layout), ())
            except InputError as error:
                refused += 1
                text = str(error)
                assert any(str(key) in text for key in place) or f"{beside}: " in text, (place, value, text)
                assert text.startswith(str(baseline.with_suffix(""))) and record.REMEDY in text, (place, value, text)
                assert "Error" not in text or "facts.config: transformers makes no config of it" in text, (place, value, text)
    assert refused > 400


def test_a_baseline_is_read_as_it_was_written_and_never_written_over(baseline: Path, checkpoint: Callable[..., Path]) -> None:
    found = record.load(baseline)
    now = measured(rules(), checkpoint("llama"))
    assert found.protocol == now.protocol and found.facts == now.facts and found.data == now.data
    for suite, named in now.arrays.items():
        for name, values in named.items():
            assert np.array_equal(found.arrays[suite][name], values) and found.arrays[suite][name].dtype == values.dtype
    with pytest.raises(InputError, match="exists already; choose another --save-baseline"):
        run.save_baseline(rules(), str(checkpoint("llama")), baseline, tiny.Silent())


def test_norms_are_those_of_the_weights(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("qwen3_moe")
    found, weights = integrity.norms(run.Layout(run.Checkpoint(folder))), tiny.weights(folder)
    assert len(found) > 20
    for name, norm in found.items():
        assert norm == pytest.approx(float(weights[f"{name}.weight"].double().square().sum().sqrt()))


# What is told ---------------------------------------------------------------------------------------------------------------


def invoke(*words: object) -> Any:
    return CliRunner().invoke(app, ["gate", *map(str, words)], catch_exceptions=False)


def test_the_command_exits_with_what_it_found_and_writes_reports(
    checkpoint: Callable[..., Path], changed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gate.yaml").write_text("text: [{data: demo:heldout, context: 32, windows: 10, max_flips: 0.001, max_kl: 0}]\n")
    base, out = checkpoint("llama"), ("--json", "r.json", "--junit", "r.xml", "--markdown", "r.md")
    assert invoke(base, "--save-baseline", "b.json").exit_code == 0
    same = invoke(base, "--against", "b.json", *out)
    assert same.exit_code == 0 and "passed" in same.output and json.loads(Path("r.json").read_text())["verdict"] == "passed"
    other = changed(noise=0.5)
    worse = invoke(other, "--against", base, *out)
    assert worse.exit_code == 3 and json.loads(Path("r.json").read_text())["verdict"] == "failed"  # reports are written over
    root = ElementTree.parse("r.xml").getroot()
    assert (root.tag, root.attrib["tests"], root.attrib["failures"], root.attrib["errors"]) == ("testsuites", "7", "2", "0")
    assert {suite.attrib["name"] for suite in root} == {"integrity", "text demo:heldout"}
    assert sum(len(case.findall("failure")) for suite in root for case in suite) == 2
    lines = Path("r.md").read_text().splitlines()
    assert lines[0].startswith("### ❌ gate failed: ") and next(line for line in lines if line.startswith("| ❌")).startswith(
        "| ❌ | text demo:heldout: kl"
    )
    assert "<details>" in Path("r.md").read_text()
    for words, what in (
        ((base,), "takes either --against or --save-baseline"),
        ((base, "--against", "nowhere"), "no such folder"),
        ((base, "--against", "nowhere.json"), "cannot be read"),
        ((base, "--against", "b.json", "--gate", "nowhere.yaml"), "give a gate file with --gate"),
        ((base, "--against", "b.json", "--json", "no/where.json"), "lies in no folder that exists"),
        ((base, "--save-baseline", "b.txt"), "a baseline is a .json file"),
        ((base, "--save-baseline", "c.json", "--json", "x.json"), "is for a verdict"),
    ):
        refused = invoke(*words)
        assert refused.exit_code == 2 and what in refused.output, refused.output
    assert not Path("c.json").exists() and not Path("x.json").exists()
    long = "a" * 250
    for words in ((base, "--against", "b.json", "--json", "x.json", "--markdown", long), (base, "--save-baseline", f"{long}.json")):
        refused = invoke(*words)  # names that leave no room for the file that is written first
        assert refused.exit_code == 2 and "cannot be written (File name too long)" in refused.output and not Path("x.json").exists()
    Path("gate.yaml").write_text("text: [{data: nowhere.txt, context: 32, max_flips: 1}]\n")
    refused = invoke("nowhere", "--against", "b.txt")
    assert all(what in refused.output for what in ("nowhere: no such folder", "b.txt: no such folder", "nowhere.txt is no file")), refused.output
    Path("gate.yaml").write_text("txt: []\n")
    refused = invoke("nowhere", "--save-baseline", "c.json", "--json", "no/x.json")
    assert all(what in refused.output for what in ("unknown key", "measures nothing", "is for a verdict", "lies in no folder")), refused.output


def test_names_cannot_break_a_report() -> None:
    line = decide.Check("text a|b <i>\x07", "kl", "failed", "x | y\n<b> @team", 0.1, 0.0, (0.0, 0.2), 0.01, 0.01, 0.1, method="m", count=3)
    result = {"verdict": "failed", "candidate": "a|b", "against": "<c>", "alpha": 0.05, "notes": [], "protocol_sha256": "0" * 64}
    result["checks"] = [report_ready(line)]
    rows = [row for row in report.markdown(result).splitlines() if row.startswith("| ❌")]
    assert [row.replace("\\|", "").count("|") for row in rows] == [7, 8] and "<b>" not in "".join(rows) and "@team" not in "".join(rows)
    case = ElementTree.fromstring(report.junit(result).encode())[0][0]
    assert case.attrib["classname"] == "gate.text a|b <i>?" and case[0].tag == "failure"


def test_what_is_too_long_is_cut_between_words() -> None:
    line = decide.Check("integrity", "weights", "failed", f"{'x' * 190} norm is 1.0501 times")
    result = {"verdict": "failed", "candidate": "a", "against": "b", "alpha": 0.05, "notes": ["no manifest"], "protocol_sha256": "0" * 64}
    result["checks"] = [report_ready(line)]
    row = next(row for row in report.markdown(result).splitlines() if row.startswith("| ❌"))
    assert "norm is ... (all of it in the JSON)" in row and report.markdown(result).index("no manifest") < report.markdown(result).index("<details>")


def report_ready(line: decide.Check) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(line)


def test_the_example_is_a_gate_file_whose_items_are_fine(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.gate import rules as files

    folder = Path(__file__).resolve().parents[1] / "examples" / "ci"
    monkeypatch.chdir(folder)
    chosen = files.load(folder / "gate.yaml")
    found = observe.given(chosen, run.Layout(run.Checkpoint(tokenizer.folder)), tokenizer, tiny.Silent())
    assert len(found["bias bias-made-up.jsonl"].extra["group"]) == 14


def test_every_key_is_explained() -> None:
    from compress.gate import rules as files

    told = (Path(__file__).resolve().parents[1] / "docs" / "gate.md").read_text()
    for kind in (files.Rules, files.Integrity, files.Text, files.Pairs, files.Task, files.Retrieval, files.Bias):
        assert not [key for key in kind.model_fields if key not in told]
