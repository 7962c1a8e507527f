"""The demo model's networks: FLUX.1's architecture, small, with tokenizers that know its captions' words."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shards import TEXT_TOKENS
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from jitexport.evaluate.scenes import caption_words, plural
from jitexport.kernels.linear import quantize

GRID = 32  # tokens a side: 256 pixels / 4 (autoencoder) / 2 (packing)
SHIFT = 2.0  # of the scheduler's noise levels, see `shifted`
SPECIAL_TOKENS = {"<pad>": 0, "<eos>": 1, "<bos>": 2}
UNKNOWN = "<unk>"
SCALE = ":scale"  # after the name of a tensor in 8 bits

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


def shifted(sigma: torch.Tensor, shift: float) -> torch.Tensor:
    """Noise levels moved up, as the scheduler moves them: s -> shift * s / (1 + (shift - 1) * s)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


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


def starting_models(init: Path, from_scratch: bool = False, weights: Path | None = None) -> Models:
    """The networks of a folder, for captions of today.

    Args:
        from_scratch: only the autoencoder is trained already.
        weights: file that `save_weights` wrote, whose weights replace the folder's.
    """
    models = load_models(init)
    if from_scratch:
        return make_models(caption_words(), models.vae)
    if weights:
        models = load_weights(models, weights)
    return with_words(models, caption_words())


def with_words(models: Models, words: Sequence[str]) -> Models:
    """The same networks for a vocabulary that has `words` too.

    Old words keep their numbers. A plural starts with the embedding of its singular, other new words with that of the
    unknown word.
    """
    old = models.t5_tokenizer.get_vocab()
    new = [word for word in words if word not in old]
    singular = {plural(word): word for word in words if word in old}
    sources = [old[singular.get(word, UNKNOWN)] for word in new]
    known = words_of(models)

    def grow(encoder: nn.Module) -> None:
        rows = encoder.get_input_embeddings().weight.detach()[sources].clone()
        encoder.resize_token_embeddings(len(old) + len(new), mean_resizing=False)
        with torch.no_grad():
            encoder.get_input_embeddings().weight[len(old) :] = rows

    grow(models.t5)
    grow(models.clip)
    return tokenized(models, [*known, *new])


def tokenized(models: Models, words: Sequence[str]) -> Models:
    """The same networks with tokenizers for other words, in the order of their numbers."""
    return replace(
        models,
        t5_tokenizer=make_tokenizer(words, "$A <eos>"),
        clip_tokenizer=make_tokenizer(words, "<bos> $A <eos>"),
    )


def words_of(models: Models) -> list[str]:
    """The words of the vocabulary in the order of their numbers, the unknown word among them."""
    numbers = models.t5_tokenizer.get_vocab()
    return [word for word in sorted(numbers, key=numbers.get) if word not in SPECIAL_TOKENS]


def save_weights(models: Models, path: Path) -> None:
    """Write weights for a run to start from: matrices in 8 bits with a scale for each row, the rest in half precision.

    A file of half the size, for a start that training goes on from. It says which words the embeddings are for.
    """
    tensors = {}
    for name, value in models.trained.state_dict().items():
        if value.dim() < 2:
            tensors[name] = value.half()
        else:
            rows, scales = quantize(value.flatten(1), "int8")
            tensors[name], tensors[f"{name}{SCALE}"] = rows.view(value.shape), scales[:, 0]
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={"words": " ".join(words_of(models))})
    path.chmod(0o644)  # the library writes for the owner only


def load_weights(models: Models, path: Path) -> Models:
    """The networks with the weights and the words that `save_weights` wrote."""
    with safe_open(path, "pt") as file:
        models = tokenized(models, file.metadata()["words"].split())
    for encoder in (models.t5, models.clip):
        encoder.resize_token_embeddings(len(models.t5_tokenizer), mean_resizing=False)
    tensors = load_file(path)
    scales = {name: tensors.pop(f"{name}{SCALE}") for name in list(tensors) if f"{name}{SCALE}" in tensors}
    for name, scale in scales.items():
        rows = tensors[name].flatten(1).float() * scale[:, None]
        tensors[name] = rows.view(tensors[name].shape)
    models.trained.load_state_dict(tensors)
    return models


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
