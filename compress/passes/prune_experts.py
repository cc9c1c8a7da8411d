"""Take whole experts out of every sparse block, or make one of several, so that a smaller mixture remains which any engine loads.

Router rows, correction biases and the config go with them, and the experts that stay are counted through anew. All statistics are those of the
experts that the router chose, exactly, from the model as it was. Shared experts and dense blocks stay as they are.

* Scores, one family (arXiv 2606.15716): `frequency`, `routing_mass`, `ean`, `gated_ean`, `reap` (arXiv 2510.13999), `man`, `msan`. Those that are
  means over the tokens an expert saw count less for one that few tokens reached (`guard`).
* `naee` (arXiv 2402.14800): the experts that together come nearest to what all of them give, every choice tried or one dropped after the other.
* `stun` (arXiv 2409.06211): of experts whose router rows are alike and which serve the same tokens, the one nearest to their mean.
* `hc_smoe` (arXiv 2410.08589) and `m_smoe` (arXiv 2310.01334): experts that give alike, or whose router logits are alike, become their average by
  how often each was used, behind the router row of the most used one. Routers know no sums of probabilities, so that is not what the papers run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compress.errors import Problems
from compress.layout import BlockLayout, Layout
from compress.passes.base import FewerExperts

if TYPE_CHECKING:
    from torch import Tensor

    from compress.block import Block
    from compress.calibrate import Workspace
    from compress.data import Samples
    from compress.model import Model
    from compress.numerics.experts import Tally
    from compress.probe import Probe

Method = Literal[
    "reap", "frequency", "routing_mass", "ean", "gated_ean", "man", "msan", "naee", "stun", "hc_smoe", "m_smoe", "random"
]  # fmt: skip
MEANS = ("reap", "man", "msan")
SCORED = (*MEANS, "frequency", "routing_mass", "ean", "gated_ean")
MERGING = ("hc_smoe", "m_smoe")
CHOSEN = "experts.safetensors"


class Pass(FewerExperts):
    """Keep the most valuable experts of each block."""

    verb: ClassVar[str] = "pruned"

    method: Method = Field(default="reap", description="what an expert is worth, or how several become one; the list above")
    guard: float = Field(
        default=1.0,
        ge=0,
        description="of scores that are means: how many times the mean number of tokens an expert must see to count half of what it says",
    )
    protect: bool = Field(
        default=True, description="of scores: keep super experts, whose outputs are larger by far than all others (arXiv 2507.23279)"
    )
    most: int = Field(default=200, ge=1, description="`naee`: try every choice of experts if there are at most so many, otherwise drop one by one")
    coactivation: float = Field(default=1.0, ge=0, description="`stun`: weight of how often two experts serve the same token")
    align: bool = Field(default=True, description="`hc_smoe`, `m_smoe`: match the neurons of experts before they are averaged")
    seed: int = Field(default=0, ge=0, description="of what is random")

    @property
    def needs_data(self) -> bool:
        return self.method != "random" and self.keep < 1

    def sweeps(self, samples: int, length: int) -> float:
        return 2.0 * self.needs_data

    def check_more(self, place: str, layout: Layout, problems: Problems) -> None:
        for name, methods in (
            ("guard", MEANS), ("protect", SCORED), ("most", ("naee",)), ("coactivation", ("stun",)), ("align", MERGING), ("seed", ("random",)),
        ):  # fmt: skip
            if name in self.model_fields_set and self.method not in methods:
                problems.add(f"{place}: {name}", f"is an option of {', '.join(methods)}, which {self.method} does not read", "leave it out")
        table = layout.arch.experts
        if table and self.keep == 1 and self.active in (None, layout.text_config[table.active]):
            problems.add(place, "keeps all experts and changes nothing", "set keep below 1, or active")

    def chosen(self, layout: Layout, workspace: Workspace) -> dict[int, Sequence[int]]:
        from compress.checkpoint import read_header, read_tensor

        return {int(name): read_tensor(info).tolist() for name, info in read_header(workspace.folder / CHOSEN)[0].items() if name.isdigit()}

    def run(self, model: Model, samples: Samples, workspace: Workspace) -> None:
        import torch

        from compress.calibrate import walk
        from compress.checkpoint import entry, read_header, read_tensor
        from compress.experts import merged
        from compress.state import write_state

        path = workspace.folder / CHOSEN
        if not path.exists():
            write_state(path, [entry(name, tensor) for name, tensor in self._choose(model, samples, workspace).items()], {})
        found = {name: read_tensor(info) for name, info in read_header(path)[0].items()}
        for block in walk(model, workspace):
            if not block.layout.experts:
                continue
            index = block.layout.index
            kept, cluster, tokens = found[f"{index}"], found.get(f"{index}.cluster"), found.get(f"{index}.tokens")
            if len(kept) < len(block.layout.experts):
                for name, rows in block.router_tensors().items():
                    block.restructure(name, rows[kept.to(rows.device)])
            if cluster is not None and tokens is not None:
                for first in kept.tolist():
                    members = torch.nonzero(cluster == cluster[first]).flatten().tolist()
                    for name, tensor in merged(block, members, tokens, first, align=self.align).items():
                        block.restructure(name, tensor)
            measured = {what: found.get(f"{index}.{what}") for what in ("tokens", "score", "protected")}
            block.add_record(f"{block.layout.prefix}.experts", self._record(block.layout, kept, cluster, **measured))

    def _record(
        self, layout: BlockLayout, kept: Tensor, cluster: Tensor | None, tokens: Tensor | None, score: Tensor | None, protected: Tensor | None
    ) -> dict[str, Any]:
        record: dict[str, Any] = {"pass": "prune_experts", "kind": "expert", "method": self.method}
        record |= {"before": len(layout.experts), "after": len(kept), "kept": kept.tolist()}
        if self.active is not None:
            record["active"] = self.active
        if cluster is not None:
            record["merged_into"] = [next(one for one in kept.tolist() if cluster[one] == mine) for mine in cluster]
        if tokens is not None:
            record["tokens"] = [int(count) for count in tokens]
            unseen = [expert for expert, count in enumerate(record["tokens"]) if not count]
            named = f"expert{'s' if len(unseen) > 1 else ''} {', '.join(map(str, unseen))}"
            record["fallback"] = f"{named} saw none of the calibration tokens, which says nothing of what they are worth" if unseen else None
        if score is not None:
            record["scores"] = [float(f"{each:.6g}") for each in score]
        if protected is not None:
            record["super_experts"] = protected.nonzero().flatten().tolist()
        return record

    def _choose(self, model: Model, samples: Samples, workspace: Workspace) -> dict[str, Tensor]:
        """By block: which experts stay; with those, as far as they were asked for, tokens, scores and clusters."""
        import torch

        if not self.needs_data:
            return self._blindly(model.layout)
        from compress.calibrate import look
        from compress.experts import tally
        from compress.numerics.experts import super_experts

        found: dict[str, Tensor] = {}
        tallies: dict[int, Tally] = {}
        for probe in look(model, samples, workspace.progress):
            block = probe.block
            if block.layout.experts:
                tallies[block.layout.index] = measured = tally(probe)
                decided = self._of_block(probe, measured, self.kept(model.layout), self.sectors(model.layout))
                found |= {f"{block.layout.index}{part}": tensor.cpu() for part, tensor in decided.items()}
        if self.protect:
            for index, protected in zip(tallies, super_experts([one.peaks for one in tallies.values()]), strict=True):
                if f"{index}.score" in found:
                    found[f"{index}.protected"] = protected.cpu()
        for index, measured in tallies.items():
            found[f"{index}.tokens"] = measured.tokens.cpu()
            if (score := found.get(f"{index}.score")) is not None:
                found[f"{index}"] = self._best(score, model.layout, found.get(f"{index}.protected"))
        return {name: tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor for name, tensor in found.items()}

    def _blindly(self, layout: Layout) -> dict[str, Tensor]:
        import torch

        generator, found = torch.Generator().manual_seed(self.seed), {}
        for block in layout.blocks:
            if block.experts:
                score = torch.rand(len(block.experts), generator=generator, dtype=torch.float64)
                found[f"{block.index}"] = self._best(score, layout, None)
        return found

    def _best(self, score: Tensor, layout: Layout, protected: Tensor | None) -> Tensor:
        from compress.numerics.experts import best

        return best(score, self.kept(layout), self.sectors(layout), protected)

    def _of_block(self, probe: Probe, measured: Tally, count: int, groups: int) -> dict[str, Tensor]:
        """What decides which `count` stay, of each of so many `groups` equally many: a score of each, or which they are, and in what clusters."""
        from compress.experts import Reconstruction
        from compress.numerics.experts import SCORES, subset

        if self.method in SCORES:
            return {".score": measured.score(SCORES[self.method], self.guard)}
        if self.method == "naee":
            kept, _ = subset(len(probe.block.layout.experts), count, groups, Reconstruction(probe, self.active).error, self.most)
            return {"": kept}
        return self._clustered(probe, measured, count, groups)

    def _clustered(self, probe: Probe, measured: Tally, count: int, groups: int) -> dict[str, Tensor]:
        import torch

        from compress.experts import logits
        from compress.numerics.experts import apart, clusters, joined, representatives

        if self.method == "m_smoe":
            cluster = joined(logits(probe), measured.tokens, count, groups)
        elif self.method == "hc_smoe":
            mean = measured.mean()
            cluster = clusters(torch.cdist(mean, mean), count, "average", groups)
        else:
            rows = probe.block.router.weight.double()
            cluster = clusters(apart(rows, measured.together, self.coactivation), count, "complete", groups)
        if self.method == "stun":
            return {"": representatives(cluster, _nearest(probe.block, cluster))}
        return {"": representatives(cluster, measured.tokens), ".cluster": cluster}


def _nearest(block: Block, cluster: Tensor) -> Tensor:
    """[experts] float64: less, the farther an expert's weights are from the mean of its cluster."""
    import torch

    found = torch.zeros(len(cluster), dtype=torch.float64)
    for number in sorted(set(cluster.tolist())):
        members = torch.nonzero(cluster == number).flatten().tolist()
        weights = [{what: block.tensor(f"{block.layout.prefix}.{name}") for what, name in block.expert_tensors(one).items()} for one in members]
        for what in weights[0]:
            mean = torch.stack([each[what] for each in weights]).mean(0)
            for one, each in zip(members, weights, strict=True):
                found[one] -= float((each[what] - mean).double().square().sum())
    return found
