"""Registered model names, and how a name, a folder or a hub id becomes an adapter."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from jitexport import registry
from jitexport.errors import InputError, MissingDependencyError, ModelNotFoundError, UnsupportedModelError
from jitexport.models.base import ModelAdapter, read_json

DEMO_FOLDER = Path(__file__).parent.parent / "assets" / "demo"

#: Files of a diffusers repository that a pipeline needs; single-file checkpoints beside them are left out.
HUB_FILES = ["model_index.json", "jitexport.json", "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model"]


@dataclass(frozen=True)
class ModelSource:
    """Where a registered model comes from.

    Attributes:
        name: as given to `--model`.
        folder: of a bundled model.
        file: a transformer in one file, for which `folder` has everything else.
        hub_id: of a model on the hub.
        pipeline_class: family, for models whose configuration is known without a download.
        configs, settings: that configuration; see `ModelAdapter.from_configs`.
    """

    name: str
    folder: Path | None = None
    file: Path | None = None
    hub_id: str | None = None
    pipeline_class: str = ""
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def demo() -> ModelSource:
    """The bundled model: FLUX's architecture, small, trained; 256 x 256 pictures of emoji."""
    return ModelSource("demo", folder=DEMO_FOLDER)


def flux_dev() -> ModelSource:
    """FLUX.1-dev (black-forest-labs/FLUX.1-dev), with its published configuration."""
    settings = {"max_sequence_length": 512, "guidance_scale": 3.5, "num_inference_steps": 50}
    scheduler = {"shift": 3.0, "use_dynamic_shifting": True}
    return _flux("flux", "black-forest-labs/FLUX.1-dev", {"guidance_embeds": True}, scheduler, settings)


def flux_schnell() -> ModelSource:
    """FLUX.1-schnell (black-forest-labs/FLUX.1-schnell): 4 steps, no guidance embedding."""
    settings = {"max_sequence_length": 256, "guidance_scale": 0.0, "num_inference_steps": 4}
    scheduler = {"shift": 1.0, "use_dynamic_shifting": False}
    return _flux("flux-schnell", "black-forest-labs/FLUX.1-schnell", {"guidance_embeds": False}, scheduler, settings)


def _flux(
    name: str, hub_id: str, transformer: dict[str, Any], scheduler: dict[str, Any], settings: dict[str, Any]
) -> ModelSource:
    configs = {
        "transformer": {
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "axes_dims_rope": [16, 56, 56],
        }
        | transformer,
        "vae": {
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "block_out_channels": [128, 256, 512, 512],
            "layers_per_block": 2,
            "latent_channels": 16,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
        "text_encoder": {
            "vocab_size": 49408,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "projection_dim": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 77,
        },
        "text_encoder_2": {
            "vocab_size": 32128,
            "d_model": 4096,
            "d_kv": 64,
            "d_ff": 10240,
            "num_layers": 24,
            "num_heads": 64,
            "feed_forward_proj": "gated-gelu",
        },
        "scheduler": {
            "num_train_timesteps": 1000,
            "base_image_seq_len": 256,
            "max_image_seq_len": 4096,
            "base_shift": 0.5,
            "max_shift": 1.15,
        }
        | scheduler,
    }
    return ModelSource(
        name,
        hub_id=hub_id,
        pipeline_class="FluxPipeline",
        configs=configs,
        settings={"height": 1024, "width": 1024} | settings,
    )


def find_source(model: str, base: str | None = None) -> ModelSource:
    """What a `--model` value names: a registered model, an existing folder, a file with `--base`, or else a hub id.

    Args:
        base: what everything beside the transformer comes from, for a transformer in one file; any of the others.

    Raises:
        ModelNotFoundError: none of these.
        InputError: a file without a base, or a base without a file.
    """
    path = Path(model).expanduser()
    if path.suffix == ".safetensors" and not path.is_dir():
        if not path.is_file():
            raise ModelNotFoundError("no such file", found=model)
        if base is None:
            raise InputError(
                "one file is the transformer only", found=model,
                remedy="--base FOLDER: a pipeline in diffusers' format, which has everything else",
            )
        source = find_source(base)
        return replace(source, name=path.stem, file=path, configs={}, settings={})
    if base is not None:
        raise InputError("--base belongs to a model in one file", found=model, expected="a .safetensors file")
    if model in registry.MODELS:
        return registry.model_source(model)()
    if model and path.is_dir():  # Path("") is the current folder
        return ModelSource(path.resolve().name, folder=path)
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return ModelSource(model.split("/")[1], hub_id=model)
    raise ModelNotFoundError(
        "no such model",
        found=model,
        expected=f"one of {', '.join(registry.MODELS)}; a folder in diffusers' format; "
        "a .safetensors file with a base; or a hub id like 'owner/name'",
    )


def load_adapter(source: ModelSource, dtype: torch.dtype, settings: dict[str, Any] | None = None) -> ModelAdapter:
    """Read a model with its weights, downloading it where it is on a hub.

    Raises:
        ModelNotFoundError: no folder, or no hub within reach.
        UnsupportedModelError: a folder that is no pipeline of a registered family.
        MissingDependencyError: the `build` extra is not installed.
    """
    folder = source.folder or download(source)
    if source.file is not None:
        return _adapter_class(folder).from_file(source.file, folder, dtype, settings)
    return _adapter_class(folder).from_folder(folder, dtype, settings)


def config_adapter(source: ModelSource, dtype: torch.dtype, settings: dict[str, Any] | None = None) -> ModelAdapter:
    """The model without weights, on the meta device, for planning: from its known configuration where there is one."""
    if not source.configs:
        return load_adapter(source, dtype, settings)
    given = {k: v for k, v in (settings or {}).items() if v is not None}
    return _require(lambda: registry.family(source.pipeline_class)).from_configs(
        source.configs, source.settings | given, dtype
    )


def _require(find: Callable[[], type[ModelAdapter]]) -> type[ModelAdapter]:
    try:
        return find()
    except ImportError as error:
        raise MissingDependencyError(
            "reading a model needs diffusers and transformers",
            found=error,
            remedy="pip install 'jitexport[build]'",
        ) from error


def _adapter_class(folder: Path) -> type[ModelAdapter]:
    index = folder / "model_index.json"
    if not index.is_file():
        raise UnsupportedModelError(
            "not a diffusers pipeline",
            found=f"{folder} without model_index.json",
            expected="a folder written by save_pretrained",
        )
    name = read_json(index).get("_class_name", "")
    if name not in registry.FAMILIES:
        raise UnsupportedModelError(
            "no model family for this pipeline",
            found=name or f"{index} without _class_name",
            expected=f"one of {', '.join(registry.FAMILIES)}",
        )
    return _require(lambda: registry.family(name))


def download(source: ModelSource) -> Path:
    """The folder of a hub model, from the hub or its local cache.

    Raises:
        ModelNotFoundError: neither has it.
        MissingDependencyError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError as error:
        raise MissingDependencyError(
            "downloading needs huggingface_hub", found=error, remedy="pip install 'jitexport[build]'"
        ) from error
    try:
        return Path(snapshot_download(source.hub_id, allow_patterns=HUB_FILES))
    except Exception as error:  # network, authorisation, cache: one answer for all, with the library's words in it
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise ModelNotFoundError(
            f"cannot get {source.hub_id} from the hub{offline}",
            found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}",
            expected=f"a reachable hub, or the model in the local cache {HF_HUB_CACHE}",
            remedy=(
                f"where a network is: `hf auth login`, then `hf download {source.hub_id} --local-dir FOLDER`; "
                "then `jitexport build --model FOLDER`"
            ),
        ) from error
