"""Registered model names, and how a name, a folder or a hub id becomes an adapter."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from jitexport import registry
from jitexport.errors import InputError, ModelNotFoundError, UnsupportedModelError, needed
from jitexport.models.base import ModelAdapter, read_json, with_settings

Made = TypeVar("Made")

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
        configs, settings: that configuration; see `ModelAdapter.from_configs`. The settings are the model's own also
            where it is read with its weights.
    """

    name: str
    folder: Path | None = None
    file: Path | None = None
    hub_id: str | None = None
    pipeline_class: str = ""
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def published(name: str) -> ModelSource:
    """A model by its registered name: the bundled one, or one on the hub whose configuration is known."""
    if name == "demo":  # FLUX's architecture, small, trained; 256 x 256 pictures
        return ModelSource(name, folder=DEMO_FOLDER)
    pipeline_class = registry.family_of(name)
    model = _require(lambda: registry.family(pipeline_class)).published[name]
    return ModelSource(
        name, hub_id=model.hub_id, pipeline_class=pipeline_class,
        configs={part: dict(config) for part, config in model.configs.items()},
        settings=dict(model.settings),
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
        return published(model)
    if model and path.is_dir():  # Path("") is the current folder
        return ModelSource(path.resolve().name, folder=path)
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        known = (published(name) for name in registry.MODELS)
        source = next((s for s in known if s.hub_id == model), ModelSource("", hub_id=model))
        return replace(source, name=model.split("/")[1])
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
    settings = source.settings | {name: value for name, value in (settings or {}).items() if value is not None}
    if source.file is not None:
        return _adapter_class(folder).from_file(source.file, folder, dtype, settings)
    return _adapter_class(folder).from_folder(folder, dtype, settings)


def config_adapter(source: ModelSource, dtype: torch.dtype, settings: dict[str, Any] | None = None) -> ModelAdapter:
    """The model without weights, on the meta device, for planning: from its known configuration where there is one."""
    if not source.configs:
        return load_adapter(source, dtype, settings)
    family = _require(lambda: registry.family(source.pipeline_class))
    merged = with_settings(family.usual(source.configs) | source.settings, settings)
    return _require(lambda: family.from_configs(source.configs, merged, dtype))


def _require(find: Callable[[], Made]) -> Made:
    with needed("reading a model needs diffusers and transformers", "build"):
        return find()


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
    with needed("downloading needs huggingface_hub", "build"):
        from huggingface_hub import snapshot_download
        from huggingface_hub.constants import HF_HUB_CACHE
    assert source.hub_id is not None  # what comes from nowhere has a folder
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
