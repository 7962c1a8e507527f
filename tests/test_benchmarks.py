"""The benchmark scripts around a stand-in for what they measure: pieces, reports, and a plain JiT loop that is JiT."""

import argparse
import dataclasses
import json
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import jitexport
from jitexport.choice import choose
from jitexport.plan import CustomSchedule
from jitexport.profile import measure
from jitexport.specs import DTYPE_NAMES
from tests import tiny
from tests.scripting import SCRIPTS, script

harness, latency, kernels, peers = (script(f"bench/{name}") for name in ("harness", "latency", "kernels", "peers"))


@pytest.fixture(autouse=True)
def ceiling(monkeypatch):
    """The machine's ceiling, which takes seconds, is not measured."""
    monkeypatch.setattr("jitexport.profile.rounds.matmul_rate", lambda *a: 1e12)


# --- harness ---


def test_facts_say_what_was_run_where_and_of_which_code(monkeypatch):
    monkeypatch.setattr("sys.argv", [str(SCRIPTS / "bench" / "kernels.py"), "--tokens", "7 0"])
    known = harness.facts("numpy", "no-such-package")
    assert known["command"] == "python scripts/bench/kernels.py --tokens '7 0'"
    assert known["numpy"] == np.__version__ and known["no-such-package"] is None
    assert {"date", "cpu", "cpu_class", "commit", "torch", "python"} <= known.keys()
    line = harness.said(known)
    assert f"cpu_class {known['cpu_class']}" in line and "no-such-package" not in line


def test_the_commit_is_that_of_the_checkout(monkeypatch):
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=SCRIPTS, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no checkout of git")
    measure.commit.cache_clear()
    assert measure.commit().split("-")[0] == done.stdout[:12]
    measure.commit.cache_clear()
    monkeypatch.setenv("PATH", "")  # no git
    assert measure.commit() is None
    measure.commit.cache_clear()


def test_a_run_is_timed_after_one_that_is_not_counted():
    pauses = iter([0.2, 0.0, 0.0, 0.0])
    timing = harness.timed(lambda: time.sleep(next(pauses)), 3)
    assert timing.p90 < 0.1 and next(pauses, None) is None


def test_rates_are_taken_before_and_after(monkeypatch):
    rates = iter([1e11, 3e11])
    monkeypatch.setattr(harness, "matmul_rate", lambda dtype, device: next(rates))
    with harness.Products(torch.float32) as products:
        assert products.rates == [1e11]
    assert products.best == 3e11 and products.facts() == {"fp32 products before and after, GFLOP/s": "100, 300"}


def test_rows_are_shown_to_people_and_to_machines(capsys):
    rows = [{"way": "a", "ms": 1.25}, {"way": "b [x]", "ms": 10.0}]
    columns = {"way": lambda r: r["way"], "median ms": lambda r: f"{r['ms']:.1f}"}
    harness.show({"cpu": "a CPU", "gpu": None}, rows, columns, as_json=False, title="two ways")
    table = capsys.readouterr().out
    assert "two ways" in table and "b [x]" in table and "10.0" in table and "cpu a CPU" in table and "gpu" not in table
    harness.show({"cpu": "a CPU"}, rows, columns, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"conditions": {"cpu": "a CPU"}, "rows": rows}


def test_reports_are_whole_files(tmp_path):
    harness.write(tmp_path / "new", "x", {"rows": [1]}, "# page\n")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["x.json", "x.md"]
    assert json.loads((tmp_path / "new" / "x.json").read_text()) == {"rows": [1]}
    with pytest.raises(TypeError):  # what cannot be written leaves the last report as it was
        harness.write(tmp_path / "new", "x", {"rows": object()})
    assert json.loads((tmp_path / "new" / "x.json").read_text()) == {"rows": [1]}


def test_a_run_in_pieces_says_what_is_left(capsys):
    pieces = harness.Pieces(0.0)
    assert pieces.left <= 0 < harness.Pieces(60).left
    with pytest.raises(SystemExit) as stopped:
        pieces.stop("bundles", ["b", "c"])
    assert stopped.value.code == 75 and "2 bundles left, from b on" in capsys.readouterr().err


# --- peers ---


def contender(name, colour, calls, fails_at=None):
    """Paints everything in one colour."""

    def open_it(setting):
        def make(prompt, seed):
            calls.append((name, prompt))
            if fails_at is not None and len(calls) > fails_at:
                raise RuntimeError("out of paint")
            return Image.new("RGB", (256, 256), colour)

        return make

    return peers.Contender(name, f"the {name}", open_it)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "matmul_rate", lambda *a: 1e11)
    prompts = peers.demo_prompts(2)
    setting = peers.Setting(Path(), tmp_path)
    results = peers.Results(tmp_path)
    return prompts, lambda c, seconds=60.0: peers.measure(c, setting, prompts, results, harness.Pieces(seconds))


def test_peers_are_measured_in_pieces(bench, tmp_path):
    prompts, measure = bench
    calls = []
    blue = contender("blue", "blue", calls)
    assert not measure(blue, seconds=-1) and len(calls) == 1  # the warm-up
    assert measure(blue) and [p for _, p in calls[2:]] == [text for text, _, _ in prompts]
    assert measure(blue) and len(calls) == 4  # nothing is left to do
    result = json.loads((tmp_path / "blue.json").read_text())
    assert set(result["seconds"]) == {path for _, _, path in prompts} and len(result["rates"]) >= 2


def test_a_peer_that_fails_is_a_result(bench, tmp_path):
    _, measure = bench
    calls = []
    assert measure(contender("red", "red", calls, fails_at=2)) and len(calls) == 3
    assert json.loads((tmp_path / "red.json").read_text())["error"] == "RuntimeError: out of paint"
    assert measure(contender("red", "red", calls)) and len(calls) == 3  # not tried again


def test_report_compares_with_the_reference(bench, tmp_path):
    prompts, measure = bench
    chosen = [contender(peers.REFERENCE, (200, 0, 0), []), contender("ours-red", (190, 0, 0), [])]
    chosen.append(contender("ours-broken", "red", [], fails_at=0))
    assert all(measure(c) for c in chosen)
    peers.report(chosen, prompts, peers.Results(tmp_path), tmp_path, "peers")
    rows = {r["name"]: r for r in json.loads((tmp_path / "peers.json").read_text())["rows"]}
    expected = 10 * np.log10(255**2 / (10**2 / 3))
    assert rows["ours-red"]["psnr"] == pytest.approx(expected, abs=0.01)
    assert rows["ours-red"]["judged"] == rows["ours-red"]["psnr"]
    low, high = rows["ours-red"]["judged_interval"]
    assert low <= rows["ours-red"]["judged"] <= high
    assert rows["ours-red"]["images"] == 2 and rows["ours-red"]["median"] <= rows["ours-red"]["p90"]
    page = (tmp_path / "peers.md").read_text()
    assert "| the ours-red |" in page and "- the ours-broken: RuntimeError: out of paint" in page
    assert (tmp_path / "peers.png").is_file()


@pytest.mark.usefixtures("bench")
def test_ways_to_draw_scenes_are_compared_by_the_objects_found(tmp_path, monkeypatch):
    """Pictures without anything: of what was asked for nothing is there, and of what was not, nothing either."""
    monkeypatch.setattr(peers.DemoData, "scenes", True)
    prompts = peers.demo_prompts(4)
    chosen = [contender(peers.REFERENCE, "white", []), contender("ours-white", "white", [])]
    setting, results = peers.Setting(Path(), tmp_path), peers.Results(tmp_path)
    assert all(peers.measure(c, setting, prompts, results, harness.Pieces(60.0)) for c in chosen)
    peers.report(chosen, prompts, results, tmp_path, "peers")
    for row in json.loads((tmp_path / "peers.json").read_text())["rows"]:
        assert row["judged"] == row["scores"]["objects"] == 0 and row["judged_interval"] == [0, 0]
        assert row["scores"]["clean"] == 1 and row["scores"]["right"] == 0
    page = (tmp_path / "peers.md").read_text()
    assert "## At equal latency: Objects found" in page and "0.00 (0.00 to 0.00): ours-white" in page


def test_what_is_compared_takes_about_as_long():
    made = [("diffusers-50-bf16", 4.0, 60), ("diffusers-11-bf16", 1.0, 40), ("compile-11-bf16", 0.9, 41),
            ("cache-dit-fast", 1.05, 38), ("ours-dense-5x", 1.0, 39), ("ours-dense-5x-taylor", 1.0, 48),
            ("ours-jit-5x-taylor", 0.3, 37), ("ours-aoti-bf16-4x", 1.1, 36), ("taylorseer-5", 0.8, 30)]  # fmt: skip
    rows = [{"name": n, "median": s, "judged": p, "judged_interval": [p - 1, p + 1], "scores": {}} for n, s, p in made]
    header, _, *bands = peers.at_equal_latency(rows, base=8.0)
    names = [word.strip() for word in header.strip("|").split("|")]
    first = dict(zip(names, (word.strip() for word in bands[0].strip("|").split("|")), strict=True))
    assert first["few steps"] == "40.0 (39.0 to 41.0): diffusers-11-bf16, 1.00 s"  # what takes .9 s is in the next
    assert first["jitexport, temporal alone"].endswith("ours-dense-5x-taylor, 1.00 s")
    assert first["cache-dit"] and first["jitexport, spatial alone"] and not first["diffusers' caches"]
    assert "diffusers-50" not in "".join(bands) and len(bands) == 3


def test_every_contender_has_a_place_in_the_table():
    for name in (c.name for c in peers.contenders([Path("engines/x")])):
        row = {"name": name, "median": 1.0, "judged": 40.0, "judged_interval": [39.0, 41.0], "scores": {}}
        ordinary = name.split("-")[0] in ("diffusers", "compile", "openvino") and "-50" in name
        assert (f": {name}, 1.00 s" in peers.at_equal_latency([row], base=8.0)[-1]) == (not ordinary)


def test_names_of_contenders_differ():
    names = [c.name for c in peers.contenders([Path("engines/x")])]
    assert len(set(names)) == len(names) and names[0] == peers.REFERENCE and "bundle-x" in names


# --- the plain loop ---


def test_the_plain_loop_is_jit(make_bundle, tiny_flux):
    """Given the same draws, to the rounding of two bits of 256: it computes attention and blur in another order."""
    from diffusers import FluxPipeline

    pipe = jitexport.load(make_bundle(preset="paper", custom=CustomSchedule((3, 2, 3), (0.35, 0.62, 1.0))))
    drawn = pipe.draw([torch.Generator().manual_seed(0)])
    found = script("bench/plain_jit").plain_jit(
        FluxPipeline.from_pretrained(tiny_flux, dtype=torch.float32),
        "a red fox",
        torch.Generator(),
        sigmas=pipe.schedule.sigmas,
        stages=[(s.steps, s.tokens) for s in pipe.schedule.stages],
        latents=drawn.latents[0],
        noise=drawn.noise[0],
        anchors=drawn.anchors[0],
        height=tiny.HEIGHT,
        width=tiny.WIDTH,
        max_sequence_length=tiny.TEXT_TOKENS,
        guidance_scale=3.5,
    )
    wanted = pipe("a red fox", generator=torch.Generator().manual_seed(0)).images[0]
    difference = np.asarray(found, dtype=int) - np.asarray(wanted, dtype=int)
    assert np.abs(difference).max() <= 2 and np.asarray(wanted).std() > 5


@pytest.mark.parametrize("m", [5, 33, 60, 96])
def test_the_plain_loops_anchors(m):
    anchors = script("bench/plain_jit").first_anchors(m, 12, 8, torch.Generator().manual_seed(0)).tolist()
    assert len(set(anchors)) == m and anchors == sorted(anchors)
    row, column = zip(*(divmod(a, 8) for a in anchors), strict=True)
    structural = {(r % 2 == 0 and c % 2 == 0) or r in (0, 11) or c in (0, 7) for r, c in zip(row, column, strict=True)}
    assert m > 50 or structural == {True}


# --- latency ---


def row(speedup, batch, median, quantization=""):
    return latency.Row(
        "eager", "fp32", quantization, speedup, batch, 7, median * 0.9, median, median * 1.2, median * 0.8, 0.01,
        speedup * 1.1, speedup, 0.5, 100.0, "2026-01-01", "a processor, 2 threads", "2.13.0", "abc1234",
    )  # fmt: skip


def test_latency_rows_survive_the_csv(tmp_path):
    rows = [row(1.0, 1, 2.0), row(4.0, 2, 1.0), row(4.0, 2, 0.5, "int8")]
    latency.write(tmp_path / "latency.csv", rows)
    assert latency.read(tmp_path / "latency.csv") == rows
    assert latency.read(tmp_path / "none.csv") == []


def test_latency_plot(tmp_path):
    rows = [row(s, b, 2.0 / s * b) for s in latency.SPEEDUPS for b in latency.BATCHES]
    latency.plot(rows, tmp_path / "latency.png")
    assert Image.open(tmp_path / "latency.png").width > 800


def test_latency_of_a_bundle(make_bundle):
    point = latency.Point("eager", "fp32", "", 4.0, 1)
    found = latency.measure(point, make_bundle(custom=CustomSchedule((2, 1, 2), (0.35, 0.62, 1.0))), repeats=1)
    assert found.point == point and found.p10 <= found.median <= found.p90
    assert 0 < found.denoise < found.median and 0 < found.ceiling_share < 1 and found.predicted > 1


def test_latency_points_are_a_cross_or_all():
    cross, every = (list(latency.points(["eager"], full)) for full in (False, True))
    assert len(every) == len(latency.SPEEDUPS) * len(latency.BATCHES)
    assert set(cross) < set(every) and all(p.batch == 1 or p.speedup == 4 for p in cross)
    small = list(latency.points(["onnx", "aoti"], False, "int8"))  # ONNX engines have no 8-bit layers
    assert len(small) == len(cross) and {p.series for p in small} == {f"aoti {choose('cpu', 'aoti').dtype} int8"}


def test_latency_goes_on_where_it_stopped(tmp_path, monkeypatch):
    built, measured = [], []

    def build(model, *, output, **options):
        built.append(output.name)
        output.mkdir(parents=True)

    def measure(point, path, repeats):
        measured.append(path.name)
        return dataclasses.replace(row(point.speedup, point.batch, 1.0), cpu=latency.cpu())

    monkeypatch.setattr(latency.jitexport, "build", build)
    monkeypatch.setattr(latency, "measure", measure)
    points = [latency.Point("eager", "fp32", "", s, 1) for s in (1.0, 4.0)]
    monkeypatch.setattr(latency, "points", lambda *_: iter(points))
    arguments = {"backend": [], "full": False, "quant": "", "repeats": 1, "again": False, "report": None}
    arguments["out"] = tmp_path
    for seconds, stops, done in ((-1, True, 0), (60, False, 2), (60, False, 2)):
        given = argparse.Namespace(**arguments, seconds=seconds)
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self, given=given: given)
        if stops:
            with pytest.raises(SystemExit) as stopped:
                latency.main()
            assert stopped.value.code == 75
        else:
            latency.main()
        assert len(measured) == len(built) == done
    assert (tmp_path / "latency.png").is_file()
    latency.write(tmp_path / "latency.csv", [*latency.read(tmp_path / "latency.csv"), row(1.0, 1, 1.0)])
    given = argparse.Namespace(**arguments | {"again": True}, seconds=60)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self: given)
    latency.main()  # its rows are of another commit
    rows = latency.read(tmp_path / "latency.csv")
    assert len(measured) == 4 and len(built) == 2 and len(rows) == 3  # the other machine's row stays
    monkeypatch.setattr(latency, "code", lambda: "abc1234")
    latency.main()
    assert len(measured) == 4


# --- kernels ---


def test_kernels_are_compared_with_pytorchs_ways(monkeypatch, capsys):
    if reason := kernels.instructions()[1]:
        pytest.skip(reason)
    monkeypatch.setattr(kernels, "LAYERS", {"q": (64, 64, False)})
    monkeypatch.setattr("sys.argv", ["kernels.py", "--tokens", "70", "--repeats", "2", "--json"])
    kernels.main()
    rows = json.loads(capsys.readouterr().out)["rows"]
    attention = {r["way"]: r["error"] for r in rows if r["what"] == "attention"}
    layer = {r["way"]: r["error"] for r in rows if r["what"] != "attention"}
    assert len(attention) == 4 and len(layer) == 4 and all(r["gops"] > 0 for r in rows)
    # Each way is what it says: weights in 8 bits are less exact, and the kernel's scores are not rounded to bf16.
    dtype = DTYPE_NAMES[kernels.instructions()[0].dtypes[0]]
    assert attention[f"kernel, {dtype}"] < attention["kernel, int8"] < 0.05
    assert dtype == "fp32" or attention[f"kernel, {dtype}"] < attention[f"compiled, {dtype}"]
    assert max(layer[f"compiled, {dtype}"], layer[f"kernel, {dtype}"]) < 0.003 < layer["kernel, int8"] < 0.02
