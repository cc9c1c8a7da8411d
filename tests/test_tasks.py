"""lm-eval tasks, from a file and without a network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from transformers import AutoTokenizer

from compress.errors import InputError
from compress.evaluate import tasks

ROWS = [{"good": "the cat sleeps", "bad": "the cat sleep"}, {"good": "he runs", "bad": "runs he the"}, {"good": "a b", "bad": "a long walk home"}]
BEFORE = "Once"


def task_file(folder: Path) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    task = {
        "task": "which_is_better",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": BEFORE,
        "doc_to_choice": "{{[good, bad]}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    }
    path = folder / "which_is_better.yaml"
    path.write_text(yaml.safe_dump(task))
    return path


def test_a_task_file_is_scored_as_by_summing_log_probabilities(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("llama")
    model, tokenizer = tiny.plain(folder), AutoTokenizer.from_pretrained(folder)

    def score(text: str) -> float:
        before, whole = (tokenizer(part, add_special_tokens=False).input_ids for part in (BEFORE, f"{BEFORE} {text}"))
        with torch.no_grad():
            odds = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
        return sum(float(odds[place - 1, whole[place]]) for place in range(len(before), len(whole)))

    expected = sum(score(row["good"]) > score(row["bad"]) for row in ROWS) / len(ROWS)
    assert tasks.run(folder, (str(task_file(tmp_path)),)) == {"which_is_better": {"acc": pytest.approx(expected)}}


def test_a_task_file_that_is_missing_is_an_error(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="no such file"):
        tasks.run(checkpoint("llama"), ("nowhere.yaml",))


def test_a_task_file_named_otherwise_than_its_task_is_an_error(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = task_file(tmp_path).rename(tmp_path / "other.yaml")
    with pytest.raises(InputError, match="knows no task 'other'"):
        tasks.run(checkpoint("llama"), (str(path),))


def test_data_that_cannot_be_read_are_told_of_and_not_traced(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = task_file(tmp_path)
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(InputError, match=r"evaluate: tasks: lm-eval cannot read the data of which_is_better \(FileNotFoundError"):
        tasks.run(checkpoint("llama"), (str(path),))


def test_data_of_the_hub_that_cannot_be_reached_are_told_of(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = task_file(tmp_path)
    plain = yaml.safe_load(path.read_text()) | {"dataset_path": "nobody/no-such-data"}
    del plain["dataset_kwargs"]
    path.write_text(yaml.safe_dump(plain))
    with pytest.raises(InputError, match=r"evaluate: tasks: lm-eval cannot read the data of which_is_better"):
        tasks.run(checkpoint("llama"), (str(path),))
