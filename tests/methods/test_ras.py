import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jitexport.errors import InputError, ScheduleError
from jitexport.grid import TokenGrid, gather_tokens
from jitexport.methods.base import Draws
from jitexport.methods.dense import Dense
from jitexport.methods.ras import RAS, dense_steps, spread
from jitexport.sampler import draw, sample
from jitexport.schedule import CustomSchedule, Stage, Target, stage_cost
from tests.methods.test_ralu import GRID, LATENT, flux_cost, model, seeded, shifted_sigmas


def ras(preset="default", grid=GRID, patch=2, **changes):
    return RAS(grid, RAS.options(preset) | changes, patch)


def planned(method, speedup=None, custom=None, reference_steps=50, cost=flux_cost):
    return method.schedule(Target(speedup, custom, cost, reference_steps, shifted_sigmas))


def runs(schedule):
    return [(s.tokens, s.steps) for s in schedule.stages]


# --- schedules ---


def test_dense_steps_come_first_then_periodically_then_last():
    kinds = "".join("D" if d else "s" for d in dense_steps(20, warmup=4, every=5))
    assert kinds == "DDDDsssssDsssssDsssD"
    assert all(dense_steps(3, 4, 5)) and dense_steps(1, 1, 1) == (True,)


def test_every_sparse_step_is_a_stage_and_all_share_an_engine():
    schedule = planned(ras(), custom=CustomSchedule((8,), (0.25,)))
    assert runs(schedule) == [(96, 4), (24, 1), (24, 1), (24, 1), (96, 1)]
    assert [s.name for s in schedule.stages] == ["stage0", "stage1", "stage1", "stage1", "stage0"]
    assert [(s.name, s.tokens) for s in schedule.engines] == [("stage1", 24), ("stage0", 96)]
    assert schedule.sigmas == shifted_sigmas(8) and schedule.ends == ()


def test_runs_by_hand():
    schedule = planned(ras(), custom=CustomSchedule((2, 2, 1, 1, 2), (1.0, 0.5, 1.0, 0.25, 1.0)))
    assert runs(schedule) == [(96, 2), (48, 1), (48, 1), (96, 1), (24, 1), (96, 2)]
    assert runs(planned(ras(), custom=CustomSchedule((3, 2), (1.0, 1.0)))) == [(96, 5)]


@pytest.mark.parametrize(
    ("steps", "ratios"),
    [((4, 2), None), ((4, 2), (1.0, 0.5)), ((2, 4), (0.5, 1.0)), ((0,), None), ((2, 2, 1), (1.0, 1.0))],
)
def test_schedules_by_hand_that_are_not_ras(steps, ratios):
    with pytest.raises(ScheduleError, match="begins and ends with a dense step"):
        planned(ras(), custom=CustomSchedule(steps, ratios))


@pytest.mark.parametrize("ratio", [0.0, 1.5, -1.0, float("nan")])
def test_shares_out_of_range(ratio):
    with pytest.raises(ScheduleError, match="share of the tokens"):
        planned(ras(), custom=CustomSchedule((8,), (ratio,)))


@given(st.floats(1, 10))
@settings(max_examples=60)
def test_any_speedup_is_reached_and_hardly_exceeded(speedup):
    schedule = planned(ras(grid=TokenGrid((64, 64))), speedup)
    reached = 50 * flux_cost(4096) / stage_cost(schedule.stages, flux_cost)
    assert speedup * (1 - 1e-9) <= reached <= speedup * 1.25
    assert schedule.stages[0].index == schedule.stages[-1].index == 0


def test_published_ratios():
    for speedup, ratio in [(2.0, 0.32), (3.0, 0.05)]:
        method = ras(grid=TokenGrid((64, 64)))
        schedule = planned(method, speedup, reference_steps=28)
        sparse = {s.tokens for s in schedule.stages} - {4096}
        assert len(sparse) == 1 and int(4096 * ratio) <= sparse.pop() < 4096 * (ratio + 0.12)


def test_less_than_one_step_is_no_schedule():
    with pytest.raises(ScheduleError, match="less than one step"):
        planned(ras(), 5.0, reference_steps=4)


# --- sampling ---


def after_one_step(method, batch=2):
    state = method.start(Draws(torch.randn(batch, 96, 8, generator=seeded(0))), Stage(0, 96, 1))
    return method.step(state, torch.randn(batch, 96, 8, generator=seeded(1)), 1.0, 0.9)


def test_spread_is_over_the_latent_channels_of_each_pixel():
    velocity = torch.randn(2, 5, 12)  # 3 channels of 2 x 2 pixels
    pixels = velocity.view(2, 5, 3, 4)
    expected = torch.stack([pixels[..., i].std(-1) for i in range(4)]).mean(0)
    torch.testing.assert_close(spread(velocity, 2), expected)


@pytest.mark.parametrize("running", ["low", "high"])
def test_tokens_that_run_are_chosen_by_spread(running):
    method = ras(running=running)
    state = after_one_step(method)
    after = method.transition(state, Stage(1, 20, 1), 0.9)
    measure = spread(state.velocity, 2)
    for b in range(2):
        chosen = after.running[b].tolist()
        assert len(set(chosen)) == 20 and chosen == sorted(chosen)
        left = [i for i in range(96) if i not in chosen]
        if running == "low":
            assert measure[b, chosen].max() <= measure[b, left].min()
        else:
            assert measure[b, chosen].min() >= measure[b, left].max()
        assert torch.equal(method.tokens(after)[b], state.y[b, chosen])
        assert torch.equal(method.places()[method.where(after)][b], GRID.coordinates()[chosen])


@pytest.mark.parametrize("running", ["low", "high"])
def test_no_token_waits_for_ever(running):
    """However its velocity spreads, patience brings every token a turn."""
    method = ras(running=running, patience=1.0)
    state = after_one_step(method, 1)
    seen = set()
    for _ in range(20):
        state = method.transition(state, Stage(1, 12, 1), 0.9)
        seen |= set(state.running[0].tolist())
        state = method.step(state, gather_tokens(state.velocity, state.running), 0.9, 0.89)
    assert seen == set(range(96))


def test_the_others_move_on_with_the_velocity_they_had():
    method = ras()
    state = after_one_step(method)
    chosen = method.transition(state, Stage(1, 20, 1), 0.9)
    u = torch.randn(2, 20, 8, generator=seeded(2))
    after = method.step(chosen, u, 0.9, 0.7)
    for b in range(2):
        expected = state.velocity[b].clone()
        expected[chosen.running[b]] = u[b]
        assert torch.equal(after.velocity[b], expected)
        torch.testing.assert_close(after.y[b], state.y[b] - 0.2 * expected)
        waits = torch.ones(96)
        waits[chosen.running[b]] = 0
        assert torch.equal(after.waited[b], waits)
    dense = method.transition(after, Stage(0, 96, 1), 0.7)
    assert torch.equal(method.tokens(dense), after.y)
    reset = method.step(dense, torch.zeros(2, 96, 8), 0.7, 0.5)
    assert not reset.waited.any() and not reset.velocity.any()


def test_all_tokens_at_every_step_are_the_ordinary_sampler():
    method, dense = ras(), Dense(GRID, Dense.options("default"))
    schedule = planned(method, custom=CustomSchedule((5,), (1.0,)))
    drawn = draw(method, schedule, LATENT, 2, [seeded(0)])
    assert drawn.noise is None and drawn.anchors is None
    torch.testing.assert_close(sample(method, schedule, drawn, model), sample(dense, schedule, drawn, model))


def test_an_image_of_a_batch_is_that_seed_alone():
    method = ras()
    schedule = planned(method, 4.0)

    def run(seeds):
        return sample(method, schedule, draw(method, schedule, LATENT, 2, [seeded(s) for s in seeds]), model)

    together = run(range(3))
    for s in range(3):
        torch.testing.assert_close(together[s], run([s])[0], atol=1e-5, rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_latents_can_be_replaced():
    method = ras()
    state, other = after_one_step(method), torch.randn(2, 96, 8)
    assert torch.equal(method.latents(method.with_latents(state, other)), other)


def test_state_is_kept_in_fp32():
    method = ras()
    state = method.transition(after_one_step(method), Stage(1, 20, 1), 0.9)
    after = method.step(state, torch.randn(2, 20, 8).bfloat16(), 0.9, 0.8)
    assert {after.y.dtype, after.velocity.dtype} == {torch.float32}


def test_unknown_options_and_presets_are_refused():
    with pytest.raises(InputError, match="unknown RAS preset"):
        RAS.options("fast")
    with pytest.raises(InputError, match="unknown RAS option"):
        ras(colour="red")


@pytest.mark.parametrize(
    "change", [{"ratio": 1.0}, {"ratio": 0.0}, {"warmup": 0}, {"every": 0}, {"running": "some"}, {"patience": -1.0}]
)
def test_options_without_a_meaning_are_refused(change):
    with pytest.raises(InputError, match="without a meaning"):
        ras(**change)
