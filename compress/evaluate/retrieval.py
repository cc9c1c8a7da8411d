"""Can a model still find what it was told long ago: associative recall in tokens, and lines or a pass key hidden in long prompts.

The tasks in text are those of LongEval (lmsys.org, 2023-06-29, lines) and of arXiv 2305.16300, section 4.2 (pass key), in words of our own: figures
compare between runs of this module, not with published ones. Prompts are made to a length in tokens of the model's own tokenizer.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.errors import InputError, Problems
from compress.evaluate.scoring import paired_interval
from compress.recipe import NEW_TOKENS, RECALLED

BOS, SEP = 0, 1
KEYS, VALUES = range(16, 144), range(144, 272)
"""Token ids of associative recall; those between are for whatever else a vocabulary needs."""

ADJECTIVES = (
    "able amber ample azure basic bitter blunt bold brave brief bright brisk calm cheap civil clean clear clever cold cool crisp curly damp dark "
    "dear deep dense dry dull eager early easy empty exact faint fair fast fierce final firm flat fond fresh full gentle giant glad grand grave "
    "great green grim happy hard heavy hollow honest huge humble idle jolly keen kind large late lazy light little lively lone long loose loud "
    "loyal lucky merry mild modest narrow neat noble odd old pale plain polite proud quick quiet rapid rare rich ripe rough round royal rural sad "
    "safe salty sharp short shy silent simple slow small smart smooth soft solid sour spare steep stern stiff still strange strict strong subtle "
    "sweet swift tall tame tender thick thin tidy tiny tough vague vast vivid warm weak wide wild wise young"
)
NOUNS = (
    "anchor apple arrow badge barn basket beach bell bench bird boat bottle branch bread bridge brush bucket button cabin candle canyon carpet "
    "castle chain chair chalk circle cliff clock cloud coast coin copper corner cottage cousin crow curtain desert doctor door drum eagle engine "
    "farm feather fence field finger fish flag flame flute forest fork fox garden gate ghost glass glove goose grape guitar hammer harbor hat "
    "hawk hill hinge horse house island jacket jar judge kettle key kitchen kite knife ladder lake lamp lantern leaf lemon letter lion map marble "
    "market meadow melon mirror moon mountain mouse needle nest oak ocean olive onion orchard otter oven owl paddle paper parcel path pearl "
    "pencil piano pillow pilot planet plum pocket pond potato quilt rabbit river road robin rope sailor"
)
LINES = "Remember each of the lines below. A line begins with its name and ends with a number. At the end you are asked for the number of one line."
KEY = "A pass key is hidden in the text below. Find it and remember it. At the end you are asked for it."
FILLER = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
PADDING = (" -", " .", " a", " so")
"""Words of which a tokenizer should make one token each, one kind or another."""
LEAST = 2
"""Lines, or sentences of filler, without which nothing is in front of or behind what is asked for."""


class Progress(Protocol):
    """What a measurement reports to."""

    def step(self, name: str, total: int) -> None: ...
    def done(self, units: int) -> None: ...


@dataclass(frozen=True)
class Recall:
    """Sequences of associative recall: ``sequences`` int64 [sequences, tokens]; ``scored`` bool, the same shape, the tokens whose prediction counts
    (made one token earlier), the values of the queries; ``start``, the place of SEP, from which on a sequence asks."""

    sequences: Tensor
    scored: Tensor
    start: int


def associative_recall(pairs: int, queries: int = 32, sequences: int = 16, seed: int = 0) -> Recall:
    """``BOS (k1 v1)...(kN vN) SEP (kq vq)...``: N distinct keys of 128 with values of 128, `queries` of them asked for, their answers given.

    Every pair is asked for once before one is asked for again. A sequence has 2 + 2 (`pairs` + `queries`) tokens. Guessing is right once in 128,
    repeating a value that was given about once in `pairs`. It is the MQAR of arXiv 2312.04927 with all queries behind all pairs. The same `seed`
    gives the same sequences. Raises `InputError` for fewer than 1 or more than 128 pairs, and for no queries or sequences.
    """
    problems = Problems()
    if not 1 <= pairs <= len(KEYS):
        problems.add("pairs", f"must be from 1 to {len(KEYS)}, got {pairs}", "there are no more keys")
    for name, number in (("queries", queries), ("sequences", sequences)):
        if number < 1:
            problems.add(name, f"must be at least 1, got {number}")
    problems.raise_if_any()
    generator = torch.Generator().manual_seed(seed)
    rows = torch.empty(sequences, 2 + 2 * (pairs + queries), dtype=torch.int64)
    start = 1 + 2 * pairs
    for row in rows:
        keys = KEYS.start + torch.randperm(len(KEYS), generator=generator)[:pairs]
        values = VALUES.start + torch.randint(len(VALUES), (pairs,), generator=generator)
        asked = torch.cat([torch.randperm(pairs, generator=generator) for _ in range(math.ceil(queries / pairs))])[:queries]
        row[0], row[start] = BOS, SEP
        row[1:start:2], row[2:start:2] = keys, values
        row[start + 1 :: 2], row[start + 2 :: 2] = keys[asked], values[asked]
    scored = torch.zeros_like(rows, dtype=torch.bool)
    scored[:, start + 2 :: 2] = True
    return Recall(rows, scored, start)


@dataclass(frozen=True)
class Prompt:
    """``ids`` int64 [tokens], the tokens of ``text``, whose right continuation is the number ``answer``; ``units`` lines or sentences of filler are
    in it, and ``before`` of them in front of what is asked for."""

    text: str
    ids: Tensor
    answer: int
    units: int
    before: int


@dataclass(frozen=True)
class Draft:
    """A prompt before its length is known: ``text`` of so many units and padding, of which so many units are ``before`` what is asked for, and its
    ``answer``; with at most so many (``most``) units."""

    text: Callable[[int, str], str]
    before: Callable[[int], int]
    answer: Callable[[int], int]
    most: float


@dataclass(frozen=True)
class Task:
    """``draft`` makes prompts at a depth (0 to 1) from random numbers; the model then says at most ``new_tokens``, and no more once ``ended`` is
    found in them. ``read`` takes the answer from what it said; ``rule`` says how."""

    draft: Callable[[float, random.Random], Draft]
    new_tokens: int
    ended: re.Pattern[str]
    read: Callable[[str], int | None]
    rule: str


def last_integer(text: str) -> int | None:
    """The last run of digits in `text`, LongEval's rule; None if there is none."""
    found = re.findall(r"[0-9]+", text)
    return int(found[-1]) if found else None


def first_integer(text: str) -> int | None:
    """The first run of digits in `text`; None if there is none."""
    found = re.search(r"[0-9]+", text)
    return int(found[0]) if found else None


def _lines(depth: float, numbers: random.Random) -> Draft:
    """The line at `depth` of all is asked for: 0 is the first, 1 the last."""
    names = [f"{adjective}-{noun}" for adjective in ADJECTIVES.split() for noun in NOUNS.split()]
    numbers.shuffle(names)
    values = [numbers.randrange(1, 100000) for _ in names]

    def before(units: int) -> int:
        return round(depth * (units - 1))

    def text(units: int, padding: str) -> str:
        lines = "".join(f"line {name}: REGISTER_CONTENT is <{value}>\n" for name, value in zip(names[:units], values, strict=False))
        name = names[before(units)]
        return (
            f"{LINES}{padding}\n\n{lines}\nThe lines are over. What is the REGISTER_CONTENT of line {name}?\nThe REGISTER_CONTENT of line {name} is"
        )

    return Draft(text, before, lambda units: values[before(units)], len(names))


def _passkey(depth: float, numbers: random.Random) -> Draft:
    """The key stands behind a share of `depth` of the filler: 0 is in front of all of it, 1 behind."""
    key, first = numbers.randrange(10000, 100000), numbers.randrange(len(FILLER))

    def before(units: int) -> int:
        return round(depth * units)

    def text(units: int, padding: str) -> str:
        told = [FILLER[(first + index) % len(FILLER)] for index in range(units)]
        told.insert(before(units), f"The pass key is {key}. Remember it. {key} is the pass key.")
        return f"{KEY}{padding}\n\n{' '.join(told)}\n\nWhat is the pass key? The pass key is"

    return Draft(text, before, lambda _: key, math.inf)


TASKS = {
    "lines": Task(_lines, NEW_TOKENS["lines"], re.compile(r"[0-9][^\n]*\n"), last_integer, "the last integer said, up to the end of its line"),
    "passkey": Task(_passkey, NEW_TOKENS["passkey"], re.compile(r"[0-9][^0-9]"), first_integer, "the first integer said"),
}

RECALL = "recall"
RECALL_RULE = "the likeliest token, if it is the value that was told with the key"


def _recall(tokenizer: Any, length: int, depth: float, numbers: random.Random) -> Prompt:
    """``BOS (k1 v1)...(kN vN) SEP k``, the key of the pair at `depth`: 0 is the first, 1 the last. See `associative_recall`."""
    if length not in RECALLED:
        what = f"must be from {RECALLED.start} to {RECALLED.stop - 1} tokens for {RECALL}, got {length}"
        raise InputError.one("lengths", what, f"there are {len(KEYS)} keys")
    if len(tokenizer) < VALUES.stop:
        raise InputError.one("tokenizer", f"has {len(tokenizer)} tokens, {RECALL} needs {VALUES.stop}", "choose another task")
    pairs = (length - 3) // 2
    keys, values = numbers.sample(KEYS, pairs), numbers.choices(VALUES, k=pairs)
    before = round(depth * (pairs - 1))
    told = [token for pair in zip(keys, values, strict=True) for token in pair]
    return Prompt("", torch.tensor([BOS, *told, SEP, keys[before]]), values[before], pairs, before)


def prompt(task: str, tokenizer: Any, length: int, depth: float, case: int = 0, seed: int = 0) -> Prompt:
    """Case number `case` of a cell: a prompt of `length` tokens by `tokenizer`, one of transformers, in which what is asked for stands at `depth`.

    It depends on its arguments alone, not on other cells. It is as many whole lines or sentences as fit, and padding in front of them; where the
    tokenizer knows no word of padding that is one token, some tokens fewer than `length`. Raises `InputError` where `length` is too short for the
    task, or too long for there are only so many names of lines.
    """
    numbers = random.Random(f"{seed} {task} {length} {float(depth)} {case}")
    if task == RECALL:
        return _recall(tokenizer, length, depth, numbers)
    draft = TASKS[task].draft(depth, numbers)

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text)["input_ids"]
        return found

    if (least := len(ids(draft.text(LEAST, "")))) > length:
        raise InputError.one("lengths", f"{length} tokens are too short for {task}, which takes at least {least} here", "choose longer ones")
    units = _most_units(lambda units: len(ids(draft.text(units, ""))), least, length, draft.most)
    if units == draft.most:
        raise InputError.one("lengths", f"{length} tokens are too long for {task}, which has names for {units} lines", "choose shorter ones")
    text = draft.text(units, "")
    if lacking := length - len(ids(text)):
        padded = (draft.text(units, word * count) for word in PADDING for count in (lacking, lacking - 1))
        text = next((each for each in padded if len(ids(each)) == length), text)
    return Prompt(text, torch.tensor(ids(text)), draft.answer(units), units, draft.before(units))


def _most_units(tokens: Callable[[int], int], least: int, length: int, most: float) -> int:
    """The most units, up to `most`, that give no more `tokens` than `length`; `LEAST` units give `least`.

    A search by proportion, as every unit adds about as many tokens.
    """
    low, of_low, high = LEAST, least, 2 * LEAST
    while (of_high := tokens(high)) <= length:
        if high == most:
            return high
        if of_high <= of_low:
            raise InputError.one("tokenizer", f"makes {of_high} tokens of {high} lines or sentences as of {low}", "is it the model's own?")
        rate = (of_high - of_low) / (high - low)
        low, of_low, high = high, of_high, int(min(high + 1 + (length - of_high) // rate, most))
    while high - low > 1:
        rate = (of_high - of_low) / (high - low)
        middle = min(max(low + int((length - of_low) / rate), low + 1), high - 1)
        if (of_middle := tokens(middle)) <= length:
            low, of_low = middle, of_middle
        else:
            high, of_high = middle, of_middle
    return low


@dataclass(frozen=True)
class Wish:
    """Cells to measure: ``lengths`` in tokens x ``depths`` from 0 to 1, each with ``cases`` prompts of ``task``."""

    task: str
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    cases: int
    seed: int = 0


def wish(task: str, lengths: str, depths: str, cases: int, seed: int, most: int | None) -> Wish:
    """What is wanted, from words: `lengths` and `depths` parted by commas; `most` are the tokens that the model takes, None if it does not say.

    Raises `InputError` with all mistakes at once.
    """
    problems = Problems()
    if task not in NEW_TOKENS:
        problems.add("--task", f"must be one of {', '.join(NEW_TOKENS)}, got {task!r}")
    of_length = _numbers("--lengths", lengths, int, "tokens, such as 512,1024", problems)
    of_depth = _numbers("--depths", depths, float, "shares, such as 0,0.5,1", problems)
    new = NEW_TOKENS.get(task, 0)
    for length in of_length:
        if length < 1:
            problems.add("--lengths", f"must be positive, got {length}")
        elif most is not None and length + new > most:
            longest = f"at most {most - new} tokens" if most > new else "another model"
            problems.add("--lengths", f"{length} and {new} new tokens are more than the {most} that the model takes", f"choose {longest}")
    for depth in of_depth:
        if not 0 <= depth <= 1:
            problems.add("--depths", f"must be from 0 (the beginning) to 1 (the end), got {depth:g}")
    if cases < 1:
        problems.add("--cases", f"must be at least 1, got {cases}")
    problems.raise_if_any()
    return Wish(task, of_length, of_depth, cases, seed)


def _numbers(place: str, text: str, kind: Callable[[str], Any], example: str, problems: Problems) -> tuple[Any, ...]:
    """The numbers in `text`, in rising order, each once."""
    try:
        return tuple(sorted({kind(part) for part in text.split(",")}))
    except ValueError:
        problems.add(place, f"must be numbers parted by commas, got {text!r}", f"give {example}")
        return ()


def prompts(wanted: Wish, tokenizer: Any, progress: Progress) -> dict[tuple[int, float], list[Prompt]]:
    """All prompts by length and depth, so that every mistake shows before weights load. Raises what `prompt` does."""
    cells = [(length, depth) for length in wanted.lengths for depth in wanted.depths]
    progress.step("prompts", len(cells))
    made = {}
    for number, (length, depth) in enumerate(cells, 1):
        made[length, depth] = [prompt(wanted.task, tokenizer, length, depth, case, wanted.seed) for case in range(wanted.cases)]
        progress.done(number)
    return made


def digest(made: Mapping[tuple[int, float], list[Prompt]]) -> str:
    """sha256 over the tokens of all prompts, in order."""
    tokens = hashlib.sha256()
    for each in (each for of_cell in made.values() for each in of_cell):
        tokens.update(each.ids.numpy().tobytes())
    return tokens.hexdigest()


@torch.no_grad()
def answer(model: Any, tokenizer: Any, task: Task, ids: Tensor) -> str:
    """What `model`, one of transformers, says after the prompt `ids` [tokens]: its likeliest tokens, until `task` has an answer."""

    def ended(so_far: Tensor, _: Any) -> Tensor:
        said = tokenizer.decode(so_far[0, len(ids) :], skip_special_tokens=True)
        return torch.tensor([task.ended.search(said) is not None], device=so_far.device)

    given = ids[None].to(model.device)
    # Some models come with penalties for what was said before, which is what is asked for here.
    plainly = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    said = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=task.new_tokens, stopping_criteria=[ended], **plainly)
    text: str = tokenizer.decode(said[0, len(ids) :], skip_special_tokens=True)
    return text


@torch.no_grad()
def recalled(model: Any, ids: Tensor) -> int:
    """The likeliest token behind the prompt `ids` [tokens], of which the last comes alone: it has to find the others in the cache."""
    given = ids[None].to(model.device)
    told = model(given[:, :-1], use_cache=True)
    return int(model(given[:, -1:], past_key_values=told.past_key_values, use_cache=True).logits[0, -1].argmax())


def measure(model: Any, tokenizer: Any, wanted: Wish, made: dict[tuple[int, float], list[Prompt]], progress: Progress) -> dict[str, Any]:
    """Ask `model`, one of transformers or of `compress.load`, for the answers to the prompts `made` for a wish.

    Gives what was wanted, the ``rule`` by which an answer is right, and ``cells`` by length, then depth: how many of how many ``cases`` were
    ``correct``, their share (``accuracy``), and each of the ``answers`` with the ``tokens`` and ``units`` of its prompt, of which so many stood
    ``before`` what was asked for, what was ``expected`` and what ``said``.
    """
    task, cells, done = TASKS.get(wanted.task), [], 0
    progress.step("retrieval", sum(map(len, made.values())))
    for (length, depth), of_cell in made.items():
        answers, correct = [], 0
        for each in of_cell:
            said = answer(model, tokenizer, task, each.ids) if task else str(recalled(model, each.ids))
            right = (task.read(said) if task else int(said)) == each.answer
            correct += right
            about = {"tokens": len(each.ids), "units": each.units, "before": each.before}
            answers.append(about | {"expected": each.answer, "said": said, "correct": right})
            done += 1
            progress.done(done)
        figures = {"length": length, "depth": depth, "correct": correct, "cases": len(answers), "accuracy": correct / len(answers)}
        cells.append(figures | {"answers": answers})
    return {
        "task": wanted.task,
        "rule": task.rule if task else RECALL_RULE,
        "new_tokens": NEW_TOKENS[wanted.task],
        "cases": wanted.cases,
        "seed": wanted.seed,
        "tokens_sha256": digest(made),
        "cells": cells,
    }


def compared(before: dict[str, Any], after: dict[str, Any]) -> tuple[dict[str, Any], float, tuple[float, float]]:
    """Two results of `measure` on the same prompts beside each other, without what was said; the share of right answers that was lost, and its
    confidence interval by paired bootstrap over prompts."""
    sides = {"baseline": before, "compressed": after}
    right = {side: [each["correct"] for cell in result["cells"] for each in cell["answers"]] for side, result in sides.items()}
    common = {key: value for key, value in before.items() if key != "cells"}
    told: dict[str, Any] = {
        side: {
            "accuracy": sum(right[side]) / len(right[side]),
            "cells": [{key: cell[key] for key in ("length", "depth", "correct", "cases", "accuracy")} for cell in result["cells"]],
        }
        for side, result in sides.items()
    }
    drop = torch.tensor(right["baseline"], dtype=torch.float64) - torch.tensor(right["compressed"], dtype=torch.float64)
    return common | told, float(drop.mean()), paired_interval(drop)
