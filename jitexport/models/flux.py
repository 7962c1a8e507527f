"""FLUX.1: dev, schnell, and any model of their architecture in diffusers' format.

The modules below run diffusers' own weights under their own names, arranged for fixed-shape engines:

- all that depends on the prompt, the guidance and the noise levels only (text projection and the modulation vectors of
  every step) is computed once per image, by `FluxCondition`; about 3.2 of FLUX.1-dev's 11.9 billion parameters leave
  the per-step path with it;
- the text and image streams of the single blocks share one buffer;
- rotary tables come in as inputs, gathered for the tokens that a stage runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jitexport.errors import UnsupportedModelError
from jitexport.guidance import Guidance
from jitexport.kernels.attention import attention
from jitexport.models.autoencoders import PackedDecode
from jitexport.models.base import Configs, ModelAdapter, ModelDefaults, ModelGeometry, image_grid
from jitexport.models.encoders import FluxText
from jitexport.models.flux_names import NAMING
from jitexport.models.layers import (
    Part,
    TransformerPart,
    gated,
    image_side,
    joint_block,
    last_layer,
    modulate,
    modulated,
    run_linear,
    runs_in_int8,
    stream,
    text_side,
    time_embedding,
)
from jitexport.models.published import FLUX
from jitexport.models.schedulers import flow_sigmas, resolution_shift
from jitexport.models.stages import Evaluation, TransformerStage, doubles_then_singles
from jitexport.models.tokens import Cell, Memo, flux_cells
from jitexport.positions import Rotary
from jitexport.prompting import Tokenizer
from jitexport.specs import EngineSpec, TensorSpec

PATCH = 2  # FLUX packs 2 x 2 latent pixels into a token
THETA = 10000.0


class FluxCondition(TransformerPart):
    """Everything of the transformer that does not see the image.

    prompt_embeds [B, T, E], pooled [B, P], sigmas [S], guidance [B] -> modulation [S, B, M], context [B, T, D].

    M holds, in this order, the vectors of each double block (image 6 D, text 6 D), of each single block (3 D), and of
    the output norm (2 D).
    """

    def forward(
        self, prompt_embeds: Tensor, pooled: Tensor, sigmas: Tensor, guidance: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        model = self.transformer
        embed = model.time_text_embed
        time = time_embedding(embed.time_proj, embed.timestep_embedder, sigmas)[:, None]
        if guidance is not None:
            time = time + time_embedding(embed.time_proj, embed.guidance_embedder, guidance)
        emb = F.silu(time + embed.text_embedder(pooled))  # [S, B, D]
        layers = [norm.linear for b in model.transformer_blocks for norm in (b.norm1, b.norm1_context)]
        layers += [b.norm.linear for b in model.single_transformer_blocks]
        layers += [model.norm_out.linear]
        return torch.cat([layer(emb) for layer in layers], dim=-1), model.context_embedder(prompt_embeds)


def double_block(
    block: Part, image: Tensor, text: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor,
    memo: Memo | None = None,
) -> tuple[Tensor, Tensor]:
    """Joint attention of text [B, T, D] and image [B, m, D] with weights of their own; modulation [B, 12 D]."""
    attn = block.attn
    sides = (
        text_side(attn, block.norm1_context.norm, block.norm2_context, block.ff_context),
        image_side(attn, block.norm1.norm, block.norm2, block.ff),
    )
    of_image, of_text = modulation.chunk(2, dim=-1)
    text, image = joint_block(attn, sides, (text, image), (of_text, of_image), cos, sin, memo=memo)
    return image, text


def single_block(
    block: Part, x: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor, memo: Memo | None = None
) -> Tensor:
    """Attention and MLP side by side on text and image together, x [B, T + m, D]; modulation [B, 3 D]."""
    shift, scale, gate = modulation.chunk(3, dim=-1)
    attn = block.attn
    d = attn.head_dim

    def update(h: Tensor, a: Tensor) -> Tensor:
        return run_linear(block.proj_out, a, run_linear(block.proj_mlp, h, gelu=True), wide=True)

    if memo is not None and not memo.attends:
        norm = block.norm.norm
        return memo.refreshed(
            x, gate, lambda x, a: update(modulate(norm, x, shift, scale), a), memo.attention(x)
        )
    h = modulate(block.norm.norm, x, shift, scale)
    streams = [stream(h, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k), d)]
    a = attention(streams, cos, sin, eps=attn.norm_q.eps, int8=runs_in_int8(attn.to_q)).flatten(2)
    added = update(h, a)
    if memo is not None:
        memo.score(streams)
        memo.keep(added, a)
    return gated(x, gate, added)


class FluxStage(TransformerStage):
    """One evaluation of the transformer on the active tokens; it is cut in two behind the double blocks.

    tokens [B, m, C], cos and sin [B, T + m, Dh / 2], modulation [B, M], context [B, T, D] -> velocity [B, m, C].
    """

    #: Functions of repeated blocks, which a backend may compile once for all blocks.
    regions = ("double_block", "single_block")
    double_block, single_block = staticmethod(double_block), staticmethod(single_block)

    def forward(
        self, tokens: Tensor, cos: Tensor, sin: Tensor, modulation: Tensor, context: Tensor, *kept: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        model = self.transformer
        doubles, singles = model.transformer_blocks, model.single_transformer_blocks
        d, half = model.inner_dim, len(model.transformer_blocks)
        *parts, out = modulation.split([12 * d] * len(doubles) + [3 * d] * len(singles) + [2 * d], dim=-1)

        def double(i: int, image: Tensor, text: Tensor, *memo: Memo) -> tuple[Tensor, Tensor]:
            return self.double_block(doubles[i], image, text, parts[i], cos, sin, *memo)

        def single(i: int, x: Tensor, *memo: Memo) -> Tensor:
            return self.single_block(singles[i], x, parts[half + i], cos, sin, *memo)

        blocks = doubles_then_singles(half, double, single)
        output = partial(last_layer, model, modulation=out)
        first_input = partial(modulated, doubles[0].norm1.norm, parts[0])
        image, depth = model.x_embedder(tokens), len(parts)
        return self.act(Evaluation(image, context, depth, half, blocks, output, first_input), kept)


class FluxAdapter(ModelAdapter):
    """A FLUX.1 pipeline in diffusers' format."""

    family = "FluxPipeline"
    classes: ClassVar = {
        "transformer": "diffusers:FluxTransformer2DModel",
        "vae": "diffusers:AutoencoderKL",
        "text_encoder": "transformers:CLIPTextModel",
        "text_encoder_2": "transformers:T5EncoderModel",
    }
    tokenizer_folders = ("tokenizer", "tokenizer_2")
    naming = NAMING
    published = FLUX

    @classmethod
    def check(cls, configs: Configs, settings: Mapping[str, Any]) -> None:
        """Fill, Canny and Depth models have FLUX.1's pipeline of another name, but their transformers do not fit."""
        channels, out = configs["transformer"]["in_channels"], configs["transformer"].get("out_channels")
        if out is not None and out != channels:
            raise UnsupportedModelError(
                "a transformer that also sees an image (FLUX.1 Fill, Canny or Depth)",
                found=f"{channels} channels in, {out} out", expected="FLUX.1-dev, FLUX.1-schnell, or a model like them",
            )

    @classmethod
    def usual(cls, configs: Configs) -> dict[str, Any]:
        distilled = not configs["transformer"].get("guidance_embeds")  # schnell: timestep-distilled, no guidance
        return {
            "height": 1024,
            "width": 1024,
            "max_sequence_length": 256 if distilled else 512,
            "guidance_scale": 3.5,
            "num_inference_steps": 4 if distilled else 50,
            "quantization": None,
            "features": None,
        }

    @classmethod
    def geometry_of(cls, configs: Configs, settings: Mapping[str, Any]) -> ModelGeometry:
        grid = image_grid(settings, 2 ** (len(configs["vae"]["block_out_channels"]) - 1) * PATCH)
        text = settings["max_sequence_length"]
        channels = configs["transformer"]["in_channels"] // PATCH**2
        axes = tuple(configs["transformer"]["axes_dims_rope"])
        return ModelGeometry(
            grid=grid,
            latent_shape=(channels, grid.shape[0] * PATCH, grid.shape[1] * PATCH),
            patch=PATCH,
            height=settings["height"],
            width=settings["width"],
            positions=Rotary(axes, THETA, grid_axes=(len(axes) - 2, len(axes) - 1), text_tokens=text),
            text_tokens=text,
        )

    @classmethod
    def defaults_of(cls, configs: Configs, settings: Mapping[str, Any]) -> ModelDefaults:
        distilled = settings["guidance_scale"] if configs["transformer"].get("guidance_embeds") else None
        guidance = Guidance(distilled=distilled, true=1.0)
        return ModelDefaults(guidance, settings["num_inference_steps"], settings["max_sequence_length"])

    @classmethod
    def cells(cls, configs: Configs) -> tuple[Cell, ...]:
        config = configs["transformer"]
        return flux_cells(config["num_layers"], config["num_single_layers"])

    @classmethod
    def tokenizer(cls, folder: str, configs: Configs, settings: Mapping[str, Any]) -> Tokenizer:
        clip = configs["text_encoder"]["max_position_embeddings"]
        return Tokenizer(folder, "", clip if folder == "tokenizer" else settings["max_sequence_length"])

    def native_sigmas(self, n: int) -> tuple[float, ...]:
        """As FluxPipeline sets them: linspace(1, 1/n, n), shifted by the resolution where the scheduler asks for it."""
        config = self.configs["scheduler"]
        return flow_sigmas(config, n, mu=resolution_shift(config, self.geometry.grid.tokens))

    def text_spec(self, batch: int, dtype: str) -> EngineSpec:
        clip = self.configs["text_encoder"]["max_position_embeddings"]
        ids = (
            TensorSpec("clip_ids", (batch, clip), "int64"),
            TensorSpec("t5_ids", (batch, self.geometry.text_tokens), "int64"),
        )
        return EngineSpec("text", ids, self._embeddings(batch, dtype))

    def _embeddings(self, batch: int, dtype: str) -> tuple[TensorSpec, ...]:
        config = self.components["transformer"].config
        return (
            TensorSpec("prompt_embeds", (batch, self.geometry.text_tokens, config.joint_attention_dim), dtype),
            TensorSpec("pooled", (batch, config.pooled_projection_dim), dtype),
        )

    def condition_spec(self, batch: int, steps: int, dtype: str) -> EngineSpec:
        transformer = self.components["transformer"]
        config, d = transformer.config, transformer.inner_dim
        width = d * (12 * config.num_layers + 3 * config.num_single_layers + 2)
        guidance = (TensorSpec("guidance", (batch,), "fp32"),) if config.guidance_embeds else ()
        return EngineSpec(
            "condition",
            (*self._embeddings(batch, dtype), TensorSpec("sigmas", (steps,), "fp32"), *guidance),
            (
                TensorSpec("modulation", (steps, batch, width), dtype, per_step=True),
                TensorSpec("context", (batch, self.geometry.text_tokens, d), dtype),
            ),
        )

    def module(self, name: str) -> nn.Module:
        parts = self.components
        if name == "text":
            module: nn.Module = FluxText(parts["text_encoder"], parts["text_encoder_2"])
        elif name == "condition":
            module = FluxCondition(parts["transformer"])
        elif name in ("preview", "decode"):
            grid = self.geometry.grid
            module = PackedDecode(parts["vae"], grid.halved() if name == "preview" else grid, PATCH)
        else:
            module = FluxStage(parts["transformer"], self.act(name))
        return module.eval()
