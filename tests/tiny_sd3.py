"""Stable Diffusion 3 pipelines small enough for tests, in diffusers' own format."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from tests.tiny import CLIP_TOKENS, HEIGHT, TEXT_TOKENS, WIDTH, WORDS, autoencoder, randomise, save, tokenizer

#: Places in a row and a column of the position tables, and coordinates from one side to the other.
TABLE, BASE = 18, 8


def sd3(*, medium35: bool) -> StableDiffusion3Pipeline:
    """With random weights, the same at every call: what SD3.5-medium has, or SD3 without its T5."""
    ids = {"vocab_size": len(WORDS) + 4, "pad_token_id": 0, "bos_token_id": 2}

    def clip(width: int, end: int) -> CLIPTextModelWithProjection:
        config = CLIPTextConfig(
            **ids, eos_token_id=end, hidden_size=width, intermediate_size=16, projection_dim=width + 2,
            num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=CLIP_TOKENS,
        )
        return CLIPTextModelWithProjection(config)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel(
            sample_size=2 * BASE,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=24,
            pos_embed_max_size=TABLE,
            dual_attention_layers=(0,) if medium35 else (),
            qk_norm="rms_norm" if medium35 else None,
        )
        vae = autoencoder()
        encoders = [clip(8, 2), clip(12, 1)]
        if medium35:
            shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
            encoders.append(T5EncoderModel(T5Config(**ids, eos_token_id=1, **shape, feed_forward_proj="gated-gelu")))
    generator = torch.Generator().manual_seed(1)
    for module in (transformer, vae, *encoders):
        randomise(module.eval(), generator)
    padded_with_its_end = tokenizer("<bos> $A <eos>", CLIP_TOKENS)
    padded_with_its_end.pad_token = "<eos>"
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=padded_with_its_end,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer("<bos> $A <eos>", CLIP_TOKENS),
        text_encoder_3=encoders[2] if medium35 else None,
        tokenizer_3=tokenizer("$A <eos>", TEXT_TOKENS) if medium35 else None,
        transformer=transformer,
    )


def save_sd3(folder: Path, *, medium35: bool) -> Path:
    return save(sd3(medium35=medium35), folder, height=HEIGHT, width=WIDTH, max_sequence_length=TEXT_TOKENS)
