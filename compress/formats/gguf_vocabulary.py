"""A tokenizer as a GGUF file holds it: from `tokenizer.json`, as far as llama.cpp cuts text into the same tokens.

llama.cpp knows two kinds of those that models here have. ``gpt2``: bytes, cut before merging by one of the expressions that are compiled in, which
the file names. ``llama``: SentencePiece with bytes for what is in no token; it merges the pair that makes the token of the highest score, so scores
fall in the order in which merges stand. It normalises nothing, so text has to be in the form NFC where a tokenizer would make it so; and of the
second kind it puts a space before every text, where some tokenizers do so only before those that do not begin with one.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import InputError

if TYPE_CHECKING:
    from gguf import GGUFWriter

FILE = "tokenizer.json"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens."""
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
GPT2 = BYTES | {"use_regex": True}


def _cut(expression: str) -> list[dict[str, Any]]:
    return [{"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}, BYTES]


KNOWN = (
    ("gpt-2", [GPT2], False),
    ("smollm", [{"type": "Digits", "individual_digits": True}, GPT2], False),
    ("qwen2", _cut(WORDS % r"\p{N}"), False),
    ("llama-bpe", _cut(WORDS % r"\p{N}{1,3}"), True),
    ("dbrx", _cut(WORDS % r"\p{N}{1,3}"), False),
)
"""What llama.cpp calls a way to cut text, the steps that do the same in `tokenizer.json`, and whether words that are tokens are not merged."""
SPACE = "\u2581"


@dataclass(frozen=True)
class Vocabulary:
    """What a file says of its tokens: ``model`` and ``pre`` are llama.cpp's names; ``scores`` are for ``llama``, ``merges`` for ``gpt2``."""

    folder: Path
    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    prefix: bool | None = None
    """Whether text is begun with a space; None, the model never does."""

    def add(self, writer: GGUFWriter) -> None:
        """Tell ``writer`` of it, of special tokens and of the chat template."""
        from gguf import SpecialVocab

        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.prefix is not None:
            writer.add_add_space_prefix(self.prefix)
        logging.getLogger("gguf").setLevel(logging.ERROR)
        special = SpecialVocab(self.folder, n_vocab=len(self.tokens))
        for which in ("bos", "eos"):  # else some kinds add them unasked
            special.add_special_token.setdefault(which, False)
        special.add_to_gguf(writer, quiet=True)


def read(folder: Path, size: int) -> Vocabulary:
    """The tokenizer in ``folder`` for a model with ``size`` embeddings. Raises `InputError` with the reason if llama.cpp has none like it."""
    path = folder / FILE
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        kind = told["model"].get("type", "BPE")
    except OSError as error:
        raise InputError.one(str(path), f"cannot be read ({error.strerror})", "llama.cpp needs a tokenizer inside the file") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError.one(str(path), f"is no tokenizer ({type(error).__name__} {error})", "fetch it again") from error
    if kind != "BPE":
        raise _refused(f"is of the kind {kind}")
    model, added = told["model"], {each["id"]: each for each in told.get("added_tokens", [])}
    by_id = {number: token for token, number in model["vocab"].items()} | {number: each["content"] for number, each in added.items()}
    if max(by_id) >= size:
        raise _refused(f"has the token {max(by_id)}, but the model has {size} embeddings")
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(size)]
    types = [NORMAL if number in by_id else UNUSED for number in range(size)]
    for number, each in added.items():
        types[number] = CONTROL if each.get("special") else USER_DEFINED
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    odd = {key: model[key] for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)}
    if odd:
        raise _refused(f"sets {', '.join(odd)}")
    if model.get("byte_fallback"):
        return _sentencepiece(folder, told, tokens, types, merges)
    if _steps(told.get("normalizer")) not in ([], [{"type": "NFC"}]):
        raise _refused(f"changes text before it is cut ({_named(told['normalizer'])})")
    steps = _steps(told.get("pre_tokenizer"))
    for name, wanted, ignores in KNOWN:
        if steps == wanted and bool(model.get("ignore_merges")) == ignores:
            return Vocabulary(folder, "gpt2", name, tokens, types, merges=[" ".join(pair) for pair in merges])
    raise _refused(f"cuts text in a way that is not known here ({_named(told.get('pre_tokenizer'))})")


def _sentencepiece(folder: Path, told: dict[str, Any], tokens: list[str], types: list[int], merges: list[list[str]]) -> Vocabulary:
    normal, cut = _steps(told.get("normalizer")), _steps(told.get("pre_tokenizer"))
    spaces = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    prefixed = [{"type": "Prepend", "prepend": SPACE}, *spaces]
    meta = {"type": "Metaspace", "replacement": SPACE, "split": False}
    if not cut and normal in (prefixed, spaces):
        prefix = normal == prefixed
    elif not normal and [{key: value for key, value in step.items() if key != "prepend_scheme"} for step in cut] == [meta]:
        prefix = cut[0].get("prepend_scheme", "always") != "never"
    else:
        raise _refused(f"cuts text in a way that is not known here ({_named(told.get('normalizer'))}, {_named(told.get('pre_tokenizer'))})")
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    for number, token in enumerate(tokens):
        if types[number] == NORMAL and len(token) == 6 and token.startswith("<0x"):
            types[number] = BYTE
    unknown = told["model"].get("unk_token")
    if unknown in tokens:
        types[tokens.index(unknown)] = UNKNOWN
    scores = [-float(ranks.get(token, len(merges))) for token in tokens]
    return Vocabulary(folder, "llama", "default", tokens, types, scores=scores, prefix=prefix)


def _steps(told: Any) -> list[dict[str, Any]]:
    """The steps of a normalizer or of what cuts text, without settings that change no token."""
    if not told:
        return []
    if told.get("type") == "Sequence":
        return [step for each in told.get("normalizers", told.get("pretokenizers", [])) for step in _steps(each)]
    return [{key: value for key, value in told.items() if key != "trim_offsets"}]


def _named(told: Any) -> str:
    return ", ".join(step["type"] for step in _steps(told)) or "none"


def _refused(what: str) -> InputError:
    return InputError.one(FILE, f"{what}; llama.cpp would make other tokens of a text", "export for another engine")
