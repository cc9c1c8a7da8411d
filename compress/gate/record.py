"""What was measured of one model, in memory and as a baseline on disk: a JSON file, and its arrays beside it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from compress.checkpoint import sync_folder, write_text
from compress.errors import InputError, Problems
from compress.gate.integrity import Facts

FORMAT = 1
REMEDY = "make the baseline again with --save-baseline"


@dataclass(frozen=True)
class Record:
    """``protocol``, how it was measured: plain data, by suite; ``data``, by suite the sha256 of the tokens its model was given, which depend on its
    tokenizer; ``arrays`` by suite and name, the measurements; ``norms`` of its linears, if asked for."""

    model: str
    protocol: dict[str, Any]
    facts: Facts
    versions: dict[str, str]
    data: dict[str, str] = field(default_factory=dict)
    arrays: dict[str, dict[str, NDArray[Any]]] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)


def digest(plain: object) -> str:
    """sha256 of plain data."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def arrays_path(path: Path) -> Path:
    """Where the arrays of a baseline lie."""
    return path.with_suffix(".safetensors")


def check_new(path: Path) -> None:
    """Raise `InputError` for a baseline that cannot be written there, or would overwrite something."""
    if path.suffix != ".json":
        raise InputError.one(str(path), "a baseline is a .json file", "choose another --save-baseline")
    for each in (path, arrays_path(path)):
        if each.exists() or not each.parent.is_dir():
            what = "exists already" if each.exists() else "lies in no folder that exists"
            raise InputError.one(str(each), what, "choose another --save-baseline")


def save(record: Record, path: Path) -> None:
    """Write a baseline; the JSON, which names the hash of the arrays, comes last, so that there is never half of one."""
    named = {f"{suite}/{name}": values for suite, arrays in record.arrays.items() for name, values in arrays.items()}
    packed = save_arrays({name: np.ascontiguousarray(values) for name, values in named.items()})
    plain = {key: value for key, value in asdict(record).items() if key != "arrays"}
    plain |= {"format": FORMAT, "protocol_sha256": digest(record.protocol), "arrays_sha256": hashlib.sha256(packed).hexdigest()}
    plain["sha256"] = digest(plain)
    partial = path.with_name(path.name + ".arrays.partial")
    with partial.open("wb") as file:
        file.write(packed)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(arrays_path(path))
    write_text(path, json.dumps(plain, indent=1) + "\n")
    sync_folder(path.parent)


def load(path: Path) -> Record:
    """Read a baseline. Raises `InputError` if it is none, or not as it was written."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        packed = arrays_path(path).read_bytes()
    except OSError as error:
        raise InputError.one(str(error.filename), f"cannot be read ({error.strerror})", REMEDY) from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError.one(str(path), f"is not JSON ({error})", REMEDY) from error
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        found = plain.get("format") if isinstance(plain, dict) else type(plain).__name__
        raise InputError.one(str(path), f"must be a baseline of format {FORMAT}, got {found!r}", REMEDY)
    problems = Problems()
    if plain.get("sha256") != digest({key: value for key, value in plain.items() if key != "sha256"}):
        problems.add(str(path), "is not as it was written: its sha256 differs", REMEDY)
    if plain.get("arrays_sha256") != hashlib.sha256(packed).hexdigest():
        problems.add(str(arrays_path(path)), "is not the file that the baseline was written with: its sha256 differs", REMEDY)
    problems.raise_if_any()
    arrays: dict[str, dict[str, NDArray[Any]]] = {}
    try:
        for name, values in load_arrays(packed).items():
            suite, _, array = name.rpartition("/")
            arrays.setdefault(suite, {})[array] = values
        return Record(plain["model"], plain["protocol"], Facts(**plain["facts"]), plain["versions"], plain["data"], arrays, plain["norms"])
    except (SafetensorError, KeyError, TypeError) as error:  # whole, but not by this program
        raise InputError.one(str(path), f"is no baseline ({type(error).__name__}: {error})", REMEDY) from error


def differences(before: dict[str, Any], now: dict[str, Any], place: str = "") -> list[str]:
    """What differs between two protocols, ``key: this, then that``."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        one, other = before.get(key), now.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += differences(one, other, f"{place}{key}: ")
        elif one != other:
            found.append(f"{place}{key} {repr(one) if key in before else 'was not measured'}, now {repr(other) if key in now else 'not measured'}")
    return found
