"""CUDA graphs: the whole denoising loop recorded once per loaded bundle, then replayed as one launch.

Every shape of the loop is fixed, transitions and activation included, and nothing in it waits for the device; only
values differ between images. So one recording serves all prompts, seeds and guidance scales: a call copies its
condition and its draws into the recording's input buffers, replays it, and copies the latents out.

Weights are read where they are: changed in place, they are the next replay's weights.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from jitexport.backends.base import Engine
from jitexport.errors import InputError

logger = logging.getLogger(__name__)

#: What is recorded gives a tensor, or several.
Output = Tensor | Sequence[Tensor]

#: Reads the tensors that it is given by name, and nothing else that changes between calls.
Function = Callable[[Mapping[str, Tensor]], Output]

#: One of them that gives the loop's latents.
Loop = Callable[[Mapping[str, Tensor]], Tensor]


class Recorder(Protocol):
    """Turns work on fixed tensors into something that can be done again."""

    def record(self, work: Callable[[], Output]) -> tuple[Callable[[], None], Output]:
        """Run `work` until it has allocated and compiled all that it needs, then record it.

        Returns:
            What does it again, and the tensors that then hold its result.
        """

    def before(self) -> None:
        """Called before a recording's buffers are written."""

    def after(self) -> None:
        """Called after its result has been read."""


class CUDARecorder:
    """Records CUDA graphs, all in one memory pool.

    Graphs that share a pool may overwrite each other's intermediate tensors. That is safe here: they run one after the
    other, in the order in which they were recorded, and results are copied out before the next one begins.
    """

    #: Runs before a recording: libraries allocate workspaces and choose kernels in the first ones.
    WARMUP = 2

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._done: torch.cuda.Event | None = None

    def record(self, work: Callable[[], Output]) -> tuple[Callable[[], None], Output]:
        """See `Recorder`.

        Raises:
            RuntimeError: the work waits for the device or does something else that a graph cannot hold, or
                (torch.OutOfMemoryError) memory is short.
        """
        with torch.cuda.device(self.device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(self.WARMUP):
                    work()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            state = generator.clone_state()
            # thread_local: other threads of a server may allocate meanwhile.
            capture = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
            try:
                # A capture that fails leaves its stream as the current one, and the generator as within a capture,
                # where it draws no more numbers.
                with torch.cuda.stream(self._stream), capture:
                    output = work()
            except RuntimeError:
                generator.graphsafe_set_state(state)
                raise
        return graph.replay, output

    def before(self) -> None:
        """Wait, on the device, for the last use of the buffers: it may have been on another thread's stream."""
        if self._done is not None:
            torch.cuda.current_stream(self.device).wait_event(self._done)

    def after(self) -> None:
        """Mark the end of this use."""
        self._done = torch.cuda.current_stream(self.device).record_event()


class Recording:
    """A function of tensors of fixed shapes, recorded at its first call.

    Calls from several threads take turns.

    Args:
        function: see `Function`.
        lock: shared by the recordings of one recorder.
    """

    def __init__(self, function: Function, recorder: Recorder, lock: threading.RLock) -> None:
        self._function = function
        self._recorder = recorder
        self._lock = lock
        #: What does it again, and what then holds its result; None before the first call.
        self._recorded: tuple[Callable[[], None], Output] | None = None
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, inputs: Mapping[str, Tensor]) -> Output:
        """The function's value at `inputs`; the tensors are the caller's own.

        Raises:
            InputError: other names, shapes or dtypes than at the first call.
            RuntimeError: at the first call, where the function cannot be recorded.
        """
        with self._lock, torch.no_grad():
            self._recorder.before()
            replay, output = self._recorded = self._recorded or self._record(inputs)
            if (found := _kinds(inputs)) != (expected := _kinds(self._buffers)):
                raise InputError("a recorded loop takes tensors of fixed shapes", found=found, expected=expected)
            for name, buffer in self._buffers.items():
                buffer.copy_(inputs[name])
            replay()
            result = output.clone() if isinstance(output, Tensor) else [tensor.clone() for tensor in output]
            self._recorder.after()
        return result

    def _record(self, inputs: Mapping[str, Tensor]) -> tuple[Callable[[], None], Output]:
        # Ordinary tensors, not inference mode's, so that calls inside and outside of it may write to them.
        with torch.inference_mode(False):
            buffers = {name: value.clone(memory_format=torch.contiguous_format) for name, value in inputs.items()}
        recorded = self._recorder.record(lambda: self._function(buffers))
        self._buffers = buffers
        return recorded


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}


class RecordedEngine(Engine):
    """An engine, recorded."""

    def __init__(self, engine: Engine, recorder: Recorder, lock: threading.RLock) -> None:
        self.spec = engine.spec
        self.device = engine.device
        self._recording = Recording(lambda named: engine(*named.values()), recorder, lock)

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        found = self._recording({spec.name: value for spec, value in zip(self.spec.inputs, inputs, strict=True)})
        assert not isinstance(found, Tensor)  # an engine's outputs are several
        return found


class LoopGraph:
    """The denoising loop as one graph, or where that cannot be had, each stage's engine as one, or no graph at all.

    Args:
        loop: the loop, given its inputs by name and what to run as each stage's engine.
        stages: the stages' engines, by name.
        recorder: how to record.
    """

    def __init__(
        self, loop: Callable[[Mapping[str, Tensor], Mapping[str, Engine]], Tensor], stages: Mapping[str, Engine],
        recorder: Recorder,
    ) -> None:
        self._loop = loop
        self._stages = dict(stages)
        self._recorder = recorder
        self._lock = threading.RLock()
        self._ways = {"loop": self._whole, "stages": self._by_stage, "nothing": self._plain}
        self._run: Loop | None = None
        #: What runs as a graph: "loop", "stages" or "nothing"; None before the first call.
        self.level: str | None = None

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The loop's latents at `inputs`.

        Raises:
            InputError: other shapes than at the first call.
        """
        while True:
            run = self._ready()
            try:
                return run(inputs)
            except RuntimeError as error:  # out of memory is one too
                if not self._give_up(run, error):
                    raise

    def _ready(self) -> Loop:
        with self._lock:
            if self._run is None:
                self.level = next(iter(self._ways))
                self._run = self._ways.pop(self.level)()
            return self._run

    def _give_up(self, failed: Loop, error: RuntimeError) -> bool:
        """Go on to the next way, unless another thread has; False where there is none."""
        with self._lock:
            if self._run is failed:
                if not self._ways:
                    return False
                following = next(iter(self._ways))
                logger.warning("no CUDA graph of the %s, going on with that of %s: %s", self.level, following, error)
                self._run = None
            return True

    def _whole(self) -> Loop:
        recordings: dict[frozenset[str], Recording] = {}  # with a second pass, and without

        def run(inputs: Mapping[str, Tensor]) -> Tensor:
            with self._lock:
                recording = recordings.setdefault(
                    frozenset(inputs),
                    Recording(lambda given: self._loop(given, self._stages), self._recorder, self._lock),
                )
            latents = recording(inputs)
            assert isinstance(latents, Tensor)
            return latents

        return run

    def _by_stage(self) -> Loop:
        stages: dict[str, Engine] = {
            name: RecordedEngine(engine, self._recorder, self._lock) for name, engine in self._stages.items()
        }
        return lambda inputs: self._loop(inputs, stages)

    def _plain(self) -> Loop:
        return lambda inputs: self._loop(inputs, self._stages)
