"""Names of FLUX.1's modules beside diffusers': those of its authors, of trainers, and of ComfyUI.

Needs no library of models, so that a bundle's runtime can read adapters.
"""

from __future__ import annotations

from collections.abc import Iterable

from jitexport.models.naming import ADDED, FUSED, QKV, TRANSFORMER, Aliases, Naming, Prefix, Target

PREFIXES = (
    *TRANSFORMER,
    Prefix("text_encoder.", "text_encoder"),
    Prefix("text_encoder_2.", "text_encoder_2"),
    Prefix("text_encoders.clip_l.transformer.", "text_encoder"),
    Prefix("text_encoders.t5xxl.transformer.", "text_encoder_2"),
    Prefix("lora_te1_", "text_encoder", flat=True),
    Prefix("lora_te2_", "text_encoder_2", flat=True),  # OneTrainer
    Prefix("lora_te3_", "text_encoder_2", flat=True),  # kohya: T5 is the third encoder of ComfyUI's list
)

#: {name in a double block of the authors: names in diffusers' block}, of attention, in FLUX.2 as in FLUX.1
ATTENTION = {
    "img_attn.qkv": QKV,
    "txt_attn.qkv": ADDED,
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
}
NORMS = {"norm.query_norm": ("attn.norm_q",), "norm.key_norm": ("attn.norm_k",)}  # of a single block

DOUBLE = ATTENTION | {
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
}

SINGLE = NORMS | {
    "linear1": (*QKV, "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}

OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}

#: XLabs' processors: parts of blocks that checkpoints do not have so.
DOUBLE_ADAPTERS = {
    "processor.qkv_lora1": QKV,
    "processor.qkv_lora2": ADDED,
    "processor.proj_lora1": ("attn.to_out.0",),
    "processor.proj_lora2": ("attn.to_add_out",),
}
SINGLE_ADAPTERS = {"processor.qkv_lora": QKV, "processor.proj_lora": ("proj_out",)}


def aliases(modules: Iterable[str]) -> dict[str, Target]:
    """See `jitexport.models.naming.Naming`."""
    names = Aliases(modules)
    for ours, theirs, table, adapters in (
        ("transformer_blocks", "double_blocks", DOUBLE, DOUBLE_ADAPTERS),
        ("single_transformer_blocks", "single_blocks", SINGLE, SINGLE_ADAPTERS),
    ):
        for block in names.blocks(ours):
            their_block = block.replace(ours, theirs)
            names.add_all(their_block, block, table)
            names.add_all(their_block, block, adapters, partial=True)
            names.add_all(block, block, FUSED, partial=True)
    names.add_outside(OUTSIDE)
    names.add_scales()
    return names.found | _text_encoders(names.known)


def _text_encoders(modules: set[str]) -> dict[str, Target]:
    """CLIP's names lost a level in transformers 5."""
    clip = [m.removeprefix("text_encoder.") for m in modules if m.startswith("text_encoder.")]
    return {f"text_encoder.text_model.{m}": Target((f"text_encoder.{m}",)) for m in clip}


NAMING = Naming(PREFIXES, aliases)
