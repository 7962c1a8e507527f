"""A FLUX.2-klein pipeline small enough for tests, in diffusers' own format."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tests.tiny import randomise, save

HEIGHT, WIDTH = 48, 32
GRID = (12, 8)
TEXT_TOKENS = 48
CHANNELS = 16  # of a token
HIDDEN = 16  # of the text encoder

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
MERGES = [("r", "e"), ("re", "d"), ("Ġ", "red"), ("f", "o"), ("fo", "x"), ("Ġ", "fox"), ("u", "s"), ("us", "e")]

#: What Qwen3's template makes of one user's turn: `enable_thinking=False` writes an empty thought.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def tokenizer() -> Qwen2TokenizerFast:
    """Bytes, a few merges, and Qwen's special tokens."""
    words = [*sorted(ByteLevel.alphabet()), *(a + b for a, b in MERGES), *SPECIAL]
    fast = Qwen2TokenizerFast(
        vocab={word: i for i, word in enumerate(words)}, merges=MERGES, pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[1:3], model_max_length=1024,
    )
    fast.add_tokens(SPECIAL[3:])
    fast.chat_template = TEMPLATE
    return fast


def klein(*, distilled: bool = False, channels: int = 16) -> Flux2KleinPipeline:
    """The pipeline with random weights, the same at every call; `channels` of a head of the transformer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = Flux2Transformer2DModel(
            in_channels=CHANNELS,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=channels,
            num_attention_heads=2,
            joint_attention_dim=3 * HIDDEN,
            timestep_guidance_channels=32,
            axes_dims_rope=(channels // 4,) * 4,
            guidance_embeds=False,
        )
        vae = AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            layers_per_block=1,
            latent_channels=CHANNELS // 4,
            norm_num_groups=4,
            sample_size=32,
        )
        text_encoder = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer()),
                hidden_size=HIDDEN,
                intermediate_size=24,
                num_hidden_layers=29,  # layers 9, 18 and 27 are read, and the last norm is not among them
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                max_position_embeddings=1024,
                tie_word_embeddings=True,
            )
        )
    generator = torch.Generator().manual_seed(1)
    for module in (transformer, vae, text_encoder):
        randomise(module.eval(), generator)
    vae.bn.running_mean.copy_(torch.randn(CHANNELS, generator=generator))
    vae.bn.running_var.copy_(torch.rand(CHANNELS, generator=generator) + 0.5)
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer(),
        transformer=transformer,
        is_distilled=distilled,
    )


def save_klein(folder: Path, *, distilled: bool = False, channels: int = 16) -> Path:
    pipe = klein(distilled=distilled, channels=channels)
    return save(pipe, folder, height=HEIGHT, width=WIDTH, max_sequence_length=TEXT_TOKENS)
