"""`jitexport evaluate` as a whole: tiny bundles, prompts, images, scores, report."""

import json
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image

import jitexport
from jitexport.cli import main
from jitexport.errors import InputError
from jitexport.evaluate import evaluate, write_report
from jitexport.evaluate.evaluation import Evaluation, Row, chosen_prompts, demo_prompts
from jitexport.evaluate.report import best, curves, markdown_table, worst_first
from jitexport.evaluate.sources import Latency, bundle_source, bundle_sources, reference_source
from jitexport.plan import CustomSchedule
from tests import tiny
from tests.parity import seeded

JIT = CustomSchedule((2, 2), (0.5, 1.0))


@pytest.fixture(scope="module")
def jit(make_bundle):
    return make_bundle(custom=JIT)


@pytest.fixture(scope="module")
def dense(make_bundle):
    return make_bundle(custom=CustomSchedule((5,), (1.0,)), method="dense")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "color_val.txt"
    path.write_text("a red fox\ta red fox\n\nthe blue house in snow\na green tree near the river\n")
    return path


@pytest.fixture(scope="module")
def evaluation(jit, dense, prompts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    return evaluate([jit, dense], folder=folder, prompts=prompts, reference=5, timed=1)


# --- the reference ---


def test_the_reference_is_the_ordinary_sampler_on_the_bundles_own_engines(jit, dense):
    """5 steps by a bundle whose condition engine takes 4 noise levels at a time: what a dense bundle makes."""
    source = reference_source(jit, 5)
    ours = source.open()("a red fox", generator=torch.Generator().manual_seed(3), output_type="latent").images
    theirs = jitexport.load(dense)("a red fox", generator=torch.Generator().manual_seed(3), output_type="latent").images
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert source.steps == 5 and source.tflops == pytest.approx(bundle_source(dense).tflops)


def test_a_bundle_with_a_cache_is_the_same_reference_and_another_source(make_bundle, dense):
    """Its engine for all tokens runs every step; what it forecasts is its own, and a part of what images depend on."""
    custom = CustomSchedule((2, 2), (0.5, 1.0))
    cached, other = (make_bundle(custom=custom, cache=f"taylorseer:computed=0+2,order={order}") for order in (1, 2))
    ours = reference_source(cached, 5).open()("a red fox", generator=seeded(3), output_type="latent").images
    theirs = jitexport.load(dense)("a red fox", generator=seeded(3), output_type="latent").images
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    first, second = map(bundle_source, (cached, other))
    assert first.key != second.key and (first.steps, second.steps) == (3, 3)
    assert "taylorseer" in first.description and first.method == "jit taylorseer"  # a method of its own in charts


def test_a_dense_bundle_equals_the_reference(evaluation):
    reference, jit, dense = evaluation.rows
    assert dense.scores["psnr"].value > 60 and dense.scores["ssim"].value == pytest.approx(1, abs=1e-4)
    assert dense.scores["vae_distance"].value < 1e-4 and dense.scores["vae_frechet"].value < 1e-4
    assert jit.scores["psnr"].value < dense.scores["psnr"].value
    assert jit.scores["vae_distance"].value > dense.scores["vae_distance"].value
    assert "psnr" not in reference.scores and reference.method == "reference"


def test_scores_have_intervals_and_single_values(evaluation):
    jit = evaluation.rows[1]
    score = jit.scores["psnr"]
    assert score.low <= score.value <= score.high
    values = torch.tensor(jit.values["psnr"])
    assert values.shape == (3, 1) and values.mean().item() == pytest.approx(score.value, abs=1e-3)
    assert jit.latency.median > 0 and jit.latency.images == 1 and "torch" in jit.latency.conditions


# --- images on disk ---


def test_images_are_kept_in_t2i_compbenchs_layout(evaluation):
    folder = evaluation.folder / evaluation.rows[1].label / "samples"
    names = sorted(p.name for p in folder.iterdir())
    assert names == [
        "a green tree near the river_000002.png", "a red fox_000000.png", "the blue house in snow_000001.png",
    ]  # fmt: skip
    with Image.open(folder / names[0]) as image:
        assert image.size == (tiny.WIDTH, tiny.HEIGHT)


def test_a_run_goes_on_from_what_is_there(jit, prompts, tmp_path, monkeypatch):
    evaluate([jit], folder=tmp_path, prompts=prompts, limit=2, reference=2, timed=0)
    made = []
    call = jitexport.Pipeline.__call__

    def counting(self, prompt, **options):
        made.append(list(prompt))
        return call(self, prompt, **options)

    monkeypatch.setattr(jitexport.Pipeline, "__call__", counting)
    evaluate([jit], folder=tmp_path, prompts=prompts, limit=2, reference=2, timed=0)
    assert made == []
    evaluate([jit], folder=tmp_path, prompts=prompts, limit=3, reference=2, timed=0)
    assert made == [["a green tree near the river"]] * 2
    made.clear()
    evaluate([jit], folder=tmp_path, prompts=prompts, limit=1, reference=3, timed=0)  # another reference: a new image
    assert made == [["a red fox"]]


def test_geneval_layout_and_seeds(jit, tmp_path):
    lines = [
        {"tag": "single_object", "include": [{"class": "fox", "count": 1}], "prompt": "a fox"},
        {"tag": "colors", "include": [], "prompt": "a red house"},
    ]
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    result = evaluate([jit], folder=tmp_path / "out", prompts=file, reference=1, timed=0)
    folder = tmp_path / "out" / result.rows[1].label
    found = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    images = [f"{i:05}/samples/{j:04}.png" for i in range(2) for j in range(4)]
    assert found == sorted([*images, "00000/metadata.jsonl", "00001/metadata.jsonl"])
    assert json.loads((folder / "00001" / "metadata.jsonl").read_text()) == lines[1]
    assert len({(folder / path).read_bytes() for path in images}) == 8  # each image has a seed of its own


def test_prompts_of_ones_own_by_default():
    assert len(chosen_prompts(None, "some-model", None, None).prompts) == 12
    assert len(chosen_prompts(None, "some-model", 3, 2).prompts) == 3
    assert demo_prompts(2).prompts[0].text.endswith(" background")


# --- reports ---


def test_the_report_is_one_file_that_needs_no_other(evaluation, tmp_path):
    html = write_report(evaluation, tmp_path / "report.html").read_text()
    assert not re.search(r"https?:|//\w+\.\w|<script|<link|@import|url\(", html)
    sources = re.findall(r'src="([^"]*)"', html)
    assert len(sources) == 1 + 3 * 3 and all(s.startswith("data:image/") for s in sources)
    for text in ("the blue house in snow", "PSNR to reference", "LPIPS", "torchvision"):
        assert text in html


def test_text_in_the_report_is_escaped(jit, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("<b>fox</b> & dog\n")
    result = evaluate([jit], folder=tmp_path / "out", prompts=file, reference=1, timed=0)
    html = write_report(result, tmp_path / "report.html").read_text()
    assert "&lt;b&gt;fox" in html and "<b>fox" not in html


def test_names_on_the_charts_are_no_formulas(evaluation):
    rows = [replace(row, label=rf"{row.label}$\no$such") for row in evaluation.rows]
    assert curves(replace(evaluation, rows=rows)).startswith(b"\x89PNG")


def test_worst_cases_come_first(evaluation):
    order = worst_first(evaluation)
    lowest = [min(row.values["psnr"][i][0] for row in evaluation.rows[1:]) for i in order]
    assert sorted(order) == [0, 1, 2] and lowest == sorted(lowest)


def test_the_best_of_each_measure_is_marked(evaluation):
    dense = evaluation.rows[2].label
    marks = best(evaluation)
    assert marks["psnr"] == marks["vae_distance"] == dense


def test_markdown_table(evaluation):
    lines = markdown_table(evaluation, ["psnr"]).splitlines()
    assert len(lines) == 2 + 3 and {line.count("|") for line in lines} == {7}


# --- what cannot be compared ---


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"model": "tiny-schnell", "custom": CustomSchedule((2,), (1.0,))}, "another model"),
        ({"custom": CustomSchedule((2,), (1.0,)), "settings": {"height": 32}}, "another image size"),
        ({"custom": CustomSchedule((2,), (1.0,)), "settings": {"max_sequence_length": 6}}, "another text length"),
    ],
)
def test_bundles_that_differ_are_refused(jit, make_bundle, other, message, tmp_path):
    with pytest.raises(InputError, match=message):
        evaluate([jit, make_bundle(**other)], folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_given_twice_is_refused(jit):
    with pytest.raises(InputError, match="given twice"):
        bundle_sources([jit, jit])


def test_bundles_of_the_same_name_get_longer_labels(jit, tmp_path):
    paths = [tmp_path / "a" / "flux", tmp_path / "b" / "flux"]
    for path in paths:
        path.parent.mkdir()
        path.symlink_to(jit)  # labels come from where a bundle is, not from what it is called there
    (tmp_path / "c").mkdir()
    with pytest.raises(InputError, match="given twice"):
        bundle_sources(paths)


# --- the command ---


@pytest.fixture
def run(capsys):
    def call(*argv):
        with pytest.raises(SystemExit) as stopped:
            main([str(a) for a in argv])
        out, err = capsys.readouterr()
        return stopped.value.code, out, err

    return call


def test_command(run, jit, prompts, tmp_path):
    folder = tmp_path / "report"
    command = ["evaluate", jit, "--prompts", prompts, "--limit", 2, "--reference", 2, "--timed", 1, "-o", folder]
    code, out, err = run(*command)
    assert code == 0 and out.strip().endswith("report.html") and "PSNR to reference" in out
    assert "not measured: lpips" in err and (folder / "report.html").is_file()
    code, out, _ = run(*command, "--json")
    result = json.loads(out)
    assert code == 0 and [row["steps"] for row in result["rows"]] == [2, 4]
    assert set(result["rows"][1]["scores"]["psnr"]) == {"value", "low", "high"}
    assert "name_right" not in result["missing"]  # the demo model's own scores mean nothing for others


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["BUNDLE", "--prompts", "TMP/none.txt"], 2, "cannot read prompts"),
        (["BUNDLE", "--prompts", "TMP/bad.jsonl"], 2, "line 1 is not GenEval's format"),
        (["BUNDLE", "--prompts", "TMP/empty.txt"], 2, "no prompts"),
        (["BUNDLE", "--reference", "0"], 2, "at least one step"),
        (["BUNDLE", "--reference", "TMP/nothing"], 5, "no bundle"),
        (["TMP/nothing"], 5, "no bundle"),
    ],
)
def test_errors(run, jit, tmp_path, argv, code, message):
    (tmp_path / "bad.jsonl").write_text('{"text": "a fox"}\n')
    (tmp_path / "empty.txt").write_text("\n\n")
    argv = [str(jit) if a == "BUNDLE" else a.replace("TMP", str(tmp_path)) for a in argv]
    found, out, err = run("evaluate", *argv, "-o", tmp_path / "out")
    assert (found, out) == (code, "") and message in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


# --- comparisons prompt by prompt ---


def row(label, method, tflops, values):
    latency = Latency(tflops * 2, tflops * 2, 1, {})
    return Row(label, method, "", 1, tflops, latency, {}, {"psnr": [[v] for v in values]})


def test_differences_at_equal_cost():
    """Dense 10 and 30 at 1 and 4 TFLOP, so 20 at 2, and 40 and 60 for the other prompts."""
    rows = (
        row("many", "dense", 4.0, [30, 50, 70]), row("few", "dense", 1.0, [10, 30, 50]),
        row("ours", "jit", 2.0, [21, 42, 63]), row("cheaper", "jit", 0.5, [1, 2, 3]),
    )  # fmt: skip
    evaluation = Evaluation("test", None, None, rows, {}, {})
    for by in ("latency", "tflops"):
        found = evaluation.against_dense("psnr", by=by)
        assert found.keys() == {"ours"}  # `cheaper` is cheaper than any dense row: nothing to compare with
        assert found["ours"].value == pytest.approx(2) and 0.9 < found["ours"].low < found["ours"].high < 3.1
    assert evaluation.differences("psnr", "few")["many"].value == 20
