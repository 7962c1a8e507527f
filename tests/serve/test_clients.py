"""The clients that people have: OpenAI's package, curl, and what they see of the API."""

import base64
import http.client
import io
import json
import shutil
import subprocess
import sys
import time

import httpx
import openai
import pytest
from PIL import Image

from jitexport.schedule import COMPUTED
from tests.serve.running import events

PROMPT = "a red fox in the snow"


def test_openais_client_gets_the_image_that_generate_writes(server, quad, tmp_path):
    made = server.openai().images.generate(prompt=PROMPT, model="quad", size="32x48", extra_body={"seed": 7})
    path = tmp_path / "image.png"
    command = [sys.executable, "-m", "jitexport", "generate", quad, PROMPT, "--seed", "7", "-o", path]
    subprocess.run(command, check=True, capture_output=True)
    assert base64.b64decode(made.data[0].b64_json) == path.read_bytes()
    assert made.usage.output_tokens == 96 and made.usage.total_tokens == 96 + made.usage.input_tokens
    assert made.size == "32x48" and made.output_format == "png" and made.background == "opaque"


def test_openais_client_streams_previews_and_then_the_image(server, alone):
    stream = server.openai().images.generate(
        prompt=PROMPT, model="quad", stream=True, partial_images=2, extra_body={"seed": 7}
    )
    told = list(stream)
    assert [type(e) for e in told] == [
        openai.types.ImageGenPartialImageEvent, openai.types.ImageGenPartialImageEvent,
        openai.types.ImageGenCompletedEvent,
    ]  # fmt: skip
    assert [e.partial_image_index for e in told[:2]] == [0, 1]
    pictures = [base64.b64decode(e.b64_json) for e in told]
    assert pictures[2] == alone(PROMPT, 7) and len(set(pictures)) == 3
    assert all(Image.open(io.BytesIO(p)).size == (32, 48) for p in pictures)
    assert told[2].usage.output_tokens == 96


def test_previews_are_the_decoded_predictions_at_the_ends_of_stages(server, pipe):
    import torch

    from jitexport.png import encode_png

    seen = []

    def look(pipe, step, timestep, tensors):
        if step in (1, 3):
            seen.append(encode_png(pipe.to_images(pipe.decode(tensors["clean"]), "pil")[0]))

    generator = torch.Generator().manual_seed(7)
    pipe(PROMPT, generator=generator, callback_on_step_end=look, callback_on_step_end_tensor_inputs=["clean"])
    for _ in range(2):
        answer = server.post(prompt=PROMPT, model="quad", seed=7, stream=True, partial_images=2)
        assert [base64.b64decode(e["b64_json"]) for e in events(answer)[:2]] == seen


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(server, alone):
    body = json.dumps({"prompt": PROMPT, "seed": 3})
    command = ["curl", "-sS", "--fail", f"{server.url}/v1/images/generations", "--noproxy", "*", "-H"]
    found = subprocess.run([*command, "Content-Type: application/json", "-d", body], check=True, capture_output=True)
    answer = json.loads(found.stdout)
    assert base64.b64decode(answer["data"][0]["b64_json"]) == alone(PROMPT, 3)
    assert answer["model"] == "quad"  # the first, where none is asked for


def test_n_images_have_the_seeds_from_the_given_one_on(server, alone):
    answer = server.post(prompt=PROMPT, model="quad", n=6, seed=2**64 - 2).json()
    seeds = [2**64 - 2, 2**64 - 1, 0, 1, 2, 3]
    assert [d["jitexport"]["seed"] for d in answer["data"]] == seeds
    assert [base64.b64decode(d["b64_json"]) for d in answer["data"]] == [alone(PROMPT, s) for s in seeds]
    assert answer["usage"]["output_tokens"] == 6 * 96


def test_a_stream_of_several_images_says_which_one_each_event_is_of(server, alone):
    told = events(server.post(prompt=PROMPT, n=2, seed=5, stream=True, partial_images=1, stream_steps=True))
    for i in range(2):
        own = [e for e in told if e["image_index"] == i]
        kinds = [e["type"] for e in own]
        assert kinds.count("jitexport.step") == 6 and kinds.count("image_generation.partial_image") == 1
        assert kinds[-1] == "image_generation.completed"
        assert base64.b64decode(own[-1]["b64_json"]) == alone(PROMPT, 5 + i)


def test_steps_say_which_tokens_run(server):
    told = [e for e in events(server.post(prompt="a", stream=True, stream_steps=True)) if e["type"] == "jitexport.step"]
    assert [(e["step"], e["steps"], e["of"], e["grid"]) for e in told] == [(i, 6, 96, [12, 8]) for i in range(1, 7)]
    assert {e["action"] for e in told} == {COMPUTED}
    counts = [e["tokens"] for e in told]
    assert counts[:2] == counts[:1] * 2 and counts[1] < counts[2] < counts[4] == 96
    for e in told:
        assert len(e["detail"]) == 96 and e["detail"].count("1") == e["tokens"]


def test_an_image_at_an_address(server, alone):
    made = server.openai().images.generate(prompt=PROMPT, response_format="url", extra_body={"seed": 9})
    answer = httpx.get(made.data[0].url, trust_env=False)
    assert answer.content == alone(PROMPT, 9) and answer.headers["content-type"] == "image/png"
    name = made.data[0].url.rpartition("/")[2]
    assert len(name) > 32
    for wrong in (name[:-5] + "x.png", "../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2fetc%2fpasswd", ""):
        assert server.http.get(f"/v1/images/files/{wrong}").status_code == 404


@pytest.mark.parametrize(("form", "kind"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_output_formats(server, form, kind):
    picture = Image.open(io.BytesIO(server.image(prompt=PROMPT, output_format=form, seed=1)))
    assert picture.format == kind and picture.size == (32, 48)


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_compression_is_the_files_quality(server, form):
    sizes = [
        len(server.image(prompt=PROMPT, output_format=form, output_compression=q, seed=1)) for q in (5, 50, 100)
    ]
    assert sizes[0] < sizes[1] < sizes[2]


@pytest.mark.parametrize("dialect", ["top", "extra_body", "nvext"])
def test_three_dialects_of_further_fields(server, alone, dialect):
    further = {"seed": 4, "guidance_scale": 1.5, "num_inference_steps": 6}
    body = further if dialect == "top" else {dialect: further}
    assert server.image(prompt=PROMPT, **body) == alone(PROMPT, 4, guidance_scale=1.5) != alone(PROMPT, 4)


def test_a_negative_prompt(server, alone):
    found = server.image(prompt=PROMPT, seed=4, negative_prompt="a dog", true_cfg_scale=3.0)
    assert found == alone(PROMPT, 4, negative_prompt="a dog", true_cfg_scale=3.0) != alone(PROMPT, 4)


def test_models(server):
    listed = {m.id: m.jitexport for m in server.openai().models.list()}
    assert list(listed) == ["quad", "single"]
    assert listed["quad"]["size"] == "32x48" and listed["quad"]["batch"] == 4 and listed["quad"]["steps"] == 6
    assert listed["quad"]["loras"] == ["one", "two"]
    assert server.openai().models.retrieve("single").id == "single"
    assert server.http.get("/v1/models/nonesuch").json()["error"]["code"] == "model_not_found"


def test_health_readiness_and_metrics(server):
    assert server.http.get("/health").json() == {"status": "alive"}
    assert server.http.get("/ready").json() == {"status": "ready"}
    before = server.metric("jitexport_images_total", bundle="quad")
    server.image(prompt=PROMPT, model="quad")
    assert server.metric("jitexport_images_total", bundle="quad") == before + 1
    assert server.metric("jitexport_requests_total", bundle="quad", status="200") >= 1
    for phase in ("queue", "prepare", "first_step", "steps", "decode", "encode"):
        assert server.metric("jitexport_phase_seconds_count", bundle="quad", phase=phase) >= 1
    assert server.metric("jitexport_loaded") == 2
    assert server.metric("jitexport_queue_images") == 0


def test_a_prompt_that_is_cut_is_said_to_be(server):
    told = server.post(prompt="fox " * 50).json()["data"][0]["jitexport"]
    assert told["warnings"] == ["the prompt was cut to 10 tokens"]
    assert "warnings" not in server.post(prompt="fox").json()["data"][0]["jitexport"]


def test_the_description_for_machines_has_the_fields(server):
    schema = server.http.get("/openapi.json").json()
    body = schema["paths"]["/v1/images/generations"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"prompt", "seed", "partial_images"} <= set(body["properties"])


def test_a_connection_stays_open_for_longer_than_clients_keep_theirs(server):
    """Else they send into connections that are being closed: httpx keeps them for 5 s, which is uvicorn's default."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.connect()
    first = connection.sock
    for pause in (5.5, 0):
        connection.request("GET", "/health")
        assert connection.getresponse().read()
        assert connection.sock is first  # which it drops where an answer says that it will be closed
        time.sleep(pause)
    connection.close()
