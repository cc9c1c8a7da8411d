"""Where tensors on disk live in the modules of transformers, and whether each side has all that the other wants."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import cast

from torch import Tensor, nn

from compress import fused
from compress.arch.base import Arch
from compress.checkpoint import TensorInfo
from compress.errors import Problems
from compress.expert_forward import WIDTHS
from compress.formats import base as formats
from compress.fused import Member
from compress.layout import BlockLayout, Layout


@dataclass(frozen=True)
class Slot:
    """Where a tensor on disk lives in memory: a parameter or buffer of the block's module, or in what that holds of one expert the `member`.

    With an `extent` it is the first of that along each dimension, and what is behind it is zero.
    """

    parameter: str
    expert: int | None = None
    member: Member | None = None
    extent: tuple[int, ...] | None = field(default=None, compare=False)

    @classmethod
    def of(cls, arch: Arch, local: str) -> Slot:
        """That of a tensor of a block, by its name on disk behind that of the block."""
        table = arch.experts
        if table and local.startswith(table.prefix + "."):
            number, _, part = local.removeprefix(table.prefix + ".").partition(".")
            for tensor in fused.names(table):
                if member := fused.members(table, tensor).get(part):
                    return cls(f"{table.module}.{tensor}", int(number), member)
        for old, new in arch.rename:
            if local.startswith(old):
                local = new + local.removeprefix(old)
        return cls(local)

    def view(self, module: nn.Module) -> Tensor:
        owner, _, leaf = self.parameter.rpartition(".")
        data = cast(Tensor, getattr(module.get_submodule(owner), leaf)).data
        found = data if self.member is None else self.member.view(data[self.expert])
        return found if self.extent is None else found[tuple(map(slice, self.extent))]

    def filled(self, part: Tensor, module: nn.Module) -> Tensor:
        """``part``, of the `extent`, with zeros behind it as in memory."""
        if self.extent is None:
            return part
        whole = replace(self, extent=None).view(module).shape
        behind = [size - had for size, had in zip(whole, self.extent, strict=True)]
        return nn.functional.pad(part, [each for size in reversed(behind) for each in (0, size)])


def find_slots(layout: Layout, tensors: Mapping[str, TensorInfo], modules: Iterable[nn.Module], problems: Problems) -> list[dict[str, Slot]]:
    """For each block, tensor name to slot. Tensors missing from ``tensors``, unknown to ``modules`` or of another shape are problems.

    Modules of experts that differ in width are told the width of each.
    """
    slots = []
    for block, module in zip(layout.blocks, modules, strict=True):
        _check_experts(layout.arch, module, problems)
        needed = _needed(layout.arch, module.state_dict(keep_vars=True))
        found = {}
        for name in dict.fromkeys(_dense_name(name) for name in block.tensors if name not in layout.cache_scales | layout.latents):
            place = Slot.of(layout.arch, name.removeprefix(block.prefix + "."))
            if place not in needed:
                problems.add(name, f"is not accounted for: a {type(module).__name__} has no such weight", "this variant is not supported")
                continue
            linear = layout.linears.get(name.removesuffix(".weight"))
            shape = (linear.rows, linear.columns) if linear else tensors[name].shape
            wanted = tuple(place.view(module).shape)
            if shape != wanted and layout.uneven and place.expert is not None and _narrower(shape, wanted):
                place = replace(place, extent=shape)
            elif shape != wanted:
                problems.add(
                    name, f"has the shape {list(shape)}, config.json makes it {list(wanted)}", "do config.json and the weights belong together?"
                )
            found[name] = place
        if layout.uneven and block.experts:
            _set_widths(layout, block, module, problems)
        for place in sorted(needed.keys() - found.values(), key=lambda place: needed[place]):
            problems.add(f"{block.prefix}.{needed[place]}", "is missing from the checkpoint", "is the download complete?")
        slots.append(found)
    return slots


def _set_widths(layout: Layout, block: BlockLayout, module: nn.Module, problems: Problems) -> None:
    table = layout.arch.experts
    assert table
    widths = []
    for expert in block.experts:
        first, *others = (layout.linears[f"{block.prefix}.{table.prefix}.{expert}.{name}"] for name in (table.down, table.gate, table.up))
        if any(linear.rows != first.columns for linear in others):
            problems.add(first.name, f"reads {first.columns} channels, of which the expert makes {others[0].rows}", "fetch the checkpoint again")
        widths.append(first.columns)
    setattr(module.get_submodule(table.module), WIDTHS, widths)


def _needed(arch: Arch, parameters: Mapping[str, Tensor]) -> dict[Slot, str]:
    """Everything a block must be given: slot to local name on disk."""
    table = arch.experts
    needed: dict[Slot, str] = {}
    for name, parameter in parameters.items():
        if table and name.startswith(f"{table.module}.") and (tensor := name.removeprefix(f"{table.module}.")) in fused.names(table):
            for local, member in fused.members(table, tensor).items():
                needed |= {Slot(name, number, member): f"{table.prefix}.{number}.{local}" for number in range(parameter.shape[0])}
        else:
            old, new = next((rule for rule in arch.rename if name.startswith(rule[1])), ("", ""))
            needed[Slot(name)] = old + name.removeprefix(new)
    return needed


def _check_experts(arch: Arch, module: nn.Module, problems: Problems) -> None:
    """Compare what transformers says of how it holds the experts of a block with the table."""
    table = arch.experts
    found = table and dict(module.named_modules()).get(table.module)
    if not table or found is None:
        return
    said = {flag: value for flag, value in vars(found).items() if flag.startswith(("is_", "has_")) and isinstance(value, bool)}
    known = {"is_concatenated": not table.interleaved, "is_transposed": table.transposed, "has_bias": table.biased, "has_gate": True}
    differing = [f"{flag}: {said.get(flag)}" for flag in known if said.get(flag) != known[flag]]
    differing += [f"{flag}: True" for flag, value in said.items() if value and flag not in known]  # what is not so needs no care
    if differing:
        problems.add(f"{arch.model_type} experts", f"are held in a way that is not supported: {', '.join(differing)}")


def _narrower(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a tensor is as wanted but for one dimension, in which it is smaller."""
    differing = [(one, other) for one, other in zip(shape, wanted, strict=False) if one != other]
    return len(shape) == len(wanted) and len(differing) == 1 and 0 < differing[0][0] < differing[0][1]


def _dense_name(name: str) -> str:
    """The source name of a tensor that may be one of several that replaced it."""
    head, _, part = name.rpartition(".")
    return f"{head}.weight" if part in (*formats.PARTS, *formats.BESIDE_PARTS) else name
