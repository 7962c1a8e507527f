"""A cluster that runs already, and `serve deploy` with a configuration file as the documentation has it."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.running import CLUSTER, VERSIONS_PROMPT, Load, ask, free_port, ray_replicas

pytest.importorskip("ray", reason="needs the extra: pip install 'jitexport[ray]'")
yaml = pytest.importorskip("yaml")

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
            CLUSTER: str(folder), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": (token := secrets.token_hex(32)),
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

    def replicas(self) -> list[int]:
        """Process ids of its replicas that make images."""
        return ray_replicas(str(self.folder))

    def ask(self) -> tuple[int, Any]:
        """See `running.ask`."""
        return ask(self.url, VERSIONS_PROMPT, 4)

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
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # a short path: Ray has sockets in it
        running = Cluster(Path(folder))
        try:
            yield running
        finally:
            running.stop()


@pytest.fixture
def first(versions) -> str:
    return f"tiny={versions / 'v1'}"


@pytest.fixture
def old(expected) -> tuple[int, bytes]:
    return 200, expected["v1", 4]


@pytest.fixture
def new(expected) -> tuple[int, bytes]:
    return 200, expected["v2", 4]


def test_another_configuration_has_replicas_load_a_bundle_in_place(cluster, versions, first, old, new):
    cluster.deploy(first, num_replicas=1)
    cluster.wait_until(lambda: answers(f"{cluster.url}/ready"))
    before = cluster.replicas()
    assert len(before) == 1
    with Load(cluster.ask, 2) as load:
        cluster.deploy(first, num_replicas=1, user_config={"bundles": [f"tiny={versions / 'damaged'}"]})
        time.sleep(5)
        assert cluster.ask() == old
        cluster.deploy(first, num_replicas=1, user_config={"bundles": [f"tiny={versions / 'v2'}"]})
        cluster.wait_until(lambda: cluster.ask() == new)
    assert set(load.answers) == {old, new}
    assert cluster.replicas() == before


def test_replicas_follow_the_load(cluster, first, old):
    scaling = {
        "min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 1, "upscale_delay_s": 1,
        "downscale_delay_s": 3, "metrics_interval_s": 0.5, "look_back_period_s": 2,
    }  # fmt: skip
    cluster.deploy(first, autoscaling_config=scaling)
    cluster.wait_until(lambda: cluster.ask() == old and len(cluster.replicas()) == 1)
    with Load(cluster.ask, 6) as load:
        cluster.wait_until(lambda: len(cluster.replicas()) == 2)
        cluster.wait_until(lambda: bool(load.answers))
    cluster.wait_until(lambda: len(cluster.replicas()) == 1)
    assert set(load.answers) == {old}
