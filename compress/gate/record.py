"""What was measured of one model, in memory and as a baseline on disk: a JSON file, and its arrays beside it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from compress.checkpoint import sync_folder, write_text
from compress.errors import InputError, Problems
from compress.gate.integrity import Facts, filled
from compress.options import Options, parse, read_json

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
    plain |= {"format": 1, "protocol_sha256": digest(record.protocol), "arrays_sha256": hashlib.sha256(packed).hexdigest()}
    plain["sha256"] = digest(plain)
    partial = path.with_name(path.name + ".arrays.partial")
    with partial.open("wb") as file:
        file.write(packed)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(arrays_path(path))
    write_text(path, json.dumps(plain, indent=1) + "\n")
    sync_folder(path.parent)


class _Protocol(Options):
    """What `observe.protocol` gives."""

    version: int
    stored: Literal["float32", "float16", "bfloat16", "float64"]
    dtype: str
    device: str
    norms: bool
    suites: dict[str, dict[str, Any]]


class _Facts(Options):
    """`integrity.Facts`."""

    files: dict[str, str]
    config: dict[str, Any]
    tensors: dict[str, list[int]]


class _Baseline(Options):
    """The JSON file: a `Record` without its arrays."""

    format: Literal[1]
    model: str
    protocol: _Protocol
    facts: _Facts
    versions: dict[str, str]
    data: dict[str, str]
    norms: dict[str, float]
    protocol_sha256: str
    arrays_sha256: str
    sha256: str


def load(path: Path) -> Record:
    """Read a baseline. Raises `InputError` with everything that tells that it is none, or not as it was written."""
    plain = read_json(path, REMEDY)
    if isinstance(plain, dict) and "format" not in plain:
        raise InputError.one(str(path), "is no baseline: it has no key format", REMEDY)
    parse(_Baseline, plain, str(path), "what was measured", _check, remedy=REMEDY)
    assert isinstance(plain, dict)
    beside = arrays_path(path)
    try:
        packed = beside.read_bytes()
    except OSError as error:
        raise InputError.one(str(beside), f"holds the arrays of {path.name}, and cannot be read ({error.strerror})", REMEDY) from error
    if plain["arrays_sha256"] != hashlib.sha256(packed).hexdigest():
        raise InputError.one(str(beside), f"is not the file that {path.name} was written with: its sha256 differs", REMEDY)
    arrays: dict[str, dict[str, NDArray[Any]]] = {}
    try:
        for name, values in load_arrays(packed).items():
            suite, _, array = name.rpartition("/")
            arrays.setdefault(suite, {})[array] = values
    except SafetensorError as error:  # whole, but not by this program
        raise InputError.one(str(beside), f"is not safetensors ({error})", REMEDY) from error
    if not arrays.keys() == plain["data"].keys() == plain["protocol"]["suites"].keys():
        raise InputError.one(str(beside), f"holds arrays of {', '.join(sorted(arrays)) or 'nothing'}, not of what {path.name} names", REMEDY)
    return Record(plain["model"], plain["protocol"], Facts(**plain["facts"]), plain["versions"], plain["data"], arrays, plain["norms"])


def _check(plain: dict[str, Any], place: str, problems: Problems) -> None:
    facts = plain.get("facts")
    if isinstance(facts, dict) and isinstance(facts.get("config"), dict):
        try:
            filled(facts["config"], f"{place}: facts.config", REMEDY)
        except InputError as error:
            problems.absorb(error)
    if plain.get("sha256") != digest({key: value for key, value in plain.items() if key != "sha256"}):
        problems.add(place, "is not as it was written: its sha256 differs", REMEDY)


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
