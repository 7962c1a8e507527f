"""Putting a directory in place: it grows in a hidden sibling and becomes the target in one step, or leaves nothing."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from jitexport.bundle.manifest import FILE_NAME
from jitexport.errors import BundleError, BundleExistsError, InputError
from jitexport.files import DISK_ERRORS, exchange, short_name, sync
from jitexport.interrupts import finishing

logger = logging.getLogger(__name__)

#: What file systems answer that cannot lock folders, as NFS, or anything.
_NO_LOCKS = {errno.EBADF, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}
#: Of a folder whose file system locks files only; it stays there, empty.
LOCK_NAME = ".jitexport.lock"


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
        check_text(self.target, "-o")
        parent = self.target.parent
        self.path = parent / f"{self._prefix}{secrets.token_hex(4)}"
        self._lock = None
        self._new_parents: list[Path] = []
        try:
            self._refuse_existing()
            self._new_parents = [p for p in (parent, *parent.parents) if not p.exists()]
            parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                os.lstat(self.target)  # a name that is too long is found out now, and not when all is done
            with _locked(parent):
                self._recover()
                self._remove_leftovers()
                self.path.mkdir()
                self._lock = hold(self.path, self._lock_file(self.path))
            self._refuse_existing()  # again: an interrupted replacement may have been restored
        except OSError as error:
            self._leave(failed=True)
            raise BundleError(
                f"cannot write to {parent}", found=error, expected="a writable folder with room",
                remedy="choose another -o",
            ) from error
        except BaseException:
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
        with _locked(parent), finishing():
            self._refuse_existing()
            if not self.target.exists():
                self.path.rename(self.target)
            elif not exchange(self.path, self.target):  # after an exchange, `path` is the old one
                self._replace_in_two_steps()
            sync_folder(parent)

    @property
    def _prefix(self) -> str:
        return f".{short_name(self.target.name)}.build-"

    @property
    def _replaced(self) -> Path:
        return self.target.with_name(f".{short_name(self.target.name)}.replaced")

    @staticmethod
    def _lock_file(path: Path) -> Path:
        return path.with_name(path.name + ".lock")

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
            if not path.name.startswith(self._prefix) or path.suffix == ".lock":
                continue
            try:
                lock = hold(path, self._lock_file(path), wait=False)
            except OSError:
                continue  # another build is at work there, or its maker removed it meanwhile, or it is not ours
            try:
                shutil.rmtree(path, ignore_errors=True)
                self._lock_file(path).unlink(missing_ok=True)
            finally:
                os.close(lock)

    def _leave(self, *, failed: bool) -> None:
        with finishing():
            if self._lock is not None:
                self._lock_file(self.path).unlink(missing_ok=True)
            if self._lock is not None or failed:
                shutil.rmtree(self.path, ignore_errors=True)  # what failed, or the bundle that was replaced
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None
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
                if link.errno in DISK_ERRORS or ours:
                    return link
            if any(os.strerror(code) in str(link) for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)):
                return link
            link = link.__cause__ or link.__context__
        return None


def check_text(path: Path, what: str) -> None:
    """Refuse a path whose bytes are no text in UTF-8: manifests, compilers and native libraries cannot have it.

    Raises:
        InputError: it is such a path.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the path of {what} is not UTF-8", found=ascii(str(path)), expected="a path that is text in UTF-8",
            remedy="choose another path, or rename the folder (convmv -f latin1 -t utf8)",
        ) from error


def hold(folder: Path, file: Path, *, wait: bool = True) -> int:
    """Lock a folder, or, where the file system locks files only, a file that stands for it; else nothing.

    Returns:
        A handle; closing it, or the end of the process, gives the lock up.

    Raises:
        BlockingIOError: another process has the lock, and `wait` is not set.
        OSError: there is no such folder, or it is a link.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if lock(handle, wait=wait):
            return handle
        substitute = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    try:
        lock(substitute, wait=wait)
    except BaseException:
        os.close(substitute)
        raise
    return substitute


def lock(handle: int, *, wait: bool = True) -> bool:
    """Lock an open file or folder; False where the file system cannot.

    Raises:
        BlockingIOError: another process has the lock, and `wait` is not set.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; it ends with the process at the latest."""
    handle = hold(folder, folder / LOCK_NAME)
    try:
        yield
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power failure, where the file system can; they have happened anyway."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # a folder that may be written and not read
    try:
        sync(handle)
    except OSError as error:
        logger.warning("%s: the file system did not confirm the write: %s", folder, error)
    finally:
        os.close(handle)
