"""The pages on adding to the package, followed word by word: their code in files, their lines in the registry."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import jitexport
from jitexport import registry
from jitexport.backends.commands import cpp_compiler
from jitexport.build import build
from jitexport.bundle.reading import read_manifest
from jitexport.kernels import native
from jitexport.plan import CustomSchedule
from jitexport.verify import verify
from tests.pages import ROOT, titled
from tests.parity import seeded

PAGES = ("adding-a-family.md", "adding-a-backend.md", "adding-a-method.md")
KERNEL = titled("adding-a-kernel.md")
PROMPT = "a red fox"

FILES = {
    title: text for page in PAGES for title, text in titled(page).items() if title.endswith(".py") and "/" in title
    and title != "jitexport/registry.py"
}  # fmt: skip
#: By the registry's table, what the pages have one put into it.
LINES = {
    title.removeprefix("jitexport/registry.py, in "): text
    for page in PAGES for title, text in titled(page).items() if title.startswith("jitexport/registry.py, in ")
}


@pytest.fixture
def added(tmp_path, monkeypatch):
    """The pages' files in a folder of their own, found under the names that they would have in the package."""
    for title, text in FILES.items():
        path = tmp_path / title
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        package, _, name = title.removesuffix(".py").replace("/", ".").rpartition(".")
        owner = importlib.import_module(package)
        monkeypatch.setattr(owner, "__path__", [*owner.__path__, str(path.parent)])
        monkeypatch.delitem(sys.modules, f"{package}.{name}", raising=False)
        monkeypatch.delattr(owner, name, raising=False)
    importlib.invalidate_caches()
    for table, line in LINES.items():
        for name, value in eval(f"{{{line}}}", {"Family": registry.Family}).items():
            monkeypatch.setitem(getattr(registry, table), name, value)
    yield tmp_path
    for title in FILES:  # what was imported from this folder
        package, _, name = title.removesuffix(".py").replace("/", ".").rpartition(".")
        sys.modules.pop(f"{package}.{name}", None)
        vars(sys.modules[package]).pop(name, None)


def made(tmp_path, model, **options):
    options = {"backend": "eager", "dtype": "fp32", "custom": CustomSchedule((2, 2))} | options
    return build(str(model), output=tmp_path / "bundle", **options).path


def test_each_page_has_one_file_of_the_package_and_one_line():
    assert sorted(LINES) == ["BACKENDS", "CACHES", "FAMILIES", "METHODS"]
    assert all(len(line.strip().splitlines()) == 1 for line in LINES.values())
    assert sorted(title for title in FILES if title.startswith("jitexport/")) == [
        "jitexport/backends/program.py", "jitexport/methods/pairs.py", "jitexport/methods/temporal/average.py",
        "jitexport/models/mono.py",
    ]


@pytest.fixture
def mono(added):
    return importlib.import_module("tests.tiny_mono").save_mono(added / "tiny-mono")


def test_the_family_makes_what_diffusers_transformer_makes(added, mono):
    """All tokens at every step, beside the sampler written out around the transformer that diffusers has."""
    from diffusers import FluxTransformer2DModel
    from transformers import CLIPTextModel

    pipe = jitexport.load(made(added, mono, method="dense", custom=CustomSchedule((3,))))
    found = pipe(PROMPT, generator=seeded(5), output_type="latent").images

    transformer = FluxTransformer2DModel.from_pretrained(mono / "transformer").eval()
    encoder = CLIPTextModel.from_pretrained(mono / "text_encoder").eval()
    sigmas = read_manifest(added / "bundle").schedule.sigmas
    with torch.no_grad():
        text = encoder(pipe.readers[0].encode([PROMPT]).ids)
        y = pipe.draw(seeded(5)).latents
        rows, columns = pipe.geometry.grid.shape
        where = pipe.geometry.grid.coordinates()
        image_ids = torch.cat([torch.zeros(rows * columns, 1), where], dim=1)
        for sigma, sigma_next in pairwise(sigmas):
            u = transformer(
                y, text.last_hidden_state, text.pooler_output, torch.tensor([sigma]), image_ids,
                torch.zeros(text.last_hidden_state.shape[1], 3), return_dict=False,
            )[0]  # fmt: skip
            y = y + (sigma_next - sigma) * u
    torch.testing.assert_close(found, y, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cache", ["taylor:computed=0+2", "delta-dit:every=2", "taylorseer:every=2,warmup=1"])
def test_the_family_runs_by_methods_that_know_nothing_of_it(added, mono, cache):
    path = made(added, mono, method="jit", custom=CustomSchedule((2, 3), (0.5, 1.0)), cache=cache)
    images = jitexport.load(path)(PROMPT, generator=seeded(1), output_type="pt").images
    assert images.shape == (1, 3, 48, 32) and images.isfinite().all()


def test_the_backends_images_are_those_of_the_eager_engines(added, tiny_flux):
    eager = jitexport.load(build(str(tiny_flux), output=added / "eager", backend="eager", dtype="fp32",
                                 custom=CustomSchedule((2, 2), (0.5, 1.0))).path)  # fmt: skip
    path = made(added, tiny_flux, backend="program", custom=CustomSchedule((2, 2), (0.5, 1.0)))
    assert verify(path).passed
    manifest = read_manifest(path)
    assert manifest.backend == "program" and not manifest.weights
    found, wanted = (p(PROMPT, generator=seeded(2), output_type="pt").images for p in (jitexport.load(path), eager))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_the_method_runs_half_of_the_tokens_and_moves_all(added, tiny_flux):
    pipe = jitexport.load(made(added, tiny_flux, method="pairs"))
    places, latents = [], []

    def look(pipe, step, timestep, tensors):
        places.append(tensors["places"])
        latents.append(tensors["latents"].clone())
        return {}

    start = pipe.draw(seeded(3)).latents
    pipe(
        PROMPT, generator=seeded(3), output_type="latent", callback_on_step_end=look,
        callback_on_step_end_tensor_inputs=["latents", "places"],
    )  # fmt: skip
    assert [tuple(p.shape) for p in places] == [(1, 48), (1, 48), (1, 96), (1, 96)]
    assert places[0][0].tolist() == list(range(0, 96, 2)) and places[2][0].tolist() == list(range(96))
    moved = latents[0] - start
    torch.testing.assert_close(moved[:, ::2], moved[:, 1::2])  # as their neighbours
    moved = latents[2] - latents[1]
    assert (moved[:, ::2] - moved[:, 1::2]).abs().max() > 1e-3


def test_the_method_keeps_to_a_speedup(added, tiny_flux):
    with pytest.raises(jitexport.JitExportError, match="two stages"):
        made(added, tiny_flux, method="pairs", custom=CustomSchedule((4,)))
    manifest = read_manifest(made(added, tiny_flux, method="pairs", custom=None, speedup=3))
    assert manifest.schedule.predicted_speedup >= 3


def test_the_cache_forecasts_the_mean(added, tiny_flux):
    cache = registry.cache("average")({"computed": (0, 1)})
    path = made(added, tiny_flux, method="dense", custom=CustomSchedule((4,)), cache="average:computed=0+1")
    assert read_manifest(path).schedule.actions == ("stage", "stage", "forecast", "stage")
    steps = read_manifest(path).schedule.schedule()
    (_, (first, second, third, _)), = list(steps)
    history = cache.begin()
    run = iter([torch.ones(1, 4, 2), torch.full((1, 4, 2), 3.0)])
    for step in (first, second):
        _, history = cache.velocity(lambda *_: [next(run)], torch.zeros(1, 4, 2), step, history)
    u, _ = cache.velocity(None, torch.zeros(1, 4, 2), third, history)
    assert torch.equal(u, torch.full((1, 4, 2), 2.0))


def test_a_statement_adds_a_method_from_outside_of_the_package(tmp_path, monkeypatch):
    """As the page has it, of a module that is anywhere on Python's path."""
    (tmp_path / "your_package").mkdir()
    (tmp_path / "your_package" / "pairs.py").write_text(FILES["jitexport/methods/pairs.py"])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))
    page = (ROOT / "docs" / "adding-a-method.md").read_text()
    (statement,) = [line for line in page.splitlines() if line.startswith("registry.METHODS[")]
    exec(statement, {"registry": registry})
    assert registry.method("pairs").__module__ == "your_package.pairs"


# --- in the package itself --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """A copy of the package and of the tests' models, in which the pages were followed."""
    root = tmp_path_factory.mktemp("extended")
    shutil.copytree(
        ROOT / "jitexport", root / "jitexport", ignore=shutil.ignore_patterns("__pycache__", "assets")
    )
    (root / "jitexport" / "assets").symlink_to(ROOT / "jitexport" / "assets")
    (root / "tests").mkdir()
    for name in ("__init__.py", "tiny.py"):
        shutil.copy(ROOT / "tests" / name, root / "tests" / name)
    for title, text in {**FILES, **KERNEL}.items():
        (root / title).write_text(text)
    path = root / "jitexport" / "registry.py"
    text = path.read_text()
    for table, line in LINES.items():
        assert text.count(f"\n{table} = {{\n") == 1
        text = text.replace(f"\n{table} = {{\n", f"\n{table} = {{\n{line}")
    path.write_text(text)
    return root


DRIVER = """
import json, pathlib, sys
sys.path.insert(0, sys.argv[1])
import jitexport
assert jitexport.__file__.startswith(sys.argv[1]), jitexport.__file__
from jitexport.cli import main
from tests.tiny_mono import save_mono
save_mono(pathlib.Path("tiny-mono"))
for line in json.loads(sys.argv[2]):
    try:
        main(line)
    except SystemExit as end:
        assert not end.code, line
"""


@pytest.mark.slow
def test_a_checkout_with_the_files_and_lines_has_all_four_on_its_command_line(package, tmp_path):
    lines = [
        ["build", "--model", "tiny-mono", "--method", "pairs", "--steps", "2,3", "--cache", "average:computed=1",
         "--backend", "program", "--dtype", "fp32", "--output", "bundle"],
        ["verify", "bundle"],
        ["generate", "bundle", PROMPT, "--seed", "1", "--output", "fox.png"],
    ]  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-P", "-c", DRIVER, str(package), json.dumps(lines)], cwd=tmp_path, capture_output=True,
        text=True, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert (manifest["model"]["family"], manifest["backend"]) == ("MonoPipeline", "program")
    assert (manifest["method"]["name"], manifest["cache"]["name"]) == ("pairs", "average")
    assert (tmp_path / "fox.png").stat().st_size > 100
    with pytest.raises(jitexport.JitExportError, match="unknown"):  # here, without the lines
        jitexport.load(tmp_path / "bundle")


SQUARES = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from torch._inductor.utils import run_and_get_code
from jitexport.kernels import native
from jitexport.kernels.square import square
assert native.__file__.startswith(sys.argv[1]), native.__file__
x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).to(native.instructions()[0].dtypes[-1])
with native.native_kernels() as used, torch.no_grad():
    y, code = run_and_get_code(torch.compile(lambda x: square(x) + 1), x)
assert used == {"square"}, used
assert "jitexport::square((const " in code[0]
torch.testing.assert_close(y, square(x) + 1)
print("squared")
"""


@pytest.mark.slow
def test_the_kernel_is_in_the_code_that_inductor_makes(package, tmp_path, monkeypatch):
    environment = {"PYTHONPATH": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    monkeypatch.setenv("JITEXPORT_KERNELS", "1")
    if reason := native.missing():
        pytest.skip(reason)
    if cpp_compiler() is None:
        pytest.skip("no C++ compiler")
    run = subprocess.run(
        [sys.executable, "-P", "-c", SQUARES, str(package)], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout == "squared\n"
