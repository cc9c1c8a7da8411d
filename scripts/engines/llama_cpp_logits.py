"""llama.cpp on given tokens: ``python llama_cpp_logits.py REQUEST.json ANSWER.npz``, in the environment of llama-cpp-python. Stands alone.

The request holds ``file`` (GGUF), and what is wanted of it: ``prompts`` and ``tokens`` (lists of ids: the greedy continuation of each prompt by so
many tokens), ``forced`` (lists of ids: logits at every position), ``texts`` (to be cut into tokens, as ids and cut again into text), and ``cache``
("f32" or "f16"). The answer holds arrays: ``tokens`` [prompts, tokens], ``logits_0``, ... [positions, vocabulary], ``cut`` (JSON), ``version``.
"""

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    kind = {"f32": llama_cpp.GGML_TYPE_F32, "f16": llama_cpp.GGML_TYPE_F16}[request.get("cache", "f32")]
    count = request.get("tokens", 0)
    longest = max([len(ids) + count for ids in request.get("prompts", [])] + [len(ids) for ids in request.get("forced", [])] + [64])
    model = llama_cpp.Llama(
        request["file"], n_ctx=longest, n_batch=longest, logits_all=True, n_threads=1, n_threads_batch=1, use_mmap=False,
        type_k=kind, type_v=kind, vocab_only="texts" in request, verbose=False,
    )  # fmt: skip
    answer = {"version": np.array(llama_cpp.__version__)}
    made = []
    for prompt in request.get("prompts", []):
        model.reset()
        ids = list(prompt)
        model.eval(ids)
        for _ in range(count):
            ids.append(int(model.scores[model.n_tokens - 1].argmax()))
            model.eval(ids[-1:])
        made.append(ids[len(prompt) :])
    answer["tokens"] = np.array(made)
    for number, ids in enumerate(request.get("forced", [])):
        model.reset()
        model.eval(ids)
        answer[f"logits_{number}"] = np.array(model.scores[: len(ids)])
    cut = [model.tokenize(text.encode(), add_bos=False, special=True) for text in request.get("texts", [])]
    back = [model.detokenize(ids).decode(errors="replace") for ids in cut]
    answer["cut"] = np.array(json.dumps({"ids": cut, "texts": back}))
    np.savez(sys.argv[2], **answer)


if __name__ == "__main__":
    main()
