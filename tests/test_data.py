"""Samples: drawn the same way every time, nothing added, nothing padded, every mistake in the data named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from compress import data as module
from compress import demo
from compress.data import Sample, Samples, Tokenizer, calibration, sentence_pairs, windows
from compress.errors import InputError

WORDS = " ".join(f"The fox number {number} jumps over the lazy dog." for number in range(600))


@pytest.fixture(scope="session")
def chatty() -> Tokenizer:
    """A tokenizer with a chat template and a processor for images."""
    return Tokenizer(demo.path("vlm"))


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Put lines, or one text, into a file and return its path."""

    def put(name: str, content: str | list[object]) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            content if isinstance(content, str) else "\n".join(row if isinstance(row, str) else json.dumps(row) for row in content), encoding="utf-8"
        )
        return str(path)

    return put


def ids(samples: Samples) -> list[list[int]]:
    return [item.ids.tolist() for item in samples.items]


SOURCES: dict[str, str | list[object]] = {
    "a.txt": WORDS,
    "text.jsonl": [{"text": WORDS[start : start + 300]} for start in range(0, 9000, 300)],
    "tokens.jsonl": [{"input_ids": list(range(start, start + 12))} for start in range(30)],
    "chats.jsonl": [
        {"messages": [{"role": "user", "content": f"What is {number}?"}, {"role": "assistant", "content": "A number."}]} for number in range(30)
    ],
}


@pytest.mark.parametrize("name", SOURCES)
def test_the_same_seed_draws_the_same_samples(name: str, write: Callable[..., str], chatty: Tokenizer) -> None:
    path = write(name, SOURCES[name])
    assert ids(calibration(path, 6, 10, 3, chatty)) == ids(calibration(path, 6, 10, 3, chatty))


@pytest.mark.parametrize("name", SOURCES)
def test_another_seed_draws_others(name: str, write: Callable[..., str], chatty: Tokenizer) -> None:
    path = write(name, SOURCES[name])
    assert ids(calibration(path, 6, 10, 3, chatty)) != ids(calibration(path, 6, 10, 4, chatty))


@pytest.mark.parametrize("name", SOURCES)
def test_no_sample_is_longer_than_asked(name: str, write: Callable[..., str], chatty: Tokenizer) -> None:
    assert max(map(len, ids(calibration(write(name, SOURCES[name]), 6, 7, 0, chatty)))) == 7


def test_passages_of_a_text_are_passages_of_its_tokens(write: Callable[..., str], tokenizer: Tokenizer) -> None:
    text = tokenizer._tokenizer.decode(calibration(write("a.txt", WORDS), 1, 40, 0, tokenizer).items[0].ids)
    assert text in WORDS


def test_a_text_too_short_for_different_passages_is_refused(write: Callable[..., str], tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="holds only 1 samples, 8 are wanted"):
        calibration(write("short.txt", WORDS[:400]), 8, 60, 0, tokenizer)


def test_padding_is_stripped_from_token_lists(write: Callable[..., str], tokenizer: Tokenizer) -> None:
    path = write("x.jsonl", [{"input_ids": [9, 9, 5, 6, 7, 9], "attention_mask": [0, 0, 1, 1, 1, 0]}])
    assert ids(calibration(path, 1, 10, 0, tokenizer)) == [[5, 6, 7]]


def test_short_documents_are_joined_with_the_end_token_between(write: Callable[..., str], tokenizer: Tokenizer) -> None:
    path = write("x.jsonl", [{"text": "fox"}] * 30)
    fox = tokenizer.encode("fox")
    assert ids(calibration(path, 1, 2 * len(fox) + 2, 0, tokenizer)) == [[*fox, tokenizer.end] * 2]


def test_a_file_of_many_short_documents_is_read_as_far_as_needed(write: Callable[..., str], tokenizer: Tokenizer) -> None:
    path = write("x.jsonl", [{"text": "fox"}] * 500)
    assert len(calibration(path, 2, 100, 0, tokenizer).items) == 2


def test_a_chat_goes_through_the_template_of_the_model(write: Callable[..., str], chatty: Tokenizer) -> None:
    path = write("x.jsonl", [{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]}])
    assert chatty._tokenizer.decode(ids(calibration(path, 1, 50, 0, chatty))[0]).startswith("Question: Who?\nAnswer: Me.")


def test_line_separators_inside_a_json_string_do_not_end_the_line(write: Callable[..., str], tokenizer: Tokenizer) -> None:
    text = "one\u2028two\x85three\x0b four"
    path = write("x.jsonl", [json.dumps({"text": text * 20}, ensure_ascii=False).replace("\\u000b", " ")])
    assert len(calibration(path, 1, 10, 0, tokenizer).items) == 1


def test_a_local_data_set_folder_is_read_through_datasets(write: Callable[..., str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    write("set/train.jsonl", [{"text": WORDS[:400]}])
    write("set/test.jsonl", [{"text": "never this one"}])
    sample = calibration(str(tmp_path / "set"), 1, 20, 0, tokenizer)
    assert ids(sample) == [tokenizer.encode(WORDS[:400])[:20]]


def test_images_come_with_their_questions_and_only_answers_are_scored(chatty: Tokenizer) -> None:
    item = calibration("demo:images", 2, 512, 0, chatty).items[0]
    text = chatty._tokenizer.decode(item.ids[item.scored])
    assert "pixel_values" in item.extra and 0 < len(text.split()) < 5


@pytest.mark.parametrize("position", [0, 5, 19])
def test_the_digest_changes_with_any_token(position: int) -> None:
    tokens = torch.arange(20)
    changed = tokens.clone()
    changed[position] += 1
    assert Samples("x", (Sample.of(tokens.tolist()),)).digest != Samples("x", (Sample.of(changed.tolist()),)).digest


def test_the_digest_changes_with_where_a_sample_ends() -> None:
    assert Samples("x", (Sample.of([1, 2, 3]), Sample.of([4]))).digest != Samples("x", (Sample.of([1, 2]), Sample.of([3, 4]))).digest


def test_the_digest_changes_with_a_pixel() -> None:
    one, two = (Sample(torch.arange(3), torch.ones(3, dtype=torch.bool), {"pixel_values": torch.full((1, 3, 2, 2), value)}) for value in (0.0, 0.1))
    assert Samples("x", (one,)).digest != Samples("x", (two,)).digest


@pytest.mark.parametrize("per_batch", [1, 30, 64, 4096])
def test_batches_hold_every_sample_once_and_nothing_else(per_batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOKENS_PER_BATCH", per_batch)
    samples = Samples("x", tuple(Sample.of(list(range(length))) for length in (5, 9, 5, 5, 9, 40)))
    seen = {member: row.tolist() for batch in samples.batches() for member, row in zip(batch.members, batch.inputs["input_ids"], strict=True)}
    assert [seen[index] for index in range(6)] == ids(samples)


def test_windows_follow_each_other_without_overlap_or_gap(write: Callable[..., str], tokenizer: Tokenizer) -> None:
    found = ids(windows(write("a.txt", WORDS), 32, None, tokenizer, "evaluate: data"))
    tokens = tokenizer.encode(WORDS)
    assert [token for window in found for token in window] == tokens[: len(tokens) // 32 * 32]


@pytest.mark.parametrize("limit", [1, 3])
def test_a_limit_takes_the_first_windows(limit: int, write: Callable[..., str], tokenizer: Tokenizer) -> None:
    path = write("a.txt", WORDS)
    assert ids(windows(path, 32, limit, tokenizer, "x")) == ids(windows(path, 32, None, tokenizer, "x"))[:limit]


def test_pairs_stand_good_before_bad(write: Callable[..., str], tokenizer: Tokenizer) -> None:
    path = write("p.jsonl", [{"good": "the fox jumps", "bad": "the fox jump"}])
    assert ids(sentence_pairs(path, tokenizer)) == [tokenizer.encode("the fox jumps"), tokenizer.encode("the fox jump")]


CALIBRATION_FAULTS: dict[str, tuple[str, str | list[object], str]] = {
    "too few samples": ("x.jsonl", [{"input_ids": [1, 2]}], "holds only 1 samples, 4 are wanted; set samples: 1"),
    "nothing": ("x.txt", "", "holds only 0 samples"),
    "not JSON": ("x.jsonl", [{"text": "a"}, "{broken"], "line 2: is not JSON"),
    "not an object": ("x.jsonl", ["[1, 2]"], "line 1: must be an object, got list"),
    "no known column": ("x.jsonl", [{"content": "a"}], r"a row without input_ids, messages or text: \['content'\]"),
    "conversations without a template": ("x.jsonl", [{"messages": [{"role": "user", "content": "a"}]}], "has no chat template"),
    "mask of another length": ("x.jsonl", [{"input_ids": [1, 2, 3], "attention_mask": [1, 1]}], "attention_mask"),
    "mask that is no list": ("x.jsonl", [{"input_ids": [1, 2, 3], "attention_mask": 1}], "attention_mask"),
    "tokens that are no numbers": ("x.jsonl", [{"input_ids": ["a", "b"]}], "input_ids"),
    "image that is missing": (
        "set/data.jsonl",
        [{"image": "no.png", "question": "a", "answer": "b"}],
        r"names no\.png, which is not a file of the folder",
    ),
    "image outside the folder": ("set/data.jsonl", [{"image": "../x.png", "question": "a", "answer": "b"}], r"names \.\./x\.png, which is not"),
    "row without an answer": ("set/data.jsonl", [{"image": "a.png", "question": "a"}], "a row without 'answer'"),
    "image that is none": ("set/data.jsonl", [{"image": "data.jsonl", "question": "a", "answer": "b"}], r"data\.jsonl.*cannot be read as an image"),
}


@pytest.mark.parametrize("fault", CALIBRATION_FAULTS)
def test_a_mistake_in_calibration_data_is_named(fault: str, write: Callable[..., str], request: pytest.FixtureRequest, tmp_path: Path) -> None:
    name, content, message = CALIBRATION_FAULTS[fault]
    path = Path(write(name, content))
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    target = path.parent if path.name == "data.jsonl" else path
    with pytest.raises(InputError, match=message):
        calibration(str(target), 4, 16, 0, request.getfixturevalue("chatty" if path.name == "data.jsonl" else "tokenizer"))


def test_messages_the_template_cannot_take_are_named(write: Callable[..., str], chatty: Tokenizer) -> None:
    with pytest.raises(InputError, match="messages"):
        calibration(write("x.jsonl", [{"messages": ["hello"]}] * 4), 4, 16, 0, chatty)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/file.txt", "no such file, folder or hub id"),
        ("demo:nothing", "no demonstration data 'nothing'"),
        ("nobody/nothing", "cannot be loaded"),
    ],
)
def test_data_that_do_not_exist_are_named(name: str, message: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=message):
        calibration(name, 1, 16, 0, tokenizer)


def test_a_folder_that_is_no_data_set_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="cannot be loaded"):
        calibration(str(tmp_path / "empty"), 1, 16, 0, tokenizer)


def test_a_data_set_folder_with_a_broken_file_is_refused(write: Callable[..., str], tmp_path: Path, tokenizer: Tokenizer) -> None:
    write("set/train.jsonl", "{broken")
    with pytest.raises(InputError, match="cannot be loaded"):
        calibration(str(tmp_path / "set"), 1, 16, 0, tokenizer)


def test_images_are_refused_by_a_text_model(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"text model|no processor"):
        calibration("demo:images", 1, 64, 0, tokenizer)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InputError, match="cannot be read as text"):
        calibration(str(tmp_path / "x.txt"), 1, 16, 0, tokenizer)


def test_a_text_shorter_than_a_window_is_refused(write: Callable[..., str], tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"has \d+ tokens, less than one window of 512"):
        windows(write("a.txt", "A fox."), 512, None, tokenizer, "evaluate: data")


def test_windows_of_a_missing_file_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"^evaluate: data: no\.txt: no such file"):
        windows("no.txt", 512, None, tokenizer, "evaluate: data")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"good": "a"}], "a line without good and bad"),
        ([{"good": "", "bad": "b"}], "good"),
        ([], "no pairs"),
        ([{"good": 1, "bad": 2}], "a line without good and bad"),
    ],
)
def test_a_mistake_in_pairs_is_named(rows: list[object], message: str, write: Callable[..., str], tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=message):
        sentence_pairs(write("p.jsonl", rows), tokenizer)


def test_pairs_of_a_missing_file_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"^evaluate: pairs: no\.jsonl: no such file"):
        sentence_pairs("no.jsonl", tokenizer)


@pytest.mark.parametrize("text", ["{}", "[]", "3", '{"added_tokens": [], "model": {}}', "{"])
def test_a_damaged_tokenizer_is_refused(text: str, tmp_path: Path) -> None:
    shutil.copytree(demo.path("dense"), tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(text)
    with pytest.raises(InputError, match="has no usable tokenizer"):
        Tokenizer(tmp_path / "model")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="has no usable tokenizer"):
        Tokenizer(tmp_path)
