"""Search for the experts that stay, and for what they become, by how well the model then does (EEP, arXiv 2407.00945).

First choices of experts are varied, starting from those of one-shot scores; then each that stays may become a mixture of all. What is searched is
what will run: with ``mode: foldable`` in stock engines, routers with fewer rows, experts of the same shape, fewer of them per token if the recipe
says so; with ``mode: full`` in `compress.load` alone, routers with all rows, whose probabilities a matrix shares out among the experts that stay.
Fitness is the likelihood of text, or how often good sentences of minimal pairs are preferred; the fittest are judged again on a part of the data that
the search has not seen, and the best there is taken. The whole model is held in memory, its experts twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compress.errors import InputError, Problems
from compress.layout import BlockLayout, Layout
from compress.passes.base import FewerExperts

if TYPE_CHECKING:
    from torch import Tensor

    from compress.calibrate import Workspace
    from compress.data import Samples
    from compress.evolution import Found, Gene, Individual, Options
    from compress.model import Model

JOURNAL, CHOSEN = "search.jsonl", "chosen.json"
SCORES = ("reap", "frequency", "routing_mass", "gated_ean")
"""One-shot choices that the search starts from, beside NAEE's."""


class Pass(FewerExperts):
    """Keep, and mix, the experts with which the model does best."""

    verb: ClassVar[str] = "pruned"
    needs_data: ClassVar[bool] = True

    fitness: Literal["likelihood", "margin", "accuracy"] = Field(
        default="likelihood",
        description="`likelihood` of the calibration text; of `pairs`: how surely (`margin`) or how often the good one is preferred",
    )
    pairs: str | None = Field(default=None, min_length=1, description="minimal pairs, a `.jsonl` of `good` and `bad`, or `demo:pairs`")
    first: int | None = Field(
        default=None,
        ge=4,
        description="so many of the pairs, of an order that is by chance but always the same, leaving the others to evaluate by; all by default",
    )
    mode: Literal["foldable", "full"] = Field(
        default="foldable",
        description="`foldable`: routers stay stock ones; `full`: they keep all rows and have a map, which only `compress.load` knows",
    )
    groups: int | None = Field(default=None, ge=1, description="blocks are put into so many groups that share a choice; each has its own by default")
    start: int = Field(default=10, ge=0, description="choices by chance to begin with, beside those of one-shot scores")
    prune: int = Field(default=40, ge=0, description="generations in which choices change")
    merge: int = Field(default=160, ge=0, description="generations in which experts become mixtures")
    held_out: float = Field(default=0.5, gt=0, lt=1, description="share of the data that the search does not see, to judge the fittest by")
    judged: int = Field(default=20, ge=1, description="how many of the fittest are judged by that")
    seed: int = Field(default=0, ge=0, description="of the search")

    def resident_bytes(self, layout: Layout) -> int:
        return 4 * layout.checkpoint.nbytes

    def sweeps(self, samples: int, length: int) -> float:
        return 2.0 + float(self.start + self.prune + self.merge)

    def check_more(self, place: str, layout: Layout, problems: Problems) -> None:
        if (self.pairs is None) != (self.fitness == "likelihood"):
            wanted = "pairs: demo:pairs or a file" if self.pairs is None else "fitness: margin or accuracy"
            problems.add(f"{place}: fitness", f"{self.fitness} does not go with pairs: {self.pairs}", f"set {wanted}")
        if self.first is not None and self.pairs is None:
            problems.add(f"{place}: first", "is an option of pairs", "leave it out")
        sparse = sum(bool(block.experts) for block in layout.blocks)
        if self.groups is not None and self.groups > sparse:
            problems.add(f"{place}: groups", f"{self.groups} of {sparse} blocks with experts", "set it lower")
        if self.mode == "full" and layout.arch.experts and layout.arch.experts.renormalise is None:
            what = f"routers of a {layout.arch.model_type} take no softmax over all experts, which a map could share out"
            problems.add(f"{place}: mode", what, "set mode: foldable")
        if self.keep == 1 and "prune" in self.model_fields_set:
            problems.add(f"{place}: prune", "there is nothing to choose where all experts stay", "leave it out")
        if self.keep == 1 and not self.merge:
            problems.add(place, "keeps all experts and mixes none", "set keep or merge")

    def chosen(self, layout: Layout, workspace: Workspace) -> dict[int, Sequence[int]]:
        individual, _ = self._chosen(workspace)
        return {index: gene.kept for gene, group in zip(individual, self._grouped(layout), strict=True) for index in group}

    def expected(self, layout: Layout) -> Layout:
        from compress.reshape import fewer_experts, maps

        if self.mode == "foldable":
            return super().expected(layout)
        kept = self.kept(layout)
        return fewer_experts(layout, {block.index: range(kept) for block in layout.blocks if block.experts}, self.active, maps(layout, kept))

    def _grouped(self, layout: Layout) -> list[list[int]]:
        """Numbers of the blocks with experts, by group, in order of depth."""
        sparse = [block.index for block in layout.blocks if block.experts]
        count = self.groups or len(sparse)
        return [sparse[len(sparse) * group // count : len(sparse) * (group + 1) // count] for group in range(count)]

    def run(self, model: Model, samples: Samples, workspace: Workspace) -> None:
        import torch

        from compress.calibrate import walk
        from compress.experts import mixed

        if not (workspace.folder / CHOSEN).exists():
            self._search(model, samples, workspace)
        individual, said = self._chosen(workspace)
        genes = {index: gene for gene, group in zip(individual, self._grouped(model.layout), strict=True) for index in group}
        for block in walk(model, workspace):
            if (gene := genes.get(block.layout.index)) is None:
                continue
            if self.mode == "full":
                block.add_map(torch.tensor(gene.routes or gene.themselves(len(block.layout.experts))))
            elif len(gene.kept) < len(block.layout.experts):
                for name, rows in block.router_tensors().items():
                    block.restructure(name, rows[list(gene.kept)])
            if gene.mix:
                for name, tensor in mixed(block, gene.kept, torch.tensor(gene.mix)).items():
                    block.restructure(name, tensor)
            block.add_record(f"{block.layout.prefix}.experts", self._record(block.layout, gene, said))

    def _record(self, layout: BlockLayout, gene: Gene, said: dict[str, Any]) -> dict[str, Any]:
        record: dict[str, Any] = {"pass": "eep", "kind": "expert", "method": self.fitness, "before": len(layout.experts), "after": len(gene.kept)}
        record |= {"kept": list(gene.kept), "mixed": gene.mix is not None, "mapped": gene.routes is not None} | said
        return record if self.active is None else record | {"active": self.active}

    def _chosen(self, workspace: Workspace) -> tuple[Individual, dict[str, Any]]:
        import json

        from compress.evolution import parsed

        said = json.loads((workspace.folder / CHOSEN).read_text(encoding="utf-8"))
        return parsed(said.pop("genes")), said

    def _search(self, model: Model, samples: Samples, workspace: Workspace) -> None:
        import json

        from compress.evolution import Search, plain
        from compress.fitness import KINDS, Mixture
        from compress.state import write_state_text
        from compress.whole import opened

        seeds = self._seeds(model, samples, workspace)
        seen, held = self._data(model, samples)
        kind = KINDS[self.fitness]
        groups = self._grouped(model.layout)
        with opened(model) as whole:
            mixture = Mixture(whole, groups, self.active, mapped=self.mode == "full")
            options = self._options(model.layout, kind.near)
            search = Search(
                options, lambda individual: mixture.fitness(individual, seen, kind.measure), list(seeds.values()), workspace.folder / JOURNAL
            )
            best = -math.inf

            def advance(found: Found) -> None:
                nonlocal best
                if found.fitness > best:
                    best = found.fitness
                    workspace.progress.note(f"eep: {self.fitness} {best:.4f} after {len(search.archive)} of {search.total}, {found.phase}")
                workspace.progress.blocks(len(groups) * len(search.archive) // search.total, len(groups))

            archive = search.go(advance)
            by_fitness = {found.individual: found for found in sorted(archive, key=lambda found: found.fitness)}
            fittest = sorted(by_fitness.values(), key=lambda found: -found.fitness)[: self.judged]
            judged = [(mixture.fitness(found.individual, held, kind.measure), found) for found in fittest]
            held_out, chosen = max(judged, key=lambda each: (each[0], each[1].fitness))
            shots = {name: search.archive[place].fitness for place, name in enumerate(seeds)}
            said = {
                "fitness": {
                    "before": mixture.fitness(None, seen, kind.measure),
                    "one_shot": max(fitness for name, fitness in shots.items() if not name.startswith("chance")),
                    "after": chosen.fitness,
                    "best": fittest[0].fitness,
                },
                "held_out": {"before": mixture.fitness(None, held, kind.measure), "after": held_out},
                "evaluated": len({found.individual for found in archive}),
                "genes": plain(chosen.individual),
            }
        model.release()
        write_state_text(workspace.folder / CHOSEN, json.dumps(said))

    def _options(self, layout: Layout, near: tuple[float, float]) -> Options:
        from compress.evolution import Options

        count, kept = self.experts(layout), self.kept(layout)
        prune = self.prune if kept < count else 0
        return Options(count, kept, self.sectors(layout), prune, self.merge, near, self.seed, self.mode == "full")

    def _data(self, model: Model, samples: Samples) -> tuple[Samples, Samples]:
        """What the search sees, and what it does not."""
        from compress.data import Samples, Tokenizer, divided, sentence_pairs

        if self.pairs is None:
            return divided(samples, self.held_out, "eep")
        pairs = sentence_pairs(self.pairs, Tokenizer(model.checkpoint.folder), "eep: pairs")
        items = pairs.items[: 2 * self.first] if self.first else pairs.items
        held = 2 * max(1, round(self.held_out * len(items) / 2))
        if held >= len(items):
            raise InputError.one("eep: pairs", f"{len(items) // 2} pairs leave none to search by", "give more of them")
        return Samples(pairs.source, items[held:]), Samples(pairs.source, items[:held])

    def _seeds(self, model: Model, samples: Samples, workspace: Workspace) -> dict[str, Individual]:
        """Where the search starts, by name."""
        from compress.evolution import Gene, arbitrary

        layout = model.layout
        groups, kept = self._grouped(layout), self.kept(layout)
        if kept == self.experts(layout):
            return {"all": tuple(Gene(tuple(range(kept))) for _ in groups)}
        chosen = self._one_shot(model, samples, workspace)
        seeds = {name: tuple(Gene(tuple(gene)) for gene in genes) for name, genes in chosen.items()}
        options = self._options(layout, (0.0, 0.0))
        return seeds | {f"chance {number}": arbitrary(options, len(groups), number) for number in range(self.start)}

    def _one_shot(self, model: Model, samples: Samples, workspace: Workspace) -> dict[str, list[list[int]]]:
        """By method and group, the experts that stay; groups of several blocks by the mean of their scores as shares."""
        from compress.calibrate import look
        from compress.experts import Reconstruction, tally
        from compress.numerics import experts

        groups, kept, sectors = self._grouped(model.layout), self.kept(model.layout), self.sectors(model.layout)
        place = {index: number for number, group in enumerate(groups) for index in group}
        sums: dict[str, dict[int, Tensor]] = {name: {} for name in SCORES}
        found: dict[str, list[list[int]]] = {"naee": []}
        for probe in look(model, samples, workspace.progress):
            number = place.get(probe.block.layout.index)
            if number is None:
                continue
            measured = tally(probe)
            for name in SCORES:
                score = measured.score(experts.SCORES[name], 1.0)
                sums[name][number] = sums[name].get(number, 0) + score / score.sum().clamp_min(1e-30)
            if len(groups) == len(place):
                best, _ = experts.subset(len(probe.block.layout.experts), kept, sectors, Reconstruction(probe, self.active).error, 1)
                found["naee"].append(best.tolist())
        for name, scores in sums.items():
            found[name] = [experts.best(scores[number], kept, sectors).tolist() for number in range(len(groups))]
        return {name: genes for name, genes in found.items() if genes}
