from dataclasses import replace

import pytest
import torch

from jitexport import registry
from jitexport.errors import InputError, ScheduleError, UnknownNameError
from jitexport.models.flux import FluxAdapter
from jitexport.models.sources import config_adapter, find_source
from jitexport.plan import CustomSchedule, parse_custom, plan
from jitexport.schedule import BETA_PAPER, BETA_RELEASED, beta_sigmas, timesteps, uniform_sigmas


@pytest.fixture(scope="module")
def small(tiny_flux):
    return FluxAdapter.from_folder(tiny_flux, torch.float32)


@pytest.fixture(scope="module")
def schnell(tiny_schnell):
    return FluxAdapter.from_folder(tiny_schnell, torch.float32)


@pytest.fixture(scope="module")
def dev():
    return config_adapter(find_source("flux"), torch.float32)


def shape(made):
    return [(s.steps, s.tokens) for s in made.schedule.stages]


def test_default_is_jit_at_four(small):
    made = plan(small)
    assert (made.method, made.preset, made.speedup, made.reference_steps) == ("jit", "default", 4.0, 50)
    assert shape(made) == [(7, 33), (4, 59), (7, 96)]
    assert made.schedule.sigmas == beta_sigmas(18, *BETA_PAPER)
    assert made.predicted_speedup == pytest.approx(made.reference_tflops / made.tflops)
    assert made.tflops == pytest.approx((7 * made.cost(33) + 4 * made.cost(59) + 7 * made.cost(96)) / 1e12)
    assert made.reference_tflops == pytest.approx(50 * made.cost(96) / 1e12)


def test_runs_are_the_schedules_stages_with_what_they_cost(small):
    made = plan(small)
    runs = made.runs()
    assert [(r.index, len(r.actions), r.tokens) for r in runs] == [(2, 7, 33), (1, 4, 59), (0, 7, 96)]
    assert [r.step_tflops for r in runs] == pytest.approx([made.cost(r.tokens) / 1e12 for r in runs])
    assert sum(r.tflops for r in runs) == pytest.approx(made.tflops)
    ends = [sigma for r in runs for sigma in r.sigmas]
    assert ends == [made.schedule.sigmas[i] for i in (0, 7, 7, 11, 11, 18)]


def test_stages_in_a_row_on_one_engine_are_one_run(dev):
    made = plan(dev, method="bottleneck", speedup=4, cache="taylor")
    runs = made.runs()
    assert [r.index for r in runs] == [0, 1, 0][: len(runs)]
    assert tuple(action for r in runs for action in r.actions) == made.schedule.actions
    assert sum(r.tflops for r in runs) == pytest.approx(made.tflops)


@pytest.mark.parametrize(
    ("speedup", "published", "ratio"),
    [(2, [(5, 1024), (6, 1945), (9, 4096)], 2.17), (3, [(3, 1024), (3, 1636), (6, 4096)], 3.53)],
)
def test_two_passes_a_step_and_one_preview(speedup, published, ratio):
    """Stable Diffusion 3 with its usual guidance, 17.8 TFLOP a step; RALU looks at one picture of 2.5 TFLOP."""
    made = plan(config_adapter(find_source("sd3"), torch.bfloat16), method="ralu", speedup=speedup)
    assert shape(made) == published and made.passes == 2
    assert made.cost(4096) / 1e12 == pytest.approx(2 * 8.90, abs=0.02)
    spent = sum(steps * made.cost(tokens) for steps, tokens in published)
    assert made.preview / 1e12 == pytest.approx(2.51, abs=0.01)
    assert made.tflops == pytest.approx((spent + made.preview) / 1e12)
    assert made.reference_tflops == pytest.approx(28 * made.cost(4096) / 1e12)
    assert made.predicted_speedup == pytest.approx(ratio, abs=0.005)


@pytest.mark.parametrize(
    ("name", "passes"),
    [("flux", 1), ("flux2-klein-4b", 2), ("flux2-klein-4b-distilled", 1), ("qwen-image", 1), ("sd3.5-large-turbo", 1),
     ("hunyuan-video-1.5", 2)],
)
def test_passes_of_a_step_are_those_without_a_negative_prompt(name, passes):
    source = find_source(name)
    family = registry.family(source.pipeline_class)
    defaults = family.defaults_of(source.configs, family.usual(source.configs) | source.settings)
    assert defaults.guidance.passes == passes


def test_presets_bring_their_timesteps(small):
    assert plan(small, preset="released").schedule.sigmas == beta_sigmas(18, *BETA_RELEASED)


def test_no_speedup_is_the_ordinary_sampler(small):
    made = plan(small, speedup=1)
    assert (made.method, shape(made)) == ("dense", [(50, 96)])
    assert made.schedule.sigmas == small.native_sigmas(50)
    assert made.predicted_speedup == 1


def test_custom_schedules_take_the_place_of_a_speedup(small):
    made = plan(small, custom=CustomSchedule((2, 1, 3), (0.25, 0.5, 1.0)))
    assert shape(made) == [(2, 24), (1, 48), (3, 96)] and made.speedup is None and made.method == "jit"


def test_reference_steps_can_be_given(small):
    made = plan(small, speedup=2, reference_steps=20)
    assert made.reference_steps == 20 and made.predicted_speedup == pytest.approx(2, rel=0.05)


def test_few_reference_steps(schnell):
    assert schnell.defaults.num_inference_steps == 4
    made = plan(schnell, speedup=2)
    assert made.schedule.nfe <= 4 and made.predicted_speedup >= 2
    assert made.over(50) == pytest.approx(made.predicted_speedup * 50 / 4)
    with pytest.raises(ScheduleError, match="at most 4"):
        plan(schnell, speedup=5)


def test_dense_runs_any_number_of_full_steps(small):
    made = plan(small, method="dense", custom=CustomSchedule((12,), (1.0,)))
    assert made.schedule.sigmas == small.native_sigmas(12) and made.predicted_speedup == pytest.approx(50 / 12)


def test_dense_takes_as_few_steps_as_a_speedup_asks_for(small, schnell):
    made = plan(small, method="dense", speedup=4)
    assert shape(made) == [(12, 96)] and made.predicted_speedup == pytest.approx(50 / 12)
    with pytest.raises(ScheduleError, match="at most 4"):
        plan(schnell, method="dense", speedup=5)


@pytest.mark.parametrize(("steps", "ratios"), [((2, 2), (0.5, 1.0)), ((2,), (0.5,)), ((0,), None)])
def test_dense_has_no_stages_of_fewer_tokens(small, steps, ratios):
    with pytest.raises(ScheduleError, match="all tokens at every step"):
        plan(small, method="dense", custom=CustomSchedule(steps, ratios))


def test_unknown_names(small):
    with pytest.raises(UnknownNameError, match="unknown method"):
        plan(small, method="nonesuch")
    with pytest.raises(InputError, match="unknown JiT preset"):
        plan(small, preset="nonesuch")


@pytest.mark.parametrize("speedup", [0.5, 21, float("nan")])
def test_speedups_out_of_range(small, speedup):
    with pytest.raises(ScheduleError, match="from 1 to 20"):
        plan(small, speedup=speedup)


def test_timesteps_by_kind(small):
    native = small.native_sigmas
    assert timesteps({"kind": "uniform"}, 5, native) == uniform_sigmas(5)
    assert timesteps({"kind": "native"}, 5, native) == native(5)
    assert timesteps({"kind": "beta", "alpha": 2, "beta": 1}, 5, native) == beta_sigmas(5, 2, 1)
    with pytest.raises(ScheduleError, match="unknown timesteps"):
        timesteps({"kind": "karras"}, 5, native)


@pytest.mark.parametrize(
    ("steps", "ratios", "expected"),
    [
        ("7,4,7", "0.35,0.62,1", CustomSchedule((7, 4, 7), (0.35, 0.62, 1.0))),
        (" 3 , 2 ", "0.5, 1.0", CustomSchedule((3, 2), (0.5, 1.0))),
        ("12", None, CustomSchedule((12,))),
        ("4,5,6", None, CustomSchedule((4, 5, 6))),
    ],
)
def test_custom_schedules_as_text(steps, ratios, expected):
    assert parse_custom(steps, ratios) == expected


@pytest.mark.parametrize(
    ("steps", "ratios"), [("7;4", "0.5,1"), ("7,4", "half,1"), ("", "1"), ("7.5", None), ("1,,2", "1")]
)
def test_text_that_is_no_schedule(steps, ratios):
    with pytest.raises(ScheduleError, match="comma-separated numbers") as caught:
        parse_custom(steps, ratios)
    assert "--steps 7,4,7" in caught.value.expected


def test_a_single_step_of_several_is_warned_of(schnell, caplog):
    plan(schnell, speedup=4)
    assert "leaves a single step" in caplog.text
    caplog.clear()
    plan(schnell, speedup=2)
    plan(schnell, custom=CustomSchedule((1,), (1.0,)))
    assert not caplog.records


# --- with a temporal method ---


@pytest.mark.parametrize("cache", ["taylor", "taylorseer:warmup=1", "delta-dit"])
@pytest.mark.parametrize("method", ["dense", "jit", "bottleneck"])
@pytest.mark.parametrize("speedup", [1.5, 4.0, 7.0, 10.0, 20.0])
def test_a_cache_and_a_method_reach_a_speedup_together(dev, method, cache, speedup):
    try:
        made = plan(dev, speedup=speedup, method=method, cache=cache)
    except ScheduleError:  # bottleneck's first and last stage take all tokens
        assert (method, speedup) in {("bottleneck", 20.0)}
        return
    assert speedup <= made.predicted_speedup < 1.6 * speedup
    assert 2 <= len(made.schedule.computed) <= made.schedule.nfe


def test_steps_of_a_cache_by_its_options_come_on_top_of_the_methods_speedup(dev):
    alone = plan(dev, speedup=5.0, method="ralu", preset="paper")
    both = plan(dev, speedup=5.0, method="ralu", preset="paper", cache="taylorseer:every=3,warmup=2")
    assert replace(both.schedule, actions=()) == alone.schedule
    assert both.schedule.computed == (0, 1, 4, 5, 8, 9, 10, 13, 14)
    assert both.predicted_speedup > 1.5 * alone.predicted_speedup


@pytest.mark.parametrize(("every", "steps", "ratio"), [(7, 10, 5.0), (11, 8, 6.25)])
def test_taylorseers_published_intervals(dev, every, steps, ratio):
    """Its skipped steps cost embedding and output layer: nothing beside a block. The last step is computed too."""
    made = plan(dev, speedup=1, cache=f"taylorseer:every={every},warmup=3")
    assert made.method == "dense" and len(made.schedule.computed) == steps
    assert made.predicted_speedup == pytest.approx(ratio, rel=2e-3)


def test_delta_dit_cuts_flux_behind_its_double_blocks(dev):
    made = plan(dev, speedup=1, cache="delta-dit:every=5")
    full, front, rear = (made.costs[action](4096) for action in ("stage", "front", "rear"))
    assert front + rear == pytest.approx(full, rel=1e-3)
    assert front / full == pytest.approx(19 / 57, abs=0.01)  # a block of either kind costs a token as much


def test_a_cache_takes_custom_schedules(small):
    made = plan(small, custom=CustomSchedule((3, 4), (0.4, 1.0)), cache="taylor:computed=1+5")
    assert made.schedule.computed == (0, 1, 3, 5, 6) and made.speedup is None
    with pytest.raises(ScheduleError, match="does not have"):
        plan(small, custom=CustomSchedule((3, 4), (0.4, 1.0)), cache="taylor:computed=1+7")


def test_unknown_caches(small):
    with pytest.raises(UnknownNameError, match="unknown cache"):
        plan(small, cache="memory")
