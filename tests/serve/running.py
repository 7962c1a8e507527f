"""A real server in a process of its own, and what clients do with it."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai

START_SECONDS = 120
#: Of the images of the fixture `expected`.
VERSIONS_PROMPT = "a red fox"


class Server:
    """`jitexport serve` with these arguments; its standard error is in `log`."""

    def __init__(
        self, log: Path, *arguments: str | Path, ready: bool = True, environment: dict[str, str] | None = None
    ):
        self.log = log
        command = [sys.executable, "-m", "jitexport", "serve", "--port", "0", "--json", *map(str, arguments)]
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, env=os.environ | (environment or {}), text=True
            )
        line = self.process.stdout.readline()
        assert line, f"{self.process.wait()}: {log.read_text()}"
        self.url = json.loads(line)["url"]
        self.port = int(self.url.rpartition(":")[2])
        self.http = httpx.Client(base_url=self.url, timeout=120, trust_env=False)
        if ready:
            self.wait_until(lambda: self.http.get("/ready").status_code == 200, START_SECONDS)

    def openai(self, **options: Any) -> openai.OpenAI:
        """OpenAI's own client."""
        options = {"api_key": "none", "max_retries": 0} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", http_client=httpx.Client(trust_env=False), **options)

    def post(self, **body: Any) -> httpx.Response:
        """A request for images."""
        return self.http.post("/v1/images/generations", json=body)

    def image(self, **body: Any) -> bytes:
        """The image of a request."""
        answer = self.post(**body)
        assert answer.status_code == 200, answer.text
        return base64.b64decode(answer.json()["data"][0]["b64_json"])

    def metric(self, name: str, **labels: str) -> float:
        """A metric's value, summed over the labels that are not said; 0 where there is none."""
        total = 0.0
        for line in self.http.get("/metrics").text.splitlines():
            found = re.fullmatch(rf"{name}(?:\{{(.*)\}})? (\S+)", line)
            if found and all(f'{k}="{v}"' in (found[1] or "") for k, v in labels.items()):
                total += float(found[2])
        return total

    def wait_until(self, condition, seconds: float = 240) -> None:
        """Wait for something to become true."""
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, self.log.read_text()
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)

    def connection(self, *, receive_buffer: int | None = None) -> socket.socket:
        """A connection to write bytes to by hand."""
        connection = socket.socket()
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(60)
        connection.connect(("127.0.0.1", self.port))
        return connection

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(300)
        finally:
            self.process.kill()
            self.process.stdout.close()
            self.http.close()


class Load:
    """Clients that ask one after the other until the block ends; what they were answered."""

    def __init__(self, ask: Callable[[], Any], clients: int) -> None:
        self.answers: list[Any] = []
        self._ask, self._stop = ask, threading.Event()
        self._clients = [threading.Thread(target=self._run) for _ in range(clients)]

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.answers.append(self._ask())
            except Exception as failure:  # told by the test
                self.answers.append((failure, None))

    def __enter__(self) -> Load:
        for client in self._clients:
            client.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for client in self._clients:
            client.join()


def ask(url: str, prompt: str, seed: int, **further: Any) -> tuple[int, Any]:
    """A request for one image: status, and the image where it was made, else the answer."""
    body = {"prompt": prompt, "seed": seed, **further}
    answer = httpx.post(f"{url}/v1/images/generations", json=body, timeout=100, trust_env=False)
    made = answer.status_code == 200
    return answer.status_code, base64.b64decode(answer.json()["data"][0]["b64_json"]) if made else answer


#: In the environment of a cluster of Ray, to tell its processes from those of a cluster that another test runs.
CLUSTER = "JITEXPORT_TEST_CLUSTER"


def ray_replicas(cluster: str) -> list[int]:
    """Process ids of a cluster's replicas that make images."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            is_replica = (path / "cmdline").read_bytes().startswith(b"ray::ServeReplica:jitexport:Engines")
            if is_replica and f"{CLUSTER}={cluster}".encode() in (path / "environ").read_bytes().split(b"\0"):
                found.append(int(path.name))
        except OSError:
            continue
    return sorted(found)


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, and that each has the name of its type."""
    found = []
    for block in answer.read().decode().strip().split("\n\n"):
        lines = block.split("\n")
        if lines[0].startswith(":"):
            continue
        told = json.loads(lines[1].removeprefix("data: "))
        assert lines[0] == f"event: {told['type']}" and len(lines) == 2
        found.append(told)
    return found
