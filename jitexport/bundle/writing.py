"""Writing a bundle: files are collected in a staging directory, digested, declared and put in place."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from jitexport import machine
from jitexport.bundle.entries import FileEntry
from jitexport.bundle.manifest import DIGEST_NAME, FILE_NAME, Manifest, digest_line, parse_manifest
from jitexport.bundle.staging import Staging
from jitexport.errors import BundleError
from jitexport.files import sync

#: Weights are split into files of about this size, so that several cores can digest them at load.
SHARD_BYTES = 2 * 1024**3


class BundleWriter(Staging):
    """Context manager that collects a bundle's files and publishes them at the end: see `Staging`."""

    def directory(self, name: str) -> Path:
        """A new directory of the bundle. It is dropped at the end if nothing is written there."""
        path = self.path / name
        path.mkdir(parents=True)
        return path

    def write_text(self, name: str, text: str) -> str:
        """Write a text file; returns its name."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return name

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> str:
        """Write tensors as safetensors; returns the file's name.

        Raises:
            BundleError: the disk fails.
        """
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
            path.chmod(0o666 & ~_umask(self.path))  # safetensors makes files that only their owner can read
        except SafetensorError as error:  # the library's own type, also for a full disk
            raise BundleError(
                f"cannot write {name}", found=error, expected="a writable disk with room",
                remedy="free space or choose another -o",
            ) from error
        return name

    def write_weights(self, component: str, tensors: Mapping[str, Tensor]) -> list[str]:
        """Write a component's tensors under weights/, split by `SHARD_BYTES`; returns the files' names."""
        shards: list[dict[str, Tensor]] = [{}]
        size = 0
        for key, tensor in tensors.items():
            if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
                shards.append({})
                size = 0
            shards[-1][key] = tensor
            size += tensor.nbytes
        names = [f"{component}-{i + 1}" if len(shards) > 1 else component for i in range(len(shards))]
        return [
            self.write_tensors(f"weights/{name}.safetensors", shard) for name, shard in zip(names, shards, strict=True)
        ]

    def publish(self, manifest: Callable[[tuple[FileEntry, ...]], Manifest]) -> Manifest:
        """Digest all files, write the manifest that `manifest` makes of them, and put the bundle in place.

        Raises:
            BundleExistsError: another build published to the target meanwhile.
            ManifestError: the manifest would not be accepted at load.
        """
        names = self._settle()
        with ThreadPoolExecutor(max_workers=machine.cpus()) as pool:  # sha256 and fsync release the interpreter lock
            entries = tuple(pool.map(self._entry, names))
        text = manifest(entries).to_json().encode()
        made = parse_manifest(text, FILE_NAME)
        for name, content in ((FILE_NAME, text), (DIGEST_NAME, digest_line(text))):
            with (self.path / name).open("wb") as stream:
                stream.write(content)
                stream.flush()
                sync(stream.fileno())
        self.commit()
        return made

    def _settle(self) -> list[str]:
        """Names of all files, sorted; directories without any are removed."""
        names = []
        for folder, _, files in os.walk(self.path, topdown=False):
            for file in files:
                path = Path(folder, file)
                if not stat.S_ISREG(path.lstat().st_mode):
                    raise BundleError("an engine's files must be plain files", found=path.relative_to(self.path))
                names.append(path.relative_to(self.path).as_posix())
            if folder != str(self.path) and not any(os.scandir(folder)):
                os.rmdir(folder)
        return sorted(names)

    def _entry(self, name: str) -> FileEntry:
        path = self.path / name
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            sync(stream.fileno())
        return FileEntry(path=name, size=path.stat().st_size, sha256=digest)


def _umask(folder: Path) -> int:
    """The umask that a directory was made with; asking the process for it would change it for other threads."""
    return ~stat.S_IMODE(folder.stat().st_mode) & 0o777
