"""Names of FLUX.1's modules beside diffusers': those of its authors, of trainers, and of ComfyUI.

Needs no library of models, so that a bundle's runtime can read adapters.
"""

from __future__ import annotations

from collections.abc import Iterable

from jitexport.models.naming import Naming, Prefix, Target

PREFIXES = (
    Prefix("transformer.", "transformer"),
    Prefix("text_encoder.", "text_encoder"),
    Prefix("text_encoder_2.", "text_encoder_2"),
    Prefix("diffusion_model.", "transformer"),  # ComfyUI, ai-toolkit
    Prefix("model.diffusion_model.", "transformer"),
    Prefix("text_encoders.clip_l.transformer.", "text_encoder"),
    Prefix("text_encoders.t5xxl.transformer.", "text_encoder_2"),
    Prefix("lora_unet_", "transformer", flat=True),  # kohya
    Prefix("lora_transformer_", "transformer", flat=True),  # OneTrainer
    Prefix("lycoris_", "transformer", flat=True),  # LyCORIS' wrapper
    Prefix("lora_te1_", "text_encoder", flat=True),
    Prefix("lora_te2_", "text_encoder_2", flat=True),  # OneTrainer
    Prefix("lora_te3_", "text_encoder_2", flat=True),  # kohya: T5 is the third encoder of ComfyUI's list
    Prefix("", "transformer"),
)

_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")

#: {name in a double block of the authors: names in diffusers' block}
DOUBLE = {
    "img_attn.qkv": _QKV,
    "txt_attn.qkv": _ADDED,
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
}

SINGLE = {
    "linear1": (*_QKV, "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
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

#: XLabs' processors, and diffusers' fused projections: parts of blocks that checkpoints do not have so.
DOUBLE_ADAPTERS = {
    "processor.qkv_lora1": _QKV,
    "processor.qkv_lora2": _ADDED,
    "processor.proj_lora1": ("attn.to_out.0",),
    "processor.proj_lora2": ("attn.to_add_out",),
}
SINGLE_ADAPTERS = {"processor.qkv_lora": _QKV, "processor.proj_lora": ("proj_out",)}
FUSED = {"attn.to_qkv": _QKV, "attn.to_added_qkv": _ADDED}


def aliases(modules: Iterable[str]) -> dict[str, Target]:
    """See `jitexport.models.naming.Naming`."""
    known = set(modules)
    found: dict[str, Target] = {}

    def add(name: str, owned: Iterable[str], *, swapped: bool = False, partial: bool = False) -> None:
        targets = tuple(f"transformer.{module}" for module in owned)
        if known.issuperset(targets):
            found[f"transformer.{name}"] = Target(targets, swapped, partial)

    for theirs, ours, tables in (
        ("double_blocks", "transformer_blocks", (DOUBLE, DOUBLE_ADAPTERS)),
        ("single_blocks", "single_transformer_blocks", (SINGLE, SINGLE_ADAPTERS)),
    ):
        for i in _blocks(known, ours):
            for table in tables:
                for name, parts in table.items():
                    partial = table is not tables[0]
                    add(f"{theirs}.{i}.{name}", [f"{ours}.{i}.{p}" for p in parts], partial=partial)
            for name, parts in FUSED.items():
                add(f"{ours}.{i}.{name}", [f"{ours}.{i}.{p}" for p in parts], partial=True)
    for name, part in OUTSIDE.items():
        add(name, [part])
    add("final_layer.adaLN_modulation.1", ["norm_out.linear"], swapped=True)
    # The authors' norms call their weight "scale", which some formats take for a module.
    found |= {f"{name}.scale": Target(t.modules, partial=True) for name, t in found.items() if name.endswith("_norm")}
    return found | _text_encoders(known)


def _blocks(modules: set[str], group: str) -> list[str]:
    start = f"transformer.{group}."
    return sorted({m.removeprefix(start).partition(".")[0] for m in modules if m.startswith(start)}, key=int)


def _text_encoders(modules: set[str]) -> dict[str, Target]:
    """CLIP's names lost a level in transformers 5."""
    clip = [m.removeprefix("text_encoder.") for m in modules if m.startswith("text_encoder.")]
    return {f"text_encoder.text_model.{m}": Target((f"text_encoder.{m}",)) for m in clip}


NAMING = Naming(PREFIXES, aliases)
