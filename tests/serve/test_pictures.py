"""Which steps are shown, and which tokens ran."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jitexport.grid import TokenGrid
from jitexport.schedule import StageSchedule, number, uniform_sigmas
from jitexport.serve import pictures


def schedule(*steps):
    counts = range(10, 10 + 10 * len(steps), 10)
    return StageSchedule(number(zip(counts, steps, strict=True)), uniform_sigmas(sum(steps)))


@pytest.mark.parametrize(
    ("steps", "count", "expected"),
    [
        ((7, 4, 7), 0, []),
        ((7, 4, 7), 1, [10]),
        ((7, 4, 7), 2, [6, 10]),
        ((7, 4, 7), 3, [2, 6, 10]),
        ((18,), 2, [3, 8]),
        ((1,), 3, []),
        ((1, 1), 3, [0]),
        ((1, 1, 1, 1, 1, 1), 2, [1, 3]),
    ],
)
def test_previews_are_at_ends_of_stages_and_then_in_the_widest_gaps(steps, count, expected):
    assert list(pictures.preview_steps(schedule(*steps), count)) == expected


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 3))
def test_as_many_previews_as_there_can_be_in_order_and_before_the_last_step(steps, count):
    found = list(pictures.preview_steps(schedule(*steps), count))
    assert found == sorted(set(found)) and len(found) == min(count, sum(steps) - 1)
    assert all(0 <= step < sum(steps) - 1 for step in found)


def test_tokens_of_the_grid():
    grid = TokenGrid((2, 4))
    found = pictures.detail(torch.tensor([[0, 3, 6], [1, 2, 7]]), grid)
    assert found == ["10010010", "01100001"]


def test_cells_and_the_grids_tokens_beside_them():
    """A grid of 4 x 4: places 16 to 19 are its cells, from 20 on its tokens once more."""
    grid = TokenGrid((4, 4))
    cells = torch.tensor([[16, 19], [17, 18]])
    assert pictures.detail(cells, grid) == ["2200220000220022", "0022002222002200"]
    mixed = torch.tensor([[17, 18, 19, 20, 21, 24, 25]])  # the first cell by its tokens 0, 1, 4 and 5
    assert pictures.detail(mixed, grid) == ["1122112222222222"]


def test_methods_number_their_places_so():
    from jitexport.methods.bottleneck import Bottleneck
    from jitexport.methods.ralu import RALU

    grid = TokenGrid((4, 4))
    for method in (RALU(grid, RALU.options("default")), Bottleneck(grid, Bottleneck.options("default"))):
        places = method.places()
        assert torch.equal(places[:16], grid.coordinates())
        assert len(places) == {"ralu": 36, "bottleneck": 20}[method.name]
