"""Advice: what is data is sound, what is advised can be run and weighs what was said, what collapses is refused."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from test_run import compress
from typer.testing import CliRunner

from compress import advice, pipeline, planning, recipe
from compress.advice import Case, book
from compress.checkpoint import Checkpoint
from compress.cli import app
from compress.errors import Exit, InputError
from compress.layout import Layout

DEMOS = ("demo:dense", "demo:moe", "demo:vlm")
KINDS = ("llama", "llama-688", "qwen2-sliding", "qwen3_moe", "mixtral", "llava")


def advised(model: Path | str, memory: str, **wish: Any) -> dict[str, Any]:
    """What is advised; by default for vLLM, balanced, chat."""
    layout = pipeline.open_layout(str(model))
    options = {"engine": "vllm", "goal": "balanced", "use": "chat", "context": None} | wish
    return advice.advise(layout, str(model), advice.wish(layout, memory, **options), "recipe.yaml")


def told(model: Path | str, memory: str, **wish: Any) -> list[str]:
    """Why nothing is advised."""
    with pytest.raises(InputError) as caught:
        advised(model, memory, **wish)
    return [str(problem) for problem in caught.value.problems]


# Models of any size, of which there are only headers -----------------------------------------------------------------------------------


def giant(folder: Path, hidden: int, ffn: int, blocks: int, vocabulary: int = 32000, kv_heads: int | None = None) -> Path:
    """A Llama in bfloat16 whose weights are a hole in a file: as long as they should be, and empty."""
    heads = hidden // 128
    config = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": blocks, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads, "head_dim": 128, "vocab_size": vocabulary, "max_position_embeddings": 8192,
    }  # fmt: skip
    kv = 128 * (kv_heads or heads)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (vocabulary, hidden))
    shapes["model.norm.weight"] = (hidden,)
    for block in range(blocks):
        local = {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn),
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        }  # fmt: skip
        shapes |= {f"model.layers.{block}.{name}.weight": shape for name, shape in local.items()}
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + 2 * math.prod(shape)]}
        end += 2 * math.prod(shape)
    encoded = json.dumps(header).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return giant(tmp_path_factory.mktemp("giant") / "7b", 4096, 11008, 32)


@pytest.fixture(scope="module")
def seventy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return giant(tmp_path_factory.mktemp("giant") / "70b", 8192, 28672, 80, kv_heads=8)


@pytest.fixture(scope="module")
def seven_trained_for_long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return giant(tmp_path_factory.mktemp("giant") / "8b", 4096, 14336, 32, vocabulary=128256, kv_heads=8)


@pytest.mark.parametrize(
    ("memory", "wish", "name", "verdict"),
    [
        ("12GiB", {}, "w8", "safe"),
        ("12GiB", {"goal": "lossless"}, "w8", "safe"),
        ("8.5GB", {}, "w8 + kv8", "safe"),
        ("6.1GB", {}, "w4", "safe"),
        ("6.1GB", {"use": "reasoning"}, "w4-autoround", "safe"),
        ("5GB", {}, "w4 + kv8", "safe"),
        ("4.6GB", {}, "w3-mixed + kv8", "warn"),
        ("4.6GB", {"context": 2048}, "w4 + kv8", "safe"),
        ("4.2GB", {}, "w3 + kv8", "warn"),
        ("20GB", {"goal": "smallest"}, "w3 + kv8", "warn"),
        ("20GB", {"goal": "smallest", "engine": "sglang"}, "w4 + kv8", "safe"),
    ],
    ids=str,
)
def test_what_a_model_of_seven_billion_gets(memory: str, wish: dict[str, Any], name: str, verdict: str, seven: Path) -> None:
    found = advised(seven, memory, **wish)["advice"]
    assert (found["name"], found["verdict"]) == (name, verdict)


@pytest.mark.parametrize(
    ("memory", "wish", "name", "verdict"),
    [("50GB", {}, "w4", "safe"), ("29GB", {}, "w3 + kv8", "warn"), ("29GB", {"goal": "smallest"}, "w2 + kv8", "experimental")],
    ids=str,
)
def test_what_a_model_of_seventy_billion_gets(memory: str, wish: dict[str, Any], name: str, verdict: str, seventy: Path) -> None:
    found = advised(seventy, memory, **wish)["advice"]
    assert (found["name"], found["verdict"]) == (name, verdict)


def test_less_than_eight_bits_are_not_called_lossless(seven: Path) -> None:
    problems = told(seven, "6GB", goal="lossless")
    assert any(problem == "w4: lossless means eight bits; take goal balanced" for problem in problems)
    assert "6 GB does not hold the least that may be taken: fp8 + kv8 needs 8.08 GB" in problems[-1] and "--goal balanced" in problems[-1]


def test_what_was_trained_for_long_gets_a_lower_verdict_at_three_bits(seven_trained_for_long: Path) -> None:
    assert any(problem.startswith("w3: below 13B") and "an experiment" in problem for problem in told(seven_trained_for_long, "4GB"))
    found = advised(seven_trained_for_long, "6GB", goal="smallest")
    assert (found["advice"]["name"], found["advice"]["verdict"]) == ("w3 + kv8", "experimental")


def test_transformers_saves_no_memory_and_is_told_so(seven: Path) -> None:
    problem = told(seven, "12GiB", engine="transformers")[-1]
    assert "13.5 GB of weights" in problem and "an engine that keeps weights packed, which this one does not" in problem
    assert advised(seven, "20GB", engine="transformers")["advice"]["file_bytes"] < 7.1e9


def test_a_model_that_fits_as_it_is_is_said_to(seven: Path) -> None:
    unchanged = "Unchanged, the model needs 15.6 GB, which fits as well."
    assert unchanged in advised(seven, "16GB")["notes"] and unchanged not in advised(seven, "15GB")["notes"]


def test_expected_changes_are_those_of_rounding_times_what_the_method_leaves(seven: Path) -> None:
    by_hand = {"hellaswag": (-1.2, -2.0), "mmlu": (-2.2, -2.7), "gsm8k": (-6.0, -12.7)}
    for use, left in (("chat", 0.5), ("reasoning", 0.39)):
        found = advised(seven, "6.1GB", use=use)["expected"]
        assert found == {task: pytest.approx((median * left, worst * left)) for task, (median, worst) in by_hand.items()}
    with_cache = advised(seven, "5GB")["expected"]
    assert with_cache["gsm8k"] == pytest.approx((-6.0 * 0.5 + 0, -12.7 * 0.5 - 1.9))


def test_expected_changes_of_several_widths_lie_between_theirs(seven: Path) -> None:
    wide, mixed, narrow = (advised(seven, memory)["expected"]["gsm8k"][0] for memory in ("5GB", "4.6GB", "4.2GB"))
    share = 2 * 11008 / (4 * 4096 + 3 * 11008)
    assert mixed == pytest.approx(share * narrow + (1 - share) * wide)


# What is data ---------------------------------------------------------------------------------------------------------------------------


def test_the_data_refer_to_each_other() -> None:
    data, formats = book(), {row.format for row in book().evidence}
    assert {row.source for row in (*data.evidence, *data.multipliers)} == data.sources.keys()
    assert {row.format for row in data.multipliers if row.format} <= formats
    assert {candidate.format.removesuffix("-mixed") for candidate in data.candidates} <= formats
    assert {format_ for rule in (*data.weights, *data.cache) for format_ in rule.when.format} <= {*formats, "w3-mixed"}
    assert all(rule.verdict == "refuse" or rule.gate for rule in data.weights)


@pytest.mark.parametrize("parameters", [7e9, 70e9])
def test_candidates_come_in_the_order_of_what_they_lose(parameters: float) -> None:
    def lost(candidate: advice.Candidate) -> float:
        change = advice._change(candidate.format, parameters)
        return -change["gsm8k"][0] * advice._left(candidate.method, candidate.format) if "gsm8k" in change else math.nan

    known = [loss for loss in map(lost, book().candidates) if not math.isnan(loss)]
    assert known == sorted(known) and len(known) >= 6


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({"format": "w8", "method": "rtn", "goal": "lossless"}, "safe"),
        ({"parameters": 1e9}, "warn"),
        ({"parameters": 1e9, "method": "gptq"}, "refuse"),
        ({"parameters": 1e9, "format": "w3"}, "refuse"),
        ({}, "safe"),
        ({"experts": True}, "warn"),
        ({"use": "reasoning"}, "warn"),
        ({"use": "reasoning", "method": "autoround"}, "safe"),
        ({"use": "reasoning", "method": "rtn"}, "refuse"),
        ({"method": "rtn"}, "refuse"),
        ({"parameters": 70e9, "method": "gptq", "use": "reasoning"}, "safe"),
        ({"parameters": 13e9, "format": "w3"}, "warn"),
        ({"format": "w3", "method": "rtn"}, "refuse"),
        ({"format": "w2", "method": "autoround"}, "refuse"),
        ({"format": "w2", "method": "autoround", "parameters": 34e9}, "experimental"),
        ({"format": "w2", "parameters": 70e9}, "refuse"),
        ({"format": "w4a4"}, "refuse"),
        ({"format": "mxfp4", "method": "rtn"}, "refuse"),
        ({"format": "nvfp4", "parameters": 3e9}, "refuse"),
    ],
    ids=str,
)
def test_the_first_rule_that_fits_decides(change: dict[str, Any], verdict: str) -> None:
    usual = {
        "goal": "balanced", "use": "chat", "format": "w4", "method": "gptq+qep", "cache": 16, "parameters": 7e9, "context": 4096,
        "experts": False, "images": False,
    }  # fmt: skip
    case = Case(**(usual | change))
    assert next(rule for rule in book().weights if rule.when.fits(case)).verdict == verdict


@pytest.mark.parametrize(
    ("cache", "context", "verdict"), [(16, 10**6, "safe"), (8, 10**6, "safe"), (4, 4096, "safe"), (4, 8192, "warn"), (2, 512, "refuse")]
)
def test_the_cache_has_rules_of_its_own(cache: int, context: int, verdict: str) -> None:
    case = Case("balanced", "chat", "w4", "gptq+qep", cache, 7e9, context, experts=False, images=False)
    assert next(rule for rule in book().cache if rule.when.fits(case)).verdict == verdict


def test_a_rule_without_a_way_to_find_out_is_no_rule() -> None:
    with pytest.raises(ValueError, match="every other verdict names its gate"):
        advice.Rule.model_validate({"when": {}, "verdict": "safe", "why": "so"})


# What can be advised can be run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("engine", "use"), [("transformers", "chat"), ("vllm", "chat"), ("vllm", "reasoning"), ("sglang", "reasoning")])
@pytest.mark.parametrize("model", [*DEMOS, *KINDS])
def test_whatever_is_advised_passes_every_check(model: str, engine: str, use: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = model if model.startswith("demo:") else str(checkpoint(model, torch.bfloat16))
    layout = pipeline.open_layout(folder)
    whole, outcomes = layout.checkpoint.nbytes + planning.cache_bytes(layout, 128, 16), []
    for goal in ("lossless", "balanced", "smallest"):
        for share in (0.2, 0.6, 1.1):
            try:
                found = advised(folder, f"{share * whole:.0f}B", engine=engine, use=use, goal=goal, context=128)
            except InputError as error:
                assert error.problems[-1].place in ("--memory", "advice")
                continue
            told = found["advice"]
            assert told["weight_bytes"] + told["cache_bytes"] <= share * whole
            path = tmp_path / "recipe.yaml"
            path.write_text(found["recipe"])
            assert recipe.check(recipe.load(path), layout, "r")
            outcomes.append(told["name"])
    assert outcomes


@pytest.mark.parametrize("goal", ["balanced", "lossless", "smallest"])
def test_what_is_taken_is_the_first_or_the_smallest_that_fits(goal: str, seven: Path) -> None:
    for memory in (4, 5, 6, 8, 15):
        try:
            found = advised(seven, f"{memory}GB", goal=goal)
        except InputError:
            continue
        fitting = [item for item in found["considered"] if item["against"] is None]
        best = min(fitting, key=lambda item: item["needs"]) if goal == "smallest" else fitting[0]
        assert found["advice"]["name"] == best["name"] and best["needs"] <= memory * 1e9
        assert all(item["needs"] is None or item["needs"] > memory * 1e9 for item in found["considered"] if item["against"])


def test_more_memory_never_loses_more(seven: Path) -> None:
    order = [item["name"] for item in advised(seven, "16GB")["considered"]]
    places = [order.index(advised(seven, f"{memory / 10}GB")["advice"]["name"]) for memory in (42, 46, 50, 61, 75, 80, 100, 150)]
    assert places == sorted(places, reverse=True)


@pytest.mark.parametrize(
    ("kind", "memory", "name"),
    [
        ("llama", "1135kB", "w8 + kv8"),
        ("llama-688", "1220kB", "w4 + kv8"),
        ("qwen3_moe", "1160kB", "w4"),
        ("mixtral", "10MB", "w8"),
        ("llava", "1250kB", "w8"),
    ],
)
def test_an_artifact_weighs_what_was_said(kind: str, memory: str, name: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint(kind, torch.bfloat16)
    found = advised(folder, memory, context=128)
    plain = yaml.safe_load(found["recipe"]) | {"evaluate": None, "gates": {}, "verify": "streamed"}
    plain["calibration"] = {"samples": 8, "length": 64} | ({"data": "demo:images"} if kind == "llava" else {})
    for step in plain["passes"]:
        if "gptq" in step:
            step["gptq"] |= {"min_tokens": 0}
    result = compress(plain, folder, tmp_path / "out")
    assert found["advice"]["name"] == name
    assert result["size"]["after_bytes"] == found["advice"]["file_bytes"] == found["advice"]["weight_bytes"]


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2-sliding", "qwen3_moe"])
@torch.no_grad()
def test_a_cache_weighs_what_that_of_plain_transformers_does(kind: str, checkpoint: Callable[..., Path]) -> None:
    layout, tokens = Layout(Checkpoint(checkpoint(kind))), 40
    cache = tiny.plain(checkpoint(kind))(input_ids=torch.full((1, tokens), 5), use_cache=True).past_key_values
    held = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
    # A layer with a window holds one token less than it looks at: the next one is its own.
    per_token = held[0] // layer_tokens(cache, 0)
    missing = sum(window is not None for window in layout.windows)
    assert planning.cache_bytes(layout, tokens, 32) == sum(held) + missing * per_token


def layer_tokens(cache: Any, layer: int) -> int:
    return int(cache.layers[layer].keys.shape[2])


# What the command line says ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "count"), [("12GiB", 12 << 30), ("12GB", 12 * 10**9), ("800MB", 8 * 10**8), (" 1.5 gib", 3 << 29), ("7B", 7)])
def test_sizes_are_read(text: str, count: int) -> None:
    layout = pipeline.open_layout("demo:dense")
    assert advice.wish(layout, text, "vllm", "balanced", "chat", None).memory == count


@pytest.mark.parametrize("text", ["12", "GB", "12G", "-1GB", "1e3MB", "0GB", "12 apples", ""])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"--memory: .* is no size; write a number and a unit, such as 12GiB"):
        advice.wish(pipeline.open_layout("demo:dense"), text, "vllm", "balanced", "chat", None)


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(InputError) as caught:
        advice.wish(pipeline.open_layout("demo:dense"), "x", "vlm", "best", "poetry", 10**6)
    assert [problem.place for problem in caught.value.problems] == ["--engine", "--goal", "--use", "--memory", "--context"]


def test_an_artifact_is_not_advised_on(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress({"passes": [{"rtn": {"group_size": 32}}], "evaluate": None, "verify": "streamed"}, checkpoint("llama"), tmp_path / "out")
    assert told(tmp_path / "out", "1GB") == [
        "config.json: quantization_config: the model is already quantised (compressed-tensors); start from the original checkpoint"
    ]


def test_what_is_printed_is_a_recipe_with_its_reasons(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["advise", "demo:dense", "--memory", "7MB", "--engine", "vllm"])
    assert result.exit_code == Exit.ACCEPTED
    (tmp_path / "recipe.yaml").write_text(result.stdout)
    checked = CliRunner().invoke(app, ["check", str(tmp_path / "recipe.yaml"), "demo:dense"])
    assert checked.exit_code == Exit.ACCEPTED and "; 28 of 28 linears" in checked.stdout
    lines = result.stdout.splitlines()
    assert lines[0] == "# compress run recipe.yaml demo:dense --out demo-dense-recipe"
    assert lines[1].startswith("# 4 bits, group 128, by GPTQ with QEP; FP8 cache: ") and any(line.startswith("# Why: warn; ") for line in lines)
    assert "models of 2023-24" in result.stdout and "5T tokens" in result.stdout and "Expected change: hellaswag -0.6 %" in result.stdout


def test_a_recipe_is_written_where_asked_but_over_nothing(tmp_path: Path) -> None:
    command = ["advise", "demo:dense", "--memory", "1GiB", "--engine", "sglang", "--out", str(tmp_path / "mine.yaml"), "--json"]
    result = CliRunner().invoke(app, command)
    assert (tmp_path / "mine.yaml").read_text() == json.loads(result.stdout)["recipe"]
    assert "demo-dense-mine" in result.stdout
    again = CliRunner().invoke(app, command)
    assert again.exit_code == Exit.BAD_INPUT and "cannot be written (File exists)" in again.stdout


def test_what_collapses_is_refused_with_reasons() -> None:
    result = CliRunner().invoke(app, ["advise", "demo:dense", "--memory", "3MB", "--engine", "vllm"])
    assert result.exit_code == Exit.BAD_INPUT and not result.stdout
    assert "error: w3: models of about 1B and less fall apart at 3 bits; take 4 bits, or a larger model at 3" in result.stderr


def test_advice_needs_no_torch() -> None:
    code = (
        "import sys; from compress.cli import app\n"
        "try: app(['advise', 'demo:moe', '--memory', '20MB', '--engine', 'vllm', '--json'])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True, stdout=subprocess.DEVNULL)
