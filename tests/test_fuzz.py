"""Damaged adapters and odd arguments: each is taken right, or refused with nothing changed and an error of our own.

A few hundred cases run with the suite, the same ones each time. More, and other ones each time:

    JITEXPORT_FUZZ=3400 python -m pytest tests/test_fuzz.py -p no:xdist -o timeout=0

The number counts for each of the three tests.
"""

import json
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

import jitexport
from jitexport.errors import JitExportError
from jitexport.plan import CustomSchedule
from tests import tiny

CASES = int(os.environ.get("JITEXPORT_FUZZ", "150"))
fuzz = settings(
    max_examples=CASES, suppress_health_check=list(HealthCheck), database=None, print_blob=True,
    derandomize="JITEXPORT_FUZZ" not in os.environ,
)  # fmt: skip

D, MLP = 32, 128  # widths of the tiny model
Q, FF = "transformer.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.ff.net.0.proj"
KOHYA_QKV, KOHYA_MLP = "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_double_blocks_0_img_mlp_0"


def rand(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.3


def adapters():
    """Good ones, one of each kind; every tensor matters."""
    peft = {f"{Q}.lora_A.weight": rand(2, D), f"{Q}.lora_B.weight": rand(D, 2)}
    peft |= {f"{FF}.lora_A.weight": rand(2, D), f"{FF}.lora_B.weight": rand(MLP, 2), f"{FF}.lora_B.bias": rand(MLP)}
    kohya = {f"{KOHYA_QKV}.lora_down.weight": rand(2, D), f"{KOHYA_QKV}.lora_up.weight": rand(3 * D, 2)}
    kohya |= {f"{KOHYA_QKV}.alpha": torch.tensor(1.0), f"{KOHYA_MLP}.diff": rand(MLP, D)}
    kohya |= {f"{KOHYA_MLP}.diff_b": rand(MLP)}
    dora = kohya | {f"{KOHYA_QKV}.dora_scale": rand(3 * D, 1) + 1}
    sides = {"a": (MLP, 2), "b": (2, D)}
    loha = {f"{KOHYA_MLP}.hada_w{i}_{side}": rand(*shape) for i in (1, 2) for side, shape in sides.items()}
    lokr = {f"{KOHYA_MLP}.lokr_w1": rand(4, 4), f"{KOHYA_MLP}.lokr_w2_a": rand(MLP // 4, 2)}
    lokr |= {f"{KOHYA_MLP}.lokr_w2_b": rand(2, D // 4), f"{KOHYA_MLP}.alpha": torch.tensor(1.0)}
    return [peft, kohya, dora, loha, lokr]


ADAPTERS = adapters()

KEYS = [
    "", ".", "x", ".lora_A.weight", f"{Q}.lora_A", f"{Q}.lora_B.weight", f"{Q}.lora_A.other.weight", f"{Q}.alpha",
    f"{Q}.weight", f"{Q}.dora_scale", f"{KOHYA_MLP}.lora_mid.weight", f"{KOHYA_MLP}.oft_blocks", f"{KOHYA_QKV}.diff_b",
    f"{KOHYA_QKV}.hada_t1", "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha", "text_encoder.\ud83d.lora_A.weight",
    "base_model.model.base_model.model.x.lora_A.weight", "lora_unet_.alpha", "diffusion_model.double_blocks.0.alpha",
    "double_blocks.0.processor.qkv_lora1.down.weight", f"{FF}.lora_magnitude_vector", f"{FF}.modules_to_save.weight",
]  # fmt: skip


def spoiled(tensor, value):
    tensor = tensor.clone().float()
    if tensor.numel():
        tensor.view(-1)[tensor.numel() // 2] = value
    return tensor


TENSORS = [
    lambda t: spoiled(t, math.nan),
    lambda t: spoiled(t, math.inf),
    lambda t: spoiled(t, -3e38),
    lambda t: t.t().contiguous() if t.ndim == 2 else t[None],
    lambda t: t[..., :-1] if t.ndim else t,
    lambda t: t[:0] if t.ndim else t,
    lambda t: t[None],
    lambda t: t.flatten(),
    lambda t: t.half(),
    lambda t: t.bfloat16(),
    lambda t: t.double(),
    lambda t: t.to(torch.float8_e4m3fn),
    lambda t: t.char(),
    lambda t: t.bool(),
    lambda t: t.to(torch.complex64),
    lambda t: torch.tensor(2),
    lambda t: torch.zeros(()),
]
#: What a state dict in memory may hold, and a file may not.
OBJECTS = [None, "x", 1.5, [1.0], np.zeros((2, D), np.float32), np.array(["a"]), torch.zeros(2, D, device="meta")]
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "r": st.sampled_from([2, 0, -1, 2.5, "2", None, [2], 1e400]),
        "lora_alpha": st.sampled_from([2, 8, 0, "x", None, math.nan]),
        "alpha": st.sampled_from([2, 8, "8"]),
        "peft_type": st.sampled_from(["LORA", "LOHA", "VERA", 3, None]),
        "use_rslora": st.booleans(),
        "use_dora": st.booleans(),
        "alpha_pattern": st.sampled_from([{}, {"to_q": 4}, {".*": 0}, {"(": 1}, [1], "x", {"ff.*": "8"}]),
        "rank_pattern": st.sampled_from([{}, {"to_q": 2}, {".*proj": 3}, None]),
        "init_lora_weights": st.sampled_from([True, "pissa", "gaussian"]),
    },
)
SCALES = st.one_of(
    st.sampled_from([1.0, 0, -0.5, 2, True, "1", None, math.nan, math.inf, 1e39, 10**400, np.float32(0.5), [1.0]]),
    st.floats(-2, 2),
)


@pytest.fixture(scope="module")
def pipe(make_bundle):
    return jitexport.load(make_bundle(method="dense", custom=CustomSchedule((1,), (1.0,))))


@pytest.fixture(scope="module")
def originals(pipe):
    return {name: tensor.clone() for name, tensor in pipe.weights.tensors.items()}


def same(pipe, weights):
    return all(torch.equal(tensor, weights[name]) for name, tensor in pipe.weights.tensors.items())


def attempt(load):
    """Whether something was taken; what is not our own error is an error of the test."""
    try:
        load()
    except JitExportError as error:
        assert 10 < len(str(error)) < 5000
        return False
    return True


def mutate(data, state):
    """One of the things that happen to adapters."""
    key = data.draw(st.sampled_from(sorted(state, key=str))) if state else "x"
    kind = data.draw(st.sampled_from(["drop", "rename", "end", "add", "tensor", "object", "double"]))
    if kind == "drop":
        state.pop(key, None)
    elif kind == "rename" and state:
        at = data.draw(st.integers(0, len(key)))
        other = key[:at] + data.draw(st.sampled_from(["", "x", ".", "_", "0", "é"])) + key[at + 1 :]
        state[other] = state.pop(key)
    elif kind == "end" and state:
        state[key.rpartition(".")[0] + data.draw(st.sampled_from(["", ".weight", ".bias", ".diff"]))] = state.pop(key)
    elif kind == "add":
        shape = data.draw(st.sampled_from([(2, D), (D, 2), (1,), (D,), (2, 2)]))
        state[data.draw(st.sampled_from(KEYS))] = rand(*shape)
    elif kind == "tensor" and isinstance(state.get(key), torch.Tensor):
        state[key] = data.draw(st.sampled_from(TENSORS))(state[key])
    elif kind == "object" and state:
        state[key] = data.draw(st.sampled_from(OBJECTS))
    elif kind == "double":
        state["base_model.model." + str(key)] = state.get(key, torch.zeros(1))


def damaged(data, content):
    """The bytes of a file, some of them changed."""
    content = bytearray(content)
    for _ in range(data.draw(st.integers(0, 3))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    return bytes(content[: data.draw(st.sampled_from([None, len(content), len(content) // 2, 7, 0]))])


def written(data, state, folder):
    """As a file, with settings in its header or beside it; None where safetensors cannot hold it."""
    header = data.draw(st.sampled_from([None, {"alpha": "4", "rank": "2"}, {"alpha": "x"}, {"rank": "3"}, "peft"]))
    if header == "peft":
        config = {f"transformer.{k}": v for k, v in data.draw(SETTINGS).items()}
        header = {"lora_adapter_metadata": json.dumps(config)[: data.draw(st.sampled_from([None, 9]))]}
    try:
        content = save({k: v.contiguous() for k, v in state.items()}, header)
    except Exception:  # an object or a key that no file has
        return None
    path = folder / "adapter.safetensors"
    path.write_bytes(damaged(data, content) if data.draw(st.booleans()) else content)
    beside = folder / "adapter_config.json"
    beside.unlink(missing_ok=True)
    if data.draw(st.booleans()):
        beside.write_text(json.dumps(data.draw(SETTINGS)))
    return path


@fuzz
@given(data=st.data())
def test_adapters(pipe, originals, tmp_path_factory, data):
    """Taken or refused: no raw exception, no weight changed by a refused one, and none that is not finite."""
    state = dict(data.draw(st.sampled_from(ADAPTERS)))
    for _ in range(data.draw(st.integers(0, 3))):
        mutate(data, state)
    source = state
    if data.draw(st.booleans()):
        source = written(data, state, tmp_path_factory.getbasetemp()) or state
    scale = data.draw(SCALES)
    taken = attempt(lambda: pipe.load_lora(source, scale))
    try:
        if taken:
            assert all(t.isfinite().all() for t in pipe.weights.tensors.values())
        else:
            assert same(pipe, originals)
    finally:
        pipe.unload_lora()
    assert same(pipe, originals)


@fuzz
@given(data=st.data())
def test_no_tensor_is_dropped(pipe, originals, data):
    """Of an adapter that is taken, a change of any tensor shows in the weights."""
    state = dict(data.draw(st.sampled_from(ADAPTERS)))
    for _ in range(data.draw(st.integers(0, 1))):
        mutate(data, state)
    if not attempt(lambda: pipe.load_lora(state)):
        return
    weights = {name: tensor.clone() for name, tensor in pipe.weights.tensors.items()}
    pipe.unload_lora()
    key = data.draw(st.sampled_from(sorted(state)))
    tensor = torch.as_tensor(state[key]).float()
    if not all(torch.as_tensor(t).float().abs().sum() > 0 for t in state.values()):
        return  # what is multiplied by zero does not show
    taken = attempt(lambda: pipe.load_lora(state | {key: tensor * 1.5}))
    assert not taken or not same(pipe, weights), key
    pipe.unload_lora()
    assert same(pipe, originals)


ODD = st.one_of(
    st.sampled_from([
        None, True, False, 0, 1, -1, 2**70, 1.5, math.nan, math.inf, "", "x", b"x", [], [None], (), {}, {"a": 1}, {1},
        np.int64(1), np.float32(0.5), np.zeros(2), np.array("x"), np.array(["a red fox"]), object(), "\ud800", [[]],
        torch.zeros(()), torch.zeros(1, 96, 16), torch.full((1, 96, 16), math.nan), torch.zeros(1, 4, 24, 16),
        torch.zeros(1, 96, 16, dtype=torch.float64), torch.zeros(1, 96, 16, device="meta"), torch.zeros(0),
        torch.zeros(1, 10, 32), torch.zeros(1, 24), torch.arange(96)[None], torch.zeros(1, 96, 16).to_sparse(),
        tiny.HEIGHT, tiny.WIDTH, tiny.TEXT_TOKENS, [1.0], lambda *_: None, lambda *_: 3, lambda *_: {"latents": 1},
    ]),
    st.integers(-10, 10),
    st.floats(),
    st.text(st.characters(), max_size=8),
    st.lists(st.text(max_size=4), max_size=2),
)  # fmt: skip
#: Those that may change the image; a count of images stays small.
FREE = {"guidance_scale", "latents", "prompt", "prompt_2", "prompt_embeds", "pooled_prompt_embeds",
        "callback_on_step_end", "generator", "num_images_per_prompt", "output_type", "return_dict"}  # fmt: skip
FIXED = {"height", "width", "num_inference_steps", "max_sequence_length", "sigmas", "negative_prompt",
         "negative_prompt_2", "true_cfg_scale", "negative_prompt_embeds", "ip_adapter_image", "joint_attention_kwargs",
         "callback_on_step_end_tensor_inputs", "noise", "anchors", "nonsense"}  # fmt: skip


@fuzz
@given(given_=st.dictionaries(st.sampled_from(sorted(FREE | FIXED)), ODD, max_size=3))
def test_arguments(pipe, given_):
    """Taken or refused: no raw exception, and a value that a bundle has built in never changes the image."""

    def call(**options):
        seed = torch.Generator().manual_seed(0)
        found.append(pipe(**({"prompt": "a red fox", "generator": seed, "output_type": "latent"} | options)))

    found = []
    if attempt(lambda: call(**given_)) and not FREE & given_.keys():
        call()
        assert torch.equal(found[0].images, found[1].images)
