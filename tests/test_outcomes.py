"""What a page says of experts, of a search and of healing."""

from __future__ import annotations

from typing import Any

from compress.report import page
from compress.report.experts import experts
from compress.report.template import AT_ONCE
from compress.report.training import block_losses, outcomes

PRUNED: dict[str, Any] = {
    "name": "model.layers.0.experts", "pass": "prune_experts", "kind": "expert", "method": "reap", "before": 4, "after": 2, "kept": [0, 3],
    "tokens": [40, 0, 1200, 7], "super_experts": [3],
}  # fmt: skip
SEARCHED: dict[str, Any] = PRUNED | {
    "pass": "eep", "method": "margin", "mixed": True, "mapped": True, "active": 1, "tokens": None, "super_experts": None, "evaluated": 1210,
    "fitness": {"before": -0.5, "one_shot": -0.45, "after": -0.4, "best": -0.39}, "held_out": {"before": -0.52, "after": -0.43},
}  # fmt: skip
HEALED: dict[str, Any] = {"pass": "heal", "kind": "linears", "steps": 1500, "loss": [4.2, 4.05], "tokens": 600_000}


def test_a_starved_expert_is_named_beside_those_that_stay() -> None:
    (row,) = experts([PRUNED])
    assert (row["block"], row["kept"], row["which"]) == ("model.layers.0", "2 of 4", "0, 3")
    assert row["tokens"] == "0 (expert 1), 24, 1,200 (expert 2)" and row["how"] == "protected 3"


def test_a_search_is_told_beside_the_best_one_shot() -> None:
    assert experts([SEARCHED])[0]["how"] == "mixtures of all, router with a map, 1 to a token"
    seen, held = outcomes({"transforms": [SEARCHED, SEARCHED]})
    assert "1,210 choices" in seen["note"] and "best by a one-shot score gave \u22120.4500" in seen["note"]
    assert (seen["before"], seen["after"], seen["change"]) == ("\u22120.5000", "\u22120.4000", "+0.1000")
    assert (held["on"], held["before"], held["after"]) == ("what it did not see", "\u22120.5200", "\u22120.4300")


def test_healing_is_told_once_with_its_losses() -> None:
    (row,) = outcomes({"transforms": [HEALED | {"name": f"model.layers.{block}"} for block in range(4)]})
    assert (row["before"], row["after"]) == ("4.2000", "4.0500") and "600,000 tokens" in row["note"]
    assert row["change"] == "\u22120.1500, perplexity \u00d70.8607"


def test_copies_and_branches_of_healing_are_told() -> None:
    record = HEALED | {"name": "model.layers.0", "copies": [4.06, 4.07, 4.1], "averaged": 2, "branch": 16, "branch_after": "merge"}
    (row,) = outcomes({"transforms": [record]})
    assert "3 copies ended at 4.0600, 4.0700, 4.1000, 2 averaged" in row["note"] and "one weight per 16 inputs, merge afterwards" in row["note"]


def test_healing_that_found_nothing_better_says_so() -> None:
    (row,) = outcomes({"transforms": [HEALED | {"name": "model.layers.0", "loss": [4.2, 4.2]}]})
    assert row["change"] == "none" and "the weights stayed as they were" in row["note"]


def test_learned_rounding_is_told_by_block() -> None:
    def learned(block: int, losses: list[float | None]) -> dict[str, Any]:
        return {"name": f"model.layers.{block}.mlp.up_proj", "block": block, "block_loss": losses, "bits": 4, "group_size": 32, "symmetric": True,
                "pass": "autoround", "error": 0.1}  # fmt: skip

    linears = [learned(0, [4.0, 1.0]), learned(0, [4.0, 1.0]), learned(1, [2.0, 2.5]), learned(2, [8.0, 4.0]), learned(3, [None, 1.0])]
    assert block_losses(linears) == {0: (4.0, 1.0), 1: (2.0, 2.5), 2: (8.0, 4.0)}
    (row,) = outcomes({"linears": linears})
    assert (row["before"], row["after"]) == ("4", "2.5") and row["note"] == "median over 3 blocks; better in 2 of them"
    assert "Training of the rounding" in page({"linears": linears})


def test_the_page_has_all_of_it() -> None:
    html = page({"transforms": [PRUNED, HEALED | {"name": "model.layers.0"}, SEARCHED]})
    assert '<h2 id="experts">Experts</h2>' in html and "0 (expert 1), 24, 1,200 (expert 2)" in html
    assert "best by a one-shot score gave &#8722;0.4500" in html and "perplexity &#215;0.8607" in html
    assert "<h2>Experts</h2>" not in page({})


def test_columns_that_say_nothing_are_left_out_and_many_rows_are_folded() -> None:
    blocks = [SEARCHED | {"name": f"model.layers.{block}.experts"} for block in range(AT_ONCE + 3)]
    html = page({"transforms": blocks})
    assert "Calibration tokens: least" not in html and "Experts that stay" in html
    assert "<summary>3 more</summary>" in html and html.index("<summary>3 more") < html.index(f"model.layers.{AT_ONCE}<")
    assert html.index(f"model.layers.{AT_ONCE - 1}<") < html.index("<summary>3 more")
    assert "more</summary>" not in page({"transforms": blocks[:AT_ONCE]})
    assert "Calibration tokens: least" in page({"transforms": [PRUNED]})
