"""Weights that change between calls: adapters and other checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from jitexport.ambient import plain
from jitexport.arguments import check_number, check_path, require_finite
from jitexport.errors import BackendError, InputError
from jitexport.forks import survives_fork
from jitexport.kernels.linear import quantize
from jitexport.lora import Change, read_lora
from jitexport.models.naming import Naming
from jitexport.quant import kind_of
from jitexport.weights import SharedWeights

#: (path, base folder or None) -> all tensors of a checkpoint, by full name.
ReadCheckpoint = Callable[[Path, Path | None], Mapping[str, Tensor]]


class ChangingWeights:
    """The part of a pipeline that changes its engines' weights.

    Attributes:
        weights: what the engines read, and can be changed between calls; None where they hold copies of their own.
    """

    weights: SharedWeights | None
    device: torch.device

    def __init__(
        self, weights: SharedWeights | None, naming: Naming | None, read_checkpoint: ReadCheckpoint | None, *,
        forkable: bool,
    ) -> None:
        self.weights = weights
        self._naming = naming
        self._read_checkpoint = read_checkpoint
        self._adapters: list[tuple[dict[str, Change], float]] = []  # changed in place: copies of a pipeline share it
        self._process = os.getpid()
        self._forkable = forkable

    @survives_fork
    def load_lora(self, adapter: str | Path | Mapping[str, Tensor], scale: float = 1.0) -> None:
        """Merge an adapter into the weights, beside those already merged; no engine is built again.

        Waits for running calls to end. The originals of the weights that it touches are kept in memory. Where it fails,
        nothing has changed.

        Args:
            adapter: a safetensors file, a folder with one, or a state dict of tensors or NumPy arrays, in one of the
                formats of docs/compatibility.md.
            scale: strength of the adapter.

        Raises:
            InputError: the adapter does not fit the model, or this backend's engines hold copies of the weights.
            ModelNotFoundError: the file cannot be read.
        """
        weights = self._changeable()
        scale = check_number("scale", scale)
        if self._naming is None:
            raise InputError("this pipeline has no bundle, and no names to read adapters by")
        with plain():
            changes = read_lora(adapter, self._naming, {n: tuple(t.shape) for n, t in weights.tensors.items()})
            with weights.changing():
                adapters = [*self._adapters, (changes, scale)]
                for name in changes:
                    for changed, value in self._merged(name, adapters).items():
                        weights.set(changed, value)
                self._adapters[:] = adapters

    @survives_fork
    def unload_lora(self) -> None:
        """Take all adapters out again: the weights are what they were, bit by bit."""
        weights = self._changeable()
        with weights.changing():
            weights.restore()
            self._adapters.clear()

    @survives_fork
    def load_checkpoint(self, path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> None:
        """Replace the weights by those of another checkpoint of the same model; adapters are taken out.

        Every tensor comes from the new checkpoint, and all that engines have built in must be the same: the
        configurations of all components, tokenizers and scheduler. Where it fails, nothing has changed.

        Args:
            path: the pipeline's folder in diffusers' format, or a transformer in one file. Reading it needs the
                `build` extra.
            base: for one file, the folder that everything else comes from.

        Raises:
            InputError: another architecture, weights that are not finite, or engines that hold copies of the weights.
            ModelError: it cannot be read.
        """
        weights = self._changeable()
        if self._read_checkpoint is None:
            raise InputError("this pipeline has no bundle to read checkpoints for")
        with plain():
            values = self._read_checkpoint(
                check_path("the checkpoint", path), None if base is None else check_path("base", base)
            )
            weights.check({name: tuple(value.shape) for name, value in values.items()}, every=True)
            for name, value in values.items():
                if value.is_floating_point():
                    require_finite(
                        f"the checkpoint's weights {name}", value.float(), "use another copy: this one is damaged"
                    )
            with weights.changing():
                weights.replace(values)
                self._adapters.clear()

    def _check_process(self) -> None:
        """Refuse to run in a forked process what would wait there for threads or a device of the other process.

        Raises:
            BackendError: the pipeline was loaded in another process, and its engines do not survive a fork.
        """
        if os.getpid() != self._process and not self._forkable:
            raise BackendError(
                "this pipeline was loaded before the process was forked", found=f"engines on {self.device} whose "
                "threads or device belong to the other process", expected="a pipeline of this process",
                remedy="call jitexport.load in each worker, after the fork; or start workers with `spawn`",
            )

    def _changeable(self) -> SharedWeights:
        self._check_process()
        if self.weights is None:
            raise InputError(
                "this bundle's engines hold copies of the weights, which cannot be changed",
                remedy="build with a backend that shares weights (eager, inductor, aoti, onnx), "
                "or build from the changed model",
            )
        return self.weights

    def _merged(self, name: str, adapters: Sequence[tuple[Mapping[str, Change], float]]) -> dict[str, Tensor]:
        """W + the sum of all adapters' changes, from the original and rounded once (quantized weights: again).

        Returns:
            What to write, by name: the weight, and where it is quantized its scales.

        Raises:
            InputError: the sum is not finite.
        """
        weights = self._changeable()
        scales, target = f"{name}_scale", weights.tensors[name]
        quantized = scales in weights.tensors
        base = weights.original(name).float()
        if quantized:
            base = base * weights.original(scales)[:, None]
        merged = base
        for changes, scale in adapters:
            if name in changes:
                merged = merged + changes[name].delta(base, scale)
        values = {name: merged.to(target.dtype)}
        if quantized:
            rows, factors = quantize(merged, kind_of(target))
            values = {name: rows, scales: factors[:, 0]}
        if not all(bool(v.isfinite().all()) for v in (merged, *values.values()) if v.element_size() > 1):
            raise InputError(
                f"the adapter would make {name} infinite or NaN", remedy="a smaller scale, or an adapter of this model"
            )
        return values
