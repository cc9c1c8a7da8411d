"""How much the loss of a model that sees depends on its vision tokens, and how much on its text: MBQ (arXiv 2412.19509, section 4).

An error in what attention or an MLP adds to the residual stream changes the loss, to first order, by the gradient there times the error. Of vision
tokens there are many, and the gradient there is often smaller by far, so a search that counts every token alike looks after the wrong ones. The
balance of a submodule is the ratio of the mean magnitudes of the gradient, over vision tokens and over all others.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress.backsweep import backsweep, none
from compress.data import Samples
from compress.errors import InputError
from compress.layout import BlockLayout
from compress.model import Model
from compress.state import write_state_text

KEPT = "balance.json"


@dataclass(frozen=True)
class Sensitivity:
    """Mean magnitude of the gradient of the mean loss in an element of what a submodule gives, over ``vision`` tokens and over ``text``."""

    vision: float
    text: float

    @property
    def ratio(self) -> float:
        """What an error at a vision token counts, one at a token of text counting 1."""
        return self.vision / self.text if self.text else 1.0


class Balance:
    """What vision tokens count, by linear that writes to the residual stream.

    After the last attention no token of an image reaches the loss, so its gradient there says nothing of it: no ratio is taken to be smaller than the
    median over the blocks, of attention and of MLPs apart.
    """

    def __init__(self, found: Mapping[str, Sensitivity], last: Callable[[str], str]) -> None:
        self.found = dict(found)
        kinds: dict[str, list[float]] = {}
        for name, each in self.found.items():
            kinds.setdefault(last(name), []).append(each.ratio)
        floors = {kind: statistics.median(ratios) for kind, ratios in kinds.items()}
        self.ratios = {name: max(each.ratio, floors[last(name)]) for name, each in self.found.items()}

    def weights(self, vision: Tensor, linear: str, block: BlockLayout) -> Tensor:
        """[rows, tokens] float32, what each token counts for the submodule of `block` that a linear is part of; ``vision`` bool [rows, tokens].

        A submodule ends with the next linear that writes to the residual stream.
        """
        order = [each.name for each in block.linears]
        writer = next(name for name in order[order.index(linear) :] if name in self.ratios)
        return torch.where(vision, self.ratios[writer], 1.0)


def measure(model: Model, samples: Samples, folder: Path, advance: Callable[[], None] = lambda: None) -> Balance:
    """The balance of a model's submodules on `samples`, for one pass forward and one back; kept in `folder`.

    Raises `InputError` for samples without images, or of which no one says which tokens stand for images.
    """
    check(samples)
    path = folder / KEPT
    if not path.exists():
        found = sensitivities(model, samples, folder, advance)
        write_state_text(path, json.dumps({name: asdict(each) for name, each in found.items()}))
    found = {name: Sensitivity(**each) for name, each in json.loads(path.read_text()).items()}
    return Balance(found, lambda name: name.rpartition(".")[2])


def check(samples: Samples) -> None:
    """Raise `InputError` for samples of which not both modalities can be told."""
    if samples.vision_tokens is None:
        what = "the model's processor does not say which tokens stand for images (it gives no mm_token_type_ids)"
        raise InputError.one(f"calibration: data: {samples.source}", what, "leave the balance of modalities out")
    if not samples.vision_tokens:
        what = "has no images, so there is nothing to balance text with"
        raise InputError.one(
            f"calibration: data: {samples.source}", what, "give images with questions, such as demo:images, or leave the balance out"
        )


def sensitivities(model: Model, samples: Samples, folder: Path, advance: Callable[[], None] = lambda: None) -> dict[str, Sensitivity]:
    """By linear that writes to the residual stream, outside experts."""
    vision = [batch.vision.to(model.device) for batch in samples.batches()]
    writers = {name for layout in model.blocks for name in layout.writers if name not in model.layout.of_experts}
    sums: dict[str, list[float]] = {}

    def note(name: str, batch: int, gradient: Tensor) -> None:
        if name in writers:
            magnitude = gradient.abs().mean(-1, dtype=torch.float64).view(vision[batch].shape)
            so_far = sums.setdefault(name, [0.0, 0.0])
            so_far[0] += float(magnitude[vision[batch]].sum())
            so_far[1] += float(magnitude[~vision[batch]].sum())

    for _ in backsweep(model, samples, folder, none, note, advance):
        pass
    seen = sum(int(each.sum()) for each in vision)
    other = sum(each.numel() for each in vision) - seen
    return {name: Sensitivity(sums[name][0] / max(1, seen), sums[name][1] / max(1, other)) for name in sorted(sums)}
