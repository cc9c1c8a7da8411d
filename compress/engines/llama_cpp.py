"""llama.cpp, through llama-cpp-python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.engines.launch import Session

NAME = "llama.cpp"
TITLE = "llama.cpp"
PACKAGES = ("llama-cpp-python",)
MODULE = "llama_cpp"
VERSIONS = {"0.3": "run"}
READS = ("gguf",)
DTYPES = ("int8",)
"""It computes in float32, with the inputs of quantised weights rounded to 8 bits."""
INSTALL = ("llama-cpp-python==0.3.36",)
REMOVE: tuple[str, ...] = ()
ENVIRONMENT = {"CMAKE_ARGS": "-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON"}


def run(session: Session) -> dict[str, Any]:
    import numpy as np
    from llama_cpp import GGML_TYPE_F32, Llama

    folder = Path(session.folder)
    files = [folder] if folder.is_file() else sorted(folder.glob("*.gguf"))
    path = files[0] if files else folder
    longest = max(map(len, session.prompts)) + session.max_tokens
    model = Llama(
        str(path), n_ctx=longest, logits_all=True, n_gpu_layers=0, use_mmap=False, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32, verbose=False
    )

    def begin() -> Callable[[list[int]], Any]:
        model.reset()

        def read(ids: list[int]) -> Any:
            model.eval(ids)
            return np.array(model.scores[model.n_tokens - len(ids) : model.n_tokens])

        return read

    return session.stepwise(begin)
