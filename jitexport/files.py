"""Writing files whole or not at all, and finding out before the work whether they can be written."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jitexport.errors import InputError, OutputError
from jitexport.interrupts import finishing

#: Errors that a disk gives when it cannot be written, whatever the file.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}
#: What fsync answers where there is no such promise.
_NO_SYNC = {errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EPERM}
_NAME_BYTES = 200  # of a name within the names of what stands beside it; file systems take 255 in all
#: renameat2 where the kernel or the file system does not know how to exchange.
_NO_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV}
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def check_writable(path: Path) -> None:
    """Find out whether `write_file` can write there, before the work that makes the content.

    Raises:
        InputError: there is no such folder, or something else than a file has the name.
        OutputError: the folder cannot be written.
    """
    path = Path(os.path.realpath(path))
    if not os.path.isdir(path.parent):
        raise InputError("no such folder", found=path.parent, remedy="create it, or choose another -o")
    with _telling(path), suppress(FileNotFoundError):
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            what = "a folder" if stat.S_ISDIR(mode) else f"no plain file ({stat.filemode(mode)})"
            raise InputError(
                f"cannot write to {path}", found=what, expected="a file, or a new name", remedy="choose another -o"
            )
    with _telling(path), _unfinished(path) as part:
        part.touch()


def write_file(path: Path, content: bytes) -> None:
    """Write a file in one step: it is there whole, or as it was before.

    Raises:
        OutputError: the disk is full or cannot be written.
    """
    path = Path(os.path.realpath(path))  # a link to a file stands for that file
    with _telling(path), _unfinished(path) as part:
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            sync(file.fileno())
        part.replace(path)


def check_writable_folder(path: Path, replaces: Callable[[str], bool]) -> None:
    """Find out whether `write_folder` can write there, before the work that makes the content.

    Args:
        replaces: whether a file of this name may go when a folder that is there already is replaced.

    Raises:
        InputError: there is no parent folder, or something is there that may not be replaced.
        OutputError: the parent folder cannot be written.
    """
    path = Path(os.path.realpath(path))
    if not os.path.isdir(path.parent):
        raise InputError("no such folder", found=path.parent, remedy="create it, or choose another -o")
    with _telling(path), suppress(FileNotFoundError):
        if not stat.S_ISDIR(path.stat().st_mode):
            raise InputError(
                f"cannot write to {path}", found="a file", expected="a folder, or a new name",
                remedy="choose another -o",
            )
        if strays := sorted(e.name for e in os.scandir(path) if not (e.is_file() and replaces(e.name))):
            raise InputError(
                f"{path} holds other files, which would be lost", found=strays[0],
                expected="a new name, or a folder with nothing but what was written there before",
                remedy="choose another -o",
            )
    with _telling(path), _unfinished(path) as part:
        part.mkdir()


def write_folder(path: Path, content: Iterable[tuple[str, bytes]], replaces: Callable[[str], bool]) -> None:
    """Write a folder of files in one step: it is there with all of them, or as it was before.

    Where the system cannot exchange two folders, an older one is away for a moment.

    Args:
        content: names and what the files hold; taken one after the other, so that not all need be in memory.
        replaces: as `check_writable_folder` has it.

    Raises:
        InputError: there is no parent folder, or something is there that may not be replaced.
        OutputError: the disk is full or cannot be written.
    """
    check_writable_folder(path, replaces)
    path = Path(os.path.realpath(path))
    with _telling(path), _unfinished(path) as part:
        part.mkdir()
        for name, data in content:
            with (part / name).open("xb") as file:
                file.write(data)
                file.flush()
                sync(file.fileno())
        _put_in_place(part, path)


def _put_in_place(part: Path, path: Path) -> None:
    """A folder at its name; one that has the name already is at `part` then, or gone."""
    with finishing():
        if not path.exists():
            part.rename(path)
        elif not exchange(part, path):
            old = part.with_suffix(".old")
            path.rename(old)
            try:
                part.rename(path)
            except OSError:
                old.rename(path)
                raise
            shutil.rmtree(old, ignore_errors=True)


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


def sync(handle: int) -> None:
    """Write a file or a folder through to the disk; some network and user-space file systems cannot promise that.

    Raises:
        OSError: the disk failed.
    """
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def short_name(name: str) -> str:
    """A name, or what stands for it where names that are made of it would be too long."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= _NAME_BYTES else hashlib.sha256(encoded).hexdigest()[:32]


def nearest_folder(path: Path) -> Path:
    """The folder that is there already, on the way to a path."""
    return next(parent for parent in Path(os.path.realpath(path)).parents if os.path.isdir(parent))


@contextmanager
def temporary_folder(place: Path) -> Iterator[None]:
    """Where the system has no temporary folder to write to, one in `place`, for this process and those it starts.

    Python would take the working directory then, and libraries would be made and loaded there.
    """
    try:
        working = os.path.realpath(tempfile.gettempdir()) == os.path.realpath(os.curdir)
        missing = working and not any(os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    except FileNotFoundError:
        missing = True
    if not missing:
        yield
        return
    before = os.environ.get("TMPDIR"), tempfile.tempdir
    folder = ""
    with suppress(OSError):  # whoever needs to write there says so
        folder = tempfile.mkdtemp(prefix=".tmp-", dir=place)
    if not folder:
        yield
        return
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    try:
        yield
    finally:
        os.environ.pop("TMPDIR")
        if before[0] is not None:
            os.environ["TMPDIR"] = before[0]
        tempfile.tempdir = before[1]
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def imports_that_ask_for_a_temporary_folder() -> Iterator[None]:
    """Libraries look for the temporary folder when they are imported, whether they will need it or not.

    Where there is none, they get the name that it would have; who writes there is told that it cannot be written.
    """
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        tempfile.tempdir = os.path.abspath(os.path.join(os.sep, "tmp"))
        try:
            yield
        finally:
            tempfile.tempdir = None  # looked for again
    else:
        yield


@contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    """A name beside a file or folder, of which nothing is left at the end."""
    part = path.with_name(f".{short_name(path.name)}.{secrets.token_hex(4)}.part")
    try:
        yield part
    finally:
        with suppress(OSError):
            if part.is_dir():
                shutil.rmtree(part, ignore_errors=True)
            else:
                part.unlink(missing_ok=True)


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {path}", found=error, expected="a writable folder with room",
            remedy="free space, or choose another -o",
        ) from error
