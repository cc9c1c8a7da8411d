"""Grouped-query attention rewritten as attention to a latent (MLA), with a smaller KV cache: a stock DeepSeek-V3, which transformers opens.

Of keys one remains for all heads, `rope` wide, of values a latent, `rank` wide, both chosen by what they lose on the calibration data; at full width
neither loses anything. Keys are kept in directions that commute with rotary embedding, each block's own, at frequencies that are the same in all.
Statistics are those of the model as it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compress.checkpoint import EXACT_LINEARS
from compress.errors import Problems
from compress.layout import Layout
from compress.passes.base import Restructure

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

    from compress.block import Block
    from compress.calibrate import Workspace
    from compress.data import Samples
    from compress.model import Model
    from compress.numerics.latent_attention import Directions, Widths

FROM = ("llama", "mistral")
TO = "deepseek_v3"
STATISTICS = "statistics"
"""The folder for what is measured of each block."""
QUERY, KEY, VALUE, OUTPUT = (f"self_attn.{name}_proj" for name in "qkvo")
DOWN, NORM, UP = (f"self_attn.{name}" for name in ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj"))
LIKE = {QUERY: QUERY, DOWN: KEY, NORM: "input_layernorm", UP: VALUE}
"""What the weights it makes have their dtype from."""
LEAVE = "leave mla out"
STATIC = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding whose frequencies are the same at every length."""
KERNEL_WIDTHS = (320, 512, 576)
"""Of latent and shared key together, for which vLLM has kernels (seen with 0.33.0)."""
WIDEST_HEAD = 256
"""Of queries, as vLLM's kernels take them before the cache is read."""
EPSILON = 1e-6
"""Of the norm of the latent in transformers, whatever the config says of other norms."""
KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "max_position_embeddings",
    "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "attention_dropout",
    "dtype", "torch_dtype", "transformers_version",
)  # fmt: skip
"""Keys of a config that mean the same in both."""


class Pass(Restructure):
    """Turn the attention of a Llama or Mistral into that of a DeepSeek-V3."""

    verb: ClassVar[str] = "converted"
    needs_data: ClassVar[bool] = True
    removes: ClassVar[bool] = False

    rope: int = Field(ge=2, multiple_of=2, description="width of the key that all heads share; exact if as wide as the keys of all together")
    rank: int = Field(ge=1, description="width of the latent of values; exact if as wide as the values of all heads together")
    target: Literal["hf", "vllm"] = Field(
        default="hf",
        description="`hf`: any widths and frequencies, for transformers; `vllm`: those that vLLM's own class computes with, which transformers opens "
        "too: far fewer frequencies of the key, and wider latents padded with zeros",
    )

    def sweeps(self, samples: int, length: int) -> float:
        return 1.0

    def check(self, place: str, layout: Layout, problems: Problems) -> None:
        if refused := _refused(layout):
            for what, remedy in refused:
                problems.add(place, what, remedy)
            return
        every = layout.kv_heads * (layout.head_dim or 0)
        if self.rope > every:
            problems.add(f"{place}: rope", f"{self.rope} is more than the {every} of the keys of all heads", f"set it to {every} or less")
        if self.target == "vllm":
            self._check_vllm(place, layout, problems)
        elif self.rank > every:
            problems.add(f"{place}: rank", f"{self.rank} is more than the {every} of the values of all heads", f"set it to {every} or less")

    def _check_vllm(self, place: str, layout: Layout, problems: Problems) -> None:
        size, config = layout.head_dim or 0, layout.text_config
        if self.rope + self.rank not in KERNEL_WIDTHS:
            works = ", ".join(str(width - self.rope) for width in KERNEL_WIDTHS if width > self.rope)
            what = f"with rope {self.rope} it is a cache of {self.rope + self.rank}; vLLM has kernels for {', '.join(map(str, KERNEL_WIDTHS))}"
            problems.add(f"{place}: rank", what, f"set it to one of {works or 'none'}")
        if size % self.rope:
            works = ", ".join(str(width) for width in range(2, size + 1, 2) if size % width == 0)
            what = f"{self.rope} does not divide the head size {size}, so that no frequencies of the model are those that vLLM gives so wide a key"
            problems.add(f"{place}: rope", what, f"set it to one of {works}, or target: hf")
        elif self._nope(layout) is None:
            what = f"with a head of {size} leaves no width up to {WIDEST_HEAD} for queries that are not turned"
            problems.add(f"{place}: rope", what, "set target: hf")
        if (kind := _rope_type(_rope(layout))) != "default":
            problems.add(f"{place}: target", f"vLLM's class gives {kind} frequencies another form than the model's", "set target: hf")
        if (epsilon := config.get("rms_norm_eps", EPSILON)) != EPSILON:
            what = f"vLLM takes rms_norm_eps {epsilon:g} for the norm of the latent and transformers {EPSILON:g}, of which only one can be undone"
            problems.add(f"{place}: target", what, "set target: hf")
        if (dtype := _dtype(layout)) != "BF16":
            problems.add(f"{place}: target", f"vLLM's kernels compute in bfloat16, and the model is stored as {dtype}", "set target: hf")

    def _nope(self, layout: Layout) -> int | None:
        """Width of the part of queries that is not turned, None if none fits. vLLM wants some, of another width, and no narrower than values."""
        if self.target == "hf":
            return 0
        widths = range(64, WIDEST_HEAD - self.rope + 1, 64)
        return next((width for width in widths if width != self.rope and width + self.rope >= (layout.head_dim or 0)), None)

    def _widths(self, layout: Layout) -> Widths:
        from compress.numerics.latent_attention import Widths

        nope = self._nope(layout)
        assert layout.head_dim and nope is not None
        return Widths(int(layout.text_config["num_attention_heads"]), layout.kv_heads, layout.head_dim, self.rope, self.rank, nope)

    def _config(self, layout: Layout, config: Mapping[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
        """What config.json is to say, by what ``config`` says of the model as it was, with these parameters of rotary embedding."""
        heads, blocks = config["num_attention_heads"], len(layout.blocks)
        latent = {"kv_lora_rank": self.rank, "q_lora_rank": None, "qk_rope_head_dim": self.rope, "qk_nope_head_dim": self._nope(layout)}
        latent |= {"v_head_dim": layout.head_dim, "head_dim": self.rope, "num_key_value_heads": heads, "rope_interleave": True}
        # No block has experts, but engines ask for numbers all the same.
        routing = dict.fromkeys(("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group"), 1)
        routing |= {"first_k_dense_replace": blocks, "moe_intermediate_size": config["intermediate_size"], "num_nextn_predict_layers": 0}
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": TO,
            **{key: config[key] for key in KEPT if key in config},
            **latent,
            **routing,
            "routed_scaling_factor": 1.0,
            "attention_bias": False,
            "rope_parameters": rope,
            EXACT_LINEARS: [DOWN],
        }

    def _rope_parameters(self, config: Mapping[str, Any], frequencies: list[float], factor: float) -> dict[str, Any]:
        """What config.json is to say of rotary embedding with these ``frequencies``, radians per token, and this factor of sines and cosines.

        Of LongRoPE (arXiv 2402.13753), which multiplies each period by a factor, with periods of one. It makes no difference between lengths here.
        """
        if self.target == "vllm":
            return {"rope_type": "default", "rope_theta": config["rope_parameters"]["rope_theta"]}
        periods = [1 / frequency for frequency in frequencies]
        scaling = {"factor": 1.0, "attention_factor": factor, "original_max_position_embeddings": config["max_position_embeddings"]}
        return {"rope_type": "longrope", "rope_theta": 1.0, "short_factor": periods, "long_factor": periods} | scaling

    def expected(self, layout: Layout) -> Layout:
        from compress.reshape import unmade, with_attention

        shapes = {
            f"{block.prefix}.{local}.weight": (f"{block.prefix}.{LIKE[local]}.weight", shape)
            for block in layout.blocks
            for local, shape in self._shapes(layout).items()
        }
        config = self._config(layout, layout.text_config, {"rope_type": "default" if self.target == "vllm" else "longrope"})
        return with_attention(layout, unmade(layout, shapes), (KEY, VALUE), config)

    def _shapes(self, layout: Layout) -> dict[str, tuple[int, ...]]:
        """Of the weights it makes, by local name."""
        heads, hidden = (int(layout.text_config[key]) for key in ("num_attention_heads", "hidden_size"))
        nope = self._nope(layout) or 0
        return {
            QUERY: (heads * (nope + self.rope), hidden),
            DOWN: (self.rank + self.rope, hidden),
            NORM: (self.rank,),
            UP: (heads * (nope + (layout.head_dim or 0)), self.rank),
        }

    def outcome(self, layout: Layout, workspace: Workspace) -> Layout:
        from compress.checkpoint import read_header
        from compress.reshape import with_attention

        found = {name: info for block in layout.blocks for name, info in read_header(workspace.block_file(block.index))[0].items()}
        return with_attention(layout, found, (KEY, VALUE), json.loads(read_header(workspace.outside_file)[1]["settings"]))

    def run(self, model: Model, samples: Samples, workspace: Workspace) -> None:
        import torch

        from compress.calibrate import walk
        from compress.checkpoint import transformers_config
        from compress.numerics.latent_attention import allot, directions, evenly_spread, kept

        widths, pairs = self._widths(model.layout), self.rope // 2
        files = self._measure(model, samples, workspace)
        found = {}
        for index, path in files.items():
            measured = _read(path, model.device)
            found[index] = directions(torch.complex(measured["keys.real"], measured["keys.imag"]), measured["queries"])
        energies = [each.energies for each in found.values()]
        counts = evenly_spread(widths.size // 2, pairs) if self.target == "vllm" else allot(energies, pairs)
        if not workspace.outside_file.exists():
            config = transformers_config(model.layout.checkpoint.config).to_dict()  # what config.json leaves out, another class makes up otherwise
            rotary = model.skeleton.base_model.rotary_emb
            rope = self._rope_parameters(config, rotary.inv_freq.double()[kept(counts)[0]].tolist(), float(rotary.attention_scaling))
            model.release()
            model.write_outside(workspace.outside_file, {}, self._config(model.layout, config, rope), [])
        for block in walk(model, workspace):
            self._convert(block, widths, found[block.layout.index], counts, _read(files[block.layout.index], model.device)["values"])

    def _measure(self, model: Model, samples: Samples, workspace: Workspace) -> dict[int, Path]:
        """Where it stands, by block, how its keys and values vary and how large queries are."""
        from compress.calibrate import Workspace, sweep
        from compress.checkpoint import entry
        from compress.numerics.latent_attention import key_moments, query_energies, value_moment
        from compress.state import write_state

        widths = self._widths(model.layout)
        # A sweep that changes nothing: a killed run continues it like any other.
        beforehand = Workspace(workspace.folder / STATISTICS, workspace.progress)
        beforehand.folder.mkdir(exist_ok=True)
        files = {block.index: beforehand.folder / f"moments-{block.index:05d}.safetensors" for block in model.blocks}
        first = {f"{block.prefix}.{QUERY}" for block in model.blocks}
        for inputs in sweep(model, samples, beforehand, lambda group: group.linears[0].name in first):
            block, moment = inputs.block, inputs.hessian[0].double()
            query, key, value = (block.weight(f"{block.layout.prefix}.{local}") for local in (QUERY, KEY, VALUE))
            keys = key_moments(key, widths.groups, moment)
            tensors = {
                "keys.real": keys.real,
                "keys.imag": keys.imag,
                "queries": query_energies(query, widths.heads, moment),
                "values": value_moment(value, moment),
            }
            write_state(files[block.layout.index], [entry(name, tensor) for name, tensor in tensors.items()], {})
        return files

    def _convert(self, block: Block, widths: Widths, found: Directions, counts: Tensor, values: Tensor) -> None:
        from compress.numerics.latent_attention import assemble, key_rows, output_metric, query_rows, value_latent

        prefix = block.layout.prefix
        query, key, value, output = (block.weight(f"{prefix}.{local}") for local in (QUERY, KEY, VALUE, OUTPUT))
        every = widths.groups * widths.size
        latent = value_latent(values, output_metric(output, widths.groups, widths.size), min(self.rank, every))
        shared = query_rows(query, widths.heads, found, counts), key_rows(key, widths.groups, found, counts)
        made = assemble(widths, *shared, value, latent, EPSILON)
        for local, tensor in made.items():
            block.restructure(f"{prefix}.{local}.weight", tensor, f"{prefix}.{LIKE[local]}.weight")
        total = float(found.energies.sum())
        stays = sum(float(found.energies[frequency, :count].sum()) for frequency, count in enumerate(counts.tolist()))
        record = {"pass": "mla", "method": self.target, "before": every}
        block.add_record(
            f"{prefix}.keys", record | {"kind": "width of keys", "after": self.rope, "lost": max(0.0, 1 - stays / total) if total else 0.0}
        )
        block.add_record(f"{prefix}.values", record | {"kind": "width of values", "after": self.rank, "lost": latent.lost})


def _refused(layout: Layout) -> list[tuple[str, str]]:
    """Why the attention of a model cannot be had as a DeepSeek-V3, and what to do."""
    arch, config, tensors = layout.arch, layout.text_config, layout.checkpoint.tensors
    if arch.latent:
        return [(f"a {arch.model_type} caches a latent already", LEAVE)]
    found = []
    if norm := next((name for name in sorted(tensors) if name.endswith(("q_norm.weight", "k_norm.weight"))), None):
        found.append((f"{norm} stands before the scores of each head (QK-norm), where a {TO} has none", LEAVE))
    if bias := next((name for name in sorted(layout.in_blocks) if name.endswith(".bias")), None):
        found.append((f"{bias} has no place in a {TO}, where neither queries, keys and values nor MLPs have biases", LEAVE))
    if arch.image:
        found.append((f"a {arch.model_type} sees, which a {TO} does not", LEAVE))
    if arch.experts:
        found.append((f"a {arch.model_type} has experts, which it routes in another way than a {TO}", LEAVE))
    if not found and arch.model_type not in FROM:
        found.append((f"a {arch.model_type} is not known to be a {TO} but for attention, as {' and '.join(FROM)} are", LEAVE))
    if found:
        return found
    # A Mistral whose config says nothing of a window has one in transformers.
    if any(layout.windows) or (arch.model_type == "mistral" and "sliding_window" not in config):
        found.append((f"attention looks back through a sliding window, which a {TO} has none of", LEAVE))
    if layout.factored or layout.of_blocks:
        found.append(("blocks differ in width, or have linears of low rank", "put mla before what made them so"))
    rope = _rope(layout)
    if (kind := _rope_type(rope)) not in STATIC:
        found.append((f"the frequencies of {kind} rotary embedding change with the length; those of {', '.join(STATIC)} do not", LEAVE))
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1):
        found.append(("rotary embedding turns only a part of each head", LEAVE))
    if _dtype(layout) == "F16":
        what = "weights are stored as F16, in which the small numbers vanish that undo the norm of the latent"
        found.append((what, "start from a checkpoint in bfloat16 or float32"))
    return found


def _rope(layout: Layout) -> dict[str, Any]:
    """What config.json says of rotary embedding, in its present form or an older one."""
    return layout.text_config.get("rope_parameters") or layout.text_config.get("rope_scaling") or {}


def _rope_type(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _dtype(layout: Layout) -> str:
    """Of weights in blocks, as safetensors calls it."""
    return layout.checkpoint.tensors[f"{next(iter(layout.linears))}.weight"].dtype


def _read(path: Path, device: torch.device) -> dict[str, Tensor]:
    """What was measured of a block."""
    from compress.checkpoint import read_header, read_tensor

    return {name: read_tensor(info).to(device) for name, info in read_header(path)[0].items()}
