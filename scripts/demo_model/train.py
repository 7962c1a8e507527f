"""Train the demo model: a small text-to-image pipeline of FLUX.1's architecture, saved as a diffusers folder.

    python scripts/demo_model/train.py train
    python scripts/demo_model/train.py sheet  --out sheet.png
    python scripts/demo_model/train.py export --out FOLDER

`train` starts from a diffusers folder (`--init`): its autoencoder is used as it is, its transformer and text encoders
are trained on, or trained from nothing with `--from-scratch`. It writes a checkpoint to `--work` every few minutes and
goes on from it when called again, after an interruption or on another day, as if nothing had been between: what a step
draws depends on the seed and on how far the run is, so a run that was killed has the same losses as one that was not.
`--hours` ends this call, not the run. `sheet` draws pictures with the averaged weights of the last checkpoint, and
`export` writes these in half precision.

The run has four stages, whose lengths are numbers of pictures (STAGES; `--scale` multiplies them):

1. coarse: pictures of 128 x 128, which are 16 x 16 tokens, at every second position of the grid of 32 x 32;
2. subsets: pictures of 256 x 256, of which the transformer sees a set of tokens at their true positions, with the loss
   on them only, as the method this package exists for runs it;
3. grids: most steps on all 32 x 32 tokens, the others on subsets of the sizes of JiT's stages;
4. guidance: the guidance input learns what classifier-free guidance does. A frozen copy of the model is the teacher;
   the target is its velocity without a caption plus the guidance times the difference that the caption makes. Until
   then the input is always NEUTRAL, one caption in ten is empty, and the model can be sampled with true guidance.

What that takes. On two cores with AVX2 alone a step on 6,144 tokens takes 4.3 s: 5.6 coarse pictures a second, 4 with
subsets, 1.4 whole ones. A pilot with one object in one place needed 49,500 coarse pictures for 61 objects on three
backgrounds; here there are a hundred, in any place, on fifty kinds of background, so five times as many are planned:
12 hours coarse, 5.5 for subsets, 4.5 for grids, 3 for guidance. Scenes are made and encoded as the run goes, each used
a few times with other noise and another caption, which costs about a tenth of the time. On two cores of a Xeon with AMX
(2026-11-26), in bfloat16: 9 coarse pictures a second, and with `--compile` 18 after two minutes of compiling.

A line of `WORK/losses.jsonl` for every evaluation holds the averaged weights' loss on scenes that are never trained
on, at fixed noise levels and with fixed noise. The running loss says little: it depends on the levels drawn.

`--minutes` measures a run by time in place of pictures, whatever the device's speed: each stage has its share of the
time, which begins with the first step and includes evaluations and checkpoints but not the last ones and the sheets.
A shard of scenes that is used up stays in use until the next one is there; the log counts the steps that did so. Such
a run can go on from its checkpoint, but two of them differ.

`--device cuda` uses bfloat16 and batches of 32,768 tokens, and scenes are drawn ahead by `--workers` processes. A step
never waits for the device. On an H200 (2026-11-26) the first backward pass failed: see `rms_norm`; what was changed
since has not been run there.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, partial
from itertools import accumulate, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from data import IMAGE_SIZE, PICTURES_PACKAGE, load_objects
from shards import TEXT_TOKENS, Artist, Shard, ShardMaker, caption_ids, encode_shard, padding_tokenizer
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from jitexport.evaluate.scenes import (
    COLOURS,
    OBJECTS,
    caption_words,
    held_out_colours,
    plural,
)

GRID = 32  # tokens a side: 256 pixels / 4 (autoencoder) / 2 (packing)
SHIFT = 2.0  # moves noise levels up, in training and in the scheduler alike: s -> SHIFT * s / (1 + (SHIFT - 1) * s)
NEUTRAL = 1.0  # the guidance input where it guides nothing
GUIDANCE = 2.5  # what the pipeline is used with
MOST_GUIDANCE = 5.0
EMPTY_CAPTIONS = 0.1
SPECIAL_TOKENS = {"<pad>": 0, "<eos>": 1, "<bos>": 2}
UNKNOWN = "<unk>"

ASSETS = Path(__file__).parent.parent / "jitexport" / "assets" / "demo"
WORK = Path.home() / ".cache" / "jitexport" / "demo-training"
CAPTION = "{name} on a {colour} background"
REFERENCE_SIZE = 128  # pixels a side of an object in the reference atlas
REFERENCE_COLUMNS = 10

TRANSFORMER_CONFIG = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 6,
    "attention_head_dim": 64,
    "num_attention_heads": 4,
    "joint_attention_dim": 192,
    "pooled_projection_dim": 128,
    "guidance_embeds": True,
    "axes_dims_rope": (8, 28, 28),
}
T5_CONFIG = {
    "d_model": 192,
    "d_kv": 32,
    "d_ff": 512,
    "num_layers": 2,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
}
CLIP_CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": TEXT_TOKENS,
}


@dataclass(frozen=True)
class Stage:
    """A part of the run.

    Attributes:
        pictures: how many it trains on, before `--scale`.
        time: its share of the time of a run with `--minutes`.
        pixels: a picture's side; 128 makes 16 x 16 tokens at every second position.
        whole: share of pictures of which all tokens are seen.
        ratios: sizes of the subsets of the others, as shares of all tokens.
        uses: how often a scene is used.
        distil: whether the target comes from the teacher.
    """

    name: str
    pictures: int
    time: float
    pixels: int = IMAGE_SIZE
    whole: float = 1.0
    ratios: tuple[float, ...] = ()
    uses: int = 4
    distil: bool = False

    @property
    def side(self) -> int:
        """Tokens a side."""
        return self.pixels * GRID // IMAGE_SIZE

    @property
    def work(self) -> float:
        """Tokens that the stage runs through the transformer; the teacher's two forward passes are two thirds more."""
        subset = sum(self.ratios) / len(self.ratios) if self.ratios else 0.0
        share = self.whole + (1 - self.whole) * subset
        return self.pictures * self.side**2 * share * (5 / 3 if self.distil else 1)


JIT_RATIOS = (0.32, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.62, 0.65)
STAGES = (
    Stage("coarse", 240_000, 0.4, pixels=128),
    Stage("subsets", 75_000, 0.15, whole=0.05, ratios=(0.2, 0.25, 0.3, 0.35, 0.4, 0.5)),
    Stage("grids", 28_000, 0.25, whole=0.6, ratios=JIT_RATIOS),
    Stage("guidance", 12_000, 0.2, whole=0.5, ratios=JIT_RATIOS, distil=True),
)


@dataclass(frozen=True)
class Sizes:
    """What differs between devices: tokens a step, scenes that are made at a time, pictures the encoder takes."""

    tokens: int
    shard: int
    encoded: int


SIZES = {"cpu": Sizes(6144, 384, 8), "cuda": Sizes(32768, 2048, 32)}


# --- models -----------------------------------------------------------------------------------------------------------


@dataclass
class Models:
    """Everything the pipeline is made of, apart from the scheduler."""

    transformer: FluxTransformer2DModel
    t5: T5EncoderModel
    clip: CLIPTextModel
    vae: AutoencoderKL
    t5_tokenizer: PreTrainedTokenizerFast
    clip_tokenizer: PreTrainedTokenizerFast

    @property
    def trained(self) -> nn.ModuleDict:
        """The networks that are trained: all but the autoencoder."""
        return nn.ModuleDict({"transformer": self.transformer, "t5": self.t5, "clip": self.clip})


def make_tokenizer(words: Sequence[str], template: str) -> PreTrainedTokenizerFast:
    """A lower-casing, word-level tokenizer; `template` places the special tokens around the words ($A).

    `words` are in the order of their numbers; the unknown word is the last unless it is among them.
    """
    vocabulary = dict(SPECIAL_TOKENS)
    for word in words if UNKNOWN in words else (*words, UNKNOWN):
        vocabulary[word] = len(vocabulary)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[a-z0-9]+"), behavior="removed", invert=True)
    used = [(token, index) for token, index in SPECIAL_TOKENS.items() if token in template]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=TEXT_TOKENS,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token=UNKNOWN,
    )


def make_models(words: list[str], vae: AutoencoderKL, **changed: object) -> Models:
    """Untrained networks around a trained autoencoder; `changed` are the transformer's settings that differ."""
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "vocab_size": len(SPECIAL_TOKENS) + len(words) + 1}
    transformer = FluxTransformer2DModel(**(TRANSFORMER_CONFIG | changed))
    initialise(transformer)
    return Models(
        transformer=transformer,
        t5=T5EncoderModel(T5Config(**T5_CONFIG, **ids)),
        # CLIPTextModel takes its pooled output from the first token that is `eos_token_id`.
        clip=CLIPTextModel(CLIPTextConfig(**CLIP_CONFIG, **ids)),
        vae=vae,
        t5_tokenizer=make_tokenizer(words, "$A <eos>"),
        clip_tokenizer=make_tokenizer(words, "<bos> $A <eos>"),
    )


def initialise(transformer: FluxTransformer2DModel) -> None:
    """DiT's initialisation: Xavier everywhere, zero where a block or the model writes its result.

    With the library's default initialisation this model learns backgrounds and no objects.
    """
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            if name == "proj_out" or name.endswith(("norm.linear", "norm1.linear", "norm1_context.linear")):
                nn.init.zeros_(module.weight)
            else:
                nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.zeros_(transformer.norm_out.linear.weight)


def load_models(folder: Path) -> Models:
    """The networks of a diffusers folder, in single precision."""
    pipeline = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
    return Models(
        transformer=pipeline.transformer,
        t5=pipeline.text_encoder_2,
        clip=pipeline.text_encoder,
        vae=pipeline.vae,
        t5_tokenizer=pipeline.tokenizer_2,
        clip_tokenizer=pipeline.tokenizer,
    )


def starting_models(args: argparse.Namespace) -> Models:
    """The networks of `args.init`; of these only the autoencoder is trained already with `args.from_scratch`."""
    models = load_models(args.init)
    return make_models(caption_words(), models.vae) if args.from_scratch else with_words(models, caption_words())


def with_words(models: Models, words: Sequence[str]) -> Models:
    """The same networks for a vocabulary that has `words` too.

    Old words keep their numbers. A plural starts with the embedding of its singular, other new words with that of the
    unknown word.
    """
    old = models.t5_tokenizer.get_vocab()
    new = [word for word in words if word not in old]
    singular = {plural(word): word for word in words if word in old}
    sources = [old[singular.get(word, UNKNOWN)] for word in new]
    known = [word for word in sorted(old, key=old.get) if word not in SPECIAL_TOKENS]

    def grow(encoder: nn.Module) -> None:
        rows = encoder.get_input_embeddings().weight.detach()[sources].clone()
        encoder.resize_token_embeddings(len(old) + len(new), mean_resizing=False)
        with torch.no_grad():
            encoder.get_input_embeddings().weight[len(old) :] = rows

    grow(models.t5)
    grow(models.clip)
    return replace(
        models,
        t5_tokenizer=make_tokenizer([*known, *new], "$A <eos>"),
        clip_tokenizer=make_tokenizer([*known, *new], "<bos> $A <eos>"),
    )


def averaged_copy(models: Models) -> Models:
    """A second copy of the trained networks, which takes no gradients: the running average of their weights."""
    transformer, t5, clip = (deepcopy(m).requires_grad_(False).eval() for m in models.trained.values())
    return replace(models, transformer=transformer, t5=t5, clip=clip)


def make_pipeline(models: Models) -> FluxPipeline:
    """The diffusers pipeline, with the scheduler the model is trained for."""
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT, use_dynamic_shifting=False),
        vae=models.vae,
        text_encoder=models.clip,
        tokenizer=models.clip_tokenizer,
        text_encoder_2=models.t5,
        tokenizer_2=models.t5_tokenizer,
        transformer=models.transformer,
    )


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

    On an H200 with torch 2.11 the first step of a run ended in an illegal memory access. PyTorch's fused norm is under
    suspicion, which takes another way back where rows are more than 65,536, as they are here and in no other test.
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


def draw_sigma(count: int, device: torch.device) -> torch.Tensor:
    """Noise levels: logit-normal, shifted."""
    sigma = torch.randn(count, device=device).sigmoid()
    return SHIFT * sigma / (1 + (SHIFT - 1) * sigma)


def grid_positions(side: int, device: torch.device) -> torch.Tensor:
    """Positions in the grid of 32 x 32 of `side` x `side` tokens that lie evenly in it: [side * side]."""
    line = torch.arange(side, device=device) * (GRID // side)
    return (line[:, None] * GRID + line).flatten()


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


def draw_batch(shard: Shard, count: int, size: int, empty: tuple[torch.Tensor, torch.Tensor], drop: float) -> Batch:
    """`size` scenes of a shard, `count` tokens of each; the caption is empty with chance `drop`."""
    device, tokens = shard.latents.device, shard.latents.shape[1]
    index = torch.randint(len(shard.latents), (size,), device=device)
    variant = torch.randint(shard.t5_ids.shape[1], (size,), device=device)
    kept = torch.rand(size, 1, device=device) >= drop
    clean = shard.latents[index]
    if count < tokens:
        active = draw_subsets(shard.detail[index], count)  # [B, m]
        clean = clean.gather(1, active[:, :, None].expand(-1, -1, clean.shape[2]))
    else:
        active = grid_positions(math.isqrt(tokens), device).expand(size, -1)
    return Batch(
        clean,
        torch.randn_like(clean),
        draw_sigma(size, device),
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


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """What a run has done so far; kept in its checkpoints."""

    seconds: float = 0.0  # in which processes of the run were alive
    steps: int = 0
    pictures: list[int] = field(default_factory=list)  # by stage
    loss: dict[str, float] = field(default_factory=dict)  # running mean by kind of step


def log(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def learning_rate(peak: float, elapsed: float, steps: int) -> float:
    """Warm-up over the first 100 steps, then a straight line down to a hundredth of the peak."""
    return peak * min(1.0, (steps + 1) / 100) * max(0.01, 1.0 - elapsed)


def has_bf16(device: torch.device) -> bool:
    """Whether products in bfloat16 are faster than in single precision."""
    return device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def save_atomically(content: dict, path: Path) -> None:
    temporary = path.with_suffix(".partial")
    torch.save(content, temporary)
    os.replace(temporary, path)


class Training:
    """A run: networks, their average, the optimizer, and how far it is.

    Attributes:
        folder: for the checkpoint, the losses and sample sheets.
        stages: as STAGES, with their pictures multiplied already.
        minutes: what the run takes, if it is measured by time and not by pictures.
        late: steps, with `minutes`, that took a shard which was used up, because the next one was not there yet.
    """

    def __init__(
        self,
        models: Models,
        sprites: dict[str, Image.Image],
        folder: Path,
        *,
        stages: Sequence[Stage] = STAGES,
        seed: int = 0,
        peak: float = 1e-3,
        minutes: float | None = None,
        device: str = "cpu",
        sizes: Sizes | None = None,
        workers: int = 0,
        compiled: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.sizes = sizes or SIZES[self.device.type]
        self.models, self.folder, self.stages, self.seed, self.peak = models, folder, tuple(stages), seed, peak
        self.minutes, self.late = minutes, 0
        self.bf16 = has_bf16(self.device)
        folder.mkdir(parents=True, exist_ok=True)
        self.artist = Artist(sprites, padding_tokenizer(models.t5_tokenizer), padding_tokenizer(models.clip_tokenizer))
        self.encode = partial(encode_shard, models.vae, self.sizes.encoded)
        self.make_shard = ShardMaker(self.artist, self.encode, seed, self.sizes.shard, workers)
        self.in_use: tuple[int, int] | None = None  # stage and number of the shard, with `minutes`
        self.drawn = 0  # pictures of it
        models.vae.requires_grad_(False).to(self.device)
        self.trained = models.trained.to(self.device).train()
        models.transformer.set_attn_processor(PerSamplePositions())
        self.average = averaged_copy(models)
        self.teacher: Models | None = None
        self.evaluated: tuple[int, dict[str, Shard]] | None = None  # by pixels
        self.tables = tuple(table.float().to(self.device) for table in rotary_tables(models.transformer))
        self.empty = empty_ids(models, self.device)
        if compiled:
            torch._dynamo.config.recompile_limit = 64
            for block in (*models.transformer.transformer_blocks, *models.transformer.single_transformer_blocks):
                block.compile()
        self.parameters = list(self.trained.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
        self.progress = Progress(pictures=[0] * len(self.stages))
        self.losses: dict[str, torch.Tensor] = {}  # as the progress has them, on the device: reading them waits for it
        if self.checkpoint.is_file():
            self._load()

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    @property
    def stage(self) -> int:
        """Number of the stage that comes next; the number of stages when the run is over."""
        if self.minutes is not None:
            ends = list(accumulate(stage.time for stage in self.stages))
            return next((i for i, end in enumerate(ends) if self.elapsed * ends[-1] < end), len(self.stages))
        done = zip(self.progress.pictures, self.stages, strict=True)
        return next((i for i, (seen, stage) in enumerate(done) if seen < stage.pictures), len(self.stages))

    @property
    def elapsed(self) -> float:
        """Share of the run's work that is done, or of its time that is over."""
        if self.minutes is not None:
            return min(1.0, self.progress.seconds / (60 * self.minutes))
        done = zip(self.progress.pictures, self.stages, strict=True)
        return sum(min(1.0, n / s.pictures) * s.work for n, s in done) / sum(s.work for s in self.stages)

    def save(self) -> None:
        """Write the checkpoint; the one before stays until it is whole."""
        self.read_losses()
        state = {
            "model": self.trained.state_dict(),
            "average": self.average.trained.state_dict(),
            "teacher": self.teacher.trained.state_dict() if self.teacher else None,
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
        }
        save_atomically(state, self.checkpoint)

    def _load(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        self.trained.load_state_dict(state["model"])
        self.average.trained.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        self.losses = {kind: torch.tensor(value, device=self.device) for kind, value in self.progress.loss.items()}
        if state["teacher"]:
            self.teacher = averaged_copy(self.average)
            self.teacher.trained.load_state_dict(state["teacher"])

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def read_losses(self) -> dict[str, float]:
        """The running means of the losses, which the progress gets too."""
        self.progress.loss = {kind: float(value) for kind, value in self.losses.items()}
        return self.progress.loss

    def prepare(self) -> None:
        """Make the first shard. With `minutes` and workers, have the first ones of later stages made as well."""
        if self.stage < len(self.stages):
            self._shard(self.stage)
        if self.minutes is not None and self.make_shard.pool is not None:
            for number in range(self.stage + 1, len(self.stages)):
                self.make_shard.order((number, self._wanted(number), self.stages[number].pixels))

    def _wanted(self, number: int) -> int:
        """Number of the shard that a stage has come to, by the pictures that it has seen."""
        return self.progress.pictures[number] // (self.sizes.shard * self.stages[number].uses)

    def _shard(self, number: int) -> Shard:
        """What a stage draws from now. With `minutes`, a shard stays in use while the next one is not there yet."""
        stage = self.stages[number]
        if self.minutes is None:
            return self.make_shard((number, self._wanted(number), stage.pixels))
        if self.in_use is None or self.in_use[0] != number:
            self.in_use, self.drawn = (number, self._wanted(number)), 0
        elif self.drawn >= self.sizes.shard * stage.uses:
            if self.make_shard.ready((number, self.in_use[1] + 1, stage.pixels)):
                self.in_use, self.drawn = (number, self.in_use[1] + 1), 0
            else:
                self.late += 1
        return self.make_shard((*self.in_use, stage.pixels))

    def step(self) -> torch.Tensor:
        """Train on one batch and return its loss, without waiting for the device.

        What is drawn depends on the seed and the step's number alone, unless the run is measured by time.
        """
        number, stage = self.stage, self.stages[self.stage]
        torch.manual_seed(self.seed * 1_000_003 + self.progress.steps)
        count = stage.side**2
        if torch.rand(()) >= stage.whole:
            count = int(count * stage.ratios[int(torch.randint(len(stage.ratios), ()))])
        size = max(1, self.sizes.tokens // count)
        batch = draw_batch(self._shard(number), count, size, self.empty, 0.0 if stage.distil else EMPTY_CAPTIONS)
        with self.autocast():
            target, guidance = self._target(batch, stage)
            loss = (velocity(self.models, self.tables, batch, guidance) - target).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.peak, self.elapsed, self.progress.steps)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.steps += 1
        self.progress.pictures[number] += size
        self.drawn += size
        # The average reaches back further as the run gets longer, up to 1000 steps.
        averaged = list(self.average.trained.parameters())
        loss = loss.detach()
        kind = f"{stage.name} {'whole' if count == stage.side**2 else 'subset'}"
        with torch.no_grad():
            torch._foreach_lerp_(averaged, self.parameters, max(0.001, 1 / (1 + self.progress.steps / 10)))
            self.losses[kind] = self.losses.get(kind, loss).lerp(loss, 0.02)
        return loss

    def _target(self, batch: Batch, stage: Stage) -> tuple[torch.Tensor, torch.Tensor]:
        """What a step's prediction is compared with, [B, m, C], and its guidance input, [B]."""
        neutral = torch.full_like(batch.sigma, NEUTRAL)
        if not stage.distil:
            return batch.noise - batch.clean, neutral
        if self.teacher is None:
            self.teacher = averaged_copy(self.average)
        drawn = NEUTRAL + (MOST_GUIDANCE - NEUTRAL) * torch.rand_like(batch.sigma)
        guidance = torch.where(torch.rand_like(drawn) < 0.2, neutral, drawn)
        return guided_velocity(self.teacher, self.tables, batch, guidance, self.empty), guidance

    @torch.no_grad()
    def evaluate(self, stage: Stage) -> dict[str, float]:
        """The averaged weights' loss on scenes of trained and of held-out combinations, by noise level."""
        losses = {}
        for kind, shard in self._evaluation_shards(stage.pixels).items():
            for sigma in EVALUATED_SIGMAS:
                torch.manual_seed(int(1000 * sigma))
                total = 0.0
                for start in range(0, len(shard.latents), EVALUATED_AT_ONCE):
                    clean = shard.latents[start : start + EVALUATED_AT_ONCE]
                    noise, level = torch.randn_like(clean), torch.full((len(clean),), sigma, device=self.device)
                    active = grid_positions(stage.side, self.device).expand(len(clean), -1)
                    part = slice(start, start + len(clean))
                    batch = Batch(clean, noise, level, active, shard.t5_ids[part, 0], shard.clip_ids[part, 0])
                    with self.autocast():
                        predicted = velocity(self.average, self.tables, batch, torch.full_like(level, NEUTRAL))
                    total += float((predicted - (noise - clean)).square().mean((1, 2)).sum())
                losses[f"{kind} {sigma:g}"] = round(total / len(shard.latents), 5)
        return losses

    def _evaluation_shards(self, pixels: int) -> dict[str, Shard]:
        """Fixed scenes, by whether they hold a combination that is held out of training."""
        if self.evaluated is None or self.evaluated[0] != pixels:
            shards = {}
            for kind, from_held_out in (("seen", False), ("held out", True)):
                keys = [(EVALUATION_SEED, from_held_out, i) for i in range(EVALUATED_SCENES)]
                shards[kind] = self.encode([self.artist.draw(keys, pixels, 1, from_held_out)])
            self.evaluated = pixels, shards
        return self.evaluated[1]

    def log_evaluation(self, stage: Stage) -> None:
        """Add a line to WORK/losses.jsonl, on pictures as a stage has them."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "steps": self.progress.steps,
            "stage": stage.name,
            "tokens": stage.side**2,
            "pictures": self.progress.pictures,
            "hours": round(self.progress.seconds / 3600, 3),
            "done": round(self.elapsed, 4),
            "losses": self.evaluate(stage),
        }
        with (self.folder / "losses.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        log(f"held-out losses: {json.dumps(line['losses'])}")

    def draw_samples(self, stage: Stage) -> None:
        """Sheets of pictures by true guidance, and by the guidance input in the stage that trains it."""
        for distilled in (False, True) if stage.distil else (False,):
            with self.autocast():
                pictures = draw_pictures(self.average, self.tables, SHEET_PROMPTS, stage.side, distilled=distilled)
            name = f"sample-{self.progress.steps:06}{'-distilled' if distilled else ''}.png"
            save_sheet(pictures, self.folder / name)


EVALUATION_SEED = 10**6
EVALUATED_SCENES = 16  # of either kind
EVALUATED_AT_ONCE = 16
EVALUATED_SIGMAS = (0.3, 0.5, 0.7, 0.85, 0.95)

SHEET_PROMPTS = (
    *("fox on a blue background", "hamburger on a plain yellow background", "something to eat", "an animal"),
    *("two owls on a striped green background", "fox and pizza on a blue background", "two fruits", "rocket and star"),
    *("a fruit on a red background", "something on a dotted pink background", "cat face with confetti"),
    "penguin, guitar and rose on a white background",
)


@torch.no_grad()
def draw_pictures(
    models: Models,
    tables: tuple[torch.Tensor, torch.Tensor],
    prompts: Sequence[str],
    side: int = GRID,
    steps: int = 25,
    guidance: float = GUIDANCE,
    distilled: bool = False,
) -> list[Image.Image]:
    """Pictures of prompts, on `side` x `side` tokens, by true guidance or with `distilled` through the input."""
    device = tables[0].device
    t5_ids, clip_ids = prompt_ids(models, prompts, device)
    empty, scale = empty_ids(models, device), torch.full((len(prompts),), guidance, device=device)
    noise = [torch.randn(side**2, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(len(prompts))]
    latents = torch.stack(noise).to(device)
    active = grid_positions(side, device).expand(len(prompts), -1)
    levels = torch.linspace(1, 0, steps + 1)
    levels = SHIFT * levels / (1 + (SHIFT - 1) * levels)
    for level, following in pairwise(levels.tolist()):
        sigma = torch.full((len(prompts),), level, device=device)
        batch = Batch(latents, latents, sigma, active, t5_ids, clip_ids)
        predicted = (
            velocity(models, tables, batch, scale)
            if distilled
            else guided_velocity(models, tables, batch, scale, empty)
        )
        latents = latents + (following - level) * predicted
    vae, pixels = models.vae, side * IMAGE_SIZE // GRID
    unpacked = FluxPipeline._unpack_latents(latents, pixels, pixels, 4) / vae.config.scaling_factor
    decoded = vae.decode(unpacked + vae.config.shift_factor).sample  # [B, 3, H, W]
    bytes_ = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in bytes_]


def save_sheet(pictures: Sequence[Image.Image], path: Path, columns: int = 4) -> None:
    """Pictures side by side in a PNG file."""
    side = pictures[0].width
    sheet = Image.new("RGB", (columns * side, math.ceil(len(pictures) / columns) * side))
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % columns * side, index // columns * side))
    sheet.save(path)


def scaled(scale: float) -> list[Stage]:
    """STAGES, with their pictures multiplied."""
    return [replace(stage, pictures=round(stage.pictures * scale)) for stage in STAGES]


LOG_SECONDS = 10


def train(args: argparse.Namespace) -> None:
    """Train, or go on training, for at most `--hours`."""
    torch.set_flush_denormal(True)  # AdamW's second moments become denormal, which is many times slower on a CPU
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # the other suspect: see `rms_norm`
    spare = max(1, (os.cpu_count() or 1) - 4)  # cores that the training itself leaves
    training = Training(
        starting_models(args),
        load_objects(args.data),
        args.work,
        stages=scaled(args.scale),
        seed=args.seed,
        peak=args.learning_rate,
        minutes=args.minutes,
        device=args.device,
        workers=args.workers if args.workers is not None else (spare if args.device == "cuda" else 0),
        compiled=args.compile,
    )
    try:
        run_training(training, args)
    finally:
        training.make_shard.close()


def run_training(training: Training, args: argparse.Namespace) -> None:
    """Steps, and what is to be done between them, until the run is over or `--hours` are."""
    progress = training.progress
    log(f"{training.elapsed:.1%} done, {progress.steps} steps, bf16 {'on' if training.bf16 else 'off'}")
    training.prepare()
    if progress.steps == 0:
        training.log_evaluation(training.stages[0])
    log("the first shard is there")
    began, before, share_before = time.monotonic(), progress.seconds, training.elapsed
    saved = evaluated = sampled = logged = began
    logged_steps, logged_pictures = progress.steps, sum(progress.pictures)
    while (number := training.stage) < len(training.stages):
        stage = training.stages[number]
        training.step()
        now = time.monotonic()
        progress.seconds = before + now - began
        over = training.stage != number
        ended = now - began > 3600 * args.hours or training.stage == len(training.stages)
        if over or ended or now - logged > LOG_SECONDS:
            means = ", ".join(f"{kind} {value:.4f}" for kind, value in training.read_losses().items())
            left = (1 - training.elapsed) / max(training.elapsed - share_before, 1e-9) * (now - began) / 60
            log(
                f"{stage.name}: step {progress.steps}, pictures {progress.pictures}, loss {means}, "
                f"{(progress.steps - logged_steps) / (now - logged):.2f} steps/s, "
                f"{(sum(progress.pictures) - logged_pictures) / (now - logged):.1f} pictures/s, "
                f"{training.late} steps with late data, {training.elapsed:.2%} done, {left:.1f} minutes to go"
            )
            logged, logged_steps, logged_pictures = now, progress.steps, sum(progress.pictures)
        if over or ended or now - saved > 60 * args.checkpoint_minutes:
            training.save()
            saved = time.monotonic()
        if over or ended or now - evaluated > 60 * args.evaluation_minutes:
            training.log_evaluation(stage)
            evaluated = time.monotonic()
        if ended or now - sampled > 60 * args.sample_minutes:
            training.draw_samples(stage)
            sampled = time.monotonic()
        if ended:
            break
    log(f"stopped: {json.dumps(asdict(progress))}")


# --- the folder -------------------------------------------------------------------------------------------------------


def checkpoint_models(args: argparse.Namespace) -> Models:
    """The networks of `--init`, with the averaged weights of the checkpoint in `--work` if there is one."""
    models, checkpoint = starting_models(args), args.work / "checkpoint.pt"
    if checkpoint.is_file():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        models.trained.load_state_dict(state["average"])
        log(f"weights of {checkpoint}: {json.dumps(state['progress'])}")
    return models


def sheet(args: argparse.Namespace) -> None:
    """Draw pictures with the averaged weights of the last checkpoint."""
    models = checkpoint_models(args)
    models.trained.eval().requires_grad_(False)
    models.transformer.set_attn_processor(PerSamplePositions())
    tables = tuple(table.float() for table in rotary_tables(models.transformer))
    prompts = args.prompt or SHEET_PROMPTS
    pictures = draw_pictures(models, tables, prompts, args.side, args.steps, args.guidance, args.distilled)
    save_sheet(pictures, args.out)


def export(args: argparse.Namespace) -> None:
    """Write the averaged weights of the last checkpoint, and what describes them, to `args.out`."""
    pipeline = make_pipeline(checkpoint_models(args)).to(torch.float16)
    pipeline.save_pretrained(args.out)
    # transformers loads in the dtype that a configuration names, diffusers in single precision: they must agree.
    for name in ("text_encoder", "text_encoder_2"):
        path = args.out / name / "config.json"
        write_json(json.loads(path.read_text(encoding="utf-8")) | {"dtype": "float32"}, path)

    defaults = {
        "height": IMAGE_SIZE,
        "width": IMAGE_SIZE,
        "max_sequence_length": TEXT_TOKENS,
        "guidance_scale": GUIDANCE,
        "num_inference_steps": 50,
    }
    write_json(defaults, args.out / "jitexport.json")
    captions = {
        "caption": CAPTION.replace("{name}", "<name>").replace("{colour}", "<colour>"),
        "names": OBJECTS,
        "colours": COLOURS,
        "held_out": list(held_out_colours().items()),
        "pictures": PICTURES_PACKAGE,
        "reference": {"file": "reference.png", "size": REFERENCE_SIZE, "columns": REFERENCE_COLUMNS},
    }
    write_json(captions, args.out / "captions.json")
    reference_atlas(args.data).save(args.out / "reference.png", optimize=True)
    for path in args.out.rglob("config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)  # where --init happened to lie
        write_json(config, path)
    for path in args.out.rglob("*.safetensors"):
        path.chmod(0o644)  # the libraries write weights for their owner only


def reference_atlas(folder: Path) -> Image.Image:
    """All objects as one RGBA picture, row by row in the order of OBJECTS, for measuring quality without the data."""
    rows = math.ceil(len(OBJECTS) / REFERENCE_COLUMNS)
    atlas = Image.new("RGBA", (REFERENCE_COLUMNS * REFERENCE_SIZE, rows * REFERENCE_SIZE))
    for index, picture in enumerate(load_objects(folder).values()):
        row, column = divmod(index, REFERENCE_COLUMNS)
        # The mean of each 2 x 2 pixels, as pictures are made smaller when they are compared with this one.
        small = picture.resize((REFERENCE_SIZE, REFERENCE_SIZE), Image.Resampling.BOX)
        atlas.paste(small, (column * REFERENCE_SIZE, row * REFERENCE_SIZE))
    return atlas


def write_json(content: dict, path: Path) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)

    def add_verb(name: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=run.__doc__)
        verb.set_defaults(run=run)
        verb.add_argument("--init", type=Path, default=ASSETS, help="diffusers folder to start from")
        verb.add_argument("--from-scratch", action="store_true", help="take only the autoencoder from --init")
        verb.add_argument("--data", type=Path, default=WORK / "pictures", help="folder for the npm packages")
        verb.add_argument("--work", type=Path, default=WORK, help="folder of checkpoint, losses and sample sheets")
        return verb

    verb = add_verb("train", train)
    verb.add_argument("--hours", type=float, default=math.inf, help="end this call after so many hours")
    length = verb.add_mutually_exclusive_group()
    length.add_argument("--scale", type=float, default=1.0, help="multiplies the pictures of all stages")
    length.add_argument("--minutes", type=float, help="what all stages together take, by time and not by pictures")
    verb.add_argument("--device", default="cpu", help="cpu, or cuda (no step has been made there yet)")
    verb.add_argument("--learning-rate", type=float, default=1e-3, help="peak learning rate")
    verb.add_argument("--compile", action="store_true", help="compile the blocks")
    verb.add_argument("--workers", type=int, help="processes that make scenes ahead; for cuda all cores but 4, else 0")
    verb.add_argument("--checkpoint-minutes", type=float, default=5)
    verb.add_argument("--evaluation-minutes", type=float, default=30)
    verb.add_argument("--sample-minutes", type=float, default=60)
    verb.add_argument("--seed", type=int, default=0)

    verb = add_verb("sheet", sheet)
    verb.add_argument("--out", type=Path, required=True, help="PNG file to write")
    verb.add_argument("--prompt", action="append", help="repeat for several; pictures to watch the run by without it")
    verb.add_argument("--side", type=int, default=GRID, choices=(GRID // 2, GRID), help="tokens a side")
    verb.add_argument("--steps", type=int, default=25)
    verb.add_argument("--guidance", type=float, default=GUIDANCE)
    verb.add_argument("--distilled", action="store_true", help="guide through the model's input: after the last stage")

    verb = add_verb("export", export)
    verb.add_argument("--out", type=Path, required=True, help="diffusers folder to write")

    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
