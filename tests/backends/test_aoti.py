"""What an AOTInductor engine borrows it gives back: torch itself never does."""

import gc
import os
import shutil
import subprocess
import sys

import pytest
import torch

from jitexport import machine
from jitexport.backends import aoti
from jitexport.backends.base import assign_weights
from jitexport.building.comparing import compare
from jitexport.errors import BackendError, CompileError
from jitexport.programs import Program, Step
from jitexport.specs import EngineSpec, TensorSpec
from tests.backends.conftest import CPU, Case


@pytest.fixture
def engine(built, monkeypatch):
    """An engine of one library, with no other engine idle."""
    gc.collect()  # engines of other tests go back to where they came from
    monkeypatch.setattr(aoti, "_idle", [])
    case = built(Case("aoti"))
    spec, directory = case.specs["condition"], case.root / "condition"

    def opened(weights=None):
        return case.backend.load(spec, directory, weights or case.weights, lambda: None, CPU)

    opened.case, opened.inputs = case, case.inputs["condition"]
    return opened


def test_every_weight_is_read_where_it_is(built):
    """Short vectors too, which torch would by default make numbers in the code: a checkpoint swap must reach them."""
    case = built(Case("aoti"))
    library = aoti._Library(case.root / "decode", CPU, ())
    short = {n for n, w in case.weights.items() if n.startswith("vae.decoder") and w.ndim == 1 and w.numel() <= 8}
    assert short and short <= set(library.loader.get_constant_fqns())


def test_weights_are_shared_and_given_back(engine):
    weights = {name: w.clone() for name, w in engine.case.weights.items()}
    run = engine(weights)
    before = [o.clone() for o in run(engine.inputs)]
    weights["transformer.context_embedder.weight"].mul_(2)
    assert not torch.equal(run(engine.inputs)[1], before[1]), "a change in place shows, as LoRA needs"
    del run
    gc.collect()
    [idle] = aoti._idle
    assert all(t.untyped_storage().nbytes() == 0 for t in idle.constants.values())


def test_an_engine_opened_again_reads_the_new_weights(engine):
    run = engine()
    expected = run(engine.inputs)[0].clone()
    del run
    gc.collect()
    idle = aoti._idle[0]
    other = {name: w * 1.5 for name, w in engine.case.weights.items()}
    run = engine(other)
    assert not aoti._idle
    assert not torch.equal(run(engine.inputs)[0], expected)
    second = engine()  # while the first is in use: a library of its own
    assert torch.equal(second(engine.inputs)[0], expected)
    del run, second
    gc.collect()
    assert idle in aoti._idle and len(aoti._idle) == 2
    assert torch.equal(engine()(engine.inputs)[0], expected)


def test_a_rewritten_engine_is_not_taken_for_the_idle_one(engine, tmp_path):
    case = engine.case
    copy = shutil.copytree(case.root / "condition", tmp_path / "condition")
    case.backend.load(case.specs["condition"], copy, case.weights, lambda: None, CPU)
    gc.collect()
    [idle] = aoti._idle
    shutil.rmtree(copy)
    shutil.copytree(case.root / "condition", copy)
    run = case.backend.load(case.specs["condition"], copy, case.weights, lambda: None, CPU)
    assert aoti._idle == [idle] and run


def test_few_idle_engines_are_kept(engine, monkeypatch):
    monkeypatch.setattr(aoti, "_MOST_IDLE", 2)
    runs = [engine() for _ in range(4)]
    del runs
    gc.collect()
    assert len(aoti._idle) == 2


# --- regions ---


@pytest.fixture
def stage(built):
    """Opens the stage of a bundle, which was compiled by regions, from a folder."""
    case = built(Case("aoti"))

    def opened(directory):
        return case.backend.load(case.specs["stage0"], directory, case.weights, lambda: None, CPU)

    opened.case, opened.directory = case, case.root / "stage0"
    opened.module = assign_weights(case.blank().module("stage0"), case.weights)
    return opened


def test_regions_are_libraries_without_weights(stage):
    names = {p.name for p in (stage.directory / aoti.REGIONS).iterdir()}
    assert names == {"double_block", "single_block"} and (stage.directory / aoti.PROGRAM).is_file()
    for name in names:
        assert not aoti._Library(stage.directory / aoti.REGIONS / name, CPU, ()).loader.get_constant_fqns()
    case = stage.case
    run, inputs = stage(stage.directory), case.inputs["stage0"]
    assert compare(run(inputs), case.reference["stage0"](*inputs))[0] < 1e-5


def rename_operator(program):
    program.write_text(program.read_text().replace("aten.cat.", "aten.unheard_of."))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / aoti.PROGRAM).write_text("{"), r"engine stage0[\s\S]*program.json"),
        (lambda d: (d / aoti.PROGRAM).write_text("{}"), r"engine stage0[\s\S]*program.json[\s\S]*steps"),
        (lambda d: rename_operator(d / aoti.PROGRAM), r"program.json[\s\S]*unheard_of"),
        (lambda d: shutil.rmtree(d / aoti.REGIONS / "single_block"), r"engine stage0[\s\S]*region single_block"),
    ],
)
def test_damaged_programs_and_missing_regions_are_named(stage, tmp_path, damage, message):
    copy = shutil.copytree(stage.directory, tmp_path / "stage0")
    damage(copy)
    with pytest.raises(BackendError, match=message):
        stage(copy)


@pytest.mark.parametrize(
    ("regional", "compiled"),
    [
        (None, ["stage0 (region double_block)", "stage0 (region single_block)"]),
        (True, ["stage0 (region double_block)", "stage0 (region single_block)"]),
        (False, ["stage0"]),
    ],
)
def test_what_is_compiled(stage, tmp_path, monkeypatch, regional, compiled):
    backend, whats = aoti.AOTInductorBackend(regional), []
    monkeypatch.setattr(backend, "compile", lambda what, *_: whats.append(what) or set())
    case = stage.case
    backend.build(case.specs["stage0"], stage.module, case.inputs["stage0"], tmp_path)
    assert whats == compiled and (tmp_path / aoti.PROGRAM).exists() == (len(compiled) == 2)


def test_regions_pay_where_one_runs_more_often_than_there_are_kinds():
    region = {"inputs": (), "weights": (), "outputs": ()}
    step = Step(region="a", outputs=())
    program = Program(inputs=(), weights={}, layouts={}, regions={"a": region}, steps=(step, step), outputs=())
    assert aoti.worthwhile(program)
    assert not aoti.worthwhile(program.model_copy(update={"steps": (step,)}))


def test_a_region_that_cannot_be_compiled_is_named(stage, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", fail)
    case = stage.case
    with pytest.raises(CompileError, match=r"engine stage0 .region double_block.[\s\S]*no such instruction"):
        case.backend.build(case.specs["stage0"], stage.module, case.inputs["stage0"], tmp_path)
    assert not (tmp_path / aoti.PROGRAM).exists()


# --- exponentials ---


def test_exponentials_are_taken_faster_while_bf16_engines_compile_and_only_then():
    from torch._inductor.codegen.cpp import CppVecOverrides

    before = CppVecOverrides.exp("x")
    with aoti.fast_exponentials():
        assert CppVecOverrides.exp("x") == "x.exp_u20()"
    assert CppVecOverrides.exp("x") == before != "x.exp_u20()"
    linear = torch.nn.Linear(2, 2)
    assert not aoti.reduced_precision(linear) and aoti.reduced_precision(linear.bfloat16())


def test_a_compiler_that_takes_them_in_another_way_is_left_alone(monkeypatch):
    from torch._inductor.codegen import cpp

    monkeypatch.delattr(cpp, "CppVecOverrides")
    with aoti.fast_exponentials():
        assert not hasattr(cpp, "CppVecOverrides")


def test_what_a_bf16_engine_computes_with_them(tmp_path):
    """Softmax over rows of scores from -80 to 80, as exact as bf16 is."""
    scores = torch.linspace(-80, 80, 4096).reshape(4, 1024).bfloat16()

    class Softmax(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one = torch.nn.Parameter(torch.ones((), dtype=torch.bfloat16), requires_grad=False)

        def forward(self, x):
            x = (x * self.one).float()
            weights = torch.exp(x - x.amax(dim=-1, keepdim=True))
            return weights / weights.sum(dim=-1, keepdim=True)

    spec = EngineSpec("s", (TensorSpec("x", (4, 1024), "bf16"),), (TensorSpec("y", (4, 1024), "fp32"),))
    module, backend = Softmax(), aoti.AOTInductorBackend()
    backend.build(spec, module, [scores], tmp_path)
    run = backend.load(spec, tmp_path, dict(module.named_parameters()), lambda: module, torch.device("cpu"))
    torch.testing.assert_close(run([scores])[0], scores.float().softmax(dim=-1), rtol=1e-5, atol=1e-8)


def test_engines_run_on_as_many_threads_as_there_are_and_not_as_the_build_had(tmp_path):
    """Code that was compiled for one thread starts three where three are set, in a process that started none."""
    spec = EngineSpec("text", (TensorSpec("x", (512, 1024), "fp32"),), (TensorSpec("y", (512, 1024), "fp32"),))

    class Waves(torch.nn.Module):
        def forward(self, x):
            return torch.sin(x) * 2

    x = torch.linspace(0, 1, 512 * 1024).view(512, 1024)
    with machine.threads(1):
        (tmp_path / "engine").mkdir()
        aoti.AOTInductorBackend().build(spec, Waves(), [x], tmp_path / "engine")
    code = (
        "import os, sys, torch\n"
        "from jitexport.backends.aoti import AOTInductorBackend\n"
        "from jitexport.specs import EngineSpec, TensorSpec\n"
        "tasks = lambda: len(os.listdir('/proc/self/task'))\n"
        "run = AOTInductorBackend().load(EngineSpec('text', (), ()), __import__('pathlib').Path(sys.argv[1]), {},\n"
        "                                lambda: None, torch.device('cpu'))\n"
        "x = torch.ones(512, 1024)\n"
        "torch.set_num_threads(int(sys.argv[2]))\n"
        "before = tasks(); y = run([x])[0]; print(tasks() - before, float(y[-1, -1]))\n"
    )
    for threads in (1, 3):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "engine"), str(threads)], capture_output=True, text=True,
            check=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        started, value = done.stdout.split()
        assert (int(started), float(value)) == (threads - 1, pytest.approx(1.6829, abs=1e-3))
