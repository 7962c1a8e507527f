"""Tiny random models, made once a session. Nothing here depends on a network or on a model's quality."""

from __future__ import annotations

import os

# Before torch is imported: idle OpenMP threads must not spin on machines that run other things too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import fcntl
import hashlib
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from tests import compile_once

# No deadline: machines are shared. Derandomised: a run fails for a change, not by luck.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")

#: Of the run's first process; the others find the same on their PATH.
_compiled = compile_once.install(os.environ)


def pytest_unconfigure() -> None:
    if _compiled is not None:
        shutil.rmtree(_compiled, ignore_errors=True)


#: Modules of the set for every day (`pytest -m quick`): some of each part of the package, none that compiles, serves
#: or builds more than a tiny bundle.
QUICK = frozenset([
    "bundle/test_manifest.py", "bundle/test_tensors.py", "cli/test_options.py", "lora/test_formats.py",
    "methods/temporal/test_forecasts.py", "methods/temporal/test_placing.py", "methods/test_dense.py",
    "methods/test_jit.py", "models/test_stages.py", "serve/test_protocol.py",
    "serve/test_schema.py", "test_choice.py", "test_docs.py", "test_edges.py", "test_errors.py", "test_grid.py",
    "test_positions.py", "test_public_names.py", "test_registry.py", "test_resample.py", "test_sampler.py",
    "test_schedule.py", "test_tiling.py", "test_weights.py",
])  # fmt: skip


def _is_quick(path: Path) -> bool:
    here = Path(__file__).parent
    return path.is_relative_to(here) and path.relative_to(here).as_posix() in QUICK


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves the other modules unread where the quick set is asked for: importing them costs time, too."""
    is_module = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    return True if config.option.markexpr == "quick" and is_module and not _is_quick(collection_path) else None


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _is_quick(item.path) and "slow" not in item.keywords:
            item.add_marker("quick")
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def listening() -> Iterator[None]:
    """Signals as a terminal's processes have them: whoever starts the tests in the background ignores some of them."""
    handlers: dict[int, Any] = dict.fromkeys((signal.SIGTERM, signal.SIGHUP), signal.SIG_DFL)
    handlers[signal.SIGINT] = signal.default_int_handler
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the whole run: the same one in all processes that it tests in."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


def once(folder: Path, make: Callable[[Path], object]) -> Path:
    """A folder that the first process which needs it makes, while the others wait. Not to be changed."""
    made = folder.with_name(f"{folder.name}.made")
    with open(folder.with_name(f"{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of one that failed
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def tiny_flux(run_folder: Path) -> Path:
    """A random FLUX pipeline in diffusers' format, with guidance; 48 x 32 pixels, 12 x 8 tokens."""
    from tests import tiny  # diffusers: only where it is needed

    return once(run_folder / "tiny-flux", lambda folder: tiny.save_flux(folder, guidance=True))


@pytest.fixture(scope="session")
def tiny_schnell(run_folder: Path) -> Path:
    """The same without guidance, with dynamic shifting; 4 steps as schnell."""
    from tests import tiny

    return once(run_folder / "tiny-schnell", lambda folder: tiny.save_flux(folder, guidance=False))


@pytest.fixture(scope="session")
def make_bundle(run_folder: Path, tiny_flux: Path, tiny_schnell: Path) -> Callable[..., Path]:
    """Builds a bundle of a tiny model, eager and in fp32 unless told otherwise, once a run. Not to be changed."""
    models = {"tiny-flux": tiny_flux, "tiny-schnell": tiny_schnell}

    def make(model: str = "tiny-flux", **options: Any) -> Path:
        from jitexport.build import build

        options = {"backend": "eager", "dtype": "fp32"} | options
        key = hashlib.sha256(f"{model} {sorted(options.items(), key=str)}".encode()).hexdigest()
        source = str(models.get(model, model))
        return once(run_folder / key[:8], lambda folder: build(source, output=folder, **options))

    return make


@pytest.fixture(scope="session")
def aoti_bundle(make_bundle: Callable[..., Path]) -> Path:
    """A compiled bundle of the tiny model with guidance: two stages, fp32. The one slow fixture."""
    from jitexport.plan import CustomSchedule

    return make_bundle(backend="aoti", custom=CustomSchedule((2, 2), (0.35, 1.0)), command=("jitexport", "build"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line in this process: (exit code, stdout, stderr)."""
    from jitexport.cli import main

    def call(*argv: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(a) for a in argv])
        out, err = capsys.readouterr()
        return stopped.value.code, out, err

    return call
