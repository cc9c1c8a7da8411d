"""ReQuant's detaching (arXiv 2503.01901): the few weights whose rounding costs most get a residual beside their code.

What the rounding of a weight costs is its part in the change of the model's loss: its change times the mean gradient along the path from the
weights before to those after (PQI). The codes stay as they are, so without its residuals the artifact is the one that would have been
made without this pass. If the residuals do not lower the loss on the calibration data, none are stored, and that is recorded.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from compress.errors import Problems
from compress.layout import Layout
from compress.passes.base import Scheme

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from compress.attribution import Attribution
    from compress.calibrate import Progress, Workspace
    from compress.data import Samples
    from compress.model import Block, Model

    Scores = Callable[[Block], dict[str, Tensor]]
    """What each weight of a block did to the loss, signed, [out, in] float32 by linear."""

POINTS = (2, 4, 8)
"""On the path: the fewest whose contributions are complete."""
COMPLETE, NEGLIGIBLE = 0.03, 1e-4
"""How far contributions may add up to something else than the change of the loss: as a share of it, and in nats."""
ENDS = {"taylor": 0.0, "deltaloss": 1.0}
"""Where on the path the one gradient of a score is taken."""


@dataclass(frozen=True)
class Choice:
    """Weights whose part in the loss is at least ``threshold``, by ``points`` on the path, get a residual; ``record`` is for the report."""

    points: int
    threshold: float
    record: dict[str, Any]


class Pass(BaseModel):
    """Store residuals for the weights whose rounding costs most."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    stage: ClassVar[str] = "quantize"

    share: float = Field(
        default=0.005, gt=0, le=0.1, description="share of all weights quantised so far that get a residual, each of 4 bytes in a model of 16 bits"
    )
    score: Literal["pqi", "deltaloss", "taylor", "random"] = Field(
        default="pqi",
        description="which: by their part in the change of the loss (`pqi`), by their change times the gradient after (`deltaloss`) or before "
        "(`taylor`) quantising, or any (`random`, to compare with)",
    )

    @property
    def needs_data(self) -> bool:
        return True

    def check(self, place: str, layout: Layout, problems: Problems) -> None:
        """Nothing can be wrong with the layout alone."""

    def plan(self, layout: Layout) -> dict[str, Scheme]:
        return {}

    def refine(self, place: str, schemes: dict[str, Scheme], problems: Problems) -> dict[str, Scheme]:
        if not schemes:
            problems.add(place, "no linear is quantised before it", "put it behind the passes that quantise")
        if any(scheme.residuals for scheme in schemes.values()):
            problems.add(place, "a pass before it has stored residuals already", "give that one a larger share")
        return {name: scheme.model_copy(update={"residuals": self.share}) for name, scheme in schemes.items()}

    def run(self, model: Model, samples: Samples, workspace: Workspace) -> None:
        from compress.calibrate import Workspace, walk

        bar = _Bar(workspace.progress, len(model.blocks))
        choice = self._choose(model, samples, workspace.folder, bar)
        scores = self._scores(workspace.folder, choice.points)
        for block in walk(model, Workspace(workspace.folder, bar)):
            if block.layout.index == 0:
                block.add_record("detach", choice.record)
            if choice.record["fallback"] is None:
                for linear, positions in _positions(scores(block), choice.threshold).items():
                    block.set_residual(linear, positions, {"pass": "detach"})

    def _choose(self, model: Model, samples: Samples, folder: Path, bar: _Bar) -> Choice:
        """Which weights, if any: found once, so that a run that is continued comes to the same."""
        from compress.backsweep import mean_loss
        from compress.checkpoint import write_text

        path = folder / "choice.json"
        if path.exists():
            return Choice(**json.loads(path.read_text(encoding="utf-8")))
        exact = mean_loss(model, samples, lambda block: {name: before for name, (before, _) in _ends(block).items()}, bar.advance)
        coded = mean_loss(model, samples, advance=bar.advance)
        for points in POINTS if self.score == "pqi" else (1,):
            if self.score != "random":
                self._attribution(folder, points).measure(model, samples, bar.advance)
            scores = self._scores(folder, points)
            total, threshold = _survey(model, scores, self.share, bar.advance)
            if abs(total - (coded - exact)) <= max(COMPLETE * abs(coded - exact), NEGLIGIBLE):
                break
        restored = mean_loss(model, samples, lambda block: _restored(block, scores(block), threshold), bar.advance)
        record = {
            "pass": "detach",
            "score": self.score,
            "points": points,
            "completeness": total / (coded - exact) if self.score == "pqi" else None,
            "loss": {"before": exact, "quantised": coded, "with residuals": restored},
            "fallback": None if restored < coded else f"residuals would have taken the calibration loss from {coded:.6f} to {restored:.6f}",
        }
        write_text(path, json.dumps(asdict(choice := Choice(points, threshold, record))))
        return choice

    def _attribution(self, folder: Path, points: int) -> Attribution:
        from compress.attribution import Attribution
        from compress.numerics.quadrature import gauss_legendre

        places = [(ENDS[self.score], 1.0)] if self.score in ENDS else gauss_legendre(points)
        return Attribution(folder / f"path-{points}", _ends, places)

    def _scores(self, folder: Path, points: int) -> Scores:
        return _random if self.score == "random" else self._attribution(folder, points).of


class _Bar:
    """Progress of a pass that visits the blocks many times over."""

    def __init__(self, progress: Progress, blocks: int) -> None:
        self._progress, self._done, self._total = progress, 0, (5 + 2 * POINTS[0]) * blocks

    def advance(self) -> None:
        """One more visit."""
        self._done += 1
        self._progress.blocks(self._done, max(self._done, self._total))

    def blocks(self, done: int, total: int) -> None:
        self.advance()


def _ends(block: Block) -> dict[str, tuple[Tensor, Tensor]]:
    """Every quantised linear as it was before and as it is now."""
    return {linear.name: (block.exact(linear.name), block.weight(linear.name)) for linear in block.layout.linears if block.is_quantized(linear.name)}


def _random(block: Block) -> dict[str, Tensor]:
    import torch

    scores = {}
    for name, (before, _) in _ends(block).items():
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]))
        scores[name] = torch.rand(before.shape, generator=generator).to(before.device)
    return scores


def _survey(model: Model, scores: Scores, share: float, advance: Callable[[], None]) -> tuple[float, float]:
    """The sum of all scores, and the least magnitude among the given share of all that are the largest."""
    import torch

    total, largest = 0.0, torch.empty(0, device=model.device)
    count = max(1, int(share * sum(linear.rows * linear.columns for name, linear in model.layout.linears.items() if name in model.exact)))
    for layout in model.blocks:
        with model.block(layout.index) as block:
            for score in scores(block).values():
                total += float(score.sum(dtype=torch.float64))
                largest = torch.cat([largest, score.abs().flatten()])
                largest = largest.topk(min(count, len(largest)), sorted=False).values
        advance()
    return total, float(largest.min())


def _positions(scores: dict[str, Tensor], threshold: float) -> dict[str, Tensor]:
    """Which weights [out, in] bool get a residual, by linear; by magnitude: parts with opposite signs make good for each other."""
    return {name: (score.abs() >= threshold) & (score != 0) for name, score in scores.items()}


def _restored(block: Block, scores: dict[str, Tensor], threshold: float) -> dict[str, Tensor]:
    return {name: block.restored(name, positions) for name, positions in _positions(scores, threshold).items()}
