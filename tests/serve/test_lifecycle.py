"""Servers that start, are overrun, lose clients, change what they serve, and end."""

import base64
import shutil
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from jitexport.cli import main
from jitexport.plan import CustomSchedule

PROMPT = "a red fox"

pytestmark = pytest.mark.usefixtures("listening")


def ask(server, seed, **further):
    """(status, image or error) of a request; None where the connection was refused or cut."""
    try:
        answer = httpx.post(
            f"{server.url}/v1/images/generations", json={"prompt": PROMPT, "seed": seed, **further}, timeout=300,
            trust_env=False,
        )
    except httpx.TransportError:
        return None
    if answer.status_code == 200:
        return 200, base64.b64decode(answer.json()["data"][0]["b64_json"])
    return answer.status_code, answer


def begun(server, count=1):
    return lambda: server.metric("jitexport_running_images") + server.metric("jitexport_queue_images") >= count


def test_a_client_that_goes_away_is_given_up_between_steps(start, long):
    server = start(long)
    body = {"prompt": PROMPT, "stream": True, "stream_steps": True}
    with server.http.stream("POST", "/v1/images/generations", json=body) as answer:
        next(answer.iter_lines())
    abandoned = lambda: server.metric("jitexport_images_abandoned_total") == 1  # noqa: E731
    server.wait_until(abandoned)
    with pytest.raises(httpx.ReadTimeout):  # without a stream
        server.http.post("/v1/images/generations", json={"prompt": PROMPT}, timeout=0.3)
    server.wait_until(lambda: server.metric("jitexport_images_abandoned_total") == 2)
    assert server.metric("jitexport_images_total") == 0
    assert server.metric("jitexport_requests_total", status="499") == 2
    assert ask(server, 1)[0] == 200


def test_one_that_goes_away_takes_no_one_along(start, make_bundle):
    bundle = make_bundle(batch=4, custom=CustomSchedule((40, 40), (0.5, 1.0)))
    server = start(bundle, "--batch-wait", "500")
    alone = ask(server, 1)[1]
    with ThreadPoolExecutor(2) as clients:
        stays = clients.submit(ask, server, 1)
        with server.http.stream(
            "POST", "/v1/images/generations", json={"prompt": "x", "stream": True, "stream_steps": True}
        ) as answer:
            next(answer.iter_lines())
        assert stays.result() == (200, alone)
    server.wait_until(lambda: server.metric("jitexport_images_abandoned_total") == 1)
    assert server.metric("jitexport_batch_fill_sum") == 0.25 + 0.5  # they were together


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(start, long):
    server = start(long, "--queue", "2")
    alone = ask(server, 5)[1]
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda _: ask(server, 5), range(8)))
    statuses = sorted(status for status, _ in answers)
    assert statuses.count(200) >= 2 and statuses.count(503) >= 4 and set(statuses) == {200, 503}
    for status, answer in answers:
        if status == 200:
            assert answer == alone
        else:
            assert int(answer.headers["retry-after"]) >= 1 and answer.json()["error"]["code"] == "overloaded"
    assert ask(server, 5, n=3)[0] == 503  # all images of a request are taken, or none
    assert server.metric("jitexport_refusals_total", reason="overloaded") == statuses.count(503) + 1
    # OpenAI's client comes back by itself.
    assert server.openai(max_retries=2).images.generate(prompt=PROMPT).data


def test_time_runs_out(start, make_bundle):
    server = start(make_bundle(custom=CustomSchedule((1500, 1500), (0.5, 1.0))), "--timeout", "1")
    status, answer = ask(server, 1)
    assert status == 504 and answer.json()["error"]["code"] == "timeout"
    server.wait_until(lambda: server.metric("jitexport_images_abandoned_total") == 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(start, long, number):
    server = start(long)
    alone = ask(server, 5)[1]
    with ThreadPoolExecutor(3) as clients:
        answers = [clients.submit(ask, server, 5) for _ in range(3)]
        server.wait_until(begun(server, 3))
        assert server.stop(number) == 0
        assert [a.result() for a in answers] == [(200, alone)] * 3
    assert ask(server, 5) is None
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("how", ["twice", "drain"])
def test_a_server_that_must_not_wait(start, make_bundle, how):
    server = start(make_bundle(custom=CustomSchedule((1500, 1500), (0.5, 1.0))), *["--drain", "1"] * (how == "drain"))
    client = threading.Thread(target=ask, args=(server, 1))
    client.start()
    server.wait_until(begun(server))
    server.process.send_signal(signal.SIGTERM)
    if how == "twice":
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    client.join(60)
    assert not client.is_alive()


def test_bundles_that_do_not_fit_take_turns(start, quad, single, alone):
    largest = max(sum(f.stat().st_size for f in b.rglob("*") if f.is_file()) for b in (quad, single))
    server = start(f"quad={quad}", f"single={single}", "--memory", f"{1.2 * largest / 1e9:.9f}")
    for _ in range(2):
        assert ask(server, 3, model="quad") == (200, alone(PROMPT, 3))
        assert (server.metric("jitexport_loaded"), server.metric("jitexport_loaded", bundle="quad")) == (1, 1)
        assert ask(server, 3, model="single")[0] == 200
        assert (server.metric("jitexport_loaded"), server.metric("jitexport_loaded", bundle="single")) == (1, 1)
    assert server.metric("jitexport_loads_total", outcome="loaded") >= 4


def replace(served: Path, bundle: Path) -> None:
    """Put another bundle in a served one's place, as a deployment does: whole."""
    shutil.copytree(bundle, served.with_name("next"))
    served.rename(served.with_name(f"old-{time.monotonic_ns()}"))
    served.with_name("next").rename(served)


def test_hang_up_updates_without_a_failed_request_and_keeps_the_old_one_where_the_new_is_damaged(
    start, tmp_path, make_bundle, quad
):
    other = make_bundle(batch=4, custom=CustomSchedule((1, 2), (0.5, 1.0)))
    served = tmp_path / "served"
    shutil.copytree(quad, served)
    server = start(served)
    old, stop, seen = ask(server, 5)[1], threading.Event(), []

    def load():
        while not stop.is_set():
            seen.append(ask(server, 5))

    clients = [threading.Thread(target=load) for _ in range(3)]
    for client in clients:
        client.start()
    try:
        damaged = tmp_path / "damaged"
        shutil.copytree(other, damaged)
        weights = sorted((damaged / "weights").iterdir())[-1]
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        replace(served, damaged)
        server.process.send_signal(signal.SIGHUP)
        server.wait_until(lambda: server.metric("jitexport_loads_total", outcome="update_failed") == 1)
        assert "the old one stays" in server.log.read_text()
        assert ask(server, 5) == (200, old)

        replace(served, other)
        server.process.send_signal(signal.SIGHUP)
        server.wait_until(lambda: ask(server, 5) != (200, old))
        new = ask(server, 5)[1]
    finally:
        stop.set()
        for client in clients:
            client.join()
    assert {status for status, _ in seen} == {200}
    images = [image for _, image in seen]
    assert set(images) == {old, new}
    assert server.http.get("/v1/models").json()["data"][0]["jitexport"]["steps"] == 3


def test_tokens(start, tmp_path, single):
    tokens = tmp_path / "tokens"
    tokens.write_text("first-token\nsecond-token\n")
    server = start(single, "--token-file", tokens)
    for wrong in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "first-token"},
                  {"Authorization": "Bearer first-token second-token"}, {"Authorization": "Bearer \xe9"}):
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nonesuch"):
            answer = server.http.get(path, headers={k: v.encode("latin-1") for k, v in wrong.items()})
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert server.http.post("/v1/images/generations", json={"prompt": "a"}, headers={}).status_code == 401
    for path in ("/", "/health", "/ready"):
        assert server.http.get(path).status_code == 200
    for token in ("first-token", "second-token"):
        client = server.openai(api_key=token)
        made = client.images.generate(prompt=PROMPT, response_format="url")
        assert httpx.get(made.data[0].url, trust_env=False).status_code == 200  # who knows the address may look
    assert "first-token" not in server.log.read_text() and PROMPT not in server.log.read_text()


def test_a_token_from_the_environment(start, single):
    server = start(single, environment={"JITEXPORT_TOKEN": "secret"})
    assert server.http.get("/v1/models").status_code == 401
    assert server.http.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200


@pytest.fixture
def fails(capsys):
    """Runs a server that cannot start: its exit code, and what it said."""

    def call(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main(["serve", "--port", "0", *map(str, arguments)])
        return stopped.value.code, capsys.readouterr().err

    return call


def test_servers_that_cannot_start(fails, tmp_path, quad, single):
    for code, words, *arguments in [
        (5, "no bundle at", tmp_path),
        (2, "names that differ", f"a={quad}", f"a={single}"),
        (2, "name cannot be used", f"a b={quad}"),
        (2, "larger than the memory budget", quad, "--memory", "0.000001"),
        (2, "folder of adapters", quad, "--loras", tmp_path / "nonesuch"),
        (2, "tokens cannot be read", quad, "--token-file", tmp_path / "nonesuch"),
        (2, "http:// or https://", quad, "--public-url", "ftp://x"),
        (2, "cannot listen", quad, "--host", "203.0.113.1"),
    ]:
        found, text = fails(*arguments)
        assert found == code and words in text


def test_a_port_that_is_taken(fails, quad):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, text = fails(quad, "--port", str(taken.getsockname()[1]))
    assert code == 2 and "cannot listen" in text


def test_a_damaged_bundle_is_not_served(fails, tmp_path, quad):
    damaged = tmp_path / "damaged"
    shutil.copytree(quad, damaged)
    weights = next((damaged / "weights").iterdir())
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    code, text = fails(damaged)
    assert code == 5 and "has another digest" in text


def test_without_the_extra(fails, quad, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    code, text = fails(quad)
    assert code == 3 and "jitexport[serve]" in text
