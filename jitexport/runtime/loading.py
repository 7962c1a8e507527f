"""Opening a bundle: checked files, engines on one copy of the weights, a pipeline of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jitexport import causes, machine, registry
from jitexport.ambient import plain
from jitexport.arguments import check_path, shown
from jitexport.backends.base import Engine
from jitexport.errors import (
    BackendUnavailableError,
    InputError,
    JitExportError,
    ManifestError,
    MissingDependencyError,
)
from jitexport.files import imports_that_ask_for_a_temporary_folder
from jitexport.forks import survives_fork
from jitexport.methods.base import Method
from jitexport.models.base import ModelAdapter
from jitexport.prompting import Reader
from jitexport.runtime.pipeline import Pipeline
from jitexport.specs import DTYPES
from jitexport.weights import CONSTANTS, SharedWeights

if TYPE_CHECKING:  # a pipeline can be made of engines alone; bundles are read in `load`
    from jitexport.bundle import EngineBundle
    from jitexport.bundle.entries import EngineEntry
    from jitexport.bundle.manifest import Manifest
    from jitexport.bundle.reading import Verify

logger = logging.getLogger(__name__)


@survives_fork
@causes.explained("loading the bundle")
@plain()
def load(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    verify: Verify = "full",
    model: str | os.PathLike[str] | None = None,
    trust: bool = False,
    cuda_graphs: bool = True,
    threads: int | None = None,
) -> Pipeline:
    """Open a prebuilt bundle.

    Args:
        path: the bundle's directory; with `trust` also a hub id "owner/name", downloaded at its first use.
        device: where to run; the device that the bundle was built for by default.
        verify: "full" compares the digest of every file before anything is opened, "size" only their sizes.
        model: the model's folder, for a bundle that refers to its weights; where it was built from by default.
        trust: take a bundle from a hub: its engines are native code, so this is running a program of its owner.
        cuda_graphs: run the denoising loop as one CUDA graph, on devices and backends that can; see `jitexport.graphs`.
        threads: that a call computes on, on a CPU. By default as many as torch is set to (`torch.set_num_threads`,
            OMP_NUM_THREADS), but no more than the processors that affinity and cgroups leave to this process. Torch's
            setting is changed for the calling thread while a call runs, and is afterwards what it was.

    Raises:
        BundleError: no bundle, or one that fails its checks; see `jitexport.errors`.
        BackendError: the backend cannot run here.
        InputError: arguments that are no paths, or no such device.
    """
    path = check_path("a bundle", path) if not trust else path
    model = None if model is None else check_path("model", model)
    if trust:
        from jitexport import hub  # only for those who ask for it

        path = hub.local(path)
    from jitexport.bundle import EngineBundle

    if threads is not None and (not isinstance(threads, int) or isinstance(threads, bool) or threads < 1):
        raise InputError("threads must be a number of at least 1", found=threads, remedy="leave it out")
    bundle = EngineBundle.open(path, verify, model)
    manifest = bundle.manifest
    engines = EngineOpener(bundle, device)
    method, readers = _method(manifest), _readers(bundle)
    with machine.threads(threads or machine.default_threads()):  # some backends' engines keep the number
        opened = {entry.name: engines.open(entry) for entry in manifest.engines}
    pipeline = Pipeline(
        engines=opened,
        method=method,
        schedule=manifest.schedule.schedule(),
        geometry=manifest.model_geometry,
        defaults=manifest.defaults,
        readers=readers,
        batch_size=manifest.batch,
        passes=manifest.passes,
        cache=manifest.temporal,
        constants=engines.constants(),
        dtype=DTYPES[manifest.dtype],
        device=engines.device,
        weights=engines.weights if engines.backend.live_weights else None,
        read_checkpoint=engines.read_checkpoint,
        naming=manifest.model.adapter().naming,
        cuda_graphs=cuda_graphs and engines.backend.capturable,
        threads=threads,
        forkable=engines.backend.forkable,
    )
    bundle.check_unchanged()
    return pipeline


def _method(manifest: Manifest) -> Method[Any]:
    """The acceleration method, which has all the engines that it needs."""
    geometry = manifest.model_geometry
    with _declared("acceleration method"):
        method = registry.method(manifest.method.name)(geometry.grid, manifest.method.options, geometry.patch)
    if method.previews and not any(entry.name == "preview" for entry in manifest.engines):
        raise ManifestError(
            "the bundle lacks an engine", found=f"no preview, which the method {method.name} needs",
            remedy="build the bundle again",
        )
    return method


def _readers(bundle: EngineBundle) -> list[Reader]:
    """What reads prompts, one for each tokenizer."""
    entries = bundle.manifest.tokenizers
    with _declared("tokenizers"):
        texts = [(bundle.path / entry.path).read_text(encoding="utf-8") for entry in entries]
        return [entry.tokenizer(text).reader() for entry, text in zip(entries, texts, strict=True)]


class EngineOpener:
    """Opens the engines of a checked bundle, all on one copy of its weights.

    Args:
        device: where to run; the device that the bundle was built for by default.

    Raises:
        BackendUnavailableError: this machine lacks what the backend needs.
        HostMismatchError: the bundle was built for another machine.
        InputError: no such device.
    """

    def __init__(self, bundle: EngineBundle, device: str | torch.device | None = None) -> None:
        from jitexport.bundle.host import check_host, fingerprint

        manifest = bundle.manifest
        try:
            self.device = torch.device(device or manifest.host.device)
        except (RuntimeError, TypeError) as error:
            raise InputError("unknown device", found=shown(device), expected="cpu or cuda") from error
        self.bundle = bundle
        self.backend = registry.backend(manifest.backend)
        if reason := self.backend.missing(self.device):
            raise BackendUnavailableError(
                f"backend {self.backend.name} cannot run on {self.device}", found=reason,
                expected=f"the GPU that the bundle was built for, {manifest.host.gpu}" if manifest.host.gpu else None,
            )
        check_host(manifest.host, fingerprint(self.device), self.backend.host_fields)
        kind = manifest.model.settings.get("quantization")
        if slow := machine.emulation(manifest.dtype, kind, self.device, kernels=self.backend.kernels):
            logger.warning("the bundle is %s, but %s; build it in fp32 for this machine", manifest.precision, slow)
        self.weights = SharedWeights(bundle.weights(self.device))
        self._adapter: ModelAdapter | None = None

    def open(self, entry: EngineEntry) -> Engine:
        """One engine.

        Raises:
            BackendError: it cannot be opened.
            ManifestError: the model's configuration, which some backends need, makes no model.
            MissingDependencyError: so does its code, which is not installed.
        """
        spec, directory = entry.spec(), self.bundle.path / entry.directory
        raw = self.backend.load(spec, directory, self.weights.tensors, partial(self._module, entry.name), self.device)
        return Engine(spec, raw, self.device)

    def constants(self) -> dict[str, Tensor]:
        """What stages read that depends on the noise levels only, [S, ...], among the bundle's tensors.

        Raises:
            ManifestError: one is missing, or is another one than was declared.
        """
        found = {}
        for entry in self.bundle.manifest.constants:
            value = self.weights.tensors.get(f"{CONSTANTS}.{entry.name}")
            if value is None or (tuple(value.shape), value.dtype) != (entry.shape, DTYPES[entry.dtype]):
                raise ManifestError(
                    f"the constant {entry.name} is not as declared", found="nothing" if value is None else value.shape,
                    expected=entry.spec(), remedy="build the bundle again",
                )
            found[entry.name] = value
        return found

    def read_checkpoint(self, path: Path, base: Path | None = None) -> dict[str, Tensor]:
        """All tensors of another checkpoint of the bundle's model, by full name, in the bundle's dtype.

        Args:
            path, base: see `Pipeline.load_checkpoint`.

        Raises:
            InputError: a checkpoint of another model.
            ModelError: it cannot be read.
        """
        from jitexport.checkpoints import check_same_model, read_model

        manifest = self.bundle.manifest
        with _declared("model family"):
            adapter = read_model(manifest.model.adapter(), path, base, manifest)
        check_same_model(self.bundle, adapter)
        sigmas = torch.tensor(manifest.schedule.sigmas[:-1], dtype=torch.float32)
        constants = {f"{CONSTANTS}.{name}": value for name, value in adapter.constants(sigmas).items()}
        return dict(adapter.tensors()) | constants

    def _module(self, name: str) -> torch.nn.Module:
        """An engine's module without weights; imports the model's code at the first need."""
        if self._adapter is None:
            manifest = self.bundle.manifest
            model = manifest.model
            with _declared("model configuration"), imports_that_ask_for_a_temporary_folder():
                self._adapter = model.adapter().from_configs(
                    model.configs, model.settings, DTYPES[manifest.dtype]
                )
        return self._adapter.module(name)


@contextmanager
def _declared(what: str) -> Iterator[None]:
    """Turn whatever other libraries raise on what a manifest declares into this package's errors."""
    try:
        yield
    except (JitExportError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise MissingDependencyError(
            "this bundle runs the model's own code", found=error, remedy="pip install 'jitexport[build]'"
        ) from error
    except Exception as error:
        raise ManifestError(
            f"the bundle's {what} cannot be used", found=f"{type(error).__name__}: {error}",
            remedy="build the bundle again",
        ) from error
