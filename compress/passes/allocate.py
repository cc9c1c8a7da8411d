"""Choose how many bits each part of the model gets, so that the loss predicted within a budget is least.

A unit is what must be stored alike: the linears of one input group, which engines fuse, or all experts. What it costs to store it in each of
the options is measured on weights rounded by the passes that will round them, and of all combinations within the budget the one with the least
sum is taken.
Passes behind this one that say `bits: allocated` then round as chosen. `plan.json` in the artifact holds sizes, scores and choices;
`compress allocate` solves it for another budget, and `reuse` takes it, edited or not.

Scores: `kl`, how far the model diverges from the original when one unit differs from the rest, which is rounded too, to the uniform bits
nearest to the budget. `taylor`, `pqi` and `deltaloss`, the sum of |gradient x rounding error|, the gradient taken at the original weights, half
way, and at the rounded ones: one pass backward, or one per option, where `kl` needs a pass forward per unit and option.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self, TypeGuard

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from compress import allocation
from compress.allocation import KINDS, Allocation, Budget, Origin, Rest, Unit
from compress.errors import InputError, Problems
from compress.layout import Layout, Linear
from compress.passes.base import Bits, Quantize, QuantizesCache, Refining, Transform
from compress.passes.base import Pass as AnyPass
from compress.scheme import Scheme, dense_bytes, output_bytes
from compress.source import local

if TYPE_CHECKING:
    from torch import Tensor

    from compress.block import Block
    from compress.calibrate import Workspace
    from compress.data import Samples
    from compress.model import Model
    from compress.sensitivity import Rounder

ALONG = {"taylor": 0.0, "pqi": 0.5, "deltaloss": 1.0}
"""Where on the way to the rounded weights gradients are taken."""
SCORES = ("kl", *ALONG)
SAMPLES, ROUNDS = 16, 1
UNIFORM = "uniform"
"""The candidate that gives every unit the same bits."""

Scores = Annotated[tuple[str, ...], BeforeValidator(lambda value: [value] if isinstance(value, str) else value), Field(min_length=1)]
Choice = tuple[int, ...]
"""Bits of each unit."""


class Pass(Budget):
    """Choose bits for the passes behind it that say `bits: allocated`."""

    stage: ClassVar[str] = "allocate"

    options: tuple[Bits, ...] | None = Field(
        default=None, min_length=1, description="bits to choose among, such as `[2, 3, 4]`; needed but for `reuse`"
    )
    score: Scores | None = Field(
        default=None,
        description="`kl`, `taylor`, `pqi`, `deltaloss` or a list: the choice by each, and uniform bits if they fit, are tried, "
        "and the one that diverges least is kept; with `reuse`, one that the plan holds; `null`: `kl`, or the one that the plan went by",
    )
    rounds: int | None = Field(
        default=None, ge=0, description="how often to measure `kl` again around the best choice so far and to choose anew; `null`: once"
    )
    samples: int | None = Field(default=None, ge=1, description="sequences of the calibration data to measure on; `null`: 16")
    rounding: Literal["recipe", "nearest"] | None = Field(
        default=None,
        description="what is measured: weights as the passes behind round them, each of which runs once per option (`recipe`), or rounded to nearest "
        "on searched scales (`nearest`), which is quick but misjudges passes that make good for errors; `null`: `recipe`",
    )
    reuse: str | None = Field(
        default=None,
        min_length=1,
        description="a plan file: its scores are taken instead of measured ones, and without a budget its bits as they stand",
    )

    _steps: tuple[AnyPass, ...] = PrivateAttr(())

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.reuse is None:
            if not set(self.score or ()) <= set(SCORES):
                raise ValueError(f"scores are {', '.join(SCORES)}")
            if self.options is None:
                raise ValueError("needs options, the bits to choose among, such as [2, 3, 4]")
            if self.kind is None:
                raise ValueError(f"needs a budget: one of {', '.join(KINDS)}")
        elif taken := [key for key in ("options", "rounds", "samples", "rounding") if getattr(self, key) is not None]:
            raise ValueError(f"{' and '.join(taken)} cannot be given with reuse: they are those of the plan")
        elif self.score is not None and len(self.score) > 1:
            raise ValueError("takes one score with reuse, since nothing is measured")
        return self

    @property
    def needs_data(self) -> bool:
        return self.reuse is None

    def among(self, steps: Sequence[AnyPass]) -> Self:
        copy = self.model_copy()
        copy._steps = tuple(steps)
        return copy

    def files(self) -> list[Path]:
        return [local(self.reuse)] if self.reuse else []

    def sequences(self, layout: Layout) -> int:
        if self.reuse:
            return 0
        options, units = len(self._options()), len(_units(layout, self._taken(layout)))
        kinds, rounds = self.score or ("kl",), ROUNDS if self.rounds is None else self.rounds
        around = units * (options - 1) / 2  # a unit costs the blocks from its own on: half of them
        gradients = {"taylor": 4, "pqi": 4 * options, "deltaloss": 4 * options}
        forwards = sum(around if kind == "kl" else gradients[kind] for kind in kinds) + rounds * around + len(kinds) + rounds + 2
        return math.ceil((self.samples or SAMPLES) * forwards)

    @property
    def trials(self) -> int:
        return 0 if self.reuse or self.rounding == "nearest" else len(self._options())

    def plan(self, layout: Layout) -> dict[str, Scheme]:
        return {}

    def examples(self, layout: Layout) -> list[dict[str, int]]:
        options, units = self._options(), _units(layout, self._taken(layout))
        everywhere = [{linear.name: bits for linears in units.values() for linear in linears} for bits in reversed(options)]
        mixed = {linear.name: options[place % len(options)] for place, linears in enumerate(units.values()) for linear in linears}
        return [*everywhere, mixed]

    def check(self, place: str, layout: Layout, problems: Problems) -> None:
        if not self._taken(layout):
            problems.add(place, "chooses bits that no pass behind it takes", "set bits: allocated in a pass that quantises")
            return
        try:
            plan = self._reused(place, layout) if self.reuse else self._draft(layout)
            if self.kind:
                plan.refuse_too_small(self._budget, place)
        except InputError as error:
            problems.absorb(error)

    def run(self, model: Model, samples: Samples, workspace: Workspace) -> None:
        from compress.state import write_state_text

        path = workspace.folder / allocation.FILE
        if not path.exists():
            plan = self._reused("allocate", model.layout) if self.reuse else self._measured(model, samples, workspace)
            allocation.write(plan, path, write_state_text)

    # What is chosen among -------------------------------------------------------------------------------------------------------

    @property
    def _budget(self) -> Budget:
        return Budget.model_validate({key: getattr(self, key) for key in Budget.model_fields})

    def _options(self) -> tuple[int, ...]:
        return allocation.read(self.files()[0]).options if self.reuse else tuple(sorted(set(self.options or ())))

    def _taken(self, layout: Layout) -> set[str]:
        """The linears that wait for bits, by name."""
        return {name for step in self._steps if _waits(step) for name in step.takes(layout)}

    def _plan(self, layout: Layout) -> dict[str, Scheme]:
        """How every linear will be stored if those that wait get the fewest bits."""
        plan: dict[str, Scheme] = {}
        fewest = dict.fromkeys(self._taken(layout), self._options()[0])
        for step in self._steps:
            plan |= (step.given(fewest) if _waits(step) else step).plan(layout)
            if isinstance(step, Refining):
                plan |= step.refine("", plan, Problems())
        return plan

    def _draft(self, layout: Layout) -> Allocation:
        """Units with their sizes, before anything is measured."""
        plan, options = self._plan(layout), self._options()
        units = tuple(
            Unit(
                name=name,
                bits=options[0],
                linears=tuple(linear.name for linear in linears),
                weights=sum(linear.rows * linear.columns for linear in linears),
                read=_share_read(layout, linears[0].name),
                bytes={bits: sum(_stored_bytes(layout, linear, _with_bits(plan[linear.name], bits)) for linear in linears) for bits in options},
                scores={},
            )
            for name, linears in _units(layout, self._taken(layout)).items()
        )
        origin = Origin(source={}, calibration="", sequences=0)
        rest = self._rest(layout, plan, sum(unit.bytes[options[0]] for unit in units))
        return Allocation(options=options, budget=self._budget, score="", offsets={}, measured={}, origin=origin, rest=rest, units=units)

    def _rest(self, layout: Layout, plan: Mapping[str, Scheme], units: int) -> Rest:
        """What the artifact holds beside the bytes of the `units`. A head that a pass unties from the embedding is read in its place."""
        cache = next((step.cache() for step in self._steps if isinstance(step, QuantizesCache)), None)
        added = sum(step.added_bytes(layout) for step in self._steps if isinstance(step, Transform))
        total = output_bytes(layout, plan, cache) + added - units
        taken, unread = self._taken(layout), 0.0
        for name, info in layout.checkpoint.tensors.items():
            module = name.removesuffix(".weight")
            if module not in taken:
                linear = layout.linears.get(module)
                count = _stored_bytes(layout, linear, plan[module]) if linear and module in plan else info.nbytes
                untied = module == layout.arch.outside.embedding[0] and added > 0
                unread += count * (1.0 if untied else 1 - _share_read(layout, module))
        return Rest(bytes=total, read=total - unread)

    def _reused(self, place: str, layout: Layout) -> Allocation:
        """A plan from its file, with sizes as they are here. Raises `InputError` if it is of another model."""
        plan, draft = allocation.read(self.files()[0]), self._draft(layout)
        theirs, ours = ({(unit.name, unit.linears, unit.weights) for unit in each.units} for each in (plan, draft))
        missing, strange = sorted(name for name, *_ in ours - theirs), sorted(name for name, *_ in theirs - ours)
        if missing or strange:
            what = f"does not plan {', '.join(missing[:3])} as they are" if missing else f"plans {', '.join(strange[:3])}, which is no unit"
            raise InputError.one(f"{place}: reuse", f"{self.reuse} {what} in this model and recipe", "measure anew: give options and score instead")
        known = {unit.name: unit for unit in plan.units}
        units = tuple(unit.model_copy(update={"bits": known[unit.name].bits, "scores": known[unit.name].scores}) for unit in draft.units)
        plan = plan.model_copy(update={"units": units, "rest": draft.rest})
        if self.kind is None:
            return plan
        return plan.solved(self._budget, self.score[0] if self.score else None, place)

    # Scores and candidates ------------------------------------------------------------------------------------------------------

    def _measured(self, model: Model, samples: Samples, workspace: Workspace) -> Allocation:
        from compress.data import Samples
        from compress.sensitivity import Measurements

        rounded = self._nearest(model.layout) if self.rounding == "nearest" else self._by_recipe(model, samples, workspace)
        few = Samples(samples.source, samples.items[: self.samples or SAMPLES])
        origin = Origin(source=workspace.source, calibration=few.digest, sequences=len(few.items))
        plan = self._draft(model.layout).model_copy(update={"origin": origin})
        units = [unit.linears for unit in plan.units]
        measured = Measurements(model, few, units, plan.options, rounded, workspace.folder, workspace.progress.blocks)
        candidates: dict[str, Choice] = {}
        if uniform := plan.largest_uniform(self._budget):
            candidates[UNIFORM] = uniform

        def consider(name: str, offset: float, scores: Sequence[Mapping[int, float]]) -> None:
            nonlocal plan
            plan = plan.with_scores(name, offset, scores)
            candidates[name] = plan.solved(self._budget, name, "allocate").chosen

        for kind in self.score or ("kl",):
            if kind == "kl":
                consider(kind, *measured.around(plan.nearest_uniform(self._budget)))
            else:
                consider(kind, 0.0, measured.influences(ALONG[kind]))
        for number in range(ROUNDS if self.rounds is None else self.rounds):
            consider(f"round {number + 1}", *measured.around(candidates[_best(measured.divergences(candidates))]))
        found = measured.divergences(candidates)
        best = _best(found)
        return plan.with_bits(candidates[best]).model_copy(update={"score": best, "measured": found})

    def _nearest(self, layout: Layout) -> Rounder:
        """Plain rounding on searched scales."""
        schemes = self._plan(layout)

        def rounded(block: Block, linear: Linear, bits: int) -> Tensor:
            return _rounded(block, linear, _with_bits(schemes[linear.name], bits))

        return rounded

    def _by_recipe(self, model: Model, samples: Samples, workspace: Workspace) -> Rounder:
        """What the passes that wait for bits make of the weights, each option given to all units in a run of its own."""
        trials = {bits: self._trial(model, samples, workspace, bits) for bits in self._options()}

        def rounded(block: Block, linear: Linear, bits: int) -> Tensor:
            return trials[bits].dense(linear.name).to(model.device).float()

        return rounded

    def _trial(self, model: Model, samples: Samples, workspace: Workspace, bits: int) -> Model:
        everywhere = dict.fromkeys(self._taken(model.layout), bits)
        for number, step in enumerate(filter(_waits, self._steps)):
            folder = workspace.folder / f"trial-{bits}-{number}"
            folder.mkdir(exist_ok=True)
            trial = replace(workspace, folder=folder)
            step.alone().given(everywhere).run(model, samples, trial)
            model = model.adopting(trial.block_file(block.index) for block in model.blocks)
        return model


def _with_bits(scheme: Scheme, bits: int) -> Scheme:
    return scheme.model_copy(update={"bits": bits})


def _best(divergences: Mapping[str, float]) -> str:
    """The candidate that diverges least, the first of several."""
    return min(divergences, key=divergences.__getitem__)


def _waits(step: AnyPass) -> TypeGuard[Quantize]:
    """Whether a pass leaves bits to be allocated."""
    return isinstance(step, Quantize) and step.bits == "allocated"


def _units(layout: Layout, taken: Set[str]) -> dict[str, list[Linear]]:
    """The linears that are stored alike, in the order in which data flows, by the name of the unit; those that nobody takes are left out."""
    fused: dict[str, list[Linear]] = {}
    for block in layout.blocks:
        for stage in block.stages:
            for group in stage.groups:
                # transformers unpacks the experts of all blocks by one scheme.
                name = f"{block.prefix}.{stage.name}" if group.expert is None else "experts"
                fused.setdefault(name, []).extend(linear for linear in group.linears if linear.name in taken)
    return {name: linears for name, linears in fused.items() if linears}


def _rounded(block: Block, linear: Linear, scheme: Scheme) -> Tensor:
    """The weight [out, in] float32 by plain rounding on searched scales."""
    from compress.numerics.grid import quantized, round_to_nearest, search_scales

    weight = block.weight(linear.name)
    grid, stored = scheme.grid(float(weight.abs().max())), scheme.stored(block.stored_dtype(linear.name))
    scales = search_scales(weight, grid, scheme.group_size, stored)
    return quantized(round_to_nearest(weight, scales, grid), scales, grid, stored).dequantize().float()


def _stored_bytes(layout: Layout, linear: Linear, scheme: Scheme) -> int:
    """Codes, scales, zero points and residuals."""
    return scheme.stored_bytes(linear, dense_bytes(layout, linear.name)) - scheme.shape_bytes


def _share_read(layout: Layout, module: str) -> float:
    """How much of a module's weights is read to decode one token of text: of the experts those that are routed to, of an embedding a row."""
    arch = layout.arch
    if module.startswith(f"{arch.blocks}."):
        if arch.experts is None or f".{arch.experts.prefix}." not in module:
            return 1.0
        count = max(len(stage.groups) for block in layout.blocks for stage in block.stages)
        return min(1.0, int(layout.text_config.get("num_experts_per_tok") or count) / count)
    if module == arch.outside.embedding[0]:
        return float(f"{arch.outside.head[0]}.weight" not in layout.checkpoint.tensors)
    return float(module in (arch.outside.norm[0], arch.outside.head[0]))
