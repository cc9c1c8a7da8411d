"""mlx-lm, which runs on CPUs too (`mlx[cpu]`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.engines.launch import Session

NAME = "mlx"
TITLE = "MLX"
PACKAGES = ("mlx-lm",)
MODULE = "mlx_lm"
VERSIONS = {"0.32": "run"}
READS = ("mlx",)
DTYPES = ("float32",)
INSTALL = ("mlx[cpu]==0.32.4", "mlx-lm==0.32.2")
REMOVE: tuple[str, ...] = ()
ENVIRONMENT: dict[str, str] = {}


def run(session: Session) -> dict[str, Any]:
    import mlx.core as mx
    import numpy as np
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, _ = load_model(Path(session.folder))
    model.set_dtype(getattr(mx, session.dtype))

    def begin() -> Callable[[list[int]], Any]:
        cache = make_prompt_cache(model)
        return lambda ids: np.array(model(mx.array([ids]), cache=cache)[0].astype(mx.float32))

    return session.stepwise(begin)
