"""Train the demo model: a small text-to-image pipeline of FLUX.1's architecture, saved as a diffusers folder.

    python scripts/train_demo.py train  --init FOLDER --work WORK --minutes 90
    python scripts/train_demo.py export --work WORK --out jitexport/assets/demo

`train` starts from a diffusers folder (`--init`): its autoencoder is used as it is, its transformer and text encoders
are trained on, or trained from nothing with `--from-scratch`. It ends when `--minutes` have passed; the learning rate
follows the share of the minutes that is used up, so that every run ends with a decayed rate. `--resume` goes on after
an interruption. `export` writes the averaged weights of the last checkpoint in half precision.

The method this package exists for runs the transformer on a part of the image's tokens. A part of the training steps
does the same, so that the model has seen sparse token sets: those steps run the transformer on a random set of tokens,
with their true positions, and take the loss on those tokens only.

`--device cuda` keeps all latents on the GPU, compiles the blocks and uses larger batches. That path has not been run
yet: the bundled weights were trained on a CPU.
"""

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from demo_data import (
    CAPTION,
    CAPTION_VARIANTS,
    COLOURS,
    IMAGE_SIZE,
    OBJECTS,
    PICTURES_PACKAGE,
    VOCABULARY_GROUPS,
    caption,
    emoji_names,
    held_out_pairs,
    load_objects,
    on_background,
    trained_pairs,
)
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

GRID = 32  # tokens a side: 256 pixels / 4 (autoencoder) / 2 (packing)
TEXT_TOKENS = 16
GUIDANCE = 3.5
SHIFT = 2.0  # moves noise levels up, in training and in the scheduler alike: s -> SHIFT * s / (1 + (SHIFT - 1) * s)
SPECIAL_TOKENS = {"<pad>": 0, "<eos>": 1, "<bos>": 2}
UNKNOWN = "<unk>"

ASSETS = Path(__file__).parent.parent / "jitexport" / "assets" / "demo"
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

TOKENS_A_STEP = {"cpu": 6144, "cuda": 131072}  # pictures a step times tokens a picture


@dataclass(frozen=True)
class Phase:
    """What the training steps run on from `start`, a share of the run, on."""

    start: float
    whole_grid: float  # share of steps on all tokens; the others run on a subset
    ratios: tuple[float, ...]  # sizes of the subsets, as shares of all tokens


# Small subsets are cheap and teach what each object looks like, so they come first. The later ones have the sizes of
# JiT's stages, and steps on the whole grid, which sharpness needs, get the larger part of the time.
PHASES = (
    Phase(0.0, 0.05, (0.2, 0.25, 0.3, 0.35)),
    Phase(0.4, 0.55, (0.32, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.62, 0.65)),
    Phase(0.8, 0.75, (0.32, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.62, 0.65)),
)


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


def make_tokenizer(words: Iterable[str], template: str) -> PreTrainedTokenizerFast:
    """A lower-casing, word-level tokenizer; `template` places the special tokens around the words ($A)."""
    vocabulary = dict(SPECIAL_TOKENS)
    for word in (*words, UNKNOWN):
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


def make_models(words: list[str], vae: AutoencoderKL) -> Models:
    """Untrained networks around a trained autoencoder, for a vocabulary of `words`."""
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "vocab_size": len(SPECIAL_TOKENS) + len(words) + 1}
    transformer = FluxTransformer2DModel(**TRANSFORMER_CONFIG)
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


def vocabulary(folder: Path) -> list[str]:
    """All words of the captions and of the emoji names in VOCABULARY_GROUPS, sorted."""
    names = [e["name"].lower() for e in emoji_names(folder).values() if e["group"] in VOCABULARY_GROUPS]
    texts = [*names, *OBJECTS, *COLOURS, CAPTION.format(name="", colour="")]
    return sorted({word for text in texts for word in re.findall("[a-z0-9]+", text)})


def starting_models(args: argparse.Namespace) -> Models:
    """The networks of `args.init`; of these only the autoencoder is trained already with `args.from_scratch`."""
    models = load_models(args.init)
    return make_models(vocabulary(args.data), models.vae) if args.from_scratch else models


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


# --- data -------------------------------------------------------------------------------------------------------------


@dataclass
class TrainingData:
    """The trained pairs, ready for the transformer. P pairs, N tokens, C channels, V captions a pair."""

    objects: torch.Tensor  # [P] number of the pair's object
    latents: torch.Tensor  # [P, N, C]
    detail: torch.Tensor  # [P, N] log of the local variance of the latents
    t5_ids: torch.Tensor  # [P, V, T]
    clip_ids: torch.Tensor  # [P, V, T]

    def to(self, device: torch.device) -> "TrainingData":
        return TrainingData(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, folder: Path, device: torch.device) -> torch.Tensor:
    """Normalised, packed latents of the trained pairs: [P, N, C]."""
    objects, packed = load_objects(folder), []
    vae = vae.to(device)
    for index, (name, colour) in enumerate(trained_pairs()):
        pixels = torch.from_numpy(np.array(on_background(objects[name], colour))).to(device)
        pixels = pixels.permute(2, 0, 1)[None].float() / 127.5 - 1  # [1, 3, H, W]
        latents = vae.encode(pixels).latent_dist.mode()
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        packed.append(FluxPipeline._pack_latents(latents, *latents.shape).cpu())  # [1, N, C]
        if index % 100 == 99:
            log(f"encoded {index + 1} pictures")
    return torch.cat(packed)


def local_detail(latents: torch.Tensor) -> torch.Tensor:
    """Log of the variance in the 3 x 3 tokens around each token, mean over channels: [P, N, C] -> [P, N]."""
    grid = latents.transpose(1, 2).unflatten(2, (GRID, GRID))  # [P, C, H, W]

    def mean(x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

    variance = (mean(grid.square()) - mean(grid).square()).mean(1).flatten(1)
    return variance.clamp_min(1e-4).log()


def load_data(models: Models, folder: Path, cache: Path, device: torch.device) -> TrainingData:
    """Encode pictures (once: they are kept in `cache`) and captions."""
    if not cache.is_file():
        torch.save(encode_pictures(models.vae, folder, device), cache)
    latents = torch.load(cache, weights_only=True)
    texts = [
        template.format(name=name, colour=colour)
        for name, colour in trained_pairs()
        for template in (CAPTION, *CAPTION_VARIANTS)
    ]

    def ids(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
        encoded = tokenizer(texts, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt")
        return encoded.input_ids.unflatten(0, (len(latents), -1))

    objects = torch.tensor([OBJECTS.index(name) for name, _ in trained_pairs()])
    data = TrainingData(objects, latents, local_detail(latents), ids(models.t5_tokenizer), ids(models.clip_tokenizer))
    return data.to(device)


# --- sparse token sets ------------------------------------------------------------------------------------------------


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
            return F.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)

        query = normed(attn.norm_q, heads(attn.to_q(hidden_states)))
        key = normed(attn.norm_k, heads(attn.to_k(hidden_states)))
        value = heads(attn.to_v(hidden_states))
        if encoder_hidden_states is not None:
            text = encoder_hidden_states
            query = torch.cat([normed(attn.norm_added_q, heads(attn.add_q_proj(text))), query], dim=1)
            key = torch.cat([normed(attn.norm_added_k, heads(attn.add_k_proj(text))), key], dim=1)
            value = torch.cat([heads(attn.add_v_proj(text)), value], dim=1)
        query, key = rotate(query, image_rotary_emb), rotate(key, image_rotary_emb)
        out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        out = out.transpose(1, 2).flatten(2)  # [B, S, heads * D]
        if encoder_hidden_states is None:
            return out
        text, image = out.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        return attn.to_out[0](image), attn.to_add_out(text)


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


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """What a run has done so far; kept in its checkpoints."""

    seconds: float = 0.0
    steps: int = 0
    pictures: dict[str, int] = field(default_factory=lambda: {"subset": 0, "whole grid": 0})
    loss: dict[str, float] = field(default_factory=dict)  # running mean by kind of step


def log(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def learning_rate(peak: float, elapsed: float) -> float:
    """Warm-up over the first hundredth of the run, then a straight line down to a hundredth of the peak."""
    return peak * min(1.0, elapsed / 0.01) * max(0.01, 1.0 - elapsed)


def draw_token_count(elapsed: float) -> int:
    """How many tokens the next step runs on."""
    phase = next(phase for phase in reversed(PHASES) if elapsed >= phase.start)
    if torch.rand(()) < phase.whole_grid:
        return GRID * GRID
    return int(GRID * GRID * phase.ratios[torch.randint(len(phase.ratios), ())])


def training_loss(
    models: Models, data: TrainingData, tables: tuple[torch.Tensor, torch.Tensor], index: torch.Tensor, count: int
) -> torch.Tensor:
    """Flow-matching loss of the pairs `index` [B], on `count` tokens of each picture: [B]."""
    device, batch = data.latents.device, len(index)
    # Seven captions of ten are the plain one, the others any variant of it.
    variant = torch.randint(len(CAPTION_VARIANTS), (batch,), device=device) + 1
    variant = torch.where(torch.rand(batch, device=device) < 0.7, 0, variant)
    text = models.t5(data.t5_ids[index, variant]).last_hidden_state
    pooled = models.clip(data.clip_ids[index, variant]).pooler_output

    clean, noise = data.latents[index], torch.randn(batch, GRID * GRID, data.latents.shape[2], device=device)
    sigma = torch.randn(batch, device=device).sigmoid()
    sigma = SHIFT * sigma / (1 + (SHIFT - 1) * sigma)
    guidance = torch.where(torch.rand(batch, device=device) < 0.7, GUIDANCE, 1 + 6 * torch.rand(batch, device=device))
    noisy, target = torch.lerp(clean, noise, sigma[:, None, None]), noise - clean

    if count < GRID * GRID:
        active = draw_subsets(data.detail[index], count)  # [B, m]
    else:
        active = torch.arange(count, device=device).expand(batch, -1)
    channels = active[:, :, None].expand(-1, -1, clean.shape[2])
    noisy, target = noisy.gather(1, channels), target.gather(1, channels)
    words = torch.arange(TEXT_TOKENS, device=device).expand(batch, -1)
    rows = torch.cat([words, TEXT_TOKENS + active], dim=1)  # [B, T + m] into the tables
    cos, sin = (table[rows] for table in tables)
    predicted = predict_velocity(models.transformer, noisy, (cos, sin), text, pooled, sigma, guidance)
    return (predicted.float() - target).square().mean((1, 2))


def save_atomically(content: dict, path: Path) -> None:
    temporary = path.with_suffix(".partial")
    torch.save(content, temporary)
    os.replace(temporary, path)


@torch.no_grad()
def sample_sheet(models: Models, path: Path, prompts: list[str], columns: int = 4, steps: int = 16) -> None:
    """Pictures of `prompts`, side by side, in a PNG file."""
    pipeline = make_pipeline(models)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    with torch.autocast(models.transformer.device.type, torch.bfloat16):
        pictures = pipeline(
            prompts,
            height=IMAGE_SIZE,
            width=IMAGE_SIZE,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            max_sequence_length=TEXT_TOKENS,
            generator=generators,
        ).images
    sheet = Image.new("RGB", (columns * IMAGE_SIZE, math.ceil(len(pictures) / columns) * IMAGE_SIZE))
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % columns * IMAGE_SIZE, index // columns * IMAGE_SIZE))
    sheet.save(path)


def sheet_prompts() -> list[str]:
    """Captions to watch a run by: four trained pairs, four held-out pairs."""
    return [caption(*pair) for pair in (*trained_pairs()[29::230], *held_out_pairs()[10::24])]


def train(args: argparse.Namespace) -> None:
    """Train for `args.minutes`, leaving WORK/checkpoint.pt and sample sheets behind."""
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)  # AdamW's second moments become denormal, which is many times slower on a CPU
    torch.set_float32_matmul_precision("high")
    device = torch.device(args.device)
    args.work.mkdir(parents=True, exist_ok=True)

    models = starting_models(args)
    models.vae.requires_grad_(False).to(device)
    data = load_data(models, args.data, args.work / "latents.pt", device)
    trained = models.trained.to(device).train()
    average = averaged_copy(models)
    models.transformer.set_attn_processor(PerSamplePositions())
    tables = tuple(table.float().to(device) for table in rotary_tables(models.transformer))
    if device.type == "cuda" or args.compile:
        for block in (*models.transformer.transformer_blocks, *models.transformer.single_transformer_blocks):
            block.compile()

    parameters, averaged = list(trained.parameters()), list(average.trained.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    progress = Progress()
    # Running mean of each object's loss: objects are drawn in proportion to it, so that the harder ones catch up.
    difficulty = torch.ones(len(OBJECTS), device=device)
    checkpoint = args.work / "checkpoint.pt"
    if args.resume:
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        trained.load_state_dict(state["model"])
        average.trained.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        difficulty = state["difficulty"]
        progress = Progress(**state["progress"])
        torch.manual_seed(args.seed + progress.steps)

    def save() -> None:
        save_atomically(
            {
                "model": trained.state_dict(),
                "average": average.trained.state_dict(),
                "optimizer": optimizer.state_dict(),
                "difficulty": difficulty,
                "progress": progress.__dict__,
            },
            checkpoint,
        )

    budget = args.minutes * 60
    began, saved, sampled = time.monotonic() - progress.seconds, progress.seconds, progress.seconds
    while progress.seconds < budget:
        elapsed = progress.seconds / budget
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.learning_rate, elapsed)
        count = draw_token_count(elapsed)
        batch = TOKENS_A_STEP[device.type] // count
        with torch.autocast(device.type, torch.bfloat16):
            index = torch.multinomial(difficulty[data.objects], batch, replacement=True)
            losses = training_loss(models, data, tables, index, count)
        loss = losses.mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.steps += 1
        # The average reaches back further as the run gets longer, up to 500 steps.
        torch._foreach_lerp_(averaged, parameters, max(0.002, 1 / (1 + progress.steps / 10)))

        drawn = data.objects[index]
        difficulty[drawn] = difficulty[drawn].lerp(losses.detach(), 0.05)
        kind = "whole grid" if count == GRID * GRID else "subset"
        progress.pictures[kind] += batch
        previous = progress.loss.get(kind, loss.item())
        progress.loss[kind] = previous + 0.02 * (loss.item() - previous)
        progress.seconds = time.monotonic() - began
        if progress.steps % 50 == 0:
            means = ", ".join(f"{kind} {value:.4f}" for kind, value in progress.loss.items())
            log(
                f"step {progress.steps}, {progress.seconds / 60:.1f} of {args.minutes:g} min, loss: {means}, "
                f"pictures: {progress.pictures}, rate {optimizer.param_groups[0]['lr']:.1e}"
            )
        if progress.seconds - saved > 60 * args.checkpoint_minutes:
            save()
            saved = progress.seconds
        if progress.seconds - sampled > 60 * args.sample_minutes:
            sample_sheet(average, args.work / f"sample-{progress.steps:06}.png", sheet_prompts())
            sampled = progress.seconds
    save()
    log(f"done: {json.dumps(progress.__dict__)}")


# --- the folder -------------------------------------------------------------------------------------------------------


def export(args: argparse.Namespace) -> None:
    """Write the averaged weights of the last checkpoint, and what describes them, to `args.out`."""
    models = starting_models(args)
    if args.work:
        state = torch.load(args.work / "checkpoint.pt", map_location="cpu", weights_only=True)
        models.trained.load_state_dict(state["average"])
        log(f"exporting: {json.dumps(state['progress'])}")
    pipeline = make_pipeline(models).to(torch.float16)
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
        "held_out": held_out_pairs(),
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
        verb.add_argument("--data", type=Path, default=Path("demo-data"), help="folder for the npm packages")
        return verb

    verb = add_verb("train", train)
    verb.add_argument("--work", type=Path, required=True, help="folder for latents, checkpoints and sample sheets")
    verb.add_argument("--minutes", type=float, default=90, help="how long to train")
    verb.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    verb.add_argument("--device", default="cpu", help="cpu, or cuda (not tried yet)")
    verb.add_argument("--learning-rate", type=float, default=1e-3, help="peak learning rate")
    verb.add_argument("--compile", action="store_true", help="compile the blocks on a CPU too")
    verb.add_argument("--checkpoint-minutes", type=float, default=3)
    verb.add_argument("--sample-minutes", type=float, default=12)
    verb.add_argument("--seed", type=int, default=0)

    verb = add_verb("export", export)
    verb.add_argument("--work", type=Path, help="folder of the run; without it the weights of --init are exported")
    verb.add_argument("--out", type=Path, default=ASSETS, help="diffusers folder to write")

    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
