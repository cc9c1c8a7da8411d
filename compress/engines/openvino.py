"""OpenVINO: GGUF by the reader of OpenVINO GenAI, folders in 16 bits by Optimum Intel; either makes a model of OpenVINO's own in a temporary folder.

It is asked to compute in float32 with inputs and cache unrounded: left to itself it rounds all of them as the processor likes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.engines.launch import Session
    from compress.layout import Layout
    from compress.scheme import Caching, Scheme

NAME = "openvino"
TITLE = "OpenVINO"
PACKAGES = ("openvino",)
MODULE = "optimum.exporters.openvino.convert"
VERSIONS = {"2026.4": "run"}
READS = ("compressed-tensors", "gguf")
DTYPES = ("float32",)
INSTALL = (
    "torch==2.13.0", "openvino==2026.4.1", "openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "nncf==3.4.0", "compressed-tensors==0.20.0",
    "accelerate",
)  # fmt: skip
REMOVE = ("torchvision", "torchaudio", "torchcodec")
ENVIRONMENT: dict[str, str] = {}
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}
PROVEN = ("llama", "qwen3_moe")
"""Model types of which one was run."""
KINDS = ("llama", "qwen2", "qwen3")
"""Model types that the reader of GGUF knows, of those with exports."""


def verdict(export: str, layout: Layout, plan: dict[str, Scheme], cache: Caching | None, said: dict[str, str]) -> str:
    """Whether and how it reads an export of which others are `said` to make that; see `compress.engines.base.verdicts`."""
    kind = layout.arch.model_type
    if export == "compressed-tensors":
        if said["transformers"].startswith("refuses"):
            return said["transformers"]  # which Optimum Intel reads the folder with
        if plan or cache:
            return "refuses quantised compressed-tensors: Optimum Intel lets them unpack while OpenVINO wants them packed; export gguf"
        return "loads" if kind in PROVEN else f"unproven: a {kind}"
    if kind not in KINDS:
        return f"refuses a {kind} in GGUF: its reader knows {', '.join(KINDS)}"
    if not layout.linears.keys() <= plan.keys():
        return "refuses linears in 16 bits in GGUF: its reader has no bfloat16"
    if any(scheme.format != "int" for scheme in plan.values()):
        return "refuses mxfp4 in GGUF"
    if any(not scheme.symmetric or scheme.bits == 5 for scheme in plan.values()):
        return "refuses Q5_0, which 5 bits and most asymmetric weights become: reads Q4_0, Q4_1, Q8_0, Q4_K and Q6_K"
    return "loads" if kind in PROVEN else f"unproven: a {kind}"


def run(session: Session) -> dict[str, Any]:
    import numpy as np
    import openvino

    folder = Path(session.folder)
    files = [folder] if folder.is_file() else sorted(folder.glob("*.gguf"))
    with tempfile.TemporaryDirectory() as made:
        core = openvino.Core()
        graph = _of_gguf(core, files[0], Path(made)) if files else _of_folder(session.folder)
        compiled = core.compile_model(graph, "CPU", EXACT)

        def begin() -> Callable[[list[int]], Any]:
            state, seen = compiled.create_infer_request(), 0

            def read(ids: list[int]) -> Any:
                nonlocal seen
                seen += len(ids)
                given = {
                    "input_ids": np.array([ids]),
                    "attention_mask": np.ones((1, seen), dtype=np.int64),
                    "position_ids": np.arange(seen - len(ids), seen)[None],
                    "beam_idx": np.zeros(1, dtype=np.int32),
                }
                return state.infer({name: given[name] for name in (each.any_name for each in compiled.inputs)})["logits"][0].copy()

            return read

        return session.stepwise(begin)


def _of_gguf(core: Any, file: Path, made: Path) -> Any:
    """The model that the reader makes of a file, which it writes beside it and gives to nobody otherwise."""
    import openvino_genai

    (made / "model.gguf").symlink_to(file.resolve())
    openvino_genai.LLMPipeline(made / "model.gguf", "CPU", enable_save_ov_model=True)
    return core.read_model(made / "openvino_model.xml")


def _of_folder(folder: str) -> Any:
    from optimum.intel import OVModelForCausalLM

    return OVModelForCausalLM.from_pretrained(
        folder, export=True, compile=False, load_in_8bit=False, local_files_only=True, trust_remote_code=False
    ).model
