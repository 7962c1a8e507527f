"""Names of Stable Diffusion 3's modules in its authors' checkpoints and in adapters, beside diffusers' own."""

from __future__ import annotations

from collections.abc import Iterable

from jitexport.models.naming import ADDED, FUSED, QKV, TRANSFORMER, Aliases, Naming, Prefix, Target

PREFIXES = (
    *TRANSFORMER,
    Prefix("text_encoder.", "text_encoder"),
    Prefix("text_encoder_2.", "text_encoder_2"),
    Prefix("text_encoder_3.", "text_encoder_3"),
    Prefix("text_encoders.clip_l.transformer.", "text_encoder"),
    Prefix("text_encoders.clip_g.transformer.", "text_encoder_2"),
    Prefix("text_encoders.t5xxl.transformer.", "text_encoder_3"),
    Prefix("lora_te1_", "text_encoder", flat=True),
    Prefix("lora_te2_", "text_encoder_2", flat=True),
    Prefix("lora_te3_", "text_encoder_3", flat=True),
)

AGAIN = ("attn2.to_q", "attn2.to_k", "attn2.to_v")  # of SD3.5-medium's second attention

#: {name in a block of the authors: names in diffusers' block}
BLOCK = {
    "x_block.attn.qkv": QKV,
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn.ln_q": ("attn.norm_q",),
    "x_block.attn.ln_k": ("attn.norm_k",),
    "x_block.attn2.qkv": AGAIN,
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.attn2.ln_q": ("attn2.norm_q",),
    "x_block.attn2.ln_k": ("attn2.norm_k",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.attn.qkv": ADDED,
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.attn.ln_q": ("attn.norm_added_q",),
    "context_block.attn.ln_k": ("attn.norm_added_k",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}
OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}


def aliases(modules: Iterable[str]) -> dict[str, Target]:
    """See `jitexport.models.naming.Naming`."""
    names = Aliases(modules)
    blocks = names.blocks("transformer_blocks")
    for block in blocks:
        names.add_all(block.replace("transformer_blocks", "joint_blocks"), block, BLOCK)
        names.add_all(block, block, FUSED | {"attn2.to_qkv": AGAIN}, partial=True)
    names.add_outside(OUTSIDE)
    # The last block's text has scale and shift alone, as the output's norm.
    for block in blocks[-1:]:
        theirs = block.replace("transformer_blocks", "joint_blocks")
        names.add(f"{theirs}.context_block.adaLN_modulation.1", [f"{block}.norm1_context.linear"], swapped=True)
    return names.found


NAMING = Naming(PREFIXES, aliases)
