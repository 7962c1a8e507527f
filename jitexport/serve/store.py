"""Loaded bundles within a memory budget, least used out first, and the adapter that each one has merged."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from jitexport.errors import InputError, JitExportError
from jitexport.runtime import Pipeline, load
from jitexport.serve.catalog import Catalog, Entry
from jitexport.serve.metrics import Metrics

logger = logging.getLogger(__name__)


@dataclass
class Loaded:
    """A loaded bundle.

    Attributes:
        entry: what it was loaded from.
        lora: name, strength and file version of the adapter that is merged into its weights; None for none.
    """

    entry: Entry
    pipe: Pipeline
    lora: tuple[str, float, int] | None = None


class Store:
    """Loads bundles when they are needed. One thread uses it; `update` may be called by another.

    Args:
        budget: bytes of the loaded bundles' files, all together; None for no limit.
        device, threads: as `jitexport.load` takes them.

    Raises:
        InputError: a bundle that alone is larger than the budget.
    """

    def __init__(
        self, catalog: Catalog, metrics: Metrics, *, budget: int | None = None, device: str | None = None,
        threads: int | None = None,
    ) -> None:
        self.catalog = catalog
        self.metrics = metrics
        self._budget = budget
        self._device, self._threads = device, threads
        self._loaded: dict[str, Loaded] = {}  # least used first
        self._lock = threading.Lock()
        for entry in catalog:
            self._check_alone(entry)
            metrics.loaded.labels(entry.name).set(0)

    def _check_alone(self, entry: Entry) -> None:
        if self._budget is not None and entry.bytes > self._budget:
            raise InputError(
                f"the bundle {entry.name} is larger than the memory budget", found=f"{entry.bytes / 1e6:.0f} MB",
                expected=f"at most {self._budget / 1e6:.0f} MB", remedy="--memory, or leave the bundle out",
            )

    def fits(self, entry: Entry) -> bool:
        """Whether a bundle can be loaded without another one's going."""
        with self._lock:
            used = sum(one.entry.bytes for one in self._loaded.values())
        return self._budget is None or used + entry.bytes <= self._budget

    def is_loaded(self, name: str) -> bool:
        """Whether a bundle is loaded now."""
        with self._lock:
            return name in self._loaded

    def get(self, name: str) -> Loaded:
        """The loaded bundle of that name, loaded now if need be.

        Raises:
            JitExportError: it cannot be loaded.
        """
        with self._lock:
            if found := self._loaded.pop(name, None):
                self._loaded[name] = found
                return found
        entry = self.catalog[name]
        self._make_room(entry)
        found = self._load(entry)
        with self._lock:
            self._loaded[name] = found
        return found

    def _make_room(self, entry: Entry) -> None:
        while not self.fits(entry):
            with self._lock:
                name = next(iter(self._loaded))
                del self._loaded[name]
            self.metrics.loaded.labels(name).set(0)
            logger.info("bundle %s goes out of memory for %s", name, entry.name)
        _release()

    def _load(self, entry: Entry) -> Loaded:
        logger.info("loading bundle %s from %s", entry.name, entry.path)
        try:
            pipe = load(entry.path, verify="full", device=self._device, threads=self._threads)
        except Exception:
            self.metrics.loads.labels(entry.name, "failed").inc()
            raise
        pipe.set_progress_bar_config(disable=True)
        self.metrics.loads.labels(entry.name, "loaded").inc()
        self.metrics.loaded.labels(entry.name).set(1)
        return Loaded(entry, pipe)

    def merge(self, loaded: Loaded, name: str | None, scale: float) -> None:
        """Have this adapter, or none, in the weights, and no other.

        Raises:
            InputError: it does not fit, or is not there any more.
        """
        path = None if name is None else self.catalog.loras().get(name)
        if name is not None and path is None:
            raise InputError("the adapter is not there any more", found=name, remedy="GET /v1/models lists them")
        wanted = None if path is None or name is None else (name, scale, _version(path))
        if loaded.lora == wanted:
            return
        if loaded.lora is not None:
            loaded.pipe.unload_lora()
            loaded.lora = None
        if path is not None:
            loaded.pipe.load_lora(path, scale)
            loaded.lora = wanted

    def update(self, paths: Mapping[str, Path]) -> list[str]:
        """Load what has changed on disk beside what runs, try it, and put it in its place.

        What cannot be loaded or makes no image leaves the old one where it is. Takes the memory of both for a moment.

        Args:
            paths: folders by name, where they are others than before.

        Returns:
            Names of the bundles that were replaced.
        """
        replaced = []
        for old in self.catalog:
            try:
                entry = Entry.read(old.name, paths.get(old.name, old.path))
                if entry.manifest == old.manifest:
                    continue
                self._check_alone(entry)
                new = self._load(entry) if self.is_loaded(old.name) else None
                if new is not None:
                    try_out(new.pipe)
                self.catalog.replace(entry)
            except JitExportError as error:
                logger.error("bundle %s is not updated, the old one stays: %s", old.name, error)
                self.metrics.loads.labels(old.name, "update_failed").inc()
                continue
            with self._lock:
                if new is not None:
                    self._loaded[old.name] = new
            logger.info("bundle %s is updated from %s", old.name, entry.path)
            replaced.append(old.name)
        _release()
        return replaced


def try_out(pipe: Pipeline) -> None:
    """Make an image.

    Raises:
        JitExportError: it cannot.
    """
    pipe("ready", generator=torch.Generator().manual_seed(0), output_type="pt")


def _version(path: Path) -> int:
    return path.stat().st_mtime_ns


def _release() -> None:
    """Give memory of what is gone back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
