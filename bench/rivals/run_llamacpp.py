"""llama.cpp as `decode.py` measures it: writes a GGUF of random blocks if there is none, loads it, and decodes when told to.

Each line on stdin is a number of tokens; each answer on stdout is a JSON list with the seconds of every one. The scales of blocks are set to
one small number, so that nothing overflows; how fast a product is does not depend on what the weights say. The embedding and the head are
F16, as they are 16 bits wide in what it is compared with.
"""

import argparse
import ctypes
import json
import sys
import time
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

SCALES = {"Q4_0": (0,), "Q8_0": (0,), "Q3_K": (108,), "Q2_K": (80, 82), "Q4_K": (0, 2)}
"""Where in a block its 16-bit scales are, in bytes."""


def blocks(kind: str, rows: int, columns: int, random: np.random.Generator) -> np.ndarray:
    """A matrix of `kind` as uint8 [rows, bytes of a row]."""
    per_block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    data = random.integers(0, 256, (rows, columns // per_block, size), dtype=np.uint8)
    for place in SCALES[kind]:
        data[..., place : place + 2] = np.frombuffer(np.float16(1e-3).tobytes(), dtype=np.uint8)
    return data.reshape(rows, -1)


def write(path: Path, kind: str, shape: dict[str, int]) -> None:
    """A Llama of `shape` with random blocks."""
    random, heads, kv = np.random.default_rng(0), shape["heads"] * shape["head_dim"], shape["kv_heads"] * shape["head_dim"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(shape["layers"])
    writer.add_context_length(2048)
    writer.add_embedding_length(shape["hidden"])
    writer.add_feed_forward_length(shape["ffn"])
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["kv_heads"])
    writer.add_key_length(shape["head_dim"])
    writer.add_value_length(shape["head_dim"])
    writer.add_rope_dimension_count(shape["head_dim"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(shape["vocab"])
    writer.add_tokenizer_model("none")
    # One of each shape serves all blocks: the file has them all, memory does not.
    hidden, ffn = shape["hidden"], shape["ffn"]
    sizes = {
        "attn_q": (heads, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden), "attn_output": (hidden, heads),
        "ffn_gate": (ffn, hidden), "ffn_up": (ffn, hidden), "ffn_down": (hidden, ffn),
    }  # fmt: skip
    made = {name: blocks(kind, *size, random) for name, size in sizes.items()}
    for layer in range(shape["layers"]):
        for name, data in made.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind])
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(hidden, dtype=np.float32))
    head = random.standard_normal((shape["vocab"], hidden), dtype=np.float32).astype(np.float16)
    for name in ("token_embd", "output"):
        writer.add_tensor(f"{name}.weight", head)
    writer.add_tensor("output_norm.weight", np.ones(hidden, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--type", choices=list(SCALES), required=True)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--shape", type=json.loads, required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    if not arguments.gguf.exists():
        write(arguments.gguf, arguments.type, arguments.shape)
    llama_cpp.llama_backend_init()
    settings = llama_cpp.llama_model_default_params()
    settings.use_mmap = False
    model = llama_cpp.llama_model_load_from_file(str(arguments.gguf).encode(), settings)
    context = llama_cpp.llama_context_default_params()
    context.n_ctx, context.n_threads, context.n_threads_batch = 512, arguments.threads, arguments.threads
    running = llama_cpp.llama_init_from_model(model, context)
    assert running, "llama.cpp did not load the file"
    version = {"llama_cpp_python": llama_cpp.__version__, "system": llama_cpp.llama_print_system_info().decode()}
    print(json.dumps({"bytes": arguments.gguf.stat().st_size, "version": version}), flush=True)
    for line in sys.stdin:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(running), True)
        seconds = []
        for token in range(int(line)):
            tokens = (ctypes.c_int32 * 1)(token + 1)
            began = time.perf_counter()
            assert llama_cpp.llama_decode(running, llama_cpp.llama_batch_get_one(tokens, 1)) == 0
            seconds.append(time.perf_counter() - began)
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
