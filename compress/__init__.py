"""compress: a compiler for LLM and VLM checkpoints."""

__version__ = "0.1.0"
