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

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jitexport.errors import InputError, UnsupportedModelError
from jitexport.grid import TokenGrid
from jitexport.guidance import Guidance
from jitexport.kernels.attention import Stream, attention
from jitexport.models.autoencoders import HunyuanDecode
from jitexport.models.base import (
    Configs,
    ModelAdapter,
    ModelDefaults,
    ModelGeometry,
    image_grid,
    refuse_others,
)
from jitexport.models.geometry import tiles
from jitexport.models.hunyuan_names import NAMING
from jitexport.models.language import LanguageText, keep_what_is_read
from jitexport.models.layers import (
    Part,
    TransformerPart,
    image_side,
    joint_block,
    last_layer,
    modulated,
    text_side,
    time_embedding,
)
from jitexport.models.published import HUNYUAN_SIZES, HUNYUAN_VIDEO15
from jitexport.models.schedulers import flow_sigmas
from jitexport.models.stages import Evaluation, TransformerStage, in_turn
from jitexport.models.tokens import Cell, Memo, joint_cells
from jitexport.positions import Rotary
from jitexport.prompting import Tokenizer
from jitexport.specs import EngineSpec, TensorSpec

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

    def __init__(self, text_encoder: Part, text_encoder_2: Part) -> None:
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



def modulation_layers(transformer: Part) -> list[Part]:
    """The layers that make scales, shifts and gates, in the order in which a stage takes their outputs."""
    norms = [norm for block in transformer.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    return [norm.linear for norm in (*norms, transformer.norm_out)]


def modulation(time_embed: Part, layers: list[Part], sigmas: Tensor) -> Tensor:
    """Modulation of noise levels [S], [S, M]: of each block video's and text's (6 D each), of the last norm (2 D)."""
    emb = F.silu(time_embedding(time_embed.time_proj, time_embed.timestep_embedder, sigmas))
    return torch.cat([layer(emb) for layer in layers], dim=-1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x [B, T, E] over tokens with a mask [B, T] of 1, [B, E]."""
    counts = mask[..., None]
    return ((x * counts).sum(dim=1) / counts.sum(dim=1)).to(x.dtype)


def refiner_block(block: Part, x: Tensor, emb: Tensor, mask: Tensor) -> Tensor:
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
    block: Part, video: Tensor, text: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor, mask: Tensor,
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
    published = HUNYUAN_VIDEO15

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
        refuse_others("a transformer that is not HunyuanVideo-1.5's", transformer, fixed)
        usual: dict[str, Any] = {"guidance_rescale": 0.0, "use_original_formulation": False, "start": 0.0, "stop": 1.0}
        usual |= {"_class_name": "ClassifierFreeGuidance"}
        refuse_others("a guider with options that are not supported", guider, usual)

    @classmethod
    def usual(cls, configs: Configs) -> dict[str, Any]:
        height, width = HUNYUAN_SIZES.get(configs["transformer"].get("target_size", 640), HUNYUAN_SIZES[640])
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
