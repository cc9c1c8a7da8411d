"""What every quantising pass shares: which linears it takes and what its widths must satisfy."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, Self, runtime_checkable

from pydantic import BaseModel, Field, PrivateAttr, field_validator, model_validator

from compress.errors import InputError, Problems
from compress.layout import CACHED, Group, Layout, Linear
from compress.options import Options
from compress.scheme import FLOAT_FORMATS, Caching, Scheme

if TYPE_CHECKING:
    from compress.block import Block
    from compress.calibrate import Workspace
    from compress.data import Samples
    from compress.model import Model
    from compress.numerics.grid import Quantized
    from compress.numerics.pattern import Pattern

NARROWEST = 32
"""Inputs of the narrowest linear that is quantised: below, the packed width does not tell the bits."""
STAGES = ("restructure", "sparsify", "transform", "allocate", "quantize", "cache")
"""The order in which passes may stand in a recipe."""
WHY = {("sparsify", "quantize"): "what may go is chosen by exact weights, and rounding keeps the zeros"}
"""What is wrong with a pass of the first stage behind one of the second, where the order alone does not tell."""


class Pass(Protocol):
    """A frozen set of options that knows how to apply itself."""

    stage: ClassVar[str]

    @property
    def needs_data(self) -> bool:
        """Whether it runs calibration data through the model."""

    def check(self, place: str, layout: Layout, problems: Problems) -> None:
        """Report everything that can be known before weights load."""

    def plan(self, layout: Layout) -> dict[str, Scheme]:
        """What becomes of each linear it takes."""

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """Its options as plain data."""

    def run(self, model: Model, samples: Samples, workspace: Workspace) -> None:
        """Do it; finished blocks go to the workspace."""


@runtime_checkable
class Differentiating(Protocol):
    """A pass that takes gradients of the model's loss."""

    @property
    def forwards(self) -> float:
        """What it costs, in forward passes of the model over the calibration data."""


@runtime_checkable
class Balancing(Protocol):
    """A pass that may weigh errors at vision tokens against those at text."""

    @property
    def balances(self) -> bool:
        """Whether it does, for which data with images are needed."""


@runtime_checkable
class Allocator(Pass, Protocol):
    """A pass that changes no tensor, but chooses bits for later ones. It leaves the plan in the workspace."""

    def among(self, steps: Sequence[Pass]) -> Self:
        """A copy that knows all passes of the recipe."""

    def files(self) -> list[Path]:
        """The files it goes by, beside model and data."""

    def sequences(self, layout: Layout) -> int:
        """How many sequences it runs through all blocks, for which a pass backward counts twice."""

    @property
    def trials(self) -> int:
        """How often each pass that waits for its bits is run beforehand."""

    def examples(self, layout: Layout) -> list[dict[str, int]]:
        """Some of the bits it may come to, by linear: each option everywhere, from the most on, then a mix of all."""


@runtime_checkable
class QuantizesCache(Protocol):
    """A pass that decides how the KV cache is stored."""

    def cache(self) -> Caching:
        """What becomes of keys and values."""


@runtime_checkable
class Prunes(Protocol):
    """A pass that removes single weights, which all later passes leave removed."""

    @property
    def moves(self) -> bool:
        """Whether it may have outputs change places."""

    def prunes(self, layout: Layout) -> dict[str, Pattern]:
        """What it promises of each linear it takes, by name."""


@runtime_checkable
class LearnsFromPairs(Protocol):
    """A pass that may choose by minimal pairs, by which the result must not be judged then."""

    pairs: str | None
    """Where they are, None for no pairs."""
    first: int | None
    """How many of them, from the first on, None for all."""


@runtime_checkable
class Branching(Protocol):
    """A pass that may put branches beside linears that were pruned."""

    branch: int | None
    """Inputs whose sum a branch reads, None for no branches."""

    @property
    def keeps_branches(self) -> bool:
        """Whether they stay beside the linears."""


Bits = Annotated[int, Field(ge=2, le=8)]


class Selecting(Options):
    """Options of every pass that takes some of the linears."""

    include: tuple[str, ...] = Field(default=(), description="take only linears that match: shell patterns, or `re:` and a regular expression")
    exclude: tuple[str, ...] = Field(default=(), description="leave out linears that match, same patterns")

    @field_validator("include", "exclude")
    @classmethod
    def _compile(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern.removeprefix("re:"))
                except re.error as error:
                    raise ValueError(f"{pattern!r} is no regular expression ({error})") from error
        return patterns

    def wants(self, name: str) -> bool:
        """Whether `include` and `exclude` leave a linear to this pass."""
        wanted = not self.include or any(matches(pattern, name) for pattern in self.include)
        return wanted and not any(matches(pattern, name) for pattern in self.exclude)

    def check_selection(self, place: str, layout: Layout, problems: Problems, among: Iterable[str] = ()) -> None:
        """Report patterns that match nothing: no linear in a block, and none `among` others that it may take."""
        for key in ("include", "exclude"):
            for pattern in getattr(self, key):
                if any(matches(pattern, name) for name in (*layout.linears, *among)):
                    continue
                if outside := next((name for name in layout.outside if matches(pattern, name)), None):
                    tower = next(tower for tower in layout.towers if outside.startswith(tower))
                    what = f"{pattern!r} matches only what lies outside the decoder blocks, such as {outside}"
                    problems.add(f"{place}: {key}", what, f"rtn rounds there what patterns of include ask for that begin with {tower!r}")
                else:
                    problems.add(
                        f"{place}: {key}",
                        f"{pattern!r} matches none of the {len(layout.linears)} linears",
                        f"one of them is {_first(layout.linears)}",
                    )


class Quantize(Selecting):
    """Options of every pass that rounds weights to a grid."""

    stage: ClassVar[str] = "quantize"

    format: Literal["int", "fp8", "fp8-block", "mxfp8", "mxfp4", "nvfp4"] = Field(
        default="int",
        description="`int`: whole numbers; `fp8`: E4M3, a scale per output; `fp8-block`: per 128 x 128; `mxfp8`, `mxfp4`: a power of two per 32 "
        "inputs; `nvfp4`: an E4M3 scale per 16. All but `int` fix bits, group_size and symmetric",
    )
    bits: Bits | Literal["allocated"] = Field(default=4, description="bits per weight, 2 to 8; `allocated` as an `allocate` pass before chose them")
    group_size: int | Literal["channel"] = Field(
        default=128, description="inputs that share a scale, at least 16 and a divisor of the width; `channel` for one scale per output"
    )
    symmetric: bool = Field(default=True, description="no zero points; the only form every engine reads, and required for experts")
    activations: Literal["none", "dynamic", "static"] = Field(
        default="none",
        description="round inputs to 8 bits too (integers for `int`, E4M3 for `fp8`): `dynamic`, a scale per token; `static`, one for all, measured",
    )
    indivisible: Literal["error", "keep", "channel"] = Field(
        default="error",
        description="what to do with a linear whose width the group does not divide: refuse, leave it as it is, or one scale per output",
    )

    _allocated: Mapping[str, int] = PrivateAttr(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, options: Any) -> Any:
        if not isinstance(options, dict) or str(options.get("format")) not in FLOAT_FORMATS:
            return options
        implied = {key: value for key, value in FLOAT_FORMATS[options["format"]].items() if key in cls.model_fields}
        for key, value in implied.items():
            if options.get(key, value) != value:
                raise ValueError(f"format {options['format']} fixes {key} at {value}, but {key} is {options[key]!r}")
        return implied | options

    def takes(self, layout: Layout) -> dict[str, Linear]:
        """The linears this pass quantises, by name."""
        chosen = {}
        for name, linear in layout.linears.items():
            if self.wants(name) and (self.indivisible != "keep" or linear.columns % self._group(linear) == 0):
                chosen[name] = linear
        return chosen

    def reaches(self, layout: Layout) -> dict[str, Linear]:
        """The linears it quantises outside the decoder blocks: only those of a tower that a pattern of `include` begins with, so that none asks
        for them by chance."""
        asked = {name: linear for name, linear in self._asked(layout).items() if self.wants(name)}
        return {name: linear for name, linear in asked.items() if self.indivisible != "keep" or linear.columns % self._group(linear) == 0}

    def _asked(self, layout: Layout) -> dict[str, Linear]:
        """As `reaches`, and what is left out of that."""
        asked = [pattern for pattern in self.include if _literal(pattern).startswith(layout.towers)]
        return {name: linear for name, linear in layout.outside.items() if any(matches(pattern, name) for pattern in asked)}

    def keeps_to_blocks(self) -> str | None:
        """Why it cannot quantise what lies outside the decoder blocks, or None if it can."""
        return "goes by what linears are given, which is measured in decoder blocks alone"

    def _group(self, linear: Linear) -> int:
        return linear.columns if self.group_size == "channel" else self.group_size

    def group_of(self, linear: Linear) -> int:
        """Inputs per scale of a linear this pass takes."""
        group = self._group(linear)
        return group if linear.columns % group == 0 else linear.columns

    def given(self, bits: Mapping[str, int]) -> Self:
        """A copy that stores linears in these bits, by name, where it leaves them to be allocated."""
        copy = self.model_copy()
        copy._allocated = bits
        return copy

    @abstractmethod
    def run(self, model: Model, samples: Samples, workspace: Workspace) -> None:
        """Round what it takes; finished blocks go to the workspace."""

    def alone(self) -> Self:
        """A copy that rounds each linear as if all others stayed as they are, so that what one of them costs can be measured."""
        return self

    def scheme(self, linear: Linear) -> Scheme:
        """How a linear this pass takes is stored."""
        bits = self._allocated[linear.name] if self.bits == "allocated" else self.bits
        return Scheme(format=self.format, bits=bits, group_size=self.group_of(linear), symmetric=self.symmetric, activations=self.activations)

    def plan(self, layout: Layout) -> dict[str, Scheme]:
        return {name: self.scheme(linear) for name, linear in (self.takes(layout) | self.reaches(layout)).items()}

    def commit(self, block: Block, linear: Linear, weight: Quantized, record: dict[str, Any], peak: float | None = None) -> None:
        """Give `block` what became of a linear; ``peak`` is the largest magnitude of its inputs, where their scale is fixed beforehand."""
        scheme = self.scheme(linear)
        rounding = scheme.input_rounding(peak, block.stored_dtype(linear.name))
        block.set_quantized(linear.name, weight, {"format": scheme.format, **record}, scheme.layout, rounding)

    def check(self, place: str, layout: Layout, problems: Problems) -> None:
        if self.group_size != "channel" and self.group_size < 16:
            problems.add(f"{place}: group_size", f"must be at least 16, got {self.group_size}", "smaller groups store more scale than weight")
            return
        outside = self.reaches(layout)
        self.check_selection(place, layout, problems, self._asked(layout))
        if outside and (reason := self.keeps_to_blocks()):
            what = f"{_first(outside)} is outside the decoder blocks, and this pass {reason}"
            problems.add(f"{place}: include", what, "take rtn for it, with scales: minmax or mse, and without activations: static")
        if self.activations != "none":
            if self.format not in ("int", "fp8", "fp8-block"):
                problems.add(f"{place}: activations", f"{self.format} is for weights only here", "set activations: none, or format: fp8")
            if self.format == "fp8-block" and self.activations == "static":
                problems.add(f"{place}: activations", "engines round the inputs of fp8-block per token", "set activations: dynamic")
            if not self.symmetric:
                problems.add(f"{place}: activations", "no engine has a kernel for asymmetric weights with rounded inputs", "set symmetric: true")
            if self.activations == "dynamic" and (latent := self._reads_latent(layout)):
                what = f"transformers gives {latent} the latents of all tokens in a form that compressed-tensors rounds by one scale"
                problems.add(f"{place}: activations", what, "exclude it, or set activations: static")
            if outside and layout.arch.flat_tower:
                what = f"transformers gives {_first(outside)} the patches of all images in a form that compressed-tensors rounds one number at a time"
                problems.add(f"{place}: activations", what, "set activations: none")
            if layout.arch.experts:
                problems.add(f"{place}: activations", "rounding the inputs of experts is not supported", "set activations: none")
        if self.format != "int" and self.indivisible == "channel":
            problems.add(f"{place}: indivisible", f"{self.format} has no scale per output to fall back to", "set indivisible: error or keep")
        chosen = self.takes(layout) | outside
        if not chosen:
            problems.add(place, "takes no linear at all", "loosen include and exclude")
        if narrow := next((linear for linear in chosen.values() if linear.columns < NARROWEST), None):
            problems.add(
                place, f"{narrow.name} has {narrow.columns} inputs, fewer than {NARROWEST}", "exclude it: its scales would outweigh its codes"
            )
        if self.indivisible == "error":
            self._check_widths(place, chosen.values(), problems)

    def _reads_latent(self, layout: Layout) -> str | None:
        """The first linear it takes that is given what the cache keeps, None if it takes none."""
        stages = (stage for block in layout.blocks for stage in block.stages if stage.name == CACHED)
        return next((linear.name for stage in stages for group in stage.groups for linear in group.linears if self.wants(linear.name)), None)

    def _check_widths(self, place: str, chosen: Iterable[Linear], problems: Problems) -> None:
        bad: dict[int, list[str]] = {}
        for linear in chosen:
            if linear.columns % self._group(linear):
                bad.setdefault(linear.columns, []).append(linear.name)
        for width, names in sorted(bad.items()):
            works = [group for group in range(16, width + 1) if width % group == 0 and group % 8 == 0][:6]
            problems.add(
                f"{place}: group_size",
                f"{self.group_size} does not divide the width {width} of {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else ""),
                f"widths that work: {', '.join(map(str, works)) or 'none'}, or channel; or set indivisible: keep or channel",
            )


@runtime_checkable
class Refining(Protocol):
    """A pass that changes how linears are stored that passes before it have quantised."""

    def refine(self, place: str, schemes: dict[str, Scheme], problems: Problems) -> dict[str, Scheme]:
        """What becomes of the linears quantised so far, where that changes."""


class Restructure(Options):
    """Options of every pass after which tensors have other shapes: it turns one checkpoint into another, which is all that later passes see."""

    stage: ClassVar[str] = "restructure"
    verb: ClassVar[str]
    """What the ledger says it did to a tensor."""
    removes: ClassVar[bool] = True
    """Whether it is there to leave fewer weights."""

    def sweeps(self, samples: int, length: int) -> float:
        """What it costs, in forward passes of the model over the calibration data, of so many samples of so many tokens."""
        return 0.0

    def resident_bytes(self, layout: Layout) -> int:
        """What it holds in memory all the time beside one block."""
        return 0

    def plan(self, layout: Layout) -> dict[str, Scheme]:
        return {}

    @abstractmethod
    def check(self, place: str, layout: Layout, problems: Problems) -> None:
        """Report everything that can be known before weights load."""

    @property
    def estimated(self) -> bool:
        """Whether what it makes may be smaller than `expected` says, as far as headers tell."""
        return False

    @abstractmethod
    def expected(self, layout: Layout) -> Layout:
        """What it will make of a checkpoint, as far as headers tell; its tensors cannot be read."""

    @abstractmethod
    def outcome(self, layout: Layout, workspace: Workspace) -> Layout:
        """What it has made of a checkpoint, once it ran."""


class FewerExperts(Restructure):
    """Options of every pass after which sparse blocks have fewer experts, or send tokens to fewer of them."""

    keep: float = Field(default=0.75, gt=0, le=1, description="share of the experts of each block that stay")
    active: int | None = Field(default=None, ge=1, description="how many experts are to serve a token; as many as before by default")
    multiple_of: int = Field(default=1, ge=1, description="experts that stay are a multiple of this, as engines want that spread them over devices")

    def check(self, place: str, layout: Layout, problems: Problems) -> None:
        counts = {len(block.experts) for block in layout.blocks if block.experts}
        if layout.arch.experts is None or not counts:
            problems.add(place, "the model has no routed experts", "leave the pass out, or use prune_structured")
        elif layout.mapped:
            problems.add(place, "the model's routers have maps, by which experts are no longer told apart", "start from the original checkpoint")
        elif layout.uneven:
            problems.add(place, "the experts differ in width, and cannot be exchanged for one another", "prune experts first, then their channels")
        elif len(counts) > 1:
            problems.add(place, f"blocks have different numbers of experts: {sorted(counts)}", "this is not supported")
        else:
            self._check_count(place, layout, problems)
            self.check_more(place, layout, problems)

    @abstractmethod
    def check_more(self, place: str, layout: Layout, problems: Problems) -> None:
        """Report what else is wrong for a model that has experts."""

    def _check_count(self, place: str, layout: Layout, problems: Problems) -> None:
        count, kept, step = self.experts(layout), self.kept(layout), self._step(layout)
        table = layout.arch.experts
        assert table
        active = self.active or int(layout.text_config[table.active])
        if kept == 0 or (kept == count and self.keep < 1):
            what = f"{self.keep:g} of {count} experts in steps of {step} is {kept}: none would be {'left' if kept == 0 else 'removed'}"
            problems.add(f"{place}: keep", what, f"shares that work: {', '.join(f'{n / count:g}' for n in range(step, count, step)) or 'none'}")
        elif active > kept:
            problems.add(f"{place}: active", f"{active} experts are to serve a token, but only {kept} stay", "set active, or keep more")
        elif table.groups:
            groups, chosen = (int(layout.text_config.get(key) or 1) for key in table.groups)
            if active > (reached := chosen * (kept // groups)):
                what = f"{active} experts are to serve a token from {chosen} of {groups} groups, in which {reached} stay"
                problems.add(f"{place}: active", what, "set active, or keep more")

    def experts(self, layout: Layout) -> int:
        """How many experts a block has."""
        return next(len(block.experts) for block in layout.blocks if block.experts)

    def sectors(self, layout: Layout) -> int:
        """How many groups a router chooses among first; of each equally many experts stay."""
        table = layout.arch.experts
        return int(layout.text_config.get(table.groups[0]) or 1) if table and table.groups else 1

    def kept(self, layout: Layout) -> int:
        """How many experts of a block stay."""
        step, count = self._step(layout), self.experts(layout)
        return count if self.keep == 1 else round(self.keep * count / step) * step

    def _step(self, layout: Layout) -> int:
        return math.lcm(self.multiple_of, self.sectors(layout))

    def expected(self, layout: Layout) -> Layout:
        from compress.reshape import fewer_experts, routers

        kept, count = self.kept(layout), self.experts(layout)
        chosen = {block.index: range(kept) for block in layout.blocks if block.experts}
        return fewer_experts(layout, chosen, self.active, routers(layout, kept) if kept < count else {})

    def outcome(self, layout: Layout, workspace: Workspace) -> Layout:
        from compress.checkpoint import read_header
        from compress.reshape import fewer_experts

        files = [workspace.block_file(block.index) for block in layout.blocks]
        tensors = {name: info for file in files for name, info in read_header(file)[0].items()}
        return fewer_experts(layout, self.chosen(layout, workspace), self.active, tensors)

    @abstractmethod
    def chosen(self, layout: Layout, workspace: Workspace) -> dict[int, Sequence[int]]:
        """The experts it kept, by block."""


class Rewrite(Options):
    """Options of every pass that changes weights, but neither shapes nor how they are stored."""

    stage: ClassVar[str]
    verb: ClassVar[str]
    """What the ledger says it did to a tensor."""
    mixes: ClassVar[bool] = False
    """Whether it makes sums of channels, in which weights that were removed come back."""

    @abstractmethod
    def check(self, place: str, layout: Layout, problems: Problems) -> None:
        """Report everything that can be known before weights load."""

    def plan(self, layout: Layout) -> dict[str, Scheme]:
        return {}

    @property
    def own_samples(self) -> int | None:
        """How many samples of the calibration data are drawn for it; None if those of all passes do."""
        return None

    def sweeps(self, samples: int, length: int) -> float:
        """What it costs, in forward passes of the model over the data it is given, of so many samples of so many tokens."""
        return 0.0

    @property
    def seconds(self) -> float:
        """How long it was told to take."""
        return 0.0

    def added_bytes(self, layout: Layout) -> int:
        """Bytes of the tensors it adds to the artifact."""
        return 0

    def resident_bytes(self, layout: Layout) -> int:
        """What it holds in memory all the time beside one block."""
        return 0

    def check_plan(self, place: str, plan: Mapping[str, Scheme], problems: Problems) -> None:
        """Report what does not fit what the whole recipe makes of the linears."""


class Transform(Rewrite):
    """Options of every pass that rewrites weights without changing what the model computes."""

    stage: ClassVar[str] = "transform"
    needs_data: ClassVar[bool]

    def check(self, place: str, layout: Layout, problems: Problems) -> None:
        if not layout.arch.folds:
            problems.add(place, f"the table of {layout.arch.model_type} names no edges to fold into", "give it some in compress/arch")


@runtime_checkable
class Feeding(Protocol):
    """A pass that must have seen so many calibration tokens of what it takes."""

    def check_tokens(self, place: str, layout: Layout, samples: int, length: int, problems: Problems) -> None:
        """Report that so many samples of so many tokens at most will not do, where that is certain."""


class Fed(BaseModel):
    """Options of every pass that must have seen enough of a linear's inputs."""

    min_tokens: float = Field(
        default=0.25,
        ge=0,
        description="fewest tokens per input a linear must have seen (0.25: a width of 2048 needs 512); fewer is a case for `fallback`",
    )

    def starved(self, columns: int, tokens: int, seen: int) -> str | None:
        """Why a linear of so many inputs that saw `tokens` of `seen` cannot be calibrated, or None."""
        needed = self.needed(columns)
        return f"saw {tokens} of {seen} calibration tokens, needs {needed}" if tokens < needed else None

    def needed(self, columns: int) -> int:
        """The fewest tokens that a linear of so many inputs must have seen."""
        return math.ceil(self.min_tokens * columns)

    def check_fed(
        self, place: str, layout: Layout, linears: Collection[str], samples: int, length: int, problems: Problems, remedy: str, *, experts: bool
    ) -> None:
        """Report which of `linears` so many samples of so many tokens cannot suffice for: what every token goes to, and experts, if they are asked
        about, on average. Of each the one that lacks most is told."""
        tokens = samples * length
        short: dict[bool, tuple[float, str]] = {}
        for stage in (stage for block in layout.blocks for stage in block.stages):
            for group in (group for group in stage.groups if any(linear.name in linears for linear in group.linears)):
                routed, needed = group.expert is not None, self.needed(group.columns)
                share = layout.active_experts / len(stage.groups) if routed else 1.0
                if (experts or not routed) and tokens * share < needed and needed / share > short.get(routed, (0.0, ""))[0]:
                    seen = (
                        f"{tokens * share:g} on average ({layout.active_experts} of {len(stage.groups)} experts serve a token)" if routed else "all"
                    )
                    short[routed] = needed / share, f"of {tokens} calibration tokens {group.name} sees {seen}, but needs {needed}"
        for wanted, what in short.values():
            least = math.ceil(wanted / length)
            problems.add(f"{place}: min_tokens", what, f"set calibration.samples to {least} or more, min_tokens lower, or {remedy}")


GRADIENT = 4.0
"""What the gradients of a balance cost, in forward passes."""


class Calibrated(Fed, Quantize):
    """Options of every pass that rounds by what it saw of calibration data."""

    @property
    def needs_data(self) -> bool:
        return True

    fallback: Literal["error", "round"] = Field(
        default="error",
        description="for a linear that saw too few tokens or whose Hessian cannot be factored: stop, or round it without data and record it",
    )

    @property
    def pools(self) -> bool:
        """Whether an expert that saw too few tokens goes by what others saw."""
        return False

    def check_tokens(self, place: str, layout: Layout, samples: int, length: int, problems: Problems) -> None:
        """As `Feeding`."""
        if self.fallback == "error":
            remedy = "fallback: round to have it rounded without data and recorded"
            self.check_fed(place, layout, self.takes(layout), samples, length, problems, remedy, experts=not self.pools)

    def refuse(self, name: str, reason: str) -> None:
        """Raise for `reason` unless the recipe asks for another way out."""
        if self.fallback == "error":
            raise InputError.one(name, reason, "give more calibration data, or set fallback: round to have it rounded without data and recorded")


def matches(pattern: str, name: str) -> bool:
    """Whether a linear's name on disk fits a pattern: ``re:`` and a regular expression, or a shell pattern."""
    if pattern.startswith("re:"):
        return re.search(pattern.removeprefix("re:"), name) is not None
    return fnmatchcase(name, pattern)


def _literal(pattern: str) -> str:
    """What a pattern begins with, to be compared with a name."""
    return pattern.removeprefix("re:").removeprefix("^").replace("\\", "")


def split(group: Group, chosen: dict[str, Any]) -> tuple[Linear, ...]:
    """The linears of a group that a pass takes."""
    return tuple(linear for linear in group.linears if linear.name in chosen)


def _first(names: Iterable[str]) -> str:
    return next(iter(names), "none")
