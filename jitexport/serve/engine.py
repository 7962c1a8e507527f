"""The bounded queue, and the one thread that loads, changes weights and computes.

One thread, because one call already uses all cores, or the whole device: two at once would each take twice as long, in
twice the memory. A thread and no process, because PyTorch's operators let go of the interpreter's lock, weights need no
copying, and a client that goes away is a flag. The event loop never waits for it. More devices are more processes:
`jitexport.serve.ray_app`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from jitexport.serve import errors
from jitexport.serve.batch import Abandoned, Batch, Waiting
from jitexport.serve.catalog import Catalog
from jitexport.serve.jobs import Accepted, Event, Failed, Finished, Job
from jitexport.serve.metrics import Metrics
from jitexport.serve.settings import Limits
from jitexport.serve.store import Store, try_out

logger = logging.getLogger(__name__)

#: Where nothing was measured yet: seconds of a batch, for Retry-After.
_GUESS = 2.0


class Engine:
    """Makes images of jobs, in this process.

    Attributes:
        ready: every bundle that fits into memory is loaded and has made an image.
        failure: what kept it from getting ready.
    """

    def __init__(self, catalog: Catalog, store: Store, limits: Limits, metrics: Metrics) -> None:
        self.catalog = catalog
        self.store = store
        self.limits = limits
        self.metrics = metrics
        self.ready = False
        self.failure: Exception | None = None
        self._queue: deque[Waiting] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._members: list[Waiting] = []  # of the batch that runs
        self._batch_seconds = _GUESS
        self._encoders = ThreadPoolExecutor(1, "encode")
        self._thread = threading.Thread(target=self._work, name="compute", daemon=True)
        self._updating = threading.Lock()

    def start(self, when_ready: Callable[[], None] = lambda: None) -> None:
        """Begin: load what fits, make an image of each, then work.

        Args:
            when_ready: called by the computing thread when that is done or has failed.
        """
        self._when_ready = when_ready
        self._thread.start()

    def stop(self) -> None:
        """Take no more jobs, end those that were taken, and wait for it."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()
        self._encoders.shutdown()

    def update(self, paths: Mapping[str, Path] | None = None) -> list[str]:
        """Put bundles that have changed on disk in the place of those that are loaded: see `Store.update`."""
        with self._updating:
            return self.store.update(paths or {})

    @property
    def is_alive(self) -> bool:
        """Whether the computing thread is there."""
        return self._thread.is_alive()

    def give_up(self) -> None:
        """Take no more jobs, and end those that were taken at their next step."""
        with self._changed:
            self._stopping = True
            for waiting in [*self._queue, *self._members]:
                waiting.gone = True
            self._changed.notify_all()

    async def events(self, jobs: Sequence[Job]) -> AsyncGenerator[tuple[int, Event], None]:
        """Make images: first `Accepted`, then what happens to each, by its number, until all have ended.

        Closing the iterator gives up what has not ended, between two steps.

        Raises:
            ApiError: 503, no room for all of them, or no more work is taken; 504, out of time.
        """
        loop, told = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event]]()

        def teller(i: int) -> Callable[[Event], None]:
            def emit(event: Event) -> None:
                with suppress(RuntimeError):  # the loop has ended, and with it who waited
                    loop.call_soon_threadsafe(told.put_nowait, (i, event))

            return emit

        members = [Waiting(job, teller(i)) for i, job in enumerate(jobs)]
        self._admit(members)
        until = loop.time() + self.limits.request
        try:
            yield 0, Accepted()
            left = len(members)
            while left:
                i, event = await asyncio.wait_for(told.get(), until - loop.time())
                left -= isinstance(event, Finished | Failed)
                yield i, event
        except TimeoutError:
            raise errors.timed_out(self.limits.request) from None
        finally:
            with self._changed:
                for waiting in members:
                    waiting.gone = True
                self._changed.notify_all()

    def _admit(self, members: Sequence[Waiting]) -> None:
        with self._changed:
            if self._stopping:
                self.metrics.refusals.labels("stopping").inc()
                raise errors.stopping()
            self._drop_gone()
            waiting = len(self._queue)
            if waiting + len(members) > self.limits.queue:
                self.metrics.refusals.labels("overloaded").inc()
                batch = max(self.catalog[w.job.bundle].manifest.batch for w in members)
                raise errors.overloaded(self._batch_seconds * (waiting + len(self._members)) / batch, waiting)
            self._queue.extend(members)
            self.metrics.queue.set(len(self._queue))
            self._changed.notify_all()

    def _drop_gone(self) -> None:
        """Take out of the queue what nobody waits for. With the lock held."""
        for waiting in [w for w in self._queue if w.gone]:
            self._queue.remove(waiting)
            self.metrics.abandoned.labels(waiting.job.bundle).inc()

    # --- the computing thread ---

    def _work(self) -> None:
        try:
            self._load_all()
            self.ready = True
        except Exception as error:
            self.failure = error
        self._when_ready()
        while members := self._next():
            self._make(members)

    def _load_all(self) -> None:
        for entry in self.catalog:
            if self._stopping:
                return
            if self.store.fits(entry):
                try_out(self.store.get(entry.name).pipe)

    def _next(self) -> list[Waiting]:
        """The next batch, by the longest-waiting job; empty at the end."""
        with self._changed:
            while True:
                self._drop_gone()
                if self._queue:
                    first = self._queue[0]
                    size = self.catalog[first.job.bundle].manifest.batch
                    members = [w for w in self._queue if w.job.together == first.job.together][:size]
                    left = first.arrived + self.limits.batch_wait - time.monotonic()
                    if len(members) == size or left <= 0 or self._stopping:
                        break
                    self._changed.wait(left)
                elif self._stopping:
                    return []
                else:
                    self._changed.wait()
            for waiting in members:
                self._queue.remove(waiting)
            self._members = members
            self.metrics.queue.set(len(self._queue))
            self.metrics.running.set(len(members))
            return members

    def _make(self, members: Sequence[Waiting]) -> None:
        begun = time.monotonic()
        try:
            self._run(members)
            self._batch_seconds += 0.2 * (time.monotonic() - begun - self._batch_seconds)
        except Abandoned:
            self.metrics.abandoned.labels(members[0].job.bundle).inc(len(members))
        except Exception as error:
            if len(members) > 1:  # one of them may be to blame: the others are made without it
                logger.warning("a batch of %d failed, its images are tried one by one: %s", len(members), error)
                for waiting in members:
                    if not waiting.gone:
                        self._make([waiting])
            else:
                self._fail(members[0], error)
        finally:
            self._members = []
            self.metrics.running.set(0)

    def _run(self, members: Sequence[Waiting]) -> None:
        begun, job = time.monotonic(), members[0].job
        loaded = self.store.get(job.bundle)
        self.store.merge(loaded, job.lora, job.lora_scale)
        self.metrics.seconds.labels(job.bundle, "prepare").observe(time.monotonic() - begun)
        Batch(members, loaded.pipe, self.metrics, self._encoders).run()

    def _fail(self, waiting: Waiting, error: Exception) -> None:
        answer = errors.of_failure(error)
        if answer.status >= 500:
            logger.error("an image of %s failed", waiting.job.bundle, exc_info=error)
        self.metrics.failed.labels(waiting.job.bundle).inc()
        waiting.emit(Failed(answer))
