"""A HunyuanVideo-1.5 pipeline small enough for tests, in diffusers' own format."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    ByT5Tokenizer,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
)

from tests.tiny import randomise, save

HEIGHT, WIDTH, FRAMES = 40, 24, 9  # pixels
GRID = (3, 5, 3)  # frames, rows and columns of tokens: 4 frames and 8 x 8 pixels each
CHANNELS = 4
TEXT_TOKENS, GLYPH_TOKENS, IMAGE_TOKENS = 14, 20, 4
DROPPED = 108
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

#: As Qwen2.5-VL's, for conversations without pictures.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_tokenizer(text: str) -> Qwen2Tokenizer:
    """The model's tokenizer class with a vocabulary learned from one text, of which every word is a token."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator([text], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=learned["vocab"], merges=merges, chat_template=CHAT_TEMPLATE)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[1:])})
    return tokenizer


def hunyuan_video15(**transformer: object) -> HunyuanVideo15Pipeline:
    """The pipeline with random weights, the same at every call; changes of the transformer's configuration."""
    system = HunyuanVideo15Pipeline._get_mllm_prompt_embeds.__defaults__[2]
    tokenizer = qwen_tokenizer(f"system\n{system}\nuser\nassistant\na fox on the snow")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = {
            "in_channels": 2 * CHANNELS + 1,
            "out_channels": CHANNELS,
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "num_layers": 2,
            "num_refiner_layers": 2,
            "text_embed_dim": 32,
            "text_embed_2_dim": 24,
            "image_embed_dim": 16,
            "rope_axes_dim": (8, 12, 12),
            "task_type": "t2v",
        }
        model = HunyuanVideo15Transformer3DModel(**config | transformer)
        vae = AutoencoderKLHunyuanVideo15(
            latent_channels=CHANNELS,
            block_out_channels=(8, 8, 16, 16),
            layers_per_block=1,
            spatial_compression_ratio=8,
            temporal_compression_ratio=4,
            scaling_factor=1.3,
        )
        qwen = Qwen2_5_VLTextModel(
            Qwen2_5_VLTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
            )
        )
        byt5 = T5EncoderModel(
            T5Config(vocab_size=384, d_model=24, d_kv=8, d_ff=48, num_layers=1, num_heads=3,
                     feed_forward_proj="gated-gelu")
        )
    generator = torch.Generator().manual_seed(1)
    for module in (model, vae, qwen, byt5):
        randomise(module.eval(), generator)
    pipe = HunyuanVideo15Pipeline(
        text_encoder=qwen,
        tokenizer=tokenizer,
        transformer=model,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder_2=byt5,
        tokenizer_2=ByT5Tokenizer(),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    )
    return short_texts(pipe)


def short_texts(pipe: HunyuanVideo15Pipeline) -> HunyuanVideo15Pipeline:
    """The pipeline with texts of the tiny lengths, which are no part of a saved pipeline."""
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = TEXT_TOKENS, GLYPH_TOKENS
    pipe.vision_num_semantic_tokens = IMAGE_TOKENS
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_hunyuan_video15(folder: Path, **transformer: object) -> Path:
    sizes = {"height": HEIGHT, "width": WIDTH, "frames": FRAMES}
    texts = {"max_sequence_length": TEXT_TOKENS, "glyph_length": GLYPH_TOKENS}
    return save(hunyuan_video15(**transformer), folder, **sizes, **texts)
