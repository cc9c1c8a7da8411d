"""Retrieval as a part of an evaluation: before and after, from the recipe to the page, on a model that can find what it was told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import recall
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_report import Page

from compress import demo, pipeline, recipe, report, runtime
from compress.checkpoint import Checkpoint
from compress.errors import InputError
from compress.evaluate import retrieval
from compress.evaluate.retrieval import BOS, KEYS, RECALL, SEP, VALUES, Wish
from compress.layout import Layout

SHRUNK: dict[str, Any] = {"kv_shrink": {"keep": 0.15, "window": 8}}


def asking(**options: Any) -> dict[str, Any]:
    return {
        "passes": [SHRUNK],
        "calibration": {"samples": 4, "length": 64},
        "evaluate": {"context": 32, "windows": 2, "retrieval": {"task": "recall", "lengths": [129, 33], "depths": [0.5, 0], "cases": 4} | options},
        "gates": {"retrieval_drop": {"max": 0.9}},
    }


def problems_of(plain: dict[str, Any], folder: Path) -> list[str]:
    try:
        recipe.check(recipe.validate(plain, "r"), Layout(Checkpoint(folder)), "r")
    except InputError as error:
        return [str(problem) for problem in error.problems]
    return []


@given(st.integers(5, 259), st.floats(0, 1), st.integers(0, 9), st.integers(0, 2))
def test_a_sequence_asks_for_a_pair_it_told(length: int, depth: float, case: int, seed: int) -> None:
    prompt = retrieval.prompt(RECALL, range(272), length, depth, case, seed)
    ids = prompt.ids.tolist()
    assert len(ids) == 2 * prompt.units + 3 in (length, length - 1)
    told = dict(zip(ids[1:-2:2], ids[2:-2:2], strict=True))
    assert ids[0] == BOS and ids[-2] == SEP and len(told) == prompt.units
    assert {*told} <= {*KEYS} and {*told.values()} <= {*VALUES}
    assert told[ids[-1]] == prompt.answer and [*told].index(ids[-1]) == prompt.before == round(depth * (prompt.units - 1))
    assert torch.equal(prompt.ids, retrieval.prompt(RECALL, range(272), length, depth, case, seed).ids)


@pytest.mark.parametrize(("length", "tokens", "told"), [(4, 272, "lengths: must be from 5"), (260, 272, "to 259"), (5, 271, "tokenizer: has 271")])
def test_what_recall_cannot_ask_is_refused(length: int, tokens: int, told: str) -> None:
    with pytest.raises(InputError, match=told):
        retrieval.prompt(RECALL, range(tokens), length, 0.0)


def test_the_last_token_alone_is_answered_as_in_one_piece() -> None:
    model = recall.trained()
    for case in range(6):
        prompt = retrieval.prompt(RECALL, range(272), 65, case / 5, case)
        whole = int(model(prompt.ids[None]).logits[0, -1].argmax())
        assert retrieval.recalled(model, prompt.ids) == whole == prompt.answer


def answers(right: list[list[bool]]) -> dict[str, Any]:
    cells = [
        {
            "length": 8,
            "depth": float(depth),
            "correct": sum(each),
            "cases": len(each),
            "accuracy": sum(each) / len(each),
            "answers": [{"correct": one, "said": "x"} for one in each],
        }
        for depth, each in enumerate(right)
    ]
    return {"task": "lines", "cells": cells}


def test_what_was_lost_is_counted_over_all_cells() -> None:
    told, drop, (low, high) = retrieval.compared(answers([[True, True], [True, False]]), answers([[True, False], [False, False]]))
    assert (told["baseline"]["accuracy"], told["compressed"]["accuracy"], drop) == (0.75, 0.25, 0.5)
    assert 0 <= low <= drop <= high <= 1 and low < high
    assert "answers" not in json.dumps(told) and [cell["correct"] for cell in told["compressed"]["cells"]] == [1, 0]
    same = answers([[True, False]])
    assert retrieval.compared(same, same)[1:] == (0.0, (0.0, 0.0))


def test_a_run_measures_it_before_and_after_and_judges_it(retriever: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("k1 v1 k2 v2 " * 200)
    plain = asking()
    plain["evaluate"]["data"] = plain["calibration"]["data"] = str(tmp_path / "text.txt")
    chosen = recipe.validate(plain, "r")
    request = pipeline.Request(chosen, "r", str(retriever), tmp_path / "out", tmp_path / "work", False, "compress run r.yaml recall")
    result = pipeline.run(request, tiny.Silent())
    found = result["evaluation"]["retrieval"]
    assert [(cell["length"], cell["depth"]) for cell in found["baseline"]["cells"]] == [(33, 0.0), (33, 0.5), (129, 0.0), (129, 0.5)]
    assert found["baseline"]["accuracy"] == 1 and found["compressed"]["accuracy"] < 1
    (gate,) = result["gates"]
    assert gate["name"] == "retrieval_drop" and gate["value"] == 1 - found["compressed"]["accuracy"] and gate["interval"][0] > 0
    wanted = Wish(RECALL, (33, 129), (0.0, 0.5), 4)
    made = retrieval.prompts(wanted, recall.tokenizer(), tiny.Silent())
    again = retrieval.measure(runtime.load(tmp_path / "out"), recall.tokenizer(), wanted, made, tiny.Silent())
    assert [cell["correct"] for cell in again["cells"]] == [cell["correct"] for cell in found["compressed"]["cells"]]
    html = (tmp_path / "out" / "report.html").read_text()
    page = Page(html)
    assert page.titles[-2:] == ["The source", "The artifact"] and ("h2", "id", "retrieval") in page.attributes
    assert "16 of 16 right, 100.0 %." in page.text and "retrieval lost" in page.text and "compress run r.yaml recall" in page.text
    assert html.count('class="heat"') == 8
    assert result["schema"] == report.SCHEMA and result["source"]["sha256"]


def test_prompts_that_cannot_be_are_told_before_any_pass(tmp_path: Path) -> None:
    plain = asking(task="lines", lengths=[20])
    request = pipeline.Request(recipe.validate(plain, "r"), "r", "demo:dense", tmp_path / "out", tmp_path / "work", False)
    with pytest.raises(InputError, match=r"evaluate.retrieval: lengths: 20 tokens are too short for lines"):
        pipeline.run(request, tiny.Silent())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"task": "lines", "lengths": [1949]}, "r: evaluate.retrieval.lengths: 1949 and 100 new tokens exceed the model's 2048; choose at most 1948"),
        ({"task": "haystack"}, "r: evaluate.retrieval.task: input should be 'lines', 'passkey' or 'recall', got 'haystack'"),
        ({"lengths": []}, "r: evaluate.retrieval.lengths: list should have at least 1 item after validation, not 0, got []"),
        ({"depths": [1.5]}, "r: evaluate.retrieval.depths.0: input should be less than or equal to 1, got 1.5"),
        ({"lengths": [260]}, "r: evaluate.retrieval: lengths of recall must be from 5 to 259, for 1 to 128 pairs"),
        ({"cases": 0}, "r: evaluate.retrieval.cases: input should be greater than or equal to 1, got 0"),
    ],
)
def test_mistakes_are_told_with_their_place(options: dict[str, Any], told: str) -> None:
    found = problems_of(asking(**options), demo.path("dense"))
    assert any(problem.startswith(told) for problem in found), found


def test_the_gate_needs_its_measurement() -> None:
    for evaluate in ({}, {"retrieval": None}):
        told = problems_of(asking() | {"evaluate": evaluate}, demo.path("dense"))
        assert told == ["r: gates.retrieval_drop: needs evaluate.retrieval, which is not set; set it, such as to {}, or drop the gate"]
    told = problems_of(asking() | {"evaluate": None}, demo.path("dense"))
    assert told == ["r: gates.retrieval_drop: needs an evaluation, but evaluate is null; give evaluate some data or drop the gate"]
