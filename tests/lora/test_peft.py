"""Adapters that PEFT made and saved, against the weights that PEFT merges."""

import peft
import pytest
import torch
from diffusers import FluxTransformer2DModel

import jitexport
from jitexport.plan import CustomSchedule
from jitexport.quant import quantize

TARGETS = ["to_q", "proj_mlp", "ff.net.2", "add_k_proj"]
CONFIGS = {
    "lora": peft.LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS),
    "lora, patterns": peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS, rank_pattern={r"transformer_blocks\.0\..*to_q": 2},
        alpha_pattern={"proj_mlp": 3, "to_q": 5}, use_rslora=True,
    ),
    "lora with biases": peft.LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS, lora_bias=True),
    "dora": peft.LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS, use_dora=True),
    "lokr": peft.LoKrConfig(r=2, alpha=6, target_modules=TARGETS, decompose_both=True),
    "lokr, whole": peft.LoKrConfig(r=64, alpha=32, target_modules=TARGETS),
    "loha": peft.LoHaConfig(r=2, alpha=6, target_modules=TARGETS),
}  # fmt: skip


def saved(config, model, folder):
    """Randomise an adapter, save it, and return all weights that PEFT merges."""
    wrapped = peft.get_peft_model(FluxTransformer2DModel.from_pretrained(model / "transformer"), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if any(part in name for part in ("lora_", "lokr_", "hada_")):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    wrapped.save_pretrained(folder)
    return {f"transformer.{k}": v for k, v in wrapped.merge_and_unload().state_dict().items()}


def dense(make_bundle, **options):
    return jitexport.load(make_bundle(method="dense", custom=CustomSchedule((3,), (1.0,)), **options))


@pytest.fixture(scope="module")
def pipe(make_bundle):
    return dense(make_bundle)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_weights_are_those_that_peft_merges(pipe, tiny_flux, tmp_path, kind):
    pipe.unload_lora()
    before = {name: tensor.clone() for name, tensor in pipe.weights.tensors.items()}
    merged = saved(CONFIGS[kind], tiny_flux, tmp_path)
    pipe.load_lora(tmp_path)
    changed = 0
    for name, expected in merged.items():
        torch.testing.assert_close(pipe.weights.tensors[name], expected, atol=2e-5, rtol=1e-4)
        changed += not torch.equal(expected, before[name])
    assert changed == (14 if kind == "lora with biases" else 7)  # layers of a double and of two single blocks
    pipe.unload_lora()
    assert all(torch.equal(pipe.weights.tensors[name], value) for name, value in before.items())


def test_dora_of_quantized_weights_has_the_norm_of_what_they_stand_for(make_bundle, tiny_flux, tmp_path):
    """Merged from the dequantized weights, and quantized once."""
    pipe = dense(make_bundle, quantization="int8")
    saved(CONFIGS["dora"], tiny_flux, tmp_path)
    name = "transformer.single_transformer_blocks.1.attn.to_q.weight"
    weights = pipe.weights.tensors
    base = weights[name].float() * weights[f"{name}_scale"][:, None]
    pipe.load_lora(tmp_path, scale=0.5)

    from safetensors.torch import load_file

    state = load_file(tmp_path / "adapter_model.safetensors")
    stem = "base_model.model.single_transformer_blocks.1.attn.to_q.lora_"
    merged = base + 0.5 * 4 * state[f"{stem}B.weight"] @ state[f"{stem}A.weight"]
    expected = state[f"{stem}magnitude_vector"][:, None] * merged / merged.norm(dim=1, keepdim=True)
    rows, scales = quantize(expected, "int8")
    torch.testing.assert_close(weights[f"{name}_scale"], scales[:, 0])
    assert (weights[name].int() - rows.int()).abs().max() <= 1


def test_two_decomposed_adapters_add_what_each_does_alone(pipe, tiny_flux, tmp_path):
    """As PEFT runs several active ones: each from the weight without adapters."""
    name = "transformer.single_transformer_blocks.1.attn.to_q.weight"
    before = pipe.weights.tensors[name].clone()
    saved(CONFIGS["dora"], tiny_flux, tmp_path / "a")
    saved(CONFIGS["lora"], tiny_flux, tmp_path / "b")
    alone = []
    for folder in ("a", "b"):
        pipe.load_lora(tmp_path / folder)
        alone.append(pipe.weights.tensors[name] - before)
        pipe.unload_lora()
    pipe.load_lora(tmp_path / "a")
    pipe.load_lora(tmp_path / "b")
    torch.testing.assert_close(pipe.weights.tensors[name], before + alone[0] + alone[1], atol=1e-5, rtol=1e-5)
    pipe.unload_lora()


def test_images_with_dora_are_those_of_diffusers(pipe, tiny_flux, tmp_path):
    """Through diffusers' own file format and loader, at a strength of its own."""
    from diffusers import FluxPipeline

    transformer = FluxTransformer2DModel.from_pretrained(tiny_flux / "transformer")
    transformer.add_adapter(CONFIGS["dora"])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    FluxPipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=peft.get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )
    theirs = FluxPipeline.from_pretrained(tiny_flux)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_lora_weights(tmp_path, adapter_name="x")
    theirs.set_adapters(["x"], [0.6])
    pipe.load_lora(tmp_path, scale=0.6)
    geometry = pipe.geometry
    options = {
        "height": geometry.height, "width": geometry.width, "num_inference_steps": 3, "output_type": "pt",
        "max_sequence_length": geometry.text_tokens, "guidance_scale": 3.5,
    }  # fmt: skip
    expected = theirs("red apple", generator=torch.Generator().manual_seed(1), **options).images
    found = pipe("red apple", generator=torch.Generator().manual_seed(1), **options).images
    pipe.unload_lora()
    plain = pipe("red apple", generator=torch.Generator().manual_seed(1), **options).images
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    assert (found - plain).abs().max() > 1e-2
