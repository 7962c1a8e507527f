"""Compiling engines in several processes at once: exporting and compiling keep one core busy, not all of them.

Each process reads the model for itself, so that nothing of the caller's is shared with it; it ends with its caller.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import torch
from torch import Tensor

from jitexport import causes, machine, processes, registry
from jitexport.backends.base import Backend, Source
from jitexport.errors import CompileError, InputError, JitExportError, ResourceError
from jitexport.models.base import ModelAdapter
from jitexport.models.sources import ModelSource, load_adapter
from jitexport.specs import DTYPES, EngineSpec

#: Memory that a compiling process needs beside the model, in bytes, and how many copies of the model it may hold at
#: once: reading one and moving it to its dtype or device.
COMPILER_BYTES = 2 * 1024**3
MODEL_COPIES = 2


@dataclass(frozen=True)
class Recipe:
    """What a process needs to make the engines' modules for itself, on `device`, and how to compile them."""

    source: ModelSource
    dtype: str
    settings: dict[str, Any] | None
    backend: str
    device: str
    target: str | None
    threads: int

    def adapter(self) -> ModelAdapter:
        """The model with its weights."""
        adapter = load_adapter(self.source, DTYPES[self.dtype], self.settings)
        for component in adapter.components.values():
            component.to(self.device)
        return adapter


@dataclass(frozen=True)
class Task:
    """A group of engines that compile together into a directory, with an example of each one's inputs."""

    specs: Sequence[EngineSpec]
    examples: Sequence[Sequence[Tensor]]
    directory: Path

    def run(self, backend: Backend, adapter: ModelAdapter, target: str | None) -> None:
        """Compile here.

        Raises:
            CompileError: exporting or compiling failed.
        """
        sources = [
            Source(spec, adapter.module(spec.name), list(example))
            for spec, example in zip(self.specs, self.examples, strict=True)
        ]
        backend.build_group(sources, self.directory, target)


def default_jobs(backend: Backend, device: torch.device, tasks: int, model_bytes: int) -> int:
    """How many processes compile at once: one a core, as far as there are tasks and memory for the model in each.

    One for a GPU: compilers choose kernels there by their time, which other processes would disturb.
    """
    if not backend.separable or device.type != "cpu":
        return 1
    room = machine.memory() // (MODEL_COPIES * model_bytes + COMPILER_BYTES)
    return max(1, min(machine.cpus(), tasks, room))


def check_jobs(jobs: int | None, backend: Backend) -> None:
    """Refuse a number of processes that the backend cannot compile in.

    Raises:
        InputError: fewer than one, or several where the engines must be compiled one after the other.
    """
    if jobs is not None and (jobs < 1 or (jobs > 1 and not backend.separable)):
        raise InputError(
            "cannot compile in that many processes", found=f"{jobs} with backend {backend.name}",
            expected="1 or more" if backend.separable else "1: its engines are compiled together",
        )


class Compilers:
    """Context manager that compiles tasks: with one job here, when a task is waited for; else in processes, at once.

    Args:
        jobs: number of processes.
        recipe: what the processes start from.
        backend, adapter: the same, for compiling here.
    """

    def __init__(self, jobs: int, recipe: Recipe, backend: Backend, adapter: ModelAdapter) -> None:
        self._jobs = jobs
        self._recipe = recipe
        self._backend = backend
        self._adapter = adapter
        self._workers: list[_Worker] = []
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        if self._jobs > 1:
            self._threads = ThreadPoolExecutor(self._jobs, "compile")
            for _ in range(self._jobs):
                self._workers.append(_Worker(self._recipe))
                self._idle.put(self._workers[-1])
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.kill()
        if self._workers:
            self._threads.shutdown(cancel_futures=True)

    def submit(self, task: Task) -> Callable[[], None]:
        """Begin a task; the result waits for its end, and raises what it raised."""
        if not self._workers:
            return lambda: task.run(self._backend, self._adapter, self._recipe.target)
        return self._threads.submit(self._run, task).result

    def _run(self, task: Task) -> None:
        worker = self._idle.get()
        try:
            worker.run(task)
        finally:
            self._idle.put(worker)


class _Worker:
    """A process that compiles one task after the other."""

    def __init__(self, recipe: Recipe) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `kill`
        self._process = subprocess.Popen(
            processes.python("from jitexport.compiling import main; main()"),
            # Two processes whose threads spin while they wait take the cores from each other.
            env=processes.environment(OMP_WAIT_POLICY="PASSIVE"),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            start_new_session=True,  # Ctrl-C is for the caller, who ends this process
        )
        with suppress(OSError):  # it ended already: the first task tells
            _send(self._process.stdin, recipe)

    def run(self, task: Task) -> None:
        """Compile a task there.

        Raises:
            JitExportError: what it raised there.
            CompileError: the process ended.
        """
        assert self._process.stdout is not None
        try:
            _send(self._process.stdin, task)
            error: BaseException | None = pickle.load(self._process.stdout)
        except (EOFError, OSError, ValueError, pickle.UnpicklingError) as broken:
            raise self._ending(task.specs[0].name) from broken
        if error is not None:
            raise error

    def kill(self) -> None:
        """End the process, whatever it does, and the compilers that it runs."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its session is its own, see above
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with suppress(OSError):  # of what was not sent yet
                stream.close()
        self._log.close()

    def _ending(self, engine: str) -> JitExportError:
        """Why the process ended, as far as its status and its last words tell."""
        with suppress(subprocess.TimeoutExpired):  # its pipe breaks a moment before it has ended
            self._process.wait(10)
        status = self._process.poll()
        self._log.seek(0)
        lines = [line for line in self._log.read().decode(errors="replace").split("\n") if line]
        words = "\n".join([f"exit status {status}", *lines[-7:]])
        if status == -signal.SIGKILL:  # nobody else does that than the kernel when memory is short
            return ResourceError(
                f"memory ran out: the system killed the process that compiled {engine}", found=f"exit status {status}",
                expected=f"memory for {MODEL_COPIES} copies of the model and about {COMPILER_BYTES >> 30} GiB "
                "for each of the --jobs",
                remedy="build with --jobs 1; if that is killed too, give the machine or the container more memory",
            )
        ended = CompileError(f"the process that compiled {engine} ended", found=words)
        return causes.resource_error(ended, f"compiling engine {engine}") or ended


def _send(stream: IO[bytes] | None, value: object) -> None:
    assert stream is not None
    pickle.dump(value, stream)
    stream.flush()


def serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    """The process: reads a recipe, then a task at a time, and replies with None or the error, until nothing is left.

    Args:
        requests, replies: pipes to the caller. When the first one ends, the caller has ended, and so does this process.
    """
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen() -> None:
        try:
            while True:
                inbox.put(pickle.load(requests))
        except (EOFError, OSError, pickle.UnpicklingError):
            if os.getpgrp() == os.getpid():  # with the compilers that it runs
                os.killpg(os.getpid(), signal.SIGKILL)
            os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    recipe: Recipe = inbox.get()
    backend: Backend | None = None
    while True:
        task: Task = inbox.get()
        error: Exception | None = None
        try:
            with torch.inference_mode(False), torch.no_grad():
                if backend is None:  # with the first task, which can be answered with what goes wrong
                    torch.set_num_threads(recipe.threads)  # compilers for CPUs cut loops for so many
                    adapter, backend = recipe.adapter(), registry.backend(recipe.backend)
                task.run(backend, adapter, recipe.target)
        except JitExportError as raised:
            # What was found may be any library's exception, which another process may not be able to read.
            details: Mapping[str, object] = {k: getattr(raised, k) for k in ("found", "expected", "remedy")}
            error = type(raised)(raised.message, **{k: v if v is None else str(v) for k, v in details.items()})
        except Exception as raised:
            found = f"{type(raised).__name__}: {raised}"
            error = CompileError(f"cannot compile engine {task.specs[0].name}", found=found)
        _send(replies, error)


def main() -> None:
    """`serve` on standard input and output."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is no reply
    serve(sys.stdin.buffer, replies)
