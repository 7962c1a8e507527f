"""HunyuanVideo-1.5: text to video, in diffusers' format.

The modules below run diffusers' own weights under their own names, arranged for fixed-shape engines:

- modulation depends on the noise level alone: it is a constant of a bundle, made by `modulation`, and the 2.7 of 8.3
  billion parameters that make it are in no engine;
- the text's refiner sees the noise level: `HunyuanCondition` gives a context for every step, and its first attention,
  which comes before the noise level, runs once for all of them;
- the text has one fixed length, glyphs first; padding is masked where it is a key, and its own rows are never read, so
  that its order does not matter and the two-sided masks of diffusers are not needed;
- the parts of the transformer that see a picture (latents of a frame to begin with, SigLIP's states) are left out;
- the autoencoder's frame-causal attention runs frame by frame, each on the frames up to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jitexport.errors import InputError, UnsupportedModelError
from jitexport.grid import TokenGrid, unpack
from jitexport.guidance import Guidance
from jitexport.kernels.attention import Stream, attention
from jitexport.models.base import (
    Configs,
    ModelAdapter,
    ModelDefaults,
    ModelGeometry,
    Published,
    TiledDecoder,
    image_grid,
)
from jitexport.models.components import QWEN2_5_VL_7B
from jitexport.models.language import LanguageText, keep_what_is_read
from jitexport.models.layers import (
    TransformerPart,
    image_side,
    joint_block,
    last_layer,
    modulated,
    text_side,
    time_embedding,
)
from jitexport.models.naming import ADDED, FUSED, QKV, TRANSFORMER, Aliases, Naming, Prefix, Target
from jitexport.models.schedulers import flow_sigmas
from jitexport.models.stages import Evaluation, TransformerStage, in_turn
from jitexport.models.tokens import Cell, Memo, joint_cells
from jitexport.positions import Rotary
from jitexport.prompting import Tokenizer
from jitexport.specs import EngineSpec, TensorSpec
from jitexport.tiling import Tiling

#: The language model is asked to describe a video. Its lines are continued with eight blanks, as the model was trained.
SYSTEM = (" " * 8).join((
    "You are a helpful assistant. Describe the video by detailing the following aspects: ",
    "1. The main content and theme of the video. ",
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects. ",
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects. ",
    "4. background environment, light, style and atmosphere. ",
    "5. camera angles, movements, and transitions used in the video.",
))
TEMPLATE = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{{}}<|im_end|>\n<|im_start|>assistant\n"

#: Tokens of the template in front of the prompt, whose states are dropped; and the language model's state that is read.
DROPPED = 108
STATE = -3

#: Height and width that the ordinary pipeline has for each of a transformer's target sizes, at 16:9.
SIZES = {640: (480, 848), 960: (720, 1280)}

#: What masks add to the scores of padding: small enough for none to be left, and finite.
HIDDEN = -1e30


# --- text ---


def additive(mask: Tensor) -> Tensor:
    """What is added to scores, fp32, for 1 at tokens and 0 at padding."""
    return (1 - mask).float() * HIDDEN


class HunyuanText(LanguageText):
    """The language model and ByT5.

    Ids and mask of the prompt in its template [B, 108 + T1], and those of what it has in quotes [B, T2]
    -> states [B, T1, E1] and mask [B, T1], glyphs [B, T2, E2] and mask [B, T2]; masks are 1 at tokens, 0 at padding,
    given as int64, made as fp32.
    """

    def __init__(self, text_encoder: nn.Module, text_encoder_2: nn.Module) -> None:
        super().__init__(text_encoder)
        self.text_encoder_2 = text_encoder_2

    def forward(
        self, ids: Tensor, mask: Tensor, glyph_ids: Tensor, glyph_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (states,) = self.states(ids, mask, (STATE,))
        # As scores: transformers would look into a mask of 0 and 1, which no graph can. Where nothing is in quotes,
        # ByT5 sees padding, evenly, and nobody sees what it makes of it.
        scores = additive(glyph_mask)[:, None, None].to(states.dtype)
        glyphs = self.text_encoder_2(glyph_ids, attention_mask=scores)[0]
        return states[:, DROPPED:], mask[:, DROPPED:].float(), glyphs, glyph_mask.float()



def modulation_layers(transformer: nn.Module) -> list[nn.Linear]:
    """The layers that make scales, shifts and gates, in the order in which a stage takes their outputs."""
    norms = [norm for block in transformer.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    return [norm.linear for norm in (*norms, transformer.norm_out)]


def modulation(time_embed: nn.Module, layers: list[nn.Linear], sigmas: Tensor) -> Tensor:
    """Modulation of noise levels [S], [S, M]: of each block video's and text's (6 D each), of the last norm (2 D)."""
    emb = F.silu(time_embedding(time_embed.time_proj, time_embed.timestep_embedder, sigmas))
    return torch.cat([layer(emb) for layer in layers], dim=-1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x [B, T, E] over tokens with a mask [B, T] of 1, [B, E]."""
    counts = mask[..., None]
    return ((x * counts).sum(dim=1) / counts.sum(dim=1)).to(x.dtype)


def refiner_block(block: nn.Module, x: Tensor, emb: Tensor, mask: Tensor) -> Tensor:
    """A block of the text's refiner.

    x [B, T, D] or, once it has seen the noise level, [S, B, T, D]; emb [S, B, D]; mask [B, T], additive
    -> [S, B, T, D].
    """
    attn = block.attn
    h = block.norm1(x).flatten(0, -3)
    heads = (layer(h).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v))
    a = attention([Stream(*heads)], mask=mask.expand(x.shape[:-1]).flatten(0, -2)).flatten(2)
    gate, gate_2 = block.norm_out.linear(emb).chunk(2, dim=-1)
    x = x + gate[:, :, None] * attn.to_out[0](a).view(x.shape)
    return x + gate_2[:, :, None] * block.ff(block.norm2(x))


class HunyuanCondition(TransformerPart):
    """The text as the transformer's blocks take it, for every noise level.

    states [B, T1, E1] of the language model and glyphs [B, T2, E2] of ByT5, each followed by its mask, 1 at tokens and
    0 at padding, fp32, and sigmas [S] -> context [S, B, T2 + T1, D], what is added to scores of its keys [B, T2 + T1].
    """

    def forward(
        self, states: Tensor, states_mask: Tensor, glyphs: Tensor, glyphs_mask: Tensor, sigmas: Tensor
    ) -> tuple[Tensor, Tensor]:
        model = self.transformer
        refiner = model.context_embedder
        embed = refiner.time_text_embed
        pooled = embed.text_embedder(masked_mean(states, states_mask))  # [B, D]
        emb = F.silu(time_embedding(embed.time_proj, embed.timestep_embedder, sigmas)[:, None] + pooled)  # [S, B, D]
        x = refiner.proj_in(states)
        for block in refiner.token_refiner.refiner_blocks:
            x = refiner_block(block, x, emb, additive(states_mask))
        kinds = model.cond_type_embed.weight  # of the language model's tokens, of glyphs, of a picture's
        glyphs = (model.context_embedder_2(glyphs) + kinds[1]).expand(len(sigmas), -1, -1, -1)
        return torch.cat([glyphs, x + kinds[0]], dim=2), additive(torch.cat([glyphs_mask, states_mask], dim=1))


# --- the transformer ---


def double_block(
    block: nn.Module, video: Tensor, text: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor, mask: Tensor,
    memo: Memo | None = None,
) -> tuple[Tensor, Tensor]:
    """Joint attention of video [B, m, D] and text [B, T, D] with weights of their own; modulation [1, 12 D]."""
    attn = block.attn
    sides = (
        image_side(attn, block.norm1.norm, block.norm2, block.ff),
        text_side(attn, block.norm1_context.norm, block.norm2_context, block.ff_context),
    )
    video, text = joint_block(attn, sides, (video, text), modulation.chunk(2, dim=-1), cos, sin, mask, memo=memo)
    return video, text


class HunyuanStage(TransformerStage):
    """One evaluation of the transformer on the active tokens.

    tokens [B, m, C], cos and sin [B, m, Dh / 2], context [B, T, D], key_mask [B, T], additive, modulation [M]
    -> velocity [B, m, C].
    """

    #: Functions of repeated blocks, which a backend may compile once for all blocks.
    regions = ("double_block",)
    double_block = staticmethod(double_block)

    def forward(
        self, tokens: Tensor, cos: Tensor, sin: Tensor, context: Tensor, key_mask: Tensor, modulation: Tensor,
        *kept: Tensor,
    ) -> Tensor | tuple[Tensor, ...]:
        model = self.transformer
        layers, d = model.transformer_blocks, context.shape[-1]
        *parts, out = modulation[None].split([12 * d] * len(layers) + [2 * d], dim=-1)
        mask = F.pad(key_mask, (tokens.shape[1], 0))

        # The other input channels are a given frame's latents and where they are; both are zero here.
        embed = model.x_embedder.proj
        video = F.linear(tokens, embed.weight.flatten(1)[:, : tokens.shape[-1]], embed.bias)

        def block(i: int, video: Tensor, text: Tensor, *memo: Memo) -> tuple[Tensor, Tensor]:
            return self.double_block(layers[i], video, text, parts[i], cos, sin, mask, *memo)

        output = partial(last_layer, model, modulation=out)
        first_input = partial(modulated, layers[0].norm1.norm, parts[0])
        depth = len(layers)
        return self.act(Evaluation(video, context, depth, depth // 2, in_turn(block), output, first_input), kept)


# --- the autoencoder ---


def frame_causal_attention(block: nn.Module, x: Tensor) -> Tensor:
    """The autoencoder's attention: pixels of a frame see those of all frames up to it. [B, C, T, H, W] -> the same.

    One product for each frame, with keys of 1 to T frames: half of what a mask over all pixels computes, and nothing
    of the mask's size in memory.
    """
    frames = x.shape[2]
    h = block.norm(x)
    # [B, C, T, H, W] -> [B, 1, T, H * W, C]
    q, k, v = (
        layer(h).flatten(3).permute(0, 2, 3, 1)[:, None].contiguous() for layer in (block.to_q, block.to_k, block.to_v)
    )
    seen = [
        F.scaled_dot_product_attention(q[:, :, t], k[:, :, : t + 1].flatten(2, 3), v[:, :, : t + 1].flatten(2, 3))
        for t in range(frames)
    ]
    a = torch.stack(seen, dim=2)[:, 0].permute(0, 3, 1, 2).reshape(x.shape)
    return block.proj_out(a) + x


class HunyuanDecode(nn.Module):
    """Tokens [B, T * H * W, C], or latents of a tile [B, C, T, h, w] -> frames [B, 3, 4 T - 3, 16 h, 16 w] in [0, 1].

    fp32. The decoder's layers are diffusers' own but for its attention.
    """

    def __init__(self, vae: nn.Module, grid: TokenGrid | None = None) -> None:
        super().__init__()
        self.vae = vae
        self.grid = grid

    def forward(self, latents: Tensor) -> Tensor:
        decoder = self.vae.decoder
        if self.grid is not None:
            latents = unpack(latents, self.grid, 1)
        latents = (latents / self.vae.config.scaling_factor).to(decoder.conv_in.conv.weight.dtype)
        x = decoder.conv_in(latents) + latents.repeat_interleave(decoder.repeat, dim=1)
        first, *resnets = decoder.mid_block.resnets
        x = first(x)
        for block, resnet in zip(decoder.mid_block.attentions, resnets, strict=True):
            x = resnet(frame_causal_attention(block, x))
        for block in decoder.up_blocks:
            x = block(x)
        frames = decoder.conv_out(F.silu(decoder.norm_out(x)))
        return (frames.float() / 2 + 0.5).clamp(0, 1)


# --- names ---

PREFIXES = (
    *TRANSFORMER,
    Prefix("text_encoder.", "text_encoder"),
    Prefix("text_encoder_2.", "text_encoder_2"),
)

#: {name in a block of the authors: names in diffusers' block}
BLOCK = {
    "img_attn_q": ("attn.to_q",),
    "img_attn_k": ("attn.to_k",),
    "img_attn_v": ("attn.to_v",),
    "img_attn_q_norm": ("attn.norm_q",),
    "img_attn_k_norm": ("attn.norm_k",),
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_q": ("attn.add_q_proj",),
    "txt_attn_k": ("attn.add_k_proj",),
    "txt_attn_v": ("attn.add_v_proj",),
    "txt_attn_q_norm": ("attn.norm_added_q",),
    "txt_attn_k_norm": ("attn.norm_added_k",),
    "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp.fc1": ("ff.net.0.proj",),
    "img_mlp.fc2": ("ff.net.2",),
    "txt_mlp.fc1": ("ff_context.net.0.proj",),
    "txt_mlp.fc2": ("ff_context.net.2",),
    "img_mod.linear": ("norm1.linear",),
    "txt_mod.linear": ("norm1_context.linear",),
}

#: Parts of blocks as ComfyUI has them.
BLOCK_ADAPTERS = {
    "img_attn.qkv": QKV,
    "txt_attn.qkv": ADDED,
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}

REFINER_BLOCK = {
    "norm1": ("norm1",),
    "norm2": ("norm2",),
    "self_attn_qkv": QKV,
    "self_attn_proj": ("attn.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
    "adaLN_modulation.1": ("norm_out.linear",),
}

OUTSIDE = {
    "img_in.proj": "x_embedder.proj",
    "cond_type_embedding": "cond_type_embed",
    "time_in.mlp.0": "time_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_embed.timestep_embedder.linear_2",
    "txt_in.input_embedder": "context_embedder.proj_in",
    "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
    "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
    "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
    "byt5_in.layernorm": "context_embedder_2.norm",
    "byt5_in.fc1": "context_embedder_2.linear_1",
    "byt5_in.fc2": "context_embedder_2.linear_2",
    "byt5_in.fc3": "context_embedder_2.linear_3",
    "vision_in.proj.0": "image_embedder.norm_in",
    "vision_in.proj.1": "image_embedder.linear_1",
    "vision_in.proj.3": "image_embedder.linear_2",
    "vision_in.proj.4": "image_embedder.norm_out",
    "final_layer.linear": "proj_out",
}


def aliases(modules: Iterable[str]) -> dict[str, Target]:
    """See `jitexport.models.naming.Naming`."""
    names = Aliases(modules)
    for block in names.blocks("transformer_blocks"):
        theirs = block.replace("transformer_blocks", "double_blocks")
        names.add_all(theirs, block, BLOCK)
        names.add_all(theirs, block, BLOCK_ADAPTERS, partial=True)
        names.add_all(block, block, FUSED, partial=True)
    refiner = "context_embedder.token_refiner.refiner_blocks"
    for block in names.blocks(refiner):
        names.add_all(block.replace(refiner, "txt_in.individual_token_refiner.blocks"), block, REFINER_BLOCK)
    for name, part in OUTSIDE.items():
        names.add(name, [part])
    names.add("final_layer.adaLN_modulation.1", ["norm_out.linear"], swapped=True)
    return names.found


NAMING = Naming(
    PREFIXES,
    aliases,
    constant=(
        "norm1.linear", "norm1_context.linear", "norm_out.linear", "time_embed",
        "img_mod", "txt_mod", "final_layer.adaLN_modulation", "time_in",
    ),
)


# --- the published models ---


def _published(hub_id: str, target_size: int, shift: float) -> Published:
    height, width = SIZES[target_size]
    configs = {
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


PUBLISHED = {
    "hunyuan-video-1.5": _published("hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v", 640, 5.0),
    "hunyuan-video-1.5-720p": _published("hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v", 960, 9.0),
}


class HunyuanVideo15Adapter(ModelAdapter):
    """A text-to-video pipeline of HunyuanVideo-1.5 in diffusers' format.

    Further settings: glyph_length, tokens of quoted text; tile, height and width in pixels of what the
    autoencoder decodes at once, a quarter of which overlaps.
    """

    family = "HunyuanVideo15Pipeline"
    classes: ClassVar = {
        "transformer": "diffusers:HunyuanVideo15Transformer3DModel",
        "vae": "diffusers:AutoencoderKLHunyuanVideo15",
        "text_encoder": "transformers:Qwen2_5_VLTextModel",
        "text_encoder_2": "transformers:T5EncoderModel",
    }
    tokenizer_folders = ("tokenizer", "tokenizer_2")
    plain_configs: ClassVar = {"guider": "guider_config.json"}
    naming = NAMING
    published = PUBLISHED

    @classmethod
    def check(cls, configs: Configs, settings: Mapping[str, Any]) -> None:
        """Image-to-video and step-distilled models have the same transformer class; guiders have further options."""
        transformer, guider = configs["transformer"], configs["guider"]
        if transformer.get("use_meanflow"):
            raise UnsupportedModelError(
                "HunyuanVideo-1.5 step-distilled by mean flow", found="use_meanflow: its steps see where they lead",
                expected="HunyuanVideo-1.5's 480p_t2v or 720p_t2v, or a model like them",
            )
        if transformer.get("task_type", "t2v") != "t2v":
            raise UnsupportedModelError(
                "HunyuanVideo-1.5 for another task than text to video", found=f"task_type {transformer['task_type']}",
                expected="a text-to-video model (t2v)",
            )
        fixed = {"patch_size": 1, "patch_size_t": 1, "qk_norm": "rms_norm"}
        fixed |= {"in_channels": 2 * transformer["out_channels"] + 1}
        _refuse_others("a transformer that is not HunyuanVideo-1.5's", transformer, fixed)
        usual = {"guidance_rescale": 0.0, "use_original_formulation": False, "start": 0.0, "stop": 1.0}
        usual |= {"_class_name": "ClassifierFreeGuidance"}
        _refuse_others("a guider with options that are not supported", guider, usual)

    @classmethod
    def usual(cls, configs: Configs) -> dict[str, Any]:
        height, width = SIZES.get(configs["transformer"].get("target_size", 640), SIZES[640])
        guider = configs["guider"]
        return {
            "height": height,
            "width": width,
            "frames": 121,
            "max_sequence_length": 1000,
            "glyph_length": 256,
            "tile": 256,
            "guidance_scale": guider["guidance_scale"] if guider.get("enabled", True) else 1.0,
            "num_inference_steps": 50,
            "quantization": None,
            "features": None,
        }

    @classmethod
    def geometry_of(cls, configs: Configs, settings: Mapping[str, Any]) -> ModelGeometry:
        transformer, vae = configs["transformer"], configs["vae"]
        frames, step = settings["frames"], vae["temporal_compression_ratio"]
        if (frames - 1) % step:
            raise InputError(
                "number of frames does not fit the autoencoder", found=frames,
                expected=f"1 more than a multiple of {step}",
            )
        pixels = vae["spatial_compression_ratio"]
        rows, columns = image_grid(settings, pixels).shape
        grid = TokenGrid(((frames - 1) // step + 1, rows, columns))
        return ModelGeometry(
            grid=grid,
            latent_shape=(transformer["out_channels"], *grid.shape),
            patch=1,
            height=settings["height"],
            width=settings["width"],
            positions=Rotary(tuple(transformer["rope_axes_dim"]), transformer["rope_theta"], grid_axes=(0, 1, 2)),
            text_tokens=settings["glyph_length"] + settings["max_sequence_length"],
            frames=frames,
            tiles=tiles((rows, columns), settings["tile"], pixels),
        )

    @classmethod
    def defaults_of(cls, configs: Configs, settings: Mapping[str, Any]) -> ModelDefaults:
        guidance = Guidance(true=settings["guidance_scale"], argument="guidance_scale", negative="")
        return ModelDefaults(guidance, settings["num_inference_steps"])

    @classmethod
    def cells(cls, configs: Configs) -> tuple[Cell, ...]:
        return joint_cells(configs["transformer"]["num_layers"], "image", "text")

    @classmethod
    def tokenizer(cls, folder: str, configs: Configs, settings: Mapping[str, Any]) -> Tokenizer:
        if folder == "tokenizer_2":
            return Tokenizer(folder, "", settings["glyph_length"], quoted=True, mask=True)
        length = DROPPED + settings["max_sequence_length"]
        return Tokenizer(folder, "", length, template=TEMPLATE, empty=" ", mask=True)

    def arrange(self) -> None:
        """What only encodes, sees pictures or makes constants leaves the components."""
        transformer = self.components["transformer"]
        self.once = nn.ModuleList([transformer.time_embed, *modulation_layers(transformer)])
        for block in transformer.transformer_blocks:
            block.norm1.linear = block.norm1_context.linear = None
        transformer.norm_out.linear = transformer.time_embed = transformer.image_embedder = None
        self.components["vae"].encoder = None
        keep_what_is_read(self.components["text_encoder"], (STATE,))

    def native_sigmas(self, n: int) -> tuple[float, ...]:
        """As the pipeline sets them: even steps, shifted by a constant."""
        return flow_sigmas(self.configs["scheduler"], n)

    def constants(self, sigmas: Tensor) -> dict[str, Tensor]:
        time_embed, *layers = self.once
        return {"modulation": modulation(time_embed, layers, sigmas)}

    def constant_specs(self, steps: int, dtype: str) -> tuple[TensorSpec, ...]:
        config = self.configs["transformer"]
        vectors = 12 * config["num_layers"] + 2
        return (TensorSpec("modulation", (steps, vectors * self._width), dtype, per_step=True),)

    @property
    def _width(self) -> int:
        """D, channels of a token inside the transformer."""
        config = self.configs["transformer"]
        return config["num_attention_heads"] * config["attention_head_dim"]

    def text_spec(self, batch: int, dtype: str) -> EngineSpec:
        lengths = {"": DROPPED + self._settings["max_sequence_length"], "glyph_": self._settings["glyph_length"]}
        ids = [
            TensorSpec(f"{encoder}{what}", (batch, length), "int64")
            for encoder, length in lengths.items() for what in ("ids", "mask")
        ]
        return EngineSpec("text", tuple(ids), self._embeddings(batch, dtype))

    def _embeddings(self, batch: int, dtype: str) -> tuple[TensorSpec, ...]:
        config, settings = self.configs["transformer"], self._settings
        states, glyphs = (batch, settings["max_sequence_length"]), (batch, settings["glyph_length"])
        return (
            TensorSpec("prompt_embeds", (*states, config["text_embed_dim"]), dtype),
            TensorSpec("prompt_embeds_mask", states, "fp32"),
            TensorSpec("prompt_embeds_2", (*glyphs, config["text_embed_2_dim"]), dtype),
            TensorSpec("prompt_embeds_mask_2", glyphs, "fp32"),
        )

    def condition_spec(self, batch: int, steps: int, dtype: str) -> EngineSpec:
        text = self.geometry.text_tokens
        return EngineSpec(
            "condition",
            (*self._embeddings(batch, dtype), TensorSpec("sigmas", (steps,), "fp32")),
            (
                TensorSpec("context", (steps, batch, text, self._width), dtype, per_step=True),
                TensorSpec("key_mask", (batch, text), "fp32"),
            ),
        )

    def module(self, name: str) -> nn.Module:
        parts = self.components
        if name == "text":
            module: nn.Module = HunyuanText(parts["text_encoder"], parts["text_encoder_2"])
        elif name == "condition":
            module = HunyuanCondition(parts["transformer"])
        elif name == "decode":
            module = HunyuanDecode(parts["vae"], None if self.geometry.tiles else self.geometry.grid)
        else:
            module = HunyuanStage(parts["transformer"], self.act(name))
        return module.eval()


def tiles(size: tuple[int, int], tile: int, pixels: int) -> TiledDecoder | None:
    """How latents of a size (H, W) are decoded in tiles of so many pixels; None where one tile takes them whole.

    Raises:
        InputError: a tile that is no multiple of a latent's pixels, or of less than two of them.
    """
    if tile % pixels or tile < 2 * pixels:
        raise InputError("no tile of latents", found=tile, expected=f"a multiple of {pixels}, {2 * pixels} or more")
    side = tile // pixels
    if max(size) <= side:
        return None
    return TiledDecoder(Tiling((side, side), (side // 4, side // 4)).fitted(size), (pixels, pixels))


def _refuse_others(what: str, config: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse a configuration that has other values than these, where it says something.

    Raises:
        UnsupportedModelError: naming them.
    """
    others = {name: config[name] for name, value in expected.items() if config.get(name, value) != value}
    if others:
        raise UnsupportedModelError(what, found=others, expected={name: expected[name] for name in others})
