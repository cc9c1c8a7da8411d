"""lm-eval tasks, from a file and without a network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from PIL import Image
from test_vision import run
from transformers import AutoProcessor, AutoTokenizer

from compress import demo
from compress.checkpoint import Checkpoint
from compress.errors import InputError
from compress.evaluate import tasks
from compress.layout import Layout

ROWS = [{"good": "the cat sleeps", "bad": "the cat sleep"}, {"good": "he runs", "bad": "runs he the"}, {"good": "a b", "bad": "a long walk home"}]
BEFORE = "Once"


def layout_of(folder: Path) -> Layout:
    return Layout(Checkpoint(folder))


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
    assert tasks.run(folder, (str(task_file(tmp_path)),), layout_of(folder)) == {"which_is_better": {"acc": pytest.approx(expected)}}


def test_a_task_file_that_is_missing_is_an_error(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="no such file"):
        tasks.run(checkpoint("llama"), ("nowhere.yaml",), layout_of(checkpoint("llama")))


def test_a_task_file_named_otherwise_than_its_task_is_an_error(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = task_file(tmp_path).rename(tmp_path / "other.yaml")
    with pytest.raises(InputError, match="knows no task 'other'"):
        tasks.run(checkpoint("llama"), (str(path),), layout_of(checkpoint("llama")))


def test_data_that_cannot_be_read_are_told_of_and_not_traced(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = task_file(tmp_path)
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(InputError, match=r"evaluate: tasks: lm-eval cannot read the data of which_is_better \(FileNotFoundError"):
        tasks.run(checkpoint("llama"), (str(path),), layout_of(checkpoint("llama")))


def test_data_of_the_hub_that_cannot_be_reached_are_told_of(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = task_file(tmp_path)
    plain = yaml.safe_load(path.read_text()) | {"dataset_path": "nobody/no-such-data"}
    del plain["dataset_kwargs"]
    path.write_text(yaml.safe_dump(plain))
    with pytest.raises(InputError, match=r"evaluate: tasks: lm-eval cannot read the data of which_is_better"):
        tasks.run(checkpoint("llama"), (str(path),), layout_of(checkpoint("llama")))


# Images -----------------------------------------------------------------------------------------------------------------------------

ABOUT_IMAGES = """task: about_images
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: generate_until
doc_to_image: !function utils.pictures
doc_to_text: "<image>{{question}}"
doc_to_target: answer
generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false, temperature: 0.0}
filter_list: [{name: stripped, filter: [{function: remove_whitespace}, {function: take_first}]}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
PICTURES = """from PIL import Image

def pictures(doc):
    return [Image.open(doc["image"]).convert("RGB")]
"""


def images_task(folder: Path, count: int = 8, **changes: str) -> tuple[Path, list[dict[str, str]]]:
    """A task file with questions about images, every other one with an answer that is wrong."""
    source = demo.data_path("images")
    rows = [json.loads(line) for line in (source / "data.jsonl").read_text().split("\n")[:count]]
    rows = [row | {"image": str(source / row["image"])} for row in rows]
    for row in rows[::2]:
        row["answer"] = "no such thing"
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "utils.py").write_text(PICTURES)
    text = ABOUT_IMAGES.replace("ROWS", str(folder / "questions.jsonl"))
    for key, value in changes.items():
        text = "".join(line for line in text.splitlines(keepends=True) if not line.startswith(f"{key}:")) + f"{key}: {value}\n"
    path = folder / "about_images.yaml"
    path.write_text(text)
    return path, rows


def written(folder: Path, row: dict[str, str]) -> str:
    """What plain transformers answers, greedily."""
    processor, model = AutoProcessor.from_pretrained(folder), tiny.plain(folder)
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}]
    prompt = processor.apply_chat_template(talk, add_generation_prompt=True)
    given = processor(images=[Image.open(row["image"]).convert("RGB")], text=prompt, return_tensors="pt")
    answer = model.generate(**given, max_new_tokens=12, do_sample=False)[0, given["input_ids"].shape[1] :]
    return str(processor.tokenizer.decode(answer, skip_special_tokens=True)).partition("\n")[0].strip()


def test_questions_about_images_are_asked_with_the_images(tmp_path: Path) -> None:
    path, rows = images_task(tmp_path)
    folder = demo.path("vlm")
    right = [written(folder, row) == row["answer"] for row in rows]
    assert not any(right[::2]) and sum(right) >= 3
    assert tasks.run(folder, (str(path),), layout_of(folder)) == {"about_images": {"exact_match": sum(right) / len(rows)}}


def test_text_and_images_are_asked_of_one_model(tmp_path: Path) -> None:
    path, _ = images_task(tmp_path, count=2)
    folder = demo.path("vlm")
    found = tasks.run(folder, (str(path), str(task_file(tmp_path))), layout_of(folder))
    assert found.keys() == {"about_images", "which_is_better"}
    assert found["which_is_better"] == tasks.run(folder, (str(task_file(tmp_path)),), layout_of(folder))["which_is_better"]


def test_what_lm_eval_cannot_ask_about_images_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path, _ = images_task(tmp_path)
    with pytest.raises(InputError, match="about_images shows images, but a llama reads text only"):
        tasks.find((str(path),), layout_of(checkpoint("llama")))
    path, _ = images_task(tmp_path, output_type="multiple_choice", doc_to_choice='["one", "two"]', doc_to_target="0")
    with pytest.raises(InputError, match="is a task of multiple_choice about images, and lm-eval has answers about images written alone"):
        tasks.find((str(path),), layout_of(demo.path("vlm")))
    path, _ = images_task(tmp_path, doc_to_audio="!function utils.pictures")
    with pytest.raises(InputError, match="about_images plays sounds"):
        tasks.find((str(path),), layout_of(demo.path("vlm")))


def test_a_model_that_sees_but_has_no_processor_is_named(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path, _ = images_task(tmp_path)
    with pytest.raises(InputError, match="has no usable processor for images"):
        tasks.run(checkpoint("llava"), (str(path),), layout_of(checkpoint("llava")))


def test_a_run_measures_questions_about_images_before_and_after(tmp_path: Path) -> None:
    path, _ = images_task(tmp_path, count=4)
    steps = [{"rtn": {"bits": 8, "group_size": 128}}]
    result = run(steps, "demo:vlm", tmp_path / "out", evaluate={"data": "demo:heldout", "windows": 1, "context": 64, "tasks": [str(path)]})
    evaluation = result["evaluation"]
    assert evaluation["baseline"]["tasks"] == evaluation["compressed"]["tasks"] == {"about_images": {"exact_match": 0.5}}
