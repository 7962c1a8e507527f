"""Reading a bundle: nothing of it is opened before every file is checked."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor

from jitexport.bundle.manifest import FILE_NAME, FileEntry, Manifest, parse_manifest
from jitexport.bundle.writing import sha256
from jitexport.errors import BundleNotFoundError, IntegrityError, ManifestError

Verify = Literal["full", "size"]
_REBUILD = "build the bundle again, or copy it again from where it came from"
_MAX_MANIFEST = 64 * 1024 * 1024


@dataclass(frozen=True)
class EngineBundle:
    """A checked bundle on disk."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: Verify = "full") -> EngineBundle:
        """Read and check a bundle: schema, exactly the declared regular files, sizes and, with "full", all digests.

        Raises:
            BundleNotFoundError: no directory with a manifest.
            ManifestError: the manifest is malformed.
            IntegrityError: a file is missing, undeclared, a link, or differs from its entry.
        """
        root = Path(path)
        if verify not in ("full", "size"):
            raise ValueError(f'verify must be "full" or "size", not {verify!r}')
        manifest = read_manifest(root)
        check_files(root, manifest, verify)
        return cls(root, manifest)

    def weights(self, device: torch.device) -> dict[str, Tensor]:
        """All tensors by full name, "<component>.<name>", in memory of their own."""
        tensors: dict[str, Tensor] = {}
        for name in self.manifest.weights:
            component = Path(name).stem
            with safe_open(self.path / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                    # A copy: aligned for vector loads, and safe from whoever rewrites the file.
                    tensors[f"{component}.{key}"] = file.get_tensor(key).to(device, copy=True)
        return tensors | {alias: tensors[name] for alias, name in self.manifest.tied.items()}


def read_manifest(root: Path) -> Manifest:
    """The manifest of a bundle directory.

    Raises:
        BundleNotFoundError: no directory with a manifest.
        ManifestError: the manifest is malformed.
    """
    file = root / FILE_NAME
    if not root.is_dir() or not (file.is_file() or file.is_symlink()):
        raise BundleNotFoundError(
            f"no bundle at {root}", found="no directory" if not root.is_dir() else f"a directory without {FILE_NAME}",
            remedy="`jitexport build -o PATH` makes one",
        )
    info = file.lstat()
    if not stat.S_ISREG(info.st_mode) or info.st_size > _MAX_MANIFEST:
        raise ManifestError(f"{file} is not a plain file of a manifest's size", remedy=_REBUILD)
    try:
        text = file.read_bytes()
    except OSError as error:
        raise ManifestError(f"cannot read {file}", found=error) from error
    return parse_manifest(text, file)


def check_files(root: Path, manifest: Manifest, verify: Verify) -> None:
    """Compare the directory with the manifest's file entries.

    Raises:
        IntegrityError: naming the first file that is wrong.
    """
    declared = {entry.path: entry for entry in manifest.files}
    present: set[str] = set()
    for folder, folders, names in os.walk(root):
        for name in [*folders, *names]:
            path = Path(folder) / name
            relative = path.relative_to(root).as_posix()
            mode = path.lstat()
            if stat.S_ISDIR(mode.st_mode):
                continue
            if not stat.S_ISREG(mode.st_mode) or mode.st_nlink != 1:
                raise IntegrityError(f"{relative} is a link or no regular file", expected="plain files", remedy=_REBUILD)
            if relative != FILE_NAME:
                present.add(relative)
    if extra := sorted(present - declared.keys()):
        raise IntegrityError("the bundle has undeclared files", found=", ".join(extra[:3]), remedy="remove them")
    if missing := sorted(declared.keys() - present):
        raise IntegrityError("files of the bundle are missing", found=", ".join(missing[:3]), remedy=_REBUILD)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # sha256 releases the interpreter lock
        list(pool.map(lambda entry: _check_file(root, entry, verify), manifest.files))


def _check_file(root: Path, entry: FileEntry, verify: Verify) -> None:
    path = root / entry.path
    size = path.stat().st_size
    if size != entry.size:
        raise IntegrityError(f"{entry.path} has another size", found=size, expected=entry.size, remedy=_REBUILD)
    if verify == "full" and (digest := sha256(path)) != entry.sha256:
        raise IntegrityError(f"{entry.path} has another digest", found=digest, expected=entry.sha256, remedy=_REBUILD)
