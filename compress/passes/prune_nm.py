"""Remove weights so that of every M consecutive inputs of an output at most N are left (N:M), and keep them removed in all that follows.

`sparsegpt` (arXiv 2301.00774) removes group after group and has the weights still to come make good for it; `alps` (2406.07831) looks for weights
and values together; `wanda` (2306.11695), `ria` (ICLR 2024) and `magnitude` only score weights and leave the others as they are. With `V:N:M`
(2410.16135) every V outputs share the four inputs of each M that they may read, and N of these are left in each. Each group of linears is
measured with everything before it already pruned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from compress.errors import InputError, Problems
from compress.layout import Layout, Linear
from compress.numerics.pattern import LARGEST, Pattern
from compress.passes.base import Fed, Selecting, split
from compress.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from compress.block import Block
    from compress.calibrate import Inputs, Workspace
    from compress.data import Samples
    from compress.model import Model
    from compress.numerics.feedback import Factor
    from compress.reordering import Order


class Pass(Fed, Selecting):
    """Prune to N of M consecutive inputs."""

    stage: ClassVar[str] = "sparsify"

    pattern: str = Field(default="2:4", description="`N:M`, N kept of M consecutive inputs, or `V:N:M`; N counts what is **kept**")
    method: Literal["sparsegpt", "alps", "wanda", "ria", "magnitude"] = Field(
        default="sparsegpt", description="how weights are chosen; `alps` loses least and takes longest, `magnitude` needs no data"
    )
    refit: bool = Field(default=False, description="fit the values that are kept to the data, by least squares; `alps` always does")
    permute: bool = Field(
        default=False,
        description="have inputs change places first, so that groups can keep more, where whoever makes them can make them in that order (down "
        "projections; attention outputs within each head); not with V",
    )
    damp: float = Field(
        default=0.01, gt=0, le=1, description="added to the Hessian's diagonal, as a fraction of its mean; grows tenfold where factoring fails"
    )
    indivisible: Literal["error", "keep", "tail"] = Field(
        default="error",
        description="what to do with a linear whose width M does not divide: refuse, leave it as it is, or prune all but its last inputs",
    )
    fallback: Literal["error", "magnitude"] = Field(
        default="error",
        description="for a linear that saw too few tokens or whose Hessian cannot be factored: stop, or prune it by magnitude and record it",
    )

    @field_validator("pattern", mode="before")
    @classmethod
    def _is_pattern(cls, text: Any) -> Any:
        if isinstance(text, int):
            raise ValueError("must stand in quotes, as '2:4': without them YAML takes it for a number of minutes")
        if isinstance(text, str):
            Pattern.parse(text)
        return text

    @property
    def needs_data(self) -> bool:
        return self.method != "magnitude" or self.refit

    @property
    def _pattern(self) -> Pattern:
        return Pattern.parse(self.pattern)

    def takes(self, layout: Layout) -> dict[str, Linear]:
        """The linears this pass prunes, by name."""
        divisor = self._pattern.m if self.indivisible == "keep" else 1
        return {name: linear for name, linear in layout.linears.items() if self.wants(name) and linear.columns % divisor == 0}

    @property
    def moves(self) -> bool:
        return self.permute

    def prunes(self, layout: Layout) -> dict[str, Pattern]:
        return dict.fromkeys(self.takes(layout), self._pattern)

    def plan(self, layout: Layout) -> dict[str, Scheme]:
        return {}

    def check(self, place: str, layout: Layout, problems: Problems) -> None:
        self.check_selection(place, layout, problems)
        pattern, chosen = self._pattern, self.takes(layout)
        if not chosen:
            problems.add(place, "takes no linear at all", "loosen include and exclude, or choose a pattern whose M divides widths")
        if self.permute and pattern.v is not None:
            problems.add(f"{place}: permute", f"moves outputs out of the blocks of {pattern.v} that {pattern} is made of", "set permute: false")
        if self.permute and not layout.arch.folds:
            problems.add(f"{place}: permute", f"the table of {layout.arch.model_type} names no edges to fold into", "set permute: false")
        if self.indivisible == "error":
            _report(place, "width", {name: linear.columns for name, linear in chosen.items()}, pattern.m, "M", LARGEST, problems)
        if narrow := next((linear for linear in chosen.values() if linear.columns < pattern.m), None):
            problems.add(f"{place}: pattern", f"{narrow.name} has {narrow.columns} inputs, fewer than M", "exclude it, or choose a smaller M")
        if pattern.v is not None:
            _report(place, "height", {name: linear.rows for name, linear in chosen.items()}, pattern.v, "V", 128, problems)

    def check_tokens(self, place: str, layout: Layout, samples: int, length: int, problems: Problems) -> None:
        """As `Feeding`."""
        if self.fallback == "error" and self.needs_data:
            remedy = "fallback: magnitude to have it pruned without data and recorded"
            self.check_fed(place, layout, self.takes(layout), samples, length, problems, remedy, experts=True)

    def run(self, model: Model, samples: Samples, workspace: Workspace) -> None:
        from compress.calibrate import sweep, walk

        chosen = self.takes(model.layout)
        if self.needs_data:
            for inputs in sweep(model, samples, workspace, lambda group: bool(split(group, chosen))):
                self._prune(inputs, [split(group, chosen) for group in inputs.groups])
            return
        for block in walk(model, workspace):
            for linear in block.layout.linears:
                if linear.name in chosen:
                    weight = block.weight(linear.name)
                    order = self._order(block, linear, weight, None)
                    self._commit(block, linear, self._masked(_ordered(weight, order), None), order, {"fallback": None})

    def _prune(self, inputs: Inputs, members: list[tuple[Linear, ...]]) -> None:
        """Prune groups of one shape by what they were given."""
        import torch

        from compress.numerics.feedback import factorize
        from compress.numerics.refit import cost

        block, hessian = inputs.block, inputs.hessian
        energy = hessian.diagonal(dim1=1, dim2=2).clone()
        orders: list[Order | None] = []
        for index, linears in enumerate(members):
            # What one linear reads alone can change places; of several only the first is asked, and cannot.
            order = self._order(block, linears[0], block.weight(linears[0].name), energy[index])
            if order:
                hessian[index], energy[index] = hessian[index][order.columns][:, order.columns], energy[index][order.columns]
            orders.append(order)
        factor = factorize(hessian, self.damp, False)
        hessian.diagonal(dim1=1, dim2=2).add_((factor.damp.nan_to_num(0) * energy.mean(1))[:, None])
        reasons = [self._unfit(inputs, index, bool(factor.damp[index].isnan())) for index in range(len(members))]
        for shape in sorted({tuple(linear.rows for linear in linears) for linears in members}):
            batch = [index for index, linears in enumerate(members) if tuple(linear.rows for linear in linears) == shape]
            moment = hessian if len(batch) == len(members) else hessian[batch]  # a copy may be large
            unfit = torch.tensor([reasons[index] is not None for index in batch], device=hessian.device)
            for linears in zip(*(members[index] for index in batch), strict=True):
                exact = [_ordered(block.weight(linear.name), orders[index]) for index, linear in zip(batch, linears, strict=True)]
                weight = torch.stack(exact).to(hessian.dtype)
                pruned = self._solve(weight, moment, energy[batch], factor.members(batch), unfit)
                lost = cost(weight - pruned, moment).sum(1) / cost(weight, moment).sum(1).clamp_min(1e-30)
                for place, (index, linear) in enumerate(zip(batch, linears, strict=True)):
                    reason = reasons[index]
                    record = {
                        "tokens": inputs.tokens[index],
                        "damp": None if reason else float(factor.damp[index]),
                        "error": None if reason else float(lost[place]),
                        "fallback": reason,
                    }
                    self._commit(block, linear, pruned[place], orders[index], record)

    def _solve(self, weight: Tensor, hessian: Tensor, energy: Tensor, factor: Factor, unfit: Tensor) -> Tensor:
        """``weight`` [batch, out, in] pruned, by magnitude where ``unfit`` [batch]; ``hessian`` is damped, ``energy``, its diagonal, is not."""
        import torch

        from compress.numerics.alps import alps
        from compress.numerics.refit import refit
        from compress.numerics.sparsegpt import prune_with_feedback

        plain = torch.stack([self._masked(each, None) for each in weight])
        if self.method in ("sparsegpt", "alps"):
            found, kept = prune_with_feedback(weight, factor, energy == 0, self._pattern)
        else:
            found = torch.stack([self._masked(each, level) for each, level in zip(weight, energy, strict=True)])
            kept = found != 0
        if self.method == "alps":
            found = torch.stack([alps(each, moment, self._pattern, start) for each, moment, start in zip(weight, hessian, found, strict=True)])
        elif self.refit:
            found = refit(weight, found, kept, hessian)
        return torch.where(unfit[:, None, None], plain, found)

    def _masked(self, weight: Tensor, energy: Tensor | None) -> Tensor:
        """``weight`` [out, in] with zeros where the pattern removes."""
        from compress.numerics.sparsity import keep

        return weight.masked_fill(~keep(self._scores(weight, energy), self._pattern), 0)

    def _scores(self, weight: Tensor, energy: Tensor | None) -> Tensor:
        """What is lost with each weight, [out, in]; without ``energy`` [in], the mean squares of inputs, by magnitude."""
        from compress.numerics.sparsity import magnitude, ria, wanda

        if energy is None or self.method == "magnitude":
            return magnitude(weight)
        return ria(weight, energy) if self.method == "ria" else wanda(weight, energy)

    def _order(self, block: Block, linear: Linear, weight: Tensor, energy: Tensor | None) -> Order | None:
        """In which order the inputs of a linear should stand."""
        from compress.reordering import better_order

        return better_order(block, linear.name, self._scores(weight, energy), self._pattern) if self.permute else None

    def _unfit(self, inputs: Inputs, index: int, indefinite: bool) -> str | None:
        """Why a group's statistics cannot be trusted, or None. Raises `InputError` unless the recipe allows for that."""
        group = inputs.groups[index]
        reason = self.starved(group.columns, inputs.tokens[index], inputs.seen)
        reason = reason or ("its Hessian cannot be factored, even with a hundredfold damping" if indefinite else None)
        if reason and self.fallback == "error":
            raise InputError.one(group.name, reason, "give more calibration data, or set fallback: magnitude to have it pruned without and recorded")
        return reason

    def _commit(self, block: Block, linear: Linear, pruned: Tensor, order: Order | None, record: dict[str, Any]) -> None:
        """Give `block` what became of a linear, its inputs in `order`."""
        record = {"pass": "prune_nm", "method": self.method, "permuted": order is not None, **record}
        if order:
            for maker, outputs in order.makers.items():
                block.reorder(maker, outputs)
        block.set_pruned(linear.name, pruned.float(), self._pattern, record, order.columns if order else None)


def _ordered(weight: Tensor, order: Order | None) -> Tensor:
    return weight[:, order.columns] if order else weight


def _report(place: str, what: str, sizes: dict[str, int], divisor: int, letter: str, most: int, problems: Problems) -> None:
    """Report the ``sizes`` of linears, by name, that `divisor` does not divide."""
    bad: dict[int, list[str]] = {}
    for name, size in sizes.items():
        if size % divisor:
            bad.setdefault(size, []).append(name)
    for size, names in sorted(bad.items()):
        works = [number for number in range(2, most + 1) if size % number == 0]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        keep = "; or set indivisible: tail or keep" if letter == "M" else ", or exclude it"
        problems.add(
            f"{place}: pattern",
            f"{letter} = {divisor} does not divide the {what} {size} of {names[0]}{more}",
            f"{letter} that work: {', '.join(map(str, works)) or 'none'}{keep}",
        )
