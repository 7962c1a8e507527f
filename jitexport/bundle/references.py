"""Weights that stay where they are: a bundle may point at the model's own safetensors files, by digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from jitexport import machine
from jitexport.bundle.entries import ReferenceEntry
from jitexport.bundle.manifest import Manifest
from jitexport.bundle.tensors import map_tensors
from jitexport.errors import DigestError, InputError, IntegrityError, MissingFileError, SizeError

# A level of CLIP's parameter names that files have and transformers 5 does not.
_DROPPED = "text_model."


def find_references(folder: Path, weights: Mapping[str, Tensor]) -> tuple[tuple[ReferenceEntry, ...], set[str]]:
    """Tensors of a model that stand in its folder's files bit by bit.

    Args:
        folder: the pipeline in diffusers' format.
        weights: all tensors by full name, as engines are to read them.

    Returns:
        A reference for each file that holds any of them, and their full names.

    Raises:
        InputError: the files hold none of a component's weights, because they are kept in another dtype.
    """
    entries, found = [], set[str]()
    for component in sorted({name.partition(".")[0] for name in weights}):
        other_dtype: torch.dtype | None = None
        matched = 0
        for path in sorted((folder / component).glob("*.safetensors")):
            tensors = {}
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                    name = key.removeprefix(_DROPPED)
                    wanted = weights.get(f"{component}.{name}")
                    if wanted is None:
                        continue
                    stored = file.get_tensor(key)
                    if stored.dtype != wanted.dtype:
                        other_dtype = stored.dtype
                    elif torch.equal(stored, wanted.cpu()):
                        tensors[name] = key
            if tensors:
                entries.append(
                    ReferenceEntry(
                        component=component, path=f"{component}/{path.name}", size=path.stat().st_size,
                        sha256=_sha256(path), tensors=tensors,
                    )
                )
                found |= {f"{component}.{name}" for name in tensors}
                matched += len(tensors)
        if not matched and other_dtype is not None:
            raise InputError(
                f"the weights of {component} cannot be referenced", found=f"files in {other_dtype}",
                expected=f"files in {next(t.dtype for n, t in weights.items() if n.startswith(component + '.'))}",
                remedy="--weights store, or the --dtype of the files",
            )
    return tuple(entries), found


def check_references(manifest: Manifest, model: Path | None, *, full: bool) -> Path | None:
    """Compare a model's files with a bundle's references to them.

    Args:
        model: the model's folder; the one that the bundle was built from by default.
        full: whether digests are compared, not only sizes.

    Returns:
        The model's folder; None for a bundle that stores all of its weights.

    Raises:
        IntegrityError: a file is missing, or has another size or digest.
    """
    if not manifest.references:
        return None
    folder = model or Path(manifest.reference_folder or "")
    remedy = "give the model's folder: jitexport.load(bundle, model=FOLDER); or build with --weights store"

    def check(entry: ReferenceEntry) -> None:
        path = folder / entry.path
        try:
            size = path.stat().st_size
            digest = _sha256(path) if full and size == entry.size else entry.sha256
        except OSError as error:
            raise MissingFileError(
                f"cannot read weights outside the bundle: {path}", found=error, remedy=remedy
            ) from error
        if size != entry.size:
            raise SizeError(f"{path} has another size", found=size, expected=entry.size, remedy=remedy)
        if digest != entry.sha256:
            raise DigestError(f"{path} has another digest", found=digest, expected=entry.sha256, remedy=remedy)

    with ThreadPoolExecutor(max_workers=machine.cpus()) as pool:
        list(pool.map(check, manifest.references))
    return folder


def read_references(manifest: Manifest, folder: Path, device: torch.device) -> dict[str, Tensor]:
    """The referenced tensors by full name, in memory of their own.

    Raises:
        IntegrityError: a file does not hold what was referenced; only "size" checks let one through.
    """
    tensors = {}
    for entry in manifest.references:
        try:
            mapped = map_tensors(folder / entry.path)
            for name, key in entry.tensors.items():
                tensors[f"{entry.component}.{name}"] = mapped[key].to(device, copy=True)
        except (SafetensorError, OSError, KeyError) as error:
            raise IntegrityError(f"cannot read {folder / entry.path}", found=error) from error
    return tensors


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
