"""The profile of a tiny eager bundle: what adds up, what is counted, and what stands in the reports."""

import gc
import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

import jitexport
from jitexport import profile as profiling
from jitexport import registry
from jitexport.bundle.reading import read_manifest
from jitexport.errors import InputError
from jitexport.flops import count_flops
from jitexport.plan import CustomSchedule
from jitexport.profile.measure import PeakMemory, Timing, shortest
from jitexport.profile.phases import Ratio, Recorder
from jitexport.profile.rounds import Way
from jitexport.profile.timeline import draw_timeline

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bundle(make_bundle):
    return make_bundle(custom=CustomSchedule((2, 1, 2), (0.35, 0.62, 1.0)))


@pytest.fixture(scope="module")
def pipe(bundle):
    return jitexport.load(bundle)


@pytest.fixture(scope="module", autouse=True)
def ceiling():
    """Measured once: it takes seconds."""
    rate = profiling.matmul_rate(torch.float32, CPU, seconds=0.02)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jitexport.profile.rounds.matmul_rate", lambda *a: rate)
        yield rate


@pytest.fixture(scope="module")
def measured(pipe, bundle):
    flops = profiling.engine_flops(read_manifest(bundle))
    return profiling.profile_pipeline(pipe, "tiny", "a red fox", flops=flops, speedup=(50, 20.0), repeats=3)


def test_a_profile_runs_on_the_threads_of_a_call(bundle, monkeypatch):
    seen = []
    original = Recorder.image

    def image(self, *arguments):
        seen.append(torch.get_num_threads())
        return original(self, *arguments)

    monkeypatch.setattr(Recorder, "image", image)
    before = torch.get_num_threads()
    pipe = jitexport.load(bundle, threads=before + 2)
    profiling.profile_pipeline(pipe, "tiny", "a red fox", repeats=1)
    assert seen == [before + 2] * 2 and torch.get_num_threads() == before


# --- measure ---


@pytest.mark.parametrize(
    ("seconds", "median", "p10", "p90"),
    [
        ([3.0], 3.0, 3.0, 3.0),
        ([1.0, 2.0], 1.5, 1.0, 2.0),
        ([5.0, 1.0, 2.0], 2.0, 1.0, 5.0),
        (list(range(11, 0, -1)), 6, 2, 10),
    ],
)
def test_timing_is_median_and_percentiles(seconds, median, p10, p90):
    assert Timing.of(seconds) == Timing(median, p10, p90)


def test_shortest_takes_the_fastest_run_after_the_first(monkeypatch):
    clock = {"now": 0.0}
    takes = iter([0.0, 3.0, 1.0, 2.0, 3.0])
    monkeypatch.setattr("jitexport.profile.measure.now", lambda device: clock["now"])

    def work():
        clock["now"] += next(takes)

    assert shortest(work, CPU, 5.0) == 1.0
    assert clock["now"] == 6.0  # the last run began before the time was up


def test_rates_are_of_this_machine(ceiling):
    x = torch.randn(1024, 1024)
    once = 2 * 1024**3 / shortest(lambda: x @ x, CPU, 0.1)
    assert 0.2 < ceiling / once < 20
    assert 1e8 < profiling.copy_rate(CPU, size=2**24, seconds=0.02) < 1e13


def test_peak_memory_counts_from_its_making():
    kept = torch.ones(2**25)  # 128 MiB
    del kept
    gc.collect()  # what other tests left may not go between the two readings
    memory = PeakMemory(CPU)
    before = memory.process()
    kept = torch.ones(2**26)
    assert memory.process() - before > 0.9 * kept.nbytes
    assert memory.gpu() is None


# --- phases ---


def test_spans_follow_each_other_and_cover_the_image(pipe):
    spans = Recorder(pipe).image("a red fox", 0)
    assert spans[0].start == 0 and all(s.start <= s.end for s in spans)
    assert all(0 <= b.start - a.end < 0.05 for a, b in pairwise(spans))
    loop = [(s.phase, s.step) for s in spans if s.step is not None]
    expected = []
    for stage, steps in (("stage2", [0, 1]), ("stage1", [2]), ("stage0", [3, 4])):
        for i in steps:
            expected += [("transition" if i == steps[0] else "step", i), (stage, i), ("step", i)]
    assert loop == expected
    assert [s.phase for s in spans if s.step is None] == ["text", "condition", "draw", "decode", "image"]


def test_recording_changes_neither_the_image_nor_the_pipeline(pipe):
    engines = dict(pipe.engines)
    recorder = Recorder(pipe)
    latents = []
    denoise = recorder.pipe.denoise
    recorder.pipe.denoise = lambda *a, **k: latents.append(denoise(*a, **k)) or latents[-1]
    with torch.inference_mode():
        recorder.image("a red fox", 7)
    wanted = pipe("a red fox", generator=torch.Generator().manual_seed(7), output_type="latent").images
    assert torch.equal(latents[0], wanted)
    assert pipe.engines == engines


def test_profile_of_one_image_adds_up(pipe):
    once = profiling.profile_pipeline(pipe, "tiny", "a red fox", repeats=1)
    seconds = {name: timing.median for name, timing in once.phases.items()}
    assert sum(seconds.values()) - seconds["denoise"] == pytest.approx(once.total.median, abs=0.05)
    loop = sum(seconds[n] for n in ("draw", "transition", "step"))
    assert once.overhead == pytest.approx(loop / seconds["denoise"])
    assert sum(s.engine.median + s.loop.median for s in once.steps) == pytest.approx(
        seconds["denoise"] - seconds["draw"]
    )
    assert once.speedup is None and all(e.flops is None for e in once.engines)


def test_profile_has_every_step_and_what_was_realised(measured, pipe):
    assert [(s.step, s.stage, s.sigma) for s in measured.steps] == [
        (i, f"stage{k}", pipe.schedule.sigmas[i]) for i, k in enumerate((2, 2, 1, 0, 0))
    ]
    full = next(e for e in measured.engines if e.name == "stage0")
    assert measured.speedup.realised == pytest.approx(50 * full.run.median / measured.phases["denoise"].median)
    assert measured.speedup.share == pytest.approx(measured.speedup.realised / 20)
    assert measured.timeline[-1].end == pytest.approx(measured.total.median)


def test_engines_have_their_flops_and_runs(measured, bundle):
    found = {e.name: e for e in measured.engines}
    assert {name: (e.runs, e.tokens) for name, e in found.items()} == {
        "text": (1, None), "condition": (1, None), "decode": (1, None),
        "stage2": (2, 33), "stage1": (1, 59), "stage0": (2, 96),
    }  # fmt: skip
    manifest = read_manifest(bundle)
    family = registry.family(manifest.model.family)
    adapter = family.from_configs(manifest.model.configs, manifest.model.settings, torch.float32)
    spec = next(e.spec() for e in manifest.engines if e.name == "stage1")
    assert found["stage1"].flops == count_flops(adapter.module("stage1"), spec) > 0
    assert found["stage1"].flops_per_second == pytest.approx(found["stage1"].flops / found["stage1"].run.median)
    assert found["stage1"].ceiling_share == pytest.approx(found["stage1"].flops_per_second / measured.ceiling)


# --- rounds ---


class Clocked(Way):
    """A way that takes known seconds, and notes when it is run."""

    def __init__(self, label, takes, log):
        super().__init__(label)
        self.takes, self.log = list(takes), log

    def run(self, seed, *, counted):
        self.log.append((self.label, seed, counted))
        if counted:
            self.seconds.append(self.takes.pop(0))

    def profile(self, ratio):
        return profiling.Profile(self.label, 1, len(self.seconds), Timing.of(self.seconds), self.seconds, ratio)


def test_ways_are_measured_in_turns_and_ratios_taken_within_a_round():
    """A machine that slows down threefold after the first round changes no ratio."""
    log = []
    ways = [Clocked("first", [9.0, 27.0, 27.0], log), Clocked("ours", [1.0, 3.0, 3.0], log)]
    first, ours = profiling.profile_ways(ways, repeats=3)
    assert log == [(name, i, i > 0) for i in range(4) for name in ("first", "ours")]
    assert first.ratio == Ratio(1.0, 1.0, 1.0) and ours.ratio == Ratio(9.0, 9.0, 9.0)
    assert ours.total.median == 3.0 and ours.seconds == [1.0, 3.0, 3.0]


def test_a_ratio_is_the_median_over_rounds_and_has_its_range():
    assert Ratio.of([8.0, 8.0, 9.0], [4.0, 1.0, 3.0]) == Ratio(median=3.0, least=2.0, most=8.0)
    with pytest.raises(ValueError):  # a round that one of them has not
        Ratio.of([1.0, 2.0], [1.0])


# --- peers ---


@pytest.fixture
def model_at_hand(tiny_flux, monkeypatch):
    monkeypatch.setattr("jitexport.profile.peers.model_folder", lambda manifest: tiny_flux)


@pytest.mark.parametrize(
    ("peer", "label"), [("diffusers", "50 steps, eager fp32"), ("few-step", "5 steps"), ("eager", "jit, eager fp32")]
)
def test_peers_run_the_bundles_model(bundle, model_at_hand, peer, label):
    way = profiling.peer_way(peer, read_manifest(bundle), "a red fox")
    [found] = profiling.profile_ways([way], repeats=1)
    assert label in found.label and found.batch == 1 and 0 < found.total.median <= found.total.p90


def test_unknown_peer(bundle):
    with pytest.raises(InputError, match="unknown peer"):
        profiling.peer_way("magic", read_manifest(bundle), "a red fox")


def test_all_ways_make_the_same_image(bundle, pipe, model_at_hand):
    """The eager peer to the rounding of two bits of 256; diffusers one of the same size."""
    manifest = read_manifest(bundle)
    wanted = np.asarray(pipe("a red fox", generator=torch.Generator().manual_seed(3)).images[0]).astype(int)
    eager = profiling.peer_way("eager", manifest, "a red fox").pipe
    found = np.asarray(eager("a red fox", generator=torch.Generator().manual_seed(3)).images[0]).astype(int)
    assert np.abs(found - wanted).max() <= 2
    [image] = profiling.peer_way("diffusers", manifest, "a red fox").call(3)
    assert np.asarray(image).shape == wanted.shape


@pytest.fixture(scope="module")
def others(make_bundle):
    """A bundle of another schedule, and one of the first schedule for another backend's sake: built anew."""
    return make_bundle(custom=CustomSchedule((1, 1), (0.5, 1.0))), make_bundle(
        custom=CustomSchedule((2, 1, 2), (0.35, 0.62, 1.0)), command=("again",)
    )


def test_several_bundles_share_what_is_the_same(bundle, others, model_at_hand):
    paths = [bundle, *others]
    profiles = profiling.profile_bundles(paths, "a red fox", repeats=2, peers=["diffusers", "eager"])
    names = [p.name for p in paths]
    assert [p.label for p in profiles] == [
        "diffusers, 50 steps, eager fp32", f"{names[0]}: jit, eager fp32", f"{names[1]}: jit, eager fp32",
        *(f"{name}: jit, eager fp32" for name in names),
    ]  # fmt: skip
    assert all(len(p.seconds) == 2 for p in profiles)
    for p in profiles:
        ratios = [a / b for a, b in zip(profiles[0].seconds, p.seconds, strict=True)]
        assert (p.ratio.least, p.ratio.most) == (min(ratios), max(ratios))
    ours = profiles[-3:]
    assert ours[0].peak_memory["process"] > 0 and not ours[1].peak_memory  # only the first is alone in the process
    assert [len(p.steps) for p in ours] == [5, 2, 5]


def test_bundles_that_cannot_be_compared_are_refused(bundle, make_bundle):
    for other, what in ((make_bundle("tiny-schnell"), "model"), (make_bundle(batch=2), "batch")):
        with pytest.raises(InputError, match=f"differ in {what}") as caught:
            profiling.profile_bundles([bundle, other], "a red fox", repeats=1)
        assert str(other) in str(caught.value) and caught.value.remedy
    with pytest.raises(InputError, match="named twice"):
        profiling.profile_bundles([bundle, bundle], "a red fox", repeats=1)


# --- reports ---


def test_timeline_is_a_picture(measured, tmp_path):
    from PIL import Image

    call = profiling.CallWay(lambda seed: [Image.new("RGB", (8, 8))], "a peer", CPU)
    [peer] = profiling.profile_ways([call], repeats=2)
    for profiles, path in (([measured], tmp_path / "one.png"), ([peer, measured], tmp_path / "two.png")):
        draw_timeline(profiles, profiling.conditions(), path)
    one, two = (Image.open(tmp_path / name) for name in ("one.png", "two.png"))
    assert one.width == two.width > 800 and two.height > one.height > 400


def test_names_on_the_timeline_are_no_formulas(measured, tmp_path):
    draw_timeline([replace(measured, label=r"out$\no$such")], profiling.conditions(), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_trace_names_the_engines(pipe, tmp_path):
    profiling.chrome_trace(pipe, "a red fox", tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [e["name"] for e in events if e["name"].startswith("engine ") and e.get("ph") == "X"]
    assert sorted(set(names)) == sorted(f"engine {n}" for n in pipe.engines)
    assert names.count("engine stage0") == 2


def test_command(run, bundle, tmp_path):
    code, out, err = run(
        "profile", bundle, "--repeats", "1", "--prompt", "a red fox", "--json",
        "--timeline", tmp_path / "t.png", "--trace", tmp_path / "t.json",
    )  # fmt: skip
    assert code == 0, err
    report = json.loads(out)
    (profile,) = report["profiles"]
    assert profile["ceiling"] > 0 and profile["peak_memory"]["process"] > 0 and len(profile["steps"]) == 5
    assert report["bundle"] == str(bundle) and report["bundles"] == [str(bundle)]
    assert profile["ratio"] == {"median": 1.0, "least": 1.0, "most": 1.0} and len(profile["seconds"]) == 1
    assert len(profile["products"]) == 2 and profile["ceiling"] == max(profile["products"])
    assert (tmp_path / "t.png").is_file() and json.loads((tmp_path / "t.json").read_text())


def test_command_prints_what_it_measured(run, bundle):
    code, out, _ = run("profile", bundle, "--repeats", "1", "--prompt", "a red fox")
    assert code == 0
    for text in ("transition", "stage1", "of denoising", "predicted", "GFLOP/s", "of memory in the process"):
        assert text in out
