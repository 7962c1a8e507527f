"""The same application on a real local cluster, started by the command line."""

import base64
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest

from jitexport.serve.settings import Limits
from tests.serve import running
from tests.serve.running import CLUSTER, Load, Server, events, ray_replicas
from tests.serve.running import VERSIONS_PROMPT as PROMPT

ray = pytest.importorskip("ray", reason="needs the extra: pip install 'jitexport[ray]'")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`"),  # Ray's own
]


@pytest.fixture(scope="module")
def server(tmp_path_factory, versions):
    environment = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", CLUSTER: "local"}
    log = tmp_path_factory.mktemp("ray") / "log"
    started = Server(log, f"tiny={versions / 'v1'}", "--ray", "2", "--queue", "12", environment=environment)
    yield started
    assert started.stop() == 0, log.read_text()
    assert not replicas()


def replicas():
    return ray_replicas("local")


def ask(server, seed, **further):
    return running.ask(server.url, PROMPT, seed, **further)


def test_images_and_streams(server, expected):
    assert server.http.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert server.http.get("/health").status_code == 200
    with ThreadPoolExecutor(6) as clients:
        answers = list(clients.map(lambda seed: ask(server, seed), range(6)))
    assert answers == [(200, expected["v1", seed]) for seed in range(6)]
    told = list(server.openai().images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body={"seed": 1}))
    assert [e.type.rpartition(".")[2] for e in told] == ["partial_image", "partial_image", "completed"]
    assert base64.b64decode(told[-1].b64_json) == expected["v1", 1]
    assert ask(server, 0, size="8x8")[0] == 400


def test_a_replica_that_is_killed_costs_no_request(server, expected):
    victims, answers = replicas(), []
    assert len(victims) == 2

    def load(k):
        for i in range(6):
            seed = (k + i) % 6
            answers.append((seed, ask(server, seed)))

    clients = [threading.Thread(target=load, args=(k,)) for k in range(4)]
    for client in clients:
        client.start()
    time.sleep(1)
    body = {"prompt": PROMPT, "seed": 2, "stream": True, "stream_steps": True, "partial_images": 1}
    os.kill(victims[0], signal.SIGKILL)
    told = events(server.http.post("/v1/images/generations", json=body))
    for client in clients:
        client.join(100)
        assert not client.is_alive()
    assert len(answers) == 24
    for seed, answer in answers:
        assert answer == (200, expected["v1", seed])
    assert [e["step"] for e in told if e["type"] == "jitexport.step"] == list(range(1, 41))
    server.wait_until(lambda: len(replicas()) == 2)  # Ray brings another one


def test_what_no_replica_has_room_for_is_refused(server, expected):
    with ThreadPoolExecutor(40) as clients:
        answers = list(clients.map(lambda _: ask(server, 3), range(40)))
    statuses = [status for status, _ in answers]
    assert set(statuses) == {200, 503} and statuses.count(200) >= 12
    for status, answer in answers:
        if status == 200:
            assert answer == expected["v1", 3]
        else:
            assert answer.json()["error"]["code"] == "overloaded" and answer.headers["retry-after"]


def test_updates_without_a_failed_request_and_not_to_a_damaged_bundle(server, versions, expected):
    from ray import serve

    from jitexport.serve.ray_app import Arguments, build

    def deploy(version):
        bundles = [f"tiny={versions / version}"]
        arguments = Arguments(bundles=bundles, replicas="2", limits=asdict(Limits(queue=12)))
        serve.run(build(arguments), name="jitexport", route_prefix="/")

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="auto", log_to_driver=False)
    try:
        with Load(lambda: ask(server, 4), 3) as load:
            with pytest.raises(RuntimeError, match="failed"):
                deploy("damaged")
            assert [ask(server, 4) for _ in range(4)] == [(200, expected["v1", 4])] * 4
            deploy("v2")
            server.wait_until(lambda: [ask(server, 4) for _ in range(6)] == [(200, expected["v2", 4])] * 6)
    finally:
        ray.shutdown()
    assert {status for status, _ in load.answers} == {200}
    assert {image for _, image in load.answers} == {expected["v1", 4], expected["v2", 4]}
    steps = lambda: server.http.get("/v1/models").json()["data"][0]["jitexport"]["steps"]  # noqa: E731
    server.wait_until(lambda: steps() == 6)


def test_arguments_as_ray_hands_them_over():
    from pydantic import ValidationError

    from jitexport.serve.ray_app import Arguments

    told = Arguments.model_validate({"bundles": "a=/x b=/y", "replicas": "4", "gpus": "1", "trust": "true"})
    assert (told.bundles, told.replicas, told.gpus, told.trust) == (["a=/x", "b=/y"], "4", 1.0, True)
    assert told.scaling(4) == {"num_replicas": 4}
    scaled = Arguments(bundles=["a=/x"], replicas="1-8").scaling(4)["autoscaling_config"]
    assert scaled == {"min_replicas": 1, "max_replicas": 8, "target_ongoing_requests": 4}
    for wrong in ({}, {"bundles": []}, {"bundles": "a", "replicas": "0"}, {"bundles": "a", "nonesuch": 1}):
        with pytest.raises(ValidationError):
            Arguments.model_validate(wrong)


def test_a_number_of_replicas_that_is_none(capsys, versions):
    from jitexport.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(["serve", str(versions / "v1"), "--ray", "many"])
    assert stopped.value.code == 2 and "2, or 1-8" in capsys.readouterr().err


def test_without_the_extra(capsys, versions, monkeypatch):
    import sys

    from jitexport.cli import main

    for name in [n for n in sys.modules if n.startswith(("jitexport.serve.ray", "ray"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit) as stopped:
        main(["serve", str(versions / "v1"), "--ray", "1"])
    assert stopped.value.code == 3 and "jitexport[ray]" in capsys.readouterr().err
