"""A server of bundles on a GPU: what CPUs' tests say of batches and of adapters, on CUDA graphs.

Nothing here runs without a device.
"""

import base64
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

import jitexport
from jitexport.png import encode_png
from tests.serve.conftest import THREE_STAGES

pytestmark = pytest.mark.gpu

PROMPTS = ["a red fox", "the blue house", "a dog under the tree", "snow on the river", "green tree", "fox near dog"]


@pytest.fixture(scope="module")
def bundle(make_bundle):
    return make_bundle(batch=4, custom=THREE_STAGES, device="cuda")


def images(pipe, wanted):
    generators = [torch.Generator().manual_seed(seed) for _, seed in wanted]
    return [encode_png(pipe(prompt, generator=g).images[0]) for (prompt, _), g in zip(wanted, generators, strict=True)]


def test_images_are_the_same_whatever_is_made_beside_them(start, bundle):
    wanted = [(prompt, seed) for seed in range(4) for prompt in PROMPTS]
    server = start(f"quad={bundle}")
    with ThreadPoolExecutor(len(wanted)) as clients:
        made = list(clients.map(lambda w: server.image(prompt=w[0], seed=w[1]), wanted))
    assert made == images(jitexport.load(bundle), wanted)
    assert len(set(made)) == len(made)
    assert server.stop() == 0


def test_adapters_are_of_their_requests_alone(start, bundle, loras):
    pipe = jitexport.load(bundle)
    wanted = [("a red fox", seed) for seed in range(3)]
    plain = images(pipe, wanted)
    pipe.load_lora(loras / "one.safetensors", 1.0)
    adapted = images(pipe, wanted)
    assert not set(plain) & set(adapted)
    server = start(f"quad={bundle}", "--loras", loras)
    asked = [dict(prompt=prompt, seed=seed, **more) for more in ({}, {"lora": "one"}) for prompt, seed in wanted] * 2
    with ThreadPoolExecutor(len(asked)) as clients:
        assert list(clients.map(lambda body: server.image(**body), asked)) == (plain + adapted) * 2
    assert server.stop() == 0


def test_a_stream_forms_the_image_that_a_request_without_one_gets(start, bundle):
    """Where somebody watches, the loop runs step by step; else it is one graph."""
    server = start(f"quad={bundle}")
    whole = server.image(prompt="a red fox", seed=3)
    events = list(server.openai().images.generate(
        model="quad", prompt="a red fox", stream=True, partial_images=2, extra_body={"seed": 3}
    ))  # fmt: skip
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image", "partial_image", "completed"]
    pixels = [np.asarray(Image.open(BytesIO(data)), int) for data in (base64.b64decode(events[-1].b64_json), whole)]
    assert np.abs(pixels[0] - pixels[1]).max() <= 2 < pixels[0].std()
    assert server.stop() == 0
