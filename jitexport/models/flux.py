"""FLUX.1: dev, schnell, and any model of their architecture in diffusers' format.

The modules below run diffusers' own weights under their own names, arranged for fixed-shape engines:

- all that depends on the prompt, the guidance and the noise levels only (text projection and the modulation vectors of
  every step) is computed once per image, by `FluxCondition`; about 3.2 of FLUX.1-dev's 11.9 billion parameters leave
  the per-step path with it;
- the text and image streams of the single blocks share one buffer;
- rotary tables come in as inputs, gathered for the tokens that a stage runs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from jitexport.errors import InputError, MissingDependencyError, ModelNotFoundError, UnsupportedModelError
from jitexport.grid import TokenGrid, unpack
from jitexport.kernels.attention import Stream, attention
from jitexport.kernels.linear import linear
from jitexport.models.base import ModelAdapter, ModelDefaults, ModelGeometry, Tokenizer, read_json
from jitexport.models.flux_names import NAMING
from jitexport.models.single_file import read_single_file
from jitexport.positions import Rotary
from jitexport.quant import QuantizedLinear, check_kind, quantize_linears
from jitexport.schedule import StageSchedule
from jitexport.specs import EngineSpec, TensorSpec

PATCH = 2  # FLUX packs 2 x 2 latent pixels into a token
THETA = 10000.0


class FluxText(nn.Module):
    """Both text encoders: CLIP ids [B, L], T5 ids [B, T] -> T5 states [B, T, E], CLIP pooled [B, P]."""

    def __init__(self, text_encoder: CLIPTextModel, text_encoder_2: T5EncoderModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2

    def forward(self, clip_ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.text_encoder_2(t5_ids)[0], self.text_encoder(clip_ids).pooler_output


class FluxCondition(nn.Module):
    """Everything of the transformer that does not see the image.

    prompt_embeds [B, T, E], pooled [B, P], sigmas [S], guidance [B] -> modulation [S, B, M], context [B, T, D].

    M holds, in this order, the vectors of each double block (image 6 D, text 6 D), of each single block (3 D), and of
    the output norm (2 D).
    """

    def __init__(self, transformer: FluxTransformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(
        self, prompt_embeds: Tensor, pooled: Tensor, sigmas: Tensor, guidance: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        model = self.transformer
        embed = model.time_text_embed
        dtype = pooled.dtype
        # Angles of up to 1000 radians: made in fp32 whatever the model's dtype.
        time = embed.timestep_embedder(embed.time_proj(sigmas.float() * 1000).to(dtype))  # [S, D]
        time = time[:, None]
        if guidance is not None:
            time = time + embed.guidance_embedder(embed.time_proj(guidance.float() * 1000).to(dtype))
        emb = F.silu(time + embed.text_embedder(pooled))  # [S, B, D]
        layers = [norm.linear for b in model.transformer_blocks for norm in (b.norm1, b.norm1_context)]
        layers += [b.norm.linear for b in model.single_transformer_blocks]
        layers += [model.norm_out.linear]
        return torch.cat([layer(emb) for layer in layers], dim=-1), model.context_embedder(prompt_embeds)


def modulate(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalise x [B, L, D], then scale and shift by vectors [B, D] (adaLN)."""
    return norm(x) * (1 + scale[:, None]) + shift[:, None]


def gated(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """x + gate * update for x [B, L, D] and a vector [B, D]."""
    return (x + gate[:, None] * update).to(x.dtype)


def stream(x: Tensor, layers: Sequence[nn.Module], norms: Sequence[nn.RMSNorm], head_dim: int) -> Stream:
    """Queries, keys and values of tokens x [B, L, D], by projections and norms in this order."""
    heads = (run_linear(layer, x).unflatten(-1, (-1, head_dim)) for layer in layers)
    return Stream(*heads, *(norm.weight for norm in norms))


def runs_in_int8(layer: nn.Module) -> bool:
    """Whether a block's attention may run in 8 bits as well: where its linear layers do."""
    return isinstance(layer, QuantizedLinear) and layer.kind == "int8"


def run_linear(layer: nn.Module, *parts: Tensor, gelu: bool = False, wide: bool = False) -> Tensor:
    """A linear layer, quantized or not: see `jitexport.kernels.linear.linear`."""
    return linear(parts, layer.weight, layer.bias, getattr(layer, "weight_scale", None), gelu=gelu, wide=wide)


def feed_forward(ff: nn.Module, x: Tensor) -> Tensor:
    """diffusers' `FeedForward` with its tanh GELU, [B, L, D] -> [B, L, D]."""
    return run_linear(ff.net[2], run_linear(ff.net[0].proj, x, gelu=True), wide=True)


def double_block(
    block: nn.Module, image: Tensor, text: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Joint attention of text [B, T, D] and image [B, m, D] with weights of their own; modulation [B, 12 D]."""
    shift_i, scale_i, gate_i, shift_i2, scale_i2, gate_i2, *rest = modulation.chunk(12, dim=-1)
    shift_t, scale_t, gate_t, shift_t2, scale_t2, gate_t2 = rest
    attn = block.attn
    d = attn.head_dim

    x = modulate(block.norm1.norm, image, shift_i, scale_i)
    c = modulate(block.norm1_context.norm, text, shift_t, scale_t)
    streams = [
        stream(c, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), (attn.norm_added_q, attn.norm_added_k), d),
        stream(x, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k), d),
    ]
    a = attention(streams, cos, sin, eps=attn.norm_q.eps, int8=runs_in_int8(attn.to_q)).flatten(2)
    c, x = a.split([text.shape[1], image.shape[1]], dim=1)

    image = gated(image, gate_i, run_linear(attn.to_out[0], x, wide=True))
    image = gated(image, gate_i2, feed_forward(block.ff, modulate(block.norm2, image, shift_i2, scale_i2)))
    text = gated(text, gate_t, run_linear(attn.to_add_out, c, wide=True))
    text = gated(text, gate_t2, feed_forward(block.ff_context, modulate(block.norm2_context, text, shift_t2, scale_t2)))
    return image, text


def single_block(block: nn.Module, x: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Attention and MLP side by side on text and image together, x [B, T + m, D]; modulation [B, 3 D]."""
    shift, scale, gate = modulation.chunk(3, dim=-1)
    attn = block.attn
    d = attn.head_dim
    h = modulate(block.norm.norm, x, shift, scale)
    streams = [stream(h, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k), d)]
    a = attention(streams, cos, sin, eps=attn.norm_q.eps, int8=runs_in_int8(attn.to_q)).flatten(2)
    return gated(x, gate, run_linear(block.proj_out, a, run_linear(block.proj_mlp, h, gelu=True), wide=True))


class FluxStage(nn.Module):
    """One evaluation of the transformer on the active tokens.

    tokens [B, m, C], cos and sin [B, T + m, Dh / 2], modulation [B, M], context [B, T, D] -> velocity [B, m, C].
    """

    #: Functions of repeated blocks, which a backend may compile once for all blocks.
    regions = ("double_block", "single_block")
    double_block, single_block = staticmethod(double_block), staticmethod(single_block)

    def __init__(self, transformer: FluxTransformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, tokens: Tensor, cos: Tensor, sin: Tensor, modulation: Tensor, context: Tensor) -> Tensor:
        model = self.transformer
        doubles, singles = model.transformer_blocks, model.single_transformer_blocks
        d = model.inner_dim
        *parts, out = modulation.split([12 * d] * len(doubles) + [3 * d] * len(singles) + [2 * d], dim=-1)

        image, text = model.x_embedder(tokens), context
        for block, part in zip(doubles, parts[: len(doubles)], strict=True):
            image, text = self.double_block(block, image, text, part, cos, sin)
        x = torch.cat([text, image], dim=1)
        for block, part in zip(singles, parts[len(doubles) :], strict=True):
            x = self.single_block(block, x, part, cos, sin)
        scale, shift = out.chunk(2, dim=-1)
        return model.proj_out(modulate(model.norm_out.norm, x[:, text.shape[1] :], shift, scale))


class FluxDecode(nn.Module):
    """Packed latents [B, N, C], fp32 -> pictures [B, 3, H, W] in [0, 1], fp32."""

    def __init__(self, vae: AutoencoderKL, grid: TokenGrid) -> None:
        super().__init__()
        self.vae = vae
        self.grid = grid

    def forward(self, tokens: Tensor) -> Tensor:
        config = self.vae.config
        latents = unpack(tokens, self.grid, PATCH) / config.scaling_factor + (config.shift_factor or 0.0)
        picture = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return (picture.float() / 2 + 0.5).clamp(0, 1)


class FluxAdapter(ModelAdapter):
    """A FLUX.1 pipeline in diffusers' format.

    Settings (all optional in `from_folder`): height and width in pixels, max_sequence_length (T5 tokens),
    guidance_scale, num_inference_steps, quantization (of the blocks' linear layers: "int8", "fp8" or None). A folder
    may carry them in a file `jitexport.json`.

    Raises:
        InputError: a size that the autoencoder and the packing do not divide.
        UnsupportedModelError: a component that is not FLUX.1's.
    """

    family = "FluxPipeline"

    def __init__(
        self,
        components: dict[str, nn.Module],
        scheduler: FlowMatchEulerDiscreteScheduler,
        tokenizers: list[Tokenizer],
        settings: dict[str, Any],
    ) -> None:
        self.components = components
        self.scheduler = scheduler
        self._tokenizers = tokenizers
        transformer, vae = components["transformer"], components["vae"]
        self.configs = {
            "transformer": dict(transformer.config),
            "vae": dict(vae.config),
            "text_encoder": components["text_encoder"].config.to_dict(),
            "text_encoder_2": components["text_encoder_2"].config.to_dict(),
            "scheduler": dict(scheduler.config),
        }
        self._settings = settings
        height, width = settings["height"], settings["width"]
        pixels = 2 ** (len(vae.config.block_out_channels) - 1) * PATCH  # of a token's side
        if height % pixels or width % pixels or height < pixels or width < pixels:
            raise InputError(
                "image size does not fit the token grid",
                found=f"{height} x {width}",
                expected=f"height and width that are multiples of {pixels}",
            )
        grid = TokenGrid((height // pixels, width // pixels))
        channels = transformer.config.in_channels // PATCH**2
        self.geometry = ModelGeometry(
            grid=grid,
            latent_shape=(channels, grid.shape[0] * PATCH, grid.shape[1] * PATCH),
            patch=PATCH,
            height=height,
            width=width,
            rotary=Rotary(tuple(transformer.config.axes_dims_rope), THETA, settings["max_sequence_length"]),
        )
        guided = transformer.config.guidance_embeds
        self.defaults = ModelDefaults(
            guidance_scale=settings["guidance_scale"] if guided else None,
            num_inference_steps=settings["num_inference_steps"],
        )
        for module in components.values():
            module.eval().requires_grad_(False)
        if (kind := settings.get("quantization")) is not None:
            quantize_blocks(transformer, kind)

    @classmethod
    def from_folder(cls, folder: Path, dtype: torch.dtype, settings: dict[str, Any] | None = None) -> FluxAdapter:
        return cls._read(folder, dtype, settings, None)

    @classmethod
    def from_file(
        cls, path: Path, base: Path, dtype: torch.dtype, settings: dict[str, Any] | None = None
    ) -> FluxAdapter:
        """A transformer in one file, in its authors' names or diffusers'; everything else from the folder `base`."""
        return cls._read(base, dtype, settings, path)

    @classmethod
    def _read(
        cls, folder: Path, dtype: torch.dtype, settings: dict[str, Any] | None, transformer: Path | None
    ) -> FluxAdapter:
        classes = {
            "transformer": FluxTransformer2DModel,
            "vae": AutoencoderKL,
            "text_encoder": CLIPTextModel,
            "text_encoder_2": T5EncoderModel,
        }
        missing = [name for name in (*classes, "scheduler", "tokenizer", "tokenizer_2") if not (folder / name).is_dir()]
        if missing:
            raise ModelNotFoundError(
                "the pipeline folder is incomplete",
                found=f"{folder} without {', '.join(missing)}",
                expected="a folder written by FluxPipeline.save_pretrained",
                remedy="download the whole repository",
            )
        components: dict[str, nn.Module] = {
            name: read_component(component, folder / name, dtype)
            if name != "transformer" or transformer is None
            else read_transformer(transformer, folder / name, dtype)
            for name, component in classes.items()
        }
        try:
            scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
        except (OSError, ValueError) as error:
            raise ModelNotFoundError(f"cannot read {folder / 'scheduler'}", found=error) from error
        distilled = not components["transformer"].config.guidance_embeds  # schnell: timestep-distilled, no guidance
        usual = {
            "height": 1024,
            "width": 1024,
            "max_sequence_length": 256 if distilled else 512,
            "guidance_scale": 3.5,
            "num_inference_steps": 4 if distilled else 50,
            "quantization": None,
        }
        stored = read_json(folder / "jitexport.json") if (folder / "jitexport.json").is_file() else {}
        given = {k: v for k, v in (settings or {}).items() if v is not None}
        unknown = given.keys() - usual.keys()
        if unknown:
            raise InputError("unknown settings", found=sorted(unknown), expected=f"some of {sorted(usual)}")
        merged = usual | {k: v for k, v in stored.items() if k in usual} | given
        check_settings(merged)
        tokenizers = [
            read_tokenizer(folder / "tokenizer", components["text_encoder"].config.max_position_embeddings),
            read_tokenizer(folder / "tokenizer_2", merged["max_sequence_length"]),
        ]
        return cls(components, scheduler, tokenizers, merged)

    @classmethod
    def from_configs(
        cls, configs: dict[str, dict[str, Any]], settings: dict[str, Any], dtype: torch.dtype
    ) -> FluxAdapter:
        with torch.device("meta"):
            components: dict[str, nn.Module] = {
                "transformer": FluxTransformer2DModel.from_config(configs["transformer"]),
                "vae": AutoencoderKL.from_config(configs["vae"]),
                "text_encoder": CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
                "text_encoder_2": T5EncoderModel(T5Config(**configs["text_encoder_2"])),
            }
        for module in components.values():
            nn.Module.to(module, dtype)  # diffusers' own `to` warns about layers that are not there
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(configs["scheduler"])
        return cls(components, scheduler, [], settings)

    def settings(self) -> dict[str, Any]:
        return dict(self._settings)

    def tokenizers(self) -> list[Tokenizer]:
        return self._tokenizers

    def native_sigmas(self, n: int) -> tuple[float, ...]:
        """As FluxPipeline sets them: linspace(1, 1/n, n), shifted by the resolution where the scheduler asks for it."""
        config = self.scheduler.config
        sigmas = np.linspace(1.0, 1 / n, n) if not config.get("use_flow_sigmas") else None
        mu = calculate_shift(
            self.geometry.grid.tokens,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        self.scheduler.set_timesteps(None if sigmas is not None else n, sigmas=sigmas, mu=mu)
        return tuple(self.scheduler.sigmas.tolist())

    def specs(self, schedule: StageSchedule, batch: int, dtype: str, *, preview: bool = False) -> list[EngineSpec]:
        transformer = self.components["transformer"]
        config = transformer.config
        doubles, singles, d = config.num_layers, config.num_single_layers, transformer.inner_dim
        geometry, text = self.geometry, self.geometry.rotary.text_tokens
        clip = self.components["text_encoder"].config.max_position_embeddings
        embeds = TensorSpec("prompt_embeds", (batch, text, config.joint_attention_dim), dtype)
        pooled = TensorSpec("pooled", (batch, config.pooled_projection_dim), dtype)
        width = d * (12 * doubles + 3 * singles + 2)
        context = TensorSpec("context", (batch, text, d), dtype)
        guidance = (TensorSpec("guidance", (batch,), "fp32"),) if config.guidance_embeds else ()

        def stage(name: str, tokens: int) -> EngineSpec:
            angles = (batch, text + tokens, config.attention_head_dim // 2)
            token_shape = (batch, tokens, geometry.channels)
            return EngineSpec(
                name,
                (
                    TensorSpec("tokens", token_shape, dtype),
                    TensorSpec("cos", angles, "fp32"),
                    TensorSpec("sin", angles, "fp32"),
                    TensorSpec("modulation", (batch, width), dtype),
                    context,
                ),
                (TensorSpec("velocity", token_shape, dtype),),
            )

        def decoder(name: str, grid: TokenGrid, smaller: int) -> EngineSpec:
            return EngineSpec(
                name,
                (TensorSpec("latents", (batch, grid.tokens, geometry.channels), "fp32"),),
                (TensorSpec("images", (batch, 3, geometry.height // smaller, geometry.width // smaller), "fp32"),),
            )

        return [
            EngineSpec(
                "text",
                (TensorSpec("clip_ids", (batch, clip), "int64"), TensorSpec("t5_ids", (batch, text), "int64")),
                (embeds, pooled),
            ),
            EngineSpec(
                "condition",
                (embeds, pooled, TensorSpec("sigmas", (schedule.nfe,), "fp32"), *guidance),
                (TensorSpec("modulation", (schedule.nfe, batch, width), dtype), context),
            ),
            *(stage(s.name, s.tokens) for s in schedule.engines),
            *([decoder("preview", geometry.grid.halved(), 2)] if preview else []),
            decoder("decode", geometry.grid, 1),
        ]

    def module(self, name: str) -> nn.Module:
        parts = self.components
        if name == "text":
            module: nn.Module = FluxText(parts["text_encoder"], parts["text_encoder_2"])
        elif name == "condition":
            module = FluxCondition(parts["transformer"])
        elif name in ("preview", "decode"):
            grid = self.geometry.grid
            module = FluxDecode(parts["vae"], grid.halved() if name == "preview" else grid)
        else:
            module = FluxStage(parts["transformer"])
        return module.eval()


def quantize_blocks(transformer: nn.Module, kind: str) -> None:
    """Quantize the blocks' linear layers. Modulation runs once per image, embedders and the last layer are small."""
    quantize_linears(transformer, kind, lambda name: "transformer_blocks." in name and "norm" not in name)


def check_settings(settings: dict[str, Any]) -> None:
    """Refuse sizes that are no positive whole numbers, negative or no guidance scales, unknown quantizations.

    Raises:
        InputError: naming the settings that are wrong.
    """
    check_kind(settings["quantization"])
    sizes = {k: v for k, v in settings.items() if k not in ("guidance_scale", "quantization")}
    wrong = {k: v for k, v in sizes.items() if not isinstance(v, int) or isinstance(v, bool) or v < 1}
    guidance = settings["guidance_scale"]
    if not isinstance(guidance, int | float) or not 0 <= guidance < float("inf"):  # also refuses NaN
        wrong["guidance_scale"] = guidance
    if wrong:
        raise InputError("settings that a model cannot have", found=wrong, expected="positive numbers, sizes whole")


def read_component(component: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """A model class's weights from a folder, all of them: the libraries would fill in missing ones at random.

    Raises:
        ModelNotFoundError: files that are absent, damaged, or of another shape, or weights that are missing.
    """
    refuse_quantized(folder)
    options = {"dtype": dtype, "local_files_only": True, "output_loading_info": True}
    try:
        module, info = component.from_pretrained(folder, variant=only_variant(folder), **options)
    except ImportError as error:
        raise MissingDependencyError(f"reading {folder} needs another library", found=error) from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelNotFoundError(f"cannot read {folder}", found=error) from error
    if missing := sorted(info["missing_keys"]):
        raise ModelNotFoundError(
            f"weights are missing in {folder}",
            found=f"no {', '.join(missing[:3])}{f' and {len(missing) - 3} more' if missing[3:] else ''}",
            expected="every weight that its config.json calls for",
            remedy="download or save the model again",
        )
    return module


def refuse_quantized(folder: Path) -> None:
    """Refuse weights that another library has quantized: engines have 8-bit layers of their own.

    Raises:
        ModelNotFoundError: a config.json that cannot be read.
        UnsupportedModelError: such weights.
    """
    path = folder / "config.json"
    try:
        settings = read_json(path).get("quantization_config") if path.is_file() else None
    except UnsupportedModelError as error:
        raise ModelNotFoundError(f"cannot read {folder}", found=error) from error
    if settings is not None:
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        raise UnsupportedModelError(
            f"the weights in {folder} are quantized by another library", found=f"quantization_config of {method}",
            expected="weights in bf16, fp16 or fp32",
            remedy="use the model before quantization, and `jitexport build --quant int8` or `fp8`",
        )


def only_variant(folder: Path) -> str | None:
    """The variant ("fp16", ...) of a component whose weights are there in no other form; None for ordinary files.

    Raises:
        ModelNotFoundError: several variants, and no ordinary files.
    """
    variants = set()
    for path in folder.glob("*.safetensors*"):
        match = re.fullmatch(
            r"[a-z_]+(?:-\d+-of-\d+)?(?:\.([\w]+?))?(?:-\d+-of-\d+)?\.safetensors(?:\.index(?:\.([\w]+))?\.json)?",
            path.name,
        )
        variants |= {match[1] or match[2]} if match else set()
    if not variants or None in variants:
        return None
    if len(variants) > 1:
        raise ModelNotFoundError(
            f"several variants of the weights in {folder}", found=", ".join(sorted(variants)), expected="one of them",
            remedy="keep the files of one variant",
        )
    return variants.pop()


def read_transformer(path: Path, folder: Path, dtype: torch.dtype) -> nn.Module:
    """A transformer whose weights are in one file and whose configuration is in a folder.

    Raises:
        ModelNotFoundError: one of them cannot be read.
        InputError: the file is of another model.
    """
    refuse_quantized(folder)
    try:
        config = FluxTransformer2DModel.load_config(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"cannot read {folder}", found=error) from error
    with torch.device("meta"):
        module = FluxTransformer2DModel.from_config(config)
    shapes = {f"transformer.{name}": tuple(value.shape) for name, value in module.state_dict().items()}
    values = read_single_file(path, NAMING, shapes, dtype)
    module.load_state_dict({name.removeprefix("transformer."): v for name, v in values.items()}, assign=True)
    return module


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the package that it is in
        return False


def read_tokenizer(folder: Path, length: int) -> Tokenizer:
    """A tokenizer folder as one JSON text with padding and truncation to `length` built in.

    Raises:
        ModelNotFoundError: files that are absent or damaged, or no vocabulary among them.
        MissingDependencyError: the vocabulary's form needs a library that is not installed.
        UnsupportedModelError: the tokenizer has no fast implementation.
    """
    files = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    slow = "spiece.model" in files and "tokenizer.json" not in files
    # Without a vocabulary, transformers makes a tokenizer that knows no word.
    if not slow and "tokenizer.json" not in files and not files.issuperset(("vocab.json", "merges.txt")):
        raise ModelNotFoundError(
            f"{folder} has no vocabulary", found=", ".join(sorted(files)) or "nothing",
            expected="tokenizer.json, vocab.json with merges.txt, or spiece.model",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # what a missing library leads to is of any type
        if slow and not (_installed("sentencepiece") and _installed("google.protobuf")):
            raise MissingDependencyError(
                f"{folder} has its vocabulary in spiece.model only", found=error,
                remedy="pip install sentencepiece protobuf; or put the model's tokenizer.json beside it",
            ) from error
        raise ModelNotFoundError(f"cannot read {folder}", found=error) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModelError(
            "the tokenizer has no fast implementation",
            found=type(tokenizer).__name__,
            expected=f"a fast one in {folder}",
        )
    backend.enable_truncation(length)
    backend.enable_padding(length=length, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    return Tokenizer(folder.name, backend.to_str(), length)
