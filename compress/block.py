"""One decoder block in memory: what it computes, what passes make of its tensors, and the file that goes to disk.

Weights change through these methods alone, which keep what the block computes with and what will be stored in step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from compress.arch.base import Experts
from compress.cache import Cache
from compress.checkpoint import (
    DTYPE_NAMES,
    Entry,
    entry,
    read_entry,
    read_tensor,
)
from compress.expert_forward import Change, Experts3D, Recorder
from compress.formats import base as formats
from compress.formats import branch as branches
from compress.formats import sparse_residual
from compress.formats.branch import Branch
from compress.formats.sparse_residual import Residual
from compress.fused import joined
from compress.latents import Latents, Rotation, own_kernel
from compress.layout import MAP, BlockLayout
from compress.numerics.activations import Activations
from compress.numerics.grid import Quantized
from compress.numerics.pattern import Pattern
from compress.numerics.sparsity import violations
from compress.routing import MappedRouter
from compress.slots import Slot
from compress.state import write_state

if TYPE_CHECKING:
    from compress.model import Model

EXACT = "weight_exact"
"""Part of a linear in a block file: its dense weight, if one pass both changed and quantised it."""
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
ADDED = "added before"
"""Among the arguments of a block: what is added to what the block before it gives, such as features of images (DeepStack), [rows, tokens, hidden]."""


class Block:
    """One materialised decoder block."""

    def __init__(self, layout: BlockLayout, module: nn.Module, slots: dict[str, Slot], model: Model) -> None:
        self.layout = layout
        self.module = module
        self._slots = slots
        self._model = model
        self._quantized: dict[str, dict[str, Tensor]] = {}
        self._changed: dict[str, Tensor] = {}
        self._residuals: dict[str, Residual] = {}
        self._branches: dict[str, Branch] = {}
        self._orders: dict[tuple[str, int], Tensor] = {}
        """By tensor and dimension, the order in which its channels are saved."""
        self._hooks: list[Any] = []
        self._cache = Cache(model.cache_scales(layout), latents=model.latents(layout))
        if self._cache.latents is not None:
            own_kernel(self._attention)
        self.records: list[dict[str, Any]] = []

    def submodule(self, linear: str) -> nn.Module:
        """The module that computes the linear of this name on disk."""
        return self.module.get_submodule(self._slots[f"{linear}.weight"].parameter.removesuffix(".weight"))

    def parent(self, linear: str) -> nn.Module:
        """The module that holds the one that computes the linear of this name on disk."""
        return self.module.get_submodule(self._slots[f"{linear}.weight"].parameter.removesuffix(".weight").rpartition(".")[0])

    def surrounding(self, linear: str) -> nn.Module:
        """The submodule, attention or an MLP, that the linear of this name on disk is part of, be it alone or one of two factors."""
        whole = linear.rpartition(".")[0]
        if whole not in self._model.layout.factored:
            return self.parent(linear)
        path = self._slots[f"{linear}.weight"].parameter.removesuffix(".weight")
        return self.module.get_submodule(path.rpartition(".")[0].rpartition(".")[0])

    @property
    def experts(self) -> Any:
        """The module that holds all experts."""
        return self.module.get_submodule(self._experts.module)

    @property
    def router(self) -> Any:
        """The module that says which experts a token goes to."""
        return self.submodule(f"{self.layout.prefix}.{self._experts.router}")

    @contextmanager
    def mapped_router(self, routes: Tensor, active: int | None) -> Iterator[nn.Module]:
        """While inside, the router has the map ``routes`` [n, experts], and sends a token to `active` experts, or as many as before."""
        name = f"{self.layout.prefix}.{self._experts.router}"
        holder, leaf, router = self.parent(name), self._slots[f"{name}.weight"].parameter.split(".")[-2], self.router
        mapped = MappedRouter(router.weight, routes, active or router.top_k, renormalise=self._model.layout.renormalises)
        setattr(holder, leaf, mapped)
        try:
            yield mapped
        finally:
            setattr(holder, leaf, router)

    def expert_tensors(self, expert: int) -> dict[str, str]:
        """Local names of the tensors of an expert, by what they are: ``gate.weight``, ``up.weight``, ``down.weight``, and biases if it has them."""
        table, found = self._experts, {}
        for what, linear in (("gate", table.gate), ("up", table.up), ("down", table.down)):
            for part in ("weight", "bias"):
                local = f"{table.prefix}.{expert}.{linear}.{part}"
                if f"{self.layout.prefix}.{local}" in self.layout.tensors:
                    found[f"{what}.{part}"] = local
        return found

    def router_tensors(self) -> dict[str, Tensor]:
        """What has a row for each expert, by name on disk."""
        start = f"{self.layout.prefix}.{self._experts.router}."
        return {name: self.tensor(name) for name in self.layout.tensors if name.startswith(start)}

    @property
    def _experts(self) -> Experts:
        table = self._model.layout.arch.experts
        assert table
        return table

    def weight(self, linear: str) -> Tensor:
        """[out, in] float32, as exact as it is stored; a copy."""
        return self.tensor(f"{linear}.weight")

    def tensor(self, name: str) -> Tensor:
        """A tensor of the block by its name on disk, float32, with all changes made so far; a copy."""
        linear = name.removesuffix(".weight")
        if name in self._changed:
            found = self._changed[name].clone()
        else:
            found = self._model.dense(linear) if linear in self._model.layout.linears else read_tensor(self._model.tensors[name])
        return found.to(self._model.device, torch.float32)

    def exact(self, linear: str) -> Tensor:
        """[out, in] float32, the weight of a quantised linear as it was just before that; a copy."""
        return read_tensor(self._model.exact[linear]).to(self._model.device, torch.float32)

    def stored_dtype(self, linear: str) -> torch.dtype:
        """The dtype of the weight in the source, which scales are stored in."""
        return self._model.dense_dtype(linear)

    def source_dtype(self, name: str) -> torch.dtype:
        """The dtype a tensor has in the source and will have again."""
        return DTYPES[self._model.checkpoint.tensors[name].dtype]

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self._model.head_dim

    def set_dense(self, name: str, value: Tensor) -> None:
        """From here on the tensor of this name on disk is ``value``, kept in float32 until it is quantised or exported."""
        self._check_zeros(name.removesuffix(".weight"), value)
        self._put(name, value)

    def _put(self, name: str, value: Tensor) -> None:
        slot = self._slots.get(name)
        if slot is not None:
            slot.view(self.module).copy_(value)
        self._changed[name] = value.float()

    def restructure(self, name: str, tensor: Tensor, like: str | None = None) -> None:
        """From the end of the pass on the tensor of this name on disk is ``tensor``, of any shape, in the dtype of the source.

        A new one has that of `like`, or a bias that of its weight. Until then the block computes as before.
        """
        known = self._model.checkpoint.tensors
        dtype = known[name if name in known else like or f"{name.rpartition('.')[0]}.weight"].dtype
        self._changed[name] = read_entry(Entry(name, dtype, tuple(tensor.shape), tensor))

    def add_map(self, routes: Tensor) -> None:
        """From the end of the pass on the router has the map ``routes`` [experts that stay, experts], float32."""
        self._changed[f"{self.layout.prefix}.{self._experts.router}.{MAP}"] = routes.float().cpu()

    def is_pruned(self, linear: str) -> bool:
        """Whether a pass before this one removed weights of a linear."""
        return linear in self._model.patterns

    def kept(self, linear: str) -> Tensor:
        """Where a linear may have weights, [out, in] bool: everywhere, unless it was pruned. What was rounded to zero is not meant."""
        weight = self.exact(linear) if linear in self._model.exact else self.weight(linear)
        return weight != 0 if self.is_pruned(linear) else torch.ones_like(weight, dtype=torch.bool)

    def _check_zeros(self, linear: str, value: Tensor) -> None:
        """Raise AssertionError if ``value`` [out, in] has weights where a pruned linear has none."""
        if self.is_pruned(linear) and bool((value.masked_fill(self.kept(linear), 0) != 0).any()):
            raise AssertionError(f"{self._model.at_work} put weights back that were pruned from {linear}")

    def set_pruned(self, linear: str, weight: Tensor, pattern: Pattern, record: dict[str, Any], order: Tensor | None = None) -> None:
        """From here on a linear is ``weight`` [out, in], which keeps the promise of `pattern`, and all later passes leave its zeros, wherever
        there were any before.

        With ``order`` int64 [in] its inputs are in that order in ``weight`` and on disk, as whoever makes them was told by `reorder`; the block in
        memory computes with both as they were.
        """
        if broken := violations(weight, pattern):
            raise AssertionError(f"{self._model.at_work} left {broken} groups of {linear} that are not {pattern}")
        name = f"{linear}.weight"
        if order is not None:
            self._orders[name, 1] = order
            weight = torch.empty_like(weight).index_copy_(1, order, weight)
        self._put(name, weight)
        self.add_record(linear, {"pattern": str(pattern), "density": float((weight != 0).double().mean()), **record})

    def set_filled(self, linear: str, weight: Tensor, record: dict[str, Any]) -> None:
        """From here on a linear that was pruned is ``weight`` [out, in] and keeps no pattern, for later passes neither."""
        self._put(f"{linear}.weight", weight)
        self.add_record(linear, {"pattern": None, "density": float((weight != 0).double().mean()), **record})

    def set_branch(self, linear: str, weight: Tensor, run: int) -> None:
        """From here on a branch with this ``weight`` [out, runs], in the dtype of the source, lies beside a linear outside experts."""
        name = f"{linear}.{branches.WEIGHT}"
        dtype = DTYPE_NAMES[str(self.stored_dtype(linear)).removeprefix("torch.")]
        stored = read_entry(Entry(name, dtype, tuple(weight.shape), weight)).to(weight.device)
        self._branches[linear] = Branch(stored, run)
        self.add_branch(linear, self._branches[linear])

    def add_branch(self, linear: str, branch: Branch) -> None:
        """From here on, until the block is left, `linear`, which is not of an expert, gives what ``branch`` gives too."""
        branch = Branch(branch.weight.to(self._model.device), branch.run)
        module = self.submodule(linear)
        self._hooks.append(module.register_forward_hook(lambda _, given, outputs: outputs + branch.of(given[0]).to(outputs.dtype)))

    def reorder(self, linear: str, outputs: Tensor) -> None:
        """Save the outputs of a linear in the order ``outputs`` int64 [out]; until then the block computes with them as they are."""
        for name in (f"{linear}.weight", f"{linear}.bias"):
            if name in self.layout.tensors:
                self._orders[name, 0] = outputs

    def set_factors(self, linear: str, first: Tensor, second: Tensor, *, apart: bool) -> Tensor:
        """From here on the block computes with ``second @ first`` ([out, rank] and [rank, in], or their product) in place of a linear's weight.

        From the end of the pass on the checkpoint has both `apart`, or else the product as the weight, in the dtype of the source. Returns what the
        linear computes with, [out, in] float32.
        """
        dtype = self._model.checkpoint.tensors[f"{linear}.weight"].dtype
        made = {f"{linear}.0.weight": first, f"{linear}.1.weight": second} if apart else {f"{linear}.weight": second @ first}
        stored = {name: read_entry(Entry(name, dtype, tuple(tensor.shape), tensor)) for name, tensor in made.items()}
        self._changed |= stored
        factors = [tensor.double() for tensor in stored.values()]
        product = (factors[1] @ factors[0] if apart else factors[0]).float()
        self._slots[f"{linear}.weight"].view(self.module).copy_(product)
        return product

    def add_record(self, name: str, record: dict[str, Any]) -> None:
        """Put what became of `name` into the report."""
        self.records.append({"name": name, "block": self.layout.index, **record})

    def set_quantized(
        self, linear: str, weight: Quantized, record: dict[str, Any], layout: str = "pack-quantized", inputs: Activations | None = None
    ) -> None:
        """From here on the block computes with the dequantised values, and rounds what the linear is given as `inputs` says.

        It goes to disk in the format `layout`; `record` goes into the report.
        """
        # Kernels that multiply codes by codes apply the scales to the sum, and never round a weight.
        computed = weight.dequantize(torch.float32 if inputs else None)
        self._check_zeros(linear, computed)
        self._slots[f"{linear}.weight"].view(self.module).copy_(computed)
        self._quantized[linear] = formats.called(layout).pack(linear, weight)
        if inputs is not None:
            self.round_inputs(linear, inputs)
            if inputs.scale is not None:
                self._quantized[linear][f"{linear}.input_scale"] = inputs.scale
        self.add_record(linear, stored_as(weight, inputs) | record)

    def residual(self, linear: str, weight: Tensor, positions: Tensor) -> Residual:
        """What takes a quantised linear to ``weight`` [out, in] float32 at ``positions`` [out, in] bool, as it will be stored."""
        return sparse_residual.residual(weight, self._computed(linear), positions, self.stored_dtype(linear))

    def set_residual(self, linear: str, residual: Residual, record: dict[str, Any]) -> None:
        """From here on the block computes with the codes of a linear and `residual`; `record` goes into the report."""
        computed = residual.add_to(self._computed(linear))
        self._check_zeros(linear, computed)
        self._slots[f"{linear}.weight"].view(self.module).copy_(computed)
        self._residuals[linear] = residual
        self.add_record(linear, {"residuals": len(residual.values), **record})

    def _computed(self, linear: str) -> Tensor:
        weight = self._model.quantized(linear)
        assert weight
        return self._model.computed(linear, weight).to(self._model.device)

    def round_inputs(self, linear: str, inputs: Activations) -> None:
        """From here on, until the block is left, what `linear` is given is rounded."""

        def before(_: Any, arguments: tuple[Tensor]) -> tuple[Tensor]:
            exact = arguments[0]
            rounded = inputs.round(exact.detach())
            # Gradients pass as if nothing had been rounded.
            return (rounded + (exact - exact.detach()) if exact.requires_grad else rounded,)

        self._hooks.append(self.submodule(linear).register_forward_pre_hook(before))

    def release(self) -> None:
        """Free the weights."""
        for hook in self._hooks:
            hook.remove()
        self.module.to("meta")

    def set_cache_scales(self, keys: Tensor, values: Tensor, record: dict[str, Any]) -> None:
        """From here on attention reads its cache as FP8 under these scales, float32 [1] or [heads, 1, 1]; `record` goes into the report."""
        self._cache.scales = keys, values
        for local, scale in zip(self._model.layout.arch.cache_scales, (keys, values), strict=True):
            self.set_dense(f"{self.layout.prefix}.{local}", scale)
        self.add_record(f"{self.layout.prefix}.{self._model.layout.arch.attention}", record)

    @property
    def _attention(self) -> nn.Module:
        return self.module.get_submodule(self._model.layout.arch.attention)

    def set_latents(self, latents: Latents, record: dict[str, Any]) -> None:
        """From here on attention finds old tokens as ``latents`` keep them, in the dtype of the source; `record` goes into the report."""
        arch, prefix = self._model.layout.arch, self.layout.prefix
        stored = latents.tensors(self.stored_dtype(next(self.layout.linears).name))
        self._cache.latents = Latents.stored(stored).to(self._model.device)
        own_kernel(self._attention)
        self._changed |= {f"{prefix}.{arch.latents}.{part}": tensor.cpu() for part, tensor in stored.items()}
        self.add_record(f"{prefix}.{arch.attention}", record)

    @contextmanager
    def hearing_attention(self, listener: Callable[[Tensor, Tensor, Tensor, Rotation], None]) -> Iterator[None]:
        """While inside, `listener` is told queries, keys and values of every forward, all rotated, and their rotation, and has to end it."""
        own_kernel(self._attention)
        self._cache.queries = listener
        try:
            yield
        finally:
            self._cache.queries = None

    @contextmanager
    def hearing_cache(self, listener: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
        """While inside, `listener` is told the keys and values of every forward."""
        self._cache.listener = listener
        try:
            yield
        finally:
            self._cache.listener = None

    def _arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """``kwargs`` of a forward as the module takes them, with the cache among them if it does anything."""
        taken = {name: value for name, value in kwargs.items() if name != ADDED}
        self._cache.rotation = taken.get("position_embeddings")
        return taken if self._cache.idle else taken | {"past_key_values": self._cache}

    def forward(self, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """[batch, tokens, hidden] through the block."""
        output = self.module(_complete(hidden, kwargs), **self._arguments(kwargs))
        return cast(Tensor, output[0] if isinstance(output, tuple) else output)

    def advance(self, hidden: list[Tensor], kwargs: list[dict[str, Any]]) -> None:
        """Replace what the block is given, by batch, by what it gives."""
        for batch, each in enumerate(hidden):
            hidden[batch] = self.forward(each, kwargs[batch])

    @contextmanager
    def trying(self, weights: dict[str, Tensor], inputs: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({})) -> Iterator[None]:
        """While inside, the block computes with ``weights`` [out, in] in place of those of some linears, by name.

        What linears outside experts are given is replaced by what `inputs` make of it.
        """
        views = {linear: self._slots[f"{linear}.weight"].view(self.module) for linear in weights}
        before = {linear: view.clone() for linear, view in views.items()}
        hooks = [
            self.submodule(linear).register_forward_pre_hook(lambda _, given, changed=changed: (changed(given[0]),))
            for linear, changed in inputs.items()
        ]
        try:
            for linear, view in views.items():
                view.copy_(weights[linear])
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for linear, view in views.items():
                view.copy_(before[linear])

    @contextmanager
    def listening(self, record: Recorder, *, after_gate: bool) -> Iterator[None]:
        """While inside, a forward ends at the experts, which tell `record` what each is given."""
        self.experts.listener = Experts3D(after=record) if after_gate else Experts3D(before=record)
        try:
            yield
        finally:
            self.experts.listener = None

    @contextmanager
    def overhearing(self, before: Recorder, after: Recorder) -> Iterator[None]:
        """While inside, the experts tell on the way what each is given, and what its last linear is."""
        self.experts.listener = Experts3D(before, after, ends=False)
        try:
            yield
        finally:
            self.experts.listener = None

    @contextmanager
    def watching(self, watch: Callable[[str, Tensor], None]) -> Iterator[None]:
        """While inside, `watch` is told, for the last linear of each expert by name, what it is given in a forward, [tokens, width]."""
        table, prefix = self._experts, self.layout.prefix
        self.experts.watcher = lambda expert, gated: watch(f"{prefix}.{table.prefix}.{expert}.{table.down}", gated)
        try:
            yield
        finally:
            self.experts.watcher = None

    @contextmanager
    def scaling(self, changes: Mapping[str, Change]) -> Iterator[None]:
        """While inside, what each of these linears, by name, is given is changed; differentiable in what it is changed by.

        Of an expert that can be done to the last linear only.
        """
        handles = []
        of_experts: dict[int, Change] = {}

        def before(factor: Tensor, shift: Tensor | None) -> Callable[[Any, tuple[Tensor]], tuple[Tensor]]:
            return lambda _, arguments: (arguments[0] * factor if shift is None else arguments[0] * factor + shift,)

        for linear, (factor, shift) in changes.items():
            factor, shift = factor.to(self._model.dtype), None if shift is None else shift.to(self._model.dtype)
            slot = self._slots[f"{linear}.weight"]
            if slot.expert is None:
                handles.append(self.submodule(linear).register_forward_pre_hook(before(factor, shift)))
            else:
                assert linear.endswith(f".{self._experts.down}")
                of_experts[slot.expert] = factor, shift
        if of_experts:
            self.experts.factors = of_experts
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            if of_experts:
                self.experts.factors = None

    def forward_with(self, weights: dict[str, Tensor], hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """`forward` with ``weights`` [out, in] in place of those of some linears, by name; differentiable in them."""
        replaced: dict[str, Tensor] = {}
        parts: dict[str, dict[Slot, Tensor]] = {}
        for linear, weight in weights.items():
            slot = self._slots[f"{linear}.weight"]
            if slot.expert is None:
                replaced[slot.parameter] = weight.to(hidden.dtype)
            else:
                parts.setdefault(slot.parameter, {})[slot] = weight.to(hidden.dtype)
        for parameter, known in parts.items():
            members: dict[int, dict[int, Tensor]] = {}
            for slot in self._slots.values():
                if slot.parameter == parameter and slot.member and slot.expert is not None:
                    members.setdefault(slot.expert, {})[slot.member.half or 0] = slot.filled(known.get(slot, slot.view(self.module)), self.module)
            stacked = parameter.rpartition(".")[2]
            experts = [[halves[half] for half in sorted(halves)] for _, halves in sorted(members.items())]
            replaced[parameter] = torch.stack([joined(self._experts, stacked, parts_) for parts_ in experts])
        output = torch.func.functional_call(self.module, replaced, (_complete(hidden, kwargs),), self._arguments(kwargs))
        return cast(Tensor, output[0] if isinstance(output, tuple) else output)

    def save(self, path: Path) -> None:
        """Write what changed, durably: codes in the layout of the final artifact, the rest in float32."""
        tensors = dict(self._changed)
        for (name, dimension), order in self._orders.items():
            tensors[name] = (tensors[name] if name in tensors else self.tensor(name)).index_select(dimension, order)
        for linear, packed in self._quantized.items():
            if (changed := tensors.pop(f"{linear}.weight", None)) is not None:
                tensors[f"{linear}.{EXACT}"] = changed
            tensors |= packed
        for linear, residual in self._residuals.items():
            tensors |= sparse_residual.pack(linear, residual)
        for linear, branch in self._branches.items():
            tensors |= branches.pack(linear, branch)
        write_state(path, [entry(name, tensor) for name, tensor in tensors.items()], {"records": json.dumps(self.records)})


def stored_as(weight: Quantized, inputs: Activations | None) -> dict[str, Any]:
    """What the record of a quantised linear says of its codes and its inputs."""
    return {
        "bits": weight.bits,
        "group_size": weight.group_size,
        "symmetric": weight.symmetric,
        "activations": inputs.arguments() if inputs else None,
    }


def _complete(hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """What a block is given, of what the one before it gives."""
    return hidden + kwargs[ADDED] if ADDED in kwargs else hidden
