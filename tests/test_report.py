"""The page: whole whatever a run skipped, escaped, self-contained, small, and drawn where the numbers say."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from copy import deepcopy
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from compress import plots, report
from compress.report import records
from compress.report.ledger import rows
from compress.report.text import DASH, percent_text, size_text, time_text

VOID = {"meta", "input", "br"}
SKIPPABLE = (
    "accepted", "compress", "model", "recipe", "recipe_hash", "seconds", "peak_bytes", "calibration", "passes", "size", "engines", "verification",
    "evaluation", "fallbacks", "gates", "linears", "transforms", "ledger", "environment",
)  # fmt: skip


def linear(name: str, block: int, **changes: Any) -> dict[str, Any]:
    return {
        "name": f"model.layers.{block}.{name}", "block": block, "bits": 4, "group_size": 128, "symmetric": True, "pass": "gptq", "tokens": 4096,
        "damp": 0.01, "error": 0.002, "fallback": None,
    } | changes  # fmt: skip


def tensor(name: str, shape: list[int], action: str = "quantized", why: str = "gptq: 4 bits, group 128") -> dict[str, Any]:
    size = 2 * math.prod(shape)
    stored = {"quantized": size // 4, "dropped": 0, "removed": 0}.get(action, size)
    return {"name": name, "shape": shape, "dtype": "BF16", "action": action, "why": why, "stored_bytes": stored}


def folded(kind: str, block: int, alpha: float) -> dict[str, Any]:
    name = f"model.layers.{block}.{kind}"
    return {
        "name": name,
        "block": block,
        "pass": "smooth",
        "kind": kind,
        "alpha": alpha,
        "beta": 1 - alpha,
        "error": [0.02, 0.01 + block / 1000],
        "fallback": None,
    }


def run_result(linears: list[dict[str, Any]], ledger: list[dict[str, Any]] | None = None, **changes: Any) -> dict[str, Any]:
    """A report of a run over `linears`."""
    figures = {"perplexity_ratio": 1.0057, "kl": 0.0074, "top1_agreement": 0.938, "accuracy_drop": 0.00125}
    return {
        "accepted": True,
        "compress": "0.1.0",
        "model": "demo:dense",
        "recipe": {"passes": [{"gptq": {"bits": 4, "damp": 0.01, "min_tokens": 0.25}}]},
        "recipe_hash": "5e1ee0f0135e64c2aaf9351cf5b6148566698eea5715f64b838b4d9129a048e1",
        "seconds": 100.9,
        "peak_bytes": 1_850_437_632,
        "calibration": {"source": "demo:text", "sequences": 128, "tokens": 65536, "sha256": "095e"},
        "passes": [{"name": "gptq", "seconds": 22.0, "peak_bytes": 580_546_560}],
        "size": {"before_bytes": 8_393_216, "after_bytes": 3_724_224, "bits_per_weight": 4.125, "quantized_weights": 3_145_728},
        "engines": {"transformers": "loads", "vLLM": "GPU only: 3-bit needs the Humming kernels", "SGLang": "refuses 3-bit: only 4 and 8"},
        "verification": {"tensors": 94, "weights_unpacked_by_compressed_tensors": 28, "mode": "full", "logits_max_difference": 0.0},
        "evaluation": {
            "protocol": {"data": "demo:heldout", "context": 512, "dtype": "bfloat16"},
            "baseline": {"perplexity": 52.989, "accuracy": 0.592},
            "compressed": {"perplexity": 53.289, "accuracy": 0.591, "kl": 0.0074, "top1_agreement": 0.938},
            "figures": figures,
            "intervals": {name: [value * 0.9, value * 1.1] for name, value in figures.items()},
        },
        "fallbacks": [record for record in linears if record.get("fallback")],
        "gates": [
            {"name": "perplexity_ratio", "value": 1.0057, "bound": {"max": 1.02}, "interval": [1.004, 1.007], "passed": True, "certain": True},
        ],
        "linears": linears,
        "transforms": [folded("qkv", block, 0.15 + 0.05 * block) for block in range(3)]
        + [folded("experts.down", 0, expert / 20) for expert in range(20)]
        + [{"name": "model.layers.0.mlp.up_proj", "block": 0, "pass": "smooth", "kind": "clip", "clipped": 0.013, "fallback": None}],
        "ledger": ledger if ledger is not None else [tensor(f"{record['name']}.weight", [256, 256]) for record in linears],
        "environment": {"versions": {"python": "3.11.7", "torch": "2.13.0"}, "machine": "x86_64", "cpus": 2},
    } | changes  # fmt: skip


def dense(**changes: Any) -> dict[str, Any]:
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
    return run_result([linear(kind, block, error=0.001 * (1 + block)) for block in range(4) for kind in kinds], **changes)


def moe(blocks: int, experts: int, **changes: Any) -> dict[str, Any]:
    """Expert 1 of block 0 saw one token less than it needs, and expert 2 of the last block none."""
    linears, ledger = [], []
    for block in range(blocks):
        for kind in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linears.append(linear(f"self_attn.{kind}", block))
            ledger.append(tensor(f"model.layers.{block}.self_attn.{kind}.weight", [2048, 2048]))
        for expert in range(experts):
            tokens = 511 if (block, expert) == (0, 1) else 0 if (block, expert) == (blocks - 1, 2) else 4000 + expert
            why = f"saw {tokens} of 65536 calibration tokens, needs 512" if tokens < 512 else None
            for kind, shape in (("gate_proj", [768, 2048]), ("up_proj", [768, 2048]), ("down_proj", [2048, 768])):
                error = None if why else 0.003 + 0.001 * expert
                linears.append(linear(f"mlp.experts.{expert}.{kind}", block, tokens=tokens, fallback=why, error=error, damp=None if why else 0.01))
                ledger.append(tensor(f"model.layers.{block}.mlp.experts.{expert}.{kind}.weight", shape))
    return run_result(linears, ledger, **changes)


class Page(HTMLParser):
    """Reads a page: balanced tags, visible text, attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.titles: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "figure":
            self.titles.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data.replace("\u00a0", " ") + " "
        if self.open and self.open[-1] == "h3":
            self.titles[-1] += data


def read(result: dict[str, Any]) -> Page:
    return Page(report.page(result))


def test_both_files_are_written(tmp_path: Path) -> None:
    result = dense()
    report.write(result, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == result
    assert (tmp_path / "report.html").read_bytes().isascii()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_key_figures_are_in_human_units() -> None:
    text = re.sub(r"\s+", " ", read(dense()).text)
    for expected in ("52.99 → 53.29", "1.0057", "93.8 %", "59.2 % → 59.1 %", "8.39 MB → 3.72 MB", "44.4 % of the original", "4.125"):
        assert expected in text
    assert "1 min 41 s" in text and "1.85 GB" in text
    assert "✓ Accepted" in text and "5e1ee0f0135e64c2" in text and "1.85e" not in text


def test_plots_of_a_dense_model() -> None:
    assert read(dense()).titles == ["Relative error of self_attn", "Relative error of mlp", "Size before and after", "Bits per layer"]


@pytest.mark.parametrize("key", SKIPPABLE)
@pytest.mark.parametrize("how", ["null", "missing"])
def test_what_a_run_skipped_is_left_out(key: str, how: str) -> None:
    result = moe(2, 3)
    if how == "null":
        result[key] = None
    else:
        del result[key]
    assert "None" not in read(result).text.replace("None saw too few", "")


def test_an_empty_report_is_still_a_page() -> None:
    assert "No linear was quantised" in read({}).text


def test_rounding_without_data_has_neither_tokens_nor_damping() -> None:
    records = [
        {"name": f"model.layers.{block}.mlp.up_proj", "block": block, "bits": 8, "group_size": 64, "symmetric": False, "pass": "rtn", "error": 0.0001}
        for block in range(2)
    ]
    page = read(run_result(records, calibration=None, evaluation=None, recipe={"passes": [{"rtn": {"bits": 8}}]}))
    assert "Raised damping" not in page.titles
    assert "No pass of the recipe needs data" in page.text and "The recipe skips the evaluation" in page.text
    assert "8 bits, group 64, asymmetric" in page.text and "a linear's weights" in page.text


def test_values_are_escaped_everywhere() -> None:
    evil = '"><script>alert(1)</script>&'
    record = linear(f"{evil}.q_proj", 0, fallback=evil, **{"pass": evil})
    ledger = [tensor(f"{evil}.weight", [2, 2], "kept", evil)]
    tasks = {"tasks": {evil: {evil: 1.0}}}
    evaluation = {"protocol": {evil: evil}, "baseline": tasks, "compressed": tasks}
    gates = [{"name": evil, "value": 1, "bound": {"max": 1}, "interval": [1, 1], "passed": True, "certain": True}]
    names = dict.fromkeys(("model", "compress", "recipe_hash"), evil)
    mappings = {key: {evil: evil} for key in ("engines", "recipe")}
    html = report.page(run_result([record], ledger, gates=gates, evaluation=evaluation, **names, **mappings))
    assert "<script>alert" not in html
    assert html.count("<script>") == report.page({}).count("<script>") == 2
    assert {tag for tag, name, _ in Page(html).attributes if name.startswith("on")} == set()


def test_nothing_is_fetched() -> None:
    html = report.page(moe(2, 3))
    assert not re.search(r"https?:|//[a-z]|@import|url\(", html)
    assert not [item for item in Page(html).attributes if item[1] in ("src", "srcset", "action", "data")]
    assert all(value.startswith("#") for _, name, value in Page(html).attributes if name == "href")
    assert "default-src 'none'" in html


def test_a_large_mixture_of_experts_stays_small() -> None:
    result = moe(48, 128)
    assert len(result["linears"]) > 18_000
    html = report.page(result)
    assert len(html) < 300_000
    assert "18,624 tensors" in Page(html).text


def test_starving_experts_are_seen() -> None:
    page = read(moe(3, 4))
    assert "Calibration tokens per expert" in page.titles
    assert "A dot per expert, 12 in all. 2 saw too few to be trusted." in page.text
    assert "needed: 512" in page.text and "least: 0 (expert 2)" in page.text
    loud = next(at for at, (_, name, value) in enumerate(page.attributes) if name == "class" and value == "dots loud")
    assert next(value for _, name, value in page.attributes[loud:] if name == "d").count("M") == 2


def test_well_fed_experts_are_said_to_be() -> None:
    result = moe(2, 4, recipe={"passes": [{"gptq": {"min_tokens": 0, "damp": 0.01}}]})
    for record in result["linears"]:
        record["tokens"] = max(record["tokens"], 1)
    assert "None saw too few." in read(result).text


def test_experts_are_summed_up_by_median_and_band() -> None:
    page = read(moe(3, 5))
    assert "bands reach from the least to the largest" in page.text
    assert "down_proj: 0.5 % (0.3 % to 0.7 %)" in page.text
    assert sum(value.startswith("band") for _, name, value in page.attributes if name == "class") == 3


def test_damping_is_drawn_only_where_it_was_raised() -> None:
    result = dense()
    result["linears"][5]["damp"] = 0.009999999776482582
    assert "Raised damping" not in read(result).titles
    result["linears"][5]["damp"] = 0.1
    page = read(result)
    assert "Raised damping" in page.titles and "k_proj: 0.1" in page.text


def test_gates_tell_failure_and_noise() -> None:
    gates = [
        {"name": "top1_agreement", "value": 0.9379, "bound": {"min": 0.937}, "interval": [0.9358, 0.9399], "passed": True, "certain": False},
        {"name": "kl", "value": 0.0074, "bound": {"max": 0.005}, "interval": [0.0072, 0.0076], "passed": False, "certain": True},
        {"name": "bits_per_weight", "value": None, "bound": {"max": 4.0}, "interval": [None, None], "passed": False, "certain": False},
    ]
    text = read(dense(gates=gates, accepted=False)).text
    assert "✗ Not accepted" in text and "✓ Accepted" not in text
    assert text.count("within noise") == 1 and text.count("✗ failed") == 2 and text.count("✓ passed") == 1
    assert "at least 93.7 %" in text and "not measured" in text and "93.6 to 94.0 %" in text


def test_fallbacks_are_listed_with_their_reasons() -> None:
    assert "saw 511 of 65536 calibration tokens" in read(moe(2, 3)).text
    assert re.search(r"Fallbacks\s+none", read(dense()).text)
    many = dense(fallbacks=[linear("mlp.up_proj", block, fallback="too few") for block in range(500)])
    assert "492 more" in read(many).text and "The other 300 are in report.json" in read(many).text


def test_tasks_stand_beside_each_other() -> None:
    result = dense()
    result["evaluation"]["baseline"]["tasks"] = {"arc_easy": {"acc": 0.71}}
    result["evaluation"]["compressed"]["tasks"] = {"arc_easy": {"acc": 0.705}}
    assert re.search(r"arc_easy\s+acc\s+0.71\s+0.705", read(result).text)


def test_transforms_are_a_row_per_kind() -> None:
    text = " ".join(read(dense()).text.split())
    assert "smooth: qkv 3 0.15, 0.2, 0.25 0.85, 0.8, 0.75 2.0 % \u2192 1.1 %" in text.replace("\u00a0", " ")
    assert "smooth: experts.down 20 0 to 0.95, median 0.475" in text and "smooth: clip 1 1.3" in text


def test_what_was_pruned_is_a_row_per_kind_of_linear() -> None:
    def removed(name: str, block: int, density: float) -> dict[str, Any]:
        more = {"pattern": "2:4", "density": density, "pass": "prune_nm", "method": "sparsegpt", "permuted": name == "down", "error": 0.05}
        return {"name": f"model.layers.{block}.{name}", "block": block, "fallback": None} | more

    result = run_result([], transforms=[removed("up", 0, 0.5), removed("up", 1, 0.5), removed("down", 0, 0.49)])
    result["verification"] |= {"pruned_linears": 3, "pruned_density": 0.497}
    text = " ".join(read(result).text.replace("\u00a0", " ").split())
    assert "model.layers.{0-1}.up 2:4 prune_nm, sparsegpt 50.0 % 5.0 %".replace("-", DASH) in text
    assert "down 2:4 prune_nm, sparsegpt, inputs reordered 49.0 % 5.0 %" in text
    assert "No linear was quantised. 3 linears pruned to 2:4." in text and "all 3 pruned linears keep their pattern; 49.7 % of" in text
    assert "What was rewritten before rounding" not in text


def test_sizes_are_split_by_what_happened() -> None:
    ledger = [
        tensor("model.layers.0.mlp.up_proj.weight", [1000, 1000]),
        tensor("model.embed_tokens.weight", [500, 1000], "kept", "outside the decoder blocks"),
        tensor("model.layers.0.norm.weight", [1000], "kept", "not a linear of the block (norm, bias or router)"),
        tensor("lm_head.weight", [500, 1000], "dropped", "tied to the embedding"),
        {"name": "old.bin", "action": "dropped", "why": "weights in another format"},
    ]
    size = {"before_bytes": 4_002_000, "after_bytes": 1_502_000, "bits_per_weight": 4.0, "quantized_weights": 1_000_000}
    text = read(run_result([linear("mlp.up_proj", 0)], ledger, size=size)).text
    for expected in ("quantised linears: 2.00 MB \u2192 500 kB", "kept: outside the decoder blocks: 1.00 MB ", "dropped: 1.00 MB \u2192 0 "):
        assert expected in text
    for expected in ("quantised linears: 2.00 MB ", "quantised linears: 500 kB "):  # on the parts of the bars
        assert expected in text


def test_what_is_rewritten_or_added_is_not_taken_for_quantised() -> None:
    ledger = [
        tensor("model.layers.0.mlp.up_proj.weight", [1000, 1000]),
        tensor("model.embed_tokens.weight", [500, 1000], "rotated", "by rotate, stored in its own dtype again"),
        tensor("model.layers.0.mlp.down_proj.weight", [500, 1000], "pruned", "by prune_structured, stored in its own dtype again")
        | {"stored_bytes": 600_000},
        tensor("model.layers.1.mlp.up_proj.weight", [1000, 1000], "removed", "by prune_depth"),
        tensor("lm_head.weight", [500, 1000], "added", "by rotate"),
    ]
    size = {"before_bytes": 6_000_000, "after_bytes": 3_100_000, "bits_per_weight": 4.0, "quantized_weights": 1_000_000}
    text = read(run_result([linear("mlp.up_proj", 0)], ledger, size=size)).text.replace("\u00a0", " ")
    for expected in ("quantised linears: 2.00 MB \u2192 500 kB", "rewritten, not quantised: 2.00 MB \u2192 1.60 MB", "added: 0 \u2192 1.00 MB"):
        assert expected in text
    assert "taken out: 2.00 MB \u2192 0" in text


def test_nothing_is_said_of_bits_where_nothing_was_rounded() -> None:
    cut = [{"name": "model.layers.2", "block": 2, "pass": "prune_depth", "method": "influence 0.07", "kind": "block 2", "before": 1, "after": 0}]
    cut += [
        {
            "name": f"model.layers.{block}.ffn",
            "block": block,
            "pass": "prune_structured",
            "method": "flap",
            "kind": "ffn_channel",
            "before": 768,
            "after": 576,
        }
        for block in range(4)
    ]
    ledger = [tensor("model.layers.1.mlp.up_proj.weight", [8, 8], "kept", "no pass takes this linear")]
    page = read(run_result([], ledger, transforms=cut))
    assert page.titles == ["Size before and after"]
    text = " ".join(page.text.split())
    assert "No linear was quantised. 1 block taken out by prune_depth. 768 of 3,072 ffn channels taken out by prune_structured." in text
    assert "prune_depth: influence 0.07 block 2 1 whole gone" in text and "prune_structured: flap ffn channel 4 768 576" in text


def test_kept_linears_are_on_the_map_of_bits() -> None:
    ledger = [tensor("model.layers.1.mlp.up_proj.weight", [8, 8], "kept", "no pass takes this linear")]
    assert "up_proj, block 1: bf16, kept" in read(run_result([linear("mlp.up_proj", 0)], ledger)).text


def test_ledger_rows_stand_for_all_their_tensors() -> None:
    ledger = [tensor(f"model.layers.{block}.mlp.experts.{expert}.up_proj.weight", [8, 8]) for block in (0, 1, 3) for expert in range(4)]
    (row,) = rows([*ledger, tensor("model.norm.weight", [8], "kept", "outside the decoder blocks")])[:1]
    assert row["name"] == "model.layers.{0\u20131,3}.mlp.experts.{0\u20133}.up_proj.weight"
    assert (row["count"], row["key"]) == (12, "model.layers.#.mlp.experts.#.up_proj.weight")
    assert (row["before"], row["after"]) == ("1.54\u00a0kB", "384\u00a0B")


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (999, "999 B"), (999_999, "1.00 MB"), (8_393_216, "8.39 MB"), (6e10, "60.0 GB"), (2e12, "2.00 TB")]
)
def test_bytes(value: float, text: str) -> None:
    assert size_text(value).replace("\u00a0", " ") == text


@pytest.mark.parametrize(("value", "text"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (59.96, "1 min 0 s"), (3599.6, "1 h 0 min"), (8123, "2 h 15 min")])
def test_seconds(value: float, text: str) -> None:
    assert time_text(value).replace("\u00a0", " ") == text


@pytest.mark.parametrize(("value", "text"), [(0, "0.0 %"), (1, "100.0 %"), (0.938, "93.8 %"), (0.99987, "99.987 %"), (0.0002, "0.020 %")])
def test_percents_have_the_digits_it_takes(value: float, text: str) -> None:
    assert percent_text(value).replace("\u00a0", " ") == text


def test_places_of_linears() -> None:
    assert records.place("model.layers.3.mlp.experts.17.up_proj", 3) == records.Place(3, "mlp.experts", "up_proj", 17)
    assert records.place("model.layers.3.mlp.up_proj.1", 3) == records.Place(3, "mlp", "up_proj.1", None)
    assert records.place("model.language_model.layers.10.self_attn.q_proj", 10) == records.Place(10, "self_attn", "q_proj", None)


@pytest.mark.parametrize(
    ("values", "domain"),
    [([], (0, 1, False)), ([0.0], (0, 1, False)), ([3.0, 4.0], (0, 4, False)), ([0.003, 0.3], (0.002, 0.5, True)), ([1e-5, 0, 7], (1e-5, 10, True))],
)
def test_axes_end_at_round_numbers(values: list[float], domain: tuple[float, float, bool]) -> None:
    low, high, log = plots.round_domain(values)
    assert (low, high, log) == (pytest.approx(domain[0]), pytest.approx(domain[1]), domain[2])


@pytest.mark.parametrize(("low", "high"), [(0.001, 0.01), (0.002, 0.5), (1e-8, 1.0), (1.0, 2.0), (1e-30, 1e30)])
def test_logarithmic_ticks_are_few_and_within(low: float, high: float) -> None:
    ticks = plots.Scale(low, high, 0, 100, log=True).ticks
    assert 2 <= len(ticks) <= 12
    assert all(low * 0.99 <= tick <= high * 1.01 for tick in ticks)


def test_scales_map_ends_to_ends() -> None:
    assert [plots.Scale(1, 100, 200, 0, log=True)(value) for value in (0, 1, 10, 100)] == pytest.approx([200, 200, 100, 0])
    assert plots.Scale(0, 4, 10, 50)(1) == 20
    assert plots.Scale(2, 2, 10, 50)(2) == 10


def test_labels_at_line_ends_do_not_touch() -> None:
    series = [plots.Series(f"kind{index}", {0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0}, index) for index in range(5)]
    svg = plots.along_blocks(series, range(2), (0.0, 4.0, False), "", str, "")
    places = sorted(float(y) for y in re.findall(r'class="name" x="[\d.]+" y="([\d.]+)"', svg))
    assert all(after - before >= plots.LINE - 0.1 for before, after in pairwise(places))
    assert places[-1] <= plots.BASE + plots.LINE


def test_a_gap_breaks_a_line_but_a_stride_does_not() -> None:
    assert plots._unbroken({0: 1.0, 1: 1.0, 3: 1.0}) == [[0, 1], [3]]
    assert plots._unbroken({0: 1.0, 2: 1.0, 4: 1.0}) == [[0, 2, 4]]


@pytest.mark.parametrize("error", [0.0, 1e-30, 1e-9, 1.0])
def test_extreme_errors_can_be_drawn(error: float) -> None:
    assert "Relative error of mlp" in read(run_result([linear("mlp.up_proj", 0, error=error), linear("mlp.up_proj", 1, error=0.5)])).titles


@pytest.mark.parametrize("kept", [True, False])
def test_residuals_are_told_with_what_they_are_good_for(kept: bool) -> None:
    loss = {"before": 3.7, "quantised": 3.9, "with residuals": 3.8 if kept else 4.0}
    record = {"name": "detach", "block": 0, "pass": "detach", "score": "pqi", "points": 2, "completeness": 0.998, "loss": loss, "fallback": None}
    result = dense(transforms=[record])
    if kept:
        result["linears"][0]["residuals"] = 15_728
        result["evaluation"]["without_residuals"] = {"perplexity": 54.21, "kl": 0.2}
        result["verification"]["residuals_left_out"] = True
    text = re.sub(r"\s+", " ", read(result).text)
    if kept:
        expected = (
            "15,728 weights have a residual beside their code. Loss on the calibration data, nats: 3.7000 before quantising, 3.9000 after, 3.8000"
        )
        assert "Perplexity without residuals 54.21" in text and "KL divergence 0.2 nats" in text and "It leaves residuals out" in text
    else:
        expected = "No weight was given a residual. Loss on the calibration data, nats: 3.7000 before quantising, 3.9000 after; residuals would"
    assert expected in text and "adds up to 99.80 % of" in text


def low_rank(name: str, block: int, rank: int, error: float) -> dict[str, Any]:
    kind = "left whole" if rank == 128 else name.rpartition(".")[2]
    record = {"name": f"model.layers.{block}.{name}", "block": block, "pass": "low_rank", "method": "svd_llm", "kind": kind, "tokens": 64}
    return record | {"rank": [128, rank], "error": error, "fallback": None}


def test_linears_of_low_rank_are_told_with_those_left_whole() -> None:
    records = [low_rank("mlp.up_proj", 0, 32, 0.04), low_rank("mlp.up_proj", 1, 16, 0.08)]
    records += [low_rank("mlp.down_proj", block, 128, 0.0) for block in (0, 1)]
    page = read(run_result([], transforms=records))
    text = " ".join(page.text.split())
    assert "2 linears made two of low rank by low_rank." in text
    assert "up_proj svd_llm 2 128 32, 16 4 %, 8 %" in text
    assert f"model.layers.{{0{DASH}1}}.mlp.down_proj svd_llm 2 128 left whole nothing" in text
    assert "Relative error of mlp" in page.titles and "up_proj, block 1: rank 16" in page.text


def test_the_page_says_how_it_was_made() -> None:
    digest = "ab" * 32
    named = {"command": "compress run w4 demo:dense --out 'my folder'", "source": {"name": "demo:dense", "sha256": {"model.safetensors": digest}}}
    text = read(dense(**named)).text
    assert "compress run w4 demo:dense --out 'my folder'" in text and digest in text and "2.13.0" in text and "min_tokens" in text


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        ("charts", ("linears", "ledger", "size")),
        ("figures", ("size", "evaluation", "seconds", "peak_bytes")),
        ("engines", ("engines",)),
        ("details", ("linears", "ledger")),
    ],
)
def test_a_section_is_there_with_its_records_and_gone_without(section: str, keys: tuple[str, ...]) -> None:
    def found(result: dict[str, Any]) -> tuple[bool, bool]:
        attributes = read(result).attributes
        return ("h2", "id", section) in attributes, ("a", "href", f"#{section}") in attributes

    assert found(dense(transforms=[])) == (True, True)
    assert found({key: value for key, value in dense(transforms=[]).items() if key not in keys}) == (False, False)


def test_the_verdict_comes_first_and_says_what_failed() -> None:
    html = report.page(dense())
    assert 0 < html.index('id="gates"', html.index("<h1")) < html.index('class="tiles"') and "The gate passed." in Page(html).text
    bad = {"name": "kl", "value": 0.1, "bound": {"max": 0.01}, "interval": [0.05, 0.2], "passed": False, "certain": True}
    noisy = {"name": "fallbacks", "value": 1, "bound": {"max": 1}, "interval": [0, 2], "passed": True, "certain": False}
    assert "Failed: KL divergence. Within noise, so that other data" in read(dense(gates=[bad, noisy], accepted=False)).text
    assert "Both gates passed." in read(dense(gates=[noisy | {"certain": True}] * 2)).text
    assert "so any loss is accepted" in read(dense(gates=[])).text and "Nothing was judged" in read({}).text


def test_tables_have_heads_and_pictures_have_words() -> None:
    html = report.page(moe(2, 3))
    page = Page(html)
    assert html.count("<table") == html.count("<thead>") == html.count("<caption>") and "<th>" not in html
    bodies = re.findall(r"<tbody>\s*(.*?)\s*</tbody>", html, re.DOTALL)
    assert bodies and all(
        row.lstrip().startswith('<th scope="row"') for body in bodies for row in re.findall(r"<tr[^>]*>(.*?)</tr>", body, re.DOTALL)
    )
    for attribute in ("role", "aria-label"):
        assert len([value for tag, name, value in page.attributes if tag == "svg" and name == attribute and value]) == html.count("<svg")
    assert ("html", "lang", "en") in page.attributes and re.search("<title>demo:dense - compress report</title>", html)
    anchors = [value[1:] for tag, name, value in page.attributes if name == "href"]
    assert set(anchors) <= {value for _, name, value in page.attributes if name == "id"}


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the floats of `value` are."""
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from [(*path, key)] if isinstance(each, float) else leaves(each, (*path, key))


def test_a_model_that_is_broken_beyond_measuring_has_a_page() -> None:
    loss = {"before": 3.7, "quantised": 3.9, "with residuals": 3.8}
    detach = {"name": "detach", "block": 0, "pass": "detach", "score": "pqi", "points": 2, "completeness": 0.998, "loss": loss, "fallback": None}
    cache = [{"name": "c", "block": block, "pass": "kv_quant", "granularity": "head", "key_error": 0.01, "value_error": 0.02} for block in (0, 1)]
    search = {"fitness": {"before": -3.9, "after": -4.1, "one_shot": -4.2}, "held_out": {"before": -3.7, "after": -3.8}, "evaluated": 18}
    eep = {
        "name": "model.layers.0.experts",
        "block": 0,
        "pass": "eep",
        "kind": "expert",
        "method": "likelihood",
        "before": 4,
        "after": 2,
        "kept": [0, 1],
    }
    heal = {"name": "m", "block": 0, "pass": "heal", "steps": 3, "tokens": 9, "loss": [3.9, 3.8], "copies": [3.8, 3.9], "averaged": 1}
    seeing = {
        "name": "model.layers.0.mlp.down",
        "block": 0,
        "pass": "mbq",
        "kind": "down",
        "sensitivity": {"vision": 0.1, "text": 0.2, "counted": 0.5},
    }
    transforms = [*dense()["transforms"], detach, *cache, eep | search, heal, seeing, low_rank("mlp.up_proj", 0, 32, 0.04)]
    result = dense(transforms=transforms, model="m")
    result["linears"][0]["block_loss"] = [2.0, 1.0]
    result["evaluation"] |= {"without_residuals": {"perplexity": 54.2, "kl": 0.2}, "modalities": [{"block": "m", "vision": 0.1, "text": 0.2}]}
    for side in ("baseline", "compressed"):
        result["evaluation"][side]["tasks"] = {"arc": {"acc": 0.5}}
    unit = {"name": "model.layers.0.o", "weights": 64, "bits": 4, "scores": {"2": 0.3, "4": 0.1}}
    uniform = [{"bits": 4, "bits_per_weight": 4.25, "predicted": 0.11}]
    plan = {"score": "round 1", "predicted": 0.1, "figures": {"bits_per_weight": 4.25}, "uniform": uniform, "measured": {"kl": 0.2}}
    result["allocation"] = plan | {"curve": [[2.25, 0.5], [4.25, 0.1]], "units": [unit], "other_model": False}
    text = read(result).text
    assert "Bits against predicted loss" in text and "predicted by kl, round 1, nats" in text and "eep: likelihood, nats per token" in text
    sizes = ("seconds", "bits_per_weight", "min", "max", "damp")
    once = {tuple("*" if isinstance(key, int) else key for key in path): path for path in leaves(result) if path[0] != "recipe"}
    for path in [*once.values(), ("allocation", "curve", 0, 1)]:
        if path[-1] not in sizes:
            broken = deepcopy(result)
            inside = broken
            for key in path[:-1]:
                inside = inside[key]
            inside[path[-1]] = math.inf
            assert "None" not in read(report.finite(broken)).text, path
    lost = dense(gates=[{"name": "kl", "value": math.nan, "bound": {"max": 0.01}, "interval": [math.nan] * 2, "passed": False, "certain": True}])
    lost["evaluation"]["compressed"]["perplexity"] = math.inf
    text = " ".join(read(report.finite(lost)).text.split())
    assert "52.99 \u2192 not finite" in text and "KL divergence \u2717 failed not finite at most 0.01 nats" in text
