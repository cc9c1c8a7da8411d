"""Shapes of the demonstration models, and what the vision-language model learns from."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_data import (
    BOOK_END,
    COLOURS,
    CONTEXT,
    IMAGE_SIZE,
    QUADRANTS,
    SHAPES,
    ask,
    draw_scene,
    load_tokenizer,
)
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

PATCH = 8  # pixels along a patch of the vision tower

# The language models share one shape; every width that a linear layer sees is a multiple of 128, so
# that group sizes up to 128 divide it.
LANGUAGE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def build_text_model(kind: str) -> PreTrainedModel:
    """A fresh dense or mixture-of-experts model."""
    if kind == "dense":
        return LlamaForCausalLM(LlamaConfig(**LANGUAGE))
    config = Qwen3MoeConfig(
        **LANGUAGE,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
        norm_topk_prob=True,
        router_aux_loss_coef=0.0,
    )
    return Qwen3MoeForCausalLM(config)


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% set parts = [{'type': 'text', 'text': message.content}] if message.content is string"
    " else message.content %}"
    "{% for part in parts if part.type == 'image' %}<image>\n{% endfor %}"
    "{{ 'Question:' if message.role == 'user' else 'Answer:' }}"
    "{% for part in parts if part.type == 'text' %} {{ part.text }}{% endfor %}"
    "{{ '\n' if message.role == 'user' else '<|endoftext|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)


def build_vlm() -> LlavaForConditionalGeneration:
    """A CLIP-style tower of 64 patches, a projector and the dense model's language model."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=128,
        attention_dropout=0.0,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**LANGUAGE),
        image_token_index=3,
        image_seq_length=64,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


def build_processor(tokenizer_dir: Path) -> LlavaProcessor:
    """The processor; its tokenizer spells the reserved ``<|image|>`` token as LLaVA does."""
    spec = (tokenizer_dir / "tokenizer.json").read_text().replace("<|image|>", "<image>")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.json").write_text(spec)
        # Answers are generated for several questions at once, so the padding goes in front.
        tokenizer = load_tokenizer(Path(folder), padding_side="left")
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessorPil(size=side, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def scene_batch(rng: np.random.Generator, tokenizer: PreTrainedTokenizerFast, batch: int, turns: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels, token ids and labels of fresh scenes, several questions about each."""
    pixels, rows = [], []
    for _ in range(batch):
        image, things = draw_scene(rng)
        pixels.append(to_pixels(image))
        ids = tokenizer.encode("<image>" * 64 + "\n")
        labels = [-100] * len(ids)
        for question, answer in ask(rng, things)[:turns]:
            prompt = tokenizer.encode(f"Question: {question}\nAnswer:")
            reply = tokenizer.encode(f" {answer}{BOOK_END}")
            newline = tokenizer.encode("\n")
            ids += prompt + reply + newline
            labels += [-100] * len(prompt) + reply + [-100] * len(newline)
        rows.append((ids, labels))
    width = max(len(ids) for ids, _ in rows)
    padded_ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    padded_labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows])
    return torch.from_numpy(np.stack(pixels)), padded_ids, padded_labels


def scene_loss(model: LlavaForConditionalGeneration, pixels: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    """Loss of the answers; the vocabulary projection is spared everywhere else."""
    hidden = model.model(input_ids=ids, pixel_values=pixels).last_hidden_state[:, :-1]
    scored = labels[:, 1:] != -100
    logits = model.lm_head(hidden[scored]).float()
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:][scored])


def to_pixels(image: Image.Image) -> np.ndarray:
    """What the image processor makes of an image: channels first, from -1 to 1."""
    return np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1


def tower_batch(rng: np.random.Generator, batch: int) -> tuple[Tensor, Tensor]:
    """Pixels, and for every patch the quadrant it lies in and the colour and shape there.

    Labels have the shape (batch, patches, 3); an empty quadrant has a colour and a shape of its
    own.
    """
    side = IMAGE_SIZE // PATCH
    rows, columns = np.divmod(np.arange(side * side), side)
    quadrant = 2 * (rows >= side // 2) + (columns >= side // 2)
    colours = list(COLOURS)
    pixels, labels = [], []
    for _ in range(batch):
        image, things = draw_scene(rng)
        pixels.append(to_pixels(image))
        there = np.tile([len(COLOURS), len(SHAPES)], (4, 1))
        for thing in things:
            place = QUADRANTS.index(thing.quadrant)
            there[place] = colours.index(thing.colour), SHAPES.index(thing.shape)
        labels.append(np.concatenate([quadrant[:, None], there[quadrant]], axis=1))
    return torch.from_numpy(np.stack(pixels)), torch.from_numpy(np.stack(labels))


class TowerTeacher(torch.nn.Module):
    """The vision tower under one linear head that reads a patch's quadrant, colour and shape."""

    def __init__(self, tower: torch.nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self.sizes = [len(QUADRANTS), len(COLOURS) + 1, len(SHAPES) + 1]
        self.lm_head = torch.nn.Linear(128, sum(self.sizes))

    def forward(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of the three readings over all patches."""
        hidden = self.tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        parts = self.lm_head(hidden).float().split(self.sizes, dim=-1)
        losses = [torch.nn.functional.cross_entropy(part.flatten(0, 1), labels[..., i].flatten()) for i, part in enumerate(parts)]
        return torch.stack(losses).mean()
