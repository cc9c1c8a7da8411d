"""The table of results, from documents as the benchmarks write them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAMP = {
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789abcdef",
    "hardware": {"cpu": "A Processor", "cores": 2, "memory_bytes": 1},
    "versions": {"ours": {"torch": "2"}, "llmcompressor": {"llmcompressor": "0.14", "torch": "2"}, "gptqmodel": None},
}


@pytest.fixture(scope="module")
def results() -> Any:
    spec = importlib.util.spec_from_file_location("results", ROOT / "scripts" / "results.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(grid: str, tool: str, method: str, *losses: float, draws: int = 2, calibrated: bool = True, status: str = "done") -> dict[str, Any]:
    cell = {"grid": grid, "tool": tool, "method": method}
    summary = {f"text-{index}": {"excess_loss": loss} for index, loss in enumerate(losses)}
    runs = [{"losses": {}} for _ in range(draws)] if losses else [{"error": status}]
    return {"cell": cell, "calibrated": calibrated, "status": status, "summary": summary, "runs": runs}


def documents() -> list[tuple[str, dict[str, Any]]]:
    rows = [
        row("w3g128-asym", "llmcompressor", "gptq", 0.4, 0.3),
        row("w3g128-asym", "llmcompressor", "gptq-mse", 0.2, 0.4, draws=1),
        row("w3g128-asym", "gptqmodel", "gptq", status="exit 1: no such option"),
        row("w3g128-asym", "hqq", "hqq", 0.7, 0.8, draws=1, calibrated=False),
        row("w3g128-asym", "ours", "rtn", 0.9, 0.8, draws=1, calibrated=False),
        row("w3g128-asym", "ours", "gptq qep", 0.1, 0.2),
        row("w8a8", "ours", "rtn mse", 0.01, 0.02),
    ]
    protocol = {"model": "toy", "planted_outliers": None, "context": 512, "calibration": {"samples": 128, "length": 512}}
    baseline = {"text-0": {"perplexity": 10.0}, "text-1": {"perplexity": 20.0}}
    sides = {
        "ours": {"status": "done", "cpu_seconds": {"median": 3.0}, "seconds": {"median": 2.0}},
        "llmcompressor": {"status": "done", "cpu_seconds": {"median": 30.0}, "seconds": {"median": 20.0}},
        "gptqmodel": {"status": "not installed"},
    }
    shares = [
        {"threads": 1, "bits": 4, "digits": digits, "share": share} for digits in (1, 2) for share in (0.5 / digits, 0.6 / digits, 0.9 / digits)
    ]
    taken = {"two digits": 4.0, "one digit": 2.0, "torch int4": 8.0, "torch bfloat16": 16.0}
    decoded = [
        {"bits": 4, "digits": digits, "threads": 2, "rival": "Q4_0", "tokens_per_second": {"ours": 12.0 / digits, "llamacpp": 5.0}}
        for digits in (2, 1)
    ]
    return [
        ("quality", {"stamp": STAMP, "protocol": protocol, "baseline": baseline, "results": rows}),
        ("speed", {"stamp": STAMP, "protocol": {"shape": {"hidden": 2048, "ffn": 5632, "layers": [2, 4]}}, "sides": sides}),
        ("memory", {"stamp": STAMP, "checkpoint_bytes": 6 * 10**9, "ratio": 0.2, "run": {"peak_rss_bytes": 12 * 10**8}}),
        ("kill", {"kills": 30, "identical": 30}),
        ("gemv", {"stamp": STAMP, "results": shares, "batches": [{"inputs": 16, "rows": 64, "columns": 32, "milliseconds": taken}]}),
        ("decode", {"stamp": STAMP, "preset": "3b", "results": decoded}),
        ("sass", {"results": [{"target": "sm_90", "bits": 4, "digits": digits, "tokens": 1, "per_weight": 0.6 * digits} for digits in (1, 2)]}),
    ]


def test_every_benchmark_has_its_row_and_every_rival_its_column(results: Any) -> None:
    table = results.render(documents()).splitlines()
    assert table[0] == "| | compress | LLM Compressor | GPTQModel | HQQ | plain rounding |"
    assert table[2] == (
        "| W3 g128 asymmetric, excess loss | 0.1000 / 0.2000 (gptq qep) | 0.2000 / 0.4000* | failed | 0.7000 / 0.8000 | 0.9000 / 0.8000 |"
    )
    assert table[3] == "| W8A8 integers, excess loss | 0.0100 / 0.0200 (rtn mse) |  |  |  |  |"
    assert table[4] == "" and table[5] == "| | compress | LLM Compressor | GPTQModel | llama.cpp | torch |"
    assert table[7] == "| GPTQ of one Llama block (2048 wide, MLP 5632), CPU seconds | 3.0 | 30.0 | not installed |  |  |"
    assert table[9] == "| GPTQ of a checkpoint of 6.00 GB, peak memory | 1.20 GB (20%) |  |  |  |  |"
    assert table[10] == "| killed at random moments, 30 times, and started again | 30 byte-identical |  |  |  |  |"
    assert table[11] == "| W4 times one input, one thread, share of the speed of reading memory | 30% / 60% (two digits / one) |  |  |  |  |"
    assert table[12] == "| W4 64 x 32 times 16 inputs, one thread, ms | 4.0 (2.0 with one digit) |  |  |  | 8.0 (int4), 16.0 (bfloat16) |"
    assert table[13] == "| decoding 3b in 4 bits, 2 threads, tokens/s | 6.0 (12.0 with one digit) |  |  | 5.0 (Q4_0) |  |"
    assert table[14].startswith("| GPU instructions per weight, sm_90 (two digits / one; speed not measured) | W4 1.20 / 0.60 |")
    noted = "\n".join(table[16:])
    assert "mean of 2 draws" in noted and "LLM Compressor 0.14." in noted and "A Processor, 2 cores, 2026-01-02, commit 012345678." in noted


def test_the_readme_has_the_rows_it_asks_for_and_misses_none_in_silence(results: Any) -> None:
    wanted = ("W8A8 integers, excess loss", "killed at random moments, 30 times, and started again")
    table = results.brief_tables(documents(), wanted).splitlines()
    assert [line.partition(" |")[0] for line in table] == ["|", "|---|---:|", f"| {wanted[0]}", "", "|", "|---|---:|", f"| {wanted[1]}"]
    with pytest.raises(SystemExit, match="no such row"):
        results.brief_tables(documents(), (*wanted, "no such row"))


def test_every_grid_has_its_label_and_planted_outliers_are_said(results: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench" / "rivals"))
    import protocol

    assert list(results.GRIDS) == list(protocol.GRIDS)
    name, document = documents()[0]
    planted = document | {"protocol": document["protocol"] | {"planted_outliers": {"factor": 32}}}
    assert results.ROWS[name](planted)[-1][0] == "W8A8 integers, outliers planted, excess loss"


def test_a_readme_is_changed_between_the_markers_only(results: Any) -> None:
    before = f"a\n{results.BEGIN}\nold\n{results.END}\nz\n"
    assert results.replaced(before, "new") == f"a\n{results.BEGIN}\nnew\n{results.END}\nz\n"
    with pytest.raises(SystemExit):
        results.replaced("no markers", "new")


def test_pruning_is_a_row_per_table_with_the_least_loss_first(results: Any) -> None:
    found = {
        "structured/random-0": [{"excess_loss": 0.4}],
        "structured/random-1": [{"excess_loss": 0.6}],
        "structured/ddp": [{"excess_loss": 0.05}, {"excess_loss": 0.07}],
        "structured/flap": [{"error": "exit 1"}],
        "nm/alps": [{"excess_loss": 0.12}],
        "nm/alps 4:8": [{"excess_loss": 0.06}],
    }
    rows = dict(results.pruning({"results": found}))
    assert rows["a fifth of each block's parameters taken out of MLPs, excess loss"] == {"ours": "0.060 (ddp), 0.500 (random)"}
    assert list(rows.values())[1] == {"ours": "0.120* (alps)"} and len(rows) == 2


def test_gguf_is_a_row_of_all_files(results: Any) -> None:
    rows = [
        {"model": model, "texts": 20, "following": {"texts": 20}, "alone": {"texts": 12}, "plain": {"texts": 7}}
        for model in ("dense", "dense", "moe")
    ]
    ((label, cells),) = results.gguf({"tokens": 64, "results": rows})
    assert label == "3 GGUF files of demo:dense and demo:moe in llama.cpp, texts all of whose 64 tokens are those meant"
    assert cells == {"ours": "60 of 60 (36 with steps of our own, 21 with inputs that are not rounded)"}


def test_experts_have_rows_of_loss_and_of_the_task(results: Any) -> None:
    found = {
        "half/reap": [{"excess_loss": 0.2, "accuracy_drop": 0.01}],
        "half/eep for pairs": [{"excess_loss": 0.3, "accuracy_drop": -0.05}],
        "active/2 of 4": [{"excess_loss": 0.1, "accuracy_drop": 0.0}],
    }
    rows = dict(results.experts({"results": found}))
    assert rows["half of the experts, or of their channels, excess loss"] == {"ours": "0.200 (reap), 0.300 (eep for pairs)"}
    assert rows["half of the experts, points of accuracy lost on minimal pairs"] == {"ours": "-5.0 (eep for pairs), 1.0 (reap)"}
    assert rows["two experts to a token instead of four, excess loss"] == {"ours": "0.100 (2 of 4)"} and len(rows) == 3


def test_models_that_see_have_means_with_their_errors(results: Any) -> None:
    found = {
        "w3/awq": [{"excess_loss": 0.01, "kl": 0.002, "accuracy_drop": 0.02}, {"excess_loss": 0.03, "kl": 0.004, "accuracy_drop": 0.02}],
        "w3/rtn": [{"excess_loss": 0.015, "kl": 0.005, "accuracy_drop": 0.03}],
        "w3/mbq": [{"error": "exit 1"}],
    }
    rows = dict(results.vlm({"results": found}))
    assert rows["W3 g128 of a model that sees, excess loss of answers"] == {"ours": "0.0150 (rtn), 0.0200 ± 0.0100 (awq)"}
    assert rows["W3 g128 of a model that sees, KL divergence of answers"] == {"ours": "0.0030 ± 0.0010 (awq), 0.0050 (rtn)"}
    assert rows["W3 g128 of a model that sees, points of answers lost"] == {"ours": "2.0 ± 0.0 (awq), 3.0 (rtn)"} and len(rows) == 3


def test_caches_have_rows_of_loss_recall_and_steps(results: Any) -> None:
    found = {"20 %/aware": [{"excess_loss": 0.01, "kl": 0.03}], "20 %/svd": [{"excess_loss": -0.02, "kl": 0.2}]}
    rows = dict(results.kv({"protocol": {"length": 512}, "results": found}))
    assert rows["cache of 20 % of the channels, 512 tokens, excess loss"] == {"ours": "-0.020 (svd), 0.010 (aware)"}
    assert rows["cache of 20 % of the channels, 512 tokens, KL divergence"] == {"ours": "0.030 (aware), 0.200 (svd)"} and len(rows) == 2
    recalled = {
        "results": {"dense": {"128": [1.0, 0.0]}, "aware": {"64": [1.0, 0.0], "24": [0.98, 0.1]}, "svd": {"64": [1.0, 0.1], "24": [0.9, 0.5]}}
    }
    rows = dict(results.kv_recall(recalled))
    assert rows["associative recall through a cache of 24 of 128 channels, answers right, %"] == {"ours": "98.0 (aware), 90.0 (svd)"}
    assert rows["associative recall through a cache of half of the channels, loss of answers"] == {"ours": "0.000 (aware), 0.100 (svd)"}
    sides = {
        "dense": {"seconds": 0.01, "held_bytes": 2e6},
        "joint": {"seconds": 0.02, "held_bytes": 1e6},
        "rebuilt": {"seconds": 0.03, "held_bytes": None},
    }
    rows = dict(results.kv_decode({"protocol": {"keep": 0.2}, "results": {"8192": sides}}))
    assert rows["cache of 20 % of the channels, a Llama-3-8B layer, 8192 tokens, ms a step"] == {
        "ours": "20.0 (joint), 30.0 (rebuilt)",
        "torch": "10.0",
    }
    assert rows["cache of 20 % of the channels, a Llama-3-8B layer, 8192 tokens, MB held"] == {"ours": "1.0 (joint)", "torch": "2.0"}


def test_the_gate_has_what_it_caught_and_what_it_failed_for_nothing(results: Any) -> None:
    planted = {"layer": {"runs": 20, "caught": 20, "caught_by_tests": 19}, "tokenizer": {"runs": 20, "caught": 18, "caught_by_tests": 0}}
    found = {"planted": planted, "unchanged": {"seeds": {"runs": 100, "failed": 2}, "order": {"runs": 50, "failed": 1}}}
    rows = dict(results.gate({"results": {"demo:dense": found}}))
    assert rows == {
        "`compress gate`, demo:dense in 4 bits, planted regressions caught": {
            "ours": "20 of 20 (a block's scales x 1.05; 19 by tests alone), 18 of 20 (a merge gone; 0 by tests alone)"
        },
        "`compress gate`, demo:dense, failures where nothing got worse": {
            "ours": "2 of 100 (other calibration), 1 of 50 (other order of sums, bounds of 0)"
        },
    }
