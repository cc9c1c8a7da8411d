"""What was lost: the compressed model beside the original, token by token, on the same text in the same run.

Both models stream block by block, so a comparison needs no more memory than a pass. Gates get confidence intervals from a paired
bootstrap over sequences: both models are resampled together, because their losses on one text rise and fall together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.data import Samples
from compress.evaluate.kept import ARTIFACT, NOTHING, SOURCE, Kept
from compress.model import Model

LOGITS_AT_ONCE = 1024
"""Positions whose logits are held at once; a vocabulary of 128k in float32 makes that half a gigabyte."""
RESAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Lost:
    """Squared error of what a block gives, all before it compressed too, as a share of what it gave: over ``vision`` tokens and over ``text``."""

    block: str
    vision: float
    text: float


@dataclass(frozen=True)
class Scores:
    """Per scored token of sequence ``member`` [tokens]: negative log-likelihood in nats and whether the most likely token is the right
    one, for the original (``base_``) and the compressed model; their divergence and whether they agree."""

    member: Tensor
    base_loss: Tensor
    loss: Tensor
    base_right: Tensor
    right: Tensor
    kl: Tensor
    agree: Tensor
    sequences: int
    modalities: tuple[Lost, ...] = ()
    """By block, of samples with images and models of equally many blocks."""

    def per_sequence(self, values: Tensor) -> Tensor:
        """Sum of per-token `values` over each sequence, float64 [sequences]."""
        return torch.zeros(self.sequences, dtype=torch.float64).index_add_(0, self.member, values.double())


@torch.no_grad()
def last_hidden(model: Model, samples: Samples, advance: Callable[[], None] = lambda: None) -> list[Tensor]:
    """Output of the last block for every batch of `samples`; `advance` is told of each finished block."""
    hidden, kwargs = model.embed_all(batch.inputs for batch in samples.batches())
    model.release()
    for layout in model.blocks:
        with model.block(layout.index) as block:
            for index, each in enumerate(hidden):
                hidden[index] = block.forward(each, kwargs[index][layout.index])
        advance()
    return hidden


def _side_by_side(base: Model, model: Model, samples: Samples, advance: Callable[[], None]) -> tuple[list[Tensor], list[Tensor], tuple[Lost, ...]]:
    """`last_hidden` of both models, and what was lost on the way, by modality."""
    streams, kwargs = zip(*(each.embed_all(batch.inputs for batch in samples.batches()) for each in (base, model)), strict=True)
    vision = [batch.vision.to(base.device) for batch in samples.batches()]
    base.release()
    model.release()
    lost = []
    for before, after in zip(base.blocks, model.blocks, strict=True):
        for which, (each, layout) in enumerate(((base, before), (model, after))):
            with each.block(layout.index) as block:
                block.advance(streams[which], [named[layout.index] for named in kwargs[which]])
            advance()
        shares = []
        for mask in (vision, [~each for each in vision]):
            pairs = [(one[seen].double(), other[seen].double()) for one, other, seen in zip(*streams, mask, strict=True)]
            energy = sum(float(one.square().sum()) for one, _ in pairs)
            shares.append(sum(float((one - other).square().sum()) for one, other in pairs) / (energy or 1.0))
        lost.append(Lost(after.prefix, *shares))
    return streams[0], streams[1], tuple(lost)


def compare(
    base: Model,
    model: Model,
    samples: Samples,
    advance: Callable[[], None] = lambda: None,
    kept: Kept = NOTHING,
    of: tuple[str, str] = (SOURCE, ARTIFACT),
) -> Scores:
    """Run both models over `samples`. Passing the same object twice scores one model alone. What `kept` has, ``of`` models it calls so, is not done
    again."""
    protocol = {"tokens_sha256": samples.digest, "dtype": str(model.dtype)}

    def spared() -> None:
        for _ in (*base.blocks, *model.blocks):
            advance()

    found = kept.tensors("scores", of, protocol, lambda: _compared(base, model, samples, advance, kept, of), spared)
    lost = found.pop("lost").tolist()
    modalities = tuple(Lost(layout.prefix, *shares) for layout, shares in zip(model.blocks, lost, strict=True)) if lost else ()
    return Scores(**found, sequences=len(samples.items), modalities=modalities)


def _hidden(model: Model, samples: Samples, advance: Callable[[], None], kept: Kept, name: str) -> list[Tensor]:
    """`last_hidden`, or what is kept of it."""
    protocol = {"tokens_sha256": samples.digest, "dtype": str(model.dtype)}

    def measure() -> dict[str, Tensor]:
        return {str(index): each for index, each in enumerate(last_hidden(model, samples, advance))}

    def spared() -> None:
        for _ in model.blocks:
            advance()

    found = kept.tensors("hidden", (name,), protocol, measure, spared)
    return [found[str(index)].to(model.device) for index in range(len(found))]


@torch.no_grad()
def _compared(base: Model, model: Model, samples: Samples, advance: Callable[[], None], kept: Kept, of: tuple[str, str]) -> dict[str, Tensor]:
    """The fields of `Scores` that are tensors, and ``lost`` [blocks, 2] float64 as `Lost` says, [0, 2] where that is not told."""
    lost: tuple[Lost, ...] = ()
    if base is not model and len(base.blocks) == len(model.blocks) and any(bool(batch.vision.any()) for batch in samples.batches()):
        base_hidden, hidden, lost = _side_by_side(base, model, samples, advance)
    else:
        base_hidden = _hidden(base, samples, advance, kept, of[0])
        hidden = base_hidden if base is model else _hidden(model, samples, advance, kept, of[1])
    columns: dict[str, list[Tensor]] = {name: [] for name in ("member", "base_loss", "loss", "base_right", "right", "kl", "agree")}
    for batch, base_states, states in zip(samples.batches(), base_hidden, hidden, strict=True):
        # The prediction at a position is of the token after it.
        wanted = batch.scored[:, 1:]
        rows, places = torch.nonzero(wanted, as_tuple=True)
        labels = batch.inputs["input_ids"][:, 1:][wanted].to(base.device)
        members = torch.tensor(batch.members)[rows]
        for start in range(0, len(rows), LOGITS_AT_ONCE):
            part = slice(start, start + LOGITS_AT_ONCE)
            at = (rows[part].to(base.device), places[part].to(base.device))
            before = torch.log_softmax(base.logits(base_states[at]), -1)
            after = before if base is model else torch.log_softmax(model.logits(states[at]), -1)
            label = labels[part, None]
            columns["member"].append(members[part])
            columns["base_loss"].append(-before.gather(1, label)[:, 0].cpu())
            columns["loss"].append(-after.gather(1, label)[:, 0].cpu())
            columns["base_right"].append((before.argmax(-1) == label[:, 0]).cpu())
            columns["right"].append((after.argmax(-1) == label[:, 0]).cpu())
            columns["kl"].append((before.exp() * (before - after)).sum(-1).clamp_min(0).cpu())
            columns["agree"].append((before.argmax(-1) == after.argmax(-1)).cpu())
    shares = torch.tensor([[each.vision, each.text] for each in lost], dtype=torch.float64).view(-1, 2)
    return {name: torch.cat(parts) for name, parts in columns.items()} | {"lost": shares}


def perplexity(loss: Tensor) -> float:
    """exp of the mean loss per token."""
    return float(loss.double().mean().exp())


def answered(scores: Scores, right: Tensor) -> Tensor:
    """Which sequences have every scored token as the most likely one: what greedy decoding would answer exactly, [sequences]."""
    return scores.per_sequence(~right) == 0


def preferred(scores: Scores, loss: Tensor) -> Tensor:
    """Which pairs give the good sentence, the first of each, the higher probability, [pairs]."""
    totals = scores.per_sequence(loss)
    return totals[0::2] < totals[1::2]


def intervals(scores: Scores, base_correct: Tensor, correct: Tensor, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Confidence intervals of each gated figure by paired bootstrap over sequences (and over pairs or answers for accuracy)."""
    generator = torch.Generator().manual_seed(seed)
    count = scores.per_sequence(torch.ones_like(scores.loss))
    difference = scores.per_sequence(scores.loss - scores.base_loss)
    kl, agree = scores.per_sequence(scores.kl), scores.per_sequence(scores.agree)
    drop = base_correct.double() - correct.double()
    samples: dict[str, list[float]] = {"perplexity_ratio": [], "kl": [], "top1_agreement": [], "accuracy_drop": []}
    for _ in range(RESAMPLES):
        chosen = torch.randint(scores.sequences, (scores.sequences,), generator=generator)
        tokens = float(count[chosen].sum())
        if not tokens:
            continue
        samples["perplexity_ratio"].append(float((difference[chosen].sum() / tokens).exp()))
        samples["kl"].append(float(kl[chosen].sum()) / tokens)
        samples["top1_agreement"].append(float(agree[chosen].sum()) / tokens)
        samples["accuracy_drop"].append(float(drop[torch.randint(len(drop), (len(drop),), generator=generator)].mean()))
    tail = (1 - CONFIDENCE) / 2
    return {name: _ends(values, tail) for name, values in samples.items()}


def paired_interval(differences: Tensor, seed: int = 0) -> tuple[float, float]:
    """Confidence interval of the mean of `differences` (float64 [n]) by bootstrap."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(differences), (RESAMPLES, len(differences)), generator=generator)
    return _ends(differences[chosen].mean(1).tolist(), (1 - CONFIDENCE) / 2)


def _ends(values: list[float], tail: float) -> tuple[float, float]:
    ends = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return float(ends[0]), float(ends[1])


def protocol(samples: Samples, context: int, dtype: torch.dtype, scores: Scores) -> dict[str, Any]:
    """Everything needed to measure the same figure again."""
    images = any(item.extra for item in samples.items)
    return {
        "data": samples.source,
        "tokens_sha256": samples.digest,
        "context": max(len(item.ids) for item in samples.items) if images else context,
        "stride": None if images else context,
        "sequences": len(samples.items),
        "tokens_scored": len(scores.loss),
        "bos": "none added",
        "loss": "mean over answer tokens, nats" if images else "mean over all tokens but the first of each window, nats",
        "dtype": str(dtype).removeprefix("torch."),
    }
