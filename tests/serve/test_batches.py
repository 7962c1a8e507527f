"""Requests that are put together, and those that never are."""

import base64
from concurrent.futures import ThreadPoolExecutor

import pytest

PROMPTS = ["a red fox", "the blue house", "a dog under the tree", "snow on the river", "green tree", "fox near dog"]


def test_images_are_the_same_whatever_is_made_beside_them(server, alone):
    wanted = [(prompt, seed) for seed in range(4) for prompt in PROMPTS]
    with ThreadPoolExecutor(len(wanted)) as clients:
        answers = list(clients.map(lambda w: server.post(prompt=w[0], seed=w[1], model="quad").json(), wanted))
    data = [answer["data"][0] for answer in answers]
    assert [base64.b64decode(d["b64_json"]) for d in data] == [alone(*w) for w in wanted]
    assert max(d["jitexport"]["batch"] for d in data) == 4  # together, or this test says nothing


def test_two_bundles_at_once(server):
    def ask(model):
        return [server.image(prompt="a red fox", seed=s, model=model) for s in range(4)]

    serial = {model: ask(model) for model in ("quad", "single")}
    with ThreadPoolExecutor(4) as clients:
        for model, images in zip(["quad", "single"] * 2, clients.map(ask, ["quad", "single"] * 2), strict=True):
            assert images == serial[model]
    assert serial["quad"] != serial["single"]


@pytest.fixture(scope="module")
def with_adapters(loras, quad):
    """PNGs of a prompt with seeds, by adapter and strength: in a pipeline of its own."""
    import torch

    import jitexport
    from jitexport.png import encode_png

    made = {}
    for name, scale in [(None, None), ("one", 1.0), ("two", 1.0), ("one", 0.5)]:
        pipe = jitexport.load(quad)
        if name:
            pipe.load_lora(loras / f"{name}.safetensors", scale)
        for seed in range(3):
            image = pipe("a red fox", generator=torch.Generator().manual_seed(seed)).images[0]
            made[name, scale, seed] = encode_png(image)
    assert len(set(made.values())) == len(made)
    return made


def test_adapters_are_of_their_requests_alone(server, with_adapters):
    keys = list(with_adapters) * 2

    def ask(key):
        name, scale, seed = key
        further = {} if name is None else {"lora": name} | ({} if scale == 1 else {"lora_scale": scale})
        return server.image(prompt="a red fox", model="quad", seed=seed, **further)

    with ThreadPoolExecutor(len(keys)) as clients:
        assert list(clients.map(ask, keys)) == [with_adapters[key] for key in keys]


def test_guidance_is_of_a_request(server, alone):
    keys = [(scale, seed) for seed in range(3) for scale in (None, 1.0, 6.0)]

    def ask(key):
        further = {} if key[0] is None else {"guidance_scale": key[0]}
        return server.image(prompt="a red fox", model="quad", seed=key[1], **further)

    with ThreadPoolExecutor(len(keys)) as clients:
        images = list(clients.map(ask, keys))
    expected = [
        alone("a red fox", seed, **({} if scale is None else {"guidance_scale": scale})) for scale, seed in keys
    ]
    assert images == expected and len(set(images)) == len(keys)
