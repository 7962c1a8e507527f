import numpy as np
import pytest
import torch

import jitexport
from jitexport.errors import InputError, ModelNotFoundError

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
        max_sequence_length=geometry.text_tokens,
        guidance_scale=pipe.defaults.guidance.scale,
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(f"{SINGLE}.lora_B.weight"), "no low-rank pair"),
        (lambda s: s.update({f"{SINGLE}.lora_A.weight": torch.zeros(2, 3, 1)}), "no low-rank pair"),
        (lambda s: s.update({f"{SINGLE}.lora_A.weight": torch.zeros(2, 3)}), "another shape"),
        (lambda s: s.update({"transformer.nothing.lora_A.weight": torch.zeros(2, 3)}), "not the model's"),
        (lambda s: s.update({"transformer.x_embedder.bias": torch.zeros(32)}), "replaces a weight"),
        (lambda s: s.clear(), "adapter is empty"),
        (lambda s: s[f"{SINGLE}.lora_A.weight"].fill_(float("nan")), "NaN or infinite"),
        (lambda s: s[f"{SINGLE}.lora_B.weight"].fill_(float("inf")), "NaN or infinite"),
        (lambda s: [s[f"{SINGLE}.lora_{ab}.weight"].fill_(1e30) for ab in "AB"], "infinite or NaN"),
        (lambda s: s.update({f"{SINGLE}.lora_A.weight": torch.zeros(2, 32).int()}), "floating-point"),
        (lambda s: s.update({f"{SINGLE}.lora_A.weight": "x"}), "no tensor"),
        (lambda s: s.update({f"{SINGLE}.lora_A.weight": np.array(["x"])}), "no tensor"),
        (lambda s: s.update({7: torch.zeros(2)}), "must be strings"),
    ],
)
def test_adapters_that_do_not_fit_change_nothing(pipe, change, message):
    first = adapter(pipe, seed=5)
    pipe.load_lora(first, scale=0.5)
    before = {name: tensor.clone() for name, tensor in pipe.weights.tensors.items()}
    state = adapter(pipe)
    change(state)
    with pytest.raises(InputError, match=message):
        pipe.load_lora(state)
    assert all(torch.equal(pipe.weights.tensors[name], value) for name, value in before.items())

    pipe.load_lora(adapter(pipe, seed=6))  # and the next one merges with the first alone
    both = pipe.weights.tensors[f"{SINGLE}.weight"].clone()
    pipe.unload_lora()
    pipe.load_lora(first, scale=0.5)
    pipe.load_lora(adapter(pipe, seed=6))
    assert torch.equal(pipe.weights.tensors[f"{SINGLE}.weight"], both)


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


def test_numpy_arrays_are_tensors(pipe):
    state = adapter(pipe)
    pipe.load_lora(state)
    expected = pipe.weights.tensors[f"{SINGLE}.weight"].clone()
    pipe.unload_lora()
    pipe.load_lora({key: value.numpy() for key, value in state.items()})
    assert torch.equal(pipe.weights.tensors[f"{SINGLE}.weight"], expected)


def test_the_callers_tensors_are_neither_changed_nor_kept(pipe):
    state = adapter(pipe)
    copies = {key: value.clone() for key, value in state.items()}
    pipe.load_lora(state)
    once = pipe.weights.tensors[f"{SINGLE}.weight"].clone()
    assert all(torch.equal(state[key], value) for key, value in copies.items())
    for value in state.values():
        value.zero_()
    pipe.load_lora(adapter(pipe, seed=3), scale=0)  # merges the first one again
    assert torch.equal(pipe.weights.tensors[f"{SINGLE}.weight"], once)


@pytest.mark.parametrize("where", ["load", "load_lora", "all"])
def test_inference_mode_around_anything(bundle, where):
    def inside(name):
        return torch.inference_mode(where in (name, "all"))

    with inside("load"):
        pipe = jitexport.load(bundle)
    before = pipe.weights.tensors[f"{SINGLE}.weight"].clone()
    for _ in range(2):
        with inside("load_lora"):
            state = adapter(pipe)
            pipe.load_lora(state)
        assert not torch.equal(pipe.weights.tensors[f"{SINGLE}.weight"], before)
        with inside("unload"):
            pipe.unload_lora()
        assert torch.equal(pipe.weights.tensors[f"{SINGLE}.weight"], before)
    assert not latents(pipe).is_inference()


def test_a_failure_in_the_middle_of_writing_is_taken_back(bundle, pipe, monkeypatch):
    pipe.load_lora(adapter(pipe, seed=1))
    before = {name: tensor.clone() for name, tensor in pipe.weights.tensors.items()}
    write, written = pipe.weights.set, []

    def fail(name, value):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(name)
        write(name, value)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipe.weights, "set", fail)
        pipe.load_lora(adapter(pipe, seed=2))
    assert len(written) == 2
    assert all(torch.equal(pipe.weights.tensors[name], value) for name, value in before.items())
    pipe.unload_lora()
    assert torch.equal(latents(pipe), latents(jitexport.load(bundle)))
