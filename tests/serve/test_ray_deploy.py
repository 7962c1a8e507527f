"""A cluster that runs already, and `serve deploy` with a configuration file as the documentation has it."""

from __future__ import annotations

import base64
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import jitexport
from jitexport.plan import CustomSchedule
from jitexport.png import encode_png
from tests.serve.running import free_port

pytest.importorskip("ray", reason="needs the extra: pip install 'jitexport[ray]'")
yaml = pytest.importorskip("yaml")

PROMPT = "a red fox"
SECONDS = 120
pytestmark = pytest.mark.slow


class Cluster:
    """A head node of Ray in processes of its own, apart from every other cluster of the machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self.dashboard = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = os.environ | {
            "RAY_TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": (token := secrets.token_hex(32)),
        }  # fmt: skip
        self.log = folder / "head.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [program("ray"), "start", "--head", "--block", "--num-cpus", "2", "--temp-dir", folder,
                 "--port", str(free_port()), "--dashboard-port", str(self.dashboard),
                 "--dashboard-agent-listen-port", str(free_port()), "--ray-client-server-port", str(free_port()),
                 "--object-store-memory", "100000000", "--disable-usage-stats"],
                env=self.environment, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.wait_until(lambda: answers(f"http://127.0.0.1:{self.dashboard}/api/version", token))

    def deploy(self, bundles: str, **engines: Any) -> None:
        """`serve deploy` with a file that has these options of the deployment `Engines`."""
        config = {
            "http_options": {"host": "127.0.0.1", "port": self.port},
            "applications": [{
                "name": "jitexport", "import_path": "jitexport.serve.ray_app:build",
                "args": {"bundles": [bundles], "limits": {"queue": 64}},
                "deployments": [{"name": "Engines"} | engines],
            }],
        }  # fmt: skip
        file = self.folder / "config.yaml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        command = [program("serve"), "deploy", file, "--address", f"http://127.0.0.1:{self.dashboard}"]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def replicas(self) -> set[int]:
        """Process ids of the replicas that make images, of this cluster's."""
        found = set()
        for path in Path("/proc").glob("[0-9]*"):
            try:
                named = (path / "cmdline").read_bytes().startswith(b"ray::ServeReplica:jitexport:Engines")
                if named and f"RAY_TMPDIR={self.folder}".encode() in (path / "environ").read_bytes().split(b"\0"):
                    found.add(int(path.name))
            except OSError:
                continue
        return found

    def ask(self, seed: int) -> bytes:
        """The image of a seed."""
        answer = httpx.post(
            f"{self.url}/v1/images/generations", json={"prompt": PROMPT, "seed": seed}, timeout=100, trust_env=False
        )
        assert answer.status_code == 200, answer.text
        return base64.b64decode(answer.json()["data"][0]["b64_json"])

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for something to become true."""
        until = time.monotonic() + SECONDS
        while not condition():
            assert self.process.poll() is None and time.monotonic() < until, self.log.read_text()
            time.sleep(0.2)

    def stop(self) -> None:
        """End all of its processes."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        finally:
            self.process.kill()


class Load:
    """Clients that ask one after the other; what they were answered."""

    def __init__(self, cluster: Cluster, clients: int) -> None:
        self.cluster, self.images, self.failures = cluster, set[bytes](), list[BaseException]()
        self._stop = threading.Event()
        self._clients = [threading.Thread(target=self._run) for _ in range(clients)]

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.images.add(self.cluster.ask(4))
            except BaseException as failure:  # told by the test
                self.failures.append(failure)

    def __enter__(self) -> Load:
        for client in self._clients:
            client.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for client in self._clients:
            client.join()


def program(name: str) -> str:
    """A command of this interpreter's environment."""
    return str(Path(sys.executable).with_name(name))


def answers(url: str, token: str | None = None) -> bool:
    """Whether an address is served."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        return httpx.get(url, headers=headers, timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_bundle) -> Path:
    """Bundles of one name in three folders: the first, another one, and that one damaged."""
    root = tmp_path_factory.mktemp("shared")
    first = make_bundle(batch=2, custom=CustomSchedule((20, 20), (0.5, 1.0)))
    other = make_bundle(batch=2, custom=CustomSchedule((3, 3), (0.5, 1.0)))
    for name, bundle in [("v1", first), ("v2", other), ("damaged", other)]:
        shutil.copytree(bundle, root / name)
    weights = sorted((root / "damaged" / "weights").iterdir())[-1]
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    return root


@pytest.fixture(scope="module")
def expected(folder) -> dict[str, bytes]:
    """The image of seed 4 by version, made in this process on one thread, as the replicas' are."""
    return {
        version: encode_png(
            jitexport.load(folder / version, threads=1)(PROMPT, generator=torch.Generator().manual_seed(4)).images[0]
        )
        for version in ("v1", "v2")
    }


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # a short path: Ray has sockets in it
        running = Cluster(Path(folder))
        try:
            yield running
        finally:
            running.stop()


def test_another_configuration_has_replicas_load_a_bundle_in_place(cluster, folder, expected):
    first = f"tiny={folder / 'v1'}"
    cluster.deploy(first, num_replicas=1)
    cluster.wait_until(lambda: answers(f"{cluster.url}/ready"))
    before = cluster.replicas()
    assert len(before) == 1
    with Load(cluster, 2) as load:
        cluster.deploy(first, num_replicas=1, user_config={"bundles": [f"tiny={folder / 'damaged'}"]})
        time.sleep(5)
        assert cluster.ask(4) == expected["v1"]
        cluster.deploy(first, num_replicas=1, user_config={"bundles": [f"tiny={folder / 'v2'}"]})
        cluster.wait_until(lambda: cluster.ask(4) == expected["v2"])
    assert not load.failures and load.images == {expected["v1"], expected["v2"]}
    assert cluster.replicas() == before


def test_replicas_follow_the_load(cluster, folder, expected):
    scaling = {
        "min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 1, "upscale_delay_s": 1,
        "downscale_delay_s": 3, "metrics_interval_s": 0.5, "look_back_period_s": 2,
    }  # fmt: skip
    cluster.deploy(f"tiny={folder / 'v1'}", autoscaling_config=scaling)
    cluster.wait_until(lambda: cluster.ask(4) == expected["v1"] and len(cluster.replicas()) == 1)
    with Load(cluster, 6) as load:
        cluster.wait_until(lambda: len(cluster.replicas()) == 2)
        cluster.wait_until(lambda: len(load.images) == 1)
    cluster.wait_until(lambda: len(cluster.replicas()) == 1)
    assert not load.failures and load.images == {expected["v1"]}
