"""Pruning beside fewer bits, from tables."""

from __future__ import annotations

from typing import Any

import pytest

from compress import demo, planning, recipe, tradeoff, view
from compress.checkpoint import Checkpoint
from compress.layout import Layout


def planned(*passes: dict[str, Any]) -> dict[str, Any] | None:
    layout = Layout(Checkpoint(demo.path("dense")))
    chosen = recipe.validate({"passes": list(passes)}, "r.yaml")
    found: dict[str, Any] | None = planning.plan(chosen, layout, recipe.check(chosen, layout, "r.yaml"))["instead"]
    return found


CUT = {"prune_structured": {"method": "flap", "keep": {"ffn_channel": 0.75}, "multiple_of": 64}}
HALF = {"prune_nm": {"pattern": "2:4"}}


def test_a_curve_goes_through_its_points_and_on_beyond_them() -> None:
    points = {1.0: 0.4, 2.0: 0.1, 4.0: 0.0}
    assert all(tradeoff.between(points, place) == pytest.approx(value) for place, value in points.items())
    assert tradeoff.between(points, 1.5) == pytest.approx((0.4 * 0.1) ** 0.5) and tradeoff.between(points, 3.0) == pytest.approx(0.05)
    assert tradeoff.between(points, 0.0) == pytest.approx(1.6)


def test_what_prunes_nothing_is_held_against_nothing() -> None:
    assert planned({"gptq": {}}) is None


def test_losses_of_passes_add_up_and_healing_takes_some_back() -> None:
    cut, half, both, healed = (planned(*passes) for passes in ((CUT,), (HALF,), (CUT, HALF), (HALF, {"heal": {"tokens": 1000}})))
    assert cut and half and both and healed
    assert both["pruned"] == pytest.approx(cut["pruned"] + half["pruned"])
    assert healed["pruned"] == pytest.approx(half["pruned"] * tradeoff.measured().healed)
    assert half["pruned"] == pytest.approx(tradeoff.measured().kept[0.5])


def test_bits_are_those_that_make_as_many_bytes() -> None:
    layout = Layout(Checkpoint(demo.path("dense")))
    found = planned(CUT)
    assert found
    weights = sum(linear.rows * linear.columns for linear in layout.linears.values())
    removed = 3 * 192 * 256 * len(layout.blocks)
    assert found["bits"] == pytest.approx(16 * (weights - removed) / weights)
    with_zeros = planned(HALF)
    assert with_zeros and with_zeros["bits"] == 16


@pytest.mark.parametrize(
    ("pruned", "bits", "quantized", "said"),
    [
        (0.2, 3.4, 0.02, "fewer bits lose less"),
        (0.02, 2.1, 0.2, "pruning loses less"),
        (0.1, 3.0, 0.11, "neither is clearly better"),
        (0.1, 1.5, None, "pruning is what is left"),
        (0.1, 16, 0.0, "save no bytes"),
    ],
)
def test_it_is_said_which_loses_less(pruned: float, bits: float, quantized: float | None, said: str) -> None:
    assert said in view._instead({"pruned": pruned, "bits": bits, "quantized": quantized})


def test_every_method_of_every_pass_that_prunes_has_a_figure() -> None:
    from typing import get_args

    from compress.passes import low_rank, prune_experts, prune_nm, prune_structured

    def methods(options: Any) -> set[str]:
        return set(get_args(options.Pass.model_fields["method"].annotation))

    assert methods(prune_structured) | methods(low_rank) | {"prune_depth"} == tradeoff.measured().structured.keys()
    assert methods(prune_nm) == tradeoff.measured().nm.keys()
    assert methods(prune_experts) | {"eep"} == tradeoff.measured().mixtures.keys()


def test_fewer_experts_are_held_against_fewer_bits_too() -> None:
    layout = Layout(Checkpoint(demo.path("moe")))
    for step in ({"prune_experts": {"keep": 0.5}}, {"eep": {"keep": 0.5}}, {"prune_experts": {"keep": 1.0, "active": 2}}):
        chosen = recipe.validate({"passes": [step]}, "r.yaml")
        found = planning.plan(chosen, layout, recipe.check(chosen, layout, "r.yaml"))["instead"]
        name, options = next(iter(step.items()))
        saved = "active" not in options
        lost = tradeoff.measured().experts[0.5] * tradeoff.measured().mixtures["reap" if name != "eep" else "eep"]
        assert found["pruned"] == pytest.approx(lost if saved else 0)
        assert (found["bits"] < 16) == saved
