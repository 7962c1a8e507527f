import torch

from jitexport.grid import TokenGrid
from jitexport.methods.base import Draws
from jitexport.methods.dense import Dense
from jitexport.schedule import Stage, StageSchedule

GRID = TokenGrid((2, 3))
STAGE = Stage(0, 6, 2)


def dense():
    return Dense(GRID, Dense.options("default"))


def test_runs_all_tokens_at_their_own_places():
    method = dense()
    latents = torch.randn(2, 6, 4)
    state = method.start(Draws(latents), STAGE)
    assert torch.equal(method.tokens(state), latents) and torch.equal(method.latents(state), latents)
    assert torch.equal(method.places()[method.where(state)], GRID.coordinates().expand(2, -1, -1))


def test_step_is_eulers_in_fp32():
    method = dense()
    y, u = torch.randn(2, 6, 4), torch.randn(2, 6, 4).bfloat16()
    after = method.step(y, u, 0.8, 0.5)
    assert after.dtype == torch.float32
    assert torch.equal(after, y + (0.5 - 0.8) * u.float())


def test_asks_for_no_randomness_but_the_latents():
    schedule = StageSchedule((STAGE,), (1.0, 0.5, 0.0))
    assert dense().noise_fields(schedule) == 0 and dense().draw_anchors(schedule, torch.Generator()) is None


def test_uses_the_models_own_noise_levels():
    assert Dense.options("default")["timesteps"] == {"kind": "native"}


def test_latents_can_be_replaced():
    method, other = dense(), torch.randn(2, 6, 4)
    assert torch.equal(method.tokens(method.with_latents(torch.zeros(2, 6, 4), other)), other)
