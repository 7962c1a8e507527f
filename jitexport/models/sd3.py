"""Stable Diffusion 3 and 3.5, in diffusers' format.

Every block is of two streams, image and text; those of SD3.5-medium's first half look at the image a second time. The
model has no rotary embedding: sines and cosines of a token's place are added to it once, before the first block.
As FLUX's, the modulation depends on the prompt and the noise level, and is computed once per image by `SD3Condition`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jitexport.errors import UnsupportedModelError
from jitexport.kernels.attention import Stream, attention
from jitexport.models.flux import feed_forward, gated, modulate, run_linear, runs_in_int8, stream
from jitexport.specs import TensorSpec

if TYPE_CHECKING:
    from diffusers import SD3Transformer2DModel
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
class SinCos:
    """Places as vectors that are added to the tokens: sines and cosines of the column, then those of the row.

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
        """The stage's input."""
        return (TensorSpec("positions", (batch, tokens, self.width), "fp32"),)

    def tables(self, places: Tensor) -> dict[str, Tensor]:
        """Vectors of places [P, 2], which may be fractions: [P, D], fp32.

        Coordinates are rounded to fp32 and angles are not, as in diffusers.
        """
        first = torch.tensor(self.first, dtype=torch.float64, device=places.device)
        row, column = (first + self.step * places.double()).float().double().unbind(-1)
        frequencies = _frequencies(self.width, places.device)
        angles = [torch.outer(axis, frequencies) for axis in (column, row)]
        return {"positions": torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=-1).float()}

    def gather(self, tables: dict[str, Tensor], where: Tensor) -> dict[str, Tensor]:
        """Vectors of the places at `where` [B, m]: [B, m, D]."""
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
    column, row = (_coordinates(part) for part in (rows[0].chunk(2, -1)[0], rows[:, 0].chunk(2, -1)[1]))
    steps = [_line(x) for x in (row, column)]
    found = SinCos(expected.width, (steps[0][0], steps[1][0]), (steps[0][1] + steps[1][1]) / 2)
    if not _agrees(rows, found):
        raise UnsupportedModelError(
            "the transformer's table of positions follows no rule that is known",
            found=f"pos_embed.pos_embed {list(values.shape)}",
            expected="sines and cosines of evenly spaced coordinates, from which places between them are computed",
        )
    return found


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


class SD3Condition(nn.Module):
    """Everything of the transformer that does not see the image.

    prompt_embeds [B, T, E], pooled [B, P], sigmas [S] -> modulation [S, B, M], context [B, T, D].

    M holds, in this order, the vectors of each block (image 6 D, or 9 D with a second attention; text 6 D, in the last
    block 2 D), and of the output norm (2 D).
    """

    def __init__(self, transformer: SD3Transformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, prompt_embeds: Tensor, pooled: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        model = self.transformer
        embed = model.time_text_embed
        time = embed.timestep_embedder(embed.time_proj(sigmas.float() * 1000).to(pooled.dtype))  # [S, D]
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


def image_update(block: nn.Module, image: Tensor, c: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
    """The image [B, m, D] after a block, and what attention makes of the text, which comes modulated: c [B, T, D]."""
    vectors = modulation.chunk(image_width(block), dim=-1)
    shift, scale, gate, shift_ff, scale_ff, gate_ff = vectors[:6]
    attn, norm = block.attn, block.norm1.norm
    x = modulate(norm, image, shift, scale)
    a = attend(attn, [image_stream(attn, x), text_stream(attn, c)])
    a, c = a.split([image.shape[1], c.shape[1]], dim=1)
    y = gated(image, gate, run_linear(attn.to_out[0], a, wide=True))
    if block.use_dual_attention:
        shift_2, scale_2, gate_2 = vectors[6:]
        again = block.attn2
        a = attend(again, [image_stream(again, modulate(norm, image, shift_2, scale_2))])
        y = gated(y, gate_2, run_linear(again.to_out[0], a, wide=True))
    return gated(y, gate_ff, feed_forward(block.ff, modulate(block.norm2, y, shift_ff, scale_ff))), c


def joint_block(block: nn.Module, image: Tensor, text: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
    """Joint attention of image [B, m, D] and text [B, T, D] with weights of their own; modulation [B, 12 or 15 D]."""
    d = image.shape[-1]
    mine, theirs = modulation.split([image_width(block) * d, 6 * d], dim=-1)
    shift, scale, gate, shift_ff, scale_ff, gate_ff = theirs.chunk(6, dim=-1)
    image, c = image_update(block, image, modulate(block.norm1_context.norm, text, shift, scale), mine)
    text = gated(text, gate, run_linear(block.attn.to_add_out, c, wide=True))
    update = feed_forward(block.ff_context, modulate(block.norm2_context, text, shift_ff, scale_ff))
    return image, gated(text, gate_ff, update)


def last_block(block: nn.Module, image: Tensor, text: Tensor, modulation: Tensor) -> Tensor:
    """The same without what would become of the text; modulation [B, 8 or 11 D]."""
    d = image.shape[-1]
    mine, theirs = modulation.split([image_width(block) * d, 2 * d], dim=-1)
    scale, shift = theirs.chunk(2, dim=-1)
    return image_update(block, image, modulate(block.norm1_context.norm, text, shift, scale), mine)[0]


class SD3Stage(nn.Module):
    """One evaluation of the transformer on the active tokens.

    tokens [B, m, C], positions [B, m, D], modulation [B, M], context [B, T, D] -> velocity [B, m, C].
    """

    #: Functions of repeated blocks, which a backend may compile once for all blocks.
    regions = ("joint_block", "last_block")
    joint_block, last_block = staticmethod(joint_block), staticmethod(last_block)

    def __init__(self, transformer: SD3Transformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, tokens: Tensor, positions: Tensor, modulation: Tensor, context: Tensor) -> Tensor:
        model = self.transformer
        widths = [image_width(b) + context_width(b) for b in model.transformer_blocks]
        *parts, out = modulation.split([w * model.inner_dim for w in (*widths, 2)], dim=-1)

        # A convolution of patches that do not overlap is a linear layer of tokens.
        embed = model.pos_embed.proj
        image, text = F.linear(tokens, embed.weight.flatten(1), embed.bias), context
        image = (image + positions).to(tokens.dtype)
        for block, part in zip(model.transformer_blocks[:-1], parts[:-1], strict=True):
            image, text = self.joint_block(block, image, text, part)
        image = self.last_block(model.transformer_blocks[-1], image, text, parts[-1])
        scale, shift = out.chunk(2, dim=-1)
        velocity = model.proj_out(modulate(model.norm_out.norm, image, shift, scale))
        # The model writes a token's channels last, and reads them first: [p, q, C] -> [C, p, q].
        return velocity.unflatten(-1, (PATCH**2, -1)).transpose(-1, -2).flatten(-2)
