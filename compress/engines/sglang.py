"""SGLang, which has no build for CPUs that is published: its rules were read off its loaders, and it is not run."""

from __future__ import annotations

NAME = "sglang"
TITLE = "SGLang"
PACKAGES = ("sglang",)
VERSIONS = {"0.5.23": "read"}
READS = ("compressed-tensors", "mxfp4", "gptq", "awq")
