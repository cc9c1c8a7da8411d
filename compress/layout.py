"""What a checkpoint consists of: its blocks, the linears in them and which of those read the same tensor.

Built from headers, config and an architecture table alone - no weight is read and no torch imported - so that a recipe can be
checked and planned at once.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

from compress.arch.base import Arch, Fold, InputGroup, Unit, find
from compress.checkpoint import BRANCHED, EXACT_LINEARS, FLOATS, LATENT, LOW_RANK, MAPPED, OF_WIDTHS, PER_LAYER, UNEVEN, Checkpoint
from compress.errors import InputError, Problem, Problems
from compress.fused import apart

OLD_LEVEL = "vision_model"
"""In the names of some vision towers on disk, and in memory no more."""
MAP = "map"
"""What follows the name of a router that has one."""
EXPERTS_IN, EXPERTS_OUT = "experts.gate_up", "experts.down"
CACHED = "latent.kv"
"""Stage that reads the latent that a cache keeps."""
OUT, DOWN = "o", "down"
"""Stages that end a submodule, attention or a dense MLP."""


@dataclass(frozen=True)
class Linear:
    """One projection: ``name`` on disk without ``.weight``; its weight is [rows, columns]."""

    name: str
    rows: int
    columns: int


@dataclass(frozen=True)
class Group:
    """Linears that read the same tensor. ``expert`` is set for those of a routed expert."""

    name: str
    linears: tuple[Linear, ...]
    expert: int | None = None

    @property
    def columns(self) -> int:
        return self.linears[0].columns


@dataclass(frozen=True)
class Stage:
    """Groups of one block that are measured together: one group, or the same group of every expert."""

    name: str
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Edge:
    """A `Fold` of the architecture's table in one block: ``producer`` and ``consumers`` are names on disk without ``.weight``."""

    name: str
    kind: str
    producer: str
    consumers: tuple[str, ...]
    heads: bool = False
    expert: int | None = None
    inner: bool = False


@dataclass(frozen=True)
class Units:
    """A `Unit` of the architecture's table in one block, or in one expert of it: ``count`` of them, from each of `parts` equally many to be taken.

    Names are those on disk without ``.weight``.
    """

    name: str
    kind: str
    count: int
    rows: tuple[str, ...]
    columns: str
    heads: bool = False
    parts: int = 1
    expert: int | None = None


@dataclass(frozen=True)
class BlockLayout:
    """One decoder block: tensors are named ``{prefix}.{local name}``."""

    index: int
    prefix: str
    stages: tuple[Stage, ...]
    edges: tuple[Edge, ...]
    units: tuple[Units, ...]
    writers: tuple[str, ...]
    tensors: tuple[str, ...]

    @property
    def linears(self) -> Iterator[Linear]:
        return (linear for stage in self.stages for group in stage.groups for linear in group.linears)

    @property
    def experts(self) -> tuple[int, ...]:
        """Numbers of the routed experts."""
        return tuple(group.expert for stage in self.stages if stage.name == EXPERTS_OUT for group in stage.groups if group.expert is not None)


SIZES = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
"""Numbers of a config that a model cannot be made without, where it has them."""
DECLARED = "config.json: quantization_config"
OWN = ("compressed-tensors", "compress")
"""What this program calls how it quantises. Without groups of linears that is the cache alone, or where weights lie."""
MISSING_TOLD = 16
"""Blocks of which nothing is there that are told one by one."""
PUBLISHED = ("fp8", "mxfp4")
"""How some models are quantised by those who publish them."""


class Layout:
    """Blocks of `checkpoint` in order. Raises `InputError` with everything about the folder that does not fit together."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.arch: Arch = find(checkpoint.config.get("model_type"))
        self.text_config: dict[str, Any] = checkpoint.config.get(self.arch.text_config, {}) if self.arch.text_config else checkpoint.config
        if not isinstance(self.text_config, dict):
            raise InputError.one(
                f"config.json: {self.arch.text_config}", f"must hold a mapping, got {type(self.text_config).__name__}", "fetch it again"
            )
        problems = Problems()
        for key in SIZES:
            size = self.text_config.get(key)
            if size is not None and (type(size) is not int or size < 1):
                problems.add(f"{checkpoint.folder / 'config.json'}: {key}", f"must be a positive number, got {size!r}", "fetch it again")
        exact = self.text_config.get(EXACT_LINEARS, [])
        if isinstance(exact, list) and all(isinstance(name, str) for name in exact):
            self.arch = self.arch.without(exact)
        else:
            problems.add(
                f"{checkpoint.folder / 'config.json'}: {EXACT_LINEARS}", f"must list names of linears, got {exact!r}"[:200], "fetch it again"
            )
        self.checkpoint = checkpoint.altered(apart(checkpoint.tensors, self.arch, self.text_config.get("hidden_size"), problems), checkpoint.config)
        self.of_blocks = self._of_blocks(problems)
        self.blocks = self._blocks(problems)
        if len(problems) and not self._readable:
            self._refuse_declared()  # weights under other names are then no riddle
        problems.raise_if_any()
        if not any(block.experts for block in self.blocks):
            self.arch = replace(self.arch, experts=None)

    @property
    def packed(self) -> bool:
        """Whether the checkpoint is one of our own artifacts."""
        return bool(self.checkpoint.config.get("quantization_config"))

    @property
    def _readable(self) -> bool:
        """Whether weights, if they are quantised, go by names that this program knows."""
        declared = self.checkpoint.config.get("quantization_config")
        known = (*OWN, *(["mxfp4"] if self.arch.experts and self.arch.experts.mxfp4 else ()))
        return isinstance(declared, dict) and declared.get("quant_method") in known

    @cached_property
    def cache_scales(self) -> frozenset[str]:
        """Names of the scales that a checkpoint with a quantised KV cache must have."""
        declared = self.checkpoint.config.get("quantization_config")
        if not isinstance(declared, dict) or not declared.get("kv_cache_scheme"):
            return frozenset()
        return frozenset(f"{block.prefix}.{name}" for block in self.blocks for name in self.arch.cache_scales)

    @cached_property
    def latents(self) -> frozenset[str]:
        """Names of the tensors that make latents of keys and values."""
        parts = ((block, f"{block.prefix}.{self.arch.latents}.") for block in self.blocks)
        return frozenset(name for block, start in parts for name in block.tensors if name.startswith(start))

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return int(self.text_config.get("num_key_value_heads") or self.text_config["num_attention_heads"])

    @property
    def cached_channels(self) -> int:
        """Numbers that the cache of one block keeps of a token."""
        if parts := self.arch.latent:
            return sum(int(self.text_config[key]) for key in parts)
        return 2 * self.kv_heads * (self.head_dim or 0)

    @property
    def head_dim(self) -> int | None:
        """Channels of one attention head, as far as config.json tells."""
        config = self.text_config
        size = config.get("head_dim")
        if isinstance(size, int):
            return size
        hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
        return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) else None

    def setting(self, key: str, block: int) -> Any:
        """What config.json says of `key` for a block; ``per_layer_config`` is where transformers keeps what is not the same for all."""
        return self.of_blocks.get(block, {}).get(key, self.text_config.get(key))

    @property
    def windows(self) -> list[int | None]:
        """For each block, how many tokens back its attention looks, None for all."""
        config = self.text_config
        window, types = config.get("sliding_window"), config.get("layer_types")
        # Qwen says with a key of its own whether the window is used, and from which block on; others that have one use it everywhere.
        if not window or not config.get("use_sliding_window", "max_window_layers" not in config):
            return [None] * len(self.blocks)
        if types:
            return [window if kind == "sliding_attention" else None for kind in types]
        return [window if block.index >= config.get("max_window_layers", 0) else None for block in self.blocks]

    @cached_property
    def linears(self) -> dict[str, Linear]:
        """Every linear in a block, by name."""
        return {linear.name: linear for block in self.blocks for linear in block.linears}

    @cached_property
    def towers(self) -> tuple[str, ...]:
        """What the names of tensors begin with that lie beside the language model: the vision tower, and what joins it to the language model."""
        blocks = self.arch.blocks.split(".")
        found = set()
        for name in self.checkpoint.tensors:
            parts = name.split(".")
            depth = next(depth for depth, part in enumerate(parts) if part != dict(enumerate(blocks)).get(depth))
            if depth < len(blocks) - 1 and parts[depth] != "lm_head":
                found.add(".".join(parts[: depth + 1]))
        return tuple(sorted(found))

    @cached_property
    def outside(self) -> dict[str, Linear]:
        """Every linear of the vision tower and of what joins it to the language model, by name, but for those of a head that pools by torch's own
        attention, which reads weights without asking a linear; none of the models here uses what it gives."""
        if not self.arch.image:
            return {}
        tensors, found = self.checkpoint.tensors, {}
        towers = tuple(f"{tower}." for tower in self.towers)
        pooling = tuple(f"{name.rsplit('.', 2)[0]}." for name in tensors if name.endswith(".in_proj_weight"))
        for name in sorted({name.rpartition(".")[0] for name in tensors if name.endswith((".weight", ".weight_packed"))}):
            if not name.startswith(towers) or name.startswith(pooling) or "embed" in name.rpartition(".")[2]:  # embeddings are matrices too
                continue
            if shape := self._shape(name, Problems()):
                found[name] = Linear(name, *shape)
        return found

    @cached_property
    def all_linears(self) -> dict[str, Linear]:
        """Those in blocks and those `outside`, by name."""
        return self.linears | self.outside

    @cached_property
    def of_experts(self) -> frozenset[str]:
        """Names of the linears of routed experts."""
        groups = (group for block in self.blocks for stage in block.stages for group in stage.groups)
        return frozenset(linear.name for group in groups if group.expert is not None for linear in group.linears)

    @cached_property
    def factored(self) -> frozenset[str]:
        """Names of the linears that are the product of two, ``{name}.1`` after ``{name}.0``; of these `linears` has both."""
        return frozenset(name.removesuffix(".0") for name in self.linears if name.endswith(".0"))

    @cached_property
    def mapped(self) -> frozenset[str]:
        """Names of the routers whose probabilities pass through a map."""
        return frozenset(name.removesuffix(f".{MAP}") for block in self.blocks for name in block.tensors if name.endswith(f".{MAP}"))

    @property
    def active_experts(self) -> int:
        """How many experts serve a token; 0 for a model without any, or whose config does not say."""
        active = self.text_config.get(self.arch.experts.active) if self.arch.experts else None
        return active if isinstance(active, int) else 0

    @property
    def renormalises(self) -> bool:
        """Whether the weights of the experts that serve a token sum to one. Raises `InputError` for routers that take no softmax over all."""
        key = self.arch.experts.renormalise if self.arch.experts else None
        if key is None:
            raise InputError.one(
                f"{self.arch.model_type} routers", "have no softmax over all experts that could pass through a map", "fetch it again"
            )
        return bool(key if isinstance(key, bool) else self.text_config.get(key))

    @property
    def wrapped_as(self) -> str | None:
        """What config.json has to call the model so that no engine opens it that would compute something else, None if any may."""
        kinds = {LOW_RANK: self.factored, MAPPED: self.mapped, OF_WIDTHS: self.uneven, LATENT: self.latents}
        return next((kind for kind, found in kinds.items() if found), None)

    @property
    def uneven(self) -> bool:
        """Whether experts may differ in width."""
        return self.text_config.get(UNEVEN) is True

    def unfactored(self, name: str) -> str:
        """What a tensor was called before its linear became two; of others their own name."""
        owner, _, part = name.rpartition(".")
        whole, _, _ = owner.rpartition(".")
        return f"{whole}.{part}" if whole in self.factored else name

    @cached_property
    def in_blocks(self) -> frozenset[str]:
        """Names of all tensors that belong to a block."""
        return frozenset(name for block in self.blocks for name in block.tensors)

    def dropped(self, name: str) -> str | None:
        """Why a tensor of the source does not go into an artifact, or None if it does."""
        for rule, reason in self.arch.dropped:
            if re.fullmatch(rule, name):
                return reason
        found = re.match(re.escape(self.arch.blocks) + r"\.(\d+)\.", name)
        if found and int(found[1]) in self._more_blocks:
            return "of a block that predicts further tokens (MTP), which no text goes through"
        return None

    @property
    def _more_blocks(self) -> range:
        """Blocks on disk that are not part of the model."""
        count, more = (self.text_config.get(key or "") for key in ("num_hidden_layers", self.arch.more_blocks))
        return range(count, count + more) if isinstance(count, int) and isinstance(more, int) else range(0)

    @property
    def declared(self) -> Any:
        """What config.json says of quantised weights, nothing if it says nothing."""
        return self.checkpoint.config.get("quantization_config") or self.text_config.get("quantization_config") or {}

    @cached_property
    def quantized(self) -> dict[str, str]:
        """How linears are stored that are not of floats, by name."""
        found = {name: self.checkpoint.tensors.get(f"{name}.weight") for name in self.all_linears}
        stored = {name: info.dtype if info else "packed integers" for name, info in found.items()}
        return {name: dtype for name, dtype in stored.items() if dtype not in FLOATS}

    def refuse_quantized(self) -> None:
        """Raise `InputError` if the checkpoint is already quantised: codes cannot be calibrated again."""
        if not self.quantized:
            self.refuse_declared_floats()
        self._refuse_declared()
        if self.latents:
            raise InputError.one(min(self.latents), "the model's cache keeps latents already", "start from the original checkpoint")
        if BRANCHED in self.checkpoint.config:
            raise InputError.one(f"config.json: {BRANCHED}", "the model has branches beside its linears", "start from the original checkpoint")
        problems = [
            Problem(f"{name}.weight", f"is stored as {dtype}, already quantised", "start from the original checkpoint")
            for name, dtype in self.quantized.items()
        ]
        if problems:
            raise InputError(problems)

    def refuse_declared_floats(self) -> None:
        """Raise `InputError` if config.json says of weights, all of which are of floats, that they are quantised."""
        if self.declared and not (
            isinstance(self.declared, dict) and self.declared.get("quant_method") in OWN and not self.declared.get("config_groups")
        ):
            what = f"says that weights are quantised ({self._method}), but all are of floats"
            raise InputError.one(DECLARED, what, "take it out of config.json if these are the original weights, otherwise fetch the checkpoint again")

    @property
    def _method(self) -> str:
        return str(self.declared.get("quant_method", "?")) if isinstance(self.declared, dict) else "?"

    def _refuse_declared(self) -> None:
        if self.declared:
            method = self._method
            remedy = "start from the original checkpoint"
            if method in PUBLISHED:
                remedy += ", or, where there is none in more bits, from what transformers saves after loading this one with dequantize=True"
            raise InputError.one(DECLARED, f"the model is already quantised ({method})", remedy)

    def _of_blocks(self, problems: Problems) -> dict[int, dict[str, Any]]:
        """What differs from the rest of the config, by block."""
        declared = self.text_config.get(PER_LAYER) or {}
        place = f"{self.checkpoint.folder / 'config.json'}: {PER_LAYER}"
        if not isinstance(declared, dict) or not all(isinstance(changes, dict) and str(key).isdigit() for key, changes in declared.items()):
            problems.add(place, f"must map numbers of blocks to settings, got {declared!r}"[:200], "fetch it again")
            return {}
        for key, changes in declared.items():
            for name, size in changes.items():
                if name not in SIZES or type(size) is not int or size < 1:
                    problems.add(f"{place}.{key}.{name}", f"{size!r} is not supported", f"known are positive numbers for {', '.join(SIZES)}")
        return {int(key): changes for key, changes in declared.items()}

    def _blocks(self, problems: Problems) -> list[BlockLayout]:
        pattern = re.compile(re.escape(self.arch.blocks) + r"\.(\d+)\.(.+)")
        by_block: dict[int, list[str]] = {}
        for name in self.checkpoint.tensors:
            if (match := pattern.fullmatch(name)) and not self.dropped(name):
                by_block.setdefault(int(match[1]), []).append(match[2])
        count = self.text_config.get("num_hidden_layers")
        if not isinstance(count, int) or count < 1:
            problems.add("config.json: num_hidden_layers", f"must be a positive number, got {count!r}")
            return []
        missing = count - sum(index < count for index in by_block)
        for index in islice((index for index in range(count) if index not in by_block), MISSING_TOLD):
            problems.add(f"{self.arch.blocks}.{index}", "has no tensors, though config.json counts it", "is the download complete?")
        if missing > MISSING_TOLD:
            what = f"counts {missing - MISSING_TOLD} more blocks without tensors"
            problems.add("config.json: num_hidden_layers", what, "do config.json and the weights belong together?")
        for index in sorted(index for index in by_block if index >= count):
            problems.add(
                f"{self.arch.blocks}.{index}", f"is not accounted for: config.json has {count} blocks", "such extra blocks are not supported"
            )
        return [self._block(index, sorted(by_block[index]), problems) for index in sorted(by_block) if index < count]

    def _block(self, index: int, locals_: list[str], problems: Problems) -> BlockLayout:
        prefix = f"{self.arch.blocks}.{index}"
        stages = []
        # Linears that are two, by their local name: the first factor reads what the whole would, the second gives what it would.
        modules = dict.fromkeys(name.rpartition(".")[0] for name in locals_)
        pairs = {name for table in self.arch.groups for name in table.linears if f"{name}.0" in modules}
        there = [whole for whole in self.arch.groups if not modules.keys() & {whole.unless, f"{whole.unless}.0"}]
        for table in (each for whole in there for each in _with_factors(whole, pairs)):
            if group := self._group(prefix, table, "", problems):
                stages.append(Stage(table.name, (group,)))
        if experts := self.arch.experts:
            pattern = re.compile(re.escape(experts.prefix) + r"\.(\d+)\.")
            numbers = sorted({int(match[1]) for name in locals_ if (match := pattern.match(name))})
            said = next((count for key in experts.counts if (count := self.setting(key, index)) is not None), None)
            for number in sorted(set(range(said)) ^ set(numbers)) if numbers and isinstance(said, int) else ():
                start = f"{experts.prefix}.{number}"
                if number in numbers:
                    start, what = (
                        next(name for name in locals_ if name.startswith(f"{start}.")),
                        f"is of an expert more than config.json says: {said}",
                    )
                else:
                    what = f"is missing, though config.json says {said} experts"
                problems.add(f"{prefix}.{start}", what, "do config.json and the weights belong together?")
            fused = [name for name in locals_ if name.startswith(experts.prefix + ".") and not pattern.match(name)]
            if fused:
                problems.add(f"{prefix}.{fused[0]}", "holds experts in a form that is not known", "save the checkpoint with one tensor per expert")
            for name, parts in ((EXPERTS_IN, (experts.gate, experts.up)), (EXPERTS_OUT, (experts.down,))):
                groups = [
                    self._group(
                        prefix, InputGroup(name, tuple(f"{experts.prefix}.{number}.{part}" for part in parts)), f".{number}", problems, number
                    )
                    for number in numbers
                ]
                if numbers:
                    stages.append(Stage(name, tuple(group for group in groups if group)))
        if not stages:
            problems.add(prefix, f"has none of the linears a {self.arch.model_type} has", "is model_type right?")
        wholes = {f"{name}.{factor}": name for name in pairs for factor in (0, 1)}
        owners = list(dict.fromkeys(wholes.get(name, name) for name in modules))
        folds = [fold for fold in self.arch.folds if fold.unless is None or self.text_config.get(fold.unless) is None]
        edges = tuple(edge for fold in folds for edge in _edges(prefix, fold, owners, pairs))
        writers = tuple(f"{prefix}.{_makes(owner, pairs)}" for pattern in self.arch.writers for owner in owners if _fits(pattern, owner))
        linears = {linear.name: linear for stage in stages for group in stage.groups for linear in group.linears}
        units = tuple(found for unit in self.arch.units for found in self._units(prefix, index, unit, linears, pairs))
        return BlockLayout(index, prefix, tuple(stages), edges, units, writers, tuple(f"{prefix}.{name}" for name in locals_))

    def _units(self, prefix: str, index: int, unit: Unit, linears: dict[str, Linear], pairs: Collection[str]) -> Iterator[Units]:
        """What `unit` is in a block with these linears, by name, of which those of `pairs`, by local name, are two."""
        reader = _reads(unit.columns, pairs)
        before, _, after = f"{prefix}.{reader}".partition("*")
        size = (self.head_dim or 0) if unit.heads else 1
        found = [name for name in linears if _fits(f"{prefix}.{reader}", name)] if size else []
        numbers = sorted(int(name.removeprefix(before).removesuffix(after)) for name in found) if "*" in unit.columns else [None] * len(found)
        for number in numbers:
            names = (*(_makes(name, pairs) for name in unit.rows), reader)
            *rows, columns = (f"{prefix}.{name}".replace("*", str(number)) for name in names)
            if all(name in linears for name in rows):  # what is missing has been told
                name = f"{prefix}.{unit.kind}" + ("" if number is None else f".{number}")
                parts = int(self.setting(unit.within, index) or 1) if unit.within else 1
                yield Units(name, unit.kind, linears[rows[-1]].rows // size, tuple(rows), columns, unit.heads, parts, number)

    def _group(self, prefix: str, table: InputGroup, suffix: str, problems: Problems, expert: int | None = None) -> Group | None:
        names = [f"{prefix}.{local}" for local in table.linears]
        shapes = {name: self._shape(name, problems) for name in names}
        present = [name for name, shape in shapes.items() if shape]
        if not present:
            return None
        for name in sorted(shapes.keys() - set(present)):
            problems.add(f"{name}.weight", "is missing", "is the download complete?")
        linears = tuple(Linear(name, *shape) for name, shape in shapes.items() if shape)
        if len({linear.columns for linear in linears}) > 1:
            problems.add(f"{prefix}.{table.name}", f"linears that share an input differ in width: {[linear.columns for linear in linears]}")
        return Group(f"{prefix}.{table.name}{suffix}", linears, expert)

    def _shape(self, linear: str, problems: Problems) -> tuple[int, int] | None:
        tensors = self.checkpoint.tensors
        if (info := tensors.get(f"{linear}.weight")) is not None:
            return (info.shape[0], info.shape[1]) if len(info.shape) == 2 else None
        packed = tensors.get(f"{linear}.weight_packed")
        if packed is not None and packed.dtype == "U8" and len(packed.shape) == 2:
            return packed.shape[0], 2 * packed.shape[1]  # two codes a byte
        stored = tensors.get(f"{linear}.nm_values") if packed is None else packed
        if stored is None:
            return None
        if (info := tensors.get(f"{linear}.weight_shape")) is None or (info.dtype, info.shape) != ("I64", (2,)) or len(stored.shape) != 2:
            raise InputError.one(f"{linear}.weight_shape", "is missing, or no shape of a matrix", "the artifact is damaged; fetch it again")
        with info.file.open("rb") as file:
            file.seek(info.begin)
            rows, columns = struct.unpack("<2q", file.read(16))
        # A code has two to eight bits.
        if packed is not None and (rows != packed.shape[0] or not columns * 2 <= packed.shape[1] * 32 < columns * 8 + 32):
            what = f"says {[rows, columns]}, which {list(packed.shape)} words of 32 bits do not hold"
            problems.add(f"{linear}.weight_shape", what, "the artifact is damaged; fetch it again")
        return rows, columns


def _with_factors(whole: InputGroup, pairs: Collection[str]) -> list[InputGroup]:
    """A group of the table as a block has it that holds some linears as `pairs`: their second factors follow, each in a group of its own."""
    factors = [name for name in whole.linears if name in pairs]
    if not factors:
        return [whole]
    if len(whole.linears) == 1:  # whoever looks for the group that ends a submodule finds the second factor
        return [InputGroup(f"{whole.name}.0", (f"{factors[0]}.0",)), InputGroup(whole.name, (f"{factors[0]}.1",))]
    first = InputGroup(whole.name, tuple(_reads(name, pairs) for name in whole.linears))
    return [first, *(InputGroup(f"{whole.name}.{name.rpartition('.')[2]}", (f"{name}.1",)) for name in factors)]


def _reads(name: str, pairs: Collection[str]) -> str:
    return f"{name}.0" if name in pairs else name


def _makes(name: str, pairs: Collection[str]) -> str:
    return f"{name}.1" if name in pairs else name


def _edges(prefix: str, fold: Fold, owners: Collection[str], pairs: Collection[str]) -> Iterator[Edge]:
    """The edges that `fold` makes in a block with modules of these local names, of which those of `pairs` are two."""
    if "*" not in fold.producer:
        consumers = tuple(f"{prefix}.{_reads(owner, pairs)}" for pattern in fold.consumers for owner in owners if _fits(pattern, owner))
        if consumers:
            yield Edge(f"{prefix}.{fold.name}", fold.name, f"{prefix}.{_makes(fold.producer, pairs)}", consumers, fold.heads, inner=fold.inner)
        return
    before, _, after = fold.producer.partition("*")
    numbers = sorted(int(owner.removeprefix(before).removesuffix(after)) for owner in owners if _fits(fold.producer, owner))
    for number in numbers:
        producer, *consumers_ = (f"{prefix}.{name}".replace("*", str(number)) for name in (fold.producer, *fold.consumers))
        yield Edge(f"{prefix}.{fold.name}.{number}", fold.name, producer, tuple(consumers_), expert=number)


def _fits(pattern: str, owner: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), owner) is not None
