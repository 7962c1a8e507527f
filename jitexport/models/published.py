"""Models whose configurations are known without a download: those that their authors published, by family.

A family's class names its own in `ModelAdapter.published`; here are those of the families that jitexport brings, and
the configurations of components that several of them share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: A component's configuration, or that of the pipeline itself, by name.
Configs = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Published:
    """A model whose configuration is known without a download.

    Attributes:
        hub_id: where its weights are.
        configs, settings: see `ModelAdapter.from_configs`.
    """

    hub_id: str
    configs: Configs
    settings: Mapping[str, Any] = field(default_factory=dict)


# --- components of several families -----------------------------------------------------------------------------------

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


# --- FLUX.1 -----------------------------------------------------------------------------------------------------------


def _flux(
    hub_id: str, transformer: dict[str, Any], scheduler: dict[str, Any], settings: dict[str, Any]
) -> Published:
    configs: dict[str, dict[str, Any]] = {
        "transformer": {
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "axes_dims_rope": [16, 56, 56],
        }
        | transformer,
        "vae": AUTOENCODER_16 | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
        "text_encoder": clip(768, 12, 12),
        "text_encoder_2": T5_XXL,
        "scheduler": {
            "num_train_timesteps": 1000,
            "base_image_seq_len": 256,
            "max_image_seq_len": 4096,
            "base_shift": 0.5,
            "max_shift": 1.15,
        }
        | scheduler,
    }
    return Published(hub_id, configs, {"height": 1024, "width": 1024} | settings)


#: FLUX.1-dev, and FLUX.1-schnell: 4 steps, no guidance embedding.
FLUX = {
    "flux": _flux(
        "black-forest-labs/FLUX.1-dev", {"guidance_embeds": True}, {"shift": 3.0, "use_dynamic_shifting": True},
        {"max_sequence_length": 512, "guidance_scale": 3.5, "num_inference_steps": 50},
    ),
    "flux-schnell": _flux(
        "black-forest-labs/FLUX.1-schnell", {"guidance_embeds": False}, {"shift": 1.0, "use_dynamic_shifting": False},
        {"max_sequence_length": 256, "guidance_scale": 0.0, "num_inference_steps": 4},
    ),
}


# --- FLUX.2-klein -----------------------------------------------------------------------------------------------------

#: Of the transformer double blocks, single blocks and heads; of the language model width, inner width, and whether its
#: head is its embedding.
_SIZES = {"4b": (5, 20, 24, 2560, 9728, True), "9b": (8, 24, 32, 4096, 12288, False)}


def _klein(size: str, hub_id: str, *, distilled: bool) -> Published:
    doubles, singles, heads, hidden, inner, tied = _SIZES[size]
    configs: dict[str, dict[str, Any]] = {
        "pipeline": {"is_distilled": distilled},
        "transformer": {
            "patch_size": 1,
            "in_channels": 128,
            "num_layers": doubles,
            "num_single_layers": singles,
            "attention_head_dim": 128,
            "num_attention_heads": heads,
            "joint_attention_dim": 3 * hidden,
            "mlp_ratio": 3.0,
            "axes_dims_rope": [32, 32, 32, 32],
            "rope_theta": 2000,
            "timestep_guidance_channels": 256,
            "guidance_embeds": False,
        },
        "vae": AUTOENCODER | {"latent_channels": 32, "batch_norm_eps": 1e-4},
        # Qwen3-4B and Qwen3-8B.
        "text_encoder": {
            "vocab_size": 151936,
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "tie_word_embeddings": tied,
        },
        "scheduler": {"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True},
    }
    return Published(hub_id, configs)


#: The base models, and those that are distilled to four steps without guidance.
FLUX2_KLEIN = {
    "flux2-klein-4b": _klein("4b", "black-forest-labs/FLUX.2-klein-base-4B", distilled=False),
    "flux2-klein-9b": _klein("9b", "black-forest-labs/FLUX.2-klein-base-9B", distilled=False),
    "flux2-klein-4b-distilled": _klein("4b", "black-forest-labs/FLUX.2-klein-4B", distilled=True),
    "flux2-klein-9b-distilled": _klein("9b", "black-forest-labs/FLUX.2-klein-9B", distilled=True),
}


# --- Qwen-Image -------------------------------------------------------------------------------------------------------

QWEN_IMAGE_CONFIGS: dict[str, dict[str, Any]] = {
    "transformer": {
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 60,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 3584,
        "guidance_embeds": False,
        "axes_dims_rope": [16, 56, 56],
    },
    "vae": {
        "base_dim": 96,
        "z_dim": 16,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_scales": [],
        "temperal_downsample": [False, True, True],
        "latents_mean": [
            -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
        ],
        "latents_std": [
            2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
            3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
        ],
    },
    "text_encoder": {
        "text_config": QWEN2_5_VL_7B | {"max_position_embeddings": 128000},
        "vision_config": {"hidden_size": 1280, "out_hidden_size": 3584},
    },
    "scheduler": {
        "num_train_timesteps": 1000,
        "use_dynamic_shifting": True,
        "base_image_seq_len": 256,
        "max_image_seq_len": 8192,
        "base_shift": 0.5,
        "max_shift": 0.9,
        "shift_terminal": 0.02,
    },
}  # fmt: skip

QWEN_IMAGE = {
    "qwen-image": Published("Qwen/Qwen-Image", QWEN_IMAGE_CONFIGS),
    "qwen-image-2512": Published("Qwen/Qwen-Image-2512", QWEN_IMAGE_CONFIGS),
}


# --- Stable Diffusion 3 -----------------------------------------------------------------------------------------------


def _sd3(hub_id: str, blocks: int, heads: int, transformer: dict[str, Any], **settings: Any) -> Published:
    configs: dict[str, dict[str, Any]] = {
        "transformer": {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": blocks,
            "attention_head_dim": 64,
            "num_attention_heads": heads,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 64 * heads,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
            "dual_attention_layers": [],
            "qk_norm": "rms_norm",
        }
        | transformer,
        "vae": AUTOENCODER_16 | {"scaling_factor": 1.5305, "shift_factor": 0.0609},
        "text_encoder": clip(768, 12, 12, hidden_act="quick_gelu", eos_token_id=2),
        "text_encoder_2": clip(1280, 32, 20, hidden_act="gelu", eos_token_id=2),
        "text_encoder_3": T5_XXL,
        "scheduler": {"num_train_timesteps": 1000, "shift": 3.0},
    }
    return Published(hub_id, configs, settings)


SD3 = {
    "sd3": _sd3("stabilityai/stable-diffusion-3-medium-diffusers", 24, 24, {"qk_norm": None}),
    "sd3.5-medium": _sd3(
        "stabilityai/stable-diffusion-3.5-medium", 24, 24,
        {"pos_embed_max_size": 384, "dual_attention_layers": list(range(13))},
    ),
    "sd3.5-large": _sd3("stabilityai/stable-diffusion-3.5-large", 38, 38, {}),
    "sd3.5-large-turbo": _sd3(
        "stabilityai/stable-diffusion-3.5-large-turbo", 38, 38, {}, guidance_scale=0.0, num_inference_steps=4
    ),
}


# --- HunyuanVideo-1.5 -------------------------------------------------------------------------------------------------

#: Height and width that the ordinary pipeline has for each of a transformer's target sizes, at 16:9.
HUNYUAN_SIZES = {640: (480, 848), 960: (720, 1280)}


def _hunyuan(hub_id: str, target_size: int, shift: float) -> Published:
    height, width = HUNYUAN_SIZES[target_size]
    configs: dict[str, dict[str, Any]] = {
        "transformer": {
            "in_channels": 65,
            "out_channels": 32,
            "num_attention_heads": 16,
            "attention_head_dim": 128,
            "num_layers": 54,
            "num_refiner_layers": 2,
            "mlp_ratio": 4.0,
            "patch_size": 1,
            "patch_size_t": 1,
            "qk_norm": "rms_norm",
            "text_embed_dim": 3584,
            "text_embed_2_dim": 1472,
            "image_embed_dim": 1152,
            "rope_theta": 256.0,
            "rope_axes_dim": [16, 56, 56],
            "use_meanflow": False,
            "target_size": target_size,
            "task_type": "t2v",
        },
        "vae": {
            "latent_channels": 32,
            "block_out_channels": [128, 256, 512, 1024, 1024],
            "layers_per_block": 2,
            "spatial_compression_ratio": 16,
            "temporal_compression_ratio": 4,
            "scaling_factor": 1.03682,
        },
        "text_encoder": QWEN2_5_VL_7B,
        "text_encoder_2": {  # ByT5-small with Glyph-SDXL-v2's colours and fonts
            "vocab_size": 1510,
            "d_model": 1472,
            "d_kv": 64,
            "d_ff": 3584,
            "num_layers": 12,
            "num_heads": 6,
            "feed_forward_proj": "gated-gelu",
        },
        "scheduler": {"num_train_timesteps": 1000, "shift": shift},
        "guider": {"guidance_scale": 6.0},
    }
    return Published(hub_id, configs, {"height": height, "width": width})


HUNYUAN_VIDEO15 = {
    "hunyuan-video-1.5": _hunyuan("hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v", 640, 5.0),
    "hunyuan-video-1.5-720p": _hunyuan("hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v", 960, 9.0),
}
