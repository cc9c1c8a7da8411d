"""The compressed-tensors artifact, opened by transformers, vLLM and SGLang.

What each engine accepts was read off its loader: see docs/formats.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import fused
from compress.arch.base import Experts
from compress.checkpoint import (
    BRANCHED,
    BRANCHES,
    EXACT_LINEARS,
    INDEX,
    LATENT,
    RESIDUALS,
    SINGLE,
    Entry,
    Stacked,
    entry,
    wrapped,
    write_safetensors,
    write_text,
)
from compress.errors import InputError, Problems
from compress.export.base import outside
from compress.formats.base import BESIDE_PARTS, BRANCH_PARTS, RESIDUAL_PARTS
from compress.layout import OLD_LEVEL, BlockLayout, Layout
from compress.scheme import CacheScheme, Caching, LatentScheme, Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from compress.model import Model

READABLE = True
SHARD_BYTES = 5_000_000_000
BFLOAT16_ONLY = ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized")
EXPERT_FORMATS = {"int", "fp8", "mxfp4"}
"""What transformers unpacks for experts as it is meant (seen with 5.23.0): of nvfp4 it forgets a scale, for the others it fails."""
SIGLIP = ("siglip_vision_model", "siglip2_vision_model")
NAMED_WEIGHT = ("int-quantized", "float-quantized")
"""Layouts whose codes are called the weight."""
WHILE_LOADING = "loads, decompresses while loading"
DOT = re.escape(".")
VERSION = "0.18.0"
"""The layout's version, as compressed-tensors counts; it wrote these tensors the same way ever since."""


def check(place: str, layout: Layout, plan: dict[str, Scheme], problems: Problems) -> None:
    """Report what this layout or its readers cannot express."""
    kinds = _kinds(layout, plan)
    of_experts = []
    dense: list[str] = []
    for block in layout.blocks:
        schemes = set()
        for stage in block.stages:
            for group in stage.groups:
                found = {kinds.get(linear.name) for linear in group.linears}
                if len(found) > 1 and not layout.factored:  # else no engine will join them anyway
                    problems.add(place, f"{group.name} is one matrix to serving engines, but its linears get different schemes", "treat them alike")
                if group.expert is not None:
                    schemes |= found
        if len(schemes) > 1:
            problems.add(place, f"the experts of {block.prefix} get different schemes", "engines hold them in one tensor: treat them alike")
        if any(kind and not kind[0].symmetric for kind in schemes):
            problems.add(place, f"the experts of {block.prefix} are asymmetric; transformers ignores zero points of experts", "set symmetric: true")
        if kinds and schemes == {None} and not _reads_joined(layout) and not layout.wrapped_as:
            dense.append(block.prefix)
        of_experts.append(schemes)
    if dense:
        problems.add(
            place,
            f"the experts of {dense[0]} stay as they are{f', and of {len(dense) - 1} blocks more' if dense[1:] else ''}; "
            "transformers opens no dense experts beside packed weights (seen with 5.23.0)",
            "quantise them too, in 8 bits if need be",
        )
    if len({kind for schemes in of_experts if len(schemes) == 1 for kind in schemes if kind}) > 1:
        problems.add(place, "the experts of some blocks get other schemes than those of others; transformers unpacks all by one", "treat them alike")
    if len(set(kinds.values())) > 1 and any(not scheme.symmetric for scheme, _ in kinds.values()):
        problems.add(place, "transformers opens asymmetric weights only where all linears share one scheme", "set symmetric: true")


def verdicts(layout: Layout, plan: dict[str, Scheme], cache: Caching | None = None) -> dict[str, str]:
    """For each serving engine, whether and how it reads the artifact, as far as its loader's rules tell."""
    if layout.latents or isinstance(cache, LatentScheme):
        return {"compress": "loads"} | dict.fromkeys(("transformers", "vLLM", "SGLang"), "refuses a cache of latents")
    if layout.mapped:
        return {"compress": "loads"} | dict.fromkeys(("transformers", "vLLM", "SGLang"), "refuses routers with maps")
    if layout.uneven:
        return {"compress": "loads"} | dict.fromkeys(("transformers", "vLLM", "SGLang"), "refuses experts of different widths")
    if layout.factored:
        return {"compress": "loads"} | dict.fromkeys(("transformers", "vLLM", "SGLang"), "refuses linears that are two of low rank")
    if layout.of_blocks:
        # Seen with transformers 5.23.0: its classes ask the config for one width and fail loudly when told that there are several.
        return {"compress": "loads"} | dict.fromkeys(("transformers", "vLLM", "SGLang"), "refuses blocks of different widths")
    if any(scheme.residuals for scheme in plan.values()):
        # Residuals lie where no engine looks, so what it computes with are the codes alone.
        coded = verdicts(layout, {name: scheme.coded for name, scheme in plan.items()}, cache)
        return {"compress": "loads"} | {
            engine: text if text.startswith("refuses") else f"without residuals; {text}" for engine, text in coded.items()
        }
    found = _weight_verdicts(layout, plan)
    if EXACT_LINEARS in layout.text_config:
        found |= dict.fromkeys(("vLLM", "SGLang"), _latent_verdict(layout, found["vLLM"]))
    if cache is None:
        return found
    ignored = "ignores the scales of the cache"
    of_cache = {
        "transformers": ignored if found["transformers"].startswith(WHILE_LOADING) else "rounds the cache, but does not store it smaller",
        "vLLM": "FP8 cache, GPU only: its kernel for CPUs cuts off what it should round",
        "SGLang": "FP8 cache" if cache.granularity == "tensor" else f"{ignored}: only one for all heads",
    }
    return {engine: f"{verdict}; {of_cache[engine]}" for engine, verdict in found.items()}


def _latent_verdict(layout: Layout, weights: str) -> str:
    """How engines other than transformers read attention that became that of a DeepSeek-V3, where they read its weights as `weights` says."""
    if layout.text_config["rope_parameters"]["rope_type"] == "longrope":  # seen with vLLM 0.33.0, which makes another type of it
        return "refuses: knows no list of periods for latents, see target of mla"
    return weights if weights.startswith("refuses") else f"unproven: attention to latents; {weights}"


def _weight_verdicts(layout: Layout, plan: dict[str, Scheme]) -> dict[str, str]:
    schemes = set(plan.values())
    if not schemes:
        return dict.fromkeys(("transformers", "vLLM", "SGLang"), "loads: no weight is quantised")
    odd = "/".join(map(str, sorted({scheme.bits for scheme in schemes} - {4, 8})))
    narrow = any(linear.rows % 32 or linear.columns % 32 for name, linear in layout.all_linears.items() if name in plan)
    floats = sorted({scheme.format for scheme in schemes if scheme.format != "int"})
    vllm, sglang = "loads", "loads on GPUs since Ampere"
    if any(scheme.layout == "pack-quantized" and scheme.activations != "none" for scheme in schemes):
        sglang = "unproven: packed codes with rounded inputs"
        vllm = vllm if {scheme.bits for scheme in schemes} == {4} else sglang  # run with 4 bits
    elif odd:
        vllm, sglang = f"GPU only: {odd}-bit needs the Humming kernels", f"refuses {odd}-bit: only 4 and 8"
    elif floats:
        vllm = sglang = f"GPU only: {', '.join(floats)}" + (" (unproven)" if any(name.startswith("mx") for name in floats) else "")
    elif layout.of_experts & plan.keys() and _reads_joined(layout):
        vllm = sglang = f"unproven: experts of a {layout.arch.model_type} one by one"
    elif layout.outside.keys() & plan.keys():
        vllm = sglang = "unproven: quantised linears outside the decoder blocks"
    elif any(scheme.layout == "pack-quantized" and scheme.bits != 4 for scheme in schemes):
        vllm = "GPU only: its CPU kernel wants 4 bits"
    elif narrow:
        vllm = "GPU only: its CPU kernel wants widths divisible by 32"
    return {"transformers": _transformers(layout, plan) + _rounds(layout, plan), "vLLM": vllm, "SGLang": sglang}


def _transformers(layout: Layout, plan: dict[str, Scheme]) -> str:
    """How transformers loads the weights.

    It unpacks small floats to bfloat16, whatever the model is loaded in, so that any other dtype fails in the first product; and
    compressed-tensors makes room for zero points in their unpacked shape, so transformers could not load packed ones (seen with 0.20.0 under
    5.23.0). Unpacking while loading is sound, but it knows only one scheme.
    """
    of_experts = layout.of_experts & plan.keys()
    if _in_siglip(layout, plan):
        return "refuses packed codes in a SigLIP tower, whose weights it reads when it makes the model: fp8, or 8 bits with rounded inputs, open"
    if of_experts and _reads_joined(layout):
        return f"refuses quantised experts of a {layout.arch.model_type}: it reads them in two dense tensors alone"
    unread = sorted({plan[name].format for name in of_experts} - EXPERT_FORMATS)
    if unread:
        return f"refuses experts in {unread[0]}: unpacks them wrongly or not at all"
    if all(scheme.symmetric and scheme.layout not in BFLOAT16_ONLY for scheme in plan.values()):
        return "loads, decompresses on first use"
    return WHILE_LOADING if len(set(_kinds(layout, plan).values())) == 1 else "loads in bfloat16, decompresses on first use"


def _rounds(layout: Layout, plan: dict[str, Scheme]) -> str:
    """What transformers rounds in whatever dtype it is told to compute: integers that it unpacks while loading."""
    verdict, integers = _transformers(layout, plan), {name for name, scheme in plan.items() if scheme.format == "int"}
    what = "weights" if verdict == WHILE_LOADING else "experts" if integers & layout.of_experts and verdict.startswith("loads") else None
    return f", rounding {what} to the dtype of their scales (seen with 5.23.0)" if what and integers else ""


def _in_siglip(layout: Layout, plan: dict[str, Scheme]) -> bool:
    """Whether linears of a SigLIP tower are to have no tensor that is called their weight; seen with transformers 5.23.0."""
    vision = layout.checkpoint.config.get("vision_config")
    if not isinstance(vision, dict) or vision.get("model_type") not in SIGLIP:
        return False
    embeds = {tower for tower in layout.towers if any(name.startswith(f"{tower}.") and "embed" in name for name in layout.checkpoint.tensors)}
    packed = [name for name in layout.outside if name in plan and plan[name].layout not in NAMED_WEIGHT]
    return any(name.startswith(f"{tower}.") for name in packed for tower in embeds)


def _reads_joined(layout: Layout) -> bool:
    """Whether transformers reads the experts of a block together alone."""
    return layout.arch.experts is not None and layout.arch.experts.fused


def quantization_config(layout: Layout, plan: dict[str, Scheme], cache: Caching | None = None) -> dict[str, Any]:
    """The `quantization_config` of config.json for what `plan` and `cache` say."""
    by_kind: dict[tuple[Scheme, bool], list[str]] = {}
    for name, kind in _kinds(layout, plan).items():
        by_kind.setdefault(kind, []).append(name)
    groups, apart = {}, _apart(layout, plan)
    for index, ((scheme, per_channel), names) in enumerate(by_kind.items()):
        every = len(by_kind) == 1 and not apart
        targets = ["Linear"] if every else sorted({_target(layout, name, apart) for name in names})
        groups[f"group_{index}"] = {
            "targets": targets,
            "weights": _arguments(scheme, per_channel),
            "input_activations": _input_arguments(scheme),
            "output_activations": None,
            "format": scheme.layout,
        }
    layouts = {scheme.layout for scheme, _ in by_kind}
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision" if layouts else "dense",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": _ignored(layout, plan) if plan else [],
        "kv_cache_scheme": _cache_arguments(cache) if isinstance(cache, CacheScheme) else None,
        "global_compression_ratio": None,
        "version": VERSION,
    }
    if _transformers(layout, plan) == WHILE_LOADING:  # engines that know nothing of this key ignore it
        config["dequantize"] = True
    return config


def _kinds(layout: Layout, plan: dict[str, Scheme]) -> dict[str, tuple[Scheme, bool]]:
    """What engines tell schemes apart by, for each linear: its scheme, and whether it has one scale per output.

    One scale per output is the same whatever the width; a group that happens to be as wide as some linears, but not as all, is a group.
    """
    plan = {name: scheme.coded for name, scheme in plan.items()}
    grouped = {scheme for name, scheme in plan.items() if scheme.group_size < layout.all_linears[name].columns}
    kinds = {
        scheme: (scheme.model_copy(update={"group_size": 0}), True) if scheme.format in ("int", "fp8") and scheme not in grouped else (scheme, False)
        for scheme in set(plan.values())
    }
    return {name: kinds[scheme] for name, scheme in plan.items()}


def _arguments(scheme: Scheme, per_channel: bool) -> dict[str, Any]:
    """`weights` of a group."""
    strategy = "channel" if per_channel else {"fp8-block": "block", "nvfp4": "tensor_group"}.get(scheme.format, "group")
    arguments: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": "int" if scheme.format == "int" else "float",
        "symmetric": scheme.symmetric,
        "strategy": strategy,
        "group_size": None if strategy in ("channel", "block") else scheme.group_size,
        "dynamic": False,
    }
    if strategy == "block":
        arguments["block_structure"] = [scheme.group_size, scheme.group_size]
    if kind := {"nvfp4": "torch.float8_e4m3fn", "mxfp4": "torch.uint8", "mxfp8": "torch.uint8"}.get(scheme.format):
        arguments |= {"scale_dtype": kind, "zp_dtype": kind}
    return arguments


def _cache_arguments(cache: CacheScheme) -> dict[str, Any]:
    strategy = "tensor" if cache.granularity == "tensor" else "attn_head"
    return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "group_size": None, "dynamic": False}


def _input_arguments(scheme: Scheme) -> dict[str, Any] | None:
    """`input_activations` of a group."""
    import torch

    rounding = scheme.input_rounding(1.0, torch.float32)
    return rounding.arguments() if rounding else None


def _target(layout: Layout, linear: str, apart: list[str]) -> str:
    """A pattern for one linear that fits its name in every engine, whatever stands before the blocks or the tower, and without a level that some
    towers have on disk alone. One of a block fits nothing of what lies `apart`, where names may be the same."""
    if linear in layout.outside:
        tower = next(tower for tower in layout.towers if linear.startswith(f"{tower}."))
        name = re.escape(linear.removeprefix(tower.rpartition(".")[0]).removeprefix("."))
        return f"re:.*{name.replace(f'.{OLD_LEVEL}.'.replace('.', DOT), f'{DOT}({OLD_LEVEL}{DOT})?', 1)}$"
    guard = f"(?!.*({'|'.join(apart)}){DOT})" if apart else ""
    return f"re:{guard}.*layers{DOT}{re.escape(linear.removeprefix(layout.arch.blocks + '.'))}$"


def _apart(layout: Layout, plan: Collection[str]) -> list[str]:
    """Those of the towers in which some linear is quantised, as `outside` calls them."""
    quantised = sorted(layout.outside.keys() & plan)
    return [name for name, tower in zip(outside(layout), layout.towers, strict=True) if any(each.startswith(f"{tower}.") for each in quantised)]


def _ignored(layout: Layout, plan: dict[str, Scheme]) -> list[str]:
    """Modules with a matrix that stays as it is. Anything before the blocks goes by different names in different engines."""
    apart = _apart(layout, plan)
    ignored = {"lm_head"} | {f"re:.*{tower}.*" for tower in outside(layout) if tower not in apart}
    for name in (*layout.linears, *(layout.outside if apart else ())):
        if name not in plan:
            ignored.add(_target(layout, name, apart))
    for block in layout.blocks:
        for local in layout.arch.unquantized:
            if f"{block.prefix}.{local}.weight" in layout.checkpoint.tensors:
                ignored.add(_target(layout, f"{block.prefix}.{_renamed(layout, local)}", apart))
                ignored.add(_target(layout, f"{block.prefix}.{local}", apart))
    return sorted(ignored)


def _renamed(layout: Layout, local: str) -> str:
    for old, new in layout.arch.rename:
        if local.startswith(old):
            return new + local.removeprefix(old)
    return local


def write(model: Model, plan: dict[str, Scheme], cache: Caching | None, folder: Path) -> None:
    """Write weights and config.json into `folder`; tensors stream from where they lie."""
    write_shards(model, _entries(model), folder)
    config = model.config
    if plan or isinstance(cache, CacheScheme):
        config["quantization_config"] = quantization_config(model.layout, plan, cache)
    for parts, path, kind in ((RESIDUAL_PARTS, RESIDUALS, "sparse-residual"), (BRANCH_PARTS, BRANCHES, "branch")):
        if beside := [entry(name, info) for name, info in sorted(model.tensors.items()) if name.endswith(parts)]:
            (folder / path).parent.mkdir()
            write_safetensors(folder / path, beside, {"format": kind})
    if "residuals" in model.left_out:
        config["quantization_config"]["residuals"] = RESIDUALS
    if "branch" in model.left_out:
        config[BRANCHED] = BRANCHES
    apart = LATENT if isinstance(cache, LatentScheme) else model.layout.wrapped_as
    write_text(folder / "config.json", json.dumps(wrapped(config, apart) if apart else config, indent=2) + "\n")


def write_shards(model: Model, entries: Iterable[Entry], folder: Path) -> None:
    """Write tensors under the names that transformers looks for, with an index where one file would be too large."""
    shards = list(_shards(model, entries))
    if len(shards) == 1:
        write_safetensors(folder / SINGLE, shards[0], {"format": "pt"})
    else:
        weight_map: dict[str, str] = {}
        for number, entries in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_safetensors(folder / file, entries, {"format": "pt"})
            weight_map |= {item.name: file for item in entries}
        total = sum(item.nbytes for entries in shards for item in entries)
        write_text(folder / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n")


def _shards(model: Model, entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Everything outside the blocks first, then block by block."""
    prefix = model.layout.arch.blocks + "."

    def position(name: str) -> tuple[int, str]:
        if not name.startswith(prefix):
            return -1, name
        return int(name.removeprefix(prefix).partition(".")[0]), name

    shard: list[Entry] = []
    size = 0
    for item in sorted(entries, key=lambda item: position(item.name)):
        if shard and size + item.nbytes > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(item)
        size += item.nbytes
    yield shard


def _entries(model: Model) -> Iterator[Entry]:
    """Everything that goes into the shards, experts one by one or, where transformers reads them in no other form, together."""
    table = model.layout.arch.experts
    blocks = [block for block in model.blocks if block.experts and not any(model.packed_as(name) for name in of_experts(block))]
    together = joined(model, table, blocks, fused.names(table)) if table and table.fused else []
    yield from together
    apart = {f"{name}.{part}" for block in blocks for name in of_experts(block) for part in ("weight", "bias")} if together else set()
    for name in model.tensors:
        if name not in apart and not model.layout.dropped(name) and not name.endswith(BESIDE_PARTS):
            yield model.final(name)


def of_experts(block: BlockLayout) -> list[str]:
    """Names of the linears of the routed experts of a block."""
    return [linear.name for stage in block.stages for group in stage.groups if group.expert is not None for linear in group.linears]


def joined(model: Model, table: Experts, blocks: Iterable[BlockLayout], tensors: Iterable[str]) -> list[Entry]:
    """Of each of `blocks`, the `tensors` that hold its experts together."""
    return [_joined(model, table, f"{block.prefix}.{table.prefix}", tensor, len(block.experts)) for block in blocks for tensor in tensors]


def _joined(model: Model, table: Experts, prefix: str, tensor: str, count: int) -> Entry:
    """One of the tensors that hold all experts, made one expert at a time."""
    from compress.checkpoint import read_entry

    def one(expert: int) -> Tensor:
        return fused.joined(table, tensor, [read_entry(model.final(f"{prefix}.{expert}.{local}")) for local in fused.members(table, tensor)])

    dtype = model.final(f"{prefix}.0.{next(iter(fused.members(table, tensor)))}").dtype
    return Entry(f"{prefix}.{tensor}", dtype, (count, *one(0).shape), Stacked(tuple(partial(one, expert) for expert in range(count))))


def compare(model: Model, folder: Path) -> int:
    """Compare every tensor of the artifact with what was meant, and every weight with what compressed-tensors itself unpacks.

    Returns how many weights were compared. Raises `InputError` on the first difference: nothing may be handed over that differs.
    """
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    from compress.checkpoint import Checkpoint, read_entry, read_tensor

    written = Layout(Checkpoint(folder)).checkpoint
    expected = {name for name in model.tensors if not model.layout.dropped(name)}
    if set(written.tensors) != expected:
        raise InputError.one(str(folder), f"tensors differ from those meant: {sorted(set(written.tensors) ^ expected)[:3]}", "report this")
    config = written.config.get("quantization_config", {"config_groups": {}})
    groups = [QuantizationScheme.model_validate(group) for group in config["config_groups"].values()]
    compared = 0
    for name in sorted(expected):
        if not torch.equal(bits(read_tensor(written.tensors[name])), bits(read_entry(model.final(name)))):
            raise InputError.one(name, "reads back differently from what was written", "is the disk sound?")
    for linear in model.layout.all_linears:
        if meant := model.quantized(linear):
            group = next(group for group in groups if any(_matches(target, linear) for target in group.targets))
            state = {part: read_tensor(written.tensors[f"{linear}.{part}"]) for part in model.parts(linear)}
            unpacked = BaseCompressor.get_value_from_registry(str(group.format)).decompress(state, group)["weight"]
            if not torch.equal(unpacked.float(), meant.dequantize().float()):
                raise InputError.one(linear, "compressed-tensors unpacks other values than those meant", "report this")
            compared += 1
    return compared


def _matches(target: str, linear: str) -> bool:
    return target == "Linear" or re.fullmatch(target.removeprefix("re:"), linear) is not None


def bits(tensor: Any) -> Any:
    """The bytes of a tensor: equal bits are more than equal numbers."""
    import torch

    return tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor
