"""Names of HunyuanVideo-1.5's modules in its authors' checkpoints and in adapters, beside diffusers' own."""

from __future__ import annotations

from collections.abc import Iterable

from jitexport.models.naming import ADDED, FUSED, QKV, TRANSFORMER, Aliases, Naming, Prefix, Target

PREFIXES = (
    *TRANSFORMER,
    Prefix("text_encoder.", "text_encoder"),
    Prefix("text_encoder_2.", "text_encoder_2"),
)

#: {name in a block of the authors: names in diffusers' block}
BLOCK = {
    "img_attn_q": ("attn.to_q",),
    "img_attn_k": ("attn.to_k",),
    "img_attn_v": ("attn.to_v",),
    "img_attn_q_norm": ("attn.norm_q",),
    "img_attn_k_norm": ("attn.norm_k",),
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_q": ("attn.add_q_proj",),
    "txt_attn_k": ("attn.add_k_proj",),
    "txt_attn_v": ("attn.add_v_proj",),
    "txt_attn_q_norm": ("attn.norm_added_q",),
    "txt_attn_k_norm": ("attn.norm_added_k",),
    "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp.fc1": ("ff.net.0.proj",),
    "img_mlp.fc2": ("ff.net.2",),
    "txt_mlp.fc1": ("ff_context.net.0.proj",),
    "txt_mlp.fc2": ("ff_context.net.2",),
    "img_mod.linear": ("norm1.linear",),
    "txt_mod.linear": ("norm1_context.linear",),
}

#: Parts of blocks as ComfyUI has them.
BLOCK_ADAPTERS = {
    "img_attn.qkv": QKV,
    "txt_attn.qkv": ADDED,
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}

REFINER_BLOCK = {
    "norm1": ("norm1",),
    "norm2": ("norm2",),
    "self_attn_qkv": QKV,
    "self_attn_proj": ("attn.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
    "adaLN_modulation.1": ("norm_out.linear",),
}

OUTSIDE = {
    "img_in.proj": "x_embedder.proj",
    "cond_type_embedding": "cond_type_embed",
    "time_in.mlp.0": "time_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_embed.timestep_embedder.linear_2",
    "txt_in.input_embedder": "context_embedder.proj_in",
    "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
    "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
    "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
    "byt5_in.layernorm": "context_embedder_2.norm",
    "byt5_in.fc1": "context_embedder_2.linear_1",
    "byt5_in.fc2": "context_embedder_2.linear_2",
    "byt5_in.fc3": "context_embedder_2.linear_3",
    "vision_in.proj.0": "image_embedder.norm_in",
    "vision_in.proj.1": "image_embedder.linear_1",
    "vision_in.proj.3": "image_embedder.linear_2",
    "vision_in.proj.4": "image_embedder.norm_out",
    "final_layer.linear": "proj_out",
}


def aliases(modules: Iterable[str]) -> dict[str, Target]:
    """See `jitexport.models.naming.Naming`."""
    names = Aliases(modules)
    for block in names.blocks("transformer_blocks"):
        theirs = block.replace("transformer_blocks", "double_blocks")
        names.add_all(theirs, block, BLOCK)
        names.add_all(theirs, block, BLOCK_ADAPTERS, partial=True)
        names.add_all(block, block, FUSED, partial=True)
    refiner = "context_embedder.token_refiner.refiner_blocks"
    for block in names.blocks(refiner):
        names.add_all(block.replace(refiner, "txt_in.individual_token_refiner.blocks"), block, REFINER_BLOCK)
    names.add_outside(OUTSIDE)
    return names.found


NAMING = Naming(
    PREFIXES,
    aliases,
    constant=(
        "norm1.linear", "norm1_context.linear", "norm_out.linear", "time_embed",
        "img_mod", "txt_mod", "final_layer.adaLN_modulation", "time_in",
    ),
)
