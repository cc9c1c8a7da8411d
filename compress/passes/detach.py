"""ReQuant's detaching (arXiv 2503.01901): the few weights whose rounding costs most get a residual beside their code.

What the rounding of a weight costs is its part in the change of the model's loss: its change times the mean gradient along the path from the
weights before to those after (PQI). The paper puts these weights back to what they were. Where the errors of a row make good for each other, as
after GPTQ, that does harm, so here their values are fitted: to those with which the outputs of the linear lose least on the calibration data.

Codes stay as they are, so without its residuals the artifact is the one that would have been made without this pass. If the residuals do not
lower the loss on the calibration data, none are stored, and that is recorded.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compress.errors import Problems
from compress.layout import Layout
from compress.options import Options
from compress.scheme import Scheme

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from compress.attribution import Attribution
    from compress.block import Block
    from compress.calibrate import Progress, Workspace
    from compress.data import Samples
    from compress.model import Model

    Scores = Callable[[Block], dict[str, Tensor]]
    """What each weight of a block did to the loss, signed, [out, in] float32 by linear."""

POINTS = (2, 4, 8)
"""On the path: the fewest whose contributions are complete."""
COMPLETE, NEGLIGIBLE = 0.03, 1e-4
"""How far contributions may add up to something else than the change of the loss: as a share of it, and in nats."""
DAMP = 0.01
"""Of fitted values, towards what they were; a share of the mean of the Hessian's diagonal."""
ENDS = {"taylor": 0.0, "deltaloss": 1.0}
"""Where on the path the one gradient of a score is taken."""


@dataclass(frozen=True)
class Choice:
    """Weights with at least ``threshold`` of a score, by ``points`` on the path, get a residual.

    ``before`` and ``after`` quantising are losses, nats; ``total`` is what the scores of all weights add up to.
    """

    points: int
    threshold: float
    before: float
    after: float
    total: float

    def positions(self, score: Tensor) -> Tensor:
        """Where in a linear, bool. By magnitude: parts with opposite signs make good for each other."""
        return (score.abs() >= self.threshold) & (score != 0)


class Pass(Options):
    """Store residuals for the weights whose rounding costs most."""

    stage: ClassVar[str] = "quantize"

    share: float = Field(
        default=0.005, gt=0, le=0.1, description="share of all weights quantised so far that get a residual, each of 4 bytes in a model of 16 bits"
    )
    score: Literal["pqi", "deltaloss", "taylor", "random"] = Field(
        default="pqi",
        description="which: by their part in the change of the loss (`pqi`), by their change times the gradient after (`deltaloss`) or before "
        "(`taylor`) quantising, or any (`random`, to compare with)",
    )
    values: Literal["fitted", "restored"] = Field(
        default="fitted",
        description="what becomes of them: the values with which outputs lose least (`fitted`), or what they were (`restored`, as in the paper)",
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

    @property
    def forwards(self) -> float:
        """Losses before and after and with residuals; there and back with recomputation for each point; the statistics of fitting."""
        points = {"pqi": POINTS[0], "random": 0}.get(self.score, 1)
        return 3 + 4 * points + 2.5 * (self.values == "fitted")

    def run(self, model: Model, samples: Samples, workspace: Workspace) -> None:
        from compress.backsweep import mean_loss
        from compress.calibrate import Workspace, walk

        bar = _Bar(workspace.progress, len(model.blocks))
        choice = self._choose(model, samples, workspace.folder, bar)
        trial = Workspace(workspace.folder / "trial", bar)
        trial.folder.mkdir(exist_ok=True)
        self._try(model, samples, trial, choice)
        better = model.adopting(trial.block_file(layout.index) for layout in model.blocks)
        restored = mean_loss(better, samples, advance=bar.advance)
        rises = None if restored < choice.after else f"residuals would take the calibration loss from {choice.after:.6f} to {restored:.6f}"
        for block in walk(model, Workspace(workspace.folder, bar)):
            if block.layout.index == 0:
                block.add_record("detach", self._record(choice, restored) | {"fallback": rises})
            for linear in block.layout.linears:
                if not rises and (residual := better.residual(linear.name)):
                    block.set_residual(linear.name, residual, {"pass": "detach"})

    def _choose(self, model: Model, samples: Samples, folder: Path, bar: _Bar) -> Choice:
        """Which weights; found once, so that a run that is continued comes to the same."""
        from compress.backsweep import mean_loss
        from compress.state import write_state_text

        path = folder / "choice.json"
        if path.exists():
            return Choice(**json.loads(path.read_text(encoding="utf-8")))
        before = mean_loss(model, samples, lambda block: {name: exact for name, (exact, _) in _ends(model, block).items()}, bar.advance)
        after = mean_loss(model, samples, advance=bar.advance)
        for points in POINTS if self.score == "pqi" else (1,):
            if self.score != "random":
                self._attribution(model, folder, points).measure(model, samples, bar.advance)
            total, threshold = _survey(model, self._scores(model, folder, points), self.share, bar.advance)
            if abs(total - (after - before)) <= max(COMPLETE * abs(after - before), NEGLIGIBLE):
                break
        choice = Choice(points, threshold, before, after, total)
        write_state_text(path, json.dumps(asdict(choice)))
        return choice

    def _try(self, model: Model, samples: Samples, workspace: Workspace, choice: Choice) -> None:
        """Leave every block with its residuals in `workspace`."""
        from compress.calibrate import sweep, walk
        from compress.numerics.sparse import least_error

        scores = self._scores(model, workspace.folder.parent, choice.points)
        if self.values == "restored":
            for block in walk(model, workspace):
                for name, score in scores(block).items():
                    block.set_residual(name, block.residual(name, block.exact(name), choice.positions(score)), {})
            return
        index = -1
        of_block: dict[str, Tensor] = {}
        for inputs in sweep(model, samples, workspace, lambda group: any(linear.name in model.exact for linear in group.linears)):
            block = inputs.block
            if block.layout.index != index:
                index, of_block = block.layout.index, scores(block)
            for group, hessian in zip(inputs.groups, inputs.hessian, strict=True):
                for name in [linear.name for linear in group.linears if linear.name in model.exact]:
                    exact, positions = block.exact(name), choice.positions(of_block[name])
                    weight = exact + least_error(block.weight(name) - exact, positions, hessian, DAMP)
                    block.set_residual(name, block.residual(name, weight, positions), {})

    def _record(self, choice: Choice, restored: float) -> dict[str, Any]:
        change = choice.after - choice.before
        return {
            "pass": "detach",
            "score": self.score,
            "points": choice.points,
            "completeness": choice.total / change if self.score == "pqi" and change else None,
            "loss": {"before": choice.before, "quantised": choice.after, "with residuals": restored},
        }

    def _attribution(self, model: Model, folder: Path, points: int) -> Attribution:
        from compress.attribution import Attribution
        from compress.numerics.quadrature import gauss_legendre

        places = [(ENDS[self.score], 1.0)] if self.score in ENDS else gauss_legendre(points)
        return Attribution(folder / f"path-{points}", partial(_ends, model), places)

    def _scores(self, model: Model, folder: Path, points: int) -> Scores:
        return partial(_random, model) if self.score == "random" else self._attribution(model, folder, points).of


class _Bar:
    """Progress of a pass that visits the blocks many times over."""

    def __init__(self, progress: Progress, blocks: int) -> None:
        self._progress, self._done, self._total = progress, 0, (6 + 2 * POINTS[0]) * blocks

    def advance(self) -> None:
        """One more visit."""
        self._done += 1
        self._progress.blocks(self._done, max(self._done, self._total))

    def blocks(self, done: int, total: int) -> None:
        self.advance()

    def note(self, text: str) -> None:
        self._progress.note(text)


def _ends(model: Model, block: Block) -> dict[str, tuple[Tensor, Tensor]]:
    """Every quantised linear as it was before and as it is now."""
    return {linear.name: (block.exact(linear.name), block.weight(linear.name)) for linear in block.layout.linears if linear.name in model.exact}


def _random(model: Model, block: Block) -> dict[str, Tensor]:
    import torch

    scores = {}
    for name, (before, _) in _ends(model, block).items():
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]))
        scores[name] = torch.rand(before.shape, generator=generator).to(before.device) * block.kept(name)
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
