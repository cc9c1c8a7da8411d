"""Take channels and groups of heads out of the blocks, so that smaller matrices remain which any engine loads.

A unit is what can go without leaving a hole: a channel between the linears of an MLP, or a head of keys and values with all query heads that
read it, which makes the KV cache smaller too. First every unit of every block gets a score, then it is decided how many of which stay, then
the tensors are cut, one block at a time. Scores are those of the model as it was.

`magnitude` and `random` need no data; `wanda_sp` and `flap` (arXiv 2312.11983) one pass over it; `taylor` (arXiv 2305.11627) and `heapr` (arXiv
2509.22299) gradients; `ddp` (arXiv 2603.08065) some hundred steps of training.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from compress.errors import InputError, Problems
from compress.layout import BlockLayout, Layout, Units
from compress.passes.base import Restructure

if TYPE_CHECKING:
    from torch import Tensor

    from compress.block import Block
    from compress.calibrate import Workspace
    from compress.data import Samples
    from compress.gating import Options
    from compress.model import Model

    Scores = dict[str, Tensor]

Kind = Literal["kv_group", "query_head", "ffn_channel", "shared_channel", "expert_channel"]
Share = Annotated[float, Field(gt=0, le=1)]
EXPERT_CHANNEL = "expert_channel"
DEFAULT_KEEP, DEFAULT_MULTIPLE = 0.8, 128
CHANNELS = ("ffn_channel", "shared_channel", EXPERT_CHANNEL)
DEFAULT_KINDS = ("kv_group", *CHANNELS)
WITHOUT_DATA = ("magnitude", "random")
COMPENSATING = ("flap", "ddp")
KEPT, GATES, SCALES = "kept.safetensors", "gates.safetensors", "scales.safetensors"
MEAN, SCALE = ".mean", ".scale"


class Pass(Restructure):
    """Remove the least valuable units of each kind."""

    verb: ClassVar[str] = "pruned"

    method: Literal["ddp", "flap", "taylor", "heapr", "wanda_sp", "magnitude", "random"] = Field(
        default="flap",
        description="what a unit is worth: `magnitude` of its weights; `wanda_sp`: times the size of its inputs; `flap`: how much what it adds to "
        "the output varies; `taylor`: what the loss would change by, from gradients; `heapr`: the same to second order, of channels alone; "
        "`ddp`: a gate per unit, learned with the whole model in memory, "
        "whose value then becomes part of the weights; `random`, to compare with",
    )
    keep: Share | dict[Kind, Share] | None = Field(
        default=None,
        description="share of the units that stay, of all kinds alike but query heads, or by kind: `kv_group`, a head of keys and values with its "
        "query heads; `query_head`, equally many of each such group; `ffn_channel`; `shared_channel` of experts that all tokens go to; "
        "`expert_channel`. `null`: 0.8 of all kinds that the method judges, as near to that as the model's config lets heads come, even if they all "
        "stay then",
    )
    multiple_of: int | None = Field(
        default=None,
        ge=1,
        description="widths of MLPs and experts are rounded to multiples of this; `null`: 128, halved until some channels go and some stay",
    )
    widths: Literal["uniform", "per_layer", "per_expert"] = Field(
        default="uniform",
        description="`uniform`: all blocks alike, which every engine loads; `per_layer`: where the model needs them most, for as many parameters; "
        "`per_expert`: so among all experts, by `heapr`. Only this program loads the last two",
    )
    compensate: bool = Field(
        default=False,
        description="`flap`, `ddp`: add what removed units gave on average to a bias of the linear that read them; only where the model's config "
        "knows such biases. `flap` is meant to be used with it",
    )
    seed: int = Field(default=0, ge=0, description="of what is random")
    steps: int = Field(
        default=1000, ge=1, description="`ddp`: how often gates are changed, a quarter of them once it is settled what stays; 300 at least"
    )
    batch: int = Field(default=8, ge=1, description="`ddp`: calibration samples per step")
    learning_rate: float = Field(default=0.02, gt=0, description="`ddp`: of gates, and of what holds their number")
    divergence: float = Field(
        default=2.0, ge=0, description="`ddp`: weight of the KL divergence from the model as it was, beside the loss of the text"
    )

    def resident_bytes(self, layout: Layout) -> int:
        return 2 * layout.checkpoint.nbytes if self.method == "ddp" else 0

    @property
    def needs_data(self) -> bool:
        return self.method not in WITHOUT_DATA

    def sweeps(self, samples: int, length: int) -> float:
        # A step back costs two forward, and what is learned from one more.
        return {"taylor": 4.0, "heapr": 4.0, "ddp": 4.0 * self.steps * self.batch / samples}.get(self.method, float(self.needs_data))

    def check(self, place: str, layout: Layout, problems: Problems) -> None:
        there = {units.kind for block in layout.blocks for units in block.units}
        for kind in self._wanted():
            if kind not in there and isinstance(self.keep, dict):
                problems.add(f"{place}: keep", f"the model has no {kind}", f"it has {', '.join(sorted(there)) or 'none that can be removed'}")
        for name in sorted({"steps", "batch", "learning_rate", "divergence"} & self.model_fields_set if self.method != "ddp" else ()):
            problems.add(f"{place}: {name}", f"is an option of ddp, which {self.method} does not read", "leave it out, or take method: ddp")
        if self.compensate and self.method not in COMPENSATING:
            problems.add(
                f"{place}: compensate", f"is an option of flap and ddp, which {self.method} does not read", f"leave it out, or take {COMPENSATING[0]}"
            )
        elif self.compensate and len(self._biased(layout)) < len(self._readers(layout)):
            without = sorted({name.rpartition(".")[2] for name in self._readers(layout) - self._biased(layout).keys()})
            problems.add(
                f"{place}: compensate", f"the config of a {layout.arch.model_type} knows no bias of {', '.join(without)}", "set compensate: false"
            )
        shares = self._shares(layout)
        uniform = self._uniform(layout)
        taken = [units for block in layout.blocks for units in block.units if units.name in uniform]
        if shares and self.keep is None and all(uniform[units.name] == units.count for units in taken):
            kinds = ", ".join(sorted(shares))
            problems.add(f"{place}: keep", f"of {kinds} there are too few to keep {DEFAULT_KEEP:g}", "name shares by kind: keep: {kind: share}")
        if not shares:
            problems.add(f"{place}: keep", "names no units, so nothing would be removed", f"the model has {', '.join(sorted(there)) or 'none'}")
        if shares.keys() >= {"kv_group", "query_head"}:
            problems.add(f"{place}: keep", "kv_group takes query heads with it", "remove query heads by a second pass, or leave one of them out")
        if self.method == "heapr" and (
            heads := sorted({units.kind for block in layout.blocks for units in block.units if units.heads} & shares.keys())
        ):
            problems.add(
                f"{place}: keep", f"heapr judges channels, not {' or '.join(heads)}", "name the kinds it is to take: keep: {ffn_channel: ...}"
            )
        if self.widths == "per_expert" and (self.method != "heapr" or shares.keys() != {EXPERT_CHANNEL}):
            what = "per_expert compares channels of all experts, which heapr's scores alone can be"
            problems.add(f"{place}: widths", what, "set method: heapr and keep: {expert_channel: ...}, or widths: per_layer")
        elif self.widths == "per_expert" and layout.arch.experts and layout.arch.experts.fused:
            problems.add(f"{place}: widths", f"the experts of a {layout.arch.model_type} are one tensor on disk", "set widths: uniform")
        if layout.uneven and self.widths != "per_expert" and EXPERT_CHANNEL in shares:
            problems.add(f"{place}: widths", "experts differ in width already", "set widths: per_expert")
        distinct = {(units.kind, units.count): units for block in layout.blocks for units in block.units if units.kind in shares}
        for (kind, count), units in distinct.items():
            self._check_count(place, kind, count, units, layout, problems)

    def _check_count(self, place: str, kind: str, count: int, units: Units, layout: Layout, problems: Problems) -> None:
        """Report what is wrong with how many are to be kept of a ``kind`` of which there are `count`."""
        share, step, kept = self._shares(layout)[kind], self._step(units), self._kept(units, layout)
        what = f"{share:g} of the {count} {kind} of {units.columns.rpartition('.')[0]} is {kept}" + (f" in steps of {step}" if step > 1 else "")
        by_kind = f"keep: {{{kind}: ...}} sets it apart from others"
        smaller = "" if units.heads else ", set a smaller multiple_of"
        if self.keep is None:
            return  # what comes nearest is taken
        if kept == 0:
            problems.add(f"{place}: keep", f"{what}: none would be left", f"keep at least {step / count:g}{smaller}; {by_kind}")
        elif kept == count and share < 1:
            problems.add(f"{place}: keep", f"{what}: none would be removed", f"keep {(count - step) / count:g} or less{smaller}; {by_kind}")
        elif units.heads and not self._fits_config(units, kept, layout):
            hidden, heads = layout.text_config["hidden_size"], layout.text_config["num_attention_heads"] * kept // count
            works = [n / count for n in range(step, count, step) if self._fits_config(units, n, layout)]
            problems.add(
                f"{place}: keep",
                f"{what}, which leaves {heads} query heads; transformers wants a {layout.arch.model_type}'s to divide its hidden size {hidden}",
                f"shares that work: {', '.join(f'{n:g}' for n in works) or 'none'}; {by_kind}; leave them out, or take widths: per_layer",
            )

    def _shares(self, layout: Layout) -> dict[str, float]:
        """What is to be kept of the kinds of units the model has."""
        there = {units.kind for block in layout.blocks for units in block.units}
        return {kind: share for kind, share in self._wanted().items() if kind in there}

    def _wanted(self) -> dict[str, float]:
        """What is to be kept of the kinds that the recipe names, or does not."""
        if isinstance(self.keep, dict):
            return {str(kind): share for kind, share in self.keep.items()}
        if self.keep is None and self.method == "heapr":
            return dict.fromkeys([EXPERT_CHANNEL] if self.widths == "per_expert" else CHANNELS, DEFAULT_KEEP)
        return dict.fromkeys(DEFAULT_KINDS, DEFAULT_KEEP if self.keep is None else self.keep)

    def _readers(self, layout: Layout) -> set[str]:
        """The linears that read what is to be removed."""
        uniform = self._uniform(layout)
        return {units.columns for block in layout.blocks for units in block.units if uniform.get(units.name, units.count) < units.count}

    def _biased(self, layout: Layout) -> dict[str, list[str]]:
        """By linear that is to have a bias for what it no longer reads: all that then have one."""
        from compress.reshape import biases

        return biases(layout, self._readers(layout)) if self.compensate else {}

    def _step(self, units: Units) -> int:
        """How many units are removed at a time at least."""
        if units.heads:
            return units.parts
        if self.multiple_of is not None:
            return min(self.multiple_of, units.count)
        share, step = self._wanted()[units.kind], DEFAULT_MULTIPLE
        while step > 1 and share < 1 and not 0 < round(share * units.count / step) * step < units.count:
            step //= 2
        return step

    def _kept(self, units: Units, layout: Layout) -> int:
        """How many of ``units`` stay where all blocks are alike."""
        step, share = self._step(units), self._shares(layout)[units.kind]
        if self.keep is None and units.heads:
            # The most, of two that are as near: nothing that was not asked for is worth a guess.
            counts = [n for n in range(step, units.count + 1, step) if self._fits_config(units, n, layout)] or [units.count]
            return min(reversed(counts), key=lambda n: abs(n - share * units.count))
        return units.count if share == 1 else min(units.count, round(share * units.count / step) * step)

    def _fits_config(self, units: Units, kept: int, layout: Layout) -> bool:
        """Whether transformers makes a model of which so many heads stay."""
        if not layout.arch.whole_heads or self.widths != "uniform":
            return True
        hidden, heads = layout.text_config["hidden_size"], layout.text_config["num_attention_heads"] * kept // units.count
        return bool(heads) and int(hidden) % heads == 0

    def _uniform(self, layout: Layout) -> dict[str, int]:
        """How many of each units stay where all blocks are alike."""
        kinds = self._shares(layout)
        return {units.name: self._kept(units, layout) for block in layout.blocks for units in block.units if units.kind in kinds}

    def expected(self, layout: Layout) -> Layout:
        from compress.reshape import narrowed, reshaped

        counts = self._uniform(layout)
        if self.widths == "per_expert":
            # Whatever comes out, they are multiples, and not alike.
            one = next(name for name, count in counts.items() if count > 1)
            counts[one] = max(1, counts[one] - 1)
        if self.widths == "per_layer":
            # Whatever comes out, widths are multiples; that of the first block stands for those that are odd ones.
            first = [units for units in layout.blocks[0].units if counts.get(units.name, units.count) < units.count]
            counts |= {units.name: max(self._step(units), counts[units.name] - self._step(units)) for units in first}
        biased = {name for together in self._biased(layout).values() for name in together}
        return reshaped(layout, narrowed(layout, counts, biased))

    def outcome(self, layout: Layout, workspace: Workspace) -> Layout:
        from compress.checkpoint import read_header
        from compress.reshape import reshaped

        return reshaped(layout, {name: info for block in layout.blocks for name, info in read_header(workspace.block_file(block.index))[0].items()})

    def run(self, model: Model, samples: Samples, workspace: Workspace) -> None:
        import torch

        from compress.calibrate import walk
        from compress.checkpoint import entry, read_header, read_tensor
        from compress.reshape import made_up, taken_from
        from compress.state import write_state

        path = workspace.folder / KEPT
        if not path.exists():
            removes = any(share < 1 for share in self._shares(model.layout).values())
            scores = self._scores(model, samples, workspace) if removes else {}
            kept = self._choose(model.layout, scores) if removes else {}
            entries = [entry(name, indices) for name, indices in kept.items()]
            if self.method == "ddp" and removes:
                entries += [entry(f"{name}{SCALE}", scale) for name, scale in self._settled(model, samples, workspace, scores, kept).items()]
            entries += [entry(name, scores[name].float()) for name in scores if name.endswith(MEAN)]
            write_state(path, entries, {})
        chosen = {name: read_tensor(info).to(model.device) for name, info in read_header(path)[0].items()}
        biased, kinds = self._biased(model.layout), self._shares(model.layout)
        for block in walk(model, workspace):
            for units in block.layout.units:
                scale = chosen.get(f"{units.name}{SCALE}")
                touched = scale is not None or units.columns in biased  # where one linear has a bias, all must
                if units.name in chosen and (touched or len(chosen[units.name]) < units.count):
                    names = [name for name in block.layout.tensors if name.rpartition(".")[0] in (*units.rows, units.columns)]
                    tensors = {name: block.tensor(name) for name in names}
                    left = taken_from(units, chosen[units.name], scale, tensors)
                    if units.columns in biased:
                        left |= made_up(units, chosen[units.name], chosen[f"{units.name}{MEAN}"], tensors, biased[units.columns], left)
                    for name, tensor in left.items():
                        block.restructure(name, tensor)
                    block.add_record(units.name, self._record(units, chosen[units.name], scale))
                elif self.keep is None and units.kind in kinds:  # nobody asked for that, so it is told
                    block.add_record(units.name, self._record(units, torch.arange(units.count), None))

    def _record(self, units: Units, kept: Tensor, scale: Tensor | None) -> dict[str, Any]:
        counts: dict[str, Any] = {"before": units.count, "after": len(kept)}
        if scale is not None:
            counts |= {"scales": [float(scale.min()), float(scale.max())]}
        return {"pass": "prune_structured", "kind": units.kind, "method": self.method, **counts, "kept": ranges(kept)}

    def _scores(self, model: Model, samples: Samples, workspace: Workspace) -> Scores:
        """[count] float64 for all units of the kinds to be removed, by name; the higher, the more they are worth."""
        import torch

        kinds = tuple(self._shares(model.layout))
        if self.method == "random":
            generator = torch.Generator().manual_seed(self.seed)
            every = [units for block in model.blocks for units in block.units if units.kind in kinds]
            return {units.name: torch.rand(units.count, generator=generator, dtype=torch.float64) for units in every}
        if self.method == "ddp":
            return self._gates(model, samples, workspace)
        found: Scores = {}
        if self.method == "taylor":
            from compress.backsweep import backsweep

            for gradients in backsweep(model, samples, workspace.folder):
                for units in _of(gradients.block.layout, kinds):
                    found[units.name] = _first_order(gradients.block, gradients.weights, units)
        elif self.method == "heapr":
            found = _second_order(model, samples, workspace, kinds)
        elif self.method == "magnitude":
            from compress.numerics.saliency import magnitude

            for layout in model.blocks:
                with model.block(layout.index) as block:
                    for units in _of(layout, kinds):
                        rows = [block.weight(linear) for linear in units.rows]
                        found[units.name] = magnitude(rows, block.weight(units.columns), units.count)
        else:
            from compress.calibrate import look

            for probe in look(model, samples, workspace.progress):
                moments = _moments(probe, kinds)
                for units in _of(probe.block.layout, kinds):
                    if not moments[units.columns].tokens:
                        raise InputError.one(units.columns, "saw no calibration token, so its inputs cannot be judged", "give more calibration data")
                    found[units.name] = self._measured(probe.block.weight(units.columns), moments[units.columns], units.count)
                    if self.compensate:
                        found[f"{units.name}{MEAN}"] = moments[units.columns].mean
        return {name: scores.cpu() for name, scores in found.items()}

    def _gates(self, model: Model, samples: Samples, workspace: Workspace) -> Scores:
        from compress.gating import Scope, learn

        uniform = self._uniform(model.layout)
        scopes: dict[str, list[Units]] = defaultdict(list)
        for block in model.blocks:
            for units in block.units:
                if uniform.get(units.name, units.count) < units.count:
                    scopes[units.name if self.widths == "uniform" else units.kind].append(units)
        ready = {name: Scope(tuple(members), uniform[members[0].name] / members[0].count) for name, members in scopes.items()}
        worth, means = self._seen(model, samples, workspace)
        found = learn(model, samples, ready, self._training(), workspace.folder / GATES, workspace.progress, worth, means)
        return {name: gates.double() for name, gates in found.items()} | {f"{name}{MEAN}": mean.cpu() for name, mean in means.items()}

    def _training(self) -> Options:
        from compress.gating import Options

        return Options(self.steps, self.batch, self.learning_rate, self.divergence, self.seed)

    def _settled(self, model: Model, samples: Samples, workspace: Workspace, scores: Scores, kept: Scores) -> Scores:
        """Scales of the units that stay, [n] float32, by name."""
        from compress.gating import settle

        means = {name: scores[f"{name}{MEAN}"].to(model.device) for name in kept if f"{name}{MEAN}" in scores}
        counts = {name: len(scores[name]) for name in kept}
        return settle(model, samples, kept, counts, self._training(), workspace.folder / SCALES, workspace.progress, means)

    def _seen(self, model: Model, samples: Samples, workspace: Workspace) -> tuple[Scores, Scores]:
        """What units are worth by how much they vary, [count] float64, and, if that is to be made up for, what they give on average, [columns]."""
        from compress.calibrate import look
        from compress.numerics.saliency import fluctuation

        kinds = tuple(self._shares(model.layout))
        worth: Scores = {}
        means: Scores = {}
        for probe in look(model, samples, workspace.progress):
            moments = _moments(probe, kinds)
            for units in _of(probe.block.layout, kinds):
                of_unit = moments[units.columns]
                worth[units.name] = fluctuation(probe.block.weight(units.columns), of_unit.variance(), units.count)
                means[units.name] = of_unit.mean
        return worth, means if self.compensate else {}

    def _measured(self, columns: Tensor, moments: Any, count: int) -> Tensor:
        from compress.numerics.saliency import fluctuation, wanda

        return wanda(columns, moments.norm(), count) if self.method == "wanda_sp" else fluctuation(columns, moments.variance(), count)

    def _choose(self, layout: Layout, scores: Scores) -> Scores:
        """Indices of what stays, in order, by name of the units."""
        from compress.numerics.saliency import best

        if self.widths == "uniform":
            counts = self._uniform(layout)
        else:
            counts = self._shared_out(layout, scores) if self.widths == "per_layer" else self._among_experts(layout, scores)
        every = [units for block in layout.blocks for units in block.units if units.name in scores]
        return {units.name: best(scores[units.name], counts[units.name], units.parts) for units in every}

    def _among_experts(self, layout: Layout, scores: Scores) -> dict[str, int]:
        """How many channels of each expert stay when those of all compete, for as many parameters as if all were alike; a step of each at least."""
        from compress.numerics.saliency import Choice, share_out
        from compress.reshape import parameters

        uniform = self._uniform(layout)
        every = [units for block in layout.blocks for units in block.units if units.name in scores]
        costs = {units.name: parameters(layout, units) for units in every}
        choices = {units.name: Choice(scores[units.name], costs[units.name], self._step(units), self._step(units)) for units in every}
        return share_out(choices, sum(costs[units.name] * (units.count - uniform[units.name]) for units in every))

    def _shared_out(self, layout: Layout, scores: Scores) -> dict[str, int]:
        """How many of each units stay when all blocks and kinds compete, for as many parameters as if all blocks were alike."""
        import torch

        from compress.numerics.saliency import Choice, share_out, standardised
        from compress.reshape import parameters

        uniform = self._uniform(layout)
        places: dict[str, list[Units]] = defaultdict(list)  # experts of a block keep equally many, so they are one place
        for block in layout.blocks:
            for units in block.units:
                if units.name in scores:
                    places[f"{block.prefix}.{units.kind}"].append(units)
        choices: dict[str, dict[str, Choice]] = defaultdict(dict)
        remove: dict[str, int] = defaultdict(int)
        for name, members in places.items():
            # Gates are trained for a share of each kind, and are comparable as they are; other scores are neither.
            among = members[0].kind if self.method == "ddp" else ""
            cost = sum(parameters(layout, units) for units in members)
            remove[among] += cost * (members[0].count - uniform[members[0].name])
            each = [scores[units.name] if self.method == "ddp" else standardised(scores[units.name]) for units in members]
            ranked = torch.stack([one.sort().values for one in each]).mean(0)
            choices[among][name] = Choice(ranked, cost, self._step(members[0]), self._step(members[0]))
        kept = {name: count for among, competing in choices.items() for name, count in share_out(competing, remove[among]).items()}
        return {units.name: kept[name] for name, members in places.items() for units in members}


def ranges(indices: Tensor) -> str:
    """Ascending numbers as people write them: ``0-3, 5, 8-9``."""
    parts: list[list[int]] = []
    for index in indices.tolist():
        if parts and index == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], index]
        else:
            parts.append([index])
    return ", ".join("-".join(map(str, part)) for part in parts)


def _of(block: BlockLayout, kinds: tuple[str, ...]) -> list[Units]:
    return [units for units in block.units if units.kind in kinds]


def _moments(probe: Any, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Mean and variance of what reads each kind of units, by the linear that does."""
    from compress.numerics.saliency import Moments

    readers = {units.columns for units in _of(probe.block.layout, kinds)}
    found: dict[str, Moments] = {}

    def note(group: Any, inputs: Tensor) -> None:
        name = group.linears[0].name
        if name in readers:
            found.setdefault(name, Moments(group.columns, inputs.device)).add(inputs)

    probe.observe(note)
    return found


def _second_order(model: Model, samples: Samples, workspace: Workspace, kinds: tuple[str, ...]) -> Scores:
    from compress.backsweep import backsweep, none
    from compress.numerics.saliency import SecondOrder

    curvature: dict[str, SecondOrder] = {}

    def watch(linear: str, inputs: Tensor, gradients: Tensor) -> None:
        curvature.setdefault(linear, SecondOrder(inputs.shape[1], inputs.device)).add(inputs, gradients)

    found = {}
    for gradients in backsweep(model, samples, workspace.folder, none, inner=watch):
        for units in _of(gradients.block.layout, kinds):
            if not (seen := curvature.pop(units.columns, None)) or not seen.tokens:
                raise InputError.one(units.columns, "saw no calibration token, so its inputs cannot be judged", "give more calibration data")
            found[units.name] = seen.score(units.count)
    return found


def _first_order(block: Block, gradients: Scores, units: Units) -> Tensor:
    from compress.numerics.saliency import first_order

    linears = (*units.rows, units.columns)
    return first_order([block.weight(linear) for linear in linears], [gradients[linear] for linear in linears], units.count)
