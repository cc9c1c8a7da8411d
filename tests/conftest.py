"""One thread, no network, passive waiting; tiny random checkpoints that are made once per session."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import recall
import tiny
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from compress import demo, hardware
from compress.data import Tokenizer
from compress.kernels import native

torch.set_num_threads(1)
settings.register_profile(
    "suite", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture], derandomize=True
)
settings.load_profile("suite")


RAN = (
    "on 2026-11-22, with g++ 12.2 on an AMD EPYC, plain and avx2 ran, clean under the sanitizers; neon (qemu-user 7.2) and avx512 (SIMDe 0.7.4) "
    "where they are emulated"
)
"""When kernels were last tested that this machine may not be able to run."""


@pytest.fixture(params=["torch", *native.built()])
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if not native.built().get(request.param, True):
        pytest.skip(f"needs a processor with {request.param}; {RAN}")
    monkeypatch.setenv(native.FORCE, request.param)
    return str(request.param)


@pytest.fixture(autouse=True)
def _same_random_numbers_for_each_test() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folder of a tiny random checkpoint by kind; made once, never to be changed: `copy` is for that."""
    made: dict[str, Path] = {}

    def make(kind: str, dtype: torch.dtype = torch.float32) -> Path:
        key = f"{kind}-{str(dtype).removeprefix('torch.')}"
        if key not in made:
            made[key] = tiny.save(kind, dtype, tmp_path_factory.mktemp(key))
        return made[key]

    return make


@pytest.fixture
def copy(checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint of one's own, to damage."""

    def make(kind: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
        return Path(shutil.copytree(checkpoint(kind, dtype), tmp_path / "model"))

    return make


@pytest.fixture
def edit_config() -> Callable[..., None]:
    """Change keys of a checkpoint's config.json; None removes one."""

    def edit(folder: Path, **changes: object) -> None:
        config = json.loads((folder / "config.json").read_text())
        for key, value in changes.items():
            config.pop(key, None)
            if value is not None:
                config[key] = value
        (folder / "config.json").write_text(json.dumps(config))

    return edit


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(demo.path("dense"))


@pytest.fixture(scope="session")
def retriever(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the model that answers associative recall, float32, with its tokenizer; never to be changed."""
    return recall.save(tmp_path_factory.mktemp("recall"))


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models in bfloat16 compute in float32, as they do where bfloat16 is not native, so that bounds hold on every processor."""
    monkeypatch.setattr(hardware, "bf16_is_native", lambda: False)


@pytest.fixture
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms of transformers that compute in the dtype they are given rather than in float32."""

    def forward(self: Any, hidden: Tensor) -> Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.variance_epsilon)

    for kind, name in (
        ("llama", "Llama"),
        ("mistral", "Mistral"),
        ("mixtral", "Mixtral"),
        ("qwen2", "Qwen2"),
        ("qwen3", "Qwen3"),
        ("qwen3_moe", "Qwen3Moe"),
        ("qwen2_moe", "Qwen2Moe"),
        ("olmoe", "Olmoe"),
        ("deepseek_v3", "DeepseekV3"),
        ("gpt_oss", "GptOss"),
    ):
        module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
        monkeypatch.setattr(getattr(module, f"{name}RMSNorm"), "forward", forward)
