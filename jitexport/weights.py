"""The weights that all engines of a pipeline share, and changing them between calls."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from jitexport.ambient import plain
from jitexport.errors import InputError
from jitexport.forks import Lock

#: The component that a bundle's constants are stored as: see `jitexport.models.base`.
CONSTANTS = "constants"

_entering = Lock()


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
        self._undo: dict[str, Tensor] = {}  # values from before the change that is being made
        self._process = os.getpid()

    def enter_process(self) -> None:
        """After a fork: nobody reads here, whoever read or waited in the other process.

        Raises:
            InputError: the process was forked in the middle of a change.
        """
        if self._process == os.getpid():
            return
        with _entering:
            if self._process == os.getpid():
                return
            if self._changing:
                raise InputError(
                    "this process was forked while weights were being changed, and has a mixture of both",
                    remedy="load the bundle here, or fork between changes",
                )
            self._gate = threading.Condition()
            self._readers = self._waiting = 0
            self._own = threading.local()
            self._process = os.getpid()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Hold the weights still for the length of a call."""
        self.enter_process()
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

        A change happens whole or not at all: where its block raises, what was written is taken back.

        Raises:
            InputError: from inside a call (a callback), which would wait for itself.
        """
        self.enter_process()
        if getattr(self._own, "depth", 0):
            raise InputError("weights cannot change during a call", remedy="change them after the call has returned")
        with self._gate:
            self._waiting += 1
            try:
                while self._changing or self._readers:
                    self._gate.wait()
                self._changing = True
            finally:
                self._waiting -= 1
                self._gate.notify_all()
        originals = dict(self._originals)
        try:
            yield
        except BaseException:
            self._take_back(originals)
            raise
        finally:
            self._undo.clear()
            with self._gate:
                self._changing = False
                self._gate.notify_all()

    def check(self, values: Mapping[str, tuple[int, ...]], *, every: bool = False) -> None:
        """Compare names and shapes with what is there, before anything is changed.

        Args:
            every: whether there must be values for all tensors.

        Raises:
            InputError: a name that the model does not have, another shape, or values that are missing.
        """
        if missing := [name for name in self.tensors if every and name not in values]:
            raise InputError(
                f"{len(missing)} of {len(self.tensors)} weights are missing", found=", ".join(missing[:3]),
                remedy="use a checkpoint of the same model",
            )
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

    def set(self, name: str, value: Tensor) -> None:
        """Write a value into a tensor, keeping the original. Inside `changing` only."""
        if name not in self._originals:
            with plain():
                self._originals[name] = self._undo[name] = self.tensors[name].clone()
        self._write(name, value)

    def restore(self) -> None:
        """Take all changes back, bit by bit. Inside `changing` only."""
        for name, value in self._originals.items():
            self._write(name, value)
        self._originals.clear()

    def replace(self, values: Mapping[str, Tensor]) -> None:
        """Write other weights for good: they are the originals from now on. Inside `changing` only."""
        self.restore()
        for name, value in values.items():
            self._write(name, value)

    def _write(self, name: str, value: Tensor) -> None:
        with plain():
            if name not in self._undo:
                self._undo[name] = self.tensors[name].to("cpu", copy=True)
            self.tensors[name].copy_(value)

    def _take_back(self, originals: dict[str, Tensor]) -> None:
        with plain():
            for name, value in self._undo.items():
                self.tensors[name].copy_(value)
        self._originals = originals
