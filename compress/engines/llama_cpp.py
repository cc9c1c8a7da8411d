"""llama.cpp, through llama-cpp-python."""

from __future__ import annotations

import ctypes
import math
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


FLOAT32 = 0
"""`GGML_TYPE_F32`."""


class _Tensor(ctypes.Structure):
    """`ggml_tensor`, which has no functions for all that is read here."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("sizes", ctypes.c_int64 * 4),
        ("strides", ctypes.c_size_t * 4),
        ("operation", ctypes.c_int),
        ("options", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("sources", ctypes.c_void_p * 10),
        ("view_of", ctypes.c_void_p),
        ("view_offset", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )


class Watch:
    """Keeps what every product with a weight is given, while a text is read, in the order in which it is read.

    ``rows`` are float32 [rows, in] by the name of the weight in the file; where several weights read the same, by that of the first, which `same`
    tells of the others. ``known`` is false once a tensor lay in memory otherwise than `_Tensor` says.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.ggml_get_name.restype, library.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
        library.ggml_get_data.restype, library.ggml_get_data.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        self.known = True
        self.rows: dict[str, list[Any]] = {}
        self.same: dict[str, str] = {}
        self.pieces: set[str] = set()
        self._firsts: dict[int, str] = {}

    def __call__(self, address: int, asked: bool, _: object) -> bool:
        """For each node of the graph: whether it is wanted, before it is computed; then the same again, after it."""
        import numpy as np

        node = _Tensor.from_address(address)
        if not (self.known and node.name == self._library.ggml_get_name(address) and node.data == self._library.ggml_get_data(address)):
            self.known = False  # nobody would see an exception here
            return not asked
        if not (node.sources[0] and node.sources[1]):
            return not asked
        weight, given = _Tensor.from_address(node.sources[0]), _Tensor.from_address(node.sources[1])
        name = weight.name.decode()
        if not name.endswith(".weight") or given.type != FLOAT32:
            return not asked
        if name not in self.same:
            self.same[name] = self._firsts.setdefault(node.sources[1], name)
        if self.same[name] != name:
            return not asked
        if not asked:
            if any(stride != 4 * math.prod(given.sizes[:place]) for place, stride in enumerate(given.strides)):
                self.pieces.add(name)
                return True
            flat = np.ctypeslib.as_array((ctypes.c_float * math.prod(given.sizes)).from_address(given.data))
            self.rows.setdefault(name, []).append(flat.reshape(-1, given.sizes[0]).copy())
        return True

    def told(self) -> dict[str, Any]:
        """Float32 [rows, in] by the names of the weights that read them, spaces between."""
        import numpy as np

        return {" ".join(name for name, same in self.same.items() if same == first): np.concatenate(rows) for first, rows in self.rows.items()}


def run(session: Session) -> dict[str, Any]:
    """What products with weights were given is told, too: it takes that to tell a rounding apart from an error, see `compress.emulation`."""
    import numpy as np
    from llama_cpp import GGML_TYPE_F32, Llama, llama_cpp
    from llama_cpp._ggml import libggml

    folder = Path(session.folder)
    files = [folder] if folder.is_file() else sorted(folder.glob("*.gguf"))
    path = files[0] if files else folder
    longest = max(map(len, session.prompts)) + session.max_tokens
    watches: list[Watch] = []
    callback = llama_cpp.ggml_backend_sched_eval_callback(lambda *node: watches[-1](*node) if watches else False)
    default = llama_cpp.llama_context_default_params

    def watched() -> Any:
        settings = default()
        settings.cb_eval = callback
        return settings

    llama_cpp.llama_context_default_params = watched  # `Llama` has no argument for it
    model = Llama(
        str(path), n_ctx=longest, logits_all=True, n_gpu_layers=0, use_mmap=False, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32, verbose=False
    )

    def begin() -> Callable[[list[int]], Any]:
        model.reset()
        watches.append(Watch(libggml))

        def read(ids: list[int]) -> Any:
            model.eval(ids)
            if not watches[-1].known:
                raise ValueError("keeps tensors in another way than the versions that are known, so what its products were given cannot be read")
            if watches[-1].pieces:
                raise ValueError(f"inputs do not lie in a row: {', '.join(watches[-1].pieces)}")
            return np.array(model.scores[model.n_tokens - len(ids) : model.n_tokens])

        return read

    answer = session.stepwise(begin)
    inputs = [watch.told() for watch in watches]
    return answer | {"inputs": inputs}
