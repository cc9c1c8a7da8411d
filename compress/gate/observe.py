"""Measuring one model by the rules of a gate, so that it can be compared with any other that was measured in the same way."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress import hardware, runtime
from compress.checkpoint import sha256
from compress.data import Sample, Samples, Tokenizer, json_lines, sentence_pairs, windows
from compress.errors import InputError, Problems
from compress.evaluate import retrieval, tasks
from compress.evaluate.scoring import LOGITS_AT_ONCE, last_hidden
from compress.gate.record import digest
from compress.gate.rules import TOP, Bias, Pairs, Retrieval, Rules, Suite, Task, Text
from compress.layout import Layout
from compress.model import Model
from compress.source import DEMO, locate_data

VERSION = 1
"""Of the way things are measured here. A change that moves a figure takes another."""
LEAST = 8
"""Sequences without which a bootstrap says nothing."""
OPTIONS = ("stereotype", "anti", "unknown")

Arrays = dict[str, NDArray[Any]]


class Progress(Protocol):
    """What a measurement reports to."""

    def step(self, name: str, total: int) -> None: ...
    def done(self, units: int) -> None: ...


@dataclass(frozen=True)
class Given:
    """What a suite gives a model: tokens, or prompts of retrieval; nothing for tasks, which lm-eval reads. ``extra`` are arrays about the items."""

    samples: Samples | None = None
    prompts: dict[tuple[int, float], list[retrieval.Prompt]] = field(default_factory=dict)
    extra: Arrays = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """sha256 of all tokens, which the tokenizer has a part in."""
        if self.samples:
            return self.samples.digest
        made = [each.ids.tolist() for prompts in self.prompts.values() for each in prompts]
        return digest(made)


def protocol(rules: Rules, stored: str, layout: Layout) -> dict[str, Any]:
    """How a model of this layout whose weights are `stored` in a dtype would be measured here. Raises `InputError` for data that are not there."""
    found: dict[str, Any] = {
        "version": VERSION,
        "stored": stored,
        "dtype": str(hardware.compute_dtype(getattr(torch, stored))).removeprefix("torch."),
        "device": hardware.device().type,
        "norms": rules.integrity.max_gain is not None,
    }
    suites = {}
    for suite, of in zip(rules.suites, data(rules), strict=True):
        # Bounds may be set anew without measuring again, but for those that say what is measured.
        about = {key: value for key, value in suite.model_dump(mode="json").items() if not key.startswith("max_") and key not in ("name", "detect")}
        about |= of
        if isinstance(suite, Text):
            about |= {"stride": suite.context, "bos": "none added", "top": TOP if suite.max_kl is not None else None}
        if isinstance(suite, Task):
            tasks.find((suite.task,), layout)
            about["lm_eval"] = metadata.version("lm_eval")
        suites[suite.title] = about
    return found | {"suites": suites}


def data(rules: Rules) -> list[dict[str, Any]]:
    """Which data each suite is of, by hash. Raises `InputError` for all that are not there."""
    problems = Problems()
    found = []
    for suite in rules.suites:
        try:
            found.append(_data(suite))
        except InputError as error:
            problems.absorb(error)
    problems.raise_if_any()
    return found


def _data(suite: Suite) -> dict[str, Any]:
    name = getattr(suite, "data", None)
    if name is None:
        file = Path(getattr(suite, "task", ""))
        return {"task_sha256": sha256(file)} if file.suffix in (".yaml", ".yml") and file.is_file() else {}
    path = locate_data(name)
    if not path.exists():
        raise InputError.one(f"{suite.title}: data", f"{name} is no file or folder", "paths are relative to where the command runs")
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    whole = hashlib.sha256("".join(f"{each.name} {sha256(each)}\n" for each in files).encode()).hexdigest()
    return {"data": name if name.startswith(DEMO) else path.name, "data_sha256": whole}


def given(rules: Rules, layout: Layout, tokenizer: Tokenizer, progress: Progress) -> dict[str, Given]:
    """What each suite gives a model with this `tokenizer`, by title. Raises `InputError` with everything that is wrong with the data."""
    problems = Problems()
    found = {}
    longest = layout.text_config.get("max_position_embeddings")
    for suite in rules.suites:
        try:
            found[suite.title] = _given(suite, tokenizer, longest, progress)
        except InputError as error:
            problems.absorb(error)
    problems.raise_if_any()
    return found


def _given(suite: Suite, tokenizer: Tokenizer, longest: Any, progress: Progress) -> Given:
    place = f"{suite.title}: data"
    if isinstance(suite, Text):
        if isinstance(longest, int) and suite.context > longest:
            raise InputError.one(f"{suite.title}: context", f"{suite.context} tokens exceed the model's {longest}", f"set it to {longest} or less")
        samples = windows(suite.data, suite.context, suite.windows, tokenizer, place)
        if len(samples.items) < LEAST:
            raise InputError.one(place, f"gives {len(samples.items)} windows, a test needs {LEAST}", "give more text or a smaller context")
        return Given(samples)
    if isinstance(suite, Pairs):
        pairs = sentence_pairs(suite.data, tokenizer, place)
        return Given(Samples(pairs.source, pairs.items[: 2 * suite.limit]) if suite.limit else pairs)
    if isinstance(suite, Bias):
        return _stereotypes(suite, tokenizer, place)
    if isinstance(suite, Retrieval):
        lengths, depths = (",".join(map(str, values)) for values in (suite.lengths, suite.depths))
        wanted = retrieval.wish(suite.task, lengths, depths, suite.cases, suite.seed, longest)
        return Given(prompts=retrieval.prompts(wanted, tokenizer.plain, progress))
    return Given()


def _stereotypes(suite: Bias, tokenizer: Tokenizer, place: str) -> Given:
    """Each option of each row is a sample, of which the option is scored: all of a sentence, or what comes behind a prompt."""
    path = locate_data(suite.data)
    items: list[Sample] = []
    rows: list[int] = []
    options: list[int] = []
    groups: list[str] = []
    problems = Problems()
    for number, row in enumerate(json_lines(path, place)):
        unknown = sorted(row.keys() - {*OPTIONS, "prompt", "group"})
        faulty = [key for key in row if key not in unknown and (not isinstance(row[key], str) or not row[key].strip())]
        if faulty := [*unknown, *faulty, *(key for key in OPTIONS[:2] if key not in row)]:
            problems.add(
                f"{place}: item {number + 1}", f"{faulty[0]!r} is unknown, missing or no text", "give stereotype, anti, prompt, unknown, group"
            )
            continue
        groups.append(row.get("group", "all"))
        for index, option in enumerate(OPTIONS):
            if option in row:
                start = tokenizer.encode(row["prompt"]) if "prompt" in row else []
                ids = start + tokenizer.encode(f" {row[option].strip()}" if start else row[option])
                scored = torch.arange(len(ids)) >= len(start)
                items.append(Sample(torch.tensor(ids), scored))
                rows.append(len(groups) - 1)
                options.append(index)
    if not len(problems) and len(groups) < LEAST:
        problems.add(place, f"holds {len(groups)} items, a test needs {LEAST}", "give more")
    problems.raise_if_any()
    names = sorted(set(groups))
    extra = {
        "row": np.array(rows, np.int32),
        "option": np.array(options, np.int32),
        "group": np.array([names.index(each) for each in groups], np.int32),
    }
    # Names go along as bytes: a baseline keeps nothing but arrays.
    extra["group_names"] = np.frombuffer("\n".join(names).encode(), dtype=np.uint8)
    return Given(Samples(suite.data, tuple(items)), extra=extra)


def observe(
    name: str, layout: Layout, rules: Rules, given: dict[str, Given], reference: dict[str, Arrays] | None, progress: Progress
) -> tuple[dict[str, Arrays], dict[str, dict[str, Any]]]:
    """Everything measured of a model, by suite, and what of the protocol is known only then.

    `reference` are the arrays of the baseline that it will be compared with, where there is one: divergence is of the tokens that are likely there.
    """
    arrays: dict[str, Arrays] = {}
    told: dict[str, dict[str, Any]] = {}
    model = Model(layout)
    for suite in rules.suites:
        what = given[suite.title]
        if what.samples:
            progress.step(f"{name}: {suite.title}", len(layout.blocks))
            top = TOP if isinstance(suite, Text) and suite.max_kl is not None else 0
            at = reference[suite.title]["ids"] if reference and top else None
            scores = _scores(model, what.samples, top, at, progress)
            arrays[suite.title] = scores if isinstance(suite, Text) else _per_sequence(scores, len(what.samples.items)) | what.extra
    model.release()
    for suite in rules.suites:
        if isinstance(suite, Retrieval):
            whole, tokenizer = runtime.load(layout.checkpoint.folder), Tokenizer(layout.checkpoint.folder).plain
            wanted = retrieval.Wish(suite.task, suite.lengths, suite.depths, suite.cases, suite.seed)
            measured = retrieval.measure(whole, tokenizer, wanted, given[suite.title].prompts, progress)
            del whole
            hardware.return_freed_memory()
            right = [answer["correct"] for cell in measured["cells"] for answer in cell["answers"]]
            arrays[suite.title] = {"right": np.array(right, dtype=np.float64)}
        if isinstance(suite, Task):
            progress.step(f"{name}: {suite.title}", 1)
            answered = tasks.items(layout.checkpoint.folder, suite.task, suite.metric, layout, suite.limit)
            if set(answered.values) - {0.0, 1.0}:
                raise InputError.one(f"{suite.title}: metric", f"{suite.metric} does not say right or wrong of each item", "choose one such as acc")
            arrays[suite.title] = {"right": np.array(answered.values)}
            told[suite.title] = {"items_sha256": answered.digest, "task_versions": answered.versions}
    return arrays, told


def check(rules: Rules, layout: Layout) -> None:
    """Raise `InputError` for a model that cannot be measured as the rules say."""
    left_out = Model(layout).left_out
    for suite in rules.tasks:
        if left_out or layout.wrapped_as:
            what = f"leaves its {' and '.join(left_out)} out" if left_out else f"refuses what config.json calls {layout.wrapped_as}"
            raise InputError.one(suite.title, f"lm-eval runs {layout.checkpoint.folder} in transformers, which {what}", "leave the tasks out")


def versions() -> dict[str, str]:
    """Of what computes, to be told where figures differ."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in ("torch", "transformers")}


@torch.no_grad()
def _scores(model: Model, samples: Samples, top: int, at: NDArray[Any] | None, progress: Progress) -> Arrays:
    """Per scored token: the sequence it is of (``member``), its negative log-likelihood (``loss``, nats), the likeliest token (``choice``) and if
    that is the right one (``right``); with `top`, log-probabilities of the tokens ``ids`` [tokens, top], the likeliest or those `at`, and behind them
    that of all others together (``logprobs`` [tokens, top + 1])."""
    finished = 0

    def advance() -> None:
        nonlocal finished
        finished += 1
        progress.done(finished)

    hidden = last_hidden(model, samples, advance)
    columns: dict[str, list[Tensor]] = {name: [] for name in ("member", "loss", "choice", "right", *(("ids", "logprobs") if top else ()))}
    seen = 0
    for batch, states in zip(samples.batches(), hidden, strict=True):
        wanted = batch.scored[:, 1:]  # the prediction at a position is of the token after it
        rows, places = torch.nonzero(wanted, as_tuple=True)
        labels = batch.inputs["input_ids"][:, 1:][wanted].to(model.device)
        members = torch.tensor(batch.members)[rows]
        for start in range(0, len(rows), LOGITS_AT_ONCE):
            part = slice(start, start + LOGITS_AT_ONCE)
            odds = torch.log_softmax(model.logits(states[rows[part].to(model.device), places[part].to(model.device)]), -1)
            label, choice = labels[part], odds.argmax(-1)
            columns["member"].append(members[part].int())
            columns["loss"].append(-odds.gather(1, label[:, None])[:, 0].cpu())
            columns["choice"].append(choice.int().cpu())
            columns["right"].append((choice == label).cpu())
            if top:
                many = min(top, odds.shape[-1] - 1)
                ids = odds.topk(many, -1).indices if at is None else torch.from_numpy(at[seen : seen + len(label)]).long().to(odds.device)
                # Not one minus the others: that would lose what little is left.
                rest = odds.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
                columns["ids"].append(ids.int().cpu())
                columns["logprobs"].append(torch.cat([odds.gather(1, ids), rest], 1).cpu())
            seen += len(label)
    return {name: torch.cat(parts).numpy() for name, parts in columns.items()}


def _per_sequence(scores: Arrays, sequences: int) -> Arrays:
    """Summed ``loss`` and number of scored ``tokens`` of each sequence."""
    loss = np.bincount(scores["member"], scores["loss"].astype(np.float64), sequences)
    return {"loss": loss, "tokens": np.bincount(scores["member"], minlength=sequences).astype(np.float64)}
