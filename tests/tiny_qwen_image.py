"""A Qwen-Image pipeline small enough for tests, in diffusers' own format."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from tests import tiny
from tests.tiny import randomise

HEIGHT, WIDTH = 56, 40
GRID = (7, 5)
TEXT_TOKENS = 16
SENTENCES = [
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of"
    " the objects and background:\nuser\n",
    "\nassistant\n",
    "a red fox in the snow under green trees",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@cache
def tokenizer() -> Qwen2Tokenizer:
    """Byte-level pairs as Qwen's, learned from a few sentences: the chat template has as many tokens as with Qwen's."""
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, min_frequency=1, show_progress=False)
    fast.train_from_iterator(SENTENCES, trainer)
    learned = json.loads(fast.to_str())["model"]
    tokens = Qwen2Tokenizer(vocab=learned["vocab"], merges=[tuple(pair) for pair in learned["merges"]])
    tokens.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    return tokens


def pipeline(*, channels: int = 16) -> QwenImagePipeline:
    """The pipeline with random weights, the same at every call; all that Qwen-Image switches on is there.

    Args:
        channels: of a head of the transformer.
    """
    tokens = tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=channels,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(channels // 4, channels * 3 // 8, channels * 3 // 8),
        )
        vae = AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[-0.7, 0.1, 0.9, -0.2],
            latents_std=[2.8, 1.4, 1.2, 0.8],
        )
        encoder = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config={
                    "vocab_size": len(tokens),
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "max_position_embeddings": 4096,
                    "rms_norm_eps": 1e-6,
                    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1000000.0},
                    "pad_token_id": tokens.pad_token_id,
                    "bos_token_id": None,
                    "eos_token_id": tokens.eos_token_id,
                },
                vision_config={
                    "depth": 1,
                    "hidden_size": 16,
                    "intermediate_size": 16,
                    "num_heads": 2,
                    "out_hidden_size": 32,
                    "fullatt_block_indexes": [0],
                },
            )
        )
    generator = torch.Generator().manual_seed(1)
    for module in (transformer, vae, encoder):
        randomise(module.eval(), generator)
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            max_image_seq_len=8192,
            shift_terminal=0.02,
        ),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokens,
        transformer=transformer,
    )


def save(folder: Path, *, channels: int = 16) -> Path:
    return tiny.save(pipeline(channels=channels), folder, height=HEIGHT, width=WIDTH, max_sequence_length=TEXT_TOKENS)
