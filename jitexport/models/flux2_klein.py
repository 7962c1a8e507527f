"""FLUX.2-klein: the base models of 4 and 9 billion parameters, and the ones distilled to four steps.

The modules below run diffusers' own weights under their own names, arranged for fixed-shape engines:

- all blocks share one modulation, which depends on the timestep only: it is a constant of a bundle, and the layers that
  make it are no part of any engine;
- text tokens have positions, on an axis of their own, and padding is attended to like text: there is no mask;
- a single block projects queries, keys, values and both halves of its MLP by one layer;
- latents are drawn, denoised and kept as tokens of 2 x 2 latent pixels, normalised by the autoencoder's running
  statistics; decoding undoes that first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jitexport.errors import UnsupportedModelError
from jitexport.guidance import Guidance
from jitexport.kernels.attention import Stream, attention
from jitexport.kernels.linear import linear
from jitexport.models.autoencoders import KleinDecode
from jitexport.models.base import Configs, ModelAdapter, ModelDefaults, ModelGeometry, image_grid
from jitexport.models.flux_names import ATTENTION, NORMS
from jitexport.models.language import LanguageText, keep_what_is_read
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
    text_side,
    time_embedding,
)
from jitexport.models.naming import FUSED, TRANSFORMER, Aliases, Naming, Prefix, Target
from jitexport.models.published import FLUX2_KLEIN
from jitexport.models.schedulers import flow_sigmas, scheduler_shift
from jitexport.models.stages import Evaluation, TransformerStage, doubles_then_singles
from jitexport.models.tokens import Cell, Memo, flux_cells
from jitexport.positions import Rotary
from jitexport.prompting import Tokenizer
from jitexport.specs import EngineSpec, TensorSpec

PATCH = 2  # a token is 2 x 2 latent pixels

#: Of the text encoder's hidden states, the layers whose outputs the transformer reads, side by side.
TEXT_LAYERS = (9, 18, 27)

#: Qwen3's turn of a user, then of the assistant with nothing thought.
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"

#: Vectors of width D in the modulation: of the double blocks' image and text, of the single blocks, of the output.
PARTS = (6, 6, 3, 2)


def detach_modulation(transformer: Part) -> nn.ModuleDict:
    """Take the layers that see the timestep only out of a transformer; `modulation` runs them."""
    once = nn.ModuleDict()
    for name in (
        "time_guidance_embed", "double_stream_modulation_img", "double_stream_modulation_txt",
        "single_stream_modulation",
    ):
        once[name] = getattr(transformer, name)
        delattr(transformer, name)
    once["norm_out"] = transformer.norm_out.linear
    del transformer.norm_out.linear
    return once


def modulation(once: Part, sigmas: Tensor) -> Tensor:
    """The vectors of `PARTS` at noise levels sigmas [S] -> [S, 17 D], of the layers' dtype."""
    embed = once["time_guidance_embed"]
    time = F.silu(time_embedding(embed.time_proj, embed.timestep_embedder, sigmas))  # [S, D]
    layers = [
        once["double_stream_modulation_img"].linear, once["double_stream_modulation_txt"].linear,
        once["single_stream_modulation"].linear, once["norm_out"],
    ]
    return torch.cat([layer(time) for layer in layers], dim=-1)


def log_shift(tokens: int, n: int) -> float:
    """The logarithm of the shift of n noise levels, as the authors fitted it to numbers of tokens and of steps.

    Two lines in the tokens, for 10 and for 200 steps, and between them a line in the steps; of more than 4300 tokens
    the second, whatever the steps.
    """
    ten, many = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    return many if tokens > 4300 else many + (ten - many) * (200 - n) / 190


class KleinText(LanguageText):
    """The language model: ids and mask [B, T] -> prompt_embeds [B, T, E], states of `TEXT_LAYERS` side by side.

    At padding too, which the transformer attends to, though the language model itself does not.
    """

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return torch.cat(self.states(ids, mask, TEXT_LAYERS), dim=-1)


class KleinCondition(TransformerPart):
    """prompt_embeds [B, T, E] -> context [B, T, D]."""

    def forward(self, prompt_embeds: Tensor) -> Tensor:
        return self.transformer.context_embedder(prompt_embeds)


def swiglu(x: Tensor) -> Tensor:
    """silu(first half) * second half, [..., 2 F] -> [..., F]."""
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def feed_forward(ff: Part, x: Tensor) -> Tensor:
    """diffusers' `Flux2FeedForward`, [B, L, D] -> [B, L, D]."""
    return run_linear(ff.linear_out, swiglu(run_linear(ff.linear_in, x)), wide=True)


def double_block(
    block: Part, image: Tensor, text: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor,
    memo: Memo | None = None,
) -> tuple[Tensor, Tensor]:
    """Joint attention of text [B, T, D] and image [B, m, D] with weights of their own; modulation [1, 12 D]."""
    attn = block.attn
    sides = (
        text_side(attn, block.norm1_context, block.norm2_context, block.ff_context),
        image_side(attn, block.norm1, block.norm2, block.ff),
    )
    of_image, of_text = modulation.chunk(2, dim=-1)
    text, image = joint_block(attn, sides, (text, image), (of_text, of_image), cos, sin, mlp=feed_forward, memo=memo)
    return image, text


def single_block(
    block: Part, x: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor, memo: Memo | None = None
) -> Tensor:
    """Attention and MLP side by side on text and image together, x [B, T + m, D]; modulation [1, 3 D]."""
    shift, scale, gate = modulation.chunk(3, dim=-1)
    attn = block.attn
    width = attn.inner_dim
    if memo is not None and not memo.attends:
        return memo.refreshed(
            x, gate, lambda x, a: mlp_alone(attn, modulate(block.norm, x, shift, scale), a), memo.attention(x)
        )
    h = run_linear(attn.to_qkv_mlp_proj, modulate(block.norm, x, shift, scale))
    *heads, mlp = h.split([width, width, width, h.shape[-1] - 3 * width], dim=-1)
    q, k, v = (part.unflatten(-1, (-1, attn.head_dim)) for part in heads)
    streams = [Stream(q, k, v, attn.norm_q.weight, attn.norm_k.weight)]
    a = attention(streams, cos, sin, eps=attn.norm_q.eps, int8=runs_in_int8(attn.to_out)).flatten(2)
    update = run_linear(attn.to_out, a, swiglu(mlp), wide=True)
    if memo is not None:
        memo.score(streams)
        memo.keep(update, a)
    return gated(x, gate, update)


def mlp_alone(attn: Part, h: Tensor, a: Tensor) -> Tensor:
    """What a single block's last layer makes of h, modulated, and of attention's result a, [B, L, D] each."""
    layer, first = attn.to_qkv_mlp_proj, 3 * attn.inner_dim
    of_all = (layer.bias, getattr(layer, "weight_scale", None))
    bias, scale = (None if part is None else part[first:] for part in of_all)
    mlp = linear([h], layer.weight[first:], bias, scale)
    return run_linear(attn.to_out, a, swiglu(mlp), wide=True)


class KleinStage(TransformerStage):
    """One evaluation of the transformer on the active tokens; it is cut in two behind the double blocks.

    tokens [B, m, C], cos and sin [B, T + m, Dh / 2], context [B, T, D], modulation [17 D] -> velocity [B, m, C].
    """

    #: Functions of repeated blocks, which a backend may compile once for all blocks.
    regions = ("double_block", "single_block")
    double_block, single_block = staticmethod(double_block), staticmethod(single_block)

    def forward(
        self, tokens: Tensor, cos: Tensor, sin: Tensor, context: Tensor, modulation: Tensor, *kept: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        model = self.transformer
        doubles, singles = model.transformer_blocks, model.single_transformer_blocks
        d, half = model.inner_dim, len(model.transformer_blocks)
        of_double, of_single, out = modulation[None].split([12 * d, 3 * d, 2 * d], dim=-1)

        def double(i: int, image: Tensor, text: Tensor, *memo: Memo) -> tuple[Tensor, Tensor]:
            return self.double_block(doubles[i], image, text, of_double, cos, sin, *memo)

        def single(i: int, x: Tensor, *memo: Memo) -> Tensor:
            return self.single_block(singles[i], x, of_single, cos, sin, *memo)

        blocks = doubles_then_singles(half, double, single)
        output = partial(last_layer, model, modulation=out)
        first_input = partial(modulated, doubles[0].norm1, of_double)
        image, depth = run_linear(model.x_embedder, tokens), half + len(singles)
        return self.act(Evaluation(image, context, depth, half, blocks, output, first_input), kept)


# --- names of the same modules elsewhere -----------------------------------------------------------------------------

#: {name in a block of the authors: names in diffusers' block}
DOUBLE = ATTENTION | {
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
}
SINGLE = NORMS | {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)}
OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
}


def aliases(modules: Iterable[str]) -> dict[str, Target]:
    """See `jitexport.models.naming.Naming`."""
    names = Aliases(modules)
    for block in names.blocks("transformer_blocks"):
        names.add_all(block.replace("transformer_blocks", "double_blocks"), block, DOUBLE)
        names.add_all(block, block, FUSED, partial=True)
    for block in names.blocks("single_transformer_blocks"):
        names.add_all(block.replace("single_transformer_blocks", "single_blocks"), block, SINGLE)
    names.add_outside(OUTSIDE)
    names.add_scales()
    return names.found


NAMING = Naming(
    (*TRANSFORMER, Prefix("text_encoder.", "text_encoder")),
    aliases,
    constant=(
        "stream_modulation", "time_guidance_embed", "time_in", "norm_out.linear", "final_layer.adaLN_modulation",
    ),
)


class KleinAdapter(ModelAdapter):
    """A FLUX.2-klein pipeline in diffusers' format, for images from text.

    Attributes:
        once: the layers of the transformer that make the modulation, which no engine reads.
    """

    family = "Flux2KleinPipeline"
    classes: ClassVar = {
        "transformer": "diffusers:Flux2Transformer2DModel",
        "vae": "diffusers:AutoencoderKLFlux2",
        "text_encoder": "transformers:Qwen3ForCausalLM",
    }
    naming = NAMING
    published = FLUX2_KLEIN
    timesteps: ClassVar = {"kind": "native"}  # the release of JiT runs this family on its own noise levels
    once: nn.ModuleDict

    @classmethod
    def check(cls, configs: Configs, settings: Mapping[str, Any]) -> None:
        """Refuse FLUX.2-dev's transformer, which is larger and takes the guidance as an input."""
        config = configs["transformer"]
        if config.get("guidance_embeds", True):
            raise UnsupportedModelError(
                "a transformer that takes the guidance as an input (FLUX.2-dev)", found="guidance_embeds",
                expected="FLUX.2-klein, or a model like it",
            )
        wanted, width = config["joint_attention_dim"], configs["text_encoder"]["hidden_size"]
        if wanted != len(TEXT_LAYERS) * width:
            raise UnsupportedModelError(
                "the transformer does not fit the text encoder", found=f"{wanted} channels of text, {width} of a layer",
                expected=f"{len(TEXT_LAYERS)} layers side by side",
            )

    @classmethod
    def usual(cls, configs: Configs) -> dict[str, Any]:
        distilled = cls.distilled(configs)
        return {
            "height": 1024,
            "width": 1024,
            "max_sequence_length": 512,
            "guidance_scale": 1.0 if distilled else 4.0,
            "num_inference_steps": 4 if distilled else 50,
            "quantization": None,
            "features": None,
        }

    @staticmethod
    def distilled(configs: Configs) -> bool:
        """Whether the model is one of those for four steps without guidance."""
        return bool(configs.get("pipeline", {}).get("is_distilled"))

    @classmethod
    def geometry_of(cls, configs: Configs, settings: Mapping[str, Any]) -> ModelGeometry:
        config = configs["transformer"]
        grid = image_grid(settings, 2 ** (len(configs["vae"]["block_out_channels"]) - 1) * PATCH)
        text = settings["max_sequence_length"]
        return ModelGeometry(
            grid=grid,
            latent_shape=(config["in_channels"] // PATCH**2, grid.shape[0] * PATCH, grid.shape[1] * PATCH),
            patch=PATCH,
            drawn_patch=1,
            height=settings["height"],
            width=settings["width"],
            positions=Rotary(
                tuple(config["axes_dims_rope"]), float(config["rope_theta"]), grid_axes=(1, 2),
                text_tokens=text, text_step=(0.0, 0.0, 0.0, 1.0),
            ),
            text_tokens=text,
        )

    @classmethod
    def defaults_of(cls, configs: Configs, settings: Mapping[str, Any]) -> ModelDefaults:
        true = None if cls.distilled(configs) else settings["guidance_scale"]
        guidance = Guidance(true=true, argument="guidance_scale", negative=None if true is None else "")
        return ModelDefaults(guidance, settings["num_inference_steps"], settings["max_sequence_length"])

    @classmethod
    def cells(cls, configs: Configs) -> tuple[Cell, ...]:
        config = configs["transformer"]
        return flux_cells(config["num_layers"], config["num_single_layers"])

    @classmethod
    def tokenizer(cls, folder: str, configs: Configs, settings: Mapping[str, Any]) -> Tokenizer:
        return Tokenizer(folder, "", settings["max_sequence_length"], template=TEMPLATE, mask=True)

    def arrange(self) -> None:
        transformer = self.components["transformer"]
        self.once = detach_modulation(transformer)
        keep_what_is_read(self.components["text_encoder"], TEXT_LAYERS)

    def native_sigmas(self, n: int) -> tuple[float, ...]:
        """As Flux2KleinPipeline sets them: linspace(1, 1/n, n), shifted by `log_shift`."""
        return flow_sigmas(self.configs["scheduler"], n, mu=log_shift(self.geometry.grid.tokens, n))

    def shift(self, n: int) -> float:
        """Of n steps, on which the shift depends."""
        return scheduler_shift(self.configs["scheduler"], log_shift(self.geometry.grid.tokens, n))

    def text_spec(self, batch: int, dtype: str) -> EngineSpec:
        shape = (batch, self.geometry.text_tokens)
        ids = TensorSpec("ids", shape, "int64"), TensorSpec("mask", shape, "int64")
        return EngineSpec("text", ids, (self._embeddings(batch, dtype),))

    def _embeddings(self, batch: int, dtype: str) -> TensorSpec:
        width = self.configs["transformer"]["joint_attention_dim"]
        return TensorSpec("prompt_embeds", (batch, self.geometry.text_tokens, width), dtype)

    def condition_spec(self, batch: int, steps: int, dtype: str) -> EngineSpec:
        context = TensorSpec("context", (batch, self.geometry.text_tokens, self._width), dtype)
        return EngineSpec("condition", (self._embeddings(batch, dtype),), (context,))

    @property
    def _width(self) -> int:
        return self.components["transformer"].inner_dim

    @torch.no_grad()
    def constants(self, sigmas: Tensor) -> dict[str, Tensor]:
        return {"modulation": modulation(self.once, sigmas)}

    def constant_specs(self, steps: int, dtype: str) -> tuple[TensorSpec, ...]:
        return (TensorSpec("modulation", (steps, sum(PARTS) * self._width), dtype, per_step=True),)

    def module(self, name: str) -> nn.Module:
        parts = self.components
        if name == "text":
            module: nn.Module = KleinText(parts["text_encoder"])
        elif name == "condition":
            module = KleinCondition(parts["transformer"])
        elif name in ("preview", "decode"):
            grid = self.geometry.grid
            module = KleinDecode(parts["vae"], grid.halved() if name == "preview" else grid, PATCH)
        else:
            module = KleinStage(parts["transformer"], self.act(name))
        return module.eval()
