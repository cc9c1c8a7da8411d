"""The model: a config, blocks that are materialised one at a time, and what has become of each tensor.

This is the only place that changes a weight and the only one that knows what transformers holds in memory.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from compress import cache, declared, hardware
from compress.block import ADDED, DTYPES, EXACT, Block, stored_as
from compress.checkpoint import (
    FLOATS,
    Checkpoint,
    Entry,
    TensorInfo,
    entry,
    read_entry,
    read_header,
    read_tensor,
    transformers_config,
)
from compress.errors import InputError, Problems
from compress.expert_forward import experts_forward
from compress.formats import base as formats
from compress.formats import branch as branches
from compress.formats import nm_packed, sparse_residual
from compress.formats.branch import Branch
from compress.formats.nm_packed import Compact
from compress.formats.sparse_residual import Residual
from compress.latents import PARTS as LATENT_PARTS
from compress.latents import Latents, Turns
from compress.layout import MAP, OLD_LEVEL, BlockLayout, Layout
from compress.numerics.activations import Activations
from compress.numerics.grid import Quantized
from compress.numerics.pattern import Pattern
from compress.routing import MappedRouter
from compress.scheme import Scheme
from compress.slots import Slot, find_slots
from compress.state import write_state

EXPERTS_FUNCTION = "compress"


CONFIG_ERRORS = (StrictDataclassError, OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)
"""What transformers and torch raise over a wrong value in config.json."""


class Model:
    """A checkpoint opened for streaming.

    `tensors` maps every name of the model as it is now to where its bytes lie: the source, or a block file of a finished pass. `exact` maps
    every linear that a pass has quantised to the weight it had just before; `patterns` maps every linear that a pass has pruned to what holds of
    it since. `at_work` is the pass that is running, for messages.
    `schemes` says how each linear will be stored in the end, by name; those not in it stay as they are. `stored` is the dtype of what is not
    quantised, `dtype` the one to compute in.
    Memory holds the parts outside the blocks and the block in use.
    """

    def __init__(self, layout: Layout, schemes: Mapping[str, Scheme] = MappingProxyType({})) -> None:
        declared.check(layout)
        self.layout = layout
        self.schemes = schemes
        self.checkpoint: Checkpoint = layout.checkpoint
        self.tensors: dict[str, TensorInfo] = dict(self.checkpoint.tensors)
        self.exact: dict[str, TensorInfo] = {}
        self.patterns: dict[str, Pattern] = {}
        self.at_work = "a pass"
        self.device = hardware.device()
        stored = {str(info.dtype) for name, info in self.tensors.items() if name.endswith("norm.weight")} or {"BF16"}
        # Norms tell: they are never packed.
        self.stored = DTYPES.get(stored.pop(), torch.float32) if len(stored) == 1 else torch.float32
        self.dtype = hardware.compute_dtype(self.stored)
        self._inputs: dict[str, dict[str, Any]] = {}
        """How inputs of linears are rounded, as `Activations.arguments` says it, by name."""
        self._declared_inputs()
        self._unpacked: torch.dtype | None = None
        self._exact_cache = False
        self._skeleton: Any = None
        self._settings: dict[str, Any] = {}
        self._outside: dict[str, str] = {}
        """Of the linears outside blocks, by name on disk, what transformers calls their modules."""
        self._config, self._modules = self._empty_blocks()
        problems = Problems()
        cache.check_scales(layout, self.tensors, problems)
        cache.check_latents(layout, self.tensors, problems)
        self._slots = find_slots(layout, self.tensors, self._modules, problems)
        problems.raise_if_any()

    @property
    def blocks(self) -> list[BlockLayout]:
        return self.layout.blocks

    @property
    def config(self) -> dict[str, Any]:
        """The source's `config.json` with what passes changed of it."""
        changed = self.checkpoint.config | self._settings
        if (more := self.layout.arch.more_blocks) in changed:
            changed[more] = 0  # they are left out
        if nested := self.layout.arch.text_config:
            changed[nested] = self.layout.text_config | self._settings
        return changed

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return bool(self._settings.get("tie_word_embeddings", getattr(self._config, "tie_word_embeddings", False)))

    @property
    def hidden_size(self) -> int:
        """Channels of the residual stream."""
        return int(self._config.get_text_config().hidden_size)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        text = self._config.get_text_config()
        return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)

    # What transformers holds in memory ------------------------------------------------------------------------------------------

    @property
    def skeleton(self) -> Any:
        """The model of transformers: everything outside the blocks loaded, the blocks as they are."""
        if self._skeleton is None:
            self._skeleton = self._hollow()
        return self._skeleton

    def release(self) -> None:
        """Free everything outside the blocks until it is needed again."""
        self._skeleton = None
        hardware.return_freed_memory()

    def _read_config(self) -> Any:
        config = transformers_config(self.checkpoint.config)
        text = config.get_text_config()
        config._experts_implementation = text._experts_implementation = EXPERTS_FUNCTION
        config._attn_implementation = text._attn_implementation = self.layout.arch.kernel
        return config

    def _auto_class(self) -> Any:
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        ALL_EXPERTS_FUNCTIONS.register(EXPERTS_FUNCTION, experts_forward)
        return AutoModelForImageTextToText if self.layout.arch.image else AutoModelForCausalLM

    def _empty_blocks(self) -> tuple[Any, nn.ModuleList]:
        auto = self._auto_class()
        try:
            config = self._read_config()
            with torch.device("meta"):
                whole = auto.from_config(config, dtype=self.dtype, attn_implementation=self.layout.arch.kernel, trust_remote_code=False)
                modules = whole.get_submodule(self.layout.arch.module_blocks)
                self._outside = self._modules_outside(whole)
                for index, changes in self.layout.of_blocks.items():
                    modules[index] = type(modules[index])(_with(whole.config.get_text_config(), changes), index).to(self.dtype)
                for linear in self.layout.factored:
                    self._factor(linear, modules)
                for router in self.layout.mapped:
                    self._map(router, modules)
        except CONFIG_ERRORS as error:
            reason = " ".join(f"{type(error).__name__} {error}".split())[:300]
            raise InputError.one(
                str(self.checkpoint.folder / "config.json"), f"transformers makes no model of it ({reason})", "fetch it again"
            ) from error
        for name in self.layout.outside:
            if name not in self._outside and (name in self.schemes or self.packed_as(name)):
                raise InputError.one(name, "is no linear of its own in transformers, so it cannot be quantised", "exclude it")
        return config, modules.eval().requires_grad_(False)

    def _modules_outside(self, whole: nn.Module) -> dict[str, str]:
        """transformers calls a module by its name on disk, behind that of the base model, and some towers without a level that older files have."""
        modules = {path: module for path, module in whole.named_modules() if type(module) is nn.Linear}
        found = {}
        for name in self.layout.outside:
            path = name if name.startswith("model.") else f"model.{name}"
            for each in (path, path.replace(f".{OLD_LEVEL}.", ".", 1)):
                if each in modules:
                    found[name] = each
        return found

    def _generation(self) -> dict[str, Any]:
        """What transformers has to be told of generation, which it looks for beside the weights."""
        from transformers import GenerationConfig

        folder = self.checkpoint.folder
        if self.checkpoint.weights == folder:
            return {}
        if (folder / "generation_config.json").exists():
            return {"generation_config": GenerationConfig.from_pretrained(folder, local_files_only=True)}
        return {"generation_config": GenerationConfig.from_model_config(self._config)}

    def _factor(self, linear: str, modules: Any) -> None:
        """Have two modules in sequence compute a linear whose factors are on disk."""
        index, _, local = linear.removeprefix(f"{self.layout.arch.blocks}.").partition(".")
        module = modules[int(index)]
        path = Slot.of(self.layout.arch, local).parameter
        whole, rank = module.get_submodule(path), self.layout.linears[f"{linear}.0"].rows
        pair = nn.Linear(whole.in_features, rank, bias=False), nn.Linear(rank, whole.out_features, bias=whole.bias is not None)
        _replace(module, path, nn.Sequential(*pair).to(self.dtype))

    def _map(self, router: str, modules: Any) -> None:
        """Have a router's probabilities pass through the map that is on disk."""
        index, _, local = router.removeprefix(f"{self.layout.arch.blocks}.").partition(".")
        path, shape = Slot.of(self.layout.arch, f"{local}.weight").parameter.removesuffix(".weight"), self.tensors[f"{router}.{MAP}"].shape
        count = len(self.blocks[int(index)].experts)
        if len(shape) != 2 or shape[0] != count:
            raise InputError.one(f"{router}.{MAP}", f"is {list(shape)}, no map to the {count} experts of its block", "fetch it again")
        module = modules[int(index)]
        old = module.get_submodule(path)
        weight = torch.empty(shape[1], old.weight.shape[1], dtype=self.dtype)
        _replace(module, path, MappedRouter(weight, torch.empty(shape), old.top_k, renormalise=self.layout.renormalises))

    def _hollow(self) -> Any:
        bare = copy.deepcopy(self._config)
        text = bare.get_text_config()
        count, text.num_hidden_layers = text.num_hidden_layers, 0
        types = getattr(text, "layer_types", None)
        if types is not None:
            text.layer_types = []
        hollow, info = self._auto_class().from_pretrained(
            self.checkpoint.weights, config=bare, dtype=self.dtype, attn_implementation=self.layout.arch.kernel,
            local_files_only=True, trust_remote_code=False, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True,
            **self._generation(),
        )  # fmt: skip
        # transformers makes numbers up for what it does not find.
        problems = Problems()
        packed = {name: path for name, path in self._outside.items() if self.packed_as(name)}
        for missing in sorted(set(info["missing_keys"]) - {f"{path}.weight" for path in packed.values()}):
            problems.add(missing, "is missing from the checkpoint", "is the download complete?")
        for mismatched in sorted(map(str, info["mismatched_keys"])):
            problems.add(mismatched, "is of another shape than config.json makes it", "do config.json and the weights belong together?")
        problems.raise_if_any()
        hollow.to(self.device).eval().requires_grad_(False)
        outside = self.layout.arch.outside
        parent, _, name = self.layout.arch.module_blocks.rpartition(".")
        holder = hollow.get_submodule(parent)
        setattr(holder, name, self._modules)
        held = holder.config
        held.num_hidden_layers = count
        if types is not None:
            held.layer_types = types
        if hasattr(holder, "has_sliding_layers"):  # taken from the layer types when the model was made, of which there were none
            holder.has_sliding_layers = "sliding_attention" in (types or ())
        for disk, module in (outside.embedding, outside.norm, outside.head, *outside.writers):
            for leaf in ("weight", "bias"):
                name = f"{disk}.{leaf}"
                if (now := self.tensors.get(name)) and now != self.checkpoint.tensors.get(name):
                    value = read_entry(self.final(name)).to(self.device, self.dtype)
                    setattr(hollow.get_submodule(module), leaf, nn.Parameter(value, requires_grad=False))  # a head of its own is tied no more
        for name, path in packed.items():
            self._compute_packed(name, hollow.get_submodule(path))
        return hollow.eval()

    @torch.no_grad()
    def outside_difference(self, opened: Any, unpacked: torch.dtype | None) -> float | None:
        """How far quantised linears outside the blocks, as a plain model that transformers `opened` has them, are from those meant; None without any.

        That is the largest difference in what they give for random inputs, as a share of the largest; `unpacked` as for `as_transformers`.
        """
        generator = torch.Generator().manual_seed(0)
        found = []
        for name, path in self._outside.items():
            if self.packed_as(name):
                theirs = opened.get_submodule(path)
                given = torch.randn(2, 4, self.layout.outside[name].columns, generator=generator).to(self.device, opened.dtype)
                with self.as_transformers(unpacked, exact_cache=False):
                    weight, inputs, bias = self.dense(name).to(given), self.inputs(name), self._bias(name)
                ours = nn.functional.linear(inputs.round(given) if inputs else given, weight, None if bias is None else bias.to(given))
                found.append(float((theirs(given) - ours).abs().max() / ours.abs().max()))
        return max(found, default=None)

    def _compute_packed(self, linear: str, module: nn.Module) -> None:
        """Have a module of transformers compute a quantised linear outside the blocks."""
        module.weight = nn.Parameter(self.dense(linear).to(self.device, self.dtype), requires_grad=False)
        if inputs := self.inputs(linear):
            module.register_forward_pre_hook(lambda _, given: (inputs.round(given[0]),))

    # Reading --------------------------------------------------------------------------------------------------------------------

    def _declared_inputs(self) -> None:
        """Take from config.json of one of our own artifacts how inputs are rounded."""
        groups = self.checkpoint.config.get("quantization_config", {}).get("config_groups", {}) if self.layout.packed else {}
        for group in groups.values():
            if group.get("input_activations"):
                named = {name for name in self.layout.all_linears if any(declared.fits(target, name) for target in group["targets"])}
                self._inputs |= dict.fromkeys(named, group["input_activations"])

    def inputs(self, linear: str) -> Activations | None:
        """How what a linear is given is rounded, if it is."""
        if linear not in self._inputs:
            return None
        scale = self.tensors.get(f"{linear}.input_scale")
        return Activations.from_arguments(self._inputs[linear], read_tensor(scale).to(self.device) if scale else None)

    @contextmanager
    def as_transformers(self, unpacked: torch.dtype | None, *, exact_cache: bool) -> Iterator[None]:
        """While inside, blocks that are entered compute as transformers does with the artifact.

        Weights, but for those of experts, are unpacked in the dtype `unpacked`, None for that of engines; with `exact_cache`, keys and values are
        left as they are.
        """
        self._unpacked, self._exact_cache = unpacked, exact_cache
        try:
            yield
        finally:
            self._unpacked, self._exact_cache = None, False

    def parts(self, linear: str) -> dict[str, TensorInfo]:
        """The tensors of a linear, by what follows its name."""
        return {part: info for part in formats.PARTS if (info := self.tensors.get(f"{linear}.{part}"))}

    def packed_as(self, linear: str) -> ModuleType | None:
        """The layout of a linear, or None if it is not quantised."""
        return formats.find({part: info.dtype for part, info in self.parts(linear).items()})

    def read(self, name: str) -> Tensor:
        """A tensor that is not quantised, as it is stored, on the CPU."""
        return read_tensor(self.tensors[name])

    def quantized(self, linear: str) -> Quantized | None:
        """The codes of a linear, or None if it is not quantised."""
        layout = self.packed_as(linear)
        if layout is None:
            return None
        unpacked: Quantized = layout.unpack(linear, {f"{linear}.{part}": read_tensor(info) for part, info in self.parts(linear).items()})
        return unpacked

    def is_compact(self, linear: str) -> bool:
        """Whether a linear, no expert's, is stored as V:N:M in floats of up to 32 bits and is faster as `compact` gives it."""
        values = self.tensors.get(f"{linear}.{nm_packed.VALUES}")
        if values is None or values.dtype not in FLOATS or values.dtype == "F64" or linear in self.layout.of_experts:
            return False
        return nm_packed.pays(linear, {f"{linear}.{part}": self.read(f"{linear}.{part}") for part in nm_packed.DECLARED})

    def compact(self, linear: str) -> Compact:
        """A linear that `is_compact`, without what its blocks of outputs never read."""
        return nm_packed.compact(linear, {f"{linear}.{part}": read_tensor(info) for part, info in self.parts(linear).items()})

    def residual(self, linear: str) -> Residual | None:
        """What is stored of a linear beside its codes, or None if nothing is."""
        names = [f"{linear}.{part}" for part in formats.RESIDUAL_PARTS]
        if names[0] not in self.tensors:
            return None
        shape = self.layout.linears[linear]
        return sparse_residual.unpack(linear, {name: read_tensor(self.tensors[name]) for name in names}, (shape.rows, shape.columns))

    def branch(self, linear: str) -> Branch | None:
        """What lies beside a linear, codes or not, and is added to what it gives; None if nothing does."""
        names = [f"{linear}.{part}" for part in formats.BRANCH_PARTS]
        if names[0] not in self.tensors:
            return None
        shape = self.layout.linears[linear]
        return branches.unpack(linear, {name: read_tensor(self.tensors[name]) for name in names}, (shape.rows, shape.columns))

    def dense(self, linear: str) -> Tensor:
        """The weight of a linear as stored, or as its codes and residuals say, without its branch."""
        weight, residual = self.quantized(linear), self.residual(linear)
        if weight is None:
            name = f"{linear}.weight"
            return read_tensor(self.tensors[name]) if name in self.tensors else self._as_stored(name)
        computed = self.computed(linear, weight)
        return residual.add_to(computed) if residual else computed

    def computed(self, linear: str, weight: Quantized) -> Tensor:
        """What a linear with these codes and no residuals computes with, [out, in]."""
        unpacked = None if linear in self.layout.of_experts else self._unpacked
        return weight.dequantize(torch.float32 if linear in self._inputs else unpacked)

    def before_quantizing(self) -> Model:
        """The model as it would be had no pass quantised anything. It shares the memory of its blocks with this one."""
        model = copy.copy(self)
        parts = {f"{linear}.{part}" for linear in self.exact for part in (*formats.PARTS, *formats.RESIDUAL_PARTS)}
        model.tensors = {name: info for name, info in self.tensors.items() if name not in parts}
        model.tensors |= {f"{linear}.weight": info for linear, info in self.exact.items()}
        model._inputs = {}
        if self.exact.keys() & self.layout.outside.keys():
            model._skeleton = None
        return model

    @property
    def left_out(self) -> tuple[str, ...]:
        """What of it engines leave out, by the names of `formats.LEFT_OUT`."""
        return tuple(what for what, parts in formats.LEFT_OUT.items() if any(name.endswith(parts) for name in self.tensors))

    def in_engines(self) -> Model:
        """The model as engines know it, without what they leave out. It shares the memory of its blocks with this one."""
        model = copy.copy(self)
        model.tensors = {name: info for name, info in self.tensors.items() if not name.endswith(formats.BESIDE_PARTS)}
        return model

    def adopting(self, paths: Iterable[Path]) -> Model:
        """The model as it would be had it adopted the blocks in `paths`. It shares the memory of its blocks with this one."""
        model = copy.copy(self)
        model.tensors, model.exact, model._inputs = dict(self.tensors), dict(self.exact), dict(self._inputs)
        model.patterns = dict(self.patterns)
        for path in paths:
            model.adopt(path)
        return model

    def dense_dtype(self, linear: str) -> torch.dtype:
        """The dtype of a linear's weight in the source, or of its scales if it was packed there."""
        names = (f"{linear}.weight", f"{linear}.weight_scale", f"{linear}.{nm_packed.VALUES}")
        return next(DTYPES[info.dtype] for name in names if (info := self.checkpoint.tensors.get(name)) and info.dtype in DTYPES)

    def cache_scales(self, block: BlockLayout) -> tuple[Tensor, Tensor] | None:
        """Scales of a block's keys and values, or None if its cache is exact."""
        names = [f"{block.prefix}.{local}" for local in self.layout.arch.cache_scales]
        if self._exact_cache or names[0] not in self.tensors:
            return None
        keys, values = (read_tensor(self.tensors[name]).to(self.device, torch.float32) for name in names)
        return keys, values

    def latents(self, block: BlockLayout) -> Latents | None:
        """How a block's cache keeps old tokens, or None if as they are."""
        start = f"{block.prefix}.{self.layout.arch.latents}"
        found = {part: info for part in LATENT_PARTS if (info := self.tensors.get(f"{start}.{part}"))}
        if self._exact_cache or not found:
            return None
        return Latents.stored({part: read_tensor(info) for part, info in found.items()}).to(self.device)

    def _as_stored(self, name: str) -> Tensor:
        """A tensor that is not quantised, in the dtype it has in the artifact."""
        linear = name.removesuffix(".weight")
        if f"{linear}.{nm_packed.VALUES}" not in self.tensors:
            return read_entry(self.final(name))
        return nm_packed.unpack_dense(linear, {f"{linear}.{part}": read_tensor(info) for part, info in self.parts(linear).items()})

    def final(self, name: str) -> Entry:
        """A tensor as it goes into the artifact; if a pass changed it, in the dtype it has in the source."""
        source, now = self.checkpoint.tensors.get(name), self.tensors[name]
        return Entry(name, source.dtype if source and now.dtype in DTYPES else now.dtype, now.shape, now)

    @contextmanager
    def block(self, index: int, *, beside: bool = False) -> Iterator[Block]:
        """Block `index` in memory, freed on leaving. With `beside`, one that the model does not run, to be entered before the one it does."""
        layout, slots = self.blocks[index], self._slots[index]
        module = copy.deepcopy(self._modules[index]) if beside else self._modules[index]
        self._make_room(module, slots.values())
        for name, slot in slots.items():
            linear = name.removesuffix(".weight")
            if linear in self.layout.linears and (linear in self.schemes or self.packed_as(linear)):
                slot.view(module).copy_(self.dense(linear))
            else:  # nobody will round it, so it computes as it will be stored
                slot.view(module).copy_(self._as_stored(name))
        block = Block(layout, module, slots, self)
        try:
            for each in layout.linears:
                if inputs := self.inputs(each.name):
                    block.round_inputs(each.name, inputs)
                if branch := self.branch(each.name):
                    block.add_branch(each.name, branch)
            yield block
        finally:
            block.release()
            hardware.return_freed_memory()

    def _make_room(self, module: nn.Module, slots: Iterable[Slot]) -> None:
        """Give a module of transformers memory for what lives in `slots`."""
        slots = list(slots)
        padded = {slot.parameter for slot in slots if slot.extent}
        for name in dict.fromkeys(slot.parameter for slot in slots):
            owner, _, leaf = name.rpartition(".")
            holder = module.get_submodule(owner)
            if leaf in holder._buffers:  # what routers choose by, which transformers keeps in float32
                holder._buffers[leaf] = torch.empty_like(holder.get_buffer(leaf), dtype=torch.float32, device=self.device)
            else:
                make = torch.zeros if name in padded else torch.empty
                empty = make(holder.get_parameter(leaf).shape, dtype=self.dtype, device=self.device)
                holder._parameters[leaf] = nn.Parameter(empty, requires_grad=False)

    def settled(
        self,
        linear: Callable[[str, Tensor | None], nn.Module],
        experts: Callable[[BlockLayout, Any], nn.Module],
        branched: Callable[[nn.Module, Branch, Activations | None], nn.Module],
    ) -> Any:
        """The whole model of transformers in memory, to keep; this object is not to be used afterwards.

        ``linear`` gives, for the name of a linear that is quantised or `is_compact` and its bias, the module that is to stand for it; ``experts``,
        for a block whose experts are quantised and the module of transformers, without weights, the one that is to stand for all of them;
        ``branched``, for a linear with a branch, its module, that branch and how its inputs are rounded, the one of both. Attention with a quantised
        cache has its scales as buffers and rounds what goes into the cache. Raises `InputError` where only some experts of a block are quantised.
        """
        whole, table = self.skeleton, self.layout.arch.experts
        turns: Turns | None = None
        for layout, module, slots in zip(self.blocks, self._modules, self._slots, strict=True):
            stays = [each.name for each in layout.linears if self.packed_as(each.name) or self.is_compact(each.name)]
            packed = {name: slots[f"{name}.weight"] for name in stays}
            routed = [each.name for each in layout.linears if each.name in self.layout.of_experts]
            if table and packed.keys() & routed:
                if missing := [name for name in routed if name not in packed]:
                    raise InputError.one(missing[0], "is not quantised, but other experts of its block are", "open it with transformers")
                held: Any = module.get_submodule(table.module)
                held._parameters.clear()
                _replace(module, table.module, experts(layout, held))
            for name, slot in packed.items():
                if name not in routed:
                    _replace(module, slot.parameter.removesuffix(".weight"), linear(name, self._bias(name)))
            dense = {name: slot for name, slot in slots.items() if name.rpartition(".")[0] not in packed}
            self._make_room(module, dense.values())
            for name, slot in dense.items():
                slot.view(module).copy_(self._as_stored(name))
            for each in layout.linears:
                if branch := self.branch(each.name):
                    name = slots[f"{each.name}.weight"].parameter.removesuffix(".weight")
                    _replace(module, name, branched(module.get_submodule(name), branch, self.inputs(each.name)))
            if scales := self.cache_scales(layout):
                cache.attach_scales(module.get_submodule(self.layout.arch.attention), scales)
            if latents := self.latents(layout):
                turns = turns or Turns(whole.get_submodule(self.layout.arch.module_blocks.rpartition(".")[0]).rotary_emb)
                cache.attach_latents(module.get_submodule(self.layout.arch.attention), latents.to(self.dtype), turns)
        for name, path in self._outside.items():
            if self.packed_as(name):
                _replace(whole, path, linear(name, self._bias(name)))
        for config in (self._config, whole.config):  # what is registered under another name, a process that unpickles the model lacks
            config._experts_implementation = config.get_text_config()._experts_implementation = "eager"
        return whole.to(self.device).eval()

    def _bias(self, linear: str) -> Tensor | None:
        return read_entry(self.final(f"{linear}.bias")).to(self.dtype) if f"{linear}.bias" in self.tensors else None

    def write_outside(self, path: Path, tensors: dict[str, Tensor], settings: dict[str, Any], records: list[dict[str, Any]]) -> None:
        """Write, durably, tensors outside the blocks as a pass makes them, in the dtype they are to have, and what it changes of the config."""
        metadata = {"records": json.dumps(records), "settings": json.dumps(settings)}
        write_state(path, [entry(name, tensor) for name, tensor in tensors.items()], metadata)

    def write_quantized_outside(self, path: Path, rounded: Iterable[tuple[Quantized, str, Activations | None, dict[str, Any]]]) -> None:
        """Write, durably, linears outside the blocks as a pass quantised them: codes, layout, how inputs are rounded, and a record with the name."""
        tensors: dict[str, Tensor] = {}
        records = []
        for weight, layout, inputs, record in rounded:
            tensors |= formats.called(layout).pack(record["name"], weight)
            records.append(stored_as(weight, inputs) | record)
        self.write_outside(path, tensors, {}, records)

    def adopt(self, path: Path) -> list[dict[str, Any]]:
        """Take the tensors of a finished block, or those outside the blocks, from their file, and return its records."""
        tensors, metadata = read_header(path)
        for linear in [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]:
            before = self.tensors.pop(f"{linear}.weight", None)
            if before and linear not in self.exact:
                self.exact[linear] = tensors.pop(f"{linear}.{EXACT}", before)
        self.tensors |= tensors
        records = cast(list[dict[str, Any]], json.loads(metadata["records"]))
        for record in records:
            if record.get("pattern"):
                self.patterns[record["name"]] = Pattern.parse(record["pattern"])
            elif "pattern" in record:  # given up
                self.patterns.pop(record["name"], None)
            if record.get("activations"):
                self._inputs[record["name"]] = record["activations"]
        if "settings" in metadata:
            self._settings |= json.loads(metadata["settings"])
            self.release()
        return records

    # Running --------------------------------------------------------------------------------------------------------------------

    def embed(self, inputs: dict[str, Tensor]) -> tuple[Tensor, list[dict[str, Any]]]:
        """What the first block is given for `inputs` (``input_ids`` [rows, tokens], ...), and the keyword arguments of each block.

        The whole forward of transformers runs with each block replaced by one that takes notes and gives nothing, so masks, rotary tables and image
        embeddings are exactly those of the real model, and what a block is then given is what is added between blocks: `ADDED` of its arguments.
        """
        skeleton = self.skeleton
        hidden: list[Tensor] = []
        noted: list[dict[str, Any]] = []

        def note(given: Tensor, **kwargs: Any) -> Tensor:
            hidden.append(given)
            noted.append(kwargs | {ADDED: given} if len(hidden) > 1 and bool(given.any()) else kwargs)
            return torch.zeros_like(given)

        try:
            for module in self._modules:
                module.forward = note
            skeleton.base_model(**{name: value.to(self.device) for name, value in inputs.items()}, use_cache=False)
        finally:
            for module in self._modules:
                del module.forward
        return hidden[0], noted

    def embed_all(self, batches: Iterable[dict[str, Tensor]]) -> tuple[list[Tensor], list[list[dict[str, Any]]]]:
        """`embed` of each batch: what the first block is given, by batch, and keyword arguments by batch and block."""
        embedded = [self.embed(inputs) for inputs in batches]
        return [hidden for hidden, _ in embedded], [kwargs for _, kwargs in embedded]

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., vocabulary] float32 (float64 if the model computes in that) from the output of the last block [..., hidden]."""
        parent, _, _ = self.layout.arch.module_blocks.rpartition(".")
        normed = self.skeleton.get_submodule(parent).norm(hidden)
        return hardware.widened(self.skeleton.lm_head(normed))


def _with(config: Any, changes: dict[str, Any]) -> Any:
    """A config of transformers with some settings changed."""
    changed = copy.deepcopy(config)
    for key, value in changes.items():
        setattr(changed, key, value)
    return changed


def _replace(module: nn.Module, name: str, by: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, by)
