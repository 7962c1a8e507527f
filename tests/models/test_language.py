import copy

import pytest
import torch
from torch import nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from jitexport.errors import UnsupportedModelError
from jitexport.models.language import LanguageText, decoder_of, hidden_states, keep_what_is_read
from jitexport.regions import outline
from tests.tiny import randomise

VOCABULARY = 50
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}
MROPE = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [1, 1, 2]}
VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
    "fullatt_block_indexes": [0],
}
TOKENS = {"image_token_id": 45, "video_token_id": 46, "vision_start_token_id": 47, "vision_end_token_id": 48}


def qwen25_vl(**changes) -> nn.Module:
    text = TEXT | {"rope_parameters": MROPE} | changes
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=VISION, **TOKENS))


def qwen25_vl_text(**changes) -> nn.Module:
    return Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**TEXT | {"rope_parameters": MROPE} | changes))


def qwen3(**changes) -> nn.Module:
    """Heads that are wider together than the states, as the real ones of 4 billion parameters."""
    return Qwen3ForCausalLM(Qwen3Config(**TEXT | {"head_dim": 12, "tie_word_embeddings": True} | changes))


def qwen3_untied(**changes) -> nn.Module:
    """As the real ones of 8 billion parameters; here with biases too."""
    return qwen3(tie_word_embeddings=False, attention_bias=True, head_dim=8, **changes)


def qwen3_inner(**changes) -> nn.Module:
    return Qwen3Model(Qwen3Config(**TEXT | {"head_dim": 8} | changes))


#: A model's maker, and the states that an image model reads of it (of four layers here).
MODELS = {
    "qwen-image": (qwen25_vl, (-1,)),
    "hunyuan": (qwen25_vl_text, (-3,)),
    "klein-4b": (qwen3, (1, 2, 3)),
    "klein-9b": (qwen3_untied, (1, 2, 3)),
    "klein-inner": (qwen3_inner, (1, 2, 3)),
}


def made(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name][0]()
    randomise(model, torch.Generator().manual_seed(1))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=MODELS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return made(name)


def prompts(lengths, total, side="right"):
    """Random ids [B, total] and the mask, rows of these lengths padded with 0."""
    generator = torch.Generator().manual_seed(total)
    ids = torch.randint(3, 45, (len(lengths), total), generator=generator)
    places = torch.arange(total) if side == "right" else torch.arange(total).flip(0)
    mask = (places < torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


@torch.no_grad()
def theirs(model, ids, mask):
    return model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states


def assert_same(found, expected, where):
    torch.testing.assert_close(found[where], expected[where], atol=1e-5, rtol=1e-5)


# --- parity with transformers ---


@pytest.mark.parametrize(
    "lengths, total", [([5], 5), ([1], 1), ([7], 12), ([1], 9), ([9, 4], 9), ([3, 11], 16), ([6, 6], 8)]
)
def test_all_states(model, lengths, total):
    """Every state, the last one after the final norm, at tokens and at padding behind them."""
    ids, mask = prompts(lengths, total)
    expected = theirs(model, ids, mask)
    found = hidden_states(model, ids, mask, range(5))
    assert len(found) == len(expected) == 5
    for ours, states in zip(found, expected, strict=True):
        assert ours.shape == (len(lengths), total, 32)
        assert_same(ours, states, slice(None))


def test_padding_in_front(model):
    """States of tokens are the same; those of padding are finite."""
    ids, mask = prompts([3, 7], 7, side="left")
    (found,), expected = hidden_states(model, ids, mask, [-1]), theirs(model, ids, mask)
    assert found.isfinite().all()
    assert_same(found, expected[-1], mask.bool())


def test_a_prompt_of_nothing_is_finite(model):
    ids, mask = prompts([0, 4], 6)
    (found,) = hidden_states(model, ids, mask, [-1])
    assert found.isfinite().all()
    assert_same(found[1], theirs(model, ids, mask)[-1][1], slice(None))


def test_length_does_not_matter(model):
    """A fixed length gives what transformers gives without padding, as pipelines call it."""
    ids, mask = prompts([6], 16)
    (found,) = hidden_states(model, ids, mask, [-1])
    assert_same(found[:, :6], theirs(model, ids[:, :6], mask[:, :6])[-1], slice(None))


def test_bf16(name):
    """Norms and rotation are rounded less often than transformers': 2% of the whole."""
    model = made(name).bfloat16()
    ids, mask = prompts([9, 5], 12)
    for found, expected in zip(hidden_states(model, ids, mask, range(5)), theirs(model, ids, mask), strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.float() - expected.float()).norm() <= 0.02 * expected.float().norm()


def test_order_of_states(model):
    ids, mask = prompts([5], 6)
    last, first = hidden_states(model, ids, mask, (-1, 1))
    assert_same(last, theirs(model, ids, mask)[-1], slice(None))
    assert_same(first, theirs(model, ids, mask)[1], slice(None))


# --- what a bundle holds ---


def test_kept_parts_give_the_same(name, model):
    """Under the same names, and nothing is held that is not read."""
    _, states = MODELS[name]
    ids, mask = prompts([9, 4], 12)
    expected = hidden_states(model, ids, mask, states)
    names = dict(model.named_parameters())
    small = keep_what_is_read(made(name), states)
    for found, wanted in zip(hidden_states(small, ids, mask, states), expected, strict=True):
        assert torch.equal(found, wanted)
    assert {n: p.shape for n, p in small.named_parameters()}.items() <= {n: p.shape for n, p in names.items()}.items()
    for parameter in small.parameters():
        parameter.requires_grad_(True)
    sum(state.square().sum() for state in hidden_states(small, ids, mask, states)).backward()
    assert not [n for n, p in small.named_parameters() if p.grad is None]
    assert not dict(small.named_buffers())
    before = [n for n, _ in small.named_parameters()]
    assert [n for n, _ in keep_what_is_read(small, states).named_parameters()] == before


def test_kept_layers(name):
    """States before the last need neither later layers nor the final norm."""
    model = keep_what_is_read(made(name), (2, 1))
    decoder = decoder_of(model)
    assert len(decoder.layers) == 2 and decoder.norm is None
    ids, mask = prompts([5], 6)
    for state in (3, -1):
        with pytest.raises(UnsupportedModelError, match="2 layers"):
            hidden_states(model, ids, mask, [state])


# --- export ---


class Text(LanguageText):
    def __init__(self, text_encoder, numbers):
        super().__init__(text_encoder)
        self.numbers = numbers

    def forward(self, ids, mask):
        return torch.cat(self.states(ids, mask, self.numbers), dim=-1)


@pytest.mark.parametrize("name", ["qwen-image", "klein-4b"], indirect=True)
def test_export(name, model):
    """One graph for all ids and masks of a shape; its parameters are the model's under the model's names."""
    _, states = MODELS[name]
    module = Text(model, states)
    program = torch.export.export(module, prompts([9, 9], 9))
    other = prompts([4, 7], 9)
    expected = torch.cat([theirs(model, *other)[k] for k in states], dim=-1)
    assert_same(program.module()(*other), expected, slice(None))
    own = {f"text_encoder.{n}": p for n, p in model.named_parameters(remove_duplicate=False)}
    for full, parameter in program.named_parameters():
        assert parameter.data_ptr() == own[full].data_ptr()


@pytest.mark.parametrize("name", ["qwen-image", "klein-4b"], indirect=True)
def test_layers_are_one_region(name):
    _, states = MODELS[name]
    model = keep_what_is_read(made(name), states)
    made_of = outline(Text(model, states), prompts([4, 7], 9))
    assert len(made_of.program.regions) == 1 and made_of.program.calls == len(decoder_of(model).layers)


# --- published sizes ---


def layer_size(width, heads, shared, channels, inner, extra):
    """Numbers in a layer: projections, SwiGLU, two norms, and biases or norms of heads."""
    return width * channels * 2 * (heads + shared) + 3 * width * inner + 2 * width + extra


#: As on the hub: the text part flat, rotary settings by their old name.
QWEN25_VL_7B = {
    "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "hidden_act": "silu", "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 28, "tie_word_embeddings": False,
}
QWEN3_4B = {
    "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960, "rope_theta": 1000000, "rope_scaling": None, "use_sliding_window": False,
    "sliding_window": None, "max_window_layers": 36, "attention_bias": False, "tie_word_embeddings": True,
}
QWEN25_LAYER = layer_size(3584, 28, 4, 128, 18944, extra=(28 + 4 + 4) * 128)
QWEN3_LAYER = layer_size(2560, 32, 8, 128, 9728, extra=2 * 128)


@pytest.mark.parametrize(
    "made_of, states, expected",
    [
        (
            lambda: Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**QWEN25_VL_7B)), (-1,),
            152064 * 3584 + 28 * QWEN25_LAYER + 3584,
        ),
        (lambda: Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**QWEN25_VL_7B)), (-3,), 152064 * 3584 + 26 * QWEN25_LAYER),
        (lambda: Qwen3ForCausalLM(Qwen3Config(**QWEN3_4B)), (9, 18, 27), 151936 * 2560 + 27 * QWEN3_LAYER),
    ],
    ids=["qwen-image", "hunyuan", "klein-4b"],
)
def test_published_models(made_of, states, expected):
    """Without weights: what is kept, and shapes of states."""
    with torch.device("meta"):
        model = keep_what_is_read(made_of(), states)
    assert sum(p.numel() for p in model.parameters()) == expected
    ids = torch.zeros(1, 6, dtype=torch.int64, device="meta")
    found = hidden_states(model, ids, ids, states)
    assert [tuple(s.shape) for s in found] == [(1, 6, decoder_of(model).config.hidden_size)] * len(states)


# --- refusals ---


def test_other_models_are_refused():
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 4}
    with pytest.raises(UnsupportedModelError, match="T5EncoderModel"):
        decoder_of(T5EncoderModel(T5Config(vocab_size=8, **sizes)))


@pytest.mark.parametrize(
    "key, value, found",
    [
        ("hidden_act", "gelu", "gelu"),
        ("layer_types", ["full_attention"] * 3 + ["sliding_attention"], "sliding_attention"),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}, "linear"),
    ],
)
def test_other_layers_are_refused(model, key, value, found):
    other = copy.copy(decoder_of(model))
    other.config = copy.deepcopy(other.config)
    setattr(other.config, key, value)
    with pytest.raises(UnsupportedModelError, match=found):
        decoder_of(other)


def test_too_few_layers_are_refused(model):
    for state in (5, -6):
        with pytest.raises(UnsupportedModelError, match=f"states {state}"):
            keep_what_is_read(model, [1, state])
