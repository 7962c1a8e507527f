"""Forecasts of velocities: exact where they should be, and nothing but weights of what was computed."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jitexport import registry
from jitexport.errors import InputError
from jitexport.methods.temporal.base import CacheOptions, Record, combine, parse_cache, polynomial_weights
from jitexport.methods.temporal.foca import FoCa
from jitexport.methods.temporal.meancache import MeanCache
from jitexport.methods.temporal.taylor import Reuse, Taylor
from jitexport.schedule import COMPUTED, FORECAST, Step, spaced_sigmas

levels = st.lists(st.floats(0.01, 1.0), min_size=4, max_size=12, unique_by=lambda x: round(x, 2)).map(
    lambda values: sorted(values, reverse=True)
)


class Wild(FoCa):
    """Without a limit: these tests look far ahead."""

    most_amplified = math.inf


def steps_of(sigmas, actions):
    """Steps from level to level, of which the last level is only reached."""
    return [Step(i, a, b, action) for i, ((a, b), action) in enumerate(zip(pairwise(sigmas), actions, strict=True))]


def run(cache, sigmas, actions, velocity):
    """Each step's velocity when the transformer's is a function of the noise level; forecasts by the cache."""
    history, seen = cache.begin(), []
    for step in steps_of(sigmas, actions):

        def evaluate(action, tokens, index, step=step):
            assert (action, index) == (COMPUTED, step.index)
            return [torch.full((1, 2, 3), float(velocity(step.sigma)), dtype=torch.float64).float()]

        u, history = cache.velocity(evaluate, torch.zeros(1, 2, 3), step, history)
        seen.append(u)
    return seen


@given(levels, st.integers(0, 3), st.data())
def test_taylor_is_exact_on_polynomials_of_its_order(sigmas, order, data):
    coefficients = data.draw(st.lists(st.floats(-2, 2), min_size=order + 1, max_size=order + 1))
    known = min(order + 1, len(sigmas) - 2)
    actions = [COMPUTED] * known + [FORECAST] * (len(sigmas) - 1 - known)

    def polynomial(x):
        return sum(c * x**k for k, c in enumerate(coefficients[:known]))

    found = run(Taylor({"order": order}), sigmas, actions, polynomial)
    for u, sigma in zip(found, sigmas, strict=False):
        if sum(map(abs, polynomial_weights(sigmas[:known], sigma))) <= Taylor().most_amplified:
            torch.testing.assert_close(u, torch.full_like(u, polynomial(sigma)), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["taylor:order=1", "taylor:order=3", "meancache", "foca", "taylorseer:order=2"])
@given(sigmas=levels, data=st.data())
def test_errors_of_what_was_computed_do_not_grow(name, sigmas, data):
    """More than so many times in one forecast, wherever the levels lie; the last computed value alone where they lie
    too close together."""
    name, options = parse_cache(name)
    cache = registry.cache(name)(options)
    rest = len(sigmas) - 2
    steps = steps_of(
        sigmas, [COMPUTED, *data.draw(st.lists(st.sampled_from([COMPUTED, FORECAST]), min_size=rest, max_size=rest))]
    )
    for i in range(1, len(steps)):
        past = [r.step for r in past_of(cache, steps[:i])]
        weights = cache.tame_weights(past, steps[i])
        last = max(k for k, step in enumerate(past) if step.action == COMPUTED)
        assert sum(map(abs, weights)) <= cache.most_amplified or len(weights) <= len(past) - last
        assert sum(weights) == pytest.approx(1.0)


def past_of(cache, steps):
    """What a cache remembers of steps."""
    past = cache.begin()
    for step in steps:
        past = cache.remember(past, step, torch.zeros(1))
    return past


def test_levels_that_lie_close_together_lower_the_order():
    parabola = Taylor({"order": 2})
    near = [Step(0, 1.0, 0.99), Step(1, 0.99, 0.98), Step(2, 0.98, 0.96)]
    assert len(parabola.tame_weights(near, Step(3, 0.975, 0.9))) == 3  # it does not go far
    assert parabola.tame_weights(near, Step(3, 0.97, 0.9)) == pytest.approx([-1.0, 2.0])
    for far in (0.96, 0.9):
        assert parabola.tame_weights(near, Step(3, far, 0.8)) == [1.0]
    assert len(Taylor({"order": 2, "variable": "step"}).tame_weights(near, Step(30, 0.1, 0.0))) == 3  # as published


def test_order_one_is_the_line_through_the_last_two_computed_velocities():
    cache = Taylor()
    past = [Step(0, 1.0, 0.9), Step(2, 0.8, 0.7)]
    torch.testing.assert_close(torch.tensor(cache.weights(past, Step(5, 0.5, 0.4))), torch.tensor([-1.5, 2.5]))
    by_steps = Taylor({"variable": "step"}).weights(past, Step(5, 0.5, 0.4))
    torch.testing.assert_close(torch.tensor(by_steps), torch.tensor([-1.5, 2.5]))
    assert Taylor({"variable": "step"}).weights(past, Step(3, 0.65, 0.4)) == [-0.5, 1.5]


def test_taylor_of_order_nought_is_reuse():
    actions = [COMPUTED, FORECAST, FORECAST, COMPUTED, FORECAST, COMPUTED]
    sigmas = [1.0, 0.9, 0.7, 0.5, 0.4, 0.2, 0.0]
    a, b = (run(cache, sigmas, actions, lambda x: x**3) for cache in (Taylor({"order": 0}), Reuse()))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert torch.equal(b[1], b[0]) and torch.equal(b[2], b[0]) and torch.equal(b[4], b[3])


@given(st.integers(4, 20), st.floats(1, 6), st.floats(-2, 2), st.floats(-2, 2))
def test_foca_is_exact_on_lines(n, shift, slope, start):
    sigmas = spaced_sigmas(1.0, 0.0, n, shift)
    actions = [COMPUTED] * 2 + [FORECAST] * (n - 2)
    for u, sigma in zip(run(Wild(), sigmas, actions, lambda x: start + slope * x), sigmas, strict=False):
        torch.testing.assert_close(u, torch.full_like(u, start + slope * sigma), atol=1e-4, rtol=1e-4)


def test_foca_is_heuns_rule_from_the_last_computed_velocity():
    """Its slope is the mean of that between the last two computed steps and that between the last two of any kind."""
    sigmas, values = [1.0, 0.8, 0.7, 0.4], [3.0, 1.0]
    actions = [COMPUTED, COMPUTED, FORECAST, FORECAST]
    found = run(Wild(), [*sigmas, 0.1], actions, dict(zip(sigmas, values, strict=False)).get)
    anchor = (3.0 - 1.0) / (1.0 - 0.8)  # both slopes, at the first forecast
    first = 1.0 + (0.7 - 0.8) * anchor
    local = (first - 1.0) / (0.7 - 0.8)
    second = 1.0 + (0.4 - 0.8) * (anchor + local) / 2
    assert [float(u[0, 0, 0]) for u in found[2:]] == pytest.approx([first, second], abs=1e-5)


def test_foca_does_not_grow_errors_over_long_gaps():
    """An error of the last velocity before a gap stays what the slope makes of it, however many forecasts follow."""
    sigmas = spaced_sigmas(1.0, 0.0, 30, 1.0)
    actions = [COMPUTED] * 2 + [FORECAST] * 28
    exact, wrong = (run(Wild(), sigmas, actions, lambda x, e=e: x + e * (x == sigmas[1])) for e in (0.0, 1e-3))
    errors = [float((a - b).abs().max()) for a, b in zip(exact, wrong, strict=True)]
    assert max(errors) <= 1.01e-3 * 29


def test_meancache_is_the_published_formula():
    """jvp = (first velocity of the window - mean) / window's length; v = last velocity - jvp * step."""
    sigmas = [1.0, 0.9, 0.75, 0.6, 0.3, 0.1]
    actions = [COMPUTED, COMPUTED, COMPUTED, FORECAST, COMPUTED]
    values = dict(zip(sigmas, [2.0, 1.5, 1.2, None, 0.4], strict=False))
    found = [float(u[0, 0, 0]) for u in run(MeanCache({"window": 2}), sigmas, actions, values.get)]
    displacement = 1.5 * (0.75 - 0.9) + 1.2 * (0.6 - 0.75)  # of the image in the two last steps
    mean = displacement / (0.6 - 0.9)
    jvp = (1.5 - mean) / (0.6 - 0.9)
    assert found[3] == pytest.approx(1.2 - jvp * (0.3 - 0.6), abs=1e-6)


def test_meancache_moves_as_lines_do():
    """On velocities linear in the noise level the mean's derivative is half the slope, whatever the steps."""
    slope = 0.7
    past = [Step(i, a, b) for i, (a, b) in enumerate(pairwise([1.0, 0.99, 0.98, 0.97]))]
    step = Step(3, 0.97, 0.5)
    moved = combine(MeanCache().weights(past, step), [torch.tensor(slope * s.sigma) for s in past])
    assert float(moved - slope * 0.98) == pytest.approx(slope / 2 * (0.5 - 0.97), rel=0.4)  # Euler's mean is coarse
    assert MeanCache({"window": 1}).weights(past[-1:], step) == pytest.approx([1.0])


@pytest.mark.parametrize("name", ["reuse", "taylor", "meancache", "foca"])
@given(sigmas=levels, data=st.data())
def test_weights_sum_to_one(name, sigmas, data):
    """So a velocity that does not change is forecast as it is."""
    cache = registry.cache(name)()
    actions = [COMPUTED, *data.draw(st.lists(st.sampled_from([COMPUTED, FORECAST]), min_size=len(sigmas) - 2,
                                             max_size=len(sigmas) - 2))]
    for u in run(cache, sigmas, actions, lambda x: 0.5):
        torch.testing.assert_close(u, torch.full_like(u, 0.5), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["reuse", "taylor", "meancache", "foca"])
def test_memory_is_bounded(name):
    cache = registry.cache(name)()
    history = cache.begin()
    for i in range(40):
        step = Step(i, 1 - i / 40, 1 - (i + 1) / 40, FORECAST if i % 3 else COMPUTED)
        _, history = cache.velocity(lambda *_: [torch.ones(1, 2, 3)], torch.zeros(1, 2, 3), step, history)
    assert len(history) <= 5 and all(isinstance(record, Record) for record in history)


def test_history_goes_through_a_change_of_stage_or_is_forgotten():
    cache = Taylor()
    past = (Record(Step(0, 1.0, 0.9), torch.ones(1, 2, 3)), Record(Step(1, 0.9, 0.8), torch.ones(1, 2, 3)))
    assert cache.carried(past, None) == ()
    carried = cache.carried(past, lambda value: value.repeat(1, 2, 1) * 3)
    assert [r.step for r in carried] == [r.step for r in past]
    assert all(torch.equal(r.value, torch.full((1, 4, 3), 3.0)) for r in carried)


# --- options ---


def test_text_names_a_cache_and_its_options():
    assert parse_cache("taylor") == ("taylor", {})
    assert parse_cache("taylor:order=2,every=3") == ("taylor", {"order": 2, "every": 3})
    assert parse_cache("reuse:computed=0+1+4") == ("reuse", {"computed": (0, 1, 4)})
    assert parse_cache("teacache:threshold=.5,coefficients=1.5+-2+0")[1] == {
        "threshold": 0.5, "coefficients": (1.5, -2, 0),
    }


@pytest.mark.parametrize("text", ["taylor:", "taylor:order", "taylor:order=", "taylor:=2", "taylor:order=1,order=2"])
def test_text_that_says_nothing(text):
    with pytest.raises(InputError, match="name=value"):
        parse_cache(text)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("taylor", {"order": -1}), ("taylor", {"order": 1.5}), ("taylor", {"variable": "time"}),
        ("taylor", {"every": 0}), ("taylor", {"warmup": 0}),
        ("taylor", {"computed": (3, 1)}), ("taylor", {"computed": (-1,)}),
        ("taylor", {"computed": (1.5,)}), ("taylor", {"spatial": 2}), ("meancache", {"window": 0}),
        ("delta-dit", {"boundary": 1.5}), ("teacache", {"threshold": 0}),
    ],
)
def test_options_without_a_meaning(name, options):
    with pytest.raises(InputError, match="without a meaning"):
        registry.cache(name)(options)


@pytest.mark.parametrize("name", registry.CACHES)
def test_options_survive_a_manifest(name):
    cache = registry.cache(name)({"computed": (0, 4), "warmup": 2})
    again = registry.cache(name)(cache.options)
    assert again.settings == cache.settings and again.options == cache.options
    with pytest.raises(InputError, match="unknown option") as caught:
        registry.cache(name)({"wrong": 1})
    assert caught.value.found == "wrong" and "warmup" in caught.value.expected


def test_usual_options():
    assert CacheOptions() == CacheOptions(every=None, warmup=1, computed=(), spatial=0.65)
