"""Other checkpoints for a bundle: whether they are of the model that its engines were built for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jitexport.bundle import EngineBundle
from jitexport.bundle.manifest import Manifest
from jitexport.errors import InputError
from jitexport.models.base import ModelAdapter
from jitexport.specs import DTYPES

#: Entries of configurations that say where weights come from and how they are stored, not what is computed.
PROVENANCE = {"dtype", "torch_dtype", "transformers_version", "architectures", "sample_size", "model_type"}


def read_model(
    adapter_class: type[ModelAdapter], path: Path, base: Path | None, manifest: Manifest
) -> ModelAdapter:
    """A checkpoint by the bundle's family, with the bundle's dtype and settings."""
    dtype, settings = DTYPES[manifest.dtype], manifest.model.settings
    if path.is_dir():
        if base is not None:
            raise InputError("base belongs to a checkpoint in one file", found=f"the folder {path}")
        return adapter_class.from_folder(path, dtype, settings)
    if base is None:
        raise InputError(
            "one file is the transformer only", found=path, remedy="base=FOLDER, which has everything else"
        )
    return adapter_class.from_file(path, base, dtype, settings)


def check_same_model(bundle: EngineBundle, adapter: ModelAdapter) -> None:
    """Compare everything that engines have built in beside weights: configurations, tokenizers, scheduler.

    Raises:
        InputError: naming the differences.
    """
    differences = compare_configs(bundle.manifest.model.configs, adapter.configs)
    files = {entry.name: bundle.path / entry.path for entry in bundle.manifest.tokenizers}
    theirs = {tokenizer.name: tokenizer.json for tokenizer in adapter.tokenizers()}
    for name in sorted(files.keys() | theirs.keys()):
        own = json.loads(files[name].read_text(encoding="utf-8")) if name in files else None
        if name not in theirs or json.loads(theirs[name]) != own:
            differences.append(f"{name}: another vocabulary or other rules")
    if differences:
        shown = differences[:8] + ([f"and {len(differences) - 8} more"] if differences[8:] else [])
        raise InputError(
            "the checkpoint is of another model than the bundle's engines were built for", found="; ".join(shown),
            remedy="build a bundle from it",
        )


def compare_configs(own: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]]) -> list[str]:
    """Differences as "component.entry: theirs instead of ours"; entries that one side lacks are of another version."""
    other = json.loads(json.dumps(other, default=str))
    found = [f"{name}: only one of both has it" for name in sorted(own.keys() ^ other.keys())]
    for component in sorted(own.keys() & other.keys()):
        mine, theirs = own[component], other[component]
        for key in sorted(mine.keys() & theirs.keys()):
            if key not in PROVENANCE and not key.startswith("_") and mine[key] != theirs[key]:
                found.append(f"{component}.{key}: {_short(theirs[key])} instead of {_short(mine[key])}")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
