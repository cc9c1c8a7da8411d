"""The vocabulary of an architecture table.

Every file beside this one is named after a `model_type` and holds one literal, ``ARCH``. Names are those **on disk**, because that
is what a user sees and writes patterns against; `compress.model` translates to what transformers holds in memory.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Collection
from dataclasses import dataclass, replace

from compress.errors import InputError


@dataclass(frozen=True)
class InputGroup:
    """Linears of one block that read the same tensor; serving engines fuse them, so they share one scheme.

    A block that has the linear ``unless`` does it in another way, and has no such group.
    """

    name: str
    linears: tuple[str, ...]
    unless: str | None = None


@dataclass(frozen=True)
class Fold:
    """Channels that any positive factors may be folded into without changing what a block computes.

    Dividing a channel where it is produced and multiplying it in everything that reads it cancels, provided that nothing but a product
    stands between the two. ``producer`` is a norm, whose weight is divided, or a linear, whose rows (and bias) are; the columns of
    ``consumers`` are multiplied, and these are **all** that read the channels, routers too. ``*`` stands for each expert; in the producer
    it makes one edge per expert. With ``heads`` the channels are those of attention heads, and where the consumer has more columns than
    the producer rows, each group of query heads reads one head. Where the config sets the key ``unless``, more than a product stands between.

    A norm gives what it reads of the residual stream, unless it is ``inner``: then of what a linear gives.
    """

    name: str
    producer: str
    consumers: tuple[str, ...]
    heads: bool = False
    inner: bool = False
    unless: str | None = None


@dataclass(frozen=True)
class Unit:
    """Channels of a block that can be taken out of it together, with everything that makes and reads them.

    ``rows`` are linears whose rows (and biases) belong to the units in order, to each an equal run of them; ``columns`` is the only linear that
    reads what they make. With ``heads`` the last of the rows has one attention head per unit, otherwise one channel. `count` is the key of the
    config that says how many units there are. Where ``within`` is a key, equally many are taken from each of so many parts. ``*`` stands for each
    expert, and all experts of a block keep equally many.
    """

    kind: str
    rows: tuple[str, ...]
    columns: str
    count: str
    heads: bool = False
    within: str | None = None


@dataclass(frozen=True)
class Outside:
    """Who writes to the residual stream and reads from it outside the blocks: each the name on disk and that in memory.

    ``writers`` are linears beside the embedding, such as a projector of images; the ``head`` reads what the ``norm`` gives.
    """

    embedding: tuple[str, str] = ("model.embed_tokens", "model.embed_tokens")
    norm: tuple[str, str] = ("model.norm", "model.norm")
    head: tuple[str, str] = ("lm_head", "lm_head")
    writers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Experts:
    """Routed experts of one block. On disk ``{prefix}.{expert}.{linear}``; in memory two 3-D parameters of the module `module`.

    The ``router`` has a row for each of them, in its weight and in whatever else is named after it. `counts` are the keys by which a config may
    say how many experts there are, `active` says how many of them a token goes to. Where `groups` are keys, tokens choose first: of so many
    groups of equal size so many.

    The two parameters are [experts, 2 x width, hidden], gates first, and [experts, hidden, width]; ``transposed`` ones have their last two dimensions
    the other way round, in ``interleaved`` ones each gate stands before what it is multiplied with, and beside ``biased`` ones there are biases.
    With `fused`, transformers reads them from disk in this form alone, or, with `mxfp4`, in what `compress.fused` says of that.

    Of a router that takes the largest of a softmax over all experts, `renormalise` says whether these are then made to sum to one, or which key of
    the config does; None for other routers.
    """

    prefix: str
    module: str
    gate: str
    up: str
    down: str
    router: str
    counts: tuple[str, ...]
    active: str = "num_experts_per_tok"
    groups: tuple[str, str] | None = None
    transposed: bool = False
    interleaved: bool = False
    biased: bool = False
    fused: bool = False
    mxfp4: bool = False
    renormalise: str | bool | None = None


@dataclass(frozen=True)
class Arch:
    """Where things are in a checkpoint of one `model_type`.

    `groups` are in the order in which data flows through a block, so that each is measured with everything before it already
    compressed. A group none of whose linears a block has is skipped (dense and sparse blocks may alternate), and so is an edge of `folds`
    without consumers. ``writers`` are the linears whose outputs are added to the residual stream, ``scores`` those behind attention scores, where an
    error is raised to an exponent. `biases` are keys of the config that give all of some linears a bias each. `units` are what structured pruning
    takes out; with ``whole_heads`` transformers refuses numbers of heads that do not divide the hidden size. `attention` is the module that has a
    cache of keys and values, computed by what transformers calls its implementation `kernel`. Where it keeps one ``latent`` vector for all heads
    instead, these keys of the config are the widths of its parts. The linears of a ``flat_tower`` are given the patches of all images in a row,
    [patches, width]. Blocks beyond those that a text goes through, as many as the config says under the key ``more_blocks``, are not part of the
    model.
    """

    model_type: str
    groups: tuple[InputGroup, ...]
    folds: tuple[Fold, ...] = ()
    units: tuple[Unit, ...] = ()
    outside: Outside = Outside()
    writers: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")
    scores: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj")
    blocks: str = "model.layers"
    module_blocks: str = "model.layers"
    text_config: str | None = None
    attention: str = "self_attn"
    kernel: str = "sdpa"
    latent: tuple[str, ...] = ()
    more_blocks: str | None = None
    experts: Experts | None = None
    rename: tuple[tuple[str, str], ...] = ()
    image: bool = False
    flat_tower: bool = False
    biases: tuple[tuple[str, tuple[str, ...]], ...] = ()
    whole_heads: bool = False
    unquantized: tuple[str, ...] = ()
    dropped: tuple[tuple[str, str], ...] = ((r".*rotary_emb\.inv_freq", "a buffer that the config determines"),)

    def without(self, linears: Collection[str]) -> Arch:
        """The table of a checkpoint in which these linears, by local name, stay as they are."""
        groups = [replace(group, linears=tuple(name for name in group.linears if name not in linears)) for group in self.groups]
        return replace(self, groups=tuple(group for group in groups if group.linears), unquantized=(*self.unquantized, *linears))

    @property
    def cache_scales(self) -> tuple[str, str]:
        """Where a block keeps the scales of its keys and values, if its cache is quantised; the names are those engines look for."""
        return f"{self.attention}.k_scale", f"{self.attention}.v_scale"

    @property
    def latents(self) -> str:
        """What the names of tensors begin with that make latents of a block's keys and values."""
        return f"{self.attention}.latents"


ATTENTION = (
    InputGroup("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    InputGroup("o", ("self_attn.o_proj",)),
)
GATED_MLP = (
    InputGroup("gate_up", ("mlp.gate_proj", "mlp.up_proj")),
    InputGroup("down", ("mlp.down_proj",)),
)

ATTENTION_FOLDS = (
    Fold("qkv", "input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Fold("o", "self_attn.v_proj", ("self_attn.o_proj",), heads=True),
)
GATED_MLP_FOLDS = (
    Fold("gate_up", "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    Fold("down", "mlp.up_proj", ("mlp.down_proj",)),
)

ATTENTION_UNITS = (
    Unit(
        "kv_group",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.o_proj",
        "num_key_value_heads",
        heads=True,
    ),
    Unit("query_head", ("self_attn.q_proj",), "self_attn.o_proj", "num_attention_heads", heads=True, within="num_key_value_heads"),
)
ATTENTION_BIASES = ("attention_bias", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"))
GATED_MLP_BIASES = ("mlp_bias", ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"))
GATED_MLP_UNITS = (Unit("ffn_channel", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", "intermediate_size"),)


def known() -> list[str]:
    """Every `model_type` with a table, found by file name."""
    package = importlib.import_module("compress.arch")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.name != "base")


def find(model_type: object) -> Arch:
    """The table for a `model_type`; an `InputError` names those that exist."""
    names = known()
    if model_type not in names:
        raise InputError.one("config.json: model_type", f"{model_type!r} is not supported", f"supported are {', '.join(names)}")
    arch = importlib.import_module(f"compress.arch.{model_type}").ARCH
    assert isinstance(arch, Arch)
    return arch
