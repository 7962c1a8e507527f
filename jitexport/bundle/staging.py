"""Putting a directory in place: it grows in a hidden sibling and becomes the target in one step, or leaves nothing."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from jitexport.bundle.manifest import FILE_NAME
from jitexport.errors import BundleError, BundleExistsError

#: Errors that a disk gives when it cannot be written, whatever the file.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}
#: renameat2 where the kernel or the file system does not know how to exchange.
_NO_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV}
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class Staging:
    """Context manager around a directory that becomes a bundle at `commit`.

    The directory is locked as long as its process lives, so that a later one can tell what an interrupted one left
    behind, and removes it. Whoever lists or renames beside the target holds a lock on the target's parent.

    Args:
        target: the bundle's directory; a link to a directory stands for that directory.
        replace: whether an existing bundle at the target may be replaced.

    Raises:
        BundleExistsError: the target exists and `replace` is not set, or is no bundle.
        BundleError: the disk fails or cannot be written; nothing is left then, and an existing bundle is untouched.
    """

    def __init__(self, target: Path, *, replace: bool = False) -> None:
        self.target = Path(os.path.realpath(target))
        self.replace = replace

    def __enter__(self) -> Self:
        self._refuse_existing()
        parent = self.target.parent
        self._new_parents = [p for p in (parent, *parent.parents) if not p.exists()]
        try:
            parent.mkdir(parents=True, exist_ok=True)
            with _locked(parent):
                self._recover()
                self._remove_leftovers()
                self.path = parent / f"{self._prefix}{secrets.token_hex(4)}"
                self.path.mkdir()
                self._lock = os.open(self.path, os.O_RDONLY)
                fcntl.flock(self._lock, fcntl.LOCK_EX)
        except OSError as error:
            self._remove_parents()
            raise BundleError(
                f"cannot write to {parent}", found=error, expected="a writable folder with room",
                remedy="choose another -o",
            ) from error
        try:
            self._refuse_existing()  # again: an interrupted replacement may have been restored
        except BundleExistsError:
            self._leave(failed=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(failed=error is not None)
        if error is not None and not isinstance(error, BundleError) and (cause := self._disk_error(error)):
            raise BundleError(
                f"writing {self.target} failed; nothing was left behind", found=cause,
                expected="a writable disk with room", remedy="free space or choose another -o",
            ) from error

    def commit(self) -> None:
        """Put the directory in place.

        Raises:
            BundleExistsError: another process put a bundle there meanwhile.
        """
        parent = self.target.parent
        with _locked(parent):
            self._refuse_existing()
            if not self.target.exists():
                self.path.rename(self.target)
            elif not exchange(self.path, self.target):  # after an exchange, `path` is the old one
                self._replace_in_two_steps()
            _sync(parent)

    @property
    def _prefix(self) -> str:
        return f".{self.target.name}.build-"

    @property
    def _replaced(self) -> Path:
        return self.target.with_name(f".{self.target.name}.replaced")

    def _refuse_existing(self) -> None:
        if not os.path.lexists(self.target):
            return
        if not (self.target / FILE_NAME).is_file():
            raise BundleExistsError(
                f"{self.target} exists and is no bundle", expected="a new path, or a bundle", remedy="choose another -o"
            )
        if not self.replace:
            raise BundleExistsError(
                f"{self.target} exists already", remedy="pass --force to replace it, or choose another -o"
            )

    def _replace_in_two_steps(self) -> None:
        """For file systems that cannot exchange; `_recover` mends an interruption between the two renames."""
        self.target.rename(self._replaced)
        try:
            self.path.rename(self.target)
        except OSError:
            self._replaced.rename(self.target)
            raise
        shutil.rmtree(self._replaced, ignore_errors=True)

    def _recover(self) -> None:
        if not self._replaced.exists():
            return
        if self.target.exists():
            shutil.rmtree(self._replaced, ignore_errors=True)
        else:
            self._replaced.rename(self.target)

    def _remove_leftovers(self) -> None:
        for path in self.target.parent.iterdir():
            if not path.name.startswith(self._prefix):
                continue
            try:
                lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            except OSError:
                continue  # removed meanwhile by the one who made it, or not ours
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            except BlockingIOError:
                pass  # another build is at work there
            finally:
                os.close(lock)

    def _leave(self, *, failed: bool) -> None:
        shutil.rmtree(self.path, ignore_errors=True)  # what failed, or the bundle that was replaced
        os.close(self._lock)
        if failed:
            self._remove_parents()

    def _remove_parents(self) -> None:
        for folder in self._new_parents:
            with suppress(OSError):
                folder.rmdir()

    def _disk_error(self, error: BaseException) -> BaseException | None:
        """The disk's error behind an exception; libraries and compilers wrap it, or only quote its words."""
        seen: list[BaseException] = []
        link: BaseException | None = error
        while link is not None and link not in seen:
            seen.append(link)
            if isinstance(link, OSError):
                ours = str(link.filename or "").startswith(str(self.target.parent))
                if link.errno in _DISK or ours:
                    return link
            if any(os.strerror(code) in str(link) for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)):
                return link
            link = link.__cause__ or link.__context__
        return None


def exchange(a: Path, b: Path) -> bool:
    """Swap two directories in one step, Linux only.

    Returns:
        False where the system or the file system cannot; nothing has happened then.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(b))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; it ends with the process at the latest."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _sync(folder: Path) -> None:
    """Make renames in a folder last through a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
