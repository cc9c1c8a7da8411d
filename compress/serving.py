"""Serve an artifact with a real engine, and compare what it answers, token by token, with what the artifact means.

The reference is `compress.load` in float32 without kernels, of a GGUF file with inputs rounded as llama.cpp rounds them (`compress.emulation`). It
reads each prompt together with what the engine made of it, so that every token is judged given the same ones before it: how much less likely the
reference finds it than its own choice, in nats, is its margin. An engine that rounds otherwise picks the other of two near ties, at a margin of
almost nothing; a wrong weight shows at once.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress import manifest
from compress.checkpoint import Checkpoint, sha256
from compress.engines.base import Engine, find_all
from compress.errors import InputError, Problems
from compress.formats.base import LEFT_OUT
from compress.layout import Layout

HERE = Path(__file__).resolve().parent
GUARD, LAUNCH = HERE / "engines" / "guard.py", HERE / "engines" / "launch.py"
PROMPTS = (
    "The old man said that he had never seen such a thing in all his life,",
    "It was a cold morning in the middle of winter, and the road",
    "There are three reasons for this. The first is",
    '"Where have you been?" she asked.',
)
"""What is asked where the user has no questions of his own."""
TOLERANCE = {"float32": 0.05, "float16": 0.1, "bfloat16": 0.4, "int8": 0.01}
"""In nats, by what the engine computes in: of log probabilities of prompts, and of margins.
Above what engines that agree were seen to differ by, see docs/engines.md."""
EXPORT = "export.json"
"""What `compress.exporting` leaves beside the weights."""
PATIENCE = 15.0
"""Seconds that an engine has to end when it is told to."""
TAIL = 2000
"""Characters of the last words of an engine that died that are kept."""
TOLD = 600
"""Characters of a refusal that are passed on to the user."""


@dataclass(frozen=True)
class Wish:
    """What is to be tried; ``prompts`` are token ids, ``timeout`` is in seconds."""

    folder: Path
    engine: Engine
    python: Path
    prompts: list[list[int]]
    tokens: int
    dtype: str
    reference: Path
    timeout: float


def wish(
    folder: Path, engine: str, python: Path | None, prompts: Path | None, tokens: int, dtype: str | None, reference: Path | None, timeout: float
) -> Wish:
    """What the command line says, checked. Raises `InputError` with everything wrong in it."""
    problems = Problems()
    found = next(iter(find_all([engine], problems)), None)
    if found and not found.runs:
        problems.add(
            "--engine", f"{found.name} is known, but no way to run it here", "its verdict: compress check RECIPE MODEL --engine " + found.name
        )
    if found and found.runs and dtype is not None and dtype not in found.table.DTYPES:
        problems.add("--dtype", f"{found.name} is not run in {dtype}", f"take {' or '.join(found.table.DTYPES)}")
    if python is not None and not (python.is_file() and os.access(python, os.X_OK)):
        problems.add("--python", f"{python} is no interpreter", "give the path of one, such as VENV/bin/python")
    if not folder.is_dir():
        problems.add(str(folder), "is no folder", "give an artifact, or what compress export made of one")
    meant, asked = reference or folder, []
    if (folder / EXPORT).is_file():
        _check_origin(folder, reference, problems)
    for each in dict.fromkeys((folder, meant)):  # a damaged artifact agrees with itself
        manifest.check(each, problems)
    if (meant / "config.json").is_file() and not (meant / EXPORT).is_file():
        try:
            asked = ask_for(meant, prompts, tokens)
        except InputError as error:
            problems.absorb(error)
    elif meant.is_dir() and not (meant / EXPORT).is_file():
        problems.add(str(meant), "holds no config.json", "give an artifact")
    problems.raise_if_any()
    assert found
    return Wish(folder, found, python or Path(sys.executable), asked, tokens, dtype or found.table.DTYPES[0], meant, timeout)


def _check_origin(folder: Path, reference: Path | None, problems: Problems) -> None:
    """Report an export without the artifact that it was made of."""
    if reference is None:
        problems.add(str(folder), "is an export, which compress itself does not run", "name the artifact it was made of with --reference")
        return
    made_of = json.loads((folder / EXPORT).read_text(encoding="utf-8"))["of"]
    other = [name for name, digest in made_of.items() if not (reference / name).is_file() or sha256(reference / name) != digest]
    if other:
        problems.add("--reference", f"{folder} was made of an artifact with another {other[0]}", "name the one it was made of, or export it again")


def ask_for(folder: Path, file: Path | None, tokens: int) -> list[list[int]]:
    """Token ids of the lines of `file`, or of `PROMPTS`; with `tokens` new ones each must fit into the model. Raises `InputError`."""
    lines: list[str] | tuple[str, ...] = PROMPTS
    if file is not None:
        try:
            lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError.one(str(file), f"cannot be read ({error})", "give a text file in UTF-8 with a prompt per line") from error
        if not lines:
            raise InputError.one(str(file), "has no prompt", "write one per line")
    from compress.data import Tokenizer

    longest = Layout(Checkpoint(folder)).text_config.get("max_position_embeddings")
    tokenizer, found, problems = Tokenizer(folder), [], Problems()
    for number, line in enumerate(lines, 1):
        ids = tokenizer.encode(line)
        if isinstance(longest, int) and len(ids) + tokens > longest:
            what = f"has {len(ids)} tokens, with {tokens} new ones more than the {longest} that the model takes"
            problems.add(f"{file or 'prompts'}:{number}", what, "shorten it, or ask for fewer --tokens")
        if len(ids) < 2:
            problems.add(f"{file or 'prompts'}:{number}", f"{line!r} is no more than a token", "write a few words: the first is not compared")
        found.append(ids)
    problems.raise_if_any()
    return found


def check(wanted: Wish) -> dict[str, Any]:
    """Start the engine, ask it for greedy tokens after each prompt, and compare with the reference.

    It is its server where it has one, else the engine itself in a process of its interpreter; whatever happens, nothing of it is left. Raises
    `InputError` where it does not run the folder, with its own words.
    """
    engine = wanted.engine
    request = {"folder": str(wanted.folder.resolve()), "prompts": wanted.prompts, "max_tokens": wanted.tokens, "dtype": wanted.dtype}
    how = "server" if hasattr(engine.table, "serve") else "process"
    answer = (_by_server if how == "server" else _by_process)(engine, wanted.python, request, wanted.timeout)
    if error := answer.get("error"):
        message = " ".join(error["message"].split())
        said = f"{answer['version'] or engine.title} does not run it: {error['type']}: {message[:TOLD]}{'...' * (len(message) > TOLD)}"
        raise InputError.one(str(wanted.folder), said, f"compress check RECIPE MODEL --engine {engine.name} tells what is known of it")
    found: dict[str, Any] = {"folder": str(wanted.folder), "reference": str(wanted.reference), "engine": engine.name, "how": how}
    found |= {"left_out": left_out(wanted.reference, engine)}
    model = meant(wanted.reference, wanted.folder, engine)
    return found | compare(model, wanted.prompts, answer, rounded=is_rounded(wanted.folder))


def is_rounded(folder: Path) -> bool:
    """Whether a folder is an export that could not hold every weight as it was, which its own record tells."""
    return (folder / EXPORT).is_file() and bool(json.loads((folder / EXPORT).read_text(encoding="utf-8"))["losses"])


def left_out(artifact: Path, engine: Engine) -> list[str]:
    """What lies beside the weights of an artifact and an engine does not look for, by the names of `LEFT_OUT`."""
    if getattr(engine.table, "BESIDE", False):
        return []
    names = Checkpoint(artifact).tensors
    return [what for what, parts in LEFT_OUT.items() if any(name.endswith(parts) for name in names)]


def meant(artifact: Path, served: Path, engine: Engine) -> Any:
    """The model that answers are compared with where an engine serves ``served``, which is the artifact or was made of it."""
    from compress import emulation, runtime

    if files := sorted(served.glob("*.gguf")):
        return emulation.Emulated(artifact, files[0])
    rounds = getattr(engine.table, "ROUNDS", False) and not (served / EXPORT).is_file()
    return runtime.reference(artifact, beside=not left_out(artifact, engine), as_transformers=rounds)


def compare(model: Any, asked: list[list[int]], answer: dict[str, Any], *, rounded: bool = False) -> dict[str, Any]:
    """An engine's answer beside what `model` makes of it, which `meant` gave, and whether they agree within `TOLERANCE`.

    What was `rounded` again as it was exported is held to no more than an engine that computes in float16. Where the engine told of inputs of
    products, `compress.emulation.Counts` of them are told.
    """
    import torch

    told = answer["prompt_logprobs"] or [None] * len(asked)
    inputs = [(rows,) for rows in answer["inputs"]] if "inputs" in answer else [()] * len(asked)
    each: list[dict[str, Any]] = []
    for prompt, made, logprobs, given in zip(asked, answer["tokens"], told, inputs, strict=True):
        with torch.no_grad():
            scores = model(torch.tensor([(prompt + made)[:-1]], device=model.device), *given).logits[0].float().log_softmax(-1)
        likely = scores[len(prompt) - 1 :]
        margins = likely.amax(-1) - likely[torch.arange(len(made)), made]
        choice = likely.argmax(-1).tolist()
        other = [
            {"position": place, "engine": token, "reference": meant, "margin": float(margins[place])}
            for place, (token, meant) in enumerate(zip(made, choice, strict=True))
            if token != meant
        ]
        off = None
        if logprobs is not None:
            meant_here = scores[torch.arange(len(prompt) - 1), prompt[1:]]
            off = float((torch.tensor(logprobs) - meant_here).abs().max())
        each.append({"prompt_tokens": len(prompt), "tokens": len(made), "other": other, "prompt_logprob_difference": off})
    count = sum(item["tokens"] for item in each)
    differences = [item["prompt_logprob_difference"] for item in each if item["prompt_logprob_difference"] is not None]
    margin = max((token["margin"] for item in each for token in item["other"]), default=0.0)
    tolerance = max(TOLERANCE[answer["dtype"]], TOLERANCE["float16"] * rounded)
    # A comparison with NaN is false, so that one does not agree.
    agrees = all(value <= tolerance for value in (*differences, margin)) and all(item["tokens"] == len(answer["tokens"][0]) for item in each)
    return {
        "agrees": agrees,
        "tolerance": tolerance,
        "tokens": count,
        "tokens_equal": count - sum(len(item["other"]) for item in each),
        "largest_margin": margin,
        "prompt_logprob_difference": max(differences, default=None),
        "prompts": each,
        "version": answer["version"],
        "dtype": answer["dtype"],
        "tokens_per_second": count / answer["seconds"],
        "first_token_seconds": answer["first_token_seconds"],
        "load_seconds": answer["load_seconds"],
    } | ({"inputs": model.counted()} if "inputs" in answer else {})


def ask_all(engine: Engine, python: Path, requests: list[dict[str, Any]], timeout: float) -> list[dict[str, Any]]:
    """The answers to several requests, each by a fork of one process; see `compress.engines.launch`. Those that die or are late say so."""
    with tempfile.TemporaryDirectory(prefix="compress-engine-") as where:
        pairs = [(Path(where, f"{number}.request"), Path(where, f"{number}.answer")) for number in range(len(requests))]
        for (request, _), content in zip(pairs, requests, strict=True):
            request.write_text(json.dumps(content), encoding="utf-8")
        command = [str(python), str(LAUNCH), str(engine.file), *(str(path) for pair in pairs for path in pair)]
        log = Path(where, "log")
        with _started(command, engine, python, log) as process:
            late = False
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                late = True
        answers = []
        for _, answer in pairs:
            if answer.exists():
                found = json.loads(answer.read_text(encoding="utf-8"))
                answers.append(found | _inputs(answer.with_suffix(".npz"), len(found.get("tokens", ()))))
                continue
            own = answer.with_suffix(".stderr")
            words = (own if own.exists() else log).read_text(encoding="utf-8", errors="replace")[-TAIL:].strip()
            kind = f"no answer within {timeout:g} seconds" if late else f"died, exit code {code}"
            answers.append({"error": {"type": kind, "message": words or "without a word"}, "version": None})
        return answers


def _inputs(file: Path, texts: int) -> dict[str, Any]:
    """What an engine told of the inputs of products, by the name of the tensor, for each text; nothing where it told nothing."""
    if not file.exists():
        return {}
    import numpy as np
    import torch

    found: list[dict[str, Any]] = [{} for _ in range(texts)]
    with np.load(file) as stored:
        for key in stored:
            number, *names = key.split()
            found[int(number)] |= dict.fromkeys(names, torch.from_numpy(stored[key]))
    return {"inputs": found}


def _by_process(engine: Engine, python: Path, request: dict[str, Any], timeout: float) -> dict[str, Any]:
    return ask_all(engine, python, [request], timeout)[0]


def _by_server(engine: Engine, python: Path, request: dict[str, Any], timeout: float) -> dict[str, Any]:
    """The answer of the engine's own server, on a port of this machine alone."""
    from compress.engines.launch import Session

    port = _free_port()
    longest = max(map(len, request["prompts"])) + request["max_tokens"]
    with tempfile.TemporaryDirectory(prefix="compress-engine-") as where:
        log, url = Path(where, "log"), f"http://127.0.0.1:{port}"
        session, until = Session(request), time.monotonic() + timeout
        with _started([str(python), *engine.table.serve(request["folder"], port, request["dtype"], longest)], engine, python, log) as process:
            kind = f"no answer within {timeout:g} seconds"
            while process.poll() is None and time.monotonic() < until:
                with suppress(OSError, urllib.error.URLError):
                    urllib.request.urlopen(url + engine.table.HEALTH, timeout=5).close()
                    session.loaded()
                    try:
                        answer: dict[str, Any] = engine.table.ask(session, url, until - time.monotonic())
                        return answer | {"version": _version(engine, python)}
                    except urllib.error.HTTPError as error:
                        kind, until = f"HTTP {error.code}", 0.0
                        log.write_bytes(error.read())
                time.sleep(0.5)
            if process.poll() is not None:
                kind = f"died, exit code {process.returncode}"
        words = log.read_text(encoding="utf-8", errors="replace")[-TAIL:].strip()
        return {"error": {"type": kind, "message": words}, "version": _version(engine, python)}


def _version(engine: Engine, python: Path) -> str | None:
    """Of the engine in another interpreter."""
    code = f"import sys; sys.path.insert(0, {str(LAUNCH.parent)!r}); from launch import installed_version as v; print(v({engine.table.PACKAGES!r}))"
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True).stdout.strip() or None


@contextmanager
def _started(command: list[str], engine: Engine, python: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process under guard, ended with everything that it started when the block is left, or when this process dies."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | engine.table.ENVIRONMENT
    if python.absolute() == Path(sys.executable).absolute():
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE.parent), environment.get("PYTHONPATH"))))
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, str(GUARD), *command], stdin=subprocess.PIPE, stdout=file, stderr=file, env=environment, start_new_session=True
        )
    assert process.stdin
    try:
        yield process
    finally:
        process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
