"""Writing a bundle: in a temporary sibling that becomes the bundle by one rename, or leaves nothing that loads."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from safetensors.torch import save_file
from torch import Tensor

from jitexport.bundle.manifest import FILE_NAME, FileEntry, Manifest
from jitexport.errors import BundleError, BundleExistsError

#: Errors that a disk gives, as against those of reading a model.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG}


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file, streamed."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class BundleWriter:
    """Context manager that collects a bundle's files and publishes them at the end.

    Files go into a hidden directory beside the target. It is locked as long as its process lives, so that a later
    build can tell what an interrupted one left behind, and removes it.

    Args:
        target: the bundle's directory.
        replace: whether an existing bundle at the target may be replaced.

    Raises:
        BundleExistsError: the target exists and `replace` is not set, or is no bundle.
        BundleError: the target's folder cannot be written.
    """

    def __init__(self, target: Path, *, replace: bool = False) -> None:
        self.target = Path(target)
        self.replace = replace
        self._done = False

    def __enter__(self) -> BundleWriter:
        self._refuse_existing()
        parent = self.target.parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            self.path = Path(tempfile.mkdtemp(prefix=self._prefix, dir=parent))
            self._lock = os.open(self.path, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        except OSError as error:
            raise BundleError(
                f"cannot write to {parent}", found=error, expected="a writable folder with room", remedy="choose another -o"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._done:
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
        if isinstance(error, OSError) and error.errno in _DISK:
            raise BundleError(
                f"writing {self.target} failed; nothing was left behind", found=error,
                expected="a writable disk with room", remedy="free space or choose another -o",
            ) from error

    @property
    def _prefix(self) -> str:
        return f".{self.target.name}.build-"

    def _refuse_existing(self) -> None:
        if not self.target.exists() and not self.target.is_symlink():
            return
        if not (self.target / FILE_NAME).is_file():
            raise BundleExistsError(
                f"{self.target} exists and is no bundle", expected="a new path, or a bundle", remedy="choose another -o"
            )
        if not self.replace:
            raise BundleExistsError(
                f"{self.target} exists already", remedy="pass --force to replace it, or choose another -o"
            )

    def _remove_leftovers(self) -> None:
        for path in self.target.parent.glob(f"{self._prefix}*"):
            lock = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            except BlockingIOError:
                pass  # another build is at work there
            finally:
                os.close(lock)

    def directory(self, name: str) -> Path:
        """A new directory of the bundle."""
        path = self.path / name
        path.mkdir(parents=True)
        return path

    def write_text(self, name: str, text: str) -> str:
        """Write a text file; returns its name."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return name

    def write_weights(self, name: str, tensors: Mapping[str, Tensor]) -> str:
        """Write tensors as safetensors; returns the file's name."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), path)
        return name

    def publish(self, manifest: Callable[[tuple[FileEntry, ...]], Manifest]) -> Manifest:
        """Digest all files, write the manifest that `manifest` makes of them, and put the bundle in place.

        Raises:
            BundleExistsError: another build published to the target meanwhile.
        """
        files = [p for p in sorted(self.path.rglob("*")) if p.is_file()]
        entries = tuple(
            FileEntry(path=p.relative_to(self.path).as_posix(), size=p.stat().st_size, sha256=sha256(p)) for p in files
        )
        made = manifest(entries)
        with (self.path / FILE_NAME).open("w", encoding="utf-8") as stream:
            stream.write(made.to_json())
            stream.flush()
            os.fsync(stream.fileno())
        self.path.chmod(0o755)
        self._refuse_existing()
        if self.target.exists():
            old = self.path.with_name(self.path.name + ".old")
            self.target.rename(old)
            self.path.rename(self.target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            self.path.rename(self.target)
        self._done = True
        return made
