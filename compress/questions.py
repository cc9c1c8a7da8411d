"""A folder of images with questions about them: what each line of its ``data.jsonl`` must be. No image is read, so that it can be checked at once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compress.errors import InputError, Problems

FILE = "data.jsonl"
COLUMNS = ("images", "image")
"""What images may be called."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
DATA = (".json", ".jsonl", ".csv", ".parquet", ".arrow", ".txt")
"""Files that a data set may have its rows in."""
TOLD = 10
"""So many faulty lines are named, the others counted."""
NEEDED = "each line is an object with image, question and answer, or images and messages"


def rows(folder: Path, place: str) -> list[dict[str, Any]]:
    """The rows of a folder, each with all it needs and its images there. Raises `InputError` with every line that is wrong."""
    problems = Problems()
    found, wrong = [], 0
    for number, line in _lines(folder / FILE, place):
        faults = list(_faults(line, folder))
        wrong += bool(faults)
        for fault in faults if wrong <= TOLD else ():
            problems.add(f"{place}: line {number}", fault, NEEDED if not isinstance(line, dict) or fault.startswith("a row") else "mend the line")
        if isinstance(line, dict):
            found.append(line)
    if wrong > TOLD:
        problems.add(place, f"{wrong - TOLD} more lines of {FILE} are wrong too", "mend those named, and ask again")
    problems.raise_if_any()
    return found


def check_folder(folder: Path, place: str, problems: Problems) -> None:
    """Report what is wrong with a folder that data are to come from, if it holds images."""
    if (folder / FILE).exists():
        try:
            rows(folder, place)
        except InputError as error:
            problems.absorb(error)
    elif what := without_questions(folder):
        problems.add(place, what, f"write a {FILE} beside them: {NEEDED}")


def without_questions(folder: Path) -> str | None:
    """What is wrong with a folder of images that nothing is said about, or None for other folders."""
    suffixes = {path.suffix.lower() for path in folder.iterdir() if path.is_file()} if folder.is_dir() else set()
    if (folder / FILE).exists() or not suffixes.intersection(SUFFIXES) or suffixes.intersection(DATA):
        return None
    return f"{folder} holds images, but no {FILE} that says what is asked about them"


def fault(row: Mapping[str, Any]) -> str | None:
    """What is wrong with a row, its images aside; None if nothing is."""
    if isinstance(row.get("messages"), list):
        answers = [message for message in row["messages"] if isinstance(message, dict) and message.get("role") == "assistant"]
        if not answers:
            return f"no answer of the assistant in {row['messages']!r:.200}"
        empty = [answer for answer in answers if not _text(answer.get("content")).strip()]
        return f"an empty answer of the assistant in {row['messages']!r:.200}" if empty else None
    if missing := [key for key in ("question", "answer") if not isinstance(row.get(key), str)]:
        return f"a row without {missing[0]!r}: {sorted(row)}"
    return None if row["answer"].strip() else f"an empty answer to {row['question']!r:.120}"


def images(row: Mapping[str, Any]) -> list[Any]:
    """The images of a row, or what stands for them."""
    given: Any = next((row[key] for key in COLUMNS if row.get(key)), [])
    return given if isinstance(given, list) else [given]


def image_fault(row: Mapping[str, Any]) -> str | None:
    """What is wrong with how many images a row has; None if nothing is."""
    count = len(images(row))
    return None if count == 1 or (count and isinstance(row.get("messages"), list)) else f"a row with {count} images: {sorted(row)}"


def _text(content: object) -> str:
    """What is said in a message."""
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _faults(row: object, folder: Path) -> Iterator[str]:
    if isinstance(row, json.JSONDecodeError):
        yield f"is not JSON ({row})"
    elif not isinstance(row, dict):
        yield f"must be an object, got {type(row).__name__}"
    else:
        yield from filter(None, (fault(row), image_fault(row)))
        for each in images(row):
            path = folder / str(each)
            if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
                yield f"names {each}, which is not a file of the folder"


def _lines(path: Path, place: str) -> Iterator[tuple[int, object]]:
    """Number and content of each line that is not empty; of one that is no JSON, the error."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError.one(place, f"{path.name} cannot be read as text ({error})") from error
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also split inside a string
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                yield number, error
