"""What no client should send, and what some send all the same."""

import json
import random
import time

import httpx
import pytest

GOOD = {"prompt": "a red fox", "model": "quad", "n": 1, "size": "32x48", "seed": 3, "extra_body": {"lora_scale": None}}
JSON = {"Content-Type": "application/json"}


def refused(answer, status=400):
    """The error of an answer, which is in OpenAI's form."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


@pytest.mark.parametrize(
    ("body", "param", "code", "says"),
    [
        ({}, "prompt", "missing_required_parameter", "missing"),
        ({"prompt": None}, "prompt", "invalid_value", "string"),
        ({"prompt": ["a"]}, "prompt", "invalid_value", "string"),
        ({"prompt": "a", "n": 0}, "n", "invalid_value", "greater"),
        ({"prompt": "a", "n": 11}, "n", "invalid_value", "at most 10"),
        ({"prompt": "a", "n": "2"}, "n", "invalid_value", "integer"),
        ({"prompt": "a", "n": True}, "n", "invalid_value", "integer"),
        ({"prompt": "a", "size": "512x512"}, "size", "invalid_value", "32x48"),
        ({"prompt": "a", "size": "512x512", "model": "quad"}, "size", "invalid_value", "32x48"),
        ({"prompt": "a", "model": "nonesuch"}, "model", "model_not_found", "quad, single"),
        ({"prompt": "a", "model": "../../etc/passwd"}, "model", "model_not_found", "quad, single"),
        ({"prompt": "a", "quality": "hd"}, "quality", "invalid_value", "auto"),
        ({"prompt": "a", "style": "vivid"}, "style", "invalid_value", "None"),
        ({"prompt": "a", "background": "transparent"}, "background", "invalid_value", "opaque"),
        ({"prompt": "a", "output_format": "gif"}, "output_format", "invalid_value", "webp"),
        ({"prompt": "a", "output_compression": 50}, "output_compression", "invalid_value", "jpeg"),
        ({"prompt": "a", "output_compression": 101}, "output_compression", "invalid_value", ""),
        ({"prompt": "a", "response_format": "file"}, "response_format", "invalid_value", "url"),
        ({"prompt": "a", "partial_images": 2}, "partial_images", "invalid_value", "stream"),
        ({"prompt": "a", "stream": True, "partial_images": 4}, "partial_images", "invalid_value", "3"),
        ({"prompt": "a", "stream": True, "response_format": "url"}, "response_format", "invalid_value", "b64_json"),
        ({"prompt": "a", "seed": -1}, "seed", "invalid_value", "0"),
        ({"prompt": "a", "seed": 2**64}, "seed", "invalid_value", ""),
        ({"prompt": "a", "seed": 1.5}, "seed", "invalid_value", "integer"),
        ({"prompt": "a", "num_inference_steps": 50}, "num_inference_steps", "invalid_value", "6 steps"),
        ({"prompt": "a", "guidance_scale": -1}, "guidance_scale", "invalid_value", ""),
        ({"prompt": "a", "guidance_scale": 5, "model": "single"}, "guidance_scale", "invalid_value", "negative_prompt"),
        ({"prompt": "a", "negative_prompt": "b"}, None, "invalid_value", "scale above 1"),
        ({"prompt": "a", "true_cfg_scale": 4}, "true_cfg_scale", "invalid_value", "negative_prompt"),
        ({"prompt": "a", "lora": "nonesuch"}, "lora", "invalid_value", "one, two"),
        ({"prompt": "a", "lora": "/etc/passwd"}, "lora", "invalid_value", "one, two"),
        ({"prompt": "a", "lora": "../loras/one"}, "lora", "invalid_value", "one, two"),
        ({"prompt": "a", "lora": "one", "lora_scale": 1e300}, "lora_scale", "invalid_value", "16"),
        ({"prompt": "a", "lora_scale": 1}, "lora_scale", "invalid_value", "needs a lora"),
        ({"prompt": "x" * 4001}, "prompt", "invalid_value", "4001"),
        ({"prompt": "a", "image": "b"}, "image", "unknown_parameter", "prompt"),
        ({"prompt": "a", "extra_body": 3}, "extra_body", "invalid_value", "object"),
        ({"prompt": "a", "nvext": {"annotations": []}}, "nvext.annotations", "unknown_parameter", "seed"),
        ({"prompt": "a", "seed": 1, "nvext": {"seed": 2}}, "nvext.seed", "invalid_value", "twice"),
        ({"prompt": "a", "user": "u" * 300}, "user", "invalid_value", "256"),
        ({"prompt": "\ud800"}, None, "invalid_value", "surrogate"),
    ],
)  # fmt: skip
def test_what_is_refused_says_what_is_taken(server, body, param, code, says):
    status = 404 if code == "model_not_found" else 400
    answer = server.http.post("/v1/images/generations", content=json.dumps(body), headers=JSON)
    error = refused(answer, status)
    assert (error["param"], error["code"]) == (param, code) and says in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"3", b'"a"', b"[]", b"\xff\xfe", b'{"prompt": "a", "guidance_scale": NaN}',
        b'{"prompt": "a", "prompt": "b"}', b"[" * 60_000, b'{"prompt": "a", "seed": 1e400}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", b'{"prompt": "a", "\xed\xa0\x80": 1}',
        b'{"prompt": "a", "\\ud800": 1}',
    ],
    ids=range(14),
)  # fmt: skip
def test_bodies_that_are_no_requests(server, body):
    refused(server.http.post("/v1/images/generations", content=body, headers=JSON))


def damaged(rng: random.Random) -> bytes:
    """A good body after some damage."""
    body = dict(GOOD)
    junk = [None, -1, 2**70, 1.5, "", "x" * 300, [], {}, [[]], True, "\u0000", "../..", {"a": {}}]
    for _ in range(rng.randint(1, 3)):
        body[rng.choice([*body, "lora", "stream", "\u202e", "nvext", "style"])] = rng.choice(junk)
    text = bytearray(json.dumps(body).encode())
    for _ in range(rng.choice([0, 0, 1, 4])):
        i = rng.randrange(len(text))
        text[i : i + 1] = bytes([rng.randrange(256)] * rng.randint(0, 1))
    return bytes(text)


def test_a_thousand_malformed_bodies(server, alone):
    rng, statuses = random.Random(0), []
    for _ in range(1000):
        answer = server.http.post("/v1/images/generations", content=damaged(rng), headers=JSON)
        statuses.append(answer.status_code)
        if answer.status_code != 200:  # a few are good after all
            assert answer.status_code in (400, 404)
            refused(answer, answer.status_code)
    assert statuses.count(400) > 700
    assert server.image(prompt="a red fox", seed=3) == alone("a red fox", 3)
    assert server.metric("jitexport_queue_images") == 0


def test_too_large_bodies_are_not_read(server):
    large = json.dumps({"prompt": "a", "user": "u" * 70_000}).encode()
    assert refused(server.http.post("/v1/images/generations", content=large, headers=JSON), 413)

    def endless():
        while True:
            yield b" " * 10_000

    try:  # without a length; the server may close before all is sent
        answer = server.http.post("/v1/images/generations", content=endless(), headers=JSON)
    except httpx.TransportError:
        return
    refused(answer, 413)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_what_a_foreign_page_can_send_without_asking_is_refused(server, kind):
    answer = server.http.post("/v1/images/generations", content=json.dumps(GOOD), headers={"Content-Type": kind})
    refused(answer, 415)
    asked = server.http.options("/v1/images/generations", headers={"Origin": "http://evil.example"})
    assert "access-control-allow-origin" not in asked.headers


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/images/generations", 405), ("POST", "/v1/images/edits", 404), ("GET", "/../../etc/passwd", 404),
     ("GET", "/docs", 404), ("DELETE", "/v1/models", 405)],
)  # fmt: skip
def test_other_routes(server, method, path, status):
    refused(server.http.request(method, path), status)


@pytest.mark.parametrize(
    "sent",
    [b"GARBAGE\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01", b"GET / HTTP/1.1\r\nA: " + b"x" * 200_000,
     b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n"],
    ids=["text", "tls", "headers", "length"],
)  # fmt: skip
def test_what_is_not_http(server, sent):
    with server.connection() as connection:
        connection.sendall(sent)
        assert connection.recv(4096).startswith(b"HTTP/1.1 400")
    assert server.http.get("/health").status_code == 200


def test_slow_clients_hold_nobody_up(server, alone):
    head = b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\n"
    head += b"Content-Length: 99\r\nContent-Type: application/json\r\n"
    begun = time.monotonic()
    silent, headers, body = (server.connection() for _ in range(3))
    headers.sendall(head[:-10])
    body.sendall(head + b"\r\n{")
    assert server.image(prompt="a red fox", seed=3) == alone("a red fox", 3)
    for i in range(16):  # a byte now and then changes nothing
        time.sleep(0.5)
        if i < 12:
            headers.sendall(b"x")
            body.sendall(b" ")
    assert body.recv(4096).startswith(b"HTTP/1.1 408")
    assert headers.recv(4096) == silent.recv(4096) == b""
    assert time.monotonic() - begun < 60
    for connection in (silent, headers, body):
        connection.close()
