"""ONNX Runtime GenAI: what its own model builder makes of a folder, in a temporary one.

Left to itself the builder rounds the embedding and the output layer to 4 bits too, which an export leaves in 16, and has inputs of linears rounded to
8 bits while it computes. `FAITHFUL` keeps it from either: every weight in its file is then bit for bit that of the export.
"""

from __future__ import annotations

import json
import runpy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.engines.launch import Session
    from compress.layout import Layout
    from compress.scheme import Caching, Scheme

NAME = "onnxruntime-genai"
TITLE = "ONNX Runtime GenAI"
PACKAGES = ("onnxruntime-genai",)
MODULE = "onnxruntime_genai.models.builder"
VERSIONS = {"0.18": "run"}
READS = ("compressed-tensors", "gptq", "awq")
DTYPES = ("float32",)
INSTALL = ("torch==2.13.0", "onnxruntime-genai==0.18.0", "onnxruntime==1.32.0", "transformers==5.23.0", "onnx==1.23.2", "onnx-ir==1.1.0", "requests")
REMOVE: tuple[str, ...] = ()
ENVIRONMENT: dict[str, str] = {}
FAITHFUL = ("accuracy_level=1", "nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather")
"""Inputs in float32 instead of int8, and two nodes that are not to be rounded."""
KINDS = ("llama", "mistral", "qwen2", "qwen3")
"""Model types that its builder knows, of those with exports."""


def verdict(export: str, layout: Layout, plan: dict[str, Scheme], cache: Caching | None, said: dict[str, str]) -> str:
    """Whether and how it reads an export of which others are `said` to make that; see `compress.engines.base.verdicts`."""
    kind = layout.arch.model_type
    known = "loads" if kind == "llama" else f"unproven: a {kind}"
    if export == "compressed-tensors" and said["transformers"].startswith("refuses"):
        return said["transformers"]  # which the builder reads the folder with
    if kind not in KINDS:
        return f"refuses a {kind}: its builder does not know it"
    if export == "compressed-tensors":
        return "refuses quantised compressed-tensors: takes them for ModelOpt's, which it reads on CUDA alone" if plan or cache else known
    if not layout.linears.keys() <= plan.keys():
        return f"refuses {export.upper()} that leaves linears in 16 bits"
    if said["transformers"].startswith("refuses linears of different"):
        return said["transformers"]  # the builder looks in `dynamic` for the names of tensors, where GPTQModel writes those of linears
    sizes = {min(scheme.group_size, layout.linears[name].columns) for name, scheme in plan.items()}
    if any(size < 16 or size & size - 1 for size in sizes):
        return f"refuses groups of {', '.join(map(str, sorted(sizes)))}: only powers of two from 16"
    if any(scheme.bits == 3 for scheme in plan.values()):
        return "refuses 3-bit GPTQ: only 2, 4 and 8"
    if export == "gptq" and any(not scheme.symmetric for scheme in plan.values()):
        return "refuses asymmetric GPTQ: takes its zero points for those of version 1, one less (seen with 0.18.0)"
    return known


def run(session: Session) -> dict[str, Any]:
    import numpy as np
    import onnxruntime_genai as og

    quantised = "quantization_config" in json.loads(Path(session.folder, "config.json").read_text(encoding="utf-8"))
    options = ("-p", "int4", "--extra_options", *FAITHFUL) if quantised else ("-p", "fp32")
    longest = max(map(len, session.prompts)) + session.max_tokens
    with tempfile.TemporaryDirectory() as made:
        sys.argv = [MODULE, "-i", session.folder, "-o", made, "-c", made, "-e", "cpu", *options]
        runpy.run_module(MODULE, run_name="__main__")
        model = og.Model(made)

        def begin() -> Callable[[list[int]], Any]:
            parameters = og.GeneratorParams(model)
            parameters.set_search_options(max_length=longest, do_sample=False)
            generator = og.Generator(model, parameters)

            def read(ids: list[int]) -> Any:
                generator.append_tokens(np.array([ids], dtype=np.int32))
                return np.array(generator.get_output("logits"))[0]

            return read

        return session.stepwise(begin)
