import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jitexport.errors import InputError, ScheduleError
from jitexport.grid import TokenGrid
from jitexport.methods.base import Draws
from jitexport.methods.bottleneck import PUBLISHED, Bottleneck, noisier
from jitexport.sampler import draw, sample
from jitexport.schedule import CustomSchedule, Target, stage_cost, uniform_sigmas
from tests.methods.test_ralu import GRID, LATENT, flux_cost, model, seeded, shifted_sigmas


def bottleneck(preset="default", grid=GRID, patch=2, **changes):
    return Bottleneck(grid, Bottleneck.options(preset) | changes, patch)


def planned(method, speedup=None, custom=None, reference_steps=50, cost=flux_cost, native=shifted_sigmas):
    return method.schedule(Target(speedup, custom, cost, reference_steps, native))


def shape(schedule):
    return [(s.index, s.steps, s.tokens) for s in schedule.stages]


# --- schedules ---


@pytest.mark.parametrize("speedup", PUBLISHED)
def test_published_steps(speedup):
    schedule = planned(bottleneck("paper"), speedup)
    first, second, third = PUBLISHED[speedup]
    assert shape(schedule) == [(0, first, 96), (1, second, 24), (0, third, 96)]
    assert [s.name for s in schedule.engines] == ["stage1", "stage0"]


def test_published_steps_cost_more_than_their_names_say():
    """On FLUX.1-dev with attention: 4.01x and 5.37x, if every step of every stage runs."""
    method = bottleneck("paper", TokenGrid((64, 64)))
    for speedup, expected in [(5.0, 4.01), (7.0, 5.37)]:
        spent = stage_cost(planned(method, speedup).stages, flux_cost)
        assert 50 * flux_cost(4096) / spent == pytest.approx(expected, abs=0.01)


@given(st.floats(2, 10))
@settings(max_examples=60)
def test_any_speedup_is_reached_and_hardly_exceeded(speedup):
    schedule = planned(bottleneck(grid=TokenGrid((64, 64))), speedup)
    reached = 50 * flux_cost(4096) / stage_cost(schedule.stages, flux_cost)
    assert speedup * (1 - 1e-9) <= reached <= speedup * 1.25
    assert [s.index for s in schedule.stages] == [0, 1, 0]


def test_noise_is_put_back_and_each_stage_spaced_by_its_shift():
    low = {"kind": "reshifted", "shift": 3.0, "low": 0.5}
    schedule = planned(bottleneck(renoise=(1.0, 2.0), timesteps=low), custom=CustomSchedule((2, 3, 5)))
    (_, one), (_, two), (_, three) = schedule
    whole = [noisier(u, 3.0) for u in uniform_sigmas(10)]
    assert [s.sigma for s in one] == pytest.approx(whole[:2]) and one[-1].sigma_next == pytest.approx(whole[2])
    assert two[0].sigma == pytest.approx(whole[2]) and two[-1].sigma_next == pytest.approx(whole[5])
    assert three[0].sigma == pytest.approx(noisier(whole[5], 2.0)) and three[-1].sigma_next == 0
    even = [noisier(s, 1 / 1.5) for s in (*(step.sigma for step in two), two[-1].sigma_next)]
    assert even[0] - even[1] == pytest.approx(even[1] - even[2]) == pytest.approx(even[2] - even[3])


def test_noisier_multiplies_the_ratio_of_noise_to_signal():
    raised = noisier(0.4, 3.0)
    assert raised / (1 - raised) == pytest.approx(3 * 0.4 / 0.6)
    assert noisier(1.0, 5.0) == 1 and noisier(0.3, 1.0) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("steps", "ratios"), [((4, 5), None), ((4, 0, 6), None), ((4, 5, 6), (0.25, 0.5, 1.0)), ((6,), (1.0,))]
)
def test_schedules_by_hand_that_are_not_bottlenecks(steps, ratios):
    with pytest.raises(ScheduleError, match="three stages"):
        planned(bottleneck(), custom=CustomSchedule(steps, ratios))


def test_schedules_by_hand():
    for ratios in (None, (1.0, 0.25, 1.0)):
        schedule = planned(bottleneck(), custom=CustomSchedule((1, 2, 3), ratios))
        assert shape(schedule) == [(0, 1, 96), (1, 2, 24), (0, 3, 96)]


def test_less_than_one_step_a_stage_is_no_schedule():
    with pytest.raises(ScheduleError, match="less than the 3 steps"):
        planned(bottleneck(), 4.0, reference_steps=4)


# --- sampling ---


def test_resizes_the_clean_prediction_and_noises_it_afresh():
    method = bottleneck()
    schedule = planned(method, custom=CustomSchedule((1, 1, 1)))
    drawn = draw(method, schedule, LATENT, 2, [seeded(0), seeded(1)])
    assert drawn.noise.shape == (2, 2 * 96, 8)
    first, second = drawn.noise.chunk(2, dim=1)
    high, low, last = schedule.stages
    u = torch.randn(2, 96, 8, generator=seeded(5))
    state = method.start(drawn, high)
    assert torch.equal(method.tokens(state), drawn.latents)
    state = method.step(state, u, 1.0, 0.8)
    torch.testing.assert_close(state.clean, drawn.latents - u)
    state = method.transition(state, low, 0.85)
    expected = 0.15 * method.resampler.down(drawn.latents - u) + 0.85 * method.resampler.pick(first)
    torch.testing.assert_close(method.tokens(state), expected)
    v = torch.randn(2, 24, 8, generator=seeded(6))
    state = method.transition(method.step(state, v, 0.85, 0.4), last, 0.6)
    torch.testing.assert_close(method.tokens(state), 0.4 * method.resampler.up(expected - 0.85 * v) + 0.6 * second)


def test_positions():
    for positions, scale, offset in [("coarse", 1.0, 0.0), ("corner", 2.0, 0.0), ("centre", 2.0, 0.5)]:
        method = bottleneck(positions=positions)
        schedule = planned(method, custom=CustomSchedule((1, 1, 1)))
        state = method.start(draw(method, schedule, LATENT, 2, [seeded(0)]), schedule.stages[0])
        assert torch.equal(method.places()[method.where(state)], GRID.coordinates()[None])
        state = method.transition(method.step(state, torch.zeros(1, 96, 8), 1.0, 0.9), schedule.stages[1], 0.9)
        assert torch.equal(method.places()[method.where(state)], (method.coarse.coordinates() * scale + offset)[None])


def test_latents_can_be_seen_and_replaced_in_every_stage():
    method = bottleneck(kernel="bicubic")
    schedule = planned(method, custom=CustomSchedule((1, 1, 1)))
    high = method.start(draw(method, schedule, LATENT, 2, [seeded(0)]), schedule.stages[0])
    low = method.transition(method.step(high, torch.zeros(1, 96, 8), 1.0, 0.9), schedule.stages[1], 0.9)
    for state in (high, low):
        latents = method.latents(state)
        assert latents.shape == (1, 96, 8)
        torch.testing.assert_close(method.tokens(method.with_latents(state, latents)), method.tokens(state))
        torch.testing.assert_close(method.latents(method.with_latents(state, 2 * latents)), 2 * latents)


def test_an_image_of_a_batch_is_that_seed_alone():
    method = bottleneck()
    schedule = planned(method, 5.0)

    def run(seeds):
        return sample(method, schedule, draw(method, schedule, LATENT, 2, [seeded(s) for s in seeds]), model)

    together = run(range(3))
    assert together.shape == (3, 96, 8) and together.isfinite().all()
    for s in range(3):
        torch.testing.assert_close(together[s], run([s])[0], atol=1e-5, rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_state_is_kept_in_fp32():
    method = bottleneck()
    state = method.start(Draws(torch.randn(1, 96, 8), torch.randn(1, 192, 8)), None)
    after = method.step(state, torch.randn(1, 96, 8).bfloat16(), 1.0, 0.5)
    assert {after.x.dtype, after.clean.dtype} == {torch.float32}


def test_unknown_options_and_presets_are_refused():
    with pytest.raises(InputError, match="unknown Bottleneck preset"):
        Bottleneck.options("fast")
    with pytest.raises(InputError, match="unknown Bottleneck option"):
        bottleneck(colour="red")


@pytest.mark.parametrize(
    "change",
    [
        {"timesteps": {"kind": "native"}},
        {"timesteps": {"kind": "reshifted", "shift": -1.0, "low": 1.0}},
        {"timesteps": {"kind": "reshifted", "shift": None, "low": 0.0}},
        {"renoise": (0.5, 1.0)},
        {"renoise": (1.0,)},
        {"kernel": "cubic"},
        {"positions": "middle"},
    ],
)
def test_options_without_a_meaning_are_refused(change):
    with pytest.raises(InputError, match="without a meaning"):
        bottleneck(**change)


def test_grids_that_have_no_half():
    with pytest.raises(ScheduleError, match="even number"):
        bottleneck(grid=TokenGrid((5, 4)))
