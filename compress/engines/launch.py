"""Runs one engine, in whatever interpreter it is installed for: ``python launch.py ENGINE.py REQUEST.json ANSWER.json [REQUEST ANSWER ...]``.

Stands alone: nothing of ours but the engine's file is imported, by its path, because that interpreter may have none of what we need. Of several
requests each is answered by a fork, so that the engine is imported once and one that dies takes no other with it; what it wrote to stderr is in
``ANSWER.stderr``.

The request holds ``folder``, ``prompts`` (lists of token ids), ``max_tokens`` and ``dtype``. The answer holds ``tokens`` (the greedy continuation of
each prompt, of exactly `max_tokens`, past any end of text), ``prompt_logprobs`` (of each prompt's tokens but the first, given those before it, or
None where the engine gives none), ``first_token_seconds`` (the longest wait for the first token of a prompt, None where it is not told apart),
``seconds`` (all prompts, without loading), ``load_seconds``, ``dtype`` (what the engine computes in), ``version``; or ``error`` with the type and the
message of what the engine raised, and the ``version``. A process that dies leaves no answer: what it wrote to stderr is then all there is. What a
runner returns as ``inputs`` goes to ``ANSWER.npz``: for each text what products with weights were given, float32 [rows, in], under the number of the
text and the names of the tensors that read it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


class Session:
    """One request: what a runner is given, and what it hands back is made of."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.folder: str = request["folder"]
        self.prompts: list[list[int]] = request["prompts"]
        self.max_tokens: int = request["max_tokens"]
        self.dtype: str = request["dtype"]
        self._began = time.perf_counter()
        self._loaded = self._began

    def loaded(self) -> None:
        """To be called when the model is ready."""
        self._loaded = time.perf_counter()

    def answer(self, tokens: list[list[int]], prompt_logprobs: list[list[float]] | None, first: float | None = None) -> dict[str, Any]:
        """What a runner returns; `first` is the longest wait for a first token in seconds."""
        now = time.perf_counter()
        return {
            "tokens": tokens,
            "prompt_logprobs": prompt_logprobs,
            "first_token_seconds": first,
            "seconds": now - self._loaded,
            "load_seconds": self._loaded - self._began,
            "dtype": self.dtype,
        }

    def stepwise(self, begin: Callable[[], Callable[[list[int]], Any]]) -> dict[str, Any]:
        """Greedy decoding and log probabilities by a model that is asked for logits.

        `begin` starts a text and returns a function that reads further tokens and gives their logits as a NumPy array [tokens, vocabulary].
        """
        self.loaded()
        tokens, logprobs, first = [], [], 0.0
        for prompt in self.prompts:
            began = time.perf_counter()
            read = begin()
            logits = read(prompt)
            logprobs.append(logprobs_of(logits, prompt))
            made = [int(logits[-1].argmax())]
            first = max(first, time.perf_counter() - began)
            while len(made) < self.max_tokens:
                made.append(int(read(made[-1:])[-1].argmax()))
            tokens.append(made)
        return self.answer(tokens, logprobs, first)

    def by_torch(self, model: Any) -> dict[str, Any]:
        """`stepwise` with a causal language model of transformers."""
        import torch

        def begin() -> Callable[[list[int]], Any]:
            cache: dict[str, Any] = {"past_key_values": None}

            @torch.no_grad()
            def read(ids: list[int]) -> Any:
                out = model(input_ids=torch.tensor([ids], device=model.device), use_cache=True, **cache)
                cache["past_key_values"] = out.past_key_values
                return out.logits[0].float().cpu().numpy()

            return read

        return self.stepwise(begin)


def logprobs_of(logits: Any, ids: list[int]) -> list[float]:
    """Log probabilities of ``ids[1:]``, each given those before it; logits [tokens, vocabulary] as a NumPy array."""
    import numpy as np

    scores = logits[: len(ids) - 1].astype(np.float64)
    peak = scores.max(-1)
    total = peak + np.log(np.exp(scores - peak[:, None]).sum(-1))
    return [float(score[token] - norm) for score, token, norm in zip(scores, ids[1:], total, strict=True)]


def engine_at(path: Path) -> ModuleType:
    """The engine's file as a module under a name that hides no installed package."""
    spec = importlib.util.spec_from_file_location(f"engine_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def installed_version(packages: tuple[str, ...]) -> str | None:
    """Of the first of `packages` that is installed, None if none is."""
    for name in packages:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def fulfil(engine: ModuleType, request: Path, answer: Path) -> None:
    """Write the answer to one request."""
    found: dict[str, Any]
    try:
        found = engine.run(Session(json.loads(request.read_text(encoding="utf-8"))))
    except Exception as error:  # whatever an engine says is what is asked for
        found = {"error": {"type": type(error).__name__, "message": str(error)}}
    found["version"] = installed_version(engine.PACKAGES)
    if inputs := found.pop("inputs", None):
        import numpy as np

        with answer.with_suffix(".npz").open("wb") as file:
            np.savez(file, **{f"{number} {name}": rows for number, each in enumerate(inputs) for name, rows in each.items()})
    answer.with_suffix(".part").write_text(json.dumps(found), encoding="utf-8")
    answer.with_suffix(".part").rename(answer)


def fork(engine: ModuleType, pairs: list[tuple[Path, Path]]) -> None:
    """Answer each request in a process of its own: a fork that finds `MODULE` imported, or where there is none a new interpreter."""
    if engine.MODULE:
        importlib.import_module(engine.MODULE)
    for request, answer in pairs:
        if not engine.MODULE:
            with answer.with_suffix(".stderr").open("wb") as own:
                subprocess.run([sys.executable, __file__, str(engine.__file__), str(request), str(answer)], stdout=own, stderr=own)
            continue
        if child := os.fork():
            os.waitpid(child, 0)
            continue
        log = os.open(answer.with_suffix(".stderr"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            fulfil(engine, request, answer)
        finally:
            os._exit(0)


def main() -> None:
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [entry for entry in sys.path if str(Path(entry or ".").resolve()) != here]  # where vllm.py would be taken for vLLM
    path, *rest = map(Path, sys.argv[1:])
    engine = engine_at(path)
    if len(rest) > 2:
        fork(engine, list(zip(rest[::2], rest[1::2], strict=True)))
    else:
        fulfil(engine, *rest)


if __name__ == "__main__":
    main()
