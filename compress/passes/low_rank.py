"""Replace linears by products of two of low rank, each chosen by what it is given with everything before it already replaced.

`svd_llm` (arXiv 2403.07378) loses least of the outputs on the calibration data there is to lose at a rank; `lord` (2309.14021) gets to the same by
the outputs themselves; `asvd` (2312.05821) knows only how large each input is, and `svd` nothing: both are there to compare with. Ranks are the
same share everywhere, or within each block shared out by what each is worth on the model as it was.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compress.errors import Problems
from compress.layout import Layout, Linear
from compress.numerics.ranks import Spectrum, saves, share, uniform, water_filling
from compress.passes.base import Restructure, Selecting, split

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from compress.calibrate import Inputs, Workspace
    from compress.data import Samples
    from compress.model import Model

SPECTRA = "spectra"
"""The folder for what each rank is worth."""


class Pass(Restructure, Selecting):
    """Factor linears."""

    verb: ClassVar[str] = "factored"
    needs_data: ClassVar[bool] = True

    method: Literal["svd_llm", "lord", "asvd", "svd"] = Field(
        default="svd_llm",
        description="what the factors are to keep: `svd_llm`, the outputs on the calibration data; `lord`, the directions in which these are "
        "largest, which comes to the same; `asvd`, the weights times a power of their inputs' mean magnitudes; `svd`, the weights",
    )
    keep: float = Field(default=0.8, gt=0, lt=1, description="share of the parameters of the linears it takes that stay")
    store: Literal["factors", "dense"] = Field(
        default="factors",
        description="`factors`: two linears in sequence, which only this program loads; `dense`: their product as the weight, which everything loads "
        "and which by itself saves **no** bytes",
    )
    ranks: Literal["water_filling", "uniform"] = Field(
        default="water_filling",
        description="`water_filling`: within each block, ranks go where they are worth most per parameter, measured beforehand on the model as it "
        "was, and some linears may stay whole; `uniform`: the same share of every linear",
    )
    alpha: float = Field(default=0.5, gt=0, le=1, description="`asvd`: power of the inputs' mean magnitudes")
    multiple_of: int = Field(
        default=16,
        ge=1,
        description="ranks are multiples of this; where factors are quantised in groups, of the group's size, so that it divides them",
    )

    def sweeps(self, samples: int, length: int) -> float:
        return 5.0 if self.ranks == "water_filling" else 2.5

    @property
    def estimated(self) -> bool:
        return self.ranks == "water_filling" and self.store == "factors"

    def takes(self, layout: Layout) -> dict[str, Linear]:
        """The linears this pass replaces, by name, but for those that no rank makes smaller."""
        return {name: linear for name, linear in layout.linears.items() if self.wants(name)}

    def check(self, place: str, layout: Layout, problems: Problems) -> None:
        self.check_selection(place, layout, problems)
        if self.method != "asvd" and "alpha" in self.model_fields_set:
            problems.add(f"{place}: alpha", f"is an option of asvd, which {self.method} does not read", "leave it out, or take method: asvd")
        chosen = self.takes(layout)
        if pair := next((name for name in sorted(layout.factored) if {f"{name}.0", f"{name}.1"} & chosen.keys()), None):
            problems.add(place, f"{pair} is two linears of low rank already", "exclude it")
        if self.store == "factors" and (expert := next((name for name in chosen if name in layout.of_experts), None)):
            problems.add(
                f"{place}: store", f"{expert} is a routed expert, which transformers holds in one tensor with all others", "exclude it, or set dense"
            )
        smaller = [linear for linear in chosen.values() if saves(linear.rows, linear.columns, self.multiple_of)]
        if not smaller:
            problems.add(place, f"no rank that is a multiple of {self.multiple_of} makes any linear smaller", "loosen include, or lower multiple_of")
        for linear in smaller:
            if (rank := share(linear.rows, linear.columns, self.keep)) < self.multiple_of:
                problems.add(
                    f"{place}: keep",
                    f"{self.keep:g} of the parameters of {linear.name} is rank {rank}, less than multiple_of {self.multiple_of}",
                    "keep more, lower multiple_of, or exclude it",
                )
                break

    def expected(self, layout: Layout) -> Layout:
        from compress.reshape import in_two, with_factors

        if self.store == "dense":
            return layout
        ranks = {name: rank for name, linear in self.takes(layout).items() if (rank := self._uniform(linear))}
        if self.ranks == "water_filling":
            # Whatever comes out, ranks are multiples, and may be as low as one; what that one leaves over goes to others.
            ranks = {name: rank + self.multiple_of for name, rank in ranks.items()}
            ranks[next(iter(ranks))] = self.multiple_of
        return with_factors(layout, in_two(layout, ranks))

    def outcome(self, layout: Layout, workspace: Workspace) -> Layout:
        from compress.checkpoint import read_header
        from compress.reshape import with_factors

        found = {name: info for block in layout.blocks for name, info in read_header(workspace.block_file(block.index))[0].items()}
        return with_factors(layout, found)

    def run(self, model: Model, samples: Samples, workspace: Workspace) -> None:
        from compress.numerics.low_rank import decompose, lost, output_directions

        ranks = self._ranks(model, samples, workspace)
        for inputs, index, linear, root, added in self._walk(model, samples, workspace):
            rank, full, moment = ranks[linear.name], min(linear.rows, linear.columns), inputs.hessian[index]
            record: dict[str, Any] = {"pass": "low_rank", "method": self.method, "tokens": inputs.tokens[index], "rank": [full, rank or full]}
            if rank is None:
                inputs.block.add_record(linear.name, record | {"kind": "left whole", "error": 0.0, "fallback": None})
                continue
            weight = inputs.block.weight(linear.name)
            factors = output_directions(weight, moment, rank) if root is None else decompose(weight, root, rank)
            product = inputs.block.set_factors(linear.name, factors.first, factors.second, apart=self.store == "factors")
            reason = f"its inputs' second moment is not positive definite: {added:.3g} added to the diagonal" if added else None
            record |= {"kind": linear.name.rpartition(".")[2], "error": lost(weight, product, moment), "fallback": reason}
            inputs.block.add_record(linear.name, record)

    def _ranks(self, model: Model, samples: Samples, workspace: Workspace) -> dict[str, int | None]:
        """Of each linear; None, it stays whole."""
        from compress.calibrate import Workspace
        from compress.checkpoint import read_header
        from compress.numerics.low_rank import energy, output_energy

        if self.ranks == "uniform":
            return {name: self._uniform(linear) for name, linear in self.takes(model.layout).items()}
        # The spectra are the records of a sweep that changes nothing: a killed run continues it like any other.
        beforehand = Workspace(workspace.folder / SPECTRA, workspace.progress)
        beforehand.folder.mkdir(exist_ok=True)
        for inputs, index, linear, root, _ in self._walk(model, samples, beforehand):
            weight, seen = inputs.block.weight(linear.name), inputs.tokens[index] / inputs.seen
            found = output_energy(weight, inputs.hessian[index]) if root is None else energy(weight, root)
            inputs.block.add_record(linear.name, {"energy": (seen * found[: min(linear.rows, linear.columns)]).tolist()})
        files = [beforehand.block_file(block.index) for block in model.blocks]
        spectra = {record["name"]: record["energy"] for file in files for record in json.loads(read_header(file)[1]["records"])}
        chosen, ranks = self.takes(model.layout), dict[str, int | None]()
        for block in model.blocks:  # errors of different blocks do not compare: the stream they are added to grows
            mine = {linear.name: Spectrum(linear.rows, linear.columns, spectra[linear.name]) for linear in block.linears if linear.name in chosen}
            ranks |= water_filling(mine, self.keep, self.multiple_of)
        return ranks

    def _walk(self, model: Model, samples: Samples, workspace: Workspace) -> Iterator[tuple[Inputs, int, Linear, Tensor | None, float]]:
        """Each linear in turn, with the number of its group among the inputs, what its weight is to be multiplied by, and what was added to that."""
        from compress.calibrate import sweep

        chosen = self.takes(model.layout)
        for inputs in sweep(model, samples, workspace, lambda group: bool(split(group, chosen)), magnitudes=self.method == "asvd"):
            for index, group in enumerate(inputs.groups):
                root, added = self._root(inputs, index)
                for linear in split(group, chosen):
                    yield inputs, index, linear, root, added

    def _root(self, inputs: Inputs, index: int) -> tuple[Tensor | None, float]:
        """What stands for the square root of the second moment of a group, and what was added to that. None: outputs tell instead."""
        import torch

        from compress.numerics.low_rank import magnitudes_root, moment_root

        match self.method:
            case "svd_llm":
                return moment_root(inputs.hessian[index])
            case "asvd":
                assert inputs.magnitude is not None
                return magnitudes_root(inputs.magnitude[index], self.alpha), 0.0
            case "svd":
                return torch.ones(inputs.groups[index].columns, dtype=torch.float64, device=inputs.hessian.device), 0.0
            case "lord":
                return None, 0.0

    def _uniform(self, linear: Linear) -> int | None:
        return uniform(linear.rows, linear.columns, self.keep, self.multiple_of)
