"""Keep older tokens of the KV cache as latents of fewer channels (CSKV, arXiv 2409.10593): the best projections, in closed form.

The newest tokens stay exactly as they are; when they leave this window, the keys and values of all heads of a block are projected together
(`compress.numerics.latents`), and attention reads what the projections give back. Prompts are computed exactly. Blocks are measured in order, each
with what those before it lose, as every token after the window finds it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compress.errors import InputError, Problems
from compress.layout import Layout
from compress.options import Options
from compress.scheme import WIDEST, LatentScheme, Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from compress.calibrate import Workspace
    from compress.data import Samples
    from compress.model import Model
    from compress.numerics.latents import Basis
    from compress.probe import Probe

LESSON = 256
"""Tokens of a text that are trained on, or as many windows as make four."""
SPECTRA = "spectra"
"""The folder for what each direction is worth."""


class Pass(Options):
    """Project keys and values."""

    stage: ClassVar[str] = "cache"
    needs_data: ClassVar[bool] = True

    keep: float = Field(default=0.5, gt=0, le=1, description="share of the channels of keys and values that latents have")
    window: int = Field(
        default=32, ge=0, le=WIDEST, description="newest tokens that stay exactly as they are; up to 31 more do, since tokens leave by blocks"
    )
    bits: Literal[16, 4, 2] = Field(
        default=16, description="of latents: 16, the dtype of the model; 4 or 2, keys by channel over 32 tokens, values by token after a rotation"
    )
    method: Literal["aware", "whitened", "asvd", "svd"] = Field(
        default="aware",
        description="what projections lose least of: `aware`, attention scores and the output of attention; `whitened`, keys and values; `asvd` and "
        "`svd`, to compare with, those of inputs of which only the magnitudes are known, or nothing",
    )
    keys: Literal["joint", "commuting"] = Field(
        default="joint",
        description="`joint`: all heads together, the most for a channel, but each step of decoding restores and rotates old keys; `commuting`: "
        "complex combinations of heads, for each pair of channels that rotates, which need neither: they keep less, and decoding is faster",
    )
    ranks: Literal["uniform", "water_filling"] = Field(
        default="uniform",
        description="`uniform`: the same share everywhere; `water_filling`: channels go where they take most of what is there, among keys and values "
        "of all blocks, measured beforehand",
    )
    keep_keys: float | None = Field(
        default=None, gt=0, le=1, description="`uniform`: share of the channels of keys alone, those of values get the rest"
    )
    tune: int = Field(
        default=0, ge=0, description="steps of training, block by block, that follow the closed form: by what attention gives, of `joint` keys"
    )
    multiple_of: int = Field(default=8, ge=1, description="channels of latents are multiples of this")

    def check(self, place: str, layout: Layout, problems: Problems) -> None:
        kind = layout.arch.model_type
        if layout.arch.latent:
            problems.add(place, f"a {kind} caches one latent vector for all heads already", "leave kv_shrink out")
            return
        LatentScheme.refuse(place, layout, problems)
        channels = layout.cached_channels // 2
        if channels % self.multiple_of:
            problems.add(f"{place}: multiple_of", f"{self.multiple_of} does not divide the {channels} channels of keys", "take a divisor")
        elif int(self.keep * channels) < self.multiple_of:
            problems.add(
                f"{place}: keep", f"{self.keep:g} of {channels} channels is less than multiple_of, {self.multiple_of}", "keep more, or lower that"
            )
        if self.keep_keys is not None:
            if self.ranks != "uniform":
                problems.add(f"{place}: keep_keys", "is an option of ranks: uniform", "leave it out, or set that")
            elif not self.multiple_of <= int(self.keep_keys * channels) or int((2 * self.keep - self.keep_keys) * channels) not in range(
                self.multiple_of, channels + 1
            ):
                values = 2 * self.keep - self.keep_keys
                problems.add(f"{place}: keep_keys", f"{self.keep_keys:g} leaves values {values:g} of their channels", "keep both between 0 and 1")
        if self.keys == "commuting" and self.method != "aware":
            problems.add(f"{place}: keys", f"commuting is of method aware, not {self.method}", "take joint, or aware")
        if self.keys == "commuting" and self.tune:
            problems.add(f"{place}: tune", "trained keys would no longer commute with rotation", "leave it out, or take joint")
        if self.keys == "commuting" and self.multiple_of % 2:
            problems.add(f"{place}: multiple_of", f"{self.multiple_of} would part channels that rotate together", "take an even number")
        if self.method in ("asvd", "svd") and any(name.endswith("k_norm.weight") for name in layout.in_blocks):
            problems.add(f"{place}: method", f"{self.method} goes by weights, but a {kind} normalises keys after them", "take aware or whitened")

    def plan(self, layout: Layout) -> dict[str, Scheme]:
        return {}

    def cache(self) -> LatentScheme:
        """How the cache is stored."""
        return LatentScheme(keep=self.keep, multiple_of=self.multiple_of, window=self.window, bits=self.bits)

    def run(self, model: Model, samples: Samples, workspace: Workspace) -> None:
        from compress.calibrate import visit

        chosen = self.cache().blocks(model.layout)
        ranks = self._ranks(model, samples, workspace)
        for probe in visit(model, samples, workspace):
            if probe.block.layout.index in chosen:
                self._project(probe, model, ranks, samples.tokens)
            else:
                probe.block.add_record(
                    f"{probe.block.layout.prefix}.{model.layout.arch.attention}",
                    {"pass": "kv_shrink", "kind": "left whole", "fallback": None, "window": model.layout.windows[probe.block.layout.index]},
                )

    def _project(self, probe: Probe, model: Model, ranks: dict[str, int], tokens: int) -> None:
        import torch

        from compress.latents import Latents

        index = probe.block.layout.index
        keys, values = self._bases(probe, model)
        ends: list[tuple[Tensor, Tensor]] = []
        record: dict[str, Any] = {"pass": "kv_shrink", "method": self.method, "keys": self.keys, "window": self.window, "latent_bits": self.bits}
        record |= {"tokens": tokens, "fallback": None}
        chosen = [
            (found.down[: ranks[f"{index}.{what}"]], found.up[:, : ranks[f"{index}.{what}"]]) for what, found in (("keys", keys), ("values", values))
        ]
        if self.tune:
            chosen, errors = self._tuned(probe, model, chosen)
            record |= {"steps": self.tune, "output_error": errors}
        for what, found, (down, up) in (("keys", keys, chosen[0]), ("values", values, chosen[1])):
            rank = len(down)
            if self.bits < 16 and what == "values":
                # Latents fall in size, and one scale for all of a token would leave the small ones nothing.
                turn = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q.to(down)
                down, up = turn @ down, up @ turn.T
            ends.append((down, up))
            record |= {
                f"{what[:-1]}_rank": [len(found.energy), rank],
                f"{what[:-1]}_error": float(found.energy[rank:].sum() / found.energy.sum().clamp_min(1e-30)),
            }
        made = Latents(ends[0], ends[1], self.window, self.bits, self.keys == "commuting")
        probe.block.set_latents(made, record)

    def _tuned(self, probe: Probe, model: Model, start: list[tuple[Tensor, Tensor]]) -> tuple[list[tuple[Tensor, Tensor]], list[float]]:
        """The projections of a block after training, and what attention gives is off by before and after."""
        from compress.numerics.tuned_latents import Lesson, tuned

        lessons: list[Lesson] = []
        longest = max(LESSON, 4 * self.window)

        def note(query: Tensor, key: Tensor, value: Tensor, rotation: tuple[Tensor, Tensor]) -> None:
            turns = [part.expand(len(query), -1, -1) for part in rotation]
            for row in range(len(query)):
                parts = [states[row : row + 1, :, :longest].clone() for states in (query, key, value)]
                cos, sin = (part[row : row + 1, :longest].clone() for part in turns)
                lessons.append(Lesson(parts[0], parts[1], parts[2], (cos, sin)))

        probe.of_attention(note)
        lessons = [each for each in lessons if each.query.shape[2] > self.window + 1]
        if not lessons:
            raise InputError.one("kv_shrink: tune", f"no calibration text is longer than the window of {self.window}", "take longer ones")
        block = probe.block
        out = block.weight(f"{block.layout.prefix}.{model.layout.arch.writers[0]}")
        (keys, values), scaling = start, block.head_dim**-0.5
        found, errors = tuned((*keys, *values), lessons, out, self.window, scaling, self.tune)
        return [found[:2], found[2:]], list(errors)

    def _ranks(self, model: Model, samples: Samples, workspace: Workspace) -> dict[str, int]:
        """Of keys and values of each block."""
        from compress.calibrate import Workspace, visit
        from compress.checkpoint import read_header
        from compress.numerics.latents import ranks

        channels, chosen = model.layout.cached_channels // 2, self.cache().blocks(model.layout)
        if self.ranks == "uniform":
            of_keys = self._multiple((self.keep_keys or self.keep) * channels)
            of_values = self._multiple(2 * self.keep * channels) - of_keys if self.keep_keys else of_keys
            return {f"{index}.{what}": rank for index in chosen for what, rank in (("keys", of_keys), ("values", of_values))}
        # The spectra are the records of a walk that changes nothing: a killed run continues it like any other.
        beforehand = Workspace(workspace.folder / SPECTRA, workspace.progress)
        beforehand.folder.mkdir(exist_ok=True)
        for probe in visit(model, samples, beforehand):
            if probe.block.layout.index in chosen:
                for what, found in zip(("keys", "values"), self._bases(probe, model), strict=True):
                    probe.block.add_record(f"{probe.block.layout.index}.{what}", {"energy": found.energy.tolist()})
        files = [beforehand.block_file(block.index) for block in model.blocks]
        spectra = {record["name"]: record["energy"] for file in files for record in json.loads(read_header(file)[1]["records"])}
        return ranks(spectra, self.cache().channels(model.layout), self.multiple_of, dict.fromkeys(spectra, 1.0))

    def _multiple(self, channels: float) -> int:
        return int(channels) // self.multiple_of * self.multiple_of

    def _bases(self, probe: Probe, model: Model) -> tuple[Basis, Basis]:
        """For keys and values of a block."""
        import torch

        from compress.numerics.latents import basis, commuting_basis, cost_of_keys, cost_of_values, rotate_back, side_by_side

        block, layout = probe.block, model.layout
        size, heads, width = layout.cached_channels // 2, layout.kv_heads, block.head_dim
        keys, values = (torch.zeros(size, size, dtype=torch.float64, device=model.device) for _ in range(2))
        queries = torch.zeros(1, width // 2, dtype=torch.float64, device=model.device)
        count = 0

        def note(query: Tensor, key: Tensor, value: Tensor, rotation: tuple[Tensor, Tensor]) -> None:
            nonlocal queries, count
            exact = rotate_back(key.float(), *(part.float() for part in rotation))
            for total, states in ((keys, exact), (values, value.float())):
                rows = side_by_side(states).flatten(0, 1)
                total.add_(rows.T @ rows)
            pairs = torch.unflatten(query.float().square(), 3, (2, -1)).sum(3)
            queries = queries + pairs.sum((0, 2), dtype=torch.float64)
            count += query.shape[0] * query.shape[2]

        probe.of_attention(note)
        if not (keys.isfinite().all() and values.isfinite().all()):
            raise InputError.one(block.layout.prefix, "keys or values are not finite on the calibration data", "is the model sound?")
        keys, values, queries = keys / count, values / count, queries / count
        if self.method == "aware":
            out = block.weight(f"{block.layout.prefix}.{layout.arch.writers[0]}")
            cost = cost_of_keys(queries, heads)
            return (commuting_basis if self.keys == "commuting" else basis)(keys, cost), basis(values, cost_of_values(out, heads, width))
        if self.method == "whitened":
            return basis(keys), basis(values)
        readers = block.layout.stages[0].groups[0]
        roots = self._magnitudes(probe) if self.method == "asvd" else torch.ones(readers.columns, dtype=torch.float64, device=model.device)
        weights = [
            block.weight(next(linear.name for linear in readers.linears if linear.name.endswith(end))).double() for end in ("k_proj", "v_proj")
        ]
        of_keys, of_values = ((weight * roots) @ (weight * roots).T for weight in weights)
        return basis(of_keys), basis(of_values)

    def _magnitudes(self, probe: Probe) -> Tensor:
        """Roots of the mean magnitudes of what queries, keys and values are made of, [in] float64."""
        from compress.numerics.low_rank import magnitudes_root
        from compress.probe import Seen

        group = probe.block.layout.stages[0].groups[0]
        seen = Seen(group.columns, None, probe.hidden[0].device)
        probe.observe(lambda told, inputs: seen.add(inputs) if told == group else None)
        return magnitudes_root(seen.mean())
