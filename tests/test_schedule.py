from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import assume, given
from hypothesis import strategies as st

from jitexport.errors import ScheduleError
from jitexport.schedule import (
    BETA_PAPER,
    BETA_RELEASED,
    Stage,
    StageSchedule,
    beta_sigmas,
    make_stages,
    number,
    split_steps,
    stage_cost,
    uniform_sigmas,
)
from jitexport.solving import solve_stages

FLUX_TOKENS = 4096


def flux_cost(tokens):
    """FLOPs of a step of FLUX.1-dev with 512 text tokens; `test_flops` measures these coefficients."""
    return 6813006692352 + tokens * (13628080128 + tokens * 700416)


def counts(stages):
    return [s.tokens for s in stages]


def steps(stages):
    return [s.steps for s in stages]


# --- noise levels ---


@pytest.mark.parametrize("n", [1, 2, 4, 11, 18, 50])
@pytest.mark.parametrize(("alpha", "beta"), [(1.4, 0.42), (1.4, 0.425), (0.6, 0.6)])
def test_beta_timesteps_are_those_of_diffusers(n, alpha, beta):
    """Eq. 22, as the released code has it: `_convert_to_beta` over linspace(1, 1/n, n), followed by 0."""
    grid = torch.linspace(1, 1 / n, n, dtype=torch.float64)
    expected = FlowMatchEulerDiscreteScheduler()._convert_to_beta(grid, n, alpha, beta)
    assert beta_sigmas(n, alpha, beta) == pytest.approx([*expected, 0.0], abs=1e-12)


def test_beta_timesteps_favour_high_noise():
    assert sum(s > 0.5 for s in beta_sigmas(18, *BETA_PAPER)) > sum(s > 0.5 for s in uniform_sigmas(18))


def test_beta_values():
    assert BETA_PAPER == (1.4, 0.42) and BETA_RELEASED == (1.4, 0.425)


def test_uniform_timesteps():
    assert uniform_sigmas(4) == pytest.approx((1.0, 0.75, 0.5, 0.25, 0.0))
    assert uniform_sigmas(1) == (1.0, 0.0)


@given(st.integers(1, 100), st.floats(0.3, 3), st.floats(0.3, 3))
def test_noise_levels_always_make_a_schedule(n, alpha, beta):
    for sigmas in (uniform_sigmas(n), beta_sigmas(n, alpha, beta)):
        assert len(sigmas) == n + 1 and sigmas[0] == pytest.approx(1) and sigmas[-1] == 0
        assert all(a > b for a, b in pairwise(sigmas))


# --- stages ---


@pytest.mark.parametrize(
    ("speedup", "expected_steps", "expected_tokens"),
    [(4, [7, 4, 7], [1433, 2539, 4096]), (7, [4, 3, 4], [1310, 2457, 4096])],
)
def test_published_schedules(speedup, expected_steps, expected_tokens):
    """Table 4, on 64 x 64 tokens."""
    stages = solve_stages(speedup, FLUX_TOKENS, flux_cost, 50)
    assert steps(stages) == expected_steps
    assert counts(stages) == expected_tokens
    assert [s.name for s in stages] == ["stage2", "stage1", "stage0"]


def test_steps_are_split_at_the_released_fractions():
    """int(NFE * 0.4), int(NFE * 0.65), NFE."""
    assert split_steps(18) == (7, 4, 7)
    assert split_steps(11) == (4, 3, 4)
    assert split_steps(1) == (0, 0, 1)
    assert split_steps(10, (0.5, 1.0)) == (5, 5)
    assert all(sum(split_steps(n)) == n for n in range(1, 60))


@pytest.mark.parametrize(
    ("n_steps", "ratios", "expected"),
    [
        ([9, 9], [0.5, 1.0], [512, 1024]),
        ([6, 6, 6], [0.2, 0.5, 1.0], [204, 512, 1024]),
        ([5, 4, 4, 5], [0.25, 0.5, 0.75, 1.0], [256, 512, 768, 1024]),
        ([3], [1.0], [1024]),
    ],
)
def test_custom_schedules(n_steps, ratios, expected):
    stages = make_stages(1024, n_steps, ratios)
    assert counts(stages) == expected and steps(stages) == n_steps
    assert [s.index for s in stages] == list(range(len(stages)))[::-1]


@given(st.integers(1, 5000), st.lists(st.floats(0.01, 1), min_size=0, max_size=3))
def test_every_stage_has_int_of_its_share(tokens, ratios):
    ratios = [*sorted(ratios), 1.0]
    stages = make_stages(tokens, [2] * len(ratios), ratios)
    expected = sorted({max(1, int(tokens * r)) for r in ratios})
    assert counts(stages) == expected
    assert sum(steps(stages)) == 2 * len(ratios)


def test_stages_that_coincide_on_a_tiny_grid_become_one():
    assert make_stages(2, [3, 2, 1], [0.5, 0.6, 1.0]) == (Stage(1, 1, 5), Stage(0, 2, 1))


def test_stages_without_steps_vanish():
    assert make_stages(100, [0, 1, 1], [0.3, 0.6, 1.0]) == (Stage(1, 60, 1), Stage(0, 100, 1))


@pytest.mark.parametrize(
    ("n_steps", "ratios", "message"),
    [
        ([7, 4], [0.35, 0.62, 1.0], "same length"),
        ([], [], "same length"),
        ([7, 4, 7], [0.62, 0.35, 1.0], "rise to 1"),
        ([7, 7], [0.35, 0.9], "rise to 1"),
        ([7, 7], [0.0, 1.0], "rise to 1"),
        ([7, 7], [-0.5, 1.0], "rise to 1"),
        ([7, 7, 7], [0.5, 1.5, 1.0], "rise to 1"),
        ([7, 7], [float("nan"), 1.0], "rise to 1"),
        ([7, -1], [0.5, 1.0], "negative"),
        ([7, 0], [0.5, 1.0], "last stage needs"),
    ],
)
def test_impossible_custom_schedules(n_steps, ratios, message):
    with pytest.raises(ScheduleError, match=message):
        make_stages(100, n_steps, ratios)


# --- schedules ---


def test_steps_of_a_stage_index_its_noise_levels():
    schedule = StageSchedule(make_stages(100, [2, 1, 3], [0.3, 0.6, 1.0]), uniform_sigmas(6))
    assert [list(schedule.steps_of(s)) for s in schedule.stages] == [[0, 1], [2], [3, 4, 5]]
    assert schedule.nfe == 6


@pytest.mark.parametrize(
    ("stages", "sigmas", "message"),
    [
        ((), (0.0,), "at least one step"),
        ((Stage(0, 10, 0),), (0.0,), "at least one step"),
        ((Stage(0, 0, 1),), (1.0, 0.0), "at least one step"),
        ((Stage(1, 10, 1), Stage(0, 10, 1)), (1.0, 0.5, 0.0), "rank the token counts"),
        ((Stage(0, 5, 1), Stage(1, 10, 1)), (1.0, 0.5, 0.0), "rank the token counts"),
        ((Stage(0, 10, 1), Stage(1, 5, 1)), (1.0, 0.5, 0.0), "last stage must have all"),
        ((Stage(1, 5, 1), Stage(0, 10, 1)), (0.5, 0.7, 0.0), "noise levels"),
        ((Stage(0, 10, 2),), (1.0, 0.0), "noise levels"),
        ((Stage(0, 10, 2),), (1.0, 0.5, 0.1), "noise levels"),
        ((Stage(0, 10, 2),), (0.5, 0.5, 0.0), "noise levels"),
        ((Stage(0, 10, 2),), (0.5, 1.0, 0.0), "noise levels"),
        ((Stage(0, 10, 2),), (1.0, float("nan"), 0.0), "noise levels"),
    ],
)
def test_impossible_schedules(stages, sigmas, message):
    with pytest.raises(ScheduleError, match=message):
        StageSchedule(stages, sigmas)


def test_stages_of_as_many_tokens_share_an_engine():
    stages = number([(96, 4), (24, 1), (24, 1), (96, 2)])
    assert [(s.index, s.name, s.steps) for s in stages] == [
        (0, "stage0", 4), (1, "stage1", 1), (1, "stage1", 1), (0, "stage0", 2),
    ]
    schedule = StageSchedule(stages, uniform_sigmas(8))
    assert [(s.name, s.tokens) for s in schedule.engines] == [("stage1", 24), ("stage0", 96)]
    assert [list(schedule.steps_of(s)) for s in schedule.stages] == [[0, 1, 2, 3], [4], [5], [6, 7]]
    twice = StageSchedule((stages[1], stages[1], stages[3]), uniform_sigmas(4))
    assert [[s.index for s in steps] for _, steps in twice] == [[0], [1], [2, 3]]
    with pytest.raises(ScheduleError, match="not a stage of this schedule"):
        schedule.steps_of(Stage(1, 24, 1))


def test_steps_go_from_level_to_level_and_the_last_of_a_stage_to_its_end():
    stages = number([(24, 2), (96, 2)])
    joined = StageSchedule(stages, (1.0, 0.8, 0.5, 0.2, 0.0))
    assert [[s[:3] for s in steps] for _, steps in joined] == [
        [(0, 1.0, 0.8), (1, 0.8, 0.5)], [(2, 0.5, 0.2), (3, 0.2, 0.0)],
    ]
    noised = StageSchedule(stages, (1.0, 0.8, 0.7, 0.2, 0.0), (0.5, 0.0))
    assert [[s[:3] for s in steps] for _, steps in noised] == [
        [(0, 1.0, 0.8), (1, 0.8, 0.5)], [(2, 0.7, 0.2), (3, 0.2, 0.0)],
    ]


@pytest.mark.parametrize("ends", [(0.5,), (0.5, 0.1), (0.9, 0.0), (0.75, 0.0), (0.5, 0.3, 0.0), (float("nan"), 0.0)])
def test_ends_that_do_not_fit(ends):
    """Too few, not ending at 0, above the step before, above the start of the next stage, too many, no number."""
    with pytest.raises(ScheduleError, match="noise levels"):
        StageSchedule(number([(24, 2), (96, 2)]), (1.0, 0.8, 0.7, 0.2, 0.0), ends)


# --- solving ---


def predicted(stages, tokens, cost, reference_steps):
    return reference_steps * cost(tokens) / stage_cost(stages, cost)


@given(st.floats(1, 10))
def test_a_solved_schedule_is_as_fast_as_asked_and_hardly_faster(speedup):
    assume(speedup not in (4, 7))
    stages = solve_stages(speedup, FLUX_TOKENS, flux_cost, 50)
    reached = predicted(stages, FLUX_TOKENS, flux_cost, 50)
    assert speedup * (1 - 1e-9) <= reached <= speedup * 1.04
    assert counts(stages)[-1] == FLUX_TOKENS


@given(st.floats(1, 10), st.integers(4, 5000), st.integers(10, 60))
def test_any_grid_and_reference_is_at_least_as_fast_as_asked(speedup, tokens, reference_steps):
    assume(speedup not in (4, 7))
    stages = solve_stages(speedup, tokens, flux_cost, reference_steps)
    assert predicted(stages, tokens, flux_cost, reference_steps) >= speedup * (1 - 1e-9)


@given(st.floats(1, 10), st.floats(1, 10))
def test_faster_is_cheaper(a, b):
    """The published schedules stand beside the solved ones: 4x is a little faster than its name, 7x a little slower."""
    assume(not {a, b} & {4.0, 7.0})
    a, b = sorted((a, b))
    slow, fast = (stage_cost(solve_stages(s, FLUX_TOKENS, flux_cost, 50), flux_cost) for s in (a, b))
    # Whole tokens: one more in the coarse stages is what neighbouring speed-ups may differ by the wrong way.
    assert fast <= slow + 50 * (flux_cost(FLUX_TOKENS) - flux_cost(FLUX_TOKENS - 1))


@pytest.mark.parametrize(("speedup", "expected"), [(4, 4.14), (7, 6.96)])
def test_presets_come_close_to_their_names(speedup, expected):
    stages = solve_stages(speedup, FLUX_TOKENS, flux_cost, 50)
    assert predicted(stages, FLUX_TOKENS, flux_cost, 50) == pytest.approx(expected, abs=0.01)


def test_presets_are_for_fifty_reference_steps():
    stages = solve_stages(4, FLUX_TOKENS, flux_cost, 28)
    assert steps(stages) != [7, 4, 7]
    assert predicted(stages, FLUX_TOKENS, flux_cost, 28) == pytest.approx(4, rel=0.04)


def test_no_speedup_is_the_ordinary_sampler():
    assert solve_stages(1, FLUX_TOKENS, flux_cost, 50) == (Stage(0, FLUX_TOKENS, 50),)


@pytest.mark.parametrize("speedup", [0.99, 0, -4, 20.01, float("nan"), float("inf")])
def test_speedups_out_of_range(speedup):
    with pytest.raises(ScheduleError, match="out of range") as caught:
        solve_stages(speedup, FLUX_TOKENS, flux_cost, 50)
    assert "from 1 to 20" in caught.value.expected


@given(st.floats(1, 4))
def test_four_reference_steps_allow_up_to_four(speedup):
    """As FLUX.1-schnell: whole steps are coarse there, so only the lower bound holds."""
    stages = solve_stages(speedup, FLUX_TOKENS, flux_cost, 4)
    assert 1 <= sum(steps(stages)) <= 4
    assert predicted(stages, FLUX_TOKENS, flux_cost, 4) >= speedup * (1 - 1e-9)


def test_less_than_one_step_is_no_schedule():
    with pytest.raises(ScheduleError, match="less than one step") as caught:
        solve_stages(4.5, FLUX_TOKENS, flux_cost, 4)
    assert "at most 4" in caught.value.expected
