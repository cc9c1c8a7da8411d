"""A finished artifact as one GGUF file, tokenizer included, for llama.cpp and what is built on it.

Codes are moved into the blocks of GGML as they are (`gguf_blocks`): each tensor in the smallest type that holds it exactly. Experts lie in one tensor
for each block and role, which has one type. Embeddings, head and linears that are not quantised keep their dtype; norms, biases and routers are
float32, as llama.cpp wants them. The rows of queries and keys of a Llama are put in the order in which llama.cpp turns them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import InputError, Problems
from compress.formats.sizes import ggml_refusal
from compress.layout import EXPERTS_OUT, BlockLayout, Layout
from compress.scheme import Caching, Scheme

if TYPE_CHECKING:
    from gguf import GGUFWriter, ReaderTensor
    from torch import Tensor

    from compress.model import Model
    from compress.numerics.grid import Quantized

READABLE = False
FILES = False
FILE = "model.gguf"
QKV = ("attn_q", "attn_k", "attn_v")


@dataclass(frozen=True)
class Target:
    """What llama.cpp calls an architecture and what it has room for there, read off its sources.

    ``biases`` are the linears that may have one; with ``permuted`` it turns neighbouring channels of a head rather than those half a head apart; with
    ``square`` heads are together as wide as the model, with ``equal`` there are as many of keys as of queries; ``renormalises`` says whether it makes
    the weights of a token's experts sum to one, None where there are none; with ``own_head`` the head cannot be left out where it is the embedding.
    """

    name: str
    biases: tuple[str, ...] = QKV
    permuted: bool = False
    square: bool = False
    equal: bool = False
    renormalises: bool | None = None
    own_head: bool = False


LLAMA_BIASES = (*QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down")
TARGETS = {
    "llama": Target("llama", LLAMA_BIASES, permuted=True),
    "mistral": Target("llama", LLAMA_BIASES, permuted=True),
    "mixtral": Target("llama", LLAMA_BIASES, permuted=True, renormalises=True),
    "qwen2": Target("qwen2", square=True),
    "qwen3": Target("qwen3"),
    "qwen2_moe": Target("qwen2moe", square=True, renormalises=False, own_head=True),
    "qwen3_moe": Target("qwen3moe", renormalises=True),
    "olmoe": Target("olmoe", square=True, equal=True, renormalises=False, own_head=True),
}
"""By model type."""
FACTORS = "llama3"
"""The kind of rotary position embedding for which a file has a factor for each pair of channels. Only a Llama has room for it."""
ROTATIONS = ("default", "linear", FACTORS, "yarn")
"""Those that llama.cpp computes as transformers does."""
UNTOLD = ("attention_factor", "mscale", "mscale_all_dim", "truncate", "partial_rotary_factor")
"""Settings of rotation that a file has no place for, or another meaning."""


@dataclass(frozen=True)
class Planned:
    """One tensor of the file: ``owners`` are the linears, or whatever the artifact has, that lie in it one after the other, without ``part``.

    ``heads``, where it is set, is the number of heads whose channels are put in another order.
    """

    name: str
    owners: tuple[str, ...]
    part: str
    heads: int | None = None


# Before weights load ------------------------------------------------------------------------------------------------------------


def check(place: str, layout: Layout, plan: dict[str, Scheme], problems: Problems) -> None:
    """Report what this layout or llama.cpp cannot express."""
    from compress.formats import gguf_vocabulary

    kind = layout.arch.model_type
    target = TARGETS.get(kind)
    if target is None:
        problems.add(place, f"how llama.cpp calls the parts of a {kind} is not known here", f"known are {', '.join(TARGETS)}")
        return
    _check_schemes(place, layout, plan, problems)
    _check_config(place, layout, target, problems)
    sparse = [block for block in layout.blocks if block.experts]
    if target.renormalises is not None and len(sparse) < len(layout.blocks):
        problems.add(place, f"llama.cpp knows no {kind} with blocks that have no experts", "choose another target")
    elif target.renormalises is not None and layout.renormalises != target.renormalises:
        what = "always" if target.renormalises else "never"
        problems.add(
            place, f"llama.cpp {what} makes the weights of a {kind}'s experts sum to one, but config.json says otherwise", "choose another target"
        )
    for block in sparse:
        for role, names in _roles(layout, block).items():
            if 0 < sum(name in plan for name in names) < len(names):
                problems.add(place, f"{block.prefix}.{role} is one tensor there, but only some of its experts are quantised", "treat them alike")
    known = _names(layout, target)
    unnamed = []
    for name in layout.checkpoint.tensors:
        owner, part = _parted(name)
        if layout.dropped(name) or owner in layout.of_experts:
            continue
        if owner not in known or (part == "bias" and known[owner].rpartition(".")[2] not in target.biases):
            unnamed.append(name)
    if unnamed:
        more = f" (and {len(unnamed) - 1} more)" if unnamed[1:] else ""
        problems.add(place, f"llama.cpp has no place for {unnamed[0]}{more} in a {kind}", "choose another target")
    try:
        gguf_vocabulary.read(layout.checkpoint.folder, _vocabulary_size(layout))
    except InputError as error:
        for problem in error.problems:
            problems.add(f"{place}: {problem.place}", problem.what, problem.remedy)


def _check_schemes(place: str, layout: Layout, plan: dict[str, Scheme], problems: Problems) -> None:
    if floats := sorted({scheme.format for scheme in plan.values()} - {"int", "mxfp4"}):
        problems.add(place, f"gguf holds integers and mxfp4, not {', '.join(floats)}", "choose compressed-tensors")
    if any(scheme.activations != "none" for scheme in plan.values()):
        problems.add(place, "gguf has no place for how inputs are rounded: llama.cpp rounds them in its own way", "set activations: none")
    if any(scheme.format == "int" and scheme.bits == 8 and not scheme.symmetric for scheme in plan.values()):
        problems.add(place, "gguf holds no codes of 8 bits with a zero point", "set symmetric: true, or bits: 7")
    odd: dict[str, str] = {}
    for name, scheme in plan.items():
        if reason := ggml_refusal(layout.all_linears[name].columns, scheme.group_size):
            odd.setdefault(reason, name)
    for reason, name in odd.items():
        problems.add(place, f"{name}: {reason}", "leave such linears out of quantisation, choose another group_size or another target")


def _check_config(place: str, layout: Layout, target: Target, problems: Problems) -> None:
    config, kind = layout.text_config, layout.arch.model_type
    rotation = config.get("rope_parameters") or config.get("rope_scaling") or {}
    turned = rotation.get("rope_type", rotation.get("type", "default"))
    known = ROTATIONS if target.permuted else tuple(each for each in ROTATIONS if each != FACTORS)
    if turned not in known:
        problems.add(place, f"llama.cpp does not turn a {kind} by rotation of the kind {turned}", f"it knows {', '.join(known)}")
    if odd := [key for key in UNTOLD if rotation.get(key) is not None]:
        problems.add(place, f"gguf has no place for {', '.join(odd)} of the rotation", "choose another target")
    if any(window is not None for window in layout.windows):
        problems.add(place, f"llama.cpp knows no windows of attention in a {kind}", "choose another target")
    if config.get("hidden_act", "silu") != "silu":
        problems.add(place, f"llama.cpp computes a {kind} with silu, not {config['hidden_act']}", "choose another target")
    if config.get("clip_qkv"):
        problems.add(place, "gguf has no place here for clip_qkv", "choose another target")
    heads = (layout.head_dim or 0) * config.get("num_attention_heads", 0)
    if target.square and heads != config.get("hidden_size"):
        what = f"llama.cpp wants the heads of a {kind} to be together as wide as the model, which is {config.get('hidden_size')}, not {heads}"
        problems.add(place, what, "choose another target")
    if target.equal and layout.kv_heads != config.get("num_attention_heads"):
        problems.add(place, f"llama.cpp wants a {kind} to have as many heads of keys as of queries", "choose another target")


def verdicts(layout: Layout, plan: dict[str, Scheme], cache: Caching | None = None) -> dict[str, str]:
    """For each engine, whether and how it reads the file."""
    return {"llama.cpp": "loads; on CPUs it rounds the inputs of quantised weights to 8 bits" if plan else "loads"}


# Names --------------------------------------------------------------------------------------------------------------------------


def _parted(name: str) -> tuple[str, str]:
    """The owner of a tensor of the artifact and what it is to it: all parts of a quantised weight are its weight."""
    owner, _, part = name.rpartition(".")
    return owner, "bias" if part == "bias" else "weight"


def _names(layout: Layout, target: Target) -> dict[str, str]:
    """Names in the file, without what follows the last dot, of all that is not part of an expert."""
    import gguf

    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == target.name)
    known = gguf.get_tensor_name_map(arch, len(layout.blocks))
    owners = dict.fromkeys(_parted(name)[0] for name in layout.checkpoint.tensors)
    return {owner: name for owner in owners if (name := known.get_name(owner)) is not None}


def _roles(layout: Layout, block: BlockLayout) -> dict[str, list[str]]:
    """Names in the file of the tensors that hold the experts of a block, with the linears in each, in order."""
    table = layout.arch.experts
    if table is None or not block.experts:
        return {}
    roles = {"ffn_gate_exps": table.gate, "ffn_up_exps": table.up, "ffn_down_exps": table.down}
    return {
        f"blk.{block.index}.{role}": [f"{block.prefix}.{table.prefix}.{expert}.{local}" for expert in block.experts] for role, local in roles.items()
    }


def _planned(model: Model) -> list[Planned]:
    """Every tensor of the file, in order: what lies outside the blocks, then block by block."""
    layout = model.layout
    target = TARGETS[layout.arch.model_type]
    names = _names(layout, target)
    heads = {"attn_q": int(layout.text_config["num_attention_heads"]), "attn_k": layout.kv_heads} if target.permuted else {}
    found: dict[tuple[str, str], Planned] = {}
    for name in model.tensors:
        owner, part = _parted(name)
        if layout.dropped(name) or owner in layout.of_experts or (model.tied and owner == layout.arch.outside.head[0]):
            continue
        found[owner, part] = Planned(f"{names[owner]}.{part}", (owner,), part, heads.get(names[owner].rpartition(".")[2]))
    if model.tied and target.own_head:
        found["", ""] = Planned("output.weight", (layout.arch.outside.embedding[0],), "weight")
    for block in model.blocks:
        for name, owners in _roles(layout, block).items():
            found[name, "weight"] = Planned(f"{name}.weight", tuple(owners), "weight")

    def place(item: Planned) -> tuple[int, str]:
        return int(item.name.split(".")[1]) if item.name.startswith("blk.") else -1, item.name

    return sorted(found.values(), key=place)


# Writing ------------------------------------------------------------------------------------------------------------------------


def write(model: Model, plan: dict[str, Scheme], cache: Caching | None, folder: Path) -> None:
    """Write the file into `folder`; no more than one of its tensors is held. Every weight is read twice: to choose types, then to be packed."""
    import gguf
    import numpy as np

    from compress.formats import gguf_vocabulary
    from compress.formats.gguf_blocks import BYTES

    planned = [(item, _type(model, item)) for item in _planned(model)]
    writer = gguf.GGUFWriter(folder / FILE, TARGETS[model.layout.arch.model_type].name)
    _tell(model, writer)
    _tell_type(writer, [(kind, len(item.owners)) for item, kind in planned if item.part == "weight" and item.owners[0] in plan])
    gguf_vocabulary.read(model.checkpoint.folder, _vocabulary_size(model.layout)).add(writer)
    factors = _rotation_factors(model)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, np.dtype(np.float32), factors.numel() * 4)
    for item, kind in planned:
        width, nbytes = BYTES.get(kind) or gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        *rows, columns = _shape(model, item)
        shape = (*rows, columns // width * nbytes)
        writer.add_tensor_info(item.name, shape, np.dtype(np.uint8), math.prod(shape), gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    for item, kind in planned:
        writer.write_tensor_data(_data(model, item, kind))
    writer.close()


def _vocabulary_size(layout: Layout) -> int:
    return layout.checkpoint.tensors[f"{layout.arch.outside.embedding[0]}.weight"].shape[0]


def _shape(model: Model, item: Planned) -> tuple[int, ...]:
    """Of a tensor of the file."""
    first = item.owners[0]
    linear = model.layout.linears.get(first) if item.part == "weight" else None
    one = (linear.rows, linear.columns) if linear else model.final(f"{first}.{item.part}").shape
    return (len(item.owners), *one) if first in model.layout.of_experts else one


def _type(model: Model, item: Planned) -> str:
    """The name of the type that a tensor of the file gets."""
    from compress.formats.gguf_blocks import choose

    if item.part == "weight" and model.packed_as(item.owners[0]):
        return choose(_quantized(model, owner) for owner in item.owners)
    stored = model.final(f"{item.owners[0]}.{item.part}")
    router = model.layout.arch.experts and item.owners[0].endswith(model.layout.arch.unquantized)
    return "F32" if len(stored.shape) == 1 or router or stored.dtype == "F64" else stored.dtype


def _quantized(model: Model, linear: str) -> Quantized:
    weight = model.quantized(linear)
    assert weight
    return weight


def _data(model: Model, item: Planned, kind: str) -> Any:
    """The bytes of a tensor of the file, as an array."""
    import numpy as np
    import torch

    from compress.checkpoint import read_entry
    from compress.formats.gguf_blocks import pack

    parts = []
    for owner in item.owners:
        if item.part == "weight" and model.packed_as(owner):
            made = pack(_quantized(model, owner), kind)
        else:
            dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
            made = read_entry(model.final(f"{owner}.{item.part}")).to(dtype)
        made = made if item.heads is None else made[_turned(len(made), item.heads)]
        parts.append(made.contiguous().view(torch.uint8).numpy())
    return np.concatenate(parts)


def _turned(rows: int, heads: int) -> Tensor:
    """Which row of ours each row of a Llama's queries or keys is: those half a head apart become neighbours."""
    import torch

    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def _tell(model: Model, writer: GGUFWriter) -> None:
    """What llama.cpp has to know of the model beside its tensors."""
    from compress.checkpoint import transformers_config

    layout = model.layout
    config = transformers_config(model.config)
    writer.add_block_count(len(model.blocks))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_vocab_size(_vocabulary_size(layout))
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(layout.kv_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rotation = config.rope_parameters
    writer.add_rope_freq_base(rotation["rope_theta"])
    if rotation["rope_type"] in ("linear", "yarn"):
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType(rotation["rope_type"]))
        writer.add_rope_scaling_factor(rotation["factor"])
    if rotation["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rotation["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rotation.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(rotation.get("beta_slow") or 1.0)
    if experts := layout.arch.experts:
        first = model.blocks[0]
        down = next(stage for stage in first.stages if stage.name == EXPERTS_OUT).groups[0].linears[0]
        writer.add_expert_count(len(first.experts))
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(down.columns)
        shared = layout.linears.get(f"{first.prefix}.{experts.prefix.rpartition('.')[0]}.shared_expert.down_proj")
        if shared:
            writer.add_expert_shared_feed_forward_length(shared.columns)


def _tell_type(writer: GGUFWriter, kinds: list[tuple[str, int]]) -> None:
    """What the file as a whole is called: after the type of most of its linears."""
    import gguf

    common: Counter[str] = Counter()
    for kind, times in kinds:
        common[kind] += times
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if common:
        most = common.most_common(1)[0][0]
        variants = (f"MOSTLY_{most}", f"MOSTLY_{most}_S", f"MOSTLY_{most}_MOE")
        writer.add_file_type(next(gguf.LlamaFileType[name] for name in variants if name in gguf.LlamaFileType.__members__))


def _rotation_factors(model: Model) -> Tensor | None:
    """By what the rotation of each pair of channels is slowed down, float32 [head_dim / 2], where that is not the same for all.

    That is plain rotation divided by what transformers computes.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from compress.checkpoint import transformers_config

    config = transformers_config(model.config)
    rotation = config.rope_parameters
    if rotation["rope_type"] != FACTORS:
        return None
    import torch

    slowed, _ = ROPE_INIT_FUNCTIONS[FACTORS](config, torch.device("cpu"))
    plain = 1.0 / rotation["rope_theta"] ** (torch.arange(0, model.head_dim, 2, dtype=torch.float32) / model.head_dim)
    factors: Tensor = (plain / slowed).float()
    return factors


# Reading ------------------------------------------------------------------------------------------------------------------------


def weights(model: Model, plan: dict[str, Scheme], folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every weight, as the file says it and the gguf package reads it."""
    import gguf

    path = folder / FILE
    stored: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for item in _planned(model):
        for place, owner in enumerate(item.owners):
            tensor = _read(path, stored[item.name], place, len(item.owners))
            if item.heads is not None:
                tensor = tensor[_turned(len(tensor), item.heads).argsort()]
            yield f"{owner}.{item.part}", tensor
    head = f"{model.layout.arch.outside.head[0]}.weight"
    if model.tied and head in model.tensors:
        yield head, _read(path, stored["token_embd.weight"], 0, 1)


def types(model: Model, path: Path) -> dict[str, tuple[str, str]]:
    """The name and the type of the tensor of a file that each weight lies in, by its owner; a head that is the embedding is told, too."""
    import gguf

    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    found = {owner: (item.name, kinds[item.name]) for item in _planned(model) if item.part == "weight" for owner in item.owners}
    if model.tied:
        name = "output.weight" if "output.weight" in kinds else "token_embd.weight"
        found[model.layout.arch.outside.head[0]] = name, kinds[name]
    return found


def _read(path: Path, stored: ReaderTensor, place: int, count: int) -> Tensor:
    """One of ``count`` equal parts of a tensor, float32; only that is read."""
    import numpy as np
    import torch
    from gguf.quants import dequantize

    nbytes = int(stored.n_bytes) // count
    data = np.fromfile(path, np.uint8, nbytes, offset=int(stored.data_offset) + place * nbytes)
    shape = [int(size) for size in reversed(stored.shape)]
    shape = shape[1:] if len(shape) == 3 else shape
    rows = data.reshape(math.prod(shape[:-1]), -1)
    return torch.from_numpy(dequantize(rows, stored.tensor_type)).view(shape)
