"""Work spread over threads is the work done one after the other."""

from __future__ import annotations

import pytest
import torch

from compress.hardware import in_parallel


@pytest.mark.parametrize("count", [0, 1, 2, 17])
def test_results_come_in_the_order_of_the_items(count: int) -> None:
    assert in_parallel(lambda item: item * item, range(count)) == [item * item for item in range(count)]


def test_each_worker_computes_on_one_thread_and_leaves_the_caller_its_own() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert set(in_parallel(lambda _: torch.get_num_threads(), range(8))) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_what_a_worker_raises_reaches_the_caller() -> None:
    def fail(item: int) -> int:
        raise ValueError(item)

    with pytest.raises(ValueError, match="0"):
        in_parallel(fail, range(3))
