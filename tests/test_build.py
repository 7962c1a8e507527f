import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import jitexport
from jitexport import machine
from jitexport.backends.base import Engine
from jitexport.build import build as build_bundle
from jitexport.building.comparing import TOLERANCE, compare, tolerance, verify_engine
from jitexport.bundle import EngineBundle
from jitexport.errors import (
    BundleExistsError,
    InputError,
    ModelNotFoundError,
    ScheduleError,
    UnknownNameError,
    UnsupportedModelError,
    VerificationError,
)
from jitexport.models.flux import FluxAdapter
from jitexport.models.sources import find_source
from jitexport.plan import CustomSchedule
from jitexport.specs import DTYPES, EngineSpec, TensorSpec
from tests import tiny

ONE = CustomSchedule((1,), (1.0,))
#: Entries of the tiny model's configurations that have diffusers' own values.
USUAL = {
    "patch_size", "act_fn", "force_upcast", "mid_block_add_attention", "base_shift", "max_shift", "invert_sigmas",
    "stochastic_sampling",
}


def build(model, **options):
    return build_bundle(str(model), **({"backend": "eager", "dtype": "fp32"} | options))


@pytest.fixture(scope="module")
def manifest(make_bundle):
    return EngineBundle.open(make_bundle()).manifest


# --- what a bundle says ---


def test_manifest_tells_the_model(manifest, tiny_flux):
    model = manifest.model
    assert (model.name, model.source, model.family) == ("tiny-flux", "tiny-flux", "FluxPipeline")
    assert (manifest.defaults.guidance.distilled, manifest.defaults.num_inference_steps) == (3.5, 50)
    assert model.settings["height"] == tiny.HEIGHT and model.configs["transformer"]["num_layers"] == 1
    digest = hashlib.sha256(json.dumps(model.configs, sort_keys=True).encode()).hexdigest()
    assert model.config_digest == digest
    assert str(tiny_flux.parent) not in model.source


def test_an_incomplete_configuration_has_one_digest(tiny_flux, tmp_path):
    """In every process and folder: diffusers keeps a list of the entries that are missing, in an order by chance."""
    code = (
        "import sys, torch; from jitexport.building.declaring import config_digest, plain_configs;"
        "from jitexport.models.flux import FluxAdapter; from pathlib import Path;"
        "configs = plain_configs(FluxAdapter.from_folder(Path(sys.argv[1]), torch.float32).configs);"
        "print(config_digest(configs), *(c.get('_use_default_values') for c in configs.values()))"
    )
    running = []
    for i in range(2):
        folder = shutil.copytree(tiny_flux, tmp_path / str(i))
        for part in ("transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
            config = json.loads((folder / part).read_text())
            (folder / part).write_text(json.dumps({k: v for k, v in config.items() if k not in USUAL}))
        running.append(
            subprocess.Popen(
                [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True,
                env=os.environ | {"PYTHONHASHSEED": str(i + 1)},
            )
        )
    told = {process.communicate()[0] for process in running}
    assert len(told) == 1 and told.pop().split()[1:] == ["None"] * 5


def test_manifest_tells_the_schedule_and_the_method(manifest):
    schedule = manifest.schedule
    assert [(s.index, s.steps, s.tokens) for s in schedule.stages] == [(2, 7, 33), (1, 4, 59), (0, 7, 96)]
    assert schedule.speedup == 4 and schedule.reference_steps == 50
    assert schedule.predicted_speedup == pytest.approx(schedule.reference_tflops / schedule.tflops)
    assert schedule.tflops == pytest.approx(sum(s.steps * s.step_tflops for s in schedule.stages))
    assert schedule.reference_tflops == pytest.approx(50 * schedule.stages[-1].step_tflops)
    assert (manifest.method.name, manifest.method.preset) == ("jit", "default")
    assert manifest.method.options["timesteps"]["kind"] == "beta"


def test_manifest_tells_sizes_engines_and_host(manifest):
    geometry = manifest.geometry
    assert geometry.grid == (12, 8) and geometry.latent_shape == (4, 24, 16) and geometry.text_tokens == 10
    assert (geometry.height, geometry.width, geometry.patch) == (tiny.HEIGHT, tiny.WIDTH, 2)
    assert [e.name for e in manifest.engines] == ["text", "condition", "stage2", "stage1", "stage0", "decode"]
    assert [e.inputs[0].shape for e in manifest.engines[2:5]] == [(1, 33, 16), (1, 59, 16), (1, 96, 16)]
    assert all(e.relative_error == 0 for e in manifest.engines)  # eager against eager
    assert (manifest.backend, manifest.dtype, manifest.batch) == ("eager", "fp32", 1)
    assert manifest.host.torch == torch.__version__ and manifest.host.device == "cpu"
    assert manifest.jitexport_version == jitexport.__version__


def test_manifest_lists_every_file(make_bundle, manifest):
    path = make_bundle()
    files = {str(f.relative_to(path)) for f in path.rglob("*") if f.is_file()}
    assert files - {"manifest.json"} >= {f.path for f in manifest.files}
    for entry in manifest.files:
        content = (path / entry.path).read_bytes()
        assert (entry.size, entry.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_command_is_kept(tmp_path, tiny_flux):
    made = build(tiny_flux, output=tmp_path / "b", custom=ONE, command=["jitexport", "build", "--model", "my model"])
    assert made.manifest.command == "jitexport build --model 'my model'"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_are_the_models_own_and_stored_once(make_bundle, tiny_flux, dtype):
    torch_dtype = torch.float32 if dtype == "fp32" else torch.bfloat16
    bundle = EngineBundle.open(make_bundle(dtype=dtype))
    expected = dict(FluxAdapter.from_folder(tiny_flux, torch_dtype).tensors())
    found = bundle.weights(torch.device("cpu"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert "text_encoder_2.encoder.embed_tokens.weight" in {*bundle.manifest.tied, *bundle.manifest.tied.values()}
    stored = sum(
        t.nbytes for f in bundle.path.rglob("*.safetensors") if "weights" in f.parts for t in load_file(f).values()
    )
    unique = {t.data_ptr(): t.nbytes for t in expected.values()}
    assert stored == sum(unique.values())


# --- where it goes ---


def test_default_place_is_named_after_model_and_speedup(tmp_path, monkeypatch, tiny_flux):
    monkeypatch.chdir(tmp_path)
    assert build(tiny_flux, speedup=2.5).path.as_posix() == "engines/tiny-flux-2.5x"
    assert build(tiny_flux, custom=ONE).path.as_posix() == "engines/tiny-flux-custom"
    assert jitexport.load("engines/tiny-flux-2.5x")("a fox").images


def test_a_source_can_be_given(tmp_path, tiny_flux):
    source = dataclasses.replace(find_source(str(tiny_flux)), name="mine")
    made = build_bundle(source, output=tmp_path / "b", backend="eager", dtype="fp32", custom=ONE)
    assert made.manifest.model.name == "mine" and made.path == tmp_path / "b" and made.seconds > 0


def test_settings_reach_the_model(tmp_path, tiny_flux):
    settings = {"height": 16, "width": None, "max_sequence_length": 5}
    made = build(tiny_flux, output=tmp_path / "b", custom=ONE, settings=settings)
    assert (made.manifest.geometry.grid, made.manifest.geometry.text_tokens) == ((4, 8), 5)
    assert jitexport.load(made.path)("a red fox in the snow").images[0].size == (32, 16)


def test_an_existing_bundle_is_replaced_only_on_request(tmp_path, tiny_flux):
    target = tmp_path / "b"
    build(tiny_flux, output=target, custom=ONE)
    with pytest.raises(BundleExistsError, match="exists"):
        build(tiny_flux, output=target, custom=CustomSchedule((2,), (1.0,)))
    assert EngineBundle.open(target).manifest.schedule.schedule().nfe == 1
    build(tiny_flux, output=target, custom=CustomSchedule((2,), (1.0,)), replace=True)
    assert EngineBundle.open(target).manifest.schedule.schedule().nfe == 2
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("replace", [False, True])
def test_what_is_no_bundle_is_never_replaced(tmp_path, tiny_flux, replace):
    target = tmp_path / "b"
    target.mkdir()
    (target / "thesis.tex").write_text("years of work")
    with pytest.raises(BundleExistsError):
        build(tiny_flux, output=target, custom=ONE, replace=replace)
    assert (target / "thesis.tex").read_text() == "years of work"


# --- what is left to the machine ---


def test_what_is_not_said_is_chosen_told_and_recorded(tmp_path, tiny_flux, monkeypatch):
    machines = (((), "fp32", "does not compute in bf16"), (("avx512_bf16",), "bf16", "computes in it"))
    for features, dtype, reason in machines:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=features: dict.fromkeys(has, True))
        progress = Recorder()
        made = build_bundle(
            str(tiny_flux), output=tmp_path / dtype, backend="eager", device="cpu", custom=ONE, progress=progress
        )
        assert made.manifest.dtype == dtype and made.manifest.chosen.keys() == {"dtype"}
        assert reason in made.manifest.chosen["dtype"]
        [note] = progress.notes
        assert f"dtype {dtype}: {made.manifest.chosen['dtype']}" in note
        assert jitexport.load(made.path).dtype == DTYPES[dtype]


def test_what_is_said_is_not_explained(tmp_path, tiny_flux):
    progress = Recorder()
    made = build(tiny_flux, output=tmp_path / "b", device="cpu", custom=ONE, progress=progress)
    assert made.manifest.chosen == {} and progress.notes == []


def test_what_is_emulated_is_built_and_loaded_with_a_warning(tmp_path, tiny_flux, monkeypatch, caplog):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    fast = build(tiny_flux, output=tmp_path / "fast", dtype="bf16", custom=ONE)
    jitexport.load(fast.path)
    assert "emulated" not in caplog.text
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    monkeypatch.setattr(machine, "slowdown", lambda *_: 17.0)
    made = build(tiny_flux, output=tmp_path / "b", dtype="bf16", custom=ONE)
    assert made.manifest.dtype == "bf16"
    for path in (made.path, fast.path):  # the second one comes from a machine that has bf16
        jitexport.load(path)
    messages = [r.getMessage() for r in caplog.records if "emulated" in r.getMessage()]
    assert len(messages) == 3 and all("bf16" in m and "17 times as long as in fp32" in m for m in messages)


# --- what cannot be built ---


def left_in(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"speedup": 0.5}, ScheduleError, "out of range"),
        ({"speedup": 21}, ScheduleError, "out of range"),
        ({"speedup": float("nan")}, ScheduleError, "out of range"),
        ({"custom": CustomSchedule((2, 2), (0.5, 0.9))}, ScheduleError, "rise to 1"),
        ({"method": "nonesuch"}, UnknownNameError, "unknown method"),
        ({"method": "dense", "custom": CustomSchedule((2, 2))}, ScheduleError, "all tokens"),
        ({"preset": "nonesuch"}, InputError, "preset"),
        ({"backend": "nonesuch"}, UnknownNameError, "unknown backend"),
        ({"dtype": "fp8"}, InputError, "dtype"),
        ({"batch": 0}, InputError, "batch"),
        ({"device": "abacus"}, InputError, "device"),
        ({"settings": {"height": 33}}, InputError, "image size"),
        ({"settings": {"colour": 1}}, InputError, "unknown settings"),
    ],
)
def test_impossible_builds_say_so_and_leave_nothing(tmp_path, tiny_flux, options, error, message):
    with pytest.raises(error, match=message):
        build(tiny_flux, output=tmp_path / "b", **options)
    assert left_in(tmp_path) == []


def test_unknown_models(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no such model"):
        build("nonesuch", output=tmp_path / "b")
    with pytest.raises(ModelNotFoundError, match="cannot get nobody/nothing"):
        build("nobody/nothing", output=tmp_path / "b")
    with pytest.raises(UnsupportedModelError, match="not a diffusers pipeline"):
        build(tmp_path, output=tmp_path / "b")
    assert left_in(tmp_path) == []


class Recorder:
    """Progress that can break off."""

    def __init__(self, until=None):
        self.until, self.announced, self.done, self.notes = until, [], [], []

    def begin(self, steps):
        self.announced = list(steps)

    def note(self, text):
        self.notes.append(text)

    def step(self, name):
        self.done.append(name)
        if name == self.until:
            raise KeyboardInterrupt


STEPS = ["read the model", "weights", "engine text", "engine condition", "engine stage0", "engine decode", "digests"]


def test_progress_is_told_every_step_in_order(tmp_path, tiny_flux):
    progress = Recorder()
    build(tiny_flux, output=tmp_path / "b", custom=ONE, progress=progress)
    assert progress.announced == progress.done == STEPS


@pytest.mark.parametrize("step", [STEPS[0], STEPS[1], STEPS[4], STEPS[-1]])
def test_an_interrupted_build_leaves_nothing(tmp_path, tiny_flux, step):
    with pytest.raises(KeyboardInterrupt):
        build(tiny_flux, output=tmp_path / "b", custom=ONE, progress=Recorder(step))
    assert left_in(tmp_path) == []


def test_an_interrupted_replacement_leaves_the_old_bundle(tmp_path, tiny_flux):
    build(tiny_flux, output=tmp_path / "b", custom=ONE)
    with pytest.raises(KeyboardInterrupt):
        build(tiny_flux, output=tmp_path / "b", custom=ONE, replace=True, progress=Recorder("digests"))
    assert left_in(tmp_path) == ["b"]
    EngineBundle.open(tmp_path / "b")


def test_building_leaves_gradients_switched_on(tmp_path, tiny_flux):
    build(tiny_flux, output=tmp_path / "b", custom=ONE)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


# --- verification ---

SPEC = EngineSpec("stage0", (TensorSpec("x", (2, 3), "fp32"),), (TensorSpec("y", (2, 3), "fp32"),))
X = torch.arange(1.0, 7).view(2, 3)


def engine(change):
    return Engine(SPEC, lambda inputs: (change(inputs[0]),), torch.device("cpu"))


def test_compare_is_relative_to_each_output():
    """A mask of hugely negative numbers, as some families' conditions give, hides nothing in the outputs beside it."""
    mask = torch.tensor([0.0, -1e30])
    relative, largest = compare([X, mask], [X + 1, mask])
    assert largest == 1
    assert relative == pytest.approx((6 / ((X + 1) ** 2).sum().item()) ** 0.5)
    assert not compare([X * float("nan"), X], [X, X])[0] <= 1e-4


def test_an_engine_within_tolerance_passes_and_its_error_is_told():
    relative, largest = verify_engine(SPEC, engine(lambda x: x * (1 + 5e-5)), engine(lambda x: x), [X], 1e-4)
    assert relative == pytest.approx(5e-5, rel=0.1) and 0 < relative < 1e-4
    assert largest == pytest.approx(6 * 5e-5, rel=0.1)


@pytest.mark.parametrize("allowed", [TOLERANCE["fp32"], TOLERANCE["bf16"]])
@pytest.mark.parametrize(
    "change", [lambda x: x * 1.1, lambda x: x.flip(0), lambda x: torch.zeros_like(x), lambda x: x / 0 - x / 0]
)
def test_an_engine_that_disagrees_is_refused(change, allowed):
    with pytest.raises(VerificationError, match="disagrees with the eager module") as refusal:
        verify_engine(SPEC, engine(change), engine(lambda x: x), [X], allowed, "attention (AVX2)")
    assert "with the kernels attention (AVX2)" in refusal.value.found and "JITEXPORT_KERNELS=0" in refusal.value.remedy
    with pytest.raises(VerificationError) as refusal:
        verify_engine(SPEC, engine(change), engine(lambda x: x), [X], allowed)
    assert "kernels" not in str(refusal.value)


def test_8_bit_layers_may_differ_more_and_tf32_a_little():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert tolerance("fp32", cpu) < tolerance("fp32", cuda) < tolerance("bf16", cuda) == tolerance("bf16", cpu)
    for device in (cpu, cuda):
        assert tolerance("fp32", device, "int8") == tolerance("bf16", device, "int8") > tolerance("fp32", device)


@pytest.mark.parametrize("change", [lambda x: x[:1], lambda x: x.double(), lambda x: x.T])
def test_an_engine_with_another_output_is_refused(change):
    with pytest.raises(VerificationError, match="another output"):
        verify_engine(SPEC, engine(change), engine(lambda x: x), [X], 1e-4)


def test_a_model_with_weights_that_are_no_numbers_is_not_built(tmp_path):
    pipe = tiny.flux(guidance=True)
    with torch.no_grad():
        pipe.transformer.proj_out.weight[0, 0] = float("nan")
    pipe.save_pretrained(tmp_path / "model")
    settings = {"height": 16, "width": 16, "max_sequence_length": 4}
    with pytest.raises(VerificationError, match="stage0"):
        build(tmp_path / "model", output=tmp_path / "b", custom=ONE, settings=settings)
    assert left_in(tmp_path) == ["model"]
