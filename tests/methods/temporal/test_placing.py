"""Which steps are computed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jitexport import registry
from jitexport.errors import ScheduleError
from jitexport.methods.temporal.delta_dit import DeltaDiT
from jitexport.methods.temporal.placing import at_steps, by_interval, gaps, spread, within
from jitexport.methods.temporal.taylor import Taylor
from jitexport.methods.temporal.taylorseer import TaylorSeer
from jitexport.schedule import COMPUTED, FORECAST, StageSchedule, number, uniform_sigmas

runs = st.lists(st.integers(1, 9), min_size=1, max_size=3)


def schedule(*steps):
    counts = [16 * 2**i for i in range(len(steps))]
    return StageSchedule(number(zip(counts, steps, strict=True)), uniform_sigmas(sum(steps)))


def test_published_intervals_of_fifty_steps():
    """TaylorSeer's N = 7 and 11 with 3 steps of warm-up; the last step is computed as well."""
    assert by_interval(schedule(50), 7, 3) == [0, 1, 2, 9, 16, 23, 30, 37, 44, 49]
    assert by_interval(schedule(50), 11, 3) == [0, 1, 2, 13, 24, 35, 46, 49]
    assert by_interval(schedule(50), 5, 1) == [*range(0, 50, 5), 49]


def test_every_stage_begins_anew():
    assert by_interval(schedule(4, 5, 6), 3, 2) == [0, 1, 4, 5, 8, 9, 10, 13, 14]
    assert by_interval(schedule(4, 5, 6), 1, 1) == list(range(15))


def test_steps_by_hand_have_those_that_always_are_computed_beside_them():
    assert at_steps(schedule(4, 5), (2, 6)) == [0, 2, 4, 6, 8]
    for wrong in ((9,), (0, 40)):
        with pytest.raises(ScheduleError, match="does not have"):
            at_steps(schedule(4, 5), wrong)


@given(runs, st.integers(1, 3), st.floats(0, 1.2))
def test_a_budget_is_kept_and_used_up(steps, warmup, share):
    one = schedule(*steps)
    tokens = [stage.tokens for stage in one.stages for _ in range(stage.steps)]
    budget = share * sum(tokens)
    found = within(one, warmup, budget, lambda i, m: m, lambda i, m: 0.0)
    least = {i for s in one.stages for i in one.steps_of(s)[:warmup]} | {one.nfe - 1}
    if found is None:
        assert sum(tokens[i] for i in least) > budget
        return
    assert least <= set(found) and found == sorted(found)
    spent = sum(tokens[i] for i in found)
    assert spent <= budget
    left = [tokens[i] for i in range(one.nfe) if i not in found]
    assert not left or spent + max(left) > budget or len(left) < one.nfe


@given(st.integers(3, 40), st.integers(2, 40))
def test_computed_steps_lie_apart(steps, count):
    """With steps of one cost, gaps of a stage differ by one at most."""
    one = schedule(steps)
    found = within(one, 1, min(count, steps), lambda i, m: 1.0, lambda i, m: 0.0)
    sizes = [len(gap) for gap in gaps(set(found), steps)]
    assert len(found) == min(count, steps)
    sizes += [0] * (len(found) - 1 - len(sizes))  # between neighbours
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(0, 30), st.integers(1, 30), st.data())
def test_spread_steps_are_as_many_as_asked_for_and_inside(start, length, data):
    run = range(start, start + length)
    count = data.draw(st.integers(0, length))
    found = spread(run, count)
    assert len(set(found)) == count and set(found) <= set(run)


def test_gaps():
    assert gaps({0, 1, 4, 9}, 10) == [range(2, 4), range(5, 9)]
    assert gaps({0, 3}, 6) == [range(1, 3), range(4, 6)]


@pytest.mark.parametrize("name", registry.CACHES)
def test_a_cache_places_its_own_actions(name):
    cache = registry.cache(name)({"every": 3})
    placed = cache.place(schedule(4, 5))
    assert placed.computed == tuple(by_interval(schedule(4, 5), 3, cache.settings.warmup))
    engines = {
        "taylorseer": {"skip"}, "teacache": {"skip"}, "delta-dit": {"front", "rear"}, "toca": {"refresh"},
    }
    assert {*placed.actions} <= engines.get(name, {FORECAST}) | {COMPUTED}


def test_delta_dit_leaves_out_the_rear_early_and_the_front_late():
    placed = DeltaDiT({"every": 2, "boundary": 0.5}).place(schedule(10))
    assert placed.actions[:5] == (COMPUTED, "front", COMPUTED, "front", COMPUTED)
    assert placed.actions[5:] == ("rear", COMPUTED, "rear", COMPUTED, COMPUTED)


def test_solving_counts_what_the_cheaper_steps_cost():
    prices = {COMPUTED: 10.0, "skip": 1.0, FORECAST: 0.0}
    one = schedule(10)
    skipping = TaylorSeer({"warmup": 1}).solve(one, lambda action, m: prices[action], 46.0)
    forecasting = Taylor().solve(one, lambda action, m: prices[action], 46.0)
    assert (len(skipping.computed), len(forecasting.computed)) == (4, 4)
    assert len(TaylorSeer({"warmup": 1}).solve(one, lambda action, m: prices[action], 45.0).computed) == 3
    assert Taylor().solve(one, lambda action, m: prices[action], 19.0) is None


# --- what a schedule refuses ---


def test_a_schedule_has_an_action_for_each_step():
    stages, sigmas = number([(16, 2), (32, 3)]), uniform_sigmas(5)
    good = StageSchedule(stages, sigmas, (), (COMPUTED, "skip", COMPUTED, FORECAST, COMPUTED))
    assert good.computed == (0, 2, 4) and good.mandatory == (0, 2, 4)
    assert [[s.action for s in steps] for _, steps in good] == [[COMPUTED, "skip"], [COMPUTED, FORECAST, COMPUTED]]
    assert [(action, stage.index) for action, stage in good.runs] == [(COMPUTED, 1), (COMPUTED, 0), ("skip", 1)]
    plain = StageSchedule(stages, sigmas)
    assert plain.computed == (0, 1, 2, 3, 4) and [a for a, _ in plain.runs] == [COMPUTED, COMPUTED]


@pytest.mark.parametrize(
    "actions",
    [
        (COMPUTED,) * 4,
        (FORECAST, COMPUTED, COMPUTED, COMPUTED, COMPUTED),
        (COMPUTED, COMPUTED, FORECAST, COMPUTED, COMPUTED),
        (COMPUTED, COMPUTED, COMPUTED, COMPUTED, FORECAST),
    ],
)
def test_actions_that_no_loop_could_have(actions):
    with pytest.raises(ScheduleError):
        StageSchedule(number([(16, 2), (32, 3)]), uniform_sigmas(5), (), actions)
