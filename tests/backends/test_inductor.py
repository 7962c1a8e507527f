"""torch.compile: a second process must find everything in the bundle's cache, and leave everybody else's alone."""

from __future__ import annotations

import copy
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import jitexport
from jitexport import registry
from jitexport.backends import inductor
from jitexport.backends.inductor import CACHE, INFO, LIBRARIES
from jitexport.errors import BackendError, CompileError
from jitexport.specs import EngineSpec, TensorSpec
from tests.backends.conftest import CPU, Case

SPEC = EngineSpec("stage0", (TensorSpec("x", (2, 8), "fp32"),), (TensorSpec("y", (2, 8), "fp32"),))
X = torch.linspace(-1, 1, 16).reshape(2, 8)


class Blocks(nn.Module):
    """A stage of repeated blocks, small; it names the function of a block."""

    regions = ("block",)

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.requires_grad_(False)

    @staticmethod
    def block(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(linear(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for linear in self.linears:
            x = self.block(linear, x)
        return x * 2


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Blocks, Path]:
    """A module and its engine, not to be changed."""
    backend = registry.backend("inductor")
    if reason := backend.missing(CPU):
        pytest.skip(reason)
    torch.manual_seed(0)
    module, folder = Blocks(), tmp_path_factory.mktemp("inductor") / "stage0"
    folder.mkdir()
    backend.build(SPEC, copy.deepcopy(module), [X], folder)
    assert [p.name for p in folder.parent.iterdir()] == ["stage0"], "scratch is left"
    return module, folder


@pytest.fixture
def user(tmp_path, monkeypatch) -> Path:
    """A user's own cache, with TMPDIR beside it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    inductor.own_folder.cache_clear()
    yield tmp_path
    inductor.own_folder.cache_clear()


def load(made, folder=None):
    module, artifact = made
    return registry.backend("inductor").load(
        SPEC, folder or artifact, dict(module.named_parameters()), lambda: Blocks().to("meta"), CPU
    )


def copied(made, folder):
    return Path(shutil.copytree(made[1], folder))


def untouched(user: Path) -> bool:
    """Whether there is nothing in a user's cache and nothing left in TMPDIR."""
    return not list((user / "cache").rglob("*")) and not list((user / "tmp").iterdir())


def graphs() -> int:
    """How many graphs torch has compiled, or taken from a cache, in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


# --- a second process ---

SECOND_PROCESS = """
import json, sys
import torch
from safetensors.torch import save_file
import jitexport
pipe = jitexport.load(sys.argv[1])
image = pipe("a red fox", generator=torch.Generator().manual_seed(1), output_type="pt").images
save_file({"image": image.contiguous()}, sys.argv[2])
from torch._dynamo.utils import counters
print(json.dumps({**counters["inductor"], **counters["stats"]}))
"""
#: Answers questions about the compiler under the same name, a trial of it among them; notes and refuses all else.
NO_COMPILER = """#!/bin/bash
case " $* " in
  *"/trial.so "*) PATH={path} exec {real} "$@" ;;
  *" -o "*|*.cpp*|*" -c "*) echo "$@" >> "{log}"; exit 1 ;;
  *) PATH={path} exec -a {name} {real} "$@" ;;
esac
"""


def test_a_second_process_compiles_nothing(bundle_of, tmp_path):
    from safetensors.torch import load_file

    bundle = bundle_of(Case("inductor"))
    for folder in ("bin", "tmp"):
        (tmp_path / folder).mkdir()
    for name in ("g++", "clang++", "gcc", "cc", "c++"):
        if real := shutil.which(name):
            script = tmp_path / "bin" / name
            log, path = tmp_path / "compiled", os.environ["PATH"]
            script.write_text(NO_COMPILER.format(log=log, path=path, name=name, real=real))
            script.chmod(0o755)
    result = subprocess.run(
        [sys.executable, "-c", SECOND_PROCESS, str(bundle), str(tmp_path / "image.safetensors")],
        env=os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "TMPDIR": str(tmp_path / "tmp"),
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        },
        capture_output=True, text=True,
    )
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "compiled").exists(), (tmp_path / "compiled").read_text()
    assert "compiled again" not in result.stderr
    counted = json.loads(result.stdout.splitlines()[-1])
    engines = len(jitexport.EngineBundle.open(bundle, "size").manifest.engines)
    assert counted["fxgraph_cache_hit"] == counted["unique_graphs"] == engines
    assert "fxgraph_cache_miss" not in counted
    assert untouched(tmp_path)

    pipe = jitexport.load(bundle)
    image = pipe("a red fox", generator=torch.Generator().manual_seed(1), output_type="pt").images
    assert torch.equal(image, load_file(tmp_path / "image.safetensors")["image"])


def test_an_engine_that_aoti_compiled_before_changes_nothing(made, tmp_path, caplog):
    """It leaves its notes in the settings of torch, which torch finds caches by."""
    from torch._inductor import config

    module, _ = made
    (tmp_path / "aoti").mkdir()
    with torch.no_grad():
        registry.backend("aoti").build(SPEC, module, [X], tmp_path / "aoti")
    assert config.aot_inductor.metadata, "else this test is about nothing"
    load(made)
    assert "compiled again" not in caplog.text
    assert config.aot_inductor.metadata


def test_a_cache_that_does_not_fit_is_said_and_gives_the_same(made, tmp_path, caplog):
    folder = copied(made, tmp_path / "stage0")
    kernel = min(inductor.read_libraries(folder / LIBRARIES).keys() - inductor.vector_trials().keys())
    (folder / LIBRARIES / kernel).unlink()
    (y,) = load(made, folder)([X])
    assert "stage0 was compiled again" in caplog.text
    assert torch.equal(y, load(made)([X])[0])


@pytest.mark.parametrize("change", ["empty", "garbage", "no info", "no threads"])
def test_a_damaged_artifact_is_a_backend_error(made, tmp_path, change, user):
    folder = copied(made, tmp_path / "stage0")
    if change in ("empty", "garbage"):
        (folder / CACHE).write_bytes(b"" if change == "empty" else b"not a cache")
    elif change == "no info":
        (folder / INFO).unlink()
    else:
        (folder / INFO).write_text("{}")
    with pytest.raises(BackendError, match="cannot open engine stage0"):
        load(made, folder)
    assert untouched(user)


def test_switched_off_caches_are_a_compile_error(tmp_path, monkeypatch):
    monkeypatch.setattr(inductor, "compiled", lambda *_: lambda inputs: inputs)
    with pytest.raises(CompileError, match="kept no cache"):
        registry.backend("inductor").build(SPEC, Blocks(), [X], tmp_path)
    assert not list(tmp_path.iterdir())


# --- what it computes ---


def test_it_computes_what_the_module_does_and_follows_weights(made):
    module, _ = made
    run = load(made)
    torch.testing.assert_close(run([X])[0], module(X), rtol=1e-5, atol=1e-6)
    before = run([X])[0].clone()
    weight = module.linears[0].weight
    saved = weight.clone()
    weight.mul_(2)
    assert not torch.equal(run([X])[0], before)
    weight.copy_(saved)
    assert torch.equal(run([X])[0], before)


def test_regions_are_compiled_once_and_only_here(made):
    module, folder = made
    source = (folder / CACHE).read_bytes()
    assert source.count(b"def repeated_subgraph0(args):") == 1
    assert source.count(b"= repeated_subgraph0(repeated_subgraph0_args)") == len(module.linears)
    exported = torch.export.export(module, (X,))
    assert not any("subgraph" in str(n.target) for n in exported.graph.nodes), "other backends see no marks"


def test_flux_blocks_of_a_kind_are_compiled_once(built):
    case = built(Case("inductor"))
    source = (case.root / "stage0" / CACHE).read_bytes()
    singles = {n.split(".")[2] for n in case.weights if n.startswith("transformer.single_transformer_blocks.")}
    assert len(singles) == 2  # the one double block stays in the graph of the stage
    assert source.count(b"def repeated_subgraph") == 1
    assert source.count(b"= repeated_subgraph0(") == len(singles)


def test_changed_settings_compile_nothing_again(made):
    run = load(made)
    (before,) = run([X])
    compiled, threads = graphs(), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        torch.set_default_dtype(torch.float64)
        assert torch.equal(run([X])[0], before)
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)
    assert torch.equal(run([X.clone()])[0], before)
    assert graphs() == compiled


def test_engines_may_be_many_and_are_given_up(made):
    """torch.compile keeps only a few versions of one function, and keeps them for good."""
    from torch._dynamo import config
    from torch._dynamo.eval_frame import _get_total_cache_entry_count as entries

    runs = [load(made) for _ in range(config.recompile_limit + 2)]
    first = runs[0]([X])[0]
    assert all(torch.equal(run([X])[0], first) for run in runs)
    codes = [c.args[0] for c in map(_finalizer, runs)]
    assert [entries(c) for c in codes] == [1] * len(runs)
    del runs
    gc.collect()
    assert [entries(c) for c in codes] == [0] * len(codes)


def _finalizer(run):
    """What happens when an engine goes: (object, function, arguments, keywords)."""
    import weakref

    (found,) = [f.peek() for f in list(weakref.finalize._registry) if f.alive and f.peek()[0] is run]
    return type("Finalizer", (), {"args": found[2]})


# --- others in the process ---


def test_the_users_caches_and_settings_are_left_alone(made, user, monkeypatch):
    from torch.compiler._cache import CacheArtifactManager

    before = dict(os.environ)
    config = torch._inductor.config.save_config_portable(ignore_private_configs=False)
    artifacts = CacheArtifactManager._new_cache_artifacts, CacheArtifactManager._seen_artifacts
    run = load(made)
    assert dict(os.environ) | {"_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR": ""} == before | {
        "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR": ""
    }
    assert untouched(user)
    assert torch._inductor.config.save_config_portable(ignore_private_configs=False) == config
    assert artifacts == (CacheArtifactManager._new_cache_artifacts, CacheArtifactManager._seen_artifacts)
    run([X])
    assert untouched(user)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    load(made)
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_threads_may_load_and_call_at_once(made):
    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(lambda _: load(made), range(4)))
        inputs = [X + i for i in range(24)]
        serial = [runs[0]([x])[0] for x in inputs]
        barrier = threading.Barrier(4)

        def call(start):
            barrier.wait()
            return [(i, runs[(start + i) % 2]([inputs[i]])[0]) for i in range(start, 24, 4)]

        for results in pool.map(call, range(4)):
            assert all(torch.equal(y, serial[i]) for i, y in results)
