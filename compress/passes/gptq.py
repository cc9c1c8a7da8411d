"""GPTQ (arXiv 2210.17323): round columns one after the other, feeding each one's error back into those still to come.

Beyond the paper: the loudest inputs first with groups kept in place ("static groups"), scales searched before rounding on errors weighted
by the root of what each input's will cost under feedback (the diagonal of the factored Hessian), damping that grows only where it must,
and on request the correction of errors made before (QEP, arXiv 2504.09629).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field

from compress.passes.base import Calibrated, split

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from compress.calibrate import Inputs, Workspace
    from compress.data import Samples
    from compress.layout import Linear
    from compress.model import Model
    from compress.numerics.grid import Grid, Scales


JUDGED_ROWS = 128
"""Outputs of a linear whose error is put into relation, evenly spaced: all of them would cost as much as the rounding itself."""


class Pass(Calibrated):
    """Round with error feedback, measured on calibration data."""

    act_order: bool = Field(
        default=True, description="round the inputs with the largest second moment first; groups stay in place, so no index is stored"
    )
    damp: float = Field(
        default=0.01, gt=0, le=1, description="added to the Hessian's diagonal, as a fraction of its mean; grows tenfold where factoring fails"
    )
    scales: Literal["minmax", "mse", "hessian"] = Field(
        default="hessian",
        description="`minmax`: the group's range; `mse`: least squared error; `hessian`: weighted by the root of what each costs under feedback",
    )
    qep: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of the error of earlier linears that each one corrects beforehand (QEP, 0.5 is usual), in its own input and in the "
        "residual stream it is added to; not for experts; takes twice the forward passes and one more block of memory",
    )

    pool: bool = Field(
        default=False,
        description="an expert that saw too few tokens is given, for those it lacks, the mean statistics of all experts of its block, and is "
        "recorded; otherwise it is a case for `fallback`",
    )

    @property
    def pools(self) -> bool:
        return self.pool

    def alone(self) -> Self:
        return self.model_copy(update={"qep": 0.0})  # it would make good here for errors that other bits elsewhere do not make

    def run(self, model: Model, samples: Samples, workspace: Workspace) -> None:
        from compress.calibrate import sweep

        chosen = self.takes(model.layout)
        peaks = self.activations == "static"
        for inputs in sweep(model, samples, workspace, lambda group: bool(split(group, chosen)), drift=self.qep > 0, peaks=peaks):
            self._quantize(inputs, [split(group, chosen) for group in inputs.groups])

    def _quantize(self, inputs: Inputs, members: list[tuple[Linear, ...]]) -> None:
        import torch

        from compress.hardware import in_parallel
        from compress.numerics.feedback import factorize, round_with_feedback
        from compress.numerics.grid import Scales, quantized, round_to_nearest

        block = inputs.block
        pooled = self._fill(inputs) if self.pool else {}
        factor = factorize(inputs.hessian, self.damp, self.act_order, overwrite=True)
        for shape in sorted({tuple(linear.rows for linear in linears) for linears in members}):
            batch = [index for index, linears in enumerate(members) if tuple(linear.rows for linear in linears) == shape]
            weight = torch.empty(len(batch), sum(shape), factor.upper.shape[1], device=factor.upper.device, dtype=factor.upper.dtype)
            for place, index in enumerate(batch):
                torch.cat([block.weight(linear.name) for linear in members[index]], out=weight[place])
            reasons = [self._unfit(inputs, index, bool(factor.damp[index].isnan()), index in pooled) for index in batch]
            for index, reason in zip(batch, reasons, strict=True):
                if reason:
                    self.refuse(inputs.groups[index].name, reason)
            if inputs.moved is not None and reasons == [None]:
                # What was lost before this linear, as far as its own inputs can make it good: section 4 of arXiv 2504.09629, and the same
                # for the residual stream, which the paper leaves as it is.
                lost = weight[0] @ inputs.moved.inputs
                if inputs.moved.stream is not None:
                    lost += inputs.moved.stream
                weight[0].add_(factor.solve(0, lost), alpha=self.qep)
            kept = None
            if any(block.is_pruned(linear.name) for index in batch for linear in members[index]):
                kept = torch.stack([torch.cat([block.kept(linear.name) for linear in members[index]]) for index in batch])
                weight *= kept  # what was corrected beforehand must not bring back what was removed
            first = members[batch[0]][0]
            scheme = self.scheme(first)
            stored = scheme.stored(block.stored_dtype(first.name))
            grids = [scheme.grid(float(each.abs().max())) for each in weight]
            importance = factor.importance()[batch]
            found = in_parallel(
                lambda each: self._scales(each[0], each[1], scheme.group_size, stored, each[2], shape),  # noqa: B023 (done before the next)
                zip(weight, grids, importance, strict=True),
            )
            scales = Scales(torch.stack([each.scale for each in found]), torch.stack([each.zero for each in found]))
            codes, cost = round_with_feedback(weight, factor.members(batch), scales, grids[0], kept=kept)
            for place, (index, reason) in enumerate(zip(batch, reasons, strict=True)):
                if reason:
                    codes[place] = round_to_nearest(weight[place], found[place], grids[place])
                start = 0
                for linear in members[index]:
                    rows = slice(start, start + linear.rows)
                    start += linear.rows
                    part = Scales(found[place].scale[rows], found[place].zero[rows])
                    sample = slice(rows.start, rows.stop, max(1, linear.rows // JUDGED_ROWS))
                    energy = factor.energy(index, weight[place, sample]).sum().clamp_min(1e-30)
                    record = {
                        "pass": "gptq",
                        "tokens": inputs.tokens[index],
                        "damp": None if reason else float(factor.damp[index]),
                        "error": None if reason else float(cost[place, sample].sum() / energy),
                        "fallback": reason or pooled.get(index),
                    }
                    self.commit(block, linear, quantized(codes[place, rows], part, grids[place], stored), record, inputs.peaks[index])

    def _scales(self, weight: Tensor, grid: Grid, group_size: int, stored: torch.dtype, importance: Tensor, shape: tuple[int, ...]) -> Scales:
        """Scales of ``weight``, which is several linears of so many rows."""
        import torch

        from compress.numerics.grid import Scales, minmax_scales, search_scales

        if self.scales == "minmax":
            found = [minmax_scales(part, grid, group_size, stored) for part in torch.split(weight, list(shape))]
            return Scales(torch.cat([each.scale for each in found]), torch.cat([each.zero for each in found]))
        weighted = self.scales == "hessian" and bool(importance.isfinite().all()) and float(importance.max()) > 0
        # Between equal weights, which ignore the data, and the full cost, which fits them too closely: docs/log.md.
        return search_scales(weight, grid, group_size, stored, importance.sqrt() if weighted else None)

    def _fill(self, inputs: Inputs) -> dict[int, str]:
        """Fill up the Hessian of each expert that saw too few tokens with the mean of all; why, by its number among the groups."""
        import torch

        tokens = torch.tensor(inputs.tokens, dtype=inputs.hessian.dtype, device=inputs.hessian.device)
        groups = enumerate(inputs.groups)
        lacking = {
            index: reason
            for index, group in groups
            if group.expert is not None and (reason := self.starved(group.columns, inputs.tokens[index], inputs.seen))
        }
        if not lacking or not tokens.sum():
            return {}
        mean = torch.einsum("g,gij->ij", tokens / tokens.sum(), inputs.hessian)
        for index in lacking:
            own = min(1.0, inputs.tokens[index] / self.needed(inputs.groups[index].columns))
            inputs.hessian[index].mul_(own).add_(mean, alpha=1 - own)
        return {index: f"{reason}; filled up with those of all experts" for index, reason in lacking.items()}

    def _unfit(self, inputs: Inputs, index: int, indefinite: bool, pooled: bool) -> str | None:
        """Why a group's statistics cannot be trusted, or None."""
        starved = None if pooled else self.starved(inputs.groups[index].columns, inputs.tokens[index], inputs.seen)
        return starved or ("its Hessian cannot be factored, even with a hundredfold damping" if indefinite else None)
