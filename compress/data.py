"""Text, chats and images, as batches of token ids.

A batch holds only sequences of one length, so there is no padding anywhere: nothing that is not a token can enter a statistic.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from PIL.Image import Image
from torch import Tensor

from compress import questions
from compress.checkpoint import transformers_config
from compress.errors import InputError
from compress.images import KINDS, Encoded, Processor, kinds, opened
from compress.source import HUB_ID, locate_data

TOKENS_PER_BATCH = 2048
RUN = 32
"""Tokens in a row that two samples do not share by chance."""
CHARACTERS_PER_TOKEN = 8
"""A slice of text this many times longer than the tokens wanted from it is long enough in all but pathological cases."""


UNREADABLE = (OSError, ValueError, TypeError, LookupError, AttributeError)
"""What transformers raises over a damaged tokenizer."""


@dataclass(frozen=True)
class Sample:
    """One sequence: ``ids`` int64 [tokens]; ``scored`` bool [tokens], the tokens whose prediction counts; ``extra`` are tensors of images.

    ``vision`` bool [tokens] are those that stand for images; None for text, and for images whose processor does not say.
    """

    ids: Tensor
    scored: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)
    vision: Tensor | None = None

    @classmethod
    def of(cls, ids: list[int]) -> Sample:
        return cls(torch.tensor(ids), torch.ones(len(ids), dtype=torch.bool))


@dataclass(frozen=True)
class Batch:
    """Samples of equal length: what the model is called with, and which samples these are.

    ``scored`` and ``vision`` bool [rows, tokens] as in `Sample`, no token where it has None.
    """

    inputs: dict[str, Tensor]
    scored: Tensor
    members: tuple[int, ...]
    vision: Tensor


@dataclass(frozen=True)
class Samples:
    """A data set, drawn and tokenised. ``source`` says from where, for the protocol."""

    source: str
    items: tuple[Sample, ...]

    @property
    def tokens(self) -> int:
        return sum(len(item.ids) for item in self.items)

    @property
    def vision_tokens(self) -> int | None:
        """How many tokens stand for images; None where no one says of some."""
        if any(item.extra and item.vision is None for item in self.items):
            return None
        return sum(int(item.vision.sum()) for item in self.items if item.vision is not None)

    @property
    def digest(self) -> str:
        """sha256 over the tokens and pixels, in order."""
        digest = hashlib.sha256()
        for item in self.items:
            for tensor in (item.ids, item.scored, *(item.extra[name] for name in sorted(item.extra))):
                digest.update(str(tuple(tensor.shape)).encode())
                digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def batches(self) -> Iterator[Batch]:
        """Samples of one shape together, at most `TOKENS_PER_BATCH` tokens at once, longest first."""
        by_shape: dict[tuple[Any, ...], list[int]] = {}
        for index, item in enumerate(self.items):
            key = (-len(item.ids), *((name, tuple(tensor.shape)) for name, tensor in sorted(item.extra.items())))
            by_shape.setdefault(key, []).append(index)
        for _, indices in sorted(by_shape.items()):
            rows = max(1, TOKENS_PER_BATCH // len(self.items[indices[0]].ids))
            for start in range(0, len(indices), rows):
                members = indices[start : start + rows]
                chosen = [self.items[index] for index in members]
                inputs = {"input_ids": torch.stack([item.ids for item in chosen])}
                inputs |= {name: torch.cat([item.extra[name] for item in chosen]) for name in chosen[0].extra}
                vision = torch.stack([torch.zeros_like(item.scored) if item.vision is None else item.vision for item in chosen])
                yield Batch(inputs, torch.stack([item.scored for item in chosen]), tuple(members), vision)


class Tokenizer:
    """The tokenizer (and processor, for images) that lies beside a model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        from transformers import AutoTokenizer

        try:
            config = transformers_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            # The tokenizers library raises bare `Exception` for a file it cannot read; a kind that is in neither set is a bug.
            if type(error) is not Exception and not isinstance(error, UNREADABLE):
                raise
            reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
            raise InputError.one(str(folder), f"has no usable tokenizer ({reason})", "tokenizer files must lie beside the weights") from error
        self._tokenizer.model_max_length = int(1e30)  # documents are cut here, not by a warning

    @property
    def plain(self) -> Any:
        """The tokenizer of transformers."""
        return self._tokenizer

    @property
    def end(self) -> int | None:
        return cast("int | None", self._tokenizer.eos_token_id)

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens added."""
        return cast(list[int], self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation through the model's chat template."""
        if not self._tokenizer.chat_template:
            raise InputError.one(str(self.folder), "has no chat template, but the data are conversations", "give data with a `text` field")
        from jinja2 import TemplateError

        try:
            encoded = self._tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:  # what a template raises over its messages
            raise InputError.one(str(self.folder), f"its chat template cannot take the messages {messages!r:.200} ({error})") from error
        return cast(list[int], encoded["input_ids"])

    @cached_property
    def processor(self) -> Processor:
        """The processor for images. Raises `InputError` if the model has none."""
        return Processor(self.folder)

    def question(self, image: Image, question: str, answer: str) -> Sample:
        """An image with a question, the answer's tokens scored."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = self.processor.prompt([{"role": "user", "content": content}], asks=True)
        encoded = self.processor.encode(prompt, [image])
        tail = torch.tensor(self.encode(" " + answer.strip()) + ([self.end] if self.end is not None else []))
        return _with_images(encoded, torch.cat([encoded.ids, tail]), [(len(encoded.ids), len(encoded.ids) + len(tail))])

    def conversation(self, messages: list[dict[str, Any]], images: list[Image]) -> Sample:
        """A conversation about images, what the assistant says scored. Every image must come before the first answer."""
        answers = [place for place, message in enumerate(messages) if message.get("role") == "assistant"]
        text = self.processor.prompt(messages, asks=False)
        encoded = self.processor.encode(text, images)
        spans = []
        for place in answers:
            # What is behind an image has as many tokens whether or not the image is there.
            before, after = (self.processor.prompt(messages[:end], asks=end == place) for end in (place, place + 1))
            if not (text.startswith(after) and after.startswith(before)):
                raise InputError.one(str(self.folder), "its chat template writes a message differently when others follow", "give single answers")
            start, end = (len(encoded.ids) - len(self.encode(text[len(each) :])) for each in (before, after))
            spans.append((start, end))
        if encoded.vision is not None and bool(encoded.vision[spans[0][0] :].any()):
            raise InputError.one(str(self.folder), f"an image behind an answer in {messages!r:.200}", "give all images before the first answer")
        return _with_images(encoded, encoded.ids, spans)


def _with_images(encoded: Encoded, ids: Tensor, answers: list[tuple[int, int]]) -> Sample:
    """A sample of ``ids``, which begin with those of `encoded`, with the answers from and to these places scored."""
    scored = torch.zeros(len(ids), dtype=torch.bool)
    for start, end in answers:
        scored[start:end] = True
    vision = None if encoded.vision is None else torch.cat([encoded.vision, torch.zeros(len(ids) - len(encoded.ids), dtype=torch.bool)])
    extra = encoded.extra | ({KINDS: kinds(vision)} if encoded.told and vision is not None else {})
    return Sample(ids, scored, extra, vision)


def calibration(data: str, samples: int, length: int, seed: int, tokenizer: Tokenizer) -> Samples:
    """Draw `samples` sequences of at most `length` tokens from `data`, deterministically by `seed`.

    `data` is ``demo:text`` or another ``demo:`` name, a ``.txt`` file (random passages), a ``.jsonl`` file (one document a line with
    ``text``, ``messages`` or ``input_ids``), a folder of images with a ``data.jsonl`` (``image``, ``question``, ``answer``, or ``images`` and
    ``messages``), a folder or
    hub id of a data set (the same columns of its ``train`` split, images in the rows themselves). Documents are taken in random order from the first
    ``16 * samples``, and what lies behind them is read only if they do not suffice.
    """
    place = f"calibration: data: {data}"
    rng = random.Random(seed)
    path = locate_data(data)
    if path.suffix == ".txt" and path.is_file():
        items = _passages(_read(path, place), samples, length, rng, tokenizer, place)
    elif path.suffix == ".jsonl" and path.is_file():
        items = _documents(json_lines(path, place), samples, length, rng, tokenizer, place)
    elif path.is_dir() and (path / "data.jsonl").exists():
        rows = questions.rows(path, place)
        rng.shuffle(rows)
        items = [_seen(row, path, tokenizer, place) for row in rows[:samples]]
    elif what := questions.without_questions(path):
        raise InputError.one(place, what, f"write a {questions.FILE} beside them: {questions.NEEDED}")
    elif path.is_dir() or HUB_ID.fullmatch(data.partition("#")[0]):
        items = _documents(_hub(data, place), samples, length, rng, tokenizer, place)
    else:
        what = "is neither a .txt nor a .jsonl file" if path.is_file() else "no such file, folder or hub id"
        raise InputError.one(place, what, "give a .txt or .jsonl file, a folder, a hub id or demo:text")
    if len(items) < samples:
        remedy = f"set samples: {len(items)} or give more data" if items else "give more data"
        raise InputError.one(place, f"holds only {len(items)} samples, {samples} are wanted", remedy)
    return Samples(data, tuple(items))


def windows(data: str, context: int, limit: int | None, tokenizer: Tokenizer, place: str) -> Samples:
    """Text cut into consecutive windows of `context` tokens, no overlap, nothing added, the rest of the last one left out.

    A folder of images gives its questions instead, with only the answers scored.
    """
    path = locate_data(data)
    if path.is_dir() and (path / "data.jsonl").exists():
        rows = questions.rows(path, f"{place}: {data}")[:limit]
        return Samples(data, tuple(_seen(row, path, tokenizer, place) for row in rows))
    if path.is_dir():
        raise InputError.one(f"{place}: {data}", f"is a folder without {questions.FILE}", f"give a .txt file, or write one: {questions.NEEDED}")
    if not path.is_file():
        raise InputError.one(f"{place}: {data}", "no such file", "give a .txt file, a folder of images with data.jsonl, or demo:heldout")
    text = _read(path, f"{place}: {data}")
    if limit is not None:
        text = text[: limit * context * CHARACTERS_PER_TOKEN]
    ids = tokenizer.encode(text)
    count = len(ids) // context
    if not count:
        raise InputError.one(f"{place}: {data}", f"has {len(ids)} tokens, less than one window of {context}", "give more text or a smaller context")
    starts = range(0, count * context, context)
    return Samples(data, tuple(Sample.of(ids[start : start + context]) for start in starts)[:limit])


def sentence_pairs(data: str, tokenizer: Tokenizer, place: str = "evaluate: pairs") -> Samples:
    """Minimal pairs, the good sentence before the bad one, from a ``.jsonl`` of ``good`` and ``bad``.

    Their order is one by chance, always the same, so that a part of them has of everything that a file may be sorted by.
    """
    place = f"{place}: {data}"
    path = locate_data(data)
    if not path.is_file():
        raise InputError.one(place, "no such file", "give a .jsonl file of good and bad sentences, or demo:pairs")
    items: list[tuple[Sample, Sample]] = []
    for row in json_lines(path, place):
        if not isinstance(row.get("good"), str) or not isinstance(row.get("bad"), str):
            raise InputError.one(place, f"a line without good and bad sentences: {row}")
        if not row["good"].strip() or not row["bad"].strip():
            raise InputError.one(place, f"a line with an empty good or bad sentence: {row}")
        items.append((Sample.of(tokenizer.encode(row["good"])), Sample.of(tokenizer.encode(row["bad"]))))
    if not items:
        raise InputError.one(place, "holds no pairs", "each line is an object with good and bad")
    random.Random(0).shuffle(items)
    return Samples(data, tuple(sentence for pair in items for sentence in pair))


def divided(samples: Samples, share: float, place: str) -> tuple[Samples, Samples]:
    """What is trained on, and the first ``share``, which is judged by.

    From one text, samples are passages that may overlap. Of the rest, those that have `RUN` tokens in a row in common with what is held out
    (or all they have, if that is less) are left out of both.
    """
    held = max(1, round(share * len(samples.items)))
    known = {run for item in samples.items[:held] for run in _runs(item)}
    apart = tuple(item for item in samples.items[held:] if known.isdisjoint(_runs(item)))
    if not apart:
        raise InputError.one(
            place, f"the {len(samples.items)} samples leave none to train on that is not in part held out", "give more text, or a smaller held_out"
        )
    return Samples(samples.source, apart), Samples(samples.source, samples.items[:held])


def _runs(item: Sample) -> Iterator[bytes]:
    """Every `RUN` tokens in a row."""
    tokens = item.ids.numpy()
    return (tokens[start : start + RUN].tobytes() for start in range(max(1, len(tokens) - RUN + 1)))


def _read(path: Path, place: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError.one(place, f"cannot be read as text ({error})") from error


def json_lines(path: Path, place: str) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines. Raises `InputError` for a line that holds none."""
    for number, line in enumerate(_read(path, place).split("\n"), 1):  # splitlines would also split inside a string
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError.one(f"{place}: line {number}", f"is not JSON ({error})") from error
            if not isinstance(row, dict):
                raise InputError.one(f"{place}: line {number}", f"must be an object, got {type(row).__name__}")
            yield row


def _hub(data: str, place: str) -> Iterator[dict[str, Any]]:
    """Rows of a data set: ``id``, or ``id#config`` for one with several configurations."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    name, _, config = data.partition("#")
    try:
        yield from load_dataset(name, config or None, split="train", streaming=True)
    except (OSError, ValueError, DatasetNotFoundError) as error:
        raise InputError.one(place, f"cannot be loaded ({str(error).splitlines()[0]})", "check the name and the network") from error


def _passages(text: str, samples: int, length: int, rng: random.Random, tokenizer: Tokenizer, place: str) -> list[Sample]:
    """Windows of exactly `length` tokens that start at random places."""
    span = length * CHARACTERS_PER_TOKEN
    items: list[Sample] = []
    if len(text) <= span:  # one slice holds it all: there is one passage to be had, not `samples` copies of it
        samples = min(samples, 1)
    for _ in range(4 * samples):
        if len(items) == samples:
            break
        start = rng.randrange(max(1, len(text) - span))
        # A token cut in two at the start is not one the model would see.
        ids = tokenizer.encode(text[start : start + span])[1 : length + 1]
        if len(ids) == length:
            items.append(Sample.of(ids))
    return items


def _documents(rows: Iterable[dict[str, Any]], samples: int, length: int, rng: random.Random, tokenizer: Tokenizer, place: str) -> list[Sample]:
    """Conversations and token lists one by one; plain documents joined and cut into windows of `length` tokens."""
    items: list[Sample] = []
    running: list[int] = []
    pool = _shuffled(rows, rng, 16 * samples)
    for row in pool:
        if len(items) == samples:
            break
        if isinstance(row.get("input_ids"), list):
            items.append(Sample.of(_tokens(row, place)[:length]))
        elif any(isinstance(row.get(key), list | Image) and row[key] for key in questions.COLUMNS):
            items.append(_seen(row, None, tokenizer, place))
        elif isinstance(row.get("messages"), list):
            items.append(Sample.of(tokenizer.chat(row["messages"])[:length]))
        elif isinstance(row.get("text"), str):
            running += tokenizer.encode(row["text"]) + ([tokenizer.end] if tokenizer.end is not None else [])
            while len(running) >= length and len(items) < samples:
                items.append(Sample.of(running[:length]))
                running = running[length:]
        else:
            raise InputError.one(place, f"a row without input_ids, messages or text: {sorted(row)}", "rename the column that holds the text")
    return [item for item in items if len(item.ids)]


def _tokens(row: dict[str, Any], place: str) -> list[int]:
    """The tokens of a tokenised row that are not padding."""
    tokens, mask = row["input_ids"], row.get("attention_mask")
    if not all(type(token) is int for token in tokens):
        raise InputError.one(place, f"a row whose input_ids are not all whole numbers: {tokens!r:.100}")
    if mask is None:
        return list(tokens)
    if not isinstance(mask, list) or len(mask) != len(tokens):
        raise InputError.one(place, f"a row whose attention_mask does not fit its {len(tokens)} input_ids: {mask!r:.100}")
    return [token for token, real in zip(tokens, mask, strict=True) if real]


def _shuffled(rows: Iterable[dict[str, Any]], rng: random.Random, limit: int) -> Iterator[dict[str, Any]]:
    """The first `limit` rows in random order, for a stream may be endless and a file sorted; then, if they do not suffice, the rest."""
    stream = iter(rows)
    pool = list(itertools.islice(stream, limit))
    rng.shuffle(pool)
    yield from pool
    yield from stream


def _seen(row: dict[str, Any], folder: Path | None, tokenizer: Tokenizer, place: str) -> Sample:
    """A row with images, which are files of `folder`, whose rows were checked, or, without one, there already: ``question`` and ``answer``, or
    ``messages``."""
    if folder is None and (what := questions.fault(row) or questions.image_fault(row)):
        raise InputError.one(place, what, questions.NEEDED)
    images = [_image(each, folder, place) for each in questions.images(row)]
    if isinstance(row.get("messages"), list):
        return tokenizer.conversation(row["messages"], images)
    return tokenizer.question(images[0], row["question"], row["answer"])


def _image(given: object, folder: Path | None, place: str) -> Image:
    if folder is None:
        if not isinstance(given, Image):
            raise InputError.one(place, f"an image that is none: {given!r:.100}", "give the column the type Image")
        return given.convert("RGB")
    return opened(folder / str(given))
