"""What stage engines make of their transformers, for every family: parts that add up to the whole."""

import pytest
import torch
from torch import nn

from jitexport import registry
from jitexport.errors import InputError, UnknownNameError
from jitexport.models.stages import ACTS, INDICATOR, REFRESH, TAKES, act_of, engine_spec, kind_of
from jitexport.schedule import COMPUTED, Stage, StageSchedule
from jitexport.specs import DTYPES, TensorSpec
from tests.tiny_families import FAMILIES


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return request.param, FAMILIES[request.param](tmp_path_factory.mktemp("stages") / "model")


def made(folder, features):
    """Modules of a family's stage at all tokens and their specifications by action, and the same inputs for all."""
    family, path = folder
    adapter = registry.family(family).from_folder(path, torch.float32, {"features": features})
    tokens = adapter.geometry.grid.tokens
    schedule = StageSchedule((Stage(0, tokens, 1),), (1.0, 0.0))
    acts = ACTS[kind_of(features)]
    further = [action for action in acts if action != COMPUTED]
    specs = {s.name: s for s in adapter.specs(schedule, 2, "fp32", further=further)}
    for parameter in adapter.components["transformer"].parameters():  # whatever is zero would hide what it scales
        nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.zeros(s.shape) if s.name == "key_mask" else torch.randn(s.shape, generator=generator).to(DTYPES[s.dtype])
        for s in specs["stage0"].inputs
    ]
    modules = {action: adapter.module(f"{action}0") for action in acts}
    return modules, {action: specs[f"{action}0"] for action in acts}, inputs


@torch.no_grad()
def run(modules, specs, action, inputs, *beside):
    """An engine's outputs, which have the declared shapes."""
    found = modules[action](*inputs, *beside)
    found = found if isinstance(found, tuple) else (found,)
    assert [tuple(t.shape) for t in found] == [s.shape for s in specs[action].outputs]
    assert [tuple(t.shape) for t in (*inputs, *beside)] == [s.shape for s in specs[action].inputs]
    return found


def test_a_residual_is_what_all_blocks_add(folder):
    plain = run(*made(folder, None)[:2], COMPUTED, made(folder, None)[2])[0]
    modules, specs, inputs = made(folder, "residual")
    u, residual = run(modules, specs, COMPUTED, inputs)
    assert torch.equal(u, plain)
    torch.testing.assert_close(run(modules, specs, "skip", inputs, residual)[0], u, atol=1e-4, rtol=1e-4)
    assert (run(modules, specs, "skip", inputs, 0 * residual)[0] - u).norm() > 1e-2 * u.norm()
    (seen,) = run(modules, specs, INDICATOR, inputs)
    assert seen.isfinite().all() and seen.std() > 0.01


def test_deltas_are_what_the_front_and_the_rear_add(folder):
    modules, specs, inputs = made(folder, "deltas")
    u, of_front, of_rear = run(modules, specs, COMPUTED, inputs)
    for action, delta in (("front", of_rear), ("rear", of_front)):
        torch.testing.assert_close(run(modules, specs, action, inputs, delta)[0], u, atol=1e-4, rtol=1e-4)
        assert (run(modules, specs, action, inputs, 0 * delta)[0] - u).norm() > 1e-2 * u.norm()


def test_what_is_cached_of_tokens_adds_up_to_the_whole(folder):
    plain = run(*made(folder, None)[:2], COMPUTED, made(folder, None)[2])[0]
    modules, specs, inputs = made(folder, "tokens:1")
    u, attention, updates, scores = run(modules, specs, COMPUTED, inputs)
    assert torch.equal(u, plain)
    v, refreshed, fresh = run(modules, specs, REFRESH, inputs, attention, 0 * updates, scores)
    torch.testing.assert_close(v, u, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(refreshed, updates, atol=1e-4, rtol=1e-4)
    assert fresh.eq(1).all()
    modules, specs, inputs = made(folder, "tokens:0.1")
    v, refreshed, fresh = run(modules, specs, REFRESH, inputs, attention, updates, scores)
    torch.testing.assert_close(v, u, atol=1e-4, rtol=1e-4)
    assert 0 < fresh.mean() < 0.3
    for wrong in ((0 * attention, updates), (attention, 0 * updates)):
        assert (run(modules, specs, REFRESH, inputs, *wrong, scores)[0] - u).norm() > 1e-2 * u.norm()


def test_the_indicator_changes_with_the_step(folder):
    """By the modulation, on the same tokens."""
    modules, specs, inputs = made(folder, "residual")
    place = [s.name for s in specs[COMPUTED].inputs].index("modulation")
    other = [*inputs[:place], inputs[place] + 0.1, *inputs[place + 1 :]]
    a, b = (run(modules, specs, INDICATOR, given)[0] for given in (inputs, other))
    assert (a - b).abs().mean() / a.abs().mean() > 1e-3


def test_engines_that_there_are_not():
    with pytest.raises(UnknownNameError, match="unknown engine"):
        act_of("skip0", None)
    with pytest.raises(UnknownNameError, match="unknown engine"):
        act_of("stage0", "wrong")


def test_features_that_there_are_not(folder):
    family, path = folder
    with pytest.raises(InputError, match="unknown features"):
        registry.family(family).from_folder(path, torch.float32, {"features": "everything"})


def test_cheaper_engines_take_what_the_computed_one_gives():
    stage = Stage(1, 6, 1)
    inputs = [TensorSpec("tokens", (4, 6, 3), "bf16"), TensorSpec("context", (4, 5, 8), "bf16")]
    for features, acts in ACTS.items():
        given = {s.name: s for s in engine_spec(COMPUTED, stage, inputs, features).outputs}
        for action in acts:
            spec = engine_spec(action, stage, inputs, features)
            assert spec.name == f"{action}1" and spec.inputs[:2] == tuple(inputs)
            assert [s for s in spec.inputs[2:]] == [given[name] for name in TAKES.get(action, ())]
