"""Tiny trained models and data that ship with the package; README.md tells how they were made."""

from pathlib import Path

MODELS: dict[str, str] = {
    "dense": "Llama, 4.2M parameters, trained on public-domain books",
    "moe": "Qwen3-MoE, 8.1M parameters, 16 experts of which 4 serve a token",
    "vlm": "LLaVA, 5.1M parameters, answers questions about images of coloured shapes",
}

_DATA: dict[str, str] = {
    "text": "text.txt",
    "heldout": "heldout.txt",
    "pairs": "pairs.jsonl",
    "images": "shapes/train",
    "images-heldout": "shapes/heldout",
}

_HERE = Path(__file__).resolve().parent


def path(name: str) -> Path:
    """Return the directory of the demonstration model ``name``."""
    if name not in MODELS:
        raise ValueError(f"no demonstration model {name!r}; there are {', '.join(MODELS)}")
    return _HERE / name


def data_path(name: str) -> Path:
    """Return the file or folder of the demonstration data ``name``."""
    if name not in _DATA:
        raise ValueError(f"no demonstration data {name!r}; there are {', '.join(_DATA)}")
    return _HERE / "data" / _DATA[name]
