"""Gates against what the paper says of them, and by finite differences."""

from __future__ import annotations

import pytest
import torch

from compress.numerics.gates import FIRST_MIDDLE, LAST_MIDDLE, Multipliers, gate, in_order, middle, retention


@pytest.mark.parametrize("halfway", [0.5, 0.17, 0.05])
def test_a_unit_counts_not_half_or_whole_at_nothing_the_middle_and_twice_that(halfway: float) -> None:
    found = retention(torch.tensor([0.0, halfway, 2 * halfway, 9.0, -1.0], dtype=torch.float64), halfway)
    assert torch.allclose(found, torch.tensor([0.0, 0.5, 1.0, 1.0, 0.0], dtype=torch.float64), atol=1e-12)


def test_the_middle_goes_from_first_to_last() -> None:
    assert middle(0.0) == FIRST_MIDDLE and middle(1.0) == pytest.approx(LAST_MIDDLE) and middle(0.25) > middle(0.5)


def test_gates_begin_around_one_in_the_order_of_worth() -> None:
    begin = in_order(torch.tensor([3.0, 1.0, 2.0, 1.0]))
    assert begin.argsort().tolist() == [1, 3, 2, 0] and float(begin.mean()) == pytest.approx(1.0)
    assert begin.min() == pytest.approx(0.55) and begin.max() == pytest.approx(1.45)


def test_gates_of_one_change_nothing_and_closed_ones_still_learn() -> None:
    z = torch.tensor([1.0, -0.05, 2.0], requires_grad=True)
    opened = gate(z)
    assert torch.equal(opened, torch.tensor([1.0, 0.0, 2.0]))
    opened.sum().backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None and torch.equal(z.grad, torch.ones(3))


def test_the_gradient_of_retention_is_that_of_the_soft_step() -> None:
    z = torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda each: retention(each, 0.5), (z,))


def test_multipliers_bring_the_share_down_to_its_target() -> None:
    z = torch.ones(40, requires_grad=True)
    multipliers = Multipliers(torch.tensor([0.75]))
    ascent, descent = multipliers.optimizer(0.02), torch.optim.AdamW([z], lr=0.02, weight_decay=0.0)
    worth = torch.linspace(0, 1, 40)
    for step in range(600):
        loss = (worth * (1 - z).square()).sum() / 40 + multipliers.penalty([retention(z, middle(step / 600))])
        for optimizer in (ascent, descent):
            optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if step == 0:
            assert multipliers.linear.grad is not None and float(multipliers.linear.grad) > 0  # too many are there, so it grows
        ascent.step()
        descent.step()
    there = retention(z, LAST_MIDDLE) > 0.5
    assert abs(int(there.sum()) - 30) <= 2 and torch.equal(there.nonzero().flatten()[-20:], torch.arange(20, 40))
