"""Tiny random models: small enough to hold in the head, with every feature a real one of their kind has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from oracles import fused
from safetensors.torch import load_file, save_file

from compress import demo
from compress.data import Sample, Samples

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
VOCABULARY = 4096
IMAGE_TOKEN = 3
DENSE = ("llama", "llama-tied", "llama-bias", "mistral", "qwen2", "qwen2-sliding", "qwen3", "llava")
ROUTED = (
    "qwen3_moe",
    "qwen3_moe-dense-first",
    "mixtral",
    "qwen2_moe",
    "qwen2_moe-60",
    "olmoe",
    "olmoe-clipped",
    "deepseek_v3",
    "deepseek_v3-q",
    "gpt_oss",
)
"""Kinds with experts, whose routers transformers has compute in float32."""
SEEING = ("llava", "llava_onevision", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm")
"""Kinds with a vision tower."""
IMAGE_TOKENS = {"llava_onevision": 10}
"""How many tokens an image of 16 x 16 pixels is, where it is not four."""
KINDS = DENSE + ROUTED


class Silent:
    """Progress that nobody watches."""

    def step(self, name: str, total: int) -> None: ...
    def done(self, units: int) -> None: ...
    def blocks(self, done: int, total: int) -> None: ...
    def note(self, text: str) -> None: ...


def _text(**changes: Any) -> dict[str, Any]:
    common = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "tie_word_embeddings": False,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    return common | changes


def config(kind: str) -> Any:
    """The configuration of a tiny model of each kind."""
    import transformers as hf

    match kind:
        case "llama":
            return hf.LlamaConfig(**_text())
        case "llama-tied":
            return hf.LlamaConfig(**_text(tie_word_embeddings=True))
        case "llama-688":
            return hf.LlamaConfig(**_text(intermediate_size=688))
        case "llama-3-blocks":
            return hf.LlamaConfig(**_text(num_hidden_layers=3))
        case "llama-bias":
            return hf.LlamaConfig(**_text(attention_bias=True, mlp_bias=True))
        case "mistral":
            return hf.MistralConfig(**_text(sliding_window=8))
        case "qwen2":
            return hf.Qwen2Config(**_text())
        case "qwen2-sliding":
            return hf.Qwen2Config(**_text(use_sliding_window=True, sliding_window=8, max_window_layers=1))
        case "qwen3":
            return hf.Qwen3Config(**_text())
        case "qwen3_moe":
            return hf.Qwen3MoeConfig(**_text(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True))
        case "qwen3_moe-dense-first":
            return hf.Qwen3MoeConfig(**_text(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, mlp_only_layers=[0]))
        case "mixtral":
            return hf.MixtralConfig(**_text(num_local_experts=4, num_experts_per_tok=2))
        case "qwen2_moe" | "qwen2_moe-60":
            experts = 60 if kind.endswith("60") else 8
            widths = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}
            return hf.Qwen2MoeConfig(**_text(num_experts=experts, num_experts_per_tok=2, mlp_only_layers=[], **widths))
        case "olmoe" | "olmoe-clipped":
            clip = 1.0 if kind.endswith("clipped") else None
            return hf.OlmoeConfig(**_text(num_experts=8, num_experts_per_tok=2, intermediate_size=32, clip_qkv=clip))
        case "deepseek_v3" | "deepseek_v3-q":
            latent = {"q_lora_rank": None if kind.endswith("q") else 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16}
            routing = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1}
            return hf.DeepseekV3Config(
                **_text(num_key_value_heads=4, head_dim=8, moe_intermediate_size=32, first_k_dense_replace=1, v_head_dim=16, **latent, **routing)
            )
        case "gpt_oss":
            rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
            return hf.GptOssConfig(**_text(num_local_experts=4, num_experts_per_tok=2, intermediate_size=32, sliding_window=8, rope_parameters=rope))
        case "llava":
            vision = {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 8,
                "projection_dim": 32,
            }
            return hf.LlavaConfig(
                vision_config=hf.CLIPVisionConfig(**vision), text_config=hf.LlamaConfig(**_text()),
                image_token_index=IMAGE_TOKEN, image_seq_length=4, vision_feature_layer=-1, vision_feature_select_strategy="default",
            )  # fmt: skip
    return _seeing(kind)


def _seeing(kind: str) -> Any:
    """The configuration of a tiny model with a vision tower other than LLaVA's."""
    import transformers as hf

    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    merging = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    tokens = {"image_token_id": IMAGE_TOKEN, "video_token_id": 2}
    widths = {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64}
    match kind:
        case "llava_onevision":
            return hf.LlavaOnevisionConfig(
                vision_config=hf.SiglipVisionConfig(**tower), text_config=hf.Qwen2Config(**_text()), image_token_index=IMAGE_TOKEN,
                video_token_index=2, image_grid_pinpoints=[[16, 16]], vision_feature_layer=-1,
            )  # fmt: skip
        case "internvl":
            vision = hf.InternVLVisionConfig(**tower | {"image_size": [16, 16], "patch_size": [4, 4]})
            return hf.InternVLConfig(
                vision_config=vision, text_config=hf.Qwen2Config(**_text()), image_token_id=IMAGE_TOKEN, image_seq_length=4, downsample_ratio=0.5
            )
        case "qwen2_vl":
            text = hf.Qwen2VLTextConfig(**_text(rope_parameters=rope)).to_dict()
            return hf.Qwen2VLConfig(vision_config=merging | {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}, text_config=text, **tokens)
        case "qwen2_5_vl":
            text = hf.Qwen2_5_VLTextConfig(**_text(rope_parameters=rope)).to_dict()
            vision = merging | widths | {"window_size": 16, "fullatt_block_indexes": [1]}
            return hf.Qwen2_5_VLConfig(vision_config=vision, text_config=text, **tokens)
        case "qwen3_vl":
            text = hf.Qwen3VLTextConfig(**_text(rope_parameters=rope | {"mrope_interleaved": True})).to_dict()
            vision = merging | widths | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
            return hf.Qwen3VLConfig(vision_config=vision, text_config=text, **tokens)
        case "idefics3" | "smolvlm":
            of_vision, whole = (hf.Idefics3VisionConfig, hf.Idefics3Config) if kind == "idefics3" else (hf.SmolVLMVisionConfig, hf.SmolVLMConfig)
            vision = of_vision(**tower | {"patch_size": 4})
            return whole(vision_config=vision, text_config=hf.LlamaConfig(**_text()), image_token_id=IMAGE_TOKEN, scale_factor=2)
    raise ValueError(kind)


def _pixels(kind: str, ids: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """What a model of a kind that sees is given of one image beside ``ids`` [tokens]."""
    if kind == "llava_onevision":
        return {"pixel_values": torch.randn(1, 2, 3, 16, 16, generator=generator), "image_sizes": torch.tensor([[16, 16]])}
    if kind.startswith("qwen"):
        return {
            "pixel_values": torch.randn(16, 3 * 2 * 4 * 4, generator=generator),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
            "mm_token_type_ids": (ids == IMAGE_TOKEN).long()[None],
        }
    batched = (1, 1) if kind in ("idefics3", "smolvlm") else (1,)
    return {"pixel_values": torch.randn(*batched, 3, 16, 16, generator=generator)}


def save(kind: str, dtype: torch.dtype, folder: Path, **options: Any) -> Path:
    """Write a random model of a kind with a tokenizer beside it; biases and norms are random too, so that forgetting one shows.

    `options` are those of transformers' `save_pretrained`.
    """
    import transformers as hf

    torch.manual_seed(1)
    auto = hf.AutoModelForImageTextToText if kind in SEEING else hf.AutoModelForCausalLM
    model = auto.from_config(config(kind))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
            elif "embed" not in name:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer += 0.2 * torch.randn_like(buffer)
    model.to(dtype).save_pretrained(folder, max_shard_size="300KB", **options)
    for name in TOKENIZER:
        shutil.copy(demo.path("dense") / name, folder / name)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, those of experts one by one."""
    tensors = {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}
    return fused.apart(tensors) if "gpt_oss" in (folder / "config.json").read_text() else tensors


def write(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """All tensors in one file, as transformers reads them, beside the config."""
    if "gpt_oss" in (folder / "config.json").read_text():
        tensors = fused.together(tensors)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def plain(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model as transformers alone opens it."""
    import transformers as hf

    seeing = "vision_config" in json.loads((folder / "config.json").read_text())
    auto = hf.AutoModelForImageTextToText if seeing else hf.AutoModelForCausalLM
    # One expert after the other: the grouped product that is the default knows no float64.
    return auto.from_pretrained(folder, dtype=dtype, local_files_only=True, experts_implementation="eager").eval()


def samples(lengths: tuple[int, ...] = (24, 24, 17, 24, 9), image: bool = False, kind: str = "llava") -> Samples:
    """Random tokens, some of equal length; with `image`, an image for a model of this kind and the tokens that stand for it."""
    generator = torch.Generator().manual_seed(7)
    items = []
    for length in (max(each, IMAGE_TOKENS.get(kind, 0) + 4) if image else each for each in lengths):
        ids = torch.randint(4, VOCABULARY, (length,), generator=generator)
        extra, vision = {}, None
        if image:
            ids[1 : 1 + IMAGE_TOKENS.get(kind, 4)] = IMAGE_TOKEN
            extra, vision = _pixels(kind, ids, generator), ids == IMAGE_TOKEN
        items.append(Sample(ids, torch.ones(length, dtype=torch.bool), extra, vision))
    return Samples("random", tuple(items))
