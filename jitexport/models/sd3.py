"""Stable Diffusion 3 and 3.5, in diffusers' format.

Every block is of two streams, image and text; those of SD3.5-medium's first half look at the image a second time. The
model has no rotary embedding: sines and cosines of a token's place are added to it once, before the first block.
As FLUX's, the modulation depends on the prompt and the noise level, and is computed once per image by `SD3Condition`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jitexport.errors import InputError, UnsupportedModelError
from jitexport.guidance import Guidance
from jitexport.kernels.attention import Stream, attention
from jitexport.models.base import Configs, ModelAdapter, ModelDefaults, ModelGeometry, Published, image_grid
from jitexport.models.components import AUTOENCODER_16, T5_XXL, clip
from jitexport.models.layers import (
    PackedDecode,
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
from jitexport.models.naming import ADDED, FUSED, QKV, TRANSFORMER, Aliases, Naming, Prefix, Target
from jitexport.models.schedulers import flow_sigmas, resolution_shift, scheduler_shift
from jitexport.models.stages import Evaluation, TransformerStage, in_turn
from jitexport.models.tokens import Cell, Keep, Memo, Refresh, joint_cells
from jitexport.positions import Positions, Tables
from jitexport.prompting import Tokenizer
from jitexport.specs import EngineSpec, TensorSpec

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

PATCH = 2  # a token is 2 x 2 latent pixels
EPS = 1e-6  # of the norms of queries and keys

# --- positions -------------------------------------------------------------------------------------------------------

LONGEST = 10000.0  # wavelengths rise from 2 pi to this, times 2 pi

#: A table may be stored in bf16, whose numbers below 1 are this close to each other.
TABLE_TOLERANCE = 4e-3


@cache
def _frequencies(width: int, device: torch.device | None) -> Tensor:
    """Of the D / 4 waves of an axis, fp64, fast to slow."""
    waves = torch.arange(width // 4, dtype=torch.float64, device=device)
    return LONGEST ** (-4 * waves / width)


@dataclass(frozen=True)
class SinCos(Positions):
    """Places as vectors that are added to the tokens: an input `positions` [B, m, D], fp32.

    They are sines and cosines of the column, then those of the row.

    The coordinate of place p on an axis is first + step * p.

    Attributes:
        width: D, channels of the transformer.
        first: coordinates of the grid's first token, row and column.
        step: between neighbouring tokens.
    """

    width: int
    first: tuple[float, float]
    step: float

    def specs(self, batch: int, tokens: int, dtype: str) -> tuple[TensorSpec, ...]:
        return (TensorSpec("positions", (batch, tokens, self.width), "fp32"),)

    def tables(self, places: Tensor) -> Tables:
        """Coordinates are rounded to fp32 and angles are not, as in diffusers."""
        first = torch.tensor(self.first, dtype=torch.float64, device=places.device)
        row, column = (first + self.step * places.double()).float().double().unbind(-1)
        frequencies = _frequencies(self.width, places.device)
        angles = [torch.outer(axis, frequencies) for axis in (column, row)]
        return {"positions": torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=-1).float()}

    def gather(self, tables: Tables, where: Tensor) -> dict[str, Tensor]:
        table = tables["positions"]
        return {"positions": table.index_select(0, where.flatten()).unflatten(0, where.shape)}


def published_table(width: int, size: int, base: int) -> SinCos:
    """The table that diffusers makes: `size` rows and columns, coordinates from 0 to `base`."""
    return SinCos(width, (0.0, 0.0), base / size)


def cropped(table: SinCos, size: int, grid: tuple[int, int]) -> SinCos:
    """The middle of a table of `size` x `size` places, as diffusers crops it for a grid of tokens."""
    row, column = (first + table.step * ((size - n) // 2) for first, n in zip(table.first, grid, strict=True))
    return SinCos(table.width, (row, column), table.step)


def read_table(values: Tensor, size: int, expected: SinCos) -> SinCos:
    """What a checkpoint's table [1, size^2, D] is made by: `expected`, or one of other coordinates.

    Raises:
        UnsupportedModelError: it is not made by sines and cosines of evenly spaced coordinates.
    """
    rows = values.detach().reshape(size, size, -1)
    if _agrees(rows, expected):
        return expected
    (column, step), (row, _) = (_line(_coordinates(x)) for x in (rows[0].chunk(2, -1)[0], rows[:, 0].chunk(2, -1)[1]))
    found = SinCos(expected.width, (row, column), step)
    simple = SinCos(expected.width, (_simple(row), _simple(column)), _simple(step))  # without what rounding has added
    for table in (simple, found):
        if _agrees(rows, table):
            return table
    raise UnsupportedModelError(
        "the transformer's table of positions follows no rule that is known",
        found=f"pos_embed.pos_embed {list(values.shape)}",
        expected="sines and cosines of evenly spaced coordinates, from which places between them are computed",
    )


def _agrees(rows: Tensor, table: SinCos) -> bool:
    """Whether rows [S, S, D] are a table's, up to rounding. Row by row: SD3.5-medium's table has 226 million values."""
    size = rows.shape[0]
    line = torch.arange(size, device=rows.device)
    return all(
        (row.float() - table.tables(torch.stack([torch.full_like(line, i), line], -1))["positions"]).abs().max()
        <= TABLE_TOLERANCE
        for i, row in enumerate(rows)
    )


def _coordinates(vectors: Tensor) -> Tensor:
    """The coordinates whose sines and cosines are vectors [n, D / 2]: [n], fp64.

    From the slow waves, which are unambiguous, to the fast ones, which are exact.
    """
    sine, cosine = vectors.double().chunk(2, dim=-1)
    angles, frequencies = torch.atan2(sine, cosine), _frequencies(2 * vectors.shape[-1], vectors.device)
    x = torch.zeros_like(angles[:, 0])
    for angle, frequency in zip(angles.T.flip(0), frequencies.flip(0), strict=True):
        x = x + (torch.remainder(angle - x * frequency + math.pi, 2 * math.pi) - math.pi) / frequency
    return x


def _line(x: Tensor) -> tuple[float, float]:
    """Start and step of the even spacing that is closest to x [n]."""
    n = torch.arange(len(x), dtype=x.dtype, device=x.device)
    n = n - n.mean()
    step = float((n * x).sum() / (n * n).sum())
    return float(x.mean()) + step * float(n[0]), step


def _simple(x: float) -> float:
    """A fraction of small numbers close to x."""
    return float(Fraction(x).limit_denominator(64))


# --- modules ---------------------------------------------------------------------------------------------------------


class SD3Text(nn.Module):
    """The text encoders: ids of both CLIPs [B, L] and, where it is there, of T5 [B, T] -> states, pooled states.

    States [B, L + T, E]: those of both CLIPs side by side, widened with zeros, then T5's, zeros without it. Pooled
    states [B, P], CLIP's side by side.
    """

    def __init__(
        self,
        text_encoder: CLIPTextModelWithProjection,
        text_encoder_2: CLIPTextModelWithProjection,
        text_encoder_3: T5EncoderModel | None,
        *,
        tokens: int,
        width: int,
    ) -> None:
        """`tokens` T of T5, `width` E of the states that the transformer takes."""
        super().__init__()
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2
        if text_encoder_3 is not None:
            self.text_encoder_3 = text_encoder_3
        self.tokens, self.width = tokens, width

    def forward(self, *ids: Tensor) -> tuple[Tensor, Tensor]:
        encoders = (self.text_encoder, self.text_encoder_2)
        states, pooled = zip(*(clip_states(e, i) for e, i in zip(encoders, ids[:2], strict=True)), strict=True)
        clip = torch.cat(states, dim=-1)
        clip = F.pad(clip, (0, self.width - clip.shape[-1]))
        if hasattr(self, "text_encoder_3"):
            t5 = self.text_encoder_3(ids[2])[0]
        else:
            t5 = clip.new_zeros(clip.shape[0], self.tokens, self.width)
        return torch.cat([clip, t5], dim=1), torch.cat(pooled, dim=-1)


def clip_states(encoder: CLIPTextModelWithProjection, ids: Tensor) -> tuple[Tensor, Tensor]:
    """A CLIP text encoder's states before its last layer [B, L, E], and its projected state of the prompt's end."""
    model = encoder.text_model
    x = model.embeddings(input_ids=ids)
    length = ids.shape[1]
    later = torch.full((length, length), torch.finfo(x.dtype).min, dtype=x.dtype, device=x.device).triu(1)
    states = x
    for layer in model.encoder.layers:
        states, x = x, layer(x, later[None, None])
    # Older configurations say 2 whatever the token is; the end is then the token with the highest number.
    marks = ids if model.eos_token_id == 2 else (ids == model.eos_token_id)
    end = x[torch.arange(len(x), device=x.device), marks.int().argmax(dim=-1)]
    return states, encoder.text_projection(model.final_layer_norm(end))


def context_width(block: nn.Module) -> int:
    """Modulation vectors of a block's text; the last block needs its text for attention only."""
    return 2 if block.context_pre_only else 6


def image_width(block: nn.Module) -> int:
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


def image_stream(attn: nn.Module, x: Tensor) -> Stream:
    """Queries, keys and values of the image x [B, m, D]."""
    norms = [norm for norm in (attn.norm_q, attn.norm_k) if norm is not None]
    return stream(x, (attn.to_q, attn.to_k, attn.to_v), norms, attn.inner_dim // attn.heads)


def text_stream(attn: nn.Module, c: Tensor) -> Stream:
    """Those of the text c [B, T, D]."""
    norms = [norm for norm in (attn.norm_added_q, attn.norm_added_k) if norm is not None]
    return stream(c, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), norms, attn.inner_dim // attn.heads)


def attend(attn: nn.Module, streams: Sequence[Stream]) -> Tensor:
    """Attention over all streams, [B, L, D]."""
    return attention(streams, eps=EPS, int8=runs_in_int8(attn.to_q)).flatten(2)


def image_update(
    block: nn.Module, image: Tensor, c: Tensor, modulation: Tensor, memo: Keep | None = None
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


def refreshed_image(block: nn.Module, image: Tensor, modulation: Tensor, memo: Refresh) -> Tensor:
    """The image [B, m, D] after a block whose attentions are cached, and of whose MLP a part is."""
    _, _, gate, shift_ff, scale_ff, gate_ff, *further = modulation.chunk(image_width(block), dim=-1)
    for its_gate in (gate, *further[2:]):
        image = gated(image, its_gate, memo.attention(image))
    return memo.refreshed(
        image, gate_ff, lambda x: feed_forward(block.ff, modulate(block.norm2, x, shift_ff, scale_ff))
    )


def joint_block(
    block: nn.Module, image: Tensor, text: Tensor, modulation: Tensor, memo: Memo | None = None
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
    block: nn.Module, image: Tensor, text: Tensor, modulation: Tensor, memo: Memo | None = None
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


# --- names of the same modules elsewhere -----------------------------------------------------------------------------

PREFIXES = (
    *TRANSFORMER,
    Prefix("text_encoder.", "text_encoder"),
    Prefix("text_encoder_2.", "text_encoder_2"),
    Prefix("text_encoder_3.", "text_encoder_3"),
    Prefix("text_encoders.clip_l.transformer.", "text_encoder"),
    Prefix("text_encoders.clip_g.transformer.", "text_encoder_2"),
    Prefix("text_encoders.t5xxl.transformer.", "text_encoder_3"),
    Prefix("lora_te1_", "text_encoder", flat=True),
    Prefix("lora_te2_", "text_encoder_2", flat=True),
    Prefix("lora_te3_", "text_encoder_3", flat=True),
)

AGAIN = ("attn2.to_q", "attn2.to_k", "attn2.to_v")  # of SD3.5-medium's second attention

#: {name in a block of the authors: names in diffusers' block}
BLOCK = {
    "x_block.attn.qkv": QKV,
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn.ln_q": ("attn.norm_q",),
    "x_block.attn.ln_k": ("attn.norm_k",),
    "x_block.attn2.qkv": AGAIN,
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.attn2.ln_q": ("attn2.norm_q",),
    "x_block.attn2.ln_k": ("attn2.norm_k",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.attn.qkv": ADDED,
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.attn.ln_q": ("attn.norm_added_q",),
    "context_block.attn.ln_k": ("attn.norm_added_k",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}
OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}


def aliases(modules: Iterable[str]) -> dict[str, Target]:
    """See `jitexport.models.naming.Naming`."""
    names = Aliases(modules)
    blocks = names.blocks("transformer_blocks")
    for block in blocks:
        names.add_all(block.replace("transformer_blocks", "joint_blocks"), block, BLOCK)
        names.add_all(block, block, FUSED | {"attn2.to_qkv": AGAIN}, partial=True)
    for name, part in OUTSIDE.items():
        names.add(name, [part])
    # The last block's text has scale and shift alone, as the output's norm.
    for block in blocks[-1:]:
        theirs = block.replace("transformer_blocks", "joint_blocks")
        names.add(f"{theirs}.context_block.adaLN_modulation.1", [f"{block}.norm1_context.linear"], swapped=True)
    names.add("final_layer.adaLN_modulation.1", ["norm_out.linear"], swapped=True)
    return names.found


NAMING = Naming(PREFIXES, aliases)

# --- the published models --------------------------------------------------------------------------------------------


def _published(hub_id: str, blocks: int, heads: int, transformer: dict[str, Any], **settings: Any) -> Published:
    configs = {
        "transformer": {
            "sample_size": 128,
            "patch_size": PATCH,
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


PUBLISHED = {
    "sd3": _published("stabilityai/stable-diffusion-3-medium-diffusers", 24, 24, {"qk_norm": None}),
    "sd3.5-medium": _published(
        "stabilityai/stable-diffusion-3.5-medium", 24, 24,
        {"pos_embed_max_size": 384, "dual_attention_layers": list(range(13))},
    ),
    "sd3.5-large": _published("stabilityai/stable-diffusion-3.5-large", 38, 38, {}),
    "sd3.5-large-turbo": _published(
        "stabilityai/stable-diffusion-3.5-large-turbo", 38, 38, {}, guidance_scale=0.0, num_inference_steps=4
    ),
}


# --- the adapter -----------------------------------------------------------------------------------------------------


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
    published = PUBLISHED

    def __init__(
        self,
        components: Mapping[str, nn.Module],
        configs: Configs,
        tokenizers: Sequence[Tokenizer],
        settings: Mapping[str, Any],
    ) -> None:
        config, values = components["transformer"].config, components["transformer"].pos_embed.pos_embed
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
        image, text = (joint_cells(first + 1, stream) for stream in ("image", "text"))
        image = [cell._replace(attentions=1 + (i in twice)) for i, cell in enumerate(image)]
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
