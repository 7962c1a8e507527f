"""What the demo model predicts, for sets of tokens that differ within a batch, and the batches it is trained on."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from networks import GRID, SHIFT, Models, shifted
from shards import TEXT_TOKENS, Shard, caption_ids, padding_tokenizer
from torch import nn

NEUTRAL = 1.0  # the guidance input where it guides nothing
TRAINED_SHIFT = 2 * SHIFT  # of noise levels, unless a stage says otherwise
WINDOW = GRID // 2  # tokens a side of the squares that some batches see

# --- sparse token sets ------------------------------------------------------------------------------------------------


@cache
def lattice(device: torch.device) -> torch.Tensor:
    """JiT's first anchors: tokens at even row and even column, and the border. Boolean, [N]."""
    row, column = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    even = (row % 2 == 0) & (column % 2 == 0)
    border = (row == 0) | (row == GRID - 1) | (column == 0) | (column == GRID - 1)
    return (even | border).flatten().to(device)


def draw_subsets(detail: torch.Tensor, count: int) -> torch.Tensor:
    """A set of `count` tokens for each picture, as JiT's stages meet them: [B, N] -> indices [B, count].

    The lattice comes first, dropped at random where it is too large. What fills up is, with equal chances: tokens
    at random, contiguous blobs, or tokens where the picture has most detail, as later stages choose them.
    """
    batch, device = len(detail), detail.device
    noise = -torch.empty_like(detail).exponential_().log()  # Gumbel: the top values are a draw without replacement
    smooth = F.avg_pool2d(torch.randn_like(detail).view(batch, 1, GRID, GRID), 7, stride=1, padding=3).flatten(1)
    kind = torch.randint(3, (batch, 1), device=device)
    fill = noise + torch.where(kind == 1, 30 * smooth, 0) + torch.where(kind == 2, 2 * detail, 0)
    score = torch.where(lattice(device), 1e4 + noise, fill)
    return score.topk(count, dim=1).indices.sort(dim=1).values


def draw_windows(batch: int, device: torch.device) -> torch.Tensor:
    """A square of WINDOW x WINDOW tokens for each picture: indices [B, WINDOW^2].

    Seven in ten are quarters of the picture, where objects among others are; the rest lie anywhere.
    """
    quarter = WINDOW * torch.randint(GRID // WINDOW, (batch, 2), device=device)
    anywhere = torch.randint(GRID - WINDOW + 1, (batch, 2), device=device)
    corner = torch.where(torch.rand(batch, 1, device=device) < 0.7, quarter, anywhere)
    row, column = (corner[:, i, None] + torch.arange(WINDOW, device=device) for i in range(2))
    return (GRID * row[:, :, None] + column[:, None, :]).flatten(1)


# --- the transformer on sets that differ within a batch ---------------------------------------------------------------


class PerSamplePositions:
    """FLUX's attention with rotary tables [B, S, D]: the library's own take one set of positions for a whole batch."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (attn.heads, -1))  # [B, S, heads * D] -> [B, S, heads, D]

        def normed(norm: nn.RMSNorm, x: torch.Tensor) -> torch.Tensor:
            # Under autocast the weight is wider than `x`, which would keep the norm from its fused kernel.
            weight = norm.weight.to(x.dtype)
            return rms_norm(x, weight, norm.eps) if x.is_cuda else F.rms_norm(x, weight.shape, weight, norm.eps)

        query = normed(attn.norm_q, heads(attn.to_q(hidden_states)))
        key = normed(attn.norm_k, heads(attn.to_k(hidden_states)))
        value = heads(attn.to_v(hidden_states))
        if encoder_hidden_states is not None:
            text = encoder_hidden_states
            query = torch.cat([normed(attn.norm_added_q, heads(attn.add_q_proj(text))), query], dim=1)
            key = torch.cat([normed(attn.norm_added_k, heads(attn.add_k_proj(text))), key], dim=1)
            value = torch.cat([heads(attn.add_v_proj(text)), value], dim=1)
        query, key = rotate(query, image_rotary_emb), rotate(key, image_rotary_emb)
        out = attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        out = out.transpose(1, 2).flatten(2)  # [B, S, heads * D]
        if encoder_hidden_states is None:
            return out
        text, image = out.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        return attn.to_out[0](image), attn.to_add_out(text)


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of [B, heads, S, D], on a CPU by plain products.

    The way back of PyTorch's flash attention for CPUs is five times slower than these at the sizes of the run.
    """
    if query.is_cuda:
        return F.scaled_dot_product_attention(query, key, value)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm over the last dimension, by elementwise steps.

    On an H200 with torch 2.11 the first step of a run ended in an illegal memory access; without PyTorch's fused norm
    (which takes another way back where rows are more than 65,536, as they are here), without cuDNN's attention and
    without a fused kernel for the text encoders' attention, runs go well. Which of the three it was is not known.
    """
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rotate(x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary position embedding of adjacent channel pairs: x [B, S, heads, D], tables [B, S, D]."""
    cos, sin = (table[:, :, None] for table in tables)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (x.float() * cos + turned * sin).to(x.dtype)


def rotary_tables(transformer: FluxTransformer2DModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the text's and all image tokens' positions: two tables [T + N, D]."""
    row, column = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    image = torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1)  # [N, 3]
    return transformer.pos_embed(torch.cat([torch.zeros(TEXT_TOKENS, 3, dtype=image.dtype), image]))


def predict_velocity(
    transformer: FluxTransformer2DModel,
    tokens: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    text: torch.Tensor,
    pooled: torch.Tensor,
    sigma: torch.Tensor,
    guidance: torch.Tensor,
) -> torch.Tensor:
    """FluxTransformer2DModel.forward with per-sample positions: tokens [B, m, C], tables [B, T + m, D] -> [B, m, C]."""
    condition = transformer.time_text_embed(sigma * 1000, guidance * 1000, pooled)
    image, text = transformer.x_embedder(tokens), transformer.context_embedder(text)
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        text, image = block(hidden_states=image, encoder_hidden_states=text, temb=condition, image_rotary_emb=tables)
    return transformer.proj_out(transformer.norm_out(image, condition))


# --- the loss ---------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """What a step is made from. B pictures, m tokens of each, at the positions `active` of the grid of 32 x 32."""

    clean: torch.Tensor  # [B, m, C]
    noise: torch.Tensor  # [B, m, C]
    sigma: torch.Tensor  # [B]
    active: torch.Tensor  # [B, m]
    t5_ids: torch.Tensor  # [B, T]
    clip_ids: torch.Tensor  # [B, T]

    @property
    def noisy(self) -> torch.Tensor:
        return torch.lerp(self.clean, self.noise, self.sigma[:, None, None])


def draw_sigma(count: int, device: torch.device, shift: float) -> torch.Tensor:
    """Noise levels: logit-normal, shifted.

    What a caption leaves open is decided at high levels, and there the model is slowest to learn: a training shifts
    further than its sampler.
    """
    return shifted(torch.randn(count, device=device).sigmoid(), shift)


def all_positions(device: torch.device) -> torch.Tensor:
    """Those of the whole grid: [N]."""
    return torch.arange(GRID * GRID, device=device)


def empty_ids(models: Models, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token numbers of the empty caption, for both encoders: two tensors [T]."""
    t5_ids, clip_ids = prompt_ids(models, [""], device)
    return t5_ids[0], clip_ids[0]


def prompt_ids(models: Models, prompts: Sequence[str], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token numbers of captions, for both encoders: two tensors [B, T]."""
    t5_ids, clip_ids = (
        torch.from_numpy(caption_ids(padding_tokenizer(tokenizer), [prompts])[0]).to(device)
        for tokenizer in (models.t5_tokenizer, models.clip_tokenizer)
    )
    return t5_ids, clip_ids


def draw_batch(
    shard: Shard,
    count: int,
    size: int,
    empty: tuple[torch.Tensor, torch.Tensor],
    drop: float,
    *,
    window: bool = False,
    shift: float = TRAINED_SHIFT,
) -> Batch:
    """`size` scenes of a shard, `count` tokens of each, or a square; the caption is empty with chance `drop`."""
    device, tokens = shard.latents.device, shard.latents.shape[1]
    index = torch.randint(len(shard.latents), (size,), device=device)
    variant = torch.randint(shard.t5_ids.shape[1], (size,), device=device)
    kept = torch.rand(size, 1, device=device) >= drop
    clean = shard.latents[index]
    if count < tokens:
        active = draw_windows(size, device) if window else draw_subsets(shard.detail[index], count)  # [B, m]
        clean = clean.gather(1, active[:, :, None].expand(-1, -1, clean.shape[2]))
    else:
        active = all_positions(device).expand(size, -1)
    return Batch(
        clean,
        torch.randn_like(clean),
        draw_sigma(size, device, shift),
        active,
        torch.where(kept, shard.t5_ids[index, variant], empty[0]),
        torch.where(kept, shard.clip_ids[index, variant], empty[1]),
    )


def velocity(
    models: Models, tables: tuple[torch.Tensor, torch.Tensor], batch: Batch, guidance: torch.Tensor
) -> torch.Tensor:
    """What the model predicts for a batch, at a guidance [B]: [B, m, C] in single precision."""
    text = models.t5(batch.t5_ids).last_hidden_state
    pooled = models.clip(batch.clip_ids).pooler_output
    words = torch.arange(TEXT_TOKENS, device=batch.active.device).expand(len(batch.active), -1)
    rows = torch.cat([words, TEXT_TOKENS + batch.active], dim=1)  # [B, T + m] into the tables
    here = tuple(table[rows] for table in tables)
    return predict_velocity(models.transformer, batch.noisy, here, text, pooled, batch.sigma, guidance).float()


@torch.no_grad()
def guided_velocity(
    models: Models,
    tables: tuple[torch.Tensor, torch.Tensor],
    batch: Batch,
    guidance: torch.Tensor,
    empty: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """True classifier-free guidance by a model at the neutral input: [B, m, C]."""
    bare = replace(batch, t5_ids=empty[0].expand_as(batch.t5_ids), clip_ids=empty[1].expand_as(batch.clip_ids))
    both = Batch(*(torch.cat([getattr(batch, f.name), getattr(bare, f.name)]) for f in fields(Batch)))
    with_caption, without = velocity(models, tables, both, torch.full_like(both.sigma, NEUTRAL)).chunk(2)
    return without + guidance[:, None, None] * (with_caption - without)
