"""Reading a bundle: nothing of it is opened before every file is checked."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from jitexport import machine
from jitexport.bundle.entries import FileEntry
from jitexport.bundle.manifest import DIGEST_NAME, FILE_NAME, Manifest, digest_line, parse_manifest
from jitexport.bundle.references import check_references, read_references
from jitexport.bundle.staging import check_text
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
COPY = "copy the bundle with its links followed (cp -rL), or `jitexport pack` it there"
MAX_MANIFEST = 64 * 1024 * 1024
#: What hubs, version control, file systems and desktops put beside a bundle's own files. Nothing reads it.
BYSTANDERS = {
    ".gitattributes", ".gitignore", ".git", ".cache", ".huggingface", "README.md", "LICENSE", "lost+found", ".snapshot",
    ".DS_Store", "Thumbs.db", "desktop.ini", ".directory",
}

#: Device, inode, size and time of the last change of a file that was checked through a link.
Identity = tuple[int, int, int, int]


@dataclass(frozen=True)
class EngineBundle:
    """A checked bundle on disk; `model` is the folder of weights outside it, where it refers to any.

    `linked` are its files that are links, or have other names too, as in a hub's cache, and what they were when their
    digests were compared.
    """

    path: Path
    manifest: Manifest
    model: Path | None = None
    linked: Mapping[str, Identity] = field(default_factory=dict)

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], verify: Verify = "full", model: str | os.PathLike[str] | None = None
    ) -> EngineBundle:
        """Read and check a bundle: schema, exactly the declared regular files, sizes and, with "full", all digests.

        Links to files are as good as files where digests are compared: see `check_unchanged`. With "size" they are
        refused.

        Args:
            model: folder of the weights that the bundle refers to; where it was built from by default.

        Raises:
            BundleNotFoundError: no directory with a manifest.
            ManifestError: the manifest is malformed, or is not the one that the bundle was published with.
            IntegrityError: a file is missing, undeclared, or differs from its entry, or a folder is a link.
            InputError: the path is no text, or there is no such way to verify.
        """
        root = Path(path)
        check_text(root, "the bundle")
        if verify not in ("full", "size"):
            raise InputError("unknown verify", found=verify, expected='"full" or "size"')
        manifest = read_manifest(root)
        linked: dict[str, Identity] = {}
        check_files(root, manifest, verify, linked)
        folder = check_references(manifest, Path(model) if model else None, full=verify == "full")
        return cls(root, manifest, folder, linked)

    def check_unchanged(self) -> None:
        """Make sure, after everything was opened by name, that links still led to the files that were checked.

        Raises:
            DigestError: a file was changed or a link was turned meanwhile.
        """
        for name, identity in self.linked.items():
            try:
                now = _identity((self.path / name).stat())
            except OSError as error:
                raise MissingFileError(f"cannot read {name}", found=error, remedy=COPY) from error
            if now != identity:
                raise DigestError(
                    f"{name} leads to another file than the one that was checked", found="a link that was turned, or a "
                    "file that was changed, while the bundle was loaded", expected="files that stay", remedy=COPY,
                )

    def weights(self, device: torch.device) -> dict[str, Tensor]:
        """All tensors by full name, `<component>.<name>`, in memory of their own.

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
        UnsafeFileError: the manifest is no file, nor a link to one.
    """
    if not os.path.isdir(root) or not os.path.lexists(root / FILE_NAME):
        raise BundleNotFoundError(
            f"no bundle at {root}", found=f"a directory without {FILE_NAME}" if os.path.isdir(root) else "no directory",
            remedy="`jitexport build -o PATH` makes one; a bundle on a hub needs `jitexport pull`, or trust=True "
            "(`jitexport generate --trust`)",
        )
    with _plain(root, FILE_NAME, links=True) as (file, size):
        if size > MAX_MANIFEST:
            raise ManifestError(
                f"{root / FILE_NAME} is too large", found=size, expected=f"at most {MAX_MANIFEST} bytes", remedy=REBUILD
            )
        text = file.read(MAX_MANIFEST)
    with _plain(root, DIGEST_NAME, links=True) as (file, _):
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


def check_files(
    root: Path, manifest: Manifest, verify: Verify, linked: dict[str, Identity] | None = None
) -> None:
    """Compare the directory with the manifest's file entries.

    Args:
        linked: takes the links among the files; without it, links are refused.

    Raises:
        IntegrityError: naming the first file that is wrong.
    """
    declared = {entry.path for entry in manifest.files}
    folders = {parent.as_posix() for name in declared for parent in PurePosixPath(name).parents}
    present = set(_walk(root, folders)) - {FILE_NAME, DIGEST_NAME}
    if extra := sorted(present - declared):
        raise UndeclaredFileError(
            "the bundle has undeclared files", found=", ".join(extra[:3]), expected="what its manifest declares: "
            "libraries take what lies beside an engine", remedy="remove them",
        )
    if missing := sorted(declared - present):
        raise MissingFileError("files of the bundle are missing", found=", ".join(missing[:3]), remedy=REBUILD)
    links = linked if verify == "full" else None

    def check(entry: FileEntry) -> None:
        identity = check_file(root, entry, verify, links=links is not None)
        if links is not None and identity is not None:
            links[entry.path] = identity

    pool = ThreadPoolExecutor(max_workers=machine.cpus())  # sha256 releases the interpreter lock
    try:
        # The largest first: with the last file, all cores should end at about the same time.
        for _ in pool.map(check, sorted(manifest.files, key=lambda e: -e.size)):
            pass
    finally:
        pool.shutdown(cancel_futures=True)  # after a failure, the other files need not be read


def check_file(root: Path, entry: FileEntry, verify: Verify, *, links: bool = False) -> Identity | None:
    """Compare one file with its entry.

    Args:
        links: whether it may be a link to a file, or have other names.

    Returns:
        What the file was, if it is such a link.

    Raises:
        IntegrityError: it is missing, a link, or has another size or digest.
    """
    with _plain(root, entry.path, links=links) as (file, size):
        if size != entry.size:
            raise SizeError(f"{entry.path} has another size", found=size, expected=entry.size, remedy=REBUILD)
        before = _identity(os.fstat(file.fileno()))
        if verify == "full" and (digest := hashlib.file_digest(file, "sha256").hexdigest()) != entry.sha256:
            raise DigestError(f"{entry.path} has another digest", found=digest, expected=entry.sha256, remedy=REBUILD)
        info = (root / entry.path).lstat()
        return before if stat.S_ISLNK(info.st_mode) or info.st_nlink != 1 else None


def _identity(info: os.stat_result) -> Identity:
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


def _walk(root: Path, folders: set[str]) -> Iterator[str]:
    """Names of all files and links below a directory that has no other folders than the given ones, nor linked ones.

    What others put beside a bundle's files is left out.
    """

    def fail(error: OSError) -> None:
        raise MissingFileError("cannot read the bundle's files", found=error, remedy=REBUILD) from error

    for folder, names, files in os.walk(root, onerror=fail):
        if folder == str(root):
            names[:] = [name for name in names if name not in BYSTANDERS]
            files = [name for name in files if name not in BYSTANDERS]
        for name in names:
            relative = Path(folder, name).relative_to(root).as_posix()
            if Path(folder, name).is_symlink():
                raise UnsafeFileError(
                    f"{relative} is a link", found="a linked folder", expected="folders of the bundle's own",
                    remedy=COPY,
                )
            if relative not in folders:
                raise UndeclaredFileError("the bundle has an undeclared folder", found=relative, remedy="remove it")
        for name in files:
            yield Path(folder, name).relative_to(root).as_posix()


@contextmanager
def _plain(root: Path, name: str, *, links: bool) -> Iterator[tuple[BufferedReader, int]]:
    """A regular file, open for reading, and its size.

    Args:
        links: whether it may be a link to one, or have other names; else it must be a file of its own.

    Raises:
        MissingFileError: it cannot be read.
        UnsafeFileError: it is a link, has another hard link, or is no regular file.
    """
    path = root / name
    try:
        own = path.lstat()  # before opening: opening a pipe waits, opening a device may do anything
        linked = stat.S_ISLNK(own.st_mode)
        info = path.stat() if linked and links else own
        if not stat.S_ISREG(info.st_mode) or (info.st_nlink != 1 and not links):
            plain_link = linked or stat.S_ISREG(info.st_mode)
            raise UnsafeFileError(
                f"{name} is a link or no regular file",
                found=f"{stat.filemode(own.st_mode)}, {own.st_nlink} name(s)",
                expected='a plain file of its own; or, with verify="full", a link to the right one',
                remedy=COPY if plain_link else REBUILD,
            )
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if links else os.O_NOFOLLOW)
        with os.fdopen(os.open(path, flags), "rb") as file:
            opened = os.fstat(file.fileno())
            if not stat.S_ISREG(opened.st_mode):  # it was exchanged in this moment
                raise UnsafeFileError(
                    f"{name} is no regular file", found=stat.filemode(opened.st_mode), expected="a file", remedy=REBUILD
                )
            yield file, opened.st_size
    except OSError as error:
        where = f" -> {os.readlink(path)}" if path.is_symlink() else ""
        raise MissingFileError(
            f"cannot read {name}{where}", found=error,
            remedy="the link leads nowhere: " + COPY if where else REBUILD,
        ) from error
