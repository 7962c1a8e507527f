"""The weights that all engines of a pipeline share, and changing them between calls."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from jitexport.errors import InputError


class SharedWeights:
    """One copy of a model's tensors, read by every engine, and a lock between calls that read and changes.

    Any number of calls read at once; a change waits until they have ended, and calls that begin meanwhile wait for the
    change. Tensors are changed in place, which engines see at their next run. Originals of what was changed are kept,
    so that a change can be taken back bit by bit.

    Args:
        tensors: by full name, "<component>.<name>".
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)
        self._originals: dict[str, Tensor] = {}
        self._gate = threading.Condition()
        self._readers = 0
        self._waiting = 0  # changes that wait; calls that begin let them go first, so that a busy service can change
        self._changing = False
        self._own = threading.local()  # how many calls of the current thread are reading

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Hold the weights still for the length of a call."""
        depth = getattr(self._own, "depth", 0)
        with self._gate:
            # A call inside a call (from a callback) must not wait for a change that waits for it.
            while (self._changing or self._waiting) and not depth:
                self._gate.wait()
            self._readers += 1
        self._own.depth = depth + 1
        try:
            yield
        finally:
            self._own.depth = depth
            with self._gate:
                self._readers -= 1
                self._gate.notify_all()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Wait until no call runs, and keep others from beginning.

        Raises:
            InputError: from inside a call (a callback), which would wait for itself.
        """
        if getattr(self._own, "depth", 0):
            raise InputError("weights cannot change during a call", remedy="change them after the call has returned")
        with self._gate:
            self._waiting += 1
            while self._changing or self._readers:
                self._gate.wait()
            self._waiting -= 1
            self._changing = True
        try:
            yield
        finally:
            with self._gate:
                self._changing = False
                self._gate.notify_all()

    def check(self, values: Mapping[str, tuple[int, ...]]) -> None:
        """Compare names and shapes with what is there, before anything is changed.

        Raises:
            InputError: a name that the model does not have, or another shape.
        """
        unknown = [name for name in values if name not in self.tensors]
        if unknown:
            raise InputError(
                f"{len(unknown)} of {len(values)} weights are not the model's", found=", ".join(unknown[:3])
            )
        for name, shape in values.items():
            if shape != tuple(self.tensors[name].shape):
                raise InputError(f"{name} has another shape", found=shape, expected=tuple(self.tensors[name].shape))

    def original(self, name: str) -> Tensor:
        """A tensor as it was before any change."""
        return self._originals.get(name, self.tensors[name])

    @torch.no_grad()
    def set(self, name: str, value: Tensor) -> None:
        """Write a value into a tensor, keeping the original. Inside `changing` only."""
        target = self.tensors[name]
        if name not in self._originals:
            self._originals[name] = target.clone()
        target.copy_(value)

    @torch.no_grad()
    def restore(self) -> None:
        """Take all changes back, bit by bit. Inside `changing` only."""
        for name, value in self._originals.items():
            self.tensors[name].copy_(value)
        self._originals.clear()

    @torch.no_grad()
    def replace(self, values: Mapping[str, Tensor]) -> None:
        """Write other weights for good: they are the originals from now on. Inside `changing` only."""
        self.restore()
        for name, value in values.items():
            self.tensors[name].copy_(value)
