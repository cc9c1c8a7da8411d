"""Text, scenes and questions for the demonstration models, and the files that ship with them."""

from __future__ import annotations

import json
import lzma
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import PreTrainedTokenizerFast

BOOK_END = "<|endoftext|>"
CONTEXT = 2048  # positions that the models are built for
WINDOW = 512  # tokens in a training sequence and in an evaluation window

# --- text -------------------------------------------------------------------------------------


def load_tokenizer(directory: Path, padding_side: str = "right") -> PreTrainedTokenizerFast:
    """Load ``tokenizer.json``; every model here uses the same byte-level BPE of 4,096 tokens."""
    return PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"),
        bos_token=BOOK_END,
        eos_token=BOOK_END,
        pad_token=BOOK_END,
        model_max_length=CONTEXT,
        padding_side=padding_side,
    )


def read_books(path: Path) -> list[str]:
    """Return the books of an xz-compressed corpus."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        books = file.read().split(BOOK_END)
    return [book.strip("\n") for book in books if book.strip()]


def encode_books(tokenizer: PreTrainedTokenizerFast, books: list[str]) -> np.ndarray:
    """Tokenise the books into one stream, each followed by the end-of-text token."""
    pieces: list[str] = []
    for book in books:
        lines = book.splitlines(keepends=True)
        pieces += ["".join(lines[i : i + 200]) for i in range(0, len(lines), 200)]
        pieces.append(BOOK_END)
    encodings = tokenizer.backend_tokenizer.encode_batch(pieces, add_special_tokens=False)
    return np.concatenate([np.asarray(e.ids, dtype=np.uint16) for e in encodings])


def training_tokens(source: Path, tokenizer: PreTrainedTokenizerFast, cache: Path) -> np.ndarray:
    """Return the tokenised training books, kept in ``cache`` between runs."""
    if not cache.exists():
        tokens = encode_books(tokenizer, read_books(source / "books-train.txt.xz"))
        partial = cache.with_suffix(".part.npy")
        np.save(partial, tokens)
        partial.replace(cache)
    return np.load(cache)


def text_batches(tokens: np.ndarray, batch: int, seed: int) -> Iterator[Tensor]:
    """Yield batches of windows in random order, none twice before all were seen once."""
    rng = np.random.default_rng(seed)
    windows = tokens[: len(tokens) // WINDOW * WINDOW].reshape(-1, WINDOW)
    while True:
        order = rng.permutation(len(windows))
        for start in range(0, len(order) - batch + 1, batch):
            rows = windows[order[start : start + batch]]
            yield torch.from_numpy(rows.astype(np.int64))


# --- coloured shapes --------------------------------------------------------------------------

IMAGE_SIZE = 64
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
SHAPES = ("circle", "square", "triangle", "diamond")
COUNTS = ("one", "two", "three", "four")
COLOURS = {
    "red": (215, 45, 45),
    "green": (45, 170, 65),
    "blue": (55, 85, 225),
    "yellow": (235, 215, 60),
    "purple": (150, 60, 190),
    "orange": (240, 135, 40),
    "white": (235, 235, 235),
    "cyan": (70, 205, 220),
}


class Thing(NamedTuple):
    """One shape of a scene."""

    quadrant: str
    colour: str
    shape: str


def outline(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    """Corners of a shape of radius ``r`` around (x, y)."""
    if shape == "square":
        return [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]
    if shape == "triangle":
        return [(x, y - r), (x + r, y + r), (x - r, y + r)]
    if shape == "diamond":
        return [(x, y - r), (x + r, y), (x, y + r), (x - r, y)]
    turns = np.linspace(0, 2 * math.pi, 24, endpoint=False)
    return [(x + r * math.cos(t), y + r * math.sin(t)) for t in turns]


def draw_scene(rng: np.random.Generator) -> tuple[Image.Image, list[Thing]]:
    """Draw one to four shapes, at most one a quadrant, each of a kind and colour of its own.

    Place, size and shade are jittered, so that hardly any two scenes are alike.
    """
    background = tuple(int(v) for v in rng.integers(0, 60, 3))
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), background)
    canvas = ImageDraw.Draw(image)
    things = []
    for q in sorted(rng.permutation(4)[: rng.integers(1, 5)]):
        colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
        shade = tuple(int(v) for v in np.clip(COLOURS[colour] + rng.integers(-15, 16, 3), 0, 255))
        x, y = 16 + 32 * (q % 2) + rng.uniform(-4, 4), 16 + 32 * (q // 2) + rng.uniform(-4, 4)
        canvas.polygon(outline(shape, x, y, rng.uniform(8, 11)), fill=shade)
        things.append(Thing(QUADRANTS[q], colour, shape))
    return image, things


def ask(rng: np.random.Generator, things: list[Thing]) -> list[tuple[str, str]]:
    """Every question that the scene allows, in random order, with its answer."""
    colours, shapes = ([getattr(thing, key) for thing in things] for key in ("colour", "shape"))
    questions = [
        ("How many shapes are there?", COUNTS[len(things) - 1]),
        ("What is in the picture?", ", ".join(f"{thing.colour} {thing.shape} {thing.quadrant}" for thing in things)),
    ]
    for thing in things:
        questions.append((f"What is at the {thing.quadrant}?", f"{thing.colour} {thing.shape}"))
        if shapes.count(thing.shape) == 1:
            questions.append((f"What colour is the {thing.shape}?", thing.colour))
        if colours.count(thing.colour) == 1:
            questions.append((f"Where is the {thing.colour} one?", thing.quadrant))
    return [questions[i] for i in rng.permutation(len(questions))]


# --- shipped files ----------------------------------------------------------------------------


def excerpt(rng: np.random.Generator, book: str, size: int) -> str:
    """A run of whole paragraphs of about ``size`` characters from a random place of the book."""
    paragraphs = book.splitlines()
    lengths = np.cumsum([len(p) + 1 for p in paragraphs])
    # The opening lines are the title page; the last start still leaves ``size`` characters.
    last = int(np.searchsorted(lengths, max(0, int(lengths[-1]) - size)))
    first = int(rng.integers(min(5, last), last + 1))
    end = int(np.searchsorted(lengths, lengths[first] + size))
    return "\n".join(paragraphs[first : max(end, first + 1)])


def write_excerpts(source: Path, out: Path, size: int, seed: int) -> None:
    """Write about ``size`` characters, an equal share from every book of the corpus."""
    rng = np.random.default_rng(seed)
    books = read_books(source)
    parts = [excerpt(rng, book, size // len(books)) for book in books]
    out.write_text(f"\n{BOOK_END}\n".join(parts) + "\n", encoding="utf-8")


def write_scenes(out: Path, images: int, questions: int, seed: tuple[int, int]) -> None:
    """Write PNG images and ``data.jsonl`` with a few questions about each."""
    rng = np.random.default_rng(seed)
    out.mkdir(parents=True)
    rows = []
    for number in range(1, images + 1):
        image, things = draw_scene(rng)
        name = f"{number:04d}.png"
        image.save(out / name, optimize=True)
        for question, answer in ask(rng, things)[:questions]:
            rows.append({"image": name, "question": question, "answer": answer})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (out / "data.jsonl").write_text(lines, encoding="utf-8")


def write_data(source: Path, out: Path, seed: int) -> None:
    """Write the calibration text, the held-out text, the minimal pairs and the scenes."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    write_excerpts(source / "books-train.txt.xz", out / "text.txt", 1_200_000, seed)
    write_excerpts(source / "books-valid.txt.xz", out / "heldout.txt", 300_000, seed)
    shutil.copyfile(source / "minimal-pairs.jsonl", out / "pairs.jsonl")
    write_scenes(out / "shapes" / "train", images=128, questions=3, seed=(seed, 1))
    write_scenes(out / "shapes" / "heldout", images=256, questions=3, seed=(seed, 2))
