"""Qwen-Image and Qwen-Image-2512, and any text-to-image model of their architecture in diffusers' format.

The modules below run diffusers' own weights under their own names, arranged for fixed-shape engines:

- modulation depends on the noise level alone: its vectors are made once, for every prompt, and the layers that make
  them, 6.8 of the transformer's 20.4 billion parameters, are in no engine;
- text is padded to a fixed length, and attention does not see the padding;
- the autoencoder is a causal one for video. Of a single frame, its convolutions see only the last slice of their
  kernels: it is decoded in two dimensions, without the caches of earlier frames.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jitexport.errors import InputError, UnsupportedModelError
from jitexport.guidance import Guidance
from jitexport.models.autoencoders import QwenImageDecode
from jitexport.models.base import Configs, ModelAdapter, ModelDefaults, ModelGeometry, image_grid
from jitexport.models.language import LanguageText, keep_what_is_read
from jitexport.models.layers import (
    Part,
    TransformerPart,
    image_side,
    joint_block,
    last_layer,
    modulated,
    text_side,
)
from jitexport.models.naming import FUSED, TRANSFORMER, Aliases, Naming, Prefix, Target
from jitexport.models.published import QWEN_IMAGE
from jitexport.models.schedulers import flow_sigmas, resolution_shift, scheduler_shift
from jitexport.models.stages import Evaluation, TransformerStage, in_turn
from jitexport.models.tokens import Cell, Memo, joint_cells
from jitexport.positions import Rotary
from jitexport.prompting import Tokenizer
from jitexport.specs import EngineSpec, TensorSpec

PATCH = 2  # latent pixels on a token's side
THETA = 10000.0

#: What the language model is asked about a prompt, as the model was trained with it.
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
DROPPED = 34  # its tokens in front of the prompt, whose states the image model does not see
LONGEST = 1024  # tokens of a text after them
STATES = (-1,)  # of the language model: what its final norm gives
PADDING = -1e9  # added to the scores of keys that are padding


class QwenImageText(LanguageText):
    """The language model: ids and their mask [B, 34 + T] -> states [B, T, E], 1 for tokens and 0 else [B, T], fp32."""

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        (states,) = self.states(ids, mask, STATES)
        return states[:, DROPPED:], mask[:, DROPPED:].float()


class QwenImageModulation(nn.Module):
    """Modulation vectors of noise levels: sigmas [S], fp32 -> [S, M].

    M holds the vectors of each block (image 6 D, text 6 D: shift, scale and gate of attention, then of the MLP) and of
    the output norm (scale, shift).

    Args:
        transformer: loses the layers that make them.
    """

    def __init__(self, transformer: Part) -> None:
        super().__init__()
        self.embed = transformer.time_text_embed
        blocks = transformer.transformer_blocks
        self.layers = nn.ModuleList(mod[1] for block in blocks for mod in (block.img_mod, block.txt_mod))
        self.layers.append(transformer.norm_out.linear)
        transformer.time_text_embed = transformer.norm_out.linear = None
        for block in blocks:
            block.img_mod = block.txt_mod = None

    def forward(self, sigmas: Tensor) -> Tensor:
        # Angles of up to 1000 radians: made in fp32 whatever the model's dtype.
        angles = self.embed.time_proj(sigmas.float()).to(self.layers[0].weight.dtype)
        emb = F.silu(self.embed.timestep_embedder(angles))  # [S, D]
        return torch.cat([layer(emb) for layer in self.layers], dim=-1)


class QwenImageCondition(TransformerPart):
    """What the transformer makes of the text before its blocks.

    prompt_embeds [B, T, E], their mask [B, T] -> context [B, T, D], what is added to scores of its keys [B, T].
    """

    def forward(self, prompt_embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        context = self.transformer.txt_in(self.transformer.txt_norm(prompt_embeds))
        return context, (1 - mask) * PADDING


def double_block(
    block: Part, image: Tensor, text: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor, mask: Tensor,
    memo: Memo | None = None,
) -> tuple[Tensor, Tensor]:
    """Joint attention of text [B, T, D] and image [B, m, D] with weights of their own.

    modulation [1, 12 D], angles [B, T + m, Dh / 2], mask of keys [B, T + m].
    """
    attn = block.attn
    sides = (
        text_side(attn, block.txt_norm1, block.txt_norm2, block.txt_mlp),
        image_side(attn, block.img_norm1, block.img_norm2, block.img_mlp),
    )
    of_image, of_text = modulation.chunk(2, dim=-1)
    text, image = joint_block(attn, sides, (text, image), (of_text, of_image), cos, sin, mask, memo=memo)
    return image, text


class QwenImageStage(TransformerStage):
    """One evaluation of the transformer on the active tokens.

    tokens [B, m, C], cos and sin [B, T + m, Dh / 2], context [B, T, D], key_mask [B, T] (added to the scores of the
    text's keys, fp32), modulation [M] -> velocity [B, m, C].
    """

    #: The function of the repeated blocks, which a backend may compile once for all blocks.
    regions = ("double_block",)
    double_block = staticmethod(double_block)

    def forward(
        self, tokens: Tensor, cos: Tensor, sin: Tensor, context: Tensor, key_mask: Tensor, modulation: Tensor,
        *kept: Tensor,
    ) -> Tensor | tuple[Tensor, ...]:
        model = self.transformer
        layers, d = model.transformer_blocks, model.inner_dim
        *parts, out = modulation[None].split([12 * d] * len(layers) + [2 * d], dim=-1)
        mask = F.pad(key_mask, (0, tokens.shape[1]))

        def block(i: int, image: Tensor, text: Tensor, *memo: Memo) -> tuple[Tensor, Tensor]:
            return self.double_block(layers[i], image, text, parts[i], cos, sin, mask, *memo)

        output = partial(last_layer, model, modulation=out)
        first_input = partial(modulated, layers[0].img_norm1, parts[0])
        image, depth = model.img_in(tokens), len(layers)
        return self.act(Evaluation(image, context, depth, depth // 2, in_turn(block), output, first_input), kept)


# --- names in adapters and checkpoints -------------------------------------------------------------------------------


def aliases(modules: Iterable[str]) -> dict[str, Target]:
    """See `jitexport.models.naming.Naming`: the authors' own names are diffusers'."""
    names = Aliases(modules)
    for block in names.blocks("transformer_blocks"):
        names.add_all(block, block, FUSED, partial=True)
    return names.found


NAMING = Naming(
    (*TRANSFORMER, Prefix("text_encoder.", "text_encoder"), Prefix("lora_te_", "text_encoder", flat=True)),
    aliases,
    constant=("img_mod", "txt_mod", "time_text_embed", "norm_out"),
)


class QwenImageAdapter(ModelAdapter):
    """A Qwen-Image pipeline in diffusers' format. The setting `guidance_scale` is the usual `true_cfg_scale`."""

    family = "QwenImagePipeline"
    classes: ClassVar[Mapping[str, str]] = {
        "transformer": "diffusers:QwenImageTransformer2DModel",
        "vae": "diffusers:AutoencoderKLQwenImage",
        "text_encoder": "transformers:Qwen2_5_VLForConditionalGeneration",
    }
    naming = NAMING
    published = QWEN_IMAGE

    @classmethod
    def check(cls, configs: Configs, settings: Mapping[str, Any]) -> None:
        """Edit and Layered models have transformers of the same class, with further inputs."""
        transformer, vae = configs["transformer"], configs["vae"]
        further = ("zero_cond_t", "use_layer3d_rope", "use_additional_t_cond", "guidance_embeds")
        if found := [name for name in further if transformer.get(name)]:
            raise UnsupportedModelError(
                "a transformer that sees more than text and noise (Qwen-Image-Edit or Qwen-Image-Layered)",
                found=", ".join(found), expected="Qwen-Image, Qwen-Image-2512, or a model like them",
            )
        if (channels := vae.get("input_channels", 3)) != 3:
            raise UnsupportedModelError(
                "an autoencoder of other pictures than red, green and blue (Qwen-Image-Layered)",
                found=f"{channels} channels", expected="3",
            )
        if (text := settings["max_sequence_length"]) > LONGEST:
            raise InputError(
                "more text than the model reads", found=f"max_sequence_length {text}", expected=f"at most {LONGEST}"
            )

    @classmethod
    def usual(cls, configs: Configs) -> dict[str, Any]:
        return {
            "height": 1024,
            "width": 1024,
            "max_sequence_length": 512,
            "guidance_scale": 4.0,
            "num_inference_steps": 50,
            "quantization": None,
            "features": None,
        }

    @classmethod
    def geometry_of(cls, configs: Configs, settings: Mapping[str, Any]) -> ModelGeometry:
        grid = image_grid(settings, 2 ** len(configs["vae"]["temperal_downsample"]) * PATCH)
        rows, columns = grid.shape
        text = settings["max_sequence_length"]
        # The image's middle is the origin; the text goes on along the diagonal, from where the longer side ends.
        positions = Rotary(
            tuple(configs["transformer"]["axes_dims_rope"]),
            THETA,
            grid_axes=(1, 2),
            offset=(rows // 2 - rows, columns // 2 - columns),
            text_tokens=text,
            text_start=(max(rows, columns) // 2,) * 3,
            text_step=(1,) * 3,
        )
        return ModelGeometry(
            grid=grid,
            latent_shape=(configs["vae"]["z_dim"], rows * PATCH, columns * PATCH),
            patch=PATCH,
            height=settings["height"],
            width=settings["width"],
            positions=positions,
            text_tokens=text,
        )

    @classmethod
    def defaults_of(cls, configs: Configs, settings: Mapping[str, Any]) -> ModelDefaults:
        guidance = Guidance(true=settings["guidance_scale"], argument="true_cfg_scale", rescaled=True)
        return ModelDefaults(guidance, settings["num_inference_steps"], settings["max_sequence_length"])

    def arrange(self) -> None:
        """Modulation becomes `once`; of the language model and the autoencoder goes what reads or makes no text."""
        self.once = QwenImageModulation(self.components["transformer"])
        keep_what_is_read(self.components["text_encoder"], STATES)
        vae = self.components["vae"]
        vae.encoder = vae.quant_conv = None
        for up in vae.decoder.up_blocks:
            for upsampler in up.upsamplers or ():
                upsampler.time_conv = None

    @classmethod
    def cells(cls, configs: Configs) -> tuple[Cell, ...]:
        return joint_cells(configs["transformer"]["num_layers"], "text", "image")

    @classmethod
    def tokenizer(cls, folder: str, configs: Configs, settings: Mapping[str, Any]) -> Tokenizer:
        return Tokenizer(folder, "", DROPPED + settings["max_sequence_length"], template=TEMPLATE, mask=True)

    def native_sigmas(self, n: int) -> tuple[float, ...]:
        """As QwenImagePipeline sets them: linspace(1, 1/n, n), shifted by the resolution; the last but one is 0.02."""
        config = self.configs["scheduler"]
        return flow_sigmas(config, n, mu=resolution_shift(config, self.geometry.grid.tokens))

    def shift(self, n: int) -> float:
        """That before the levels are stretched to end at 0.02."""
        config = self.configs["scheduler"]
        return scheduler_shift(config, resolution_shift(config, self.geometry.grid.tokens))

    def text_spec(self, batch: int, dtype: str) -> EngineSpec:
        length = DROPPED + self.geometry.text_tokens
        given = tuple(TensorSpec(name, (batch, length), "int64") for name in ("ids", "mask"))
        return EngineSpec("text", given, self._embeddings(batch, dtype))

    def _embeddings(self, batch: int, dtype: str) -> tuple[TensorSpec, ...]:
        text, width = self.geometry.text_tokens, self.configs["transformer"]["joint_attention_dim"]
        return (
            TensorSpec("prompt_embeds", (batch, text, width), dtype),
            TensorSpec("prompt_embeds_mask", (batch, text), "fp32"),
        )

    def condition_spec(self, batch: int, steps: int, dtype: str) -> EngineSpec:
        text, width = self.geometry.text_tokens, self.components["transformer"].inner_dim
        return EngineSpec(
            "condition",
            self._embeddings(batch, dtype),
            (TensorSpec("context", (batch, text, width), dtype), TensorSpec("key_mask", (batch, text), "fp32")),
        )

    def constants(self, sigmas: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"modulation": self.once(sigmas)}

    def constant_specs(self, steps: int, dtype: str) -> tuple[TensorSpec, ...]:
        width = self.components["transformer"].inner_dim * (12 * self.configs["transformer"]["num_layers"] + 2)
        return (TensorSpec("modulation", (steps, width), dtype, per_step=True),)

    def module(self, name: str) -> nn.Module:
        parts = self.components
        if name == "text":
            module: nn.Module = QwenImageText(parts["text_encoder"])
        elif name == "condition":
            module = QwenImageCondition(parts["transformer"])
        elif name in ("preview", "decode"):
            grid = self.geometry.grid
            module = QwenImageDecode(parts["vae"], grid.halved() if name == "preview" else grid, PATCH)
        else:
            module = QwenImageStage(parts["transformer"], self.act(name))
        return module.eval()
