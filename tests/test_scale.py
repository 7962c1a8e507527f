"""How cost grows: what the script measures, on small sizes."""

import pytest
import torch

from jitexport.grid import TokenGrid
from jitexport.methods.jit import JiT
from jitexport.sampler import draw, sample
from jitexport.schedule import StageSchedule, make_stages, timesteps
from tests.scripting import script

scale = script("bench/scale")


def test_living_bytes_are_counted_and_forgotten():
    given = torch.zeros(1000)
    with scale.Living() as living:
        a = torch.ones(100)  # 400 bytes
        b = a + 1  # 800 in all
        assert living.bytes == 800
        view = b[:10]  # no memory of its own
        del a, b
        assert living.bytes == 400  # the view holds on to its storage
        del view
        given.add_(1)  # was there before
        assert living.bytes == 0 and living.peak == 800


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5, 6])
def test_every_number_of_stages_runs_all_steps(stages):
    assert sum(scale.split(scale.STEPS, stages)) == scale.STEPS
    row = scale.measure_loop(64, 1, stages, repeats=1)
    assert row["seconds"] > 0 and row["stages"] == stages


def test_memory_of_the_loop_grows_with_the_batch_and_is_a_few_latents():
    one, four = (scale.measure_loop(256, batch, 3, repeats=1)["peak_bytes"] for batch in (1, 4))
    assert four == pytest.approx(4 * one, rel=0.1)
    assert one < 20 * 256 * scale.CHANNELS * 4


def test_memory_of_the_loop_of_videos_is_a_few_latents():
    """HunyuanVideo-1.5's 121 frames at 480p and 720p, 18 steps of three stages: linear in the tokens."""
    peaks = []
    for shape in ((31, 30, 53), (31, 45, 80)):
        method = JiT(TokenGrid(shape), JiT.options("default"))
        stages = make_stages(method.grid.tokens, (7, 4, 7), (0.35, 0.62, 1.0))
        schedule = StageSchedule(stages, timesteps(method.settings.timesteps, 18, None))
        draws = draw(method, schedule, (32, *shape), 1, [torch.Generator().manual_seed(0)])
        with torch.inference_mode(), scale.Living() as living:
            sample(method, schedule, draws, lambda s, _: lambda action, tokens, step: [tokens])
        peaks.append(living.peak / draws.latents.nbytes)
    assert max(peaks) < 10 and peaks[0] == pytest.approx(peaks[1], rel=0.02)


def test_the_exponent_is_that_of_the_growth():
    rows = [{"x": x, "y": 3 * x**2} for x in (1, 2, 4)]
    assert scale.exponent(rows, "x", "y") == pytest.approx(2)


def test_the_page_has_every_row():
    report = {
        "conditions": {"date": "2026-01-01", "cpu": "a CPU", "threads": 2, "torch": "2.13.0"}, "repeats": 1,
        "loop": [scale.measure_loop(64, 1, 3, 1), scale.measure_loop(256, 1, 3, 1)],
        "plan": [{"tokens": 64, "seconds": 0.5, "step_tflops": 1.0, "stages": [(7, 22)], "predicted_speedup": 4.0}],
        "engine": [
            {"tokens": 64, "batch": 1, "build_seconds": 9.0, "seconds": 0.1, "gflop": 3.0, "gflop_per_second": 30.0,
             "share_of_ceiling": 0.5}
        ],
    }  # fmt: skip
    page = scale.markdown(report)
    assert "| 64 | 1 | 3 |" in page and "| 256 | 1 | 3 |" in page and "7 x 22" in page and "50% |" in page
    assert "From 64 to 256 tokens" in page
