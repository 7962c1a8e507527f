"""What is served: bundles by name, as their manifests declare them, and adapters by name. Nothing is loaded here."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path

import torch

from jitexport.bundle.manifest import Manifest
from jitexport.bundle.reading import read_manifest
from jitexport.errors import InputError
from jitexport.runtime.request import Terms

#: Of bundles and adapters: they stand in addresses, in metrics and in logs.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Entry:
    """A served bundle.

    Attributes:
        name: by which requests ask for it.
        path: its folder.
        manifest: what it declares.
    """

    name: str
    path: Path
    manifest: Manifest

    @classmethod
    def read(cls, name: str, path: Path) -> Entry:
        """The bundle in a folder.

        Raises:
            BundleError: none, or one that cannot be read.
            InputError: a name that cannot be used, or a bundle of videos.
        """
        if not NAME.fullmatch(name):
            raise InputError(
                "a served bundle's name cannot be used", found=name,
                expected="letters, digits, dots, dashes and underscores, at most 100", remedy="serve NAME=FOLDER",
            )
        manifest = read_manifest(path)
        if manifest.geometry.frames is not None:
            raise InputError(
                "the images API serves no videos", found=f"{path}, {manifest.geometry.frames} frames",
                remedy="leave it out",
            )
        return cls(name, path, manifest)

    @property
    def size(self) -> str:
        """Of its images, as the API writes it: width x height."""
        return f"{self.manifest.geometry.width}x{self.manifest.geometry.height}"

    @property
    def steps(self) -> int:
        """Of an image."""
        return sum(stage.steps for stage in self.manifest.schedule.stages)

    @property
    def bytes(self) -> int:
        """Its files and the weights that it refers to: what it takes when it is loaded, beside what a run needs."""
        return self.manifest.size + sum(entry.size for entry in self.manifest.references)

    @cached_property
    def created(self) -> int:
        """When it was built, in seconds since 1970."""
        return int(datetime.fromisoformat(self.manifest.created).timestamp())

    @cached_property
    def digest(self) -> str:
        """Of its manifest, which has those of all its files."""
        return hashlib.sha256(self.manifest.to_json().encode()).hexdigest()

    @cached_property
    def terms(self) -> Terms:
        """What calls may ask for."""
        manifest = self.manifest
        text = next(e for e in manifest.engines if e.name == "text").spec()
        readers = len(manifest.tokenizers)
        return Terms(manifest.defaults.guidance, text.outputs, readers, self.steps, torch.device("cpu"))


class Catalog:
    """Bundles by name, in the order in which they were given.

    Raises:
        InputError: no bundle, or two of one name.
    """

    def __init__(self, entries: Sequence[Entry], loras: Path | None = None) -> None:
        self._entries = {entry.name: entry for entry in entries}
        if not entries or len(self._entries) < len(entries):
            raise InputError(
                "served bundles need names that differ", found=[entry.name for entry in entries],
                remedy="serve NAME=FOLDER NAME=FOLDER",
            )
        if loras is not None and not loras.is_dir():
            raise InputError("the folder of adapters is none", found=str(loras), remedy="--loras FOLDER")
        self._folder = loras

    @classmethod
    def of(cls, bundles: Sequence[str], loras: str | Path | None = None, *, trust: bool = False) -> Catalog:
        """From what the command line was given: FOLDER or NAME=FOLDER each.

        Args:
            trust: FOLDER may be OWNER/NAME on a hub.

        Raises:
            BundleError: a bundle that is not there, or cannot be read.
            InputError: names or folders that do not fit.
        """
        entries = []
        for bundle in bundles:
            name, _, path = bundle.rpartition("=")
            folder = Path(path)
            if trust:
                from jitexport import hub  # only for those who ask for it

                folder = hub.local(path)
            entries.append(Entry.read(name or Path(path).resolve().name, folder))
        return cls(entries, None if loras is None else Path(loras))

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._entries.values()))

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def get(self, name: str) -> Entry | None:
        """The bundle of that name."""
        return self._entries.get(name)

    def replace(self, entry: Entry) -> None:
        """Put another bundle in the place of the one of its name.

        Raises:
            InputError: images of another size.
        """
        if entry.size != (old := self[entry.name].size):
            raise InputError(
                "an update changes the size of images", found=entry.size, expected=old,
                remedy="serve it under another name",
            )
        self._entries[entry.name] = entry

    def loras(self) -> Mapping[str, Path]:
        """Adapters by name: what lies in the folder now. A request's name is looked up here, never made a path."""
        if self._folder is None:
            return {}
        files = sorted(self._folder.glob("*.safetensors"))
        return {path.stem: path for path in files if NAME.fullmatch(path.stem) and path.is_file()}
