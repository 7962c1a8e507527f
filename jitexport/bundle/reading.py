"""Reading a bundle: nothing of it is opened before every file is checked."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from jitexport import machine
from jitexport.bundle.manifest import DIGEST_NAME, FILE_NAME, FileEntry, Manifest, digest_line, parse_manifest
from jitexport.bundle.references import check_references, read_references
from jitexport.bundle.tensors import map_tensors
from jitexport.errors import (
    BundleNotFoundError,
    DigestError,
    InputError,
    IntegrityError,
    ManifestError,
    MissingFileError,
    SizeError,
    UndeclaredFileError,
    UnsafeFileError,
)

Verify = Literal["full", "size"]
REBUILD = "build the bundle again, or copy it again from where it came from"
MAX_MANIFEST = 64 * 1024 * 1024


@dataclass(frozen=True)
class EngineBundle:
    """A checked bundle on disk; `model` is the folder of weights outside it, where it refers to any."""

    path: Path
    manifest: Manifest
    model: Path | None = None

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], verify: Verify = "full", model: str | os.PathLike[str] | None = None
    ) -> EngineBundle:
        """Read and check a bundle: schema, exactly the declared regular files, sizes and, with "full", all digests.

        Args:
            model: folder of the weights that the bundle refers to; where it was built from by default.

        Raises:
            BundleNotFoundError: no directory with a manifest.
            ManifestError: the manifest is malformed, or is not the one that the bundle was published with.
            IntegrityError: a file is missing, undeclared, a link, or differs from its entry.
        """
        root = Path(path)
        if verify not in ("full", "size"):
            raise InputError("unknown verify", found=verify, expected='"full" or "size"')
        manifest = read_manifest(root)
        check_files(root, manifest, verify)
        folder = check_references(manifest, Path(model) if model else None, full=verify == "full")
        return cls(root, manifest, folder)

    def weights(self, device: torch.device) -> dict[str, Tensor]:
        """All tensors by full name, "<component>.<name>", in memory of their own.

        Raises:
            IntegrityError: a file is no safetensors file; only "size" checks let one through.
            ManifestError: a tied name without its tensor.
        """
        tensors = read_references(self.manifest, self.model, device) if self.model else {}
        for entry in self.manifest.weights:
            for key, tensor in read_tensors(self.path, entry.path).items():
                # A copy: aligned for vector loads, and safe from whoever rewrites the file.
                tensors[f"{entry.component}.{key}"] = tensor.to(device, copy=True)
        if lost := sorted(set(self.manifest.tied.values()) - tensors.keys()):
            raise ManifestError("tied tensors are not among the weights", found=", ".join(lost[:3]), remedy=REBUILD)
        return tensors | {alias: tensors[name] for alias, name in self.manifest.tied.items()}


def read_tensors(root: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a bundle's safetensors file, on the CPU, mapped from the file.

    Raises:
        IntegrityError: it is no safetensors file.
    """
    try:
        return map_tensors(root / name)
    except (SafetensorError, OSError, KeyError) as error:
        raise IntegrityError(
            f"cannot read {name}", found=error, expected="a safetensors file", remedy=REBUILD
        ) from error


def read_manifest(root: Path) -> Manifest:
    """The manifest of a bundle directory.

    Raises:
        BundleNotFoundError: no directory with a manifest.
        ManifestError: the manifest is malformed, or is not the one that the bundle was published with.
        UnsafeFileError: the manifest is a link.
    """
    if not root.is_dir() or not os.path.lexists(root / FILE_NAME):
        raise BundleNotFoundError(
            f"no bundle at {root}", found="no directory" if not root.is_dir() else f"a directory without {FILE_NAME}",
            remedy="`jitexport build -o PATH` makes one; a bundle on a hub needs `jitexport pull`, or trust=True "
            "(`jitexport generate --trust`)",
        )
    with _plain(root, FILE_NAME) as (file, size):
        if size > MAX_MANIFEST:
            raise ManifestError(
                f"{root / FILE_NAME} is too large", found=size, expected=f"at most {MAX_MANIFEST} bytes", remedy=REBUILD
            )
        text = file.read(MAX_MANIFEST)
    with _plain(root, DIGEST_NAME) as (file, _):
        declared = file.read(1024)
    check_manifest_digest(text, declared, root)
    return parse_manifest(text, root / FILE_NAME)


def check_manifest_digest(text: bytes, declared: bytes, where: object) -> None:
    """Compare a manifest with the content of manifest.sha256.

    Raises:
        ManifestError: they differ.
    """
    if declared != digest_line(text):
        raise ManifestError(
            f"{where}: {FILE_NAME} is not the published one", found=digest_line(text).decode().split()[0],
            expected=f"{declared[:64].decode(errors='replace')} ({DIGEST_NAME})", remedy=REBUILD,
        )


def check_files(root: Path, manifest: Manifest, verify: Verify) -> None:
    """Compare the directory with the manifest's file entries.

    Raises:
        IntegrityError: naming the first file that is wrong.
    """
    declared = {entry.path for entry in manifest.files}
    folders = {parent.as_posix() for name in declared for parent in PurePosixPath(name).parents}
    present = set(_walk(root, folders)) - {FILE_NAME, DIGEST_NAME}
    if extra := sorted(present - declared):
        raise UndeclaredFileError("the bundle has undeclared files", found=", ".join(extra[:3]), remedy="remove them")
    if missing := sorted(declared - present):
        raise MissingFileError("files of the bundle are missing", found=", ".join(missing[:3]), remedy=REBUILD)
    pool = ThreadPoolExecutor(max_workers=machine.cpus())  # sha256 releases the interpreter lock
    try:
        # The largest first: with the last file, all cores should end at about the same time.
        for _ in pool.map(lambda e: check_file(root, e, verify), sorted(manifest.files, key=lambda e: -e.size)):
            pass
    finally:
        pool.shutdown(cancel_futures=True)  # after a failure, the other files need not be read


def check_file(root: Path, entry: FileEntry, verify: Verify) -> None:
    """Compare one file with its entry.

    Raises:
        IntegrityError: it is missing, a link, or has another size or digest.
    """
    with _plain(root, entry.path) as (file, size):
        if size != entry.size:
            raise SizeError(f"{entry.path} has another size", found=size, expected=entry.size, remedy=REBUILD)
        if verify == "full" and (digest := hashlib.file_digest(file, "sha256").hexdigest()) != entry.sha256:
            raise DigestError(f"{entry.path} has another digest", found=digest, expected=entry.sha256, remedy=REBUILD)


def _walk(root: Path, folders: set[str]) -> Iterator[str]:
    """Names of all files below a directory that has no other folders than the given ones, and no links."""

    def fail(error: OSError) -> None:
        raise MissingFileError("cannot read the bundle's files", found=error, remedy=REBUILD) from error

    for folder, names, files in os.walk(root, onerror=fail):
        for name in names:
            relative = Path(folder, name).relative_to(root).as_posix()
            if Path(folder, name).is_symlink():
                raise UnsafeFileError(
                    f"{relative} is a link", found="a linked folder", expected="plain files and folders", remedy=REBUILD
                )
            if relative not in folders:
                raise UndeclaredFileError("the bundle has an undeclared folder", found=relative, remedy="remove it")
        for name in files:
            relative = Path(folder, name).relative_to(root).as_posix()
            with _plain(root, relative):
                yield relative


@contextmanager
def _plain(root: Path, name: str) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file without other names, open for reading, and its size.

    Raises:
        MissingFileError: it cannot be read.
        UnsafeFileError: it is a link, has another hard link, or is no regular file.
    """
    path = root / name
    try:
        info = path.lstat()  # before opening: opening a pipe waits, opening a device may do anything
        if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1:
            raise UnsafeFileError(
                f"{name} is a link or no regular file",
                found=f"{stat.filemode(info.st_mode)}, {info.st_nlink} name(s)",
                expected="a plain file of its own", remedy=REBUILD,
            )
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
            yield file, os.fstat(file.fileno()).st_size
    except OSError as error:
        raise MissingFileError(f"cannot read {name}", found=error, remedy=REBUILD) from error
