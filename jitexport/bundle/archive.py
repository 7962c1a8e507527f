"""A bundle as one file, a zstd-compressed tar archive, and back; what comes out is checked before it is put in place.

Any `tar --zstd` can read the archive. The reader here takes far less than tar does: plain files that the manifest
declares, which comes first, each once and in the declared size. So nothing can land outside the target, and no more is
decompressed than the manifest promises and the disk has room for.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

from jitexport.bundle.entries import FileEntry
from jitexport.bundle.manifest import DIGEST_NAME, FILE_NAME, Manifest, parse_manifest
from jitexport.bundle.reading import MAX_MANIFEST, EngineBundle, check_manifest_digest
from jitexport.bundle.staging import Staging, lock
from jitexport.errors import (
    ArchiveError,
    BundleError,
    BundleExistsError,
    BundleNotFoundError,
    DigestError,
    InputError,
    MissingFileError,
    SizeError,
    UndeclaredFileError,
    needed,
)
from jitexport.files import sync

SUFFIX = ".tar.zst"
_FETCH = "get the archive again, or pack the bundle again"
_CHUNK = 1024 * 1024
_BLOCK = tarfile.BLOCKSIZE
#: Memory that a frame may ask the decompressor for; `pack` stays far below it.
_MAX_WINDOW = 128 * 1024 * 1024


def _zstandard() -> Any:
    with needed("packing and unpacking need the zstandard library", "pack"):
        import zstandard
    return zstandard


def pack(bundle: str | os.PathLike[str], output: str | os.PathLike[str], *, replace: bool = False) -> int:
    """Write a bundle as one archive; the same bundle gives the same bytes.

    Returns:
        The archive's size in bytes.

    Raises:
        BundleError: the bundle fails its checks, the output exists or cannot be written; nothing is left then.
        MissingDependencyError: zstandard is not installed.
    """
    zstandard = _zstandard()
    target = Path(output)
    if target.exists() and (target.is_dir() or not replace):
        raise BundleExistsError(f"{target} exists already", remedy="pass --force to replace it, or choose another -o")
    if Path(bundle).resolve() in target.resolve().parents:
        raise InputError("an archive inside the bundle would spoil it", found=target, remedy="choose another -o")
    opened = EngineBundle.open(bundle, "full")
    names = [FILE_NAME, DIGEST_NAME, *(entry.path for entry in opened.manifest.files)]
    part = target.with_name(f".{target.name}.part")  # what a killed run leaves is written over by the next
    locked = False
    try:
        with part.open("ab") as file:
            lock(file.fileno(), wait=False)
            locked = True
            file.truncate(0)
            with zstandard.ZstdCompressor(threads=-1, write_checksum=True).stream_writer(file, closefd=False) as stream:
                for name in names:
                    _add(stream, opened.path / name, name)
                stream.write(bytes(2 * _BLOCK))
            file.flush()
            sync(file.fileno())
            size = file.tell()
            part.rename(target)
            locked = False
            return size
    except BlockingIOError as error:
        raise BundleExistsError(f"another process is writing {target}", found=part, remedy="wait for it") from error
    except OSError as error:
        raise BundleError(
            f"cannot write {target}", found=error, expected="a writable disk with room",
            remedy="free space or choose another -o",
        ) from error
    finally:
        if locked:
            part.unlink(missing_ok=True)


def _add(stream: Any, path: Path, name: str) -> None:
    with path.open("rb") as file:
        info = tarfile.TarInfo(name)  # owner, time and mode are the same for everyone
        info.size = os.fstat(file.fileno()).st_size
        # Plain ustar splits long names in two; only sizes from 8 GiB need GNU's larger field.
        form: Literal[0, 1] = tarfile.USTAR_FORMAT if info.size < 8**11 else tarfile.GNU_FORMAT
        stream.write(info.tobuf(form, "utf-8", "strict"))
        shutil.copyfileobj(file, stream, _CHUNK)
    stream.write(bytes(-info.size % _BLOCK))


def unpack(
    archive: str | os.PathLike[str], output: str | os.PathLike[str] | None = None, *, replace: bool = False
) -> Path:
    """Unpack an archive into a bundle directory.

    Args:
        archive: a file that `pack` wrote.
        output: the bundle's directory; by default the archive's name without .tar.zst, in the working directory.
        replace: replace an existing bundle.

    Returns:
        The bundle's directory.

    Raises:
        BundleError: the archive is damaged or holds what no bundle may hold, or the target cannot be written. Nothing
            is left then, and an existing bundle is untouched.
        MissingDependencyError: zstandard is not installed.
    """
    zstandard = _zstandard()
    source = Path(archive)
    if output is None:
        if not source.name.endswith(SUFFIX) or source.name == SUFFIX:
            raise InputError("no name for the bundle", found=source.name, expected=f"NAME{SUFFIX}", remedy="pass -o")
        output = source.name.removesuffix(SUFFIX)
    try:
        file = source.open("rb")
    except OSError as error:
        raise BundleNotFoundError(
            f"no archive at {source}", found=error, remedy="`jitexport pack` makes one"
        ) from error
    target = Path(output)
    with file, Staging(target, replace=replace) as staging:
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
        stream = decompressor.stream_reader(file, read_across_frames=True)
        try:
            _extract(_TarReader(stream, source), staging.path)
        except (zstandard.ZstdError, MemoryError) as error:
            raise ArchiveError(f"{source} is damaged", found=error, expected="a zstd stream", remedy=_FETCH) from error
        staging.commit()
    return target


def _extract(reader: _TarReader, folder: Path) -> None:
    text = reader.small(FILE_NAME, MAX_MANIFEST)
    declared = reader.small(DIGEST_NAME, _BLOCK)
    check_manifest_digest(text, declared, reader.source)
    manifest = parse_manifest(text, f"{FILE_NAME} of {reader.source}")
    _check_room(manifest, folder)
    waiting = {entry.path: entry for entry in manifest.files}
    while (member := reader.header()) is not None:
        name, size = member
        entry = waiting.pop(name, None)
        if entry is None:
            raise UndeclaredFileError(
                f"{reader.source} has an undeclared or repeated file", found=name, remedy=_FETCH
            )
        if size != entry.size:
            raise SizeError(f"{name} has another size", found=size, expected=entry.size, remedy=_FETCH)
        _write(reader, entry, folder)
    if waiting:
        raise MissingFileError(
            f"files are missing in {reader.source}", found=", ".join(sorted(waiting)[:3]), remedy=_FETCH
        )
    for name, content in ((FILE_NAME, text), (DIGEST_NAME, declared)):
        with _new(folder / name) as file:
            file.write(content)


def _check_room(manifest: Manifest, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if manifest.size > free:
        raise BundleError(
            f"no room to unpack in {folder.parent}", found=f"{free} bytes free", expected=f"{manifest.size} bytes",
            remedy="free space or choose another -o",
        )


def _write(reader: _TarReader, entry: FileEntry, folder: Path) -> None:
    digest = hashlib.sha256()
    path = folder / entry.path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _new(path) as file:
            for chunk in reader.content(entry.size):
                digest.update(chunk)
                file.write(chunk)
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:  # one name below another file's
        raise ArchiveError(f"{reader.source} has files in each other's way", found=error, remedy=_FETCH) from error
    if digest.hexdigest() != entry.sha256:
        raise DigestError(
            f"{entry.path} has another digest", found=digest.hexdigest(), expected=entry.sha256, remedy=_FETCH
        )


@contextmanager
def _new(path: Path) -> Iterator[BinaryIO]:
    """A file that did not exist, written through to the disk."""
    with path.open("xb") as file:
        yield file
        file.flush()
        sync(file.fileno())


class _TarReader:
    """Reads headers and contents of a tar stream in turn, and nothing but plain files.

    Python's own tarfile would also take links, devices, and extended headers of any size into memory.
    """

    def __init__(self, stream: BinaryIO, source: Path) -> None:
        self.source = source
        self._stream = stream

    def header(self) -> tuple[str, int] | None:
        """Name and size of the next file; None at the end, after which nothing may follow."""
        block = self._exactly(_BLOCK)
        if block == bytes(_BLOCK):
            if self._exactly(_BLOCK) != bytes(_BLOCK) or self._stream.read(1):
                raise ArchiveError(f"{self.source} goes on after its end", remedy=_FETCH)
            return None
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.HeaderError, ValueError) as error:
            raise ArchiveError(
                f"{self.source} is damaged", found=error, expected="a tar header", remedy=_FETCH
            ) from error
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.size < 0:
            raise ArchiveError(
                f"{self.source} holds what no bundle may hold", found=f"{info.name!r} of tar type {info.type!r}",
                expected="plain files", remedy=_FETCH,
            )
        return info.name, info.size

    def small(self, name: str, limit: int) -> bytes:
        """The content of the next file, which must have this name and at most `limit` bytes."""
        found = self.header()
        if found is None or found[0] != name or found[1] > limit:
            raise ArchiveError(
                f"{self.source} is no packed bundle", found=found, expected=f"{name} of at most {limit} bytes",
                remedy="`jitexport pack` makes one",
            )
        return b"".join(self.content(found[1]))

    def content(self, size: int) -> Iterator[bytes]:
        """A file's content in pieces, and past its padding."""
        left = size
        while left:
            chunk = self._exactly(min(left, _CHUNK))
            left -= len(chunk)
            yield chunk
        self._exactly(-size % _BLOCK)

    def _exactly(self, size: int) -> bytes:
        pieces = []
        while size:
            piece = self._stream.read(size)
            if not piece:
                raise ArchiveError(f"{self.source} ends too early", expected=f"{size} more bytes", remedy=_FETCH)
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)
