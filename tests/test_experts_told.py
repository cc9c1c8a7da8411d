"""What a page says of experts, of a search and of healing."""

from __future__ import annotations

from typing import Any

from compress.experts_told import experts, outcomes
from compress.report import page

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
    (row,) = outcomes([SEARCHED, SEARCHED])
    assert "1,210 choices" in row["what"] and row["seen"] == "-0.5000 → -0.4000; best one-shot -0.4500" and row["held"] == "-0.5200 → -0.4300"


def test_healing_is_told_once_with_its_losses() -> None:
    (row,) = outcomes([HEALED | {"name": f"model.layers.{block}"} for block in range(4)])
    assert row["held"] == "4.2000 → 4.0500" and "600,000 tokens" in row["what"]


def test_the_page_has_all_of_it() -> None:
    html = page({"transforms": [PRUNED, HEALED | {"name": "model.layers.0"}, SEARCHED]})
    assert "<h2>Experts</h2>" in html and "0 (expert 1), 24, 1,200 (expert 2)" in html
    assert "best one-shot -0.4500" in html and "4.2000 &#8594; 4.0500" in html
    assert "<h2>Experts</h2>" not in page({})
