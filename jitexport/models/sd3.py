"""Stable Diffusion 3 and 3.5, in diffusers' format.

Every block is of two streams, image and text; those of SD3.5-medium's first half look at the image a second time. The
model has no rotary embedding: sines and cosines of a token's place are added to it once, before the first block.
As FLUX's, the modulation depends on the prompt and the noise level, and is computed once per image by `SD3Condition`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jitexport.errors import InputError, UnsupportedModelError
from jitexport.guidance import Guidance
from jitexport.kernels.attention import Stream, attention
from jitexport.models.autoencoders import PackedDecode
from jitexport.models.base import Configs, ModelAdapter, ModelDefaults, ModelGeometry, image_grid
from jitexport.models.encoders import SD3Text
from jitexport.models.layers import (
    Part,
    TransformerPart,
    feed_forward,
    gated,
    last_layer,
    modulate,
    modulated,
    run_linear,
    runs_in_int8,
    stream,
    time_embedding,
)
from jitexport.models.published import SD3
from jitexport.models.schedulers import flow_sigmas, resolution_shift, scheduler_shift
from jitexport.models.sd3_names import NAMING
from jitexport.models.sincos import SinCos, cropped, published_table, read_table
from jitexport.models.stages import Evaluation, TransformerStage, in_turn
from jitexport.models.tokens import Cell, Keep, Memo, Refresh, joint_cells
from jitexport.prompting import Tokenizer
from jitexport.specs import EngineSpec, TensorSpec

PATCH = 2  # a token is 2 x 2 latent pixels
EPS = 1e-6  # of the norms of queries and keys


def context_width(block: Part) -> int:
    """Modulation vectors of a block's text; the last block needs its text for attention only."""
    return 2 if block.context_pre_only else 6


def image_width(block: Part) -> int:
    """Modulation vectors of a block's image."""
    return 9 if block.use_dual_attention else 6


class SD3Condition(TransformerPart):
    """Everything of the transformer that does not see the image.

    prompt_embeds [B, T, E], pooled [B, P], sigmas [S] -> modulation [S, B, M], context [B, T, D].

    M holds, in this order, the vectors of each block (image 6 D, or 9 D with a second attention; text 6 D, in the last
    block 2 D), and of the output norm (2 D).
    """

    def forward(self, prompt_embeds: Tensor, pooled: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        model = self.transformer
        embed = model.time_text_embed
        time = time_embedding(embed.time_proj, embed.timestep_embedder, sigmas)  # [S, D]
        emb = F.silu(time[:, None] + embed.text_embedder(pooled))  # [S, B, D]
        layers = [norm.linear for b in model.transformer_blocks for norm in (b.norm1, b.norm1_context)]
        layers += [model.norm_out.linear]
        return torch.cat([layer(emb) for layer in layers], dim=-1), model.context_embedder(prompt_embeds)


def image_stream(attn: Part, x: Tensor) -> Stream:
    """Queries, keys and values of the image x [B, m, D]."""
    norms = [norm for norm in (attn.norm_q, attn.norm_k) if norm is not None]
    return stream(x, (attn.to_q, attn.to_k, attn.to_v), norms, attn.inner_dim // attn.heads)


def text_stream(attn: Part, c: Tensor) -> Stream:
    """Those of the text c [B, T, D]."""
    norms = [norm for norm in (attn.norm_added_q, attn.norm_added_k) if norm is not None]
    return stream(c, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), norms, attn.inner_dim // attn.heads)


def attend(attn: Part, streams: Sequence[Stream]) -> Tensor:
    """Attention over all streams, [B, L, D]."""
    return attention(streams, eps=EPS, int8=runs_in_int8(attn.to_q)).flatten(2)


def image_update(
    block: Part, image: Tensor, c: Tensor, modulation: Tensor, memo: Keep | None = None
) -> tuple[Tensor, Tensor]:
    """The image [B, m, D] after a block, and what attention makes of the text, which comes modulated: c [B, T, D]."""
    vectors = modulation.chunk(image_width(block), dim=-1)
    shift, scale, gate, shift_ff, scale_ff, gate_ff = vectors[:6]
    attn, norm = block.attn, block.norm1.norm
    x = modulate(norm, image, shift, scale)
    streams = [image_stream(attn, x), text_stream(attn, c)]
    a = attend(attn, streams)
    a, c = a.split([image.shape[1], c.shape[1]], dim=1)
    found = [run_linear(attn.to_out[0], a, wide=True)]
    y = gated(image, gate, found[0])
    if block.use_dual_attention:
        shift_2, scale_2, gate_2 = vectors[6:]
        again = block.attn2
        a = attend(again, [image_stream(again, modulate(norm, image, shift_2, scale_2))])
        found.append(run_linear(again.to_out[0], a, wide=True))
        y = gated(y, gate_2, found[1])
    update = feed_forward(block.ff, modulate(block.norm2, y, shift_ff, scale_ff))
    if memo is not None:
        memo.score(streams[:1] if block.context_pre_only else streams)
        memo.keep(update, *found)
    return gated(y, gate_ff, update), c


def refreshed_image(block: Part, image: Tensor, modulation: Tensor, memo: Refresh) -> Tensor:
    """The image [B, m, D] after a block whose attentions are cached, and of whose MLP a part is."""
    _, _, gate, shift_ff, scale_ff, gate_ff, *further = modulation.chunk(image_width(block), dim=-1)
    for its_gate in (gate, *further[2:]):
        image = gated(image, its_gate, memo.attention(image))
    return memo.refreshed(
        image, gate_ff, lambda x: feed_forward(block.ff, modulate(block.norm2, x, shift_ff, scale_ff))
    )


def joint_block(
    block: Part, image: Tensor, text: Tensor, modulation: Tensor, memo: Memo | None = None
) -> tuple[Tensor, Tensor]:
    """Joint attention of image [B, m, D] and text [B, T, D] with weights of their own; modulation [B, 12 or 15 D]."""
    d = image.shape[-1]
    mine, theirs = modulation.split([image_width(block) * d, 6 * d], dim=-1)
    shift, scale, gate, shift_ff, scale_ff, gate_ff = theirs.chunk(6, dim=-1)

    def mlp(text: Tensor) -> Tensor:
        return feed_forward(block.ff_context, modulate(block.norm2_context, text, shift_ff, scale_ff))

    if memo is not None and not memo.attends:
        image = refreshed_image(block, image, mine, memo)
        return image, memo.refreshed(gated(text, gate, memo.attention(text)), gate_ff, mlp)
    image, c = image_update(block, image, modulate(block.norm1_context.norm, text, shift, scale), mine, memo)
    found = run_linear(block.attn.to_add_out, c, wide=True)
    text = gated(text, gate, found)
    update = mlp(text)
    if memo is not None:
        memo.keep(update, found)
    return image, gated(text, gate_ff, update)


def last_block(
    block: Part, image: Tensor, text: Tensor, modulation: Tensor, memo: Memo | None = None
) -> Tensor:
    """The same without what would become of the text; modulation [B, 8 or 11 D]."""
    d = image.shape[-1]
    mine, theirs = modulation.split([image_width(block) * d, 2 * d], dim=-1)
    if memo is not None and not memo.attends:
        return refreshed_image(block, image, mine, memo)
    scale, shift = theirs.chunk(2, dim=-1)
    return image_update(block, image, modulate(block.norm1_context.norm, text, shift, scale), mine, memo)[0]


class SD3Stage(TransformerStage):
    """One evaluation of the transformer on the active tokens.

    tokens [B, m, C], positions [B, m, D], modulation [B, M], context [B, T, D] -> velocity [B, m, C].
    """

    #: Functions of repeated blocks, which a backend may compile once for all blocks.
    regions = ("joint_block", "last_block")
    joint_block, last_block = staticmethod(joint_block), staticmethod(last_block)

    def forward(
        self, tokens: Tensor, positions: Tensor, modulation: Tensor, context: Tensor, *kept: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        model, layers = self.transformer, self.transformer.transformer_blocks
        widths = [image_width(b) + context_width(b) for b in layers]
        *parts, out = modulation.split([w * model.inner_dim for w in (*widths, 2)], dim=-1)

        # A convolution of patches that do not overlap is a linear layer of tokens.
        embed = model.pos_embed.proj
        image = F.linear(tokens, embed.weight.flatten(1), embed.bias)
        image = (image + positions).to(tokens.dtype)

        def block(i: int, image: Tensor, text: Tensor, *memo: Memo) -> tuple[Tensor, Tensor]:
            if i == len(layers) - 1:
                return self.last_block(layers[i], image, text, parts[i], *memo), text
            return self.joint_block(layers[i], image, text, parts[i], *memo)

        def output(image: Tensor) -> Tensor:
            # The model writes a token's channels last, and reads them first: [p, q, C] -> [C, p, q].
            return last_layer(model, image, out).unflatten(-1, (PATCH**2, -1)).transpose(-1, -2).flatten(-2)

        first_input = partial(modulated, layers[0].norm1.norm, parts[0])
        depth = len(layers)
        return self.act(Evaluation(image, context, depth, depth // 2, in_turn(block), output, first_input), kept)


class SD3Adapter(ModelAdapter):
    """A Stable Diffusion 3 or 3.5 pipeline in diffusers' format, with or without its T5.

    Where a checkpoint's table of positions is not the one that diffusers would make, `configs` has an entry "positions"
    with the coordinates of its first place and the step between places.
    """

    family = "StableDiffusion3Pipeline"
    classes: ClassVar = {
        "transformer": "diffusers:SD3Transformer2DModel",
        "vae": "diffusers:AutoencoderKL",
        "text_encoder": "transformers:CLIPTextModelWithProjection",
        "text_encoder_2": "transformers:CLIPTextModelWithProjection",
        "text_encoder_3": "transformers:T5EncoderModel",
    }
    optional = ("text_encoder_3",)
    tokenizer_folders = ("tokenizer", "tokenizer_2", "tokenizer_3")
    naming = NAMING
    published = SD3

    def __init__(
        self,
        components: Mapping[str, nn.Module],
        configs: Configs,
        tokenizers: Sequence[Tokenizer],
        settings: Mapping[str, Any],
    ) -> None:
        transformer: Part = components["transformer"]
        config, values = transformer.config, transformer.pos_embed.pos_embed
        if config.pos_embed_max_size and not values.is_meta:
            expected = table_of({"transformer": dict(config)})
            found = read_table(values, config.pos_embed_max_size, expected)
            if found != expected:
                configs = {**configs, "positions": {"first": list(found.first), "step": found.step}}
        super().__init__(components, configs, tokenizers, settings)

    @classmethod
    def check(cls, configs: Configs, settings: Mapping[str, Any]) -> None:
        """Refuse transformers that only look like Stable Diffusion 3's, and more text than diffusers takes."""
        config = configs["transformer"]
        channels, out = config["in_channels"], config.get("out_channels")
        checks = {
            f"{channels} channels in, {out} out": out in (None, channels),
            f"patches of {config.get('patch_size')}": config.get("patch_size", PATCH) == PATCH,
            "no table of positions": config.get("pos_embed_max_size"),
            f"norms {config.get('qk_norm')} of queries and keys": config.get("qk_norm") in (None, "rms_norm"),
        }
        if wrong := [found for found, right in checks.items() if not right]:
            raise UnsupportedModelError(
                "a transformer that is not Stable Diffusion 3's or 3.5's", found=", ".join(wrong),
                expected="a text-to-image model: as many channels out as in, patches of 2, RMS norms or none",
            )
        if settings["max_sequence_length"] > 512:
            raise InputError(
                "too many text tokens", found=settings["max_sequence_length"], expected="at most 512 of T5"
            )

    @classmethod
    def usual(cls, configs: Configs) -> dict[str, Any]:
        return {
            "height": 1024,
            "width": 1024,
            "max_sequence_length": 256,
            "guidance_scale": 7.0,
            "num_inference_steps": 28,
            "quantization": None,
            "features": None,
        }

    @classmethod
    def geometry_of(cls, configs: Configs, settings: Mapping[str, Any]) -> ModelGeometry:
        config = configs["transformer"]
        pixels = 2 ** (len(configs["vae"]["block_out_channels"]) - 1) * PATCH
        grid, size = image_grid(settings, pixels), config["pos_embed_max_size"]
        if max(grid.shape) > size:
            raise InputError(
                "the image is larger than the model's table of positions",
                found=f"{settings['height']} x {settings['width']}",
                expected=f"sides of at most {size * pixels} pixels",
            )
        return ModelGeometry(
            grid=grid,
            latent_shape=(config["in_channels"], grid.shape[0] * PATCH, grid.shape[1] * PATCH),
            patch=PATCH,
            height=settings["height"],
            width=settings["width"],
            positions=cropped(table_of(configs), size, grid.shape),
            text_tokens=configs["text_encoder"]["max_position_embeddings"] + settings["max_sequence_length"],
        )

    @classmethod
    def defaults_of(cls, configs: Configs, settings: Mapping[str, Any]) -> ModelDefaults:
        """diffusers runs no second pass with a scale of 1 or less, such as the 0 of SD3.5-large-turbo."""
        guidance = Guidance(true=max(1.0, settings["guidance_scale"]), argument="guidance_scale", negative="")
        return ModelDefaults(guidance, settings["num_inference_steps"])

    def arrange(self) -> None:
        """Positions are inputs of the stages."""
        self.components["transformer"].pos_embed.pos_embed = None

    @classmethod
    def cells(cls, configs: Configs) -> tuple[Cell, ...]:
        config = configs["transformer"]
        first, twice = config["num_layers"] - 1, config.get("dual_attention_layers") or ()
        text, once = joint_cells(first + 1, "text"), joint_cells(first + 1, "image")
        image = [cell._replace(attentions=1 + (i in twice)) for i, cell in enumerate(once)]
        return (*(cell for pair in zip(image[:first], text[:first], strict=True) for cell in pair), image[first])

    @classmethod
    def tokenizer(cls, folder: str, configs: Configs, settings: Mapping[str, Any]) -> Tokenizer:
        clip = configs["text_encoder"]["max_position_embeddings"]
        return Tokenizer(folder, "", settings["max_sequence_length"] if folder == "tokenizer_3" else clip)

    def native_sigmas(self, n: int) -> tuple[float, ...]:
        """As StableDiffusion3Pipeline sets them: the scheduler's own, which end with a tiny step."""
        return flow_sigmas(self.configs["scheduler"], n, mu=self._log_shift(), linear=False)

    def _log_shift(self) -> float:
        return resolution_shift(self.configs["scheduler"], self.geometry.grid.tokens)

    def shift(self, n: int) -> float:
        """The scheduler's: its last noise level but one is not on the curve."""
        return scheduler_shift(self.configs["scheduler"], self._log_shift())

    def text_spec(self, batch: int, dtype: str) -> EngineSpec:
        clip = self.configs["text_encoder"]["max_position_embeddings"]
        ids = [TensorSpec(name, (batch, clip), "int64") for name in ("clip_ids", "clip_ids_2")]
        if "text_encoder_3" in self.components:
            ids.append(TensorSpec("t5_ids", (batch, self._settings["max_sequence_length"]), "int64"))
        return EngineSpec("text", tuple(ids), self._embeddings(batch, dtype))

    def _embeddings(self, batch: int, dtype: str) -> tuple[TensorSpec, ...]:
        config = self.components["transformer"].config
        return (
            TensorSpec("prompt_embeds", (batch, self.geometry.text_tokens, config.joint_attention_dim), dtype),
            TensorSpec("pooled", (batch, config.pooled_projection_dim), dtype),
        )

    def condition_spec(self, batch: int, steps: int, dtype: str) -> EngineSpec:
        transformer = self.components["transformer"]
        d = transformer.inner_dim
        width = d * (sum(image_width(b) + context_width(b) for b in transformer.transformer_blocks) + 2)
        return EngineSpec(
            "condition",
            (*self._embeddings(batch, dtype), TensorSpec("sigmas", (steps,), "fp32")),
            (
                TensorSpec("modulation", (steps, batch, width), dtype, per_step=True),
                TensorSpec("context", (batch, self.geometry.text_tokens, d), dtype),
            ),
        )

    def module(self, name: str) -> nn.Module:
        parts = self.components
        if name == "text":
            module: nn.Module = SD3Text(
                parts["text_encoder"], parts["text_encoder_2"], parts.get("text_encoder_3"),
                tokens=self._settings["max_sequence_length"], width=parts["transformer"].config.joint_attention_dim,
            )
        elif name == "condition":
            module = SD3Condition(parts["transformer"])
        elif name in ("preview", "decode"):
            grid = self.geometry.grid
            module = PackedDecode(parts["vae"], grid.halved() if name == "preview" else grid, PATCH)
        else:
            module = SD3Stage(parts["transformer"], self.act(name))
        return module.eval()


def table_of(configs: Configs) -> SinCos:
    """A model's whole table of positions: what its checkpoint was found to have, or else what diffusers makes."""
    config = configs["transformer"]
    width, size = config["num_attention_heads"] * config["attention_head_dim"], config["pos_embed_max_size"]
    if found := configs.get("positions"):
        return SinCos(width, tuple(found["first"]), found["step"])
    return published_table(width, size, config["sample_size"] // PATCH)
