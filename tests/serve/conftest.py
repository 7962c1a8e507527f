"""Servers of tiny bundles, each started once a session."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra: pip install 'jitexport[serve]'")
pytest.importorskip("openai", reason="needs OpenAI's client, which the extra dev has")

import torch

import jitexport
from jitexport.plan import CustomSchedule
from jitexport.png import encode_png
from jitexport.runtime import Pipeline
from tests.serve.running import VERSIONS_PROMPT, Server

THREE_STAGES = CustomSchedule((2, 2, 2), (0.35, 0.62, 1.0))
#: An image of some seconds, so that something can happen while it is made.
LONG = CustomSchedule((150, 150), (0.5, 1.0))


@pytest.fixture(scope="session")
def quad(make_bundle: Callable[..., Path]) -> Path:
    """Three stages, four images at once, guidance."""
    return make_bundle(batch=4, custom=THREE_STAGES)


@pytest.fixture(scope="session")
def single(make_bundle: Callable[..., Path]) -> Path:
    """Another model, all tokens at every step, one image at once, no guidance."""
    return make_bundle("tiny-schnell", method="dense", custom=CustomSchedule((4,)))


@pytest.fixture(scope="session")
def long(make_bundle: Callable[..., Path]) -> Path:
    return make_bundle(custom=LONG)


@pytest.fixture(scope="session")
def versions(tmp_path_factory: pytest.TempPathFactory, make_bundle: Callable[..., Path]) -> Path:
    """Bundles of one name in three folders: v1, v2, and that one damaged."""
    root = tmp_path_factory.mktemp("shared")
    first = make_bundle(batch=2, custom=CustomSchedule((20, 20), (0.5, 1.0)))
    other = make_bundle(batch=2, custom=CustomSchedule((3, 3), (0.5, 1.0)))
    for name, bundle in [("v1", first), ("v2", other), ("damaged", other)]:
        shutil.copytree(bundle, root / name)
    weights = sorted((root / "damaged" / "weights").iterdir())[-1]
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    return root


@pytest.fixture(scope="session")
def expected(versions: Path) -> dict[tuple[str, int], bytes]:
    """PNGs of seeds by version, made in this process on one thread, as the replicas' are."""
    made = {}
    for version in ("v1", "v2"):
        pipe = jitexport.load(versions / version, threads=1)
        for seed in range(6):
            image = pipe(VERSIONS_PROMPT, generator=torch.Generator().manual_seed(seed)).images[0]
            made[version, seed] = encode_png(image)
    return made


@pytest.fixture(scope="session")
def pipe(quad: Path) -> Pipeline:
    """The first bundle in this process: what a server's images are compared with."""
    return jitexport.load(quad)


@pytest.fixture(scope="session")
def alone(pipe: Pipeline) -> Callable[..., bytes]:
    """The PNG of a prompt and a seed, made by a call of its own."""

    def make(prompt: str, seed: int, **options: object) -> bytes:
        generator = torch.Generator().manual_seed(seed)
        return encode_png(pipe(prompt, generator=generator, **options).images[0])

    return make


@pytest.fixture(scope="session")
def loras(tmp_path_factory: pytest.TempPathFactory, pipe: Pipeline) -> Path:
    """A folder with two adapters, `one` and `two`."""
    from safetensors.torch import save_file

    from tests.lora.test_pipeline import adapter

    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(["one", "two"]):
        save_file(adapter(pipe, seed), folder / f"{name}.safetensors")
    (folder / "notes.txt").write_text("no adapter")
    return folder


@pytest.fixture(scope="session")
def server(
    tmp_path_factory: pytest.TempPathFactory, quad: Path, single: Path, loras: Path
) -> Iterator[Server]:
    """Two bundles and two adapters."""
    log = tmp_path_factory.mktemp("server") / "log"
    running = Server(log, f"quad={quad}", f"single={single}", "--loras", loras)
    yield running
    assert running.stop() == 0, log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts a server that is ended with the test."""
    started: list[Server] = []

    def begin(*arguments: str | Path, **options: object) -> Server:
        started.append(Server(tmp_path / f"log-{len(started)}", *arguments, **options))
        return started[-1]

    yield begin
    for one in started:
        one.process.kill()
        one.stop()
