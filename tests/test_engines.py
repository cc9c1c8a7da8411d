"""Engines: what is known of them hangs together, what they refuse is told before a run, and what they answer is compared with what was meant."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from compress import advice, serving
from compress.checkpoint import Checkpoint
from compress.cli import app
from compress.engines import launch
from compress.engines.base import Engine, find, tables
from compress.errors import Exit, InputError
from compress.layout import Layout
from compress.recipe import export_names, said_of
from compress.scheme import Scheme

ROOT = Path(__file__).resolve().parents[1]
RIVALS = Path(os.environ.get("COMPRESS_RIVALS", "/nonexistent"))
W4 = {"passes": [{"rtn": {"bits": 4, "group_size": 128}}], "evaluate": None}


def told(*arguments: str | Path) -> tuple[int, str]:
    """Exit code of a command, and all it said."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `w4` and `w2`, made of demo:dense."""
    folder = tmp_path_factory.mktemp("engines")
    for bits in (4, 2):
        recipe = folder / f"w{bits}.yaml"
        recipe.write_text(json.dumps({"passes": [{"rtn": {"bits": bits, "group_size": 128}}], "evaluate": None}))
        assert told("run", recipe, "demo:dense", "--out", folder / f"w{bits}")[0] == Exit.ACCEPTED
    return folder


# The table ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(tables()))
def test_an_engine_says_all_that_is_asked_of_it(name: str) -> None:
    engine = find(name)
    table = engine.table
    assert name == table.NAME and table.TITLE and table.PACKAGES and set(table.READS) <= {*export_names(), "gguf"}
    assert set(table.VERSIONS.values()) <= {"read", "run"} and ("run" in table.VERSIONS.values() or not table.VERSIONS) == engine.runs
    if engine.runs:
        assert table.DTYPES and set(table.DTYPES) <= serving.TOLERANCE.keys()
        assert (
            (table.MODULE is None or table.MODULE)
            and isinstance(table.INSTALL, tuple)
            and isinstance(table.REMOVE, tuple)
            and isinstance(table.ENVIRONMENT, dict)
        )
        assert all(isinstance(value, str) for value in table.ENVIRONMENT.values())


def test_exports_judge_the_engines_that_read_them_and_no_others(checkpoint: Callable[..., Path]) -> None:
    layout = Layout(Checkpoint(checkpoint("llama")))
    plan = {name: Scheme(bits=4, group_size=32, symmetric=True) for name in layout.linears}
    titles = {table.TITLE for table in tables().values()}
    for export in export_names():
        said = said_of(export, layout, plan)
        assert said.keys() <= titles, export
        readers = {table.TITLE for table in tables().values() if export in table.READS and table.TITLE != "compress"}
        assert readers <= said.keys(), export


GENAI, OPENVINO = "ONNX Runtime GenAI", "OpenVINO"


@pytest.mark.parametrize(
    ("title", "export", "kind", "scheme", "verdict"),
    [
        (GENAI, "compressed-tensors", "llama", None, "loads"),
        (GENAI, "compressed-tensors", "llama", {}, "refuses quantised compressed-tensors"),
        (GENAI, "gptq", "llama", {}, "loads"),
        (GENAI, "gptq", "qwen3", {}, "unproven: a qwen3"),
        (GENAI, "gptq", "qwen3_moe", {}, "refuses a qwen3_moe"),
        (GENAI, "gptq", "llama", {"bits": 3}, "refuses 3-bit GPTQ"),
        (GENAI, "gptq", "llama", {"symmetric": False}, "refuses asymmetric GPTQ"),
        (GENAI, "awq", "llama", {"symmetric": False}, "loads"),
        (GENAI, "awq", "llama", {"group_size": 8}, "refuses groups of 8"),
        (GENAI, "awq", "llama", {"group_size": 24}, "refuses groups of 24"),
        (OPENVINO, "compressed-tensors", "llama", None, "loads"),
        (OPENVINO, "compressed-tensors", "mixtral", None, "unproven: a mixtral"),
        (OPENVINO, "compressed-tensors", "llama", {}, "refuses quantised compressed-tensors"),
        (OPENVINO, "gguf", "llama", {}, "loads"),
        (OPENVINO, "gguf", "qwen2", {}, "unproven: a qwen2"),
        (OPENVINO, "gguf", "qwen3_moe", {}, "refuses a qwen3_moe"),
        (OPENVINO, "gguf", "llama", None, "refuses linears in 16 bits"),
        (OPENVINO, "gguf", "llama", {"bits": 5}, "refuses Q5_0"),
        (OPENVINO, "gguf", "llama", {"symmetric": False}, "refuses Q5_0"),
        (OPENVINO, "gguf", "llama", {"format": "mxfp4"}, "refuses mxfp4"),
    ],
)
def test_engines_that_make_models_of_their_own_say_what_they_refuse(
    checkpoint: Callable[..., Path], title: str, export: str, kind: str, scheme: dict[str, Any] | None, verdict: str
) -> None:
    layout = Layout(Checkpoint(checkpoint(kind)))
    one = Scheme(**{"bits": 4, "group_size": 32, "symmetric": True} | (scheme or {}))
    plan = dict.fromkeys(layout.linears, one) if scheme is not None else {}
    assert said_of(export, layout, plan)[title].startswith(verdict)
    if plan and verdict == "loads":
        left = dict(list(plan.items())[1:])
        assert said_of(export, layout, left)[title].startswith("refuses")


def test_linears_of_different_widths_are_nothing_for_a_builder_that_looks_for_tensors(checkpoint: Callable[..., Path]) -> None:
    layout = Layout(Checkpoint(checkpoint("llama")))
    plan = {name: Scheme(bits=8 if "down" in name else 4, group_size=32, symmetric=True) for name in layout.linears}
    assert said_of("gptq", layout, plan)[GENAI] == "refuses linears of different bits or groups in GPTQ"
    assert said_of("gguf", layout, plan)[OPENVINO] == "loads"


SEEN = "to the dtype of their scales (seen with 5.23.0)"


@pytest.mark.parametrize(
    ("kind", "scheme", "said"),
    [
        ("llama", {"bits": 4}, "loads, decompresses on first use"),
        ("llama", {"bits": 4, "symmetric": False}, f"loads, decompresses while loading, rounding weights {SEEN}"),
        ("llama", {"bits": 4, "format": "mxfp4"}, "loads, decompresses while loading"),
        ("qwen3_moe", {"bits": 4}, f"loads, decompresses on first use, rounding experts {SEEN}"),
        ("qwen3_moe", {"bits": 8, "format": "fp8"}, "loads, decompresses on first use"),
        ("qwen3_moe", {"bits": 4, "format": "nvfp4"}, "refuses experts in nvfp4: unpacks them wrongly or not at all"),
    ],
)
def test_what_transformers_rounds_is_told(kind: str, scheme: dict[str, Any], said: str, checkpoint: Callable[..., Path]) -> None:
    layout = Layout(Checkpoint(checkpoint(kind)))
    plan = {name: Scheme(**({"group_size": 32, "symmetric": True} | scheme)) for name in layout.linears}
    assert said_of("compressed-tensors", layout, plan)["transformers"] == said


def test_advice_is_for_engines_that_are_known() -> None:
    assert {engine.name for engine in advice.book().engines.values()} <= {table.TITLE for table in tables().values()}
    assert advice.book().engines.keys() <= tables().keys()


@pytest.mark.parametrize("text", ["vllm", "vllm==0.33", "vllm==0.33.0", " VLLM == 0.32 "])
def test_a_version_stands_for_its_patches(text: str) -> None:
    assert find(text).name == "vllm"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("tgi", "--engine: tgi is not known; known are compress, gptqmodel, llama.cpp, mlx, onnxruntime-genai, openvino, sglang, transformers, vllm"),
        ("vllm==0.3", "--engine: nothing is known of version 0.3 of vllm; known are 0.33, 0.32; or leave it out"),
        ("vllm>=0.33", "--engine: 'vllm>=0.33' is no engine; write a name such as vllm, or a name and a version such as vllm==0.33"),
        ("", "--engine: '' is no engine; write a name such as vllm, or a name and a version such as vllm==0.33"),
    ],
)
def test_what_is_not_known_is_told_with_what_is(text: str, why: str) -> None:
    with pytest.raises(InputError) as caught:
        find(text)
    assert str(caught.value) == why


def test_files_of_engines_stand_alone() -> None:
    """They run in interpreters that have nothing of ours; only their types are ours."""
    for path in (ROOT / "compress" / "engines").glob("*.py"):
        if path.stem == "base":
            continue
        code = (
            f"import sys, runpy; runpy.run_path({str(path)!r}); print(sorted(name for name in sys.modules if name.partition('.')[0] == 'compress'))"
        )
        result = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
        assert result.returncode == 0 and result.stdout.strip() == "[]", (path, result.stderr)


# compress check ----------------------------------------------------------------------------------------------------------------------


def test_a_refusal_is_one_of_all_problems(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps(W4 | {"calibration": {"data": "nothing.txt"}}))
    latents = tmp_path / "l.yaml"
    latents.write_text(json.dumps({"passes": [*W4["passes"], {"kv_shrink": {"keep": 0.5, "window": 32, "bits": 4}}], "evaluate": None}))
    code, said = told("check", latents, "demo:dense", "--engine", "vllm==0.33", "--engine", "compress", "--engine", "tgi")
    assert code == Exit.BAD_INPUT
    assert "--engine: tgi is not known" in said
    assert "--engine vllm==0.33: refuses a cache of latents; change the recipe, or serve it with one of compress" in said


def test_what_an_engine_makes_of_a_recipe_is_told(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps({"passes": [{"rtn": {"format": "mxfp4"}}], "evaluate": None}))
    code, said = told("check", recipe, "demo:dense", "--engine", "vllm", "--engine", "compress", "--json")
    assert code == 0 and json.loads(said)["engines"] == {
        "vllm": "compressed-tensors: GPU only: mxfp4 (unproven)",
        "compress": "compressed-tensors: loads",
    }


def test_an_engine_of_another_layout_is_told_which(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps(W4))
    code, said = told("check", recipe, "demo:dense", "--engine", "mlx")
    assert code == Exit.BAD_INPUT and "refuses compressed-tensors: reads mlx alone; add mlx to its export" in said
    recipe.write_text(json.dumps(W4 | {"export": ["compressed-tensors", "mlx"]}))
    code, said = told("check", recipe, "demo:dense", "--engine", "mlx")
    assert code == 0 and "mlx: mlx: loads" in said
    recipe.write_text(json.dumps({"passes": [{"rtn": {"format": "nvfp4"}}], "evaluate": None}))
    code, said = told("check", recipe, "demo:dense", "--engine", "gptqmodel")
    assert code == Exit.BAD_INPUT and "change the recipe, or serve it with one of compress" in said


# Processes ---------------------------------------------------------------------------------------------------------------------------


def engine_of(folder: Path, source: str) -> Engine:
    """An engine that is whatever `source` says."""
    path = folder / "engine.py"
    head = 'NAME = TITLE = "mine"\nPACKAGES = ("torch",)\nMODULE = "json"\nVERSIONS = {}\nDTYPES = ("float32",)\nENVIRONMENT = {"MINE": "1"}\n'
    path.write_text(head + textwrap.dedent(source))
    spec = importlib.util.spec_from_file_location("mine", path)
    assert spec and spec.loader
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Engine("mine", "mine", None, path, module)


def request(number: int = 0) -> dict[str, Any]:
    return {"folder": str(number), "prompts": [[1, 2]], "max_tokens": 1, "dtype": "float32"}


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pid: int) -> bool:
    until = time.monotonic() + 20
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    return not alive(pid)


def test_what_an_engine_says_is_data_and_one_that_dies_takes_no_other_with_it(tmp_path: Path) -> None:
    engine = engine_of(
        tmp_path,
        """
        def run(session):
            import os, sys
            match session.folder:
                case "0": raise ValueError("only 4 and 8 bits")
                case "1": print("no such kernel", file=sys.stderr, flush=True); os.abort()
                case "2": return session.answer([[int(os.environ["MINE"])]], None)
                case "3":
                    import numpy
                    rows = numpy.full((2, 3), 0.5, numpy.float32)
                    return session.answer([[1], [2]], None) | {"inputs": [{"a.weight b.weight": rows}, {"c.weight": rows}]}
        """,
    )
    refused, died, answered, detailed = serving.ask_all(engine, Path(sys.executable), [request(number) for number in range(4)], 60)
    assert refused["error"] == {"type": "ValueError", "message": "only 4 and 8 bits"} and refused["version"] == f"torch {torch.__version__}"
    assert died["error"]["message"] == "no such kernel" and died["error"]["type"].startswith("died")
    assert answered["tokens"] == [[1]] and answered["prompt_logprobs"] is None and answered["seconds"] >= 0 and "inputs" not in answered
    assert [sorted(text) for text in detailed["inputs"]] == [["a.weight", "b.weight"], ["c.weight"]]
    assert torch.equal(detailed["inputs"][1]["c.weight"], torch.full((2, 3), 0.5))


LEAVES = """
    import os, signal, subprocess, sys, time
    child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"])
    open({pids!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
    time.sleep({seconds})
"""


def pids(file: Path) -> list[int]:
    until = time.monotonic() + 30
    while time.monotonic() < until and (not file.exists() or len(file.read_text().split()) < 2):
        time.sleep(0.05)
    return list(map(int, file.read_text().split()))


@pytest.mark.parametrize("seconds", [0, 600], ids=["ended", "late"])
def test_nothing_that_an_engine_started_is_left(tmp_path: Path, seconds: int) -> None:
    engine = engine_of(tmp_path, "def run(session):" + LEAVES.format(pids=str(tmp_path / "pids"), seconds=seconds) + "    os.abort()\n")
    (answer,) = serving.ask_all(engine, Path(sys.executable), [request()], 60 if not seconds else 3)
    assert ("no answer within 3 seconds" if seconds else "died") in answer["error"]["type"]
    assert all(gone(pid) for pid in pids(tmp_path / "pids"))


def test_nothing_is_left_where_we_are_killed_ourselves(tmp_path: Path) -> None:
    script = "import subprocess, sys; subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, start_new_session=True).wait()"
    # The child has to be deaf before it is asked to end.
    leaves = textwrap.dedent(LEAVES.format(pids=str(tmp_path / "pids"), seconds=600)).replace("\nopen(", "\ntime.sleep(2)\nopen(")
    with subprocess.Popen([sys.executable, "-c", script, sys.executable, str(serving.GUARD), sys.executable, "-c", leaves]) as owner:
        found = pids(tmp_path / "pids")
        assert all(map(alive, found))
        owner.send_signal(signal.SIGKILL)
    assert all(gone(pid) for pid in found)


SERVER = """
    HEALTH = "/health"

    def serve(folder, port, dtype, longest):
        return [{script!r}, str(port)]

    def ask(session, url, timeout):
        import urllib.request
        if session.folder.endswith("1"):
            return session.answer([[7]], [[-1.0]], 0.5)
        urllib.request.urlopen(url + "/v1", b"x", timeout=timeout)
"""
ANSWERS = """
import http.server, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self): self.send_response(200); self.end_headers()
    def do_POST(self): self.send_response(400); self.end_headers(); self.wfile.write(b"no such model")

http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.mark.parametrize(
    ("server", "folder", "kind", "message"),
    [
        ("import sys; sys.exit('wants a GPU')", 0, "died, exit code 1", "wants a GPU"),
        ("import time; time.sleep(600)", 0, "no answer within 3 seconds", ""),
        (ANSWERS, 0, "HTTP 400", "no such model"),
        (ANSWERS, 1, None, None),
    ],
    ids=["dies", "hangs", "refuses", "answers"],
)
def test_a_server_is_asked_and_ended(tmp_path: Path, server: str, folder: int, kind: str | None, message: str | None) -> None:
    script, ours = tmp_path / "server.py", tmp_path / "pid"
    script.write_text(f"import os; open({str(ours)!r}, 'w').write(str(os.getpid()))\n{server}")
    engine = engine_of(tmp_path, SERVER.replace("{script!r}", repr(str(script))))
    answer = serving._by_server(engine, Path(sys.executable), request(folder), 3 if "sleep" in server else 30)
    if kind is None:
        assert answer["tokens"] == [[7]] and answer["first_token_seconds"] == 0.5
    else:
        assert answer["error"] == {"type": kind, "message": message}
    assert gone(int(ours.read_text()))


# Comparison --------------------------------------------------------------------------------------------------------------------------


def test_log_probabilities_are_those_of_a_softmax() -> None:
    logits, ids = torch.randn(5, 11) * 30, [3, 0, 10, 7, 7]
    meant = logits.double().log_softmax(-1)[torch.arange(4), ids[1:]]
    assert launch.logprobs_of(logits.numpy(), ids) == pytest.approx(meant.tolist(), abs=1e-9)


def test_an_answer_is_judged_token_by_token(artifacts: Path) -> None:
    """Each token of the reference itself agrees; one of them changed is told, with its place and how far it is."""
    asked = serving.ask_for(artifacts / "w4", None, 8)[:2]
    session = launch.Session({"folder": "", "prompts": asked, "max_tokens": 8, "dtype": "float32"})
    model = serving.meant(artifacts / "w4", artifacts / "w4", find("compress"))
    answer = session.by_torch(model) | {"version": "x"}
    found = serving.compare(model, asked, answer)
    assert found["agrees"] and found["tokens_equal"] == found["tokens"] == 16 and found["prompt_logprob_difference"] < 1e-3
    wrong = json.loads(json.dumps(answer))
    wrong["tokens"][1][3] = (wrong["tokens"][1][3] + 1) % 4096
    found = serving.compare(model, asked, wrong)
    first = found["prompts"][1]["other"][0]
    assert not found["agrees"] and not found["prompts"][0]["other"] and first["position"] == 3
    assert first["reference"] == answer["tokens"][1][3] and first["margin"] > serving.TOLERANCE["float32"]
    for logprob in (float("nan"), answer["prompt_logprobs"][0][0] - 0.1):
        off = json.loads(json.dumps(answer))
        off["prompt_logprobs"][0][0] = logprob
        assert not serving.compare(model, asked, off)["agrees"]
    assert not serving.compare(model, asked, answer | {"tokens": [answer["tokens"][0], answer["tokens"][1][:-1]]})["agrees"]


def test_transformers_serves_what_was_meant_and_nothing_else(artifacts: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The old man said\n\nIt was a cold\n")
    options = ("--engine", "transformers", "--prompts", prompts, "--tokens", "6", "--json")
    code, said = told("serve-check", artifacts / "w4", *options)
    result = json.loads(said)
    assert code == Exit.ACCEPTED and result["agrees"] and result["tokens"] == 12 and result["version"].startswith("transformers ")
    assert result["tokens_per_second"] > 0 and result["first_token_seconds"] > 0 and result["prompt_logprob_difference"] < 0.01
    code, said = told("serve-check", artifacts / "w4", *options, "--reference", artifacts / "w2")
    assert code == Exit.GATE_FAILED and json.loads(said)["prompt_logprob_difference"] > 0.1


def test_what_engines_leave_out_is_left_out_of_the_comparison(tmp_path: Path) -> None:
    recipe, out = tmp_path / "r.yaml", tmp_path / "out"
    passes = [{"rtn": {"bits": 2, "group_size": 64}}, {"detach": {"share": 0.01, "score": "random"}}]
    recipe.write_text(json.dumps({"calibration": {"data": "demo:text", "samples": 4, "length": 64}, "passes": passes, "evaluate": None}))
    assert told("run", recipe, "demo:dense", "--out", out)[0] == Exit.ACCEPTED
    code, said = told("serve-check", out, "--engine", "transformers", "--tokens", "4")
    assert code == Exit.ACCEPTED and "without its residuals, which no other engine computes" in " ".join(said.split())
    assert serving.left_out(out, find("vllm")) == ["residuals"] and not serving.left_out(out, find("compress"))


def test_an_engine_that_refuses_is_told_in_its_own_words(artifacts: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in (artifacts / "w4").iterdir():
        if path.suffix == ".json" and path.name != "manifest.json":
            (damaged / path.name).write_bytes(path.read_bytes())
    code, said = told("serve-check", damaged, "--engine", "transformers", "--reference", artifacts / "w4")
    assert code == Exit.BAD_INPUT and "does not run it: OSError" in said and "safetensors" in said


def test_an_artifact_that_is_not_as_it_was_written_does_not_agree_with_itself(artifacts: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(artifacts / "w4", tmp_path / "changed"))
    tensors = load_file(changed / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight_scale"] *= 1.05
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    code, said = told("serve-check", changed, "--engine", "compress", "--tokens", "4")
    assert code == Exit.BAD_INPUT and "model.safetensors: is not the file that manifest.json tells of" in said


def test_what_cannot_be_tried_is_told_at_once(tmp_path: Path, artifacts: Path) -> None:
    long = tmp_path / "long.txt"
    long.write_text("a\n" + "so it was " * 3000)
    code, said = told("serve-check", artifacts / "w4", "--engine", "sglang", "--python", tmp_path / "no", "--prompts", long)
    assert code == Exit.BAD_INPUT
    assert "--engine: sglang is known, but no way to run it here" in said and "no is no interpreter" in said
    assert "long.txt:1: 'a' is no more than a token" in said and "long.txt:2: has" in said
    code, said = told("serve-check", artifacts / "nothing", "--engine", "vllm", "--dtype", "int3")
    assert told("serve-check", artifacts / "w4", "--engine", "transformers", "--python", tmp_path)[1].count("is no interpreter") == 1
    assert code == Exit.BAD_INPUT and "nothing: is no folder" in said and "--dtype: vllm is not run in int3; take float16 or bfloat16" in said


def test_an_export_is_compared_with_what_it_was_made_of(artifacts: Path) -> None:
    if not (artifacts / "w4-mlx").exists():
        assert told("export", artifacts / "w4", "--to", "mlx")[0] == 0
    code, said = told("serve-check", artifacts / "w4-mlx", "--engine", "mlx")
    assert code == Exit.BAD_INPUT and "is an export, which compress itself does not run; name the artifact it was made of" in said
    code, said = told("serve-check", artifacts / "w4-mlx", "--engine", "mlx", "--reference", artifacts / "w2")
    assert code == Exit.BAD_INPUT and "was made of an artifact with another" in said


# The matrix --------------------------------------------------------------------------------------------------------------------------


def matrix() -> ModuleType:
    spec = importlib.util.spec_from_file_location("engine_matrix", ROOT / "scripts" / "engine_matrix.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_cell_runs_or_is_refused() -> None:
    cells = matrix().read()["cells"]
    assert cells and not [matrix().key(cell) for cell in cells if cell["outcome"].startswith("MISMATCH")]
    assert all(matrix().outcome(cell) == cell["outcome"] for cell in cells if "said" in cell)


def test_the_document_is_what_was_measured() -> None:
    assert (ROOT / "docs" / "engines.md").read_text() == matrix().render(matrix().read())


@pytest.mark.parametrize(
    ("said", "happened", "outcome"),
    [
        ("loads", {"tokens": 9, "agrees": True}, "agrees"),
        ("loads", {"tokens": 9, "agrees": False}, "MISMATCH: differs"),
        ("loads", {"error": {}}, "MISMATCH: did not run"),
        ("refuses 3-bit", {"error": {}}, "refused"),
        ("refuses 3-bit", {"tokens": 9, "agrees": False}, "refused"),
        ("refuses 3-bit", {"tokens": 9, "agrees": True}, "MISMATCH: runs"),
        ("GPU only: nvfp4", {"error": {}}, "elsewhere"),
        ("GPU only: nvfp4", {"tokens": 9, "agrees": True}, "MISMATCH: runs here"),
        ("GPU only: nvfp4", {"tokens": 9, "agrees": False}, "elsewhere"),
        ("unproven: inputs", {"tokens": 9, "agrees": False}, "MISMATCH: differs"),
    ],
)
def test_a_cell_is_judged_by_what_was_known(said: str, happened: dict[str, Any], outcome: str) -> None:
    assert matrix().outcome({"said": said} | happened) == outcome


# Engines for real --------------------------------------------------------------------------------------------------------------------


def python_of(name: str, *installed: str) -> Path:
    """The interpreter of an engine; where there is none the test is skipped, and told how it is not."""
    python: Path = matrix().python_of(name, RIVALS)
    if not python.exists():
        pytest.skip(f"needs $COMPRESS_RIVALS, a folder of virtual environments, and in it {python.parts[-3]} after pip install {' '.join(installed)}")
    return python


@pytest.mark.engines
@pytest.mark.parametrize(
    ("name", "target"),
    [
        (name, target)
        for name, table in tables().items()
        for target in table.READS
        if hasattr(table, "INSTALL") and target not in ("mxfp4", "nm-packed")  # which are for other models
    ],
)
def test_an_engine_serves_four_bits(artifacts: Path, name: str, target: str) -> None:
    python = Path(sys.executable) if name == "compress" else python_of(name, *find(name).table.INSTALL)
    folder = artifacts / ("w4" if target == "compressed-tensors" else f"w4-{target}")
    if not folder.exists():
        assert told("export", artifacts / "w4", "--to", target)[0] == 0
    code, said = told("serve-check", folder, "--engine", name, "--python", python, "--reference", artifacts / "w4", "--tokens", "16")
    known = matrix().said(artifacts / "w4", target, find(name))
    assert code == (Exit.BAD_INPUT if known.startswith("refuses") else 0), (known, said)


AUTOGPTQ = """
import sys
from auto_gptq.nn_modules.qlinear.qlinear_cuda_old import QuantLinear
from safetensors.torch import load_file, save_file
from torch import nn
given, made = load_file(sys.argv[1]), {}
for key in {name.rpartition(".")[0] for name in given}:
    weight = given[key + ".weight"]
    linear = nn.Linear(*reversed(weight.shape), bias=False)
    linear.weight.data = weight
    packed = QuantLinear(int(key.partition("-")[0]), 32, *reversed(weight.shape), False)
    packed.pack(linear, given[key + ".scale"], given[key + ".zero"], None)
    made |= {f"{key}.{part}": getattr(packed, part).contiguous() for part in ("qweight", "qzeros", "scales", "g_idx")}
save_file(made, sys.argv[2])
"""


@pytest.mark.engines
def test_gptq_is_what_autogptq_packs(tmp_path: Path) -> None:
    """The archived package's own packer, byte for byte; its models need CUDA, its packer does not."""
    from safetensors.torch import load_file, save_file

    from compress.formats import gptq
    from compress.numerics.grid import Integer, Quantized

    python = python_of("autogptq", "torch==2.13.0", "auto-gptq==0.7.1", "transformers==4.44.2", "peft==0.11.1")
    weights, given = {}, {}
    for bits in (2, 3, 4, 8):
        for symmetric in (True, False):
            key, half = f"{bits}-{symmetric}", 1 << bits - 1
            codes = torch.randint(-half, half, (64, 128), dtype=torch.int16).to(torch.int8)
            zero = None if symmetric else torch.randint(1 - half, half, (64, 4), dtype=torch.int16).to(torch.int8)
            weights[key] = Quantized(codes, (torch.rand(64, 4) + 0.5).half(), zero, Integer(bits, symmetric))
            given[f"{key}.weight"] = weights[key].dequantize(torch.float32)
            given[f"{key}.scale"] = weights[key].scale.float()
            given[f"{key}.zero"] = (torch.full((64, 4), half) if zero is None else zero.int() + half).float()
    save_file(given, tmp_path / "given")
    command = [str(python), "-c", AUTOGPTQ, str(tmp_path / "given"), str(tmp_path / "packed")]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": ""})
    theirs = load_file(tmp_path / "packed")
    for key, weight in weights.items():
        ours = gptq.pack("X", weight, 1)
        for part in ("qweight", "qzeros", "g_idx"):
            assert torch.equal(theirs[f"{key}.{part}"].int(), ours[f"X.{part}"]), (key, part)
        assert torch.equal(theirs[f"{key}.scales"].half(), ours["X.scales"])
