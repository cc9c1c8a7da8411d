"""From the names a user gives to local paths: a folder or file, a hub id, or something that ships inside (``demo:...``)."""

from __future__ import annotations

import re
from pathlib import Path

from compress import demo
from compress.errors import InputError

DEMO = "demo:"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.md", "tokenizer*", "LICENSE*", "*.py"]


def demo_model(name: str) -> Path:
    """The folder of a model that ships inside."""
    try:
        return demo.path(name.removeprefix(DEMO))
    except ValueError as error:
        raise InputError.one(name, str(error)) from error


def demo_data(name: str) -> Path:
    """The file or folder of data that ship inside."""
    try:
        return demo.data_path(name.removeprefix(DEMO))
    except ValueError as error:
        raise InputError.one(name, str(error)) from error


def locate_data(name: str) -> Path:
    """Where data lie that ship inside, or that a path names. Raises `InputError` as `local` does."""
    return demo_data(name) if name.startswith(DEMO) else local(name)


def local(name: str) -> Path:
    """`name` as a path, whether or not something is there. Raises `InputError` for what can be none: a name too long, a home that nobody has, or
    folders that may not be looked into."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:
        shown = name if len(name) <= 100 else f"{name[:100]}..."
        raise InputError.one(shown, f"is no path ({getattr(error, 'strerror', None) or error})", "give the path of a file or folder") from error
    return path


def locate_model(name: str) -> Path:
    """The local folder of a model, downloading from the hub if `name` is a hub id and no such folder exists."""
    if name.startswith(DEMO):
        return demo_model(name)
    folder = local(name)
    if folder.exists() or not HUB_ID.fullmatch(name):
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=WANTED))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError.one(
            name, f"is no local folder and could not be fetched from the hub ({reason})", "check the name and the network"
        ) from error
