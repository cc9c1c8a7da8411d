"""Fold a factor per channel into the weights before they are rounded: the model computes the same, and loses less to rounding.

`awq` (arXiv 2306.00978): the factors are a power of each input's mean magnitude, alone or divided by one of the mean magnitude of the
weights that read it; those that lose least of what the submodule gives, with the weights rounded, are found by trying. Then the range of
each group of weights is cut to where that loses least; the pass that rounds should take it as it is (`rtn` with `scales: minmax`), since a
search of its own would move it again. `smoothquant` (arXiv 2211.10438): the factors share out the largest magnitudes of inputs and weights,
for activations that are to be rounded too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from functools import partial
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compress.errors import Problems
from compress.layout import Edge, Group, Layout
from compress.passes.base import GRADIENT, Transform
from compress.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from compress.balance import Balance
    from compress.calibrate import Workspace
    from compress.data import Samples
    from compress.folding import Folding
    from compress.model import Model
    from compress.numerics.activations import Activations
    from compress.objective import Loss
    from compress.probe import Probe, Seen

Kind = Literal["qkv", "o", "gate_up", "down"]
USUAL_KINDS: dict[str, tuple[Kind, ...]] = {"awq": ("qkv", "o", "gate_up", "down"), "smoothquant": ("qkv", "gate_up")}
USUAL_ALPHA = 0.5
CANDIDATES = 20
"""Powers of inputs tried: 0, 0.05, ... 0.95. The first, alone, changes nothing, so the best is never worse."""
Powers = tuple[float, float]
"""Of the mean magnitudes of inputs, and of those of weights, by which it is divided."""
UNCHANGED: Powers = (0.0, 0.0)
JUDGED_TOKENS = 4096
"""Candidates are compared on the first samples with so many tokens."""


class Pass(Transform):
    """Divide channels where they are produced, multiply them where they are read."""

    needs_data: ClassVar[bool] = True
    verb: ClassVar[str] = "folded"

    method: Literal["awq", "smoothquant"] = Field(
        default="awq", description="`awq`: for rounded weights, searched with the grids they will get; `smoothquant`: for rounded activations"
    )
    alpha: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="power of the inputs' magnitudes (`awq`: these alone); `null`: searched for each edge (`awq`) or 0.5 (`smoothquant`)",
    )
    edges: tuple[Kind, ...] | None = Field(
        default=None, min_length=1, description="where, by the linears that read: qkv, o, gate_up, down; `null`: all (`awq`) or qkv and gate_up"
    )
    loss: Literal["mse", "mae"] = Field(
        default="mse", description="`awq`: candidates are compared by the squares of errors in what submodules give, or by their magnitudes"
    )
    balance: Literal["none", "modality"] = Field(
        default="none",
        description="`modality` counts errors at vision tokens by how much the loss depends on them, beside text (MBQ); takes gradients of the "
        "model's loss, and calibration data with images",
    )
    clip: bool | None = Field(default=None, description="cut the range of each group of weights, but of queries and keys; `null`: with `awq` only")
    min_tokens: float = Field(
        default=0.25, ge=0, description="fewest tokens per input an expert must have seen; one with fewer is left as it is and recorded"
    )

    def check_plan(self, place: str, plan: Mapping[str, Scheme], problems: Problems) -> None:
        if not plan and (self.method == "awq" or self.clips):
            problems.add(place, "prepares for rounding, but no pass after it rounds anything", "add one, such as `- rtn: {bits: 4}`")

    @property
    def clips(self) -> bool:
        return self.method == "awq" if self.clip is None else self.clip

    @property
    def searches(self) -> bool:
        return self.method == "awq" and self.alpha is None

    def check(self, place: str, layout: Layout, problems: Problems) -> None:
        super().check(place, layout, problems)
        if self.method != "awq":
            for key in ("loss", "balance"):
                if key in self.model_fields_set:
                    problems.add(f"{place}: {key}", f"is of the search of awq, which {self.method} does not make", "leave it out, or set method: awq")
        self.check_balance(place, layout, problems)

    @property
    def balances(self) -> bool:
        """As `Balancing`."""
        return self.balance == "modality"

    @property
    def forwards(self) -> float:
        """As `Differentiating`."""
        return GRADIENT if self.balances else 0.0

    def check_balance(self, place: str, layout: Layout, problems: Problems) -> None:
        """Report a model without vision."""
        if self.balances and not layout.arch.image:
            problems.add(f"{place}: balance", f"a {layout.arch.model_type} reads text only", "leave it out")

    def measured_balance(self, model: Model, samples: Samples, workspace: Workspace) -> Balance | None:
        """What vision tokens count in each submodule, if they are to count differently."""
        from compress.balance import measure

        if not self.balances:
            return None
        workspace.progress.note("gradients for the balance of modalities")
        return measure(model, samples, workspace.folder)

    def run(self, model: Model, samples: Samples, workspace: Workspace) -> None:
        from compress.calibrate import visit

        balance = self.measured_balance(model, samples, workspace)
        for probe in visit(model, samples, workspace):
            Smoothing(self, model, probe, samples, balance).run()


class Smoothing:
    """One block being smoothed."""

    def __init__(self, options: Pass, model: Model, probe: Probe, samples: Samples, balance: Balance | None, by: str = "smooth") -> None:
        self.by, self.options, self.schemes, self.block, self.probe = by, options, model.schemes, probe.block, probe
        self.counted, self.balance = _counted(probe, samples), balance
        self.vision = [batch.vision.to(model.device) for batch in samples.batches()]
        self.scores = {f"{probe.block.layout.prefix}.{name}{factor}" for name in model.layout.arch.scores for factor in ("", ".0", ".1")}
        self.groups = [group for stage in probe.block.layout.stages for group in stage.groups]
        self.seen = self._observe()

    def _observe(self) -> dict[str, Seen]:
        """What each input group is given, by name."""
        from compress.probe import Seen

        seen = {}
        for group in self.groups:
            scheme = next((self.schemes[linear.name] for linear in group.linears if linear.name in self.schemes), None)
            seen[group.name] = Seen(group.columns, scheme.group_size if scheme and self.options.clips else None, self.probe.hidden[0].device)
        for batch, vision in enumerate(self.vision):

            def note(group: Group, inputs: Tensor, vision: Tensor = vision) -> None:
                seen[group.name].add(inputs, self._counts(group.linears[0].name, vision) if self.balance else None)

            self.probe.observe(note, [batch])
        return seen

    def _counts(self, linear: str, vision: Tensor) -> Tensor:
        """What each token counts for the submodule of a linear, as ``vision`` bool [rows, tokens]."""
        assert self.balance
        return self.balance.weights(vision, linear, self.block.layout)

    def run(self) -> None:
        from compress.objective import losses

        if self.balance:
            for name in (name for name in self.block.layout.writers if name in self.balance.found):
                found = self.balance.found[name]
                sensitivity = {"vision": found.vision, "text": found.text, "counted": self.balance.ratios[name]}
                self.block.add_record(name, {"pass": self.by, "kind": "balance", "sensitivity": sensitivity, "fallback": None})
        kinds = self.options.edges or USUAL_KINDS[self.options.method]
        edges = [edge for edge in self.block.layout.edges if edge.kind.rpartition(".")[2] in kinds]
        for _, alike in groupby(edges, key=lambda edge: edge.kind):
            fed = [edge for edge in alike if self._fed(edge)]
            loss_of = losses(self.probe, fed, self._weights(fed[0]), self.options.loss) if fed and self.options.searches else {}
            for edge in fed:
                self._fold(edge, loss_of.get(edge.name))
        if self.options.clips:
            for group in self.groups:
                self._clip(group)

    def _weights(self, edge: Edge) -> list[Tensor]:
        """By batch, [rows, tokens]: what a token counts for the readers of an edge."""
        if self.balance is None:
            return self.counted
        return [counted * self._counts(edge.consumers[0], vision) for counted, vision in zip(self.counted, self.vision, strict=True)]

    def _fed(self, edge: Edge) -> bool:
        """Whether whoever reads the edge saw enough to go by; if not, it is recorded."""
        reason = None if edge.expert is None else self._starved(self._readers(edge)[0])
        if reason:
            self.block.add_record(edge.name, {"pass": self.by, "kind": edge.kind, "alpha": 0.0, "beta": 0.0, "fallback": reason})
        return reason is None

    def _readers(self, edge: Edge) -> list[Group]:
        return [group for group in self.groups if group.linears[0].name in edge.consumers]

    def _starved(self, group: Group) -> str | None:
        tokens, needed = self.seen[group.name].tokens, math.ceil(self.options.min_tokens * group.columns)
        return f"saw {tokens} calibration tokens, needs {needed}" if tokens < needed else None

    # Factors --------------------------------------------------------------------------------------------------------------------

    def _fold(self, edge: Edge, loss: Loss | None) -> None:
        """Choose the factors of an edge and fold them."""
        from compress.folding import open_edge

        folding = open_edge(self.block, edge)
        weights = {linear: self.block.weight(linear) for linear in edge.consumers if linear in self.schemes}
        candidates = self._candidates(edge, folding, weights)
        errors: dict[Powers, float] = {}
        if loss and weights:
            for powers, scale in candidates.items():
                factor = folding.spread(folding.exact(scale))
                errors[powers] = loss(self._rounded(weights, factor), self._inputs(edge, weights, factor))
        best = min(errors, key=errors.__getitem__) if errors else next(iter(candidates))  # none of a search: nobody rounds the readers
        factor = folding.exact(candidates[best])
        for name, value in folding.folded(factor).items():
            self.block.set_dense(name, value)
        for group in self._readers(edge):
            self.seen[group.name].divide(folding.spread(factor))
        record = {"factors": [float(factor.min()), float(factor.max())], "left_alone": int((candidates[best] / factor - 1).abs().gt(0.01).sum())}
        record |= {"error": [errors[UNCHANGED], errors[best]]} if errors else {}
        self.block.add_record(edge.name, {"pass": self.by, "kind": edge.kind, "alpha": best[0], "beta": best[1], "fallback": None, **record})

    def _candidates(self, edge: Edge, folding: Folding, weights: Mapping[str, Tensor]) -> dict[Powers, Tensor]:
        """Scales [channels] by the powers in them; ``weights`` [out, in] are those of the readers that will be rounded, by name."""
        import torch

        from compress.numerics.scaling import salient, shared_out
        from compress.probe import Seen

        seen = Seen.together([self.seen[group.name] for group in self._readers(edge)])
        if self.options.method == "smoothquant":
            alpha = USUAL_ALPHA if self.options.alpha is None else self.options.alpha
            largest = [self.block.weight(linear.name).abs().amax(0) for group in self._readers(edge) for linear in group.linears]
            return {(alpha, 1 - alpha): shared_out(folding.heads(seen.largest).amax(0), folding.heads(torch.stack(largest).amax(0)).amax(0), alpha)}
        magnitude = folding.heads(seen.mean()).mean(0)
        if self.options.alpha is not None:
            return {(self.options.alpha, 0.0): salient(magnitude, self.options.alpha)}
        alphas = [step / CANDIDATES for step in range(CANDIDATES)]
        found = {(alpha, 0.0): salient(magnitude, alpha) for alpha in alphas}
        if weights and all(self.schemes[linear].activations == "none" for linear in weights):
            # One power of inputs alone cannot undo a few channels that are loud where their weights are small: what is right for them is wrong for
            # all others. Powers of both that make one in all do so whatever scale lies between the two. Where inputs are rounded as well, what is
            # moved into them is lost there: more of answers, though less of what submodules give on average (docs/log.md).
            usual = folding.heads(torch.cat(list(weights.values())).abs().mean(0)).mean(0)
            found |= {(alpha, 1 - alpha): salient(magnitude, alpha, usual, 1 - alpha) for alpha in alphas}
        return found

    def _rounded(self, weights: dict[str, Tensor], factor: Tensor) -> dict[str, Tensor]:
        """What linears compute if ``weights`` are rounded with ``factor`` [in] folded in."""
        from compress.numerics.grid import minmax_scales, quantized, round_to_nearest

        found = {name: weight * factor for name, weight in weights.items()}
        peak = max((float(weight.abs().max()) for weight in found.values()), default=0.0)
        for name, folded in found.items():
            scheme = self.schemes[name]
            grid, stored = scheme.grid(peak), scheme.stored(self.block.stored_dtype(name))
            scales = minmax_scales(folded, grid, scheme.group_size, stored)
            found[name] = quantized(round_to_nearest(folded, scales, grid), scales, grid, stored).dequantize().float() / factor
        return found

    def _inputs(self, edge: Edge, linears: Collection[str], factor: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
        """What becomes of what ``linears`` are given, if it is divided by ``factor`` [in] before it is rounded; nothing where it is not rounded."""
        found: dict[str, Callable[[Tensor], Tensor]] = {}
        for group in self._readers(edge):
            for name in (linear.name for linear in group.linears if linear.name in linears):
                peak = float((self.seen[group.name].largest / factor).max())
                if rounding := self.schemes[name].input_rounding(peak, self.block.stored_dtype(name)):
                    found[name] = partial(_divided, rounding, factor)
        return found

    # Ranges ---------------------------------------------------------------------------------------------------------------------

    def _clip(self, group: Group) -> None:
        """Cut the ranges of the linears of a group that will be rounded."""
        from compress.numerics.clip import clipped

        reason = self._starved(group) if group.expert is not None else None
        weights = {linear.name: self.block.weight(linear.name) for linear in group.linears}
        peak = max(float(weight.abs().max()) for weight in weights.values())
        for name, weight in weights.items():
            scheme = self.schemes.get(name)
            if scheme is None or scheme.scale_rows > 1 or name in self.scores:
                continue
            record: dict[str, Any] = {"pass": self.by, "kind": "clip", "fallback": reason}
            if reason is None:
                cut = clipped(weight, self.seen[group.name].moment(), scheme.grid(peak), scheme.stored(self.block.stored_dtype(name)))
                self.block.set_dense(f"{name}.weight", cut)
                record["clipped"] = float((cut != weight).float().mean())
            self.block.add_record(name, record)


def _divided(rounding: Activations, factor: Tensor, given: Tensor) -> Tensor:
    """``given`` [..., in] as it is if it is rounded while divided by ``factor`` [in]."""
    return rounding.round(given / factor.to(given.dtype)) * factor.to(given.dtype)


def _counted(probe: Probe, samples: Samples) -> list[Tensor]:
    """By batch, [rows, tokens]: 1 for the tokens of the first samples that make up `JUDGED_TOKENS`, else 0."""
    import torch

    before = list(accumulate((len(item.ids) for item in samples.items), initial=0))
    judged = [[float(before[member] < JUDGED_TOKENS) for member in members] for members in probe.members]
    return [torch.tensor(rows, device=hidden.device)[:, None].expand(hidden.shape[:2]) for rows, hidden in zip(judged, probe.hidden, strict=True)]
