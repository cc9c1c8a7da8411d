"""What must not differ, whatever the figures say: files of the tokenizer, settings, shapes, hashes, and weights that are numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from compress import manifest
from compress.checkpoint import Checkpoint, sha256, transformers_config
from compress.errors import InputError
from compress.formats.base import BESIDE_PARTS, PARTS
from compress.layout import Layout
from compress.model import CONFIG_ERRORS, Model

FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken", "chat_template*",
    "additional_chat_templates/*", "*processor_config.json", "generation_config.json",
)  # fmt: skip
"""Files beside the weights that decide what a model is given and how it goes on."""
UNTOLD = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "quantization_config", "use_cache")
"""Keys of a config that compressing changes, or that change nothing of what is computed."""


@dataclass(frozen=True)
class Exact:
    """One exact check: ``what`` is wrong, item by item, of those that are not ``allowed`` by name."""

    name: str
    what: tuple[str, ...]
    allowed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """What is known of a checkpoint without running it: ``files`` by name to sha256, its ``config`` as it stands in config.json, and ``tensors`` by
    name (those of a linear are one, by its name) to their shape."""

    files: dict[str, str]
    config: dict[str, Any]
    tensors: dict[str, list[int]]


def facts(layout: Layout) -> Facts:
    """Those of a checkpoint, from its headers and small files."""
    checkpoint = layout.checkpoint
    named = [str(path) for path in checkpoint.extra_files if any(fnmatchcase(str(path), pattern) for pattern in FILES)]
    tensors = {name: [linear.rows, linear.columns] for name, linear in layout.linears.items()}
    parts = {"weight", *PARTS, *BESIDE_PARTS}
    for name, info in checkpoint.tensors.items():
        owner, _, part = name.rpartition(".")
        if owner not in tensors or part not in parts:
            tensors[name] = list(info.shape)
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    return Facts({name: sha256(checkpoint.folder / name) for name in named}, config, tensors)


def compared(base: Facts, found: Facts, allow: tuple[str, ...]) -> list[Exact]:
    """The checks of `found` beside `base`."""
    changed = _differing(base.files, found.files)
    ours, theirs = (dict(_flat(filled(each.config, "config.json", "fetch it again"))) for each in (found, base))
    config = {f"config.{key}": f"{what}: {theirs.get(key)!r} -> {ours.get(key)!r}" for key, what in _differing(theirs, ours).items()}
    # Scales of a cache, branches and the like are added; nothing may be gone or of another shape.
    tensors = {
        f"tensor {name}": f"{what}: {base.tensors[name]} -> {found.tensors.get(name)}"
        for name, what in _differing(base.tensors, found.tensors).items()
        if name in base.tensors
    }
    return [_judged(name, items, allow) for name, items in (("files", changed), ("config", config), ("tensors", tensors))]


def filled(plain: dict[str, Any], place: str, remedy: str) -> dict[str, Any]:
    """A config with every default of transformers filled in, so that a file that another version wrote says the same.

    Raises `InputError` at `place` if transformers makes nothing of it.
    """
    try:
        found: dict[str, Any] = json.loads(json.dumps(transformers_config(plain).to_dict(), default=str))
    except CONFIG_ERRORS as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())[:300]
        raise InputError.one(place, f"transformers makes no config of it ({reason})", remedy) from error
    return found


def whole(folder: Path, allow: tuple[str, ...]) -> Exact | None:
    """Whether the files of an artifact of ours are those that its manifest was written for; None if it has no manifest."""
    told = manifest.read(folder)
    return _judged("manifest", {f"manifest {name}": what for name, what in told.differing(folder).items()}, allow) if told else None


def finite(checkpoint: Checkpoint) -> Exact:
    """Whether every weight is a number."""
    try:
        checkpoint.verify()
    except InputError as error:
        return Exact("finite", tuple(f"{problem.place}: {problem.what}" for problem in error.problems))
    return Exact("finite", ())


def norms(layout: Layout) -> dict[str, float]:
    """The Frobenius norm of each linear's dense weight, by name."""
    model = Model(layout)
    return {name: float(torch.linalg.vector_norm(model.dense(name), dtype=torch.float64)) for name in layout.linears}


def gains(base: dict[str, float], found: dict[str, float], most: float, allow: tuple[str, ...]) -> Exact:
    """Which linears are not as large as they were, give or take a share of `most`."""
    wrong = {}
    for name in sorted(base.keys() & found.keys()):
        gain = found[name] / base[name] if base[name] else 1.0 + found[name]
        if not abs(gain - 1) <= most:
            wrong[f"tensor {name}"] = f"is {gain:.4f} times as large as the baseline's"
    return _judged("weights", wrong, allow)


def _judged(name: str, items: dict[str, str], allow: tuple[str, ...]) -> Exact:
    allowed = {item for item in items if any(fnmatchcase(item, pattern) for pattern in allow)}
    return Exact(name, tuple(f"{item} {what}" for item, what in items.items() if item not in allowed), tuple(sorted(allowed)))


def _differing(before: dict[str, Any], after: dict[str, Any]) -> dict[str, str]:
    found = {name: "is missing" for name in before if name not in after}
    found |= {name: "is new" if name not in before else "differs" for name in after if name not in before or before[name] != after[name]}
    return dict(sorted(found.items()))


def _flat(plain: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in plain.items():
        if key in UNTOLD:
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value
