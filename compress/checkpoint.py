"""A checkpoint on disk: safetensors shards, read without trusting them and without mapping them into memory.

Tensors are read with plain ``readinto`` rather than through a memory map: mapped pages count as resident memory until the
kernel drops them, and a run promises to hold about one block.

Nothing here imports torch until a tensor is asked for, so that a recipe can be checked in the time it takes to read headers.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import InputError, Problems

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
RESIDUALS = "residuals/residuals.safetensors"
BRANCHES = "branches/branches.safetensors"
"""What only this program reads lies in a folder of its own: engines take every safetensors file beside the config for weights."""
BRANCHED = "compress_branches"
"""Key of config.json that says where branches lie: beside weights that are not quantised there is no `quantization_config`."""
PACKED = "packed"
"""Where all weights lie that only this program reads."""
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
TORCH_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I16": "int16", "F16": "float16", "BF16": "bfloat16", "I32": "int32", "U32": "uint32", "F32": "float32", "I64": "int64", "F64": "float64",
}  # fmt: skip
DTYPE_NAMES = {torch_name: name for name, torch_name in TORCH_DTYPES.items()}
FLOATS = ("F16", "BF16", "F32", "F64")
CAST_AT_ONCE = 1 << 20
"""Elements of a tensor that is written in another dtype than it is stored in, held at a time."""
PER_LAYER = "per_layer_config"
"""Where a config of transformers says what differs by block. Its model classes do not read it yet, and fail."""
UNEVEN = "uneven_experts"
"""Where a config says that experts differ in width; what it gives as their width is the largest."""
EXACT_LINEARS = "exact_linears"
"""Where a config names linears of each block, by their local name, that no pass is to take."""
LOW_RANK, MAPPED, OF_WIDTHS = "compress_low_rank", "compress_mapped_routers", "compress_uneven_experts"
LATENT = "compress_latent_cache"
WRAPPED = (LOW_RANK, MAPPED, OF_WIDTHS, LATENT)
"""The `model_type` of a checkpoint in which linears are two, routers have maps, experts differ in width or caches keep latents. Its real config is
inside, under ``original``: engines, which would make up numbers for what they do not find, and leave out what they do not know, with no more than a
warning, know no such type and refuse it."""
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pkl", ".safetensors")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: ``dtype`` is the safetensors name, ``begin``/``end`` are byte offsets in ``file``.

    One that is part of another may have ``strides``, in elements; otherwise its elements lie one after the other.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return DTYPE_BYTES[self.dtype] * math.prod(self.shape)


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of one shard. Raises `InputError` if the file is not exactly as long as its header says."""
    place = path.name
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length_bytes = file.read(8)
            length = struct.unpack("<Q", length_bytes)[0] if len(length_bytes) == 8 else -1
            if not 0 < length <= size - 8:
                raise InputError.one(place, f"not a safetensors file (header of {length} bytes in a file of {size})", "fetch it again")
            header = json.loads(file.read(length))
    except OSError as error:
        raise InputError.one(place, f"cannot be read ({error.strerror})", "fetch it again") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError.one(place, f"its header is not JSON ({error})", "fetch it again") from error
    if not isinstance(header, dict):
        raise InputError.one(place, f"its header is not a mapping, got {type(header).__name__}", "fetch it again")
    metadata = header.pop("__metadata__", {})
    tensors = {}
    start = 8 + length
    expected_end = start
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
                raise ValueError
            count = 1
            for dim in shape:
                count *= dim
            consistent = dtype in DTYPE_BYTES and end - begin == count * DTYPE_BYTES[dtype]
        except (KeyError, TypeError, ValueError):
            consistent = False
        if not consistent:
            raise InputError.one(f"{place}: {name}", f"header entry makes no sense: {entry}", "fetch the file again")
        tensors[name] = TensorInfo(name, dtype, shape, path, start + begin, start + end)
        expected_end = max(expected_end, start + end)
    if expected_end != size:
        what = "truncated" if size < expected_end else "followed by bytes that no tensor owns"
        raise InputError.one(place, f"{what} ({size} bytes, header says {expected_end})", "fetch it again")
    return tensors, metadata


class Checkpoint:
    """A folder of safetensors with its config and everything that belongs to it.

    `tensors` maps names to `TensorInfo`; `extra_files` are to be carried byte for byte; `left_behind` are weight files in other
    formats, which are not. `weights` is where the shards lie. Raises `InputError` with every fault of the folder at once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = self.weights = folder
        problems = Problems()
        if not folder.is_dir():
            raise InputError.one(
                str(folder),
                "is a file, not a folder" if folder.exists() else "no such folder",
                "give a local folder, a hub id or demo:dense, demo:moe, demo:vlm",
            )
        self.wrapped_as: str | None = None
        """Which of `WRAPPED` config.json calls the model."""
        self.config = self._config(problems)
        declared = self.config.get("quantization_config")
        if isinstance(declared, dict) and declared.get("weights") == PACKED:
            self.weights = folder / PACKED
        self.tensors: dict[str, TensorInfo] = {}
        self.unlisted: list[str] = []
        files = self._shards(problems) | self._beside(problems)
        for path, listed in files.items():
            try:
                found, _ = read_header(path)
            except InputError as error:
                problems.absorb(error)
                continue
            for name in sorted(listed - found.keys()):
                problems.add(f"{INDEX}: {name}", f"not in {path.name}, where the index says it is", "fetch both files again")
            self.unlisted += sorted(found.keys() - listed) if listed else []
            self.tensors |= {name: info for name, info in found.items() if not listed or name in listed}
        problems.raise_if_any()
        self.shards = sorted(files)
        self.extra_files, self.left_behind = self._other_files()

    def altered(self, tensors: dict[str, TensorInfo], config: dict[str, Any]) -> Checkpoint:
        """The checkpoint with other tensors, wherever they lie, and another config; all other files stay those of this one."""
        other = copy.copy(self)
        other.tensors, other.config = tensors, config
        return other

    def _config(self, problems: Problems) -> dict[str, Any]:
        path = self.folder / "config.json"
        try:
            plain = json.loads(path.read_text(encoding="utf-8"))
            config = unwrapped(plain)
            if config is not plain:
                self.wrapped_as = plain["model_type"]
            if isinstance(config, dict):  # a null is how some say that nothing is quantised
                return {key: value for key, value in config.items() if key != "quantization_config" or value is not None}
            place = "config.json" if config is plain else "config.json: original"
            problems.add(place, f"must hold a mapping, got {type(config).__name__}", "fetch it again")
        except OSError:
            problems.add(str(self.folder), "has no config.json", "MODEL must be a Hugging Face checkpoint folder")
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            problems.add("config.json", f"is not JSON ({error})", "fetch it again")
        return {}

    def _shards(self, problems: Problems) -> dict[Path, set[str]]:
        """Shard files with the tensors the index lists in each (an empty set: no index, take all)."""
        index = self.weights / INDEX
        if not index.exists():
            single = self.weights / SINGLE
            if single.exists():
                return {single: set()}
            pickles = sorted(p.name for p in self.folder.glob("*.bin"))
            remedy = "pickled weights are never read: convert them to safetensors first" if pickles else "is the download complete?"
            problems.add(str(self.folder), f"holds neither {SINGLE} nor {INDEX}", remedy)
            return {}
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            pairs = [(str(name), str(file)) for name, file in weight_map.items()]
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError, KeyError, AttributeError, TypeError) as error:
            problems.add(INDEX, f"cannot be understood ({type(error).__name__}: {error})", "fetch it again")
            return {}
        shards: dict[Path, set[str]] = {}
        for name, file in pairs:
            shards.setdefault(self.weights / file, set()).add(name)
        for path in list(shards):
            file = str(path.relative_to(self.weights)) if path.is_relative_to(self.weights) else str(path)
            if Path(file).name != file or file in ("..", "."):
                problems.add(INDEX, f"points outside the folder ({file})", "an index may only name files beside it")
                del shards[path]
            elif not path.is_file():
                problems.add(INDEX, f"names {file}, which is missing", "fetch the missing shard")
                del shards[path]
        return shards

    def _beside(self, problems: Problems) -> dict[Path, set[str]]:
        """The files that config.json says hold residuals and branches, if it says so."""
        quantization = self.config.get("quantization_config")
        residuals = quantization.get("residuals") if isinstance(quantization, dict) else None
        files: dict[Path, set[str]] = {}
        for key, declared, path in (("quantization_config.residuals", residuals, RESIDUALS), (BRANCHED, self.config.get(BRANCHED), BRANCHES)):
            if declared == path:
                files[self.folder / path] = set()
            elif declared is not None:
                problems.add(f"config.json: {key}", f"names {declared!r}, where only {path} can be", "fetch it again")
        return files

    def _other_files(self) -> tuple[list[Path], list[str]]:
        extra, left = [], []
        own = {*self.shards, self.weights / INDEX, self.folder / "config.json"}
        for path in sorted(self.folder.rglob("*")):
            relative = path.relative_to(self.folder)
            if not path.is_file() or path in own or any(part.startswith(".") for part in relative.parts):
                continue
            if path.suffix in OTHER_WEIGHTS or path.name.endswith(".index.json"):
                left.append(str(relative))
            else:
                extra.append(relative)
        return extra, left

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str) -> torch.Tensor:
        """One tensor, freshly allocated on the CPU in its stored dtype."""
        return read_tensor(self.tensors[name])

    def verify(self, advance: Callable[[int], None] = lambda nbytes: None) -> dict[str, str]:
        """Read every byte once: sha256 of each shard by file name. `advance` is told of bytes as they are read.

        Raises `InputError` naming every tensor that holds a NaN or an infinity.
        """
        by_file: dict[Path, list[TensorInfo]] = {path: [] for path in self.shards}
        for info in self.tensors.values():
            by_file[info.file].append(info)
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            hashes = dict(zip(by_file, pool.map(lambda path: sha256(path, advance), by_file), strict=True))
            faulty = [name for names in pool.map(_not_finite, by_file.values()) for name in names]
        if faulty:
            problems = Problems()
            for name in faulty:
                problems.add(name, "holds NaN or infinity", "the source checkpoint is damaged; fetch it again")
            problems.raise_if_any()
        return {path.name: digest for path, digest in hashes.items()}


def wrapped(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """config.json for what is one of `WRAPPED`, so that only those open the checkpoint who know what that means."""
    return {"model_type": kind, "original": config}


def unwrapped(config: Any) -> Any:
    """What config.json says of the model: all of it, or what `wrapped` put inside."""
    return config.get("original") if isinstance(config, dict) and config.get("model_type") in WRAPPED else config


def transformers_config(plain: Mapping[str, Any]) -> Any:
    """The config of transformers for a config.json, without what its classes fail over or would act on: widths by block and packed weights."""
    from transformers import CONFIG_MAPPING

    config = {key: value for key, value in unwrapped(plain).items() if key not in (PER_LAYER, UNEVEN, "quantization_config", BRANCHED)}
    for key, value in config.items():
        if isinstance(value, dict):
            config[key] = {inner: copy.deepcopy(what) for inner, what in value.items() if inner not in (PER_LAYER, UNEVEN)}
    return CONFIG_MAPPING[config["model_type"]].from_dict(config)


def _not_finite(infos: list[TensorInfo]) -> list[str]:
    import torch

    def is_finite(info: TensorInfo) -> bool:
        # Both ends are NaN if anything is: twenty times as fast as asking each element.
        return not math.prod(info.shape) or all(bool(end.isfinite()) for end in torch.aminmax(read_tensor(info)))

    return [info.name for info in infos if info.dtype in FLOATS and not is_finite(info)]


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """The tensor at `info`, in memory of its own."""
    import torch

    if info.dtype not in TORCH_DTYPES:
        raise InputError.one(info.name, f"has dtype {info.dtype}, which this program does not read", f"known are {', '.join(TORCH_DTYPES)}")
    shape = info.shape if info.strides is None else ((info.end - info.begin) // DTYPE_BYTES[info.dtype],)
    tensor = torch.empty(shape, dtype=getattr(torch, TORCH_DTYPES[info.dtype]))
    if tensor.numel():
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.begin)
            view = memoryview(tensor.view(-1).view(torch.uint8).numpy().data)
            while view:  # one read returns at most 2 GiB
                count = file.readinto(view)
                if not count:
                    raise InputError.one(info.file.name, "became shorter while it was read", "do not change the model during a run")
                view = view[count:]
    return tensor if info.strides is None else tensor.as_strided(info.shape, info.strides).contiguous()


def sha256(path: Path, advance: Callable[[int], None] = lambda nbytes: None) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


@dataclass(frozen=True)
class Stacked:
    """A tensor of which only one piece along its first dimension is in memory at a time: what each of ``pieces`` makes when it is called."""

    pieces: tuple[Callable[[], torch.Tensor], ...]


@dataclass(frozen=True)
class Entry:
    """One tensor to be written: its bytes come from `source`, one in memory, piece by piece or a stored one, which may be of another float dtype."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: TensorInfo | torch.Tensor | Stacked

    @property
    def nbytes(self) -> int:
        count = DTYPE_BYTES[self.dtype]
        for dim in self.shape:
            count *= dim
        return count


def entry(name: str, source: TensorInfo | torch.Tensor) -> Entry:
    """An `Entry` under a new name for a stored tensor or one in memory."""
    if isinstance(source, TensorInfo):
        return Entry(name, source.dtype, source.shape, source)
    return Entry(name, DTYPE_NAMES[str(source.dtype).removeprefix("torch.")], tuple(source.shape), source)


def read_entry(item: Entry) -> torch.Tensor:
    """The tensor that `item` will be when it is written, on the CPU. Raises `InputError` if it has values its dtype cannot hold."""
    import torch

    tensor = item.source
    if isinstance(tensor, TensorInfo):
        tensor = read_tensor(tensor)
    elif isinstance(tensor, Stacked):
        tensor = torch.stack([make() for make in tensor.pieces])
    wanted = getattr(torch, TORCH_DTYPES[item.dtype])
    if tensor.dtype == wanted:
        return tensor
    cast = tensor.to(wanted)
    if not torch.isfinite(cast).all():
        raise InputError.one(item.name, f"was changed to values that {item.dtype} cannot hold", "leave out the pass that changed it")
    return cast


def write_safetensors(
    path: Path, entries: Iterable[Entry], metadata: Mapping[str, str], before: Callable[[Path], None] = lambda partial: None
) -> None:
    """Write one safetensors file, streaming stored tensors through a small buffer; durable and atomic at `path`. Just before it gets that name
    `before` is given the finished file under another."""
    entries = list(entries)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for item in entries:
        header[item.name] = {"dtype": item.dtype, "shape": list(item.shape), "data_offsets": [offset, offset + item.nbytes]}
        offset += item.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for item in entries:
            for chunk in _chunks(item):
                file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    before(partial)
    partial.replace(path)
    sync_folder(path.parent)


def _chunks(item: Entry) -> Iterator[bytes | memoryview]:
    if isinstance(item.source, Stacked):
        for make in item.source.pieces:
            yield from _chunks(replace(item, source=make()))
    elif isinstance(item.source, TensorInfo) and item.source.strides is not None:
        yield from _chunks(replace(item, source=read_entry(item)))
    elif isinstance(item.source, TensorInfo) and item.source.dtype != item.dtype:
        width, count = DTYPE_BYTES[item.source.dtype], item.source.nbytes // DTYPE_BYTES[item.source.dtype]
        for start in range(0, count, CAST_AT_ONCE):
            end = min(start + CAST_AT_ONCE, count)
            part = replace(item.source, shape=(end - start,), begin=item.source.begin + start * width, end=item.source.begin + end * width)
            yield from _chunks(entry(item.name, read_entry(replace(item, shape=part.shape, source=part))))
    elif isinstance(item.source, TensorInfo):
        with item.source.file.open("rb", buffering=0) as file:
            file.seek(item.source.begin)
            left = item.source.nbytes
            while left:
                chunk = file.read(min(left, 1 << 22))
                if not chunk:
                    raise InputError.one(item.source.file.name, "became shorter while it was read", "do not change the model during a run")
                left -= len(chunk)
                yield chunk
    elif item.source.numel():
        import torch

        yield item.source.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def deliver(staging: Path, place: Path) -> None:
    """Move a finished folder to its place in one step, durably; what was there before is gone only then."""
    for path in staging.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    previous = place.with_name(f".{place.name}.previous")
    if place.exists():
        shutil.rmtree(previous, ignore_errors=True)  # what was killed between the next two lines and the last left
        place.rename(previous)
    staging.rename(place)
    sync_folder(place.parent)
    shutil.rmtree(previous, ignore_errors=True)


def write_text(path: Path, text: str, before: Callable[[Path], None] = lambda partial: None) -> None:
    """Write a small file durably and atomically; `before` is as for `write_safetensors`."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    before(partial)
    partial.replace(path)


def copy_file(source: Path, target: Path) -> None:
    """Copy bytes, making parent folders."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
