import json

import pytest
import torch
from safetensors.torch import save_file

import jitexport
from jitexport.errors import InputError, ModelNotFoundError
from jitexport.lora import read_lora

SINGLE = "transformer.single_transformer_blocks.0.attn.to_q"


def adapter(pipe, seed=0, rank=2, text=True):
    """A random PEFT state dict for a pipeline: attention and MLP of the transformer, and a layer of CLIP."""
    modules = {
        m: m
        for m in (
            SINGLE,
            "transformer.transformer_blocks.0.attn.add_k_proj",
            "transformer.transformer_blocks.0.ff.net.2",
        )
    }
    if text:  # the name in the file has a level more than transformers 5 has
        layer = "encoder.layers.0.self_attn.q_proj"
        modules[f"text_encoder.text_model.{layer}"] = f"text_encoder.{layer}"
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for module, ours in modules.items():
        out, into = pipe.weights.tensors[f"{ours}.weight"].shape
        state[f"{module}.lora_A.weight"] = torch.randn(rank, into, generator=generator) * 0.3
        state[f"{module}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.3
    return state


@pytest.fixture(scope="module")
def bundle(tiny_flux, tmp_path_factory):
    result = jitexport.build(
        str(tiny_flux),
        output=tmp_path_factory.mktemp("lora") / "bundle",
        custom=jitexport.CustomSchedule((3,), (1.0,)),
        method="dense",
        backend="eager",
        dtype="fp32",
    )
    return result.path


@pytest.fixture
def pipe(bundle):
    return jitexport.load(bundle)


def latents(pipe):
    return pipe("red apple", generator=torch.Generator().manual_seed(1), output_type="latent").images


def test_equals_diffusers_and_is_taken_out_exactly(pipe, tiny_flux):
    from diffusers import FluxPipeline

    state = adapter(pipe)
    before = latents(pipe)
    weights_before = {name: tensor.clone() for name, tensor in pipe.weights.tensors.items()}
    pipe.load_lora(state, scale=0.7)
    ours = pipe("red apple", generator=torch.Generator().manual_seed(1), output_type="pt").images

    reference = FluxPipeline.from_pretrained(tiny_flux, dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    reference.load_lora_weights(dict(state), adapter_name="test")
    reference.set_adapters(["test"], [0.7])
    geometry = pipe.geometry
    theirs = reference(
        "red apple",
        height=geometry.height,
        width=geometry.width,
        num_inference_steps=3,
        max_sequence_length=geometry.rotary.text_tokens,
        guidance_scale=pipe.defaults.guidance_scale,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
    ).images
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)
    assert (latents(pipe) - before).abs().max() > 1e-3  # it does something

    pipe.unload_lora()
    assert torch.equal(latents(pipe), before)
    assert all(torch.equal(pipe.weights.tensors[name], value) for name, value in weights_before.items())


def test_adapters_add_up(pipe):
    first, second = adapter(pipe, 1), adapter(pipe, 2)
    name = f"{SINGLE}.weight"
    before = pipe.weights.tensors[name].clone()
    pipe.load_lora(first)
    pipe.load_lora(second, scale=-0.5)
    expected = before.clone()
    for state, scale in ((first, 1.0), (second, -0.5)):
        expected += scale * state[f"{SINGLE}.lora_B.weight"] @ state[f"{SINGLE}.lora_A.weight"]
    torch.testing.assert_close(pipe.weights.tensors[name], expected)
    pipe.unload_lora()
    assert torch.equal(pipe.weights.tensors[name], before)


def test_file_with_alpha_and_peft_metadata(pipe, tmp_path):
    state = adapter(pipe, text=False)
    rank = state[f"{SINGLE}.lora_A.weight"].shape[0]
    plain = read_lora(state)[f"{SINGLE}.weight"]
    assert plain.factor == 1

    with_alpha = read_lora(state | {f"{SINGLE}.alpha": torch.tensor(6.0)})[f"{SINGLE}.weight"]
    assert with_alpha.factor == 6 / rank

    config = {"transformer.r": rank, "transformer.lora_alpha": 8, "transformer.alpha_pattern": {"ff.net.2": 4}}
    save_file(state, tmp_path / "adapter.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    for source in (tmp_path / "adapter.safetensors", tmp_path):
        changes = read_lora(source)
        assert changes[f"{SINGLE}.weight"].factor == 8 / rank
        assert changes["transformer.transformer_blocks.0.ff.net.2.weight"].factor == 4 / rank


def test_kohya_format_is_converted(pipe):
    down, up = torch.randn(2, 8), torch.randn(8, 2)
    stem = "lora_unet_double_blocks_0_img_attn_proj"
    state = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(2.0)}
    (name,) = changes = read_lora(state)
    assert name == "transformer.transformer_blocks.0.attn.to_out.0.weight"
    torch.testing.assert_close(changes[name].delta(1.0, torch.device("cpu")), up @ down)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(f"{SINGLE}.lora_B.weight"), "no low-rank pair"),
        (lambda s: s.update({f"{SINGLE}.lora_A.weight": torch.zeros(2, 3, 1)}), "no low-rank pair"),
        (lambda s: s.update({f"{SINGLE}.lora_A.weight": torch.zeros(2, 3)}), "another shape"),
        (lambda s: s.update({"transformer.nothing.lora_A.weight": torch.zeros(2, 3)}), "no low-rank pair"),
        (lambda s: s.update({"transformer.x_embedder.bias": torch.zeros(3)}), "more than low-rank"),
        (lambda s: s.clear(), "adapter"),
    ],
)
def test_adapters_that_do_not_fit_change_nothing(pipe, change, message):
    before = latents(pipe)
    state = adapter(pipe)
    change(state)
    with pytest.raises(InputError, match=message):
        pipe.load_lora(state)
    assert torch.equal(latents(pipe), before)


def test_unreadable_files(pipe, tmp_path):
    with pytest.raises(ModelNotFoundError, match="cannot read"):
        pipe.load_lora(tmp_path / "absent.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelNotFoundError, match="cannot read"):
        pipe.load_lora(tmp_path / "broken.safetensors")


def test_not_from_a_callback(pipe):
    def callback(pipeline, step, timestep, tensors):
        pipeline.load_lora(adapter(pipeline))

    with pytest.raises(InputError, match="during a call"):
        pipe("red apple", callback_on_step_end=callback)


def test_checkpoint_of_the_same_architecture(pipe, tiny_flux, tmp_path):
    from diffusers import FluxPipeline

    tuned = FluxPipeline.from_pretrained(tiny_flux, dtype=torch.float32)
    with torch.no_grad():
        for parameter in tuned.transformer.parameters():
            parameter.mul_(1.01)
    tuned.save_pretrained(tmp_path / "tuned")
    before = latents(pipe)
    pipe.load_lora(adapter(pipe))
    pipe.load_checkpoint(tmp_path / "tuned")
    assert torch.equal(
        pipe.weights.tensors[f"{SINGLE}.weight"], tuned.transformer.state_dict()[f"{SINGLE[12:]}.weight"]
    )
    assert not torch.equal(latents(pipe), before)
    pipe.load_checkpoint(tiny_flux)
    assert torch.equal(latents(pipe), before)
