"""From scores to the figures of a report."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from compress.checkpoint import Checkpoint
from compress.data import Samples, Tokenizer, sentence_pairs, windows
from compress.errors import InputError
from compress.evaluate import scoring, tasks
from compress.evaluate.kept import ARTIFACT, IN_ENGINES, NOTHING, SOURCE, Kept
from compress.layout import Layout
from compress.model import Model

if TYPE_CHECKING:
    from compress.recipe import Evaluation


class Progress(Protocol):
    """What a measurement reports to."""

    def done(self, units: int) -> None: ...


def read(options: Evaluation, tokenizer: Tokenizer, layout: Layout) -> tuple[Samples, Samples | None]:
    """The text and the pairs to measure a model of this layout on. Raises `InputError` for whatever is wrong with them or with tasks."""
    samples = windows(options.data, options.context, options.windows, tokenizer, "evaluate: data")
    pairs = sentence_pairs(options.pairs, tokenizer) if options.pairs else None
    if pairs and options.skip_pairs:
        if 2 * options.skip_pairs >= len(pairs.items):
            raise InputError.one("evaluate: skip_pairs", f"leaves none of the {len(pairs.items) // 2} pairs of {pairs.source}", "set it lower")
        pairs = Samples(f"{pairs.source} from number {options.skip_pairs + 1} on", pairs.items[2 * options.skip_pairs :])
    if options.tasks:
        tasks.find(options.tasks, layout)
    return samples, pairs


def against_source(
    source: Layout, artifact: Path, options: Evaluation, tokenizer: Tokenizer, progress: Progress, kept: Kept, *, in_engines: bool = False
) -> dict[str, Any]:
    """The artifact, read back from disk, beside its source; with `in_engines` without what these leave out. What `kept` has of `SOURCE`, `ARTIFACT`
    and `IN_ENGINES` is not measured again."""
    base, model = Model(source), Model(Layout(Checkpoint(artifact)))
    model = model.in_engines() if in_engines else model
    result = _measure(base, model, options, tokenizer, progress, kept, (SOURCE, IN_ENGINES if in_engines else ARTIFACT))
    base.release()
    model.release()
    if options.tasks:
        protocol = tasks.protocol(options.tasks)
        for side, name, folder in (("baseline", SOURCE, source.checkpoint.folder), ("compressed", ARTIFACT, artifact)):
            result[side]["tasks"] = kept.figures("tasks", (name,), protocol, partial(tasks.run, folder, options.tasks, source))
    return result


def alone(layout: Layout, options: Evaluation, tokenizer: Tokenizer, progress: Progress) -> dict[str, Any]:
    """One model, compressed or not, on its own."""
    model = Model(layout)
    if options.tasks and model.left_out:
        left_out = " and ".join(model.left_out)
        raise InputError.one("tasks", f"lm-eval runs the model in transformers, which leaves its {left_out} out", "leave the tasks out")
    if options.tasks and layout.wrapped_as:
        raise InputError.one(
            "tasks", f"lm-eval runs the model in transformers, which refuses what config.json calls {layout.wrapped_as}", "leave the tasks out"
        )
    both = _measure(model, model, options, tokenizer, progress, NOTHING, (SOURCE, SOURCE))
    model.release()
    result = {"protocol": both["protocol"], **both["baseline"]}
    if options.tasks:
        result["tasks"] = tasks.run(layout.checkpoint.folder, options.tasks, layout)
    return result


def _measure(
    base: Model, model: Model, options: Evaluation, tokenizer: Tokenizer, progress: Progress, kept: Kept, of: tuple[str, str]
) -> dict[str, Any]:
    samples, pairs = read(options, tokenizer, base.layout)
    finished = 0

    def advance() -> None:
        nonlocal finished
        finished += 1
        progress.done(finished)

    scores = scoring.compare(base, model, samples, advance, kept, of)
    protocol = scoring.protocol(samples, options.context, model.dtype, scores)
    scored = scoring.compare(base, model, pairs, kept=kept, of=of) if pairs else None
    base_correct, correct = _accuracy(samples, scores, pairs, scored, protocol)
    figures = {
        "perplexity_ratio": scoring.perplexity(scores.loss) / scoring.perplexity(scores.base_loss),
        "kl": float(scores.kl.double().mean()),
        "top1_agreement": float(scores.agree.double().mean()),
        "accuracy_drop": float(base_correct.double().mean() - correct.double().mean()),
    }
    return {
        **({"modalities": [asdict(lost) for lost in scores.modalities]} if scores.modalities else {}),
        "protocol": protocol,
        "baseline": {"perplexity": scoring.perplexity(scores.base_loss), "accuracy": float(base_correct.double().mean())},
        "compressed": {
            "perplexity": scoring.perplexity(scores.loss),
            "accuracy": float(correct.double().mean()),
            "kl": figures["kl"],
            "top1_agreement": figures["top1_agreement"],
        },
        "figures": figures,
        "intervals": scoring.intervals(scores, base_correct, correct),
    }


def _accuracy(
    samples: Samples, scores: scoring.Scores, pairs: Samples | None, scored: scoring.Scores | None, protocol: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Right or wrong, before and after, in the sense that the data allow, of which `pairs` are ``scored``; `protocol` is told which."""
    if pairs and scored:
        protocol["accuracy"] = f"share of the {len(pairs.items) // 2} pairs of {pairs.source} whose good sentence has the higher probability"
        return scoring.preferred(scored, scored.base_loss), scoring.preferred(scored, scored.loss)
    if any(item.extra for item in samples.items):
        protocol["accuracy"] = "share of questions answered exactly"
        return scoring.answered(scores, scores.base_right), scoring.answered(scores, scores.right)
    protocol["accuracy"] = "share of tokens predicted right"
    return scores.base_right, scores.right
