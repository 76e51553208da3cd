import time

import pytest

from resunet_jax.progress import parallel_map


def test_results_are_in_the_order_of_items() -> None:
    def later_items_first(item: int) -> int:
        time.sleep(0.01 * (4 - item))
        return item * item

    assert parallel_map("squaring", later_items_first, range(5), 2) == [0, 1, 4, 9, 16]
    assert parallel_map("nothing", later_items_first, [], 2) == []


def test_an_error_cancels_what_has_not_begun() -> None:
    begun = []

    def fails_at_first(item: int) -> None:
        begun.append(item)
        time.sleep(0.01)
        if item == 0:
            raise ValueError(item)

    with pytest.raises(ValueError, match="0"):
        parallel_map("failing", fails_at_first, range(100), 2)
    assert len(begun) < 100
