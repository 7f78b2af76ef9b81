"""Groups of sequences that are run together."""

from __future__ import annotations

import pytest

from fastedit.model.packed_passes import group_by_budget


@pytest.mark.parametrize(
    ("sizes", "budget", "expected"),
    [
        ([], 10, []),
        ([4, 6, 1], 10, [[0, 1], [2]]),
        ([4, 7, 3, 1], 10, [[0], [1, 2], [3]]),
        ([20, 1, 30, 2, 3], 10, [[0], [1], [2], [3, 4]]),
        ([0, 0, 0], 0, [[0, 1, 2]]),
    ],
    ids=["none", "exactly full", "one over", "larger than the budget", "no rows"],
)
def test_groups_are_filled_in_order_up_to_the_budget(sizes: list[int], budget: int, expected: list[list[int]]) -> None:
    assert group_by_budget(sizes, budget) == expected


def test_groups_are_filled_in_the_given_order() -> None:
    sizes = [5, 1, 4, 2]
    assert group_by_budget(sizes, 6, [1, 3, 2, 0]) == [[1, 3], [2], [0]]


def test_a_padded_group_counts_as_items_times_its_largest() -> None:
    assert group_by_budget([1, 3, 3, 4], 9, padded=True) == [[0, 1, 2], [3]]
    assert group_by_budget([1, 3, 3, 4], 8, padded=True) == [[0, 1], [2, 3]]
    assert group_by_budget([4, 1, 1], 9, padded=True) == [[0, 1], [2]]
    assert group_by_budget([12, 12], 9, padded=True) == [[0], [1]]
