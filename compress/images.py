"""Images with what is said about them: what the processor that lies beside a model makes of both.

Which tokens stand for an image is the processor's to say (``mm_token_type_ids``): where they are differs by model, and markers around them are text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from compress.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

KINDS = "mm_token_type_ids"
"""What a processor calls the kind of each token: 0 for text. Models that rotate positions by where in an image they are want to be told too."""
BY_TOKEN = ("attention_mask", KINDS)
"""What a processor gives beside ``input_ids`` that has an entry for each token."""


class Encoded(NamedTuple):
    """``ids`` int64 [tokens]; ``vision`` bool [tokens], the tokens that stand for images, None if the processor does not say; ``extra`` tensors of
    the images; `told` whether the model is to be given the kinds of tokens."""

    ids: Tensor
    vision: Tensor | None
    extra: dict[str, Tensor]
    told: bool


class Processor:
    """The processor beside a model of images and text. Raises `InputError` where there is none."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoProcessor

        self.folder = folder
        try:
            self._processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
            raise InputError.one(str(folder), f"has no usable processor for images ({reason})", "use text data with this model") from error
        if not hasattr(self._processor, "image_processor"):
            raise InputError.one(str(folder), "is a text model; it cannot be given images", "use text data with this model")

    def prompt(self, messages: Sequence[dict[str, Any]], *, asks: bool) -> str:
        """Messages as the chat template of the model writes them; with `asks`, up to where the next answer begins."""
        from jinja2 import TemplateError

        try:
            written = self._processor.apply_chat_template(list(messages), add_generation_prompt=asks)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:  # what a template raises over its messages
            raise InputError.one(str(self.folder), f"its chat template cannot take the messages {messages!r:.200} ({error})") from error
        return str(written)

    def encode(self, text: str, images: Sequence[Image]) -> Encoded:
        """Tokens of a text with images where it has marks for them."""
        try:
            encoded = self._processor(images=list(images), text=text, return_tensors="pt", return_mm_token_type_ids=True)
        except (ValueError, TypeError, LookupError, RuntimeError) as error:
            raise InputError.one(str(self.folder), f"its processor cannot take {len(images)} images with {text!r:.120} ({error})") from error
        kinds = encoded[KINDS][0].bool() if KINDS in encoded else None
        extra = {name: tensor for name, tensor in encoded.items() if name not in ("input_ids", *BY_TOKEN)}
        return Encoded(encoded["input_ids"][0], kinds, extra, KINDS in self._processor.model_input_names)


def opened(path: Path) -> Image:
    """An image from a file, in RGB. Raises `InputError` that names a file that is none."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises the last over a damaged PNG
        raise InputError.one(str(path), f"cannot be read as an image ({error})", "give an image that Pillow reads, or leave its row out") from error


def kinds(vision: Tensor) -> Tensor:
    """[1, tokens] int64, the kinds of tokens as models want them, for images only."""
    return vision.to(torch.int64)[None]
