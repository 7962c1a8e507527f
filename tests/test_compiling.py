import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jitexport import compiling, machine, registry
from jitexport.backends.base import Engine
from jitexport.build import build
from jitexport.building.comparing import verify_engine
from jitexport.building.reference import eager_pipeline, probe_inputs
from jitexport.compiling import Compilers, Recipe, Task, _Worker, check_jobs, default_jobs
from jitexport.errors import BackendUnavailableError, CompileError, InputError, ResourceError, UnsupportedModelError
from jitexport.models.flux import FluxAdapter
from jitexport.models.sources import find_source
from jitexport.plan import CustomSchedule, plan

CPU = torch.device("cpu")
GIB = 1024**3


@pytest.fixture
def recipe(tiny_flux):
    source = replace(find_source(str(tiny_flux)), folder=tiny_flux)
    return Recipe(source, "fp32", None, "eager", "cpu", None, torch.get_num_threads())


@pytest.fixture(scope="module")
def reference(tiny_flux):
    adapter = FluxAdapter.from_folder(tiny_flux, torch.float32)
    made = plan(adapter, custom=CustomSchedule((1, 1), (0.35, 1.0)), dtype="fp32")
    options = {"batch": 1, "dtype": "fp32", "device": CPU}
    pipeline = eager_pipeline(adapter, made.schedule, made.method, made.options, **options)
    with torch.no_grad():
        return adapter, pipeline, {spec.name: inputs for spec, inputs in probe_inputs(pipeline)}


@pytest.fixture
def task(reference, tmp_path):
    _, pipeline, inputs = reference
    return Task((pipeline.engines["stage0"].spec,), (inputs["stage0"],), tmp_path)


# --- how many ---


@pytest.mark.parametrize(
    ("free", "cores", "tasks", "jobs"),
    [(64, 8, 6, 6), (64, 2, 6, 2), (64, 8, 1, 1), (9, 8, 6, 2), (3, 8, 6, 1), (0, 8, 6, 1)],
)
def test_one_process_a_core_as_far_as_tasks_and_memory_go(monkeypatch, free, cores, tasks, jobs):
    monkeypatch.setattr(machine, "memory", lambda: free * GIB)
    monkeypatch.setattr(machine, "cpus", lambda: cores)
    assert default_jobs(registry.backend("aoti"), CPU, tasks, GIB) == jobs


def test_one_process_where_apart_is_no_gain_or_kernels_are_timed(monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda: 64 * GIB)
    monkeypatch.setattr(machine, "cpus", lambda: 8)
    assert default_jobs(registry.backend("onnx"), CPU, 6, GIB) == 1
    assert default_jobs(registry.backend("aoti"), torch.device("cuda"), 6, GIB) == 1


@pytest.mark.parametrize(("jobs", "backend"), [(0, "aoti"), (-1, "eager"), (2, "onnx"), (2, "tensorrt")])
def test_impossible_numbers_of_processes_are_refused(jobs, backend):
    with pytest.raises(InputError, match=f"{jobs} with backend {backend}"):
        check_jobs(jobs, registry.backend(backend))


def test_a_build_refuses_them_before_it_reads_anything(tmp_path, tiny_flux):
    with pytest.raises(InputError, match="3 with backend eager"):
        build(str(tiny_flux), output=tmp_path / "b", backend="eager", dtype="fp32", jobs=3)
    assert not list(tmp_path.iterdir())


# --- processes ---


def test_engines_from_processes_agree_with_the_eager_modules(recipe, reference, tmp_path):
    adapter, pipeline, inputs = reference
    names = ("stage0", "condition")
    tasks = {}
    for name in names:
        (tmp_path / name).mkdir()
        tasks[name] = Task((pipeline.engines[name].spec,), (inputs[name],), tmp_path / name)
    backend = registry.backend("aoti")
    with Compilers(2, replace(recipe, backend="aoti"), backend, adapter) as compilers:
        for finish in [compilers.submit(task) for task in tasks.values()]:
            finish()
    for name in names:
        spec = pipeline.engines[name].spec
        raw = backend.load(spec, tmp_path / name, dict(adapter.tensors()), lambda: None, CPU)
        with torch.no_grad():
            error, _ = verify_engine(spec, Engine(spec, raw, CPU), pipeline.engines[name], inputs[name], 1e-4)
        assert error < 1e-5


def test_errors_come_back_as_they_were_raised(recipe, task, tmp_path):
    worker = _Worker(replace(recipe, source=replace(recipe.source, folder=tmp_path / "nothing")))
    try:
        with pytest.raises(UnsupportedModelError, match="nothing") as caught:
            worker.run(task)
        assert caught.value.message and "nothing" in str(caught.value.found)
    finally:
        worker.kill()


def test_an_error_of_a_library_is_a_compile_error(recipe, task):
    worker = _Worker(recipe)
    try:
        with pytest.raises(CompileError, match=r"cannot compile engine stage0[\s\S]*TypeError"):
            worker.run(replace(task, directory=None, examples=None))
        worker.run(task)  # and goes on
    finally:
        worker.kill()


def test_one_failing_task_fails_the_build_and_leaves_no_process(recipe, reference, task):
    adapter = reference[0]
    with pytest.raises(BackendUnavailableError), Compilers(2, recipe, registry.backend("eager"), adapter) as compilers:
        finish = compilers.submit(task)
        pids = [w._process.pid for w in compilers._workers]
        finish()
        raise BackendUnavailableError("something else failed")
    assert not any(alive(pid) for pid in pids)


def test_a_process_that_dies_is_an_error_and_not_a_wait(recipe, task):
    worker = _Worker(recipe)
    worker.run(task)
    os.kill(worker._process.pid, signal.SIGKILL)
    with pytest.raises(ResourceError) as caught:
        worker.run(task)
    assert str(caught.value).splitlines()[0].startswith("memory ran out: the system killed the process")
    assert "exit status -9" in caught.value.found and "--jobs 1" in caught.value.remedy
    worker.kill()


def test_a_process_that_ends_by_itself_says_its_last_words(recipe, task):
    worker = _Worker(recipe)
    worker.run(task)
    os.kill(worker._process.pid, signal.SIGTERM)
    with pytest.raises(CompileError, match=r"stage0 ended[\s\S]*exit status -15"):
        worker.run(task)
    worker.kill()


def test_nothing_from_the_working_directory_is_run(recipe, task, tmp_path, monkeypatch):
    """Names of modules of Python's own and of libraries; also where PYTHONPATH has the folder or an empty part."""
    for name in ("random", "tokenizers", "sitecustomize", "jitexport"):
        code = f"open({str(tmp_path / 'ran')!r}, 'a').write('{name} ')\nraise SystemExit(9)"
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), *sys.path])
    worker = _Worker(recipe)
    try:
        worker.run(task)
    finally:
        worker.kill()
    assert not (tmp_path / "ran").exists()


def test_the_command_line_runs_nothing_from_there_either(tmp_path):
    for name in ("torch", "typer", "rich"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(9)")
    environment = os.environ | {"PYTHONPATH": str(Path(compiling.__file__).parent.parent)}
    command = [sys.executable, "-m", "jitexport", "doctor", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_processes_end_with_a_caller_that_is_killed(tiny_flux):
    script = textwrap.dedent(
        """
        import sys, time
        from dataclasses import replace
        from pathlib import Path
        from jitexport.compiling import Recipe, _Worker
        from jitexport.models.sources import find_source
        source = find_source(sys.argv[1])
        worker = _Worker(Recipe(source, "fp32", None, "eager", "cpu", None, 1))
        print(worker._process.pid, flush=True)
        time.sleep(600)
        """
    )
    caller = subprocess.Popen([sys.executable, "-c", script, str(tiny_flux)], stdout=subprocess.PIPE, text=True)
    pid = int(caller.stdout.readline())
    assert alive(pid)
    caller.kill()
    caller.wait()
    until = time.monotonic() + 60
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert not alive(pid)


def alive(pid: int) -> bool:
    """Whether a process runs: one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_with_one_job_nothing_is_started(recipe, reference, task, monkeypatch):
    monkeypatch.setattr(compiling, "_Worker", lambda *_: pytest.fail("a process was started"))
    with Compilers(1, recipe, registry.backend("eager"), reference[0]) as compilers:
        compilers.submit(task)()
