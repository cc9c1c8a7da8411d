"""What a GGUF file means to llama.cpp on a CPU: the model of its artifact, with inputs of products rounded as llama.cpp rounds them.

Rounding passes on the last bit of a sum, which is nobody's error, as a whole step: programs that add in different orders round a few inputs of each
token to neighbouring integers, and some blocks later they differ about as much as if they rounded differently altogether. Therefore the model can be
told what llama.cpp had before each product. It computes every input by itself; where the two are the `SAME` but for the order of sums, it takes the
steps that llama.cpp took, and where they are not, its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from compress import runtime
from compress.checkpoint import Checkpoint
from compress.errors import InputError
from compress.export import gguf
from compress.formats.gguf_blocks import TYPES, fields
from compress.formats.gguf_inputs import INPUTS, WIDTHS, rounded, sums_off
from compress.kernels.experts import PackedExperts, Stack
from compress.layout import BlockLayout, Layout
from compress.model import Model

SAME = 2.0**-12
"""Of the largest number of a block: how far inputs may be apart. A step of 8 bits is 32 times as wide."""


@dataclass(frozen=True)
class Part:
    """Some ``rows`` of a product: their tensor in the file, the type of its inputs, and minima [experts, rows, blocks] that have their own sums."""

    name: str
    inputs: str
    rows: slice
    minima: Tensor | None


@dataclass
class Counts:
    """Of all products: ``blocks`` of inputs, those that ``strayed``, which were not the same, the ``largest`` difference of the others, as a share of
    the largest number of a block; single ``numbers``, and those that were ``moved`` by more than `SAME`, because llama.cpp rounded them so.
    """

    blocks: int = 0
    strayed: int = 0
    largest: float = 0.0
    numbers: int = 0
    moved: int = 0


class Emulated:
    """The model as llama.cpp computes it."""

    def __init__(self, artifact: Path, file: Path) -> None:
        """Of the ``artifact`` that ``file`` was made of, which says what type each tensor has. Raises `InputError` for types we do not write."""
        self.model = runtime.load(artifact, digits=0).float()
        self.device = self.model.device
        self._counts = Counts()
        self._seen: Mapping[str, Tensor] = {}
        self._source = Model(Layout(Checkpoint(artifact)))
        self._types = gguf.types(self._source, file)
        if odd := sorted({kind for _, kind in self._types.values()} - INPUTS.keys()):
            raise InputError.one(str(file), f"holds tensors of the types {', '.join(odd)}", "compare a file that compress export wrote")
        layout = self._source.layout
        outside = layout.arch.outside
        self._types = {name: (tensor, kind) for name, (tensor, kind) in self._types.items() if kind != "F32"}
        for name in self._types.keys() - layout.of_experts - {outside.embedding[0]}:
            self._round(self.model.get_submodule(outside.head[1] if name == outside.head[0] else name), name)
        for block in layout.blocks:
            self._round_experts(block)

    @torch.no_grad()
    def __call__(self, ids: Tensor, seen: Mapping[str, Tensor] = MappingProxyType({})) -> Any:
        """What the model of transformers returns for token ids [1, tokens].

        ``seen`` is what llama.cpp had as it read the same text: float32 [rows, in] by the name of the tensor that met it, in any order.
        """
        self._seen = seen
        return self.model(ids)

    def counted(self) -> dict[str, Any]:
        """`Counts` since this was called last."""
        found, self._counts = self._counts, Counts()
        return asdict(found)

    def _round_experts(self, block: BlockLayout) -> None:
        arch = self._source.layout.arch
        table = arch.experts
        if table is None or not block.experts:
            return
        # All experts of a block lie in one tensor for each role.
        gate, up, down = (f"{block.prefix}.{table.prefix}.{block.experts[0]}.{role}" for role in (table.gate, table.up, table.down))
        if gate not in self._types:
            return
        path = f"{arch.module_blocks}.{block.index}.{table.module}"
        experts: Any = self.model.get_submodule(path)
        if not isinstance(experts, PackedExperts):
            stacks = [cast(Stack, Dense(weights)) for weights in (experts.gate_up_proj, experts.down_proj)]
            experts = PackedExperts(stacks[0], stacks[1], experts._apply_gate)
            self.model.set_submodule(path, experts)
        self._round(experts.gate_up, gate, up)
        self._round(experts.down, down)

    def _round(self, module: Any, *linears: str) -> None:
        """Have ``module``, whose weight is those of as many ``linears`` below each other, compute products as their tensors' types have it."""
        parts, rows = [], module.out_features // len(linears)
        for number, linear in enumerate(linears):
            tensor, kind = self._types[linear]
            weight = self._source.quantized(linear)
            e = fields(weight, TYPES[kind]).e if INPUTS[kind] == "Q8_1" and weight else None
            parts.append(Part(tensor, INPUTS[kind], slice(number * rows, (number + 1) * rows), None if e is None else -e))
        module.forward = partial(self._product, module.forward, parts)

    def _product(self, plain: Callable[..., Tensor], parts: list[Part], x: Tensor, *ends: Tensor) -> Tensor:
        outputs = []
        for part in parts:
            given = self._followed(x, part)
            made = plain(rounded(given, part.inputs), *ends)[..., part.rows]
            if part.minima is not None:
                made = made + sums_off(given) @ part.minima.T
            outputs.append(made)
        return torch.cat(outputs, -1)

    def _followed(self, own: Tensor, part: Part) -> Tensor:
        """``own`` [..., in], with what llama.cpp had in the place of blocks that are the same."""
        if part.name not in self._seen:
            return own
        rows, seen = own.reshape(-1, own.shape[-1]), self._seen[part.name]
        nearest = seen[torch.cdist(rows, seen, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)]
        blocks, other = (torch.unflatten(each, -1, (-1, WIDTHS.get(part.inputs, 32))) for each in (rows, nearest))
        peak = blocks.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        apart = (blocks - other).abs().amax(-1, keepdim=True) / peak
        same = apart <= SAME
        found = torch.where(same, other, blocks).flatten(-2)
        self._counts.blocks += same.numel()
        self._counts.strayed += int((~same).sum())
        self._counts.largest = max(self._counts.largest, float(torch.where(same, apart, 0).max()))
        self._counts.numbers += rows.numel()
        moved = torch.unflatten((rounded(rows, part.inputs) - rounded(found, part.inputs)).abs(), -1, (-1, blocks.shape[-1]))
        self._counts.moved += int((moved > SAME * peak).sum())
        return found.view_as(own)


class Dense(nn.Module):
    """The same linear of every expert, not quantised, called as a `Stack` is: weights [experts, out, in]."""

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.codes, self.out_features = codes, codes.shape[1]

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return torch.cat([piece @ weight.T for piece, weight in zip(x.tensor_split(ends[:-1].cpu()), self.codes, strict=True)])
