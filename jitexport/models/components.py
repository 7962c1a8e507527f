"""Configurations of components that published models of several families share."""

from __future__ import annotations

from typing import Any

#: The autoencoders of FLUX.1, FLUX.2 and Stable Diffusion 3, but for their latents.
AUTOENCODER: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
}

#: The same with 16 channels of latents, scaled and shifted.
AUTOENCODER_16 = AUTOENCODER | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}

#: T5 v1.1 XXL.
T5_XXL: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}

#: The language model of Qwen2.5-VL-7B-Instruct.
QWEN2_5_VL_7B: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}


def clip(width: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    """A CLIP text encoder of so many channels, layers and heads."""
    return {
        "vocab_size": 49408,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "projection_dim": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 77,
    } | others
