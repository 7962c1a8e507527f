"""A FLUX pipeline small enough for tests, in diffusers' own format."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

HEIGHT, WIDTH = 48, 32
GRID = (12, 8)
TEXT_TOKENS = 10
CLIP_TOKENS = 8
WORDS = [
    "a",
    "the",
    "red",
    "green",
    "blue",
    "fox",
    "dog",
    "house",
    "tree",
    "in",
    "on",
    "under",
    "near",
    "snow",
    "river",
]


def tokenizer(template: str, length: int) -> PreTrainedTokenizerFast:
    special = {"<pad>": 0, "<eos>": 1, "<bos>": 2}
    vocabulary = special | {word: i for i, word in enumerate([*WORDS, "<unk>"], start=len(special))}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(t, i) for t, i in special.items() if t in template]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        model_max_length=length,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
    )


def randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Move every parameter off its default, so that norms and biases that are mixed up show in the output."""
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.3 if parameter.dim() == 1 else 0.05
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def autoencoder() -> AutoencoderKL:
    """With random weights; 4 channels of latents, half the sides of pictures."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.4,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def flux(*, guidance: bool, channels: int = 16) -> FluxPipeline:
    """The pipeline with random weights, the same at every call; `channels` of a head."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=channels,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=24,
            guidance_embeds=guidance,
            axes_dims_rope=(channels // 4, channels * 3 // 8, channels * 3 // 8),
        )
        vae = autoencoder()
        ids = {"vocab_size": len(WORDS) + 4, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
        clip = CLIPTextModel(
            CLIPTextConfig(
                **ids,
                hidden_size=24,
                intermediate_size=32,
                projection_dim=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=CLIP_TOKENS,
            )
        )
        t5 = T5EncoderModel(
            T5Config(**ids, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu")
        )
    generator = torch.Generator().manual_seed(1)
    for module in (transformer, vae, clip, t5):
        randomise(module.eval(), generator)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0, use_dynamic_shifting=not guidance),
        vae=vae,
        text_encoder=clip,
        tokenizer=tokenizer("<bos> $A <eos>", CLIP_TOKENS),
        text_encoder_2=t5,
        tokenizer_2=tokenizer("$A <eos>", TEXT_TOKENS),
        transformer=transformer,
    )


def save(pipe: DiffusionPipeline, folder: Path, **settings: int) -> Path:
    """A pipeline's folder, with settings of ours."""
    pipe.save_pretrained(folder)
    (folder / "jitexport.json").write_text(json.dumps(settings))
    return folder


def save_flux(folder: Path, *, guidance: bool, channels: int = 16) -> Path:
    steps = {} if guidance else {"num_inference_steps": 4}
    sizes = {"height": HEIGHT, "width": WIDTH, "max_sequence_length": TEXT_TOKENS}
    return save(flux(guidance=guidance, channels=channels), folder, **sizes, **steps)
