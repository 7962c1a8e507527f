"""The same application on Ray Serve: `jitexport serve --ray`, or anywhere `serve run jitexport.serve.ray_app:build`.

Two deployments. `Api` speaks HTTP and needs no accelerator; `Engines` makes images, one `Engine` a replica. Queues,
routing, placement, autoscaling and rolling updates are Ray's. What is ours: a replica puts what Ray gives it into
batches, and what a replica that dies had not finished is asked of another one, where one seed makes the same image.
"""

# No postponed annotations: Ray reads the type of the builder's argument.

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from ray import serve
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayError
from ray.serve.exceptions import BackPressureError, RayServeException, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from jitexport.bundle.manifest import Manifest
from jitexport.errors import JitExportError
from jitexport.serve import errors
from jitexport.serve.app import create_app
from jitexport.serve.catalog import Catalog, Entry
from jitexport.serve.engine import Engine
from jitexport.serve.errors import ApiError
from jitexport.serve.jobs import Accepted, Event, Failed, Finished, Job, Partial, Step
from jitexport.serve.ray_metrics import RayMetrics
from jitexport.serve.settings import REPLICAS, Limits, read_tokens
from jitexport.serve.store import Store

logger = logging.getLogger("ray.serve")

#: A request is given to so many replicas before it is given up, where one after the other dies.
ATTEMPTS = 5
#: Seconds between two looks at what the replicas serve.
LOOK = 2.0
_UNBOUNDED = 2**31
#: Of a replica that cannot be started: a damaged bundle stays damaged.
_RETRIES = 2
#: What Ray raises where a replica is gone.
_DEAD = (ActorDiedError, ActorUnavailableError, RayActorError, ReplicaUnavailableError)


def _words(value: object) -> object:
    return value.split() if isinstance(value, str) else value


#: `serve run` has texts only: there, words with spaces between them.
Words = Annotated[list[str], BeforeValidator(_words)]


class Setup(BaseModel):
    """What replicas are built of; the names are those of the command line's options.

    Attributes:
        tokens: by default those of JITEXPORT_TOKEN in the environment of the replicas.
        limits: of `jitexport.serve.settings.Limits`, by name.
    """

    model_config = ConfigDict(extra="forbid")

    loras: str | None = None
    memory: int | None = None
    device: str | None = None
    threads: int | None = None
    tokens: Words = []
    public_url: str | None = None
    trust: bool = False
    limits: dict[str, float] = {}


class Arguments(Setup):
    """What the application is built of.

    Attributes:
        bundles: NAME=FOLDER or FOLDER each, in a folder that all nodes see, or with `trust` OWNER/NAME on a hub. Every
            replica checks every digest.
        replicas: of `Engines`; "LEAST-MOST" follows the load.
        cpus, gpus: that Ray reserves for each of them.
    """

    bundles: Annotated[Words, Field(min_length=1)]
    replicas: Annotated[str, Field(coerce_numbers_to_str=True, pattern=REPLICAS)] = "1"
    cpus: float = 1
    gpus: float = 0

    def catalog(self) -> Catalog:
        """What is served."""
        return Catalog.of(self.bundles, self.loras, trust=self.trust)

    def scaling(self, batch: int) -> dict[str, Any]:
        """The options of Ray's for the number of replicas."""
        least, _, most = self.replicas.partition("-")
        if not most:
            return {"num_replicas": int(least)}
        bounds = {"min_replicas": int(least), "max_replicas": int(most)}
        return {"autoscaling_config": bounds | {"target_ongoing_requests": batch}}


class Engines:
    """A replica that makes images.

    Raises:
        JitExportError: a bundle cannot be loaded; Ray then keeps the replica out of service.
    """

    def __init__(self, setup: Mapping[str, Any]) -> None:
        self._setup = Setup(**setup)
        self._engine: Engine | None = None

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Load what the replica begins with; later, bundles that have moved or changed, each beside the old one.

        Args:
            user_config: {"bundles": [...]}, as in `Arguments`. What cannot be loaded leaves the old one in its place.

        Raises:
            JitExportError: at the beginning, a bundle that cannot be loaded.
        """
        setup = self._setup
        if self._engine is None:
            catalog = Catalog.of(user_config["bundles"], setup.loras, trust=setup.trust)
            await self._start(catalog)
            return
        try:
            catalog = Catalog.of(user_config["bundles"], setup.loras, trust=setup.trust)
        except JitExportError as error:
            logger.error("no update, what is served stays: %s", error)
            return
        paths = {entry.name: entry.path for entry in catalog}
        if paths.keys() != (names := {entry.name for entry in self._engine.catalog}):
            logger.error("an update has other names, %s, than what is served, %s, which stays", [*paths], sorted(names))
            return
        await asyncio.to_thread(self._engine.update, paths)

    async def _start(self, catalog: Catalog) -> None:
        setup, metrics = self._setup, RayMetrics()
        store = Store(catalog, metrics, budget=setup.memory, device=setup.device, threads=setup.threads)
        # Ray's queue is the bounded one: of what it gives a replica, nothing is refused.
        limits = Limits.of(setup.limits | {"queue": _UNBOUNDED})
        engine = Engine(catalog, store, limits, metrics)
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def started() -> None:
            loop.call_soon_threadsafe(done.set)

        engine.start(started)
        await done.wait()
        if engine.failure is not None:
            raise engine.failure
        self._engine = engine

    async def events(self, jobs: Sequence[Job]) -> AsyncGenerator[tuple[int, Event], None]:
        """See `Engine.events`; a refusal is an event too."""
        assert self._engine is not None  # Ray asks for nothing before `reconfigure`
        try:
            async for item in self._engine.events(jobs):
                yield item
        except ApiError as error:
            yield 0, Failed(error)

    async def status(self) -> list[tuple[str, str, str, bool]]:
        """Of each bundle: name, folder, manifest, and whether it is loaded."""
        engine = self._engine
        assert engine is not None  # Ray asks for nothing before `reconfigure`
        return [
            (e.name, str(e.path), e.manifest.to_json(), engine.store.is_loaded(e.name)) for e in engine.catalog
        ]

    async def check_health(self) -> None:
        """Asked by Ray now and then.

        Raises:
            RuntimeError: the computing thread has ended.
        """
        if self._engine is not None and not self._engine.is_alive:
            raise RuntimeError("the computing thread has ended")

    def __del__(self) -> None:
        if self._engine is not None:
            self._engine.give_up()


class RayMaker:
    """The replicas of `Engines`, as the application sees them."""

    def __init__(self, engines: DeploymentHandle[Any], catalog: Catalog, limits: Limits) -> None:
        self._engines = engines
        self._catalog = catalog
        self._limits = limits
        self._loaded: frozenset[str] = frozenset()
        self._ready = False

    async def follow(self) -> None:
        """Keep up with what the replicas serve: after an update, another manifest under the same name."""
        while True:
            try:
                status = await asyncio.wait_for(self._engines.status.remote(), 10)
                for name, path, manifest, _ in status:
                    if manifest != self._catalog[name].manifest.to_json():
                        self._catalog.replace(_entry(name, path, manifest))
                self._loaded = frozenset(name for name, _, _, loaded in status if loaded)
                self._ready = True
            except Exception as error:  # no replica for a while; Ray brings one
                logger.warning("the replicas do not say what they serve: %r", error)
                self._ready = False
            await asyncio.sleep(LOOK)

    async def is_ready(self) -> bool:
        """Whether a replica answers: each has made an image before Ray lets it."""
        return self._ready

    def is_loaded(self, name: str) -> bool:
        """Whether a replica, the last one that was asked, has a bundle in memory."""
        return name in self._loaded

    async def events(self, jobs: Sequence[Job]) -> AsyncGenerator[tuple[int, Event], None]:
        """See `Engine.events`. Where a replica dies, another one makes what is left.

        Raises:
            ApiError: 503, no room, or no replica; 504, out of time.
        """
        left, told = dict(enumerate(jobs)), _Told()
        until = asyncio.get_running_loop().time() + self._limits.request
        for attempt in range(ATTEMPTS):
            numbers = list(left)
            stream: Any = self._engines.options(stream=True).events.remote([left[i] for i in numbers])
            try:
                while left:
                    wait = until - asyncio.get_running_loop().time()
                    i, event = await asyncio.wait_for(anext(stream), wait)
                    if isinstance(event, Failed) and not told.accepted:
                        raise event.error
                    number = 0 if isinstance(event, Accepted) else numbers[i]
                    if isinstance(event, Finished | Failed):
                        del left[number]
                    if told.first(number, event):
                        yield number, event
                return
            except TimeoutError:
                raise errors.timed_out(self._limits.request) from None
            except BackPressureError:
                raise errors.overloaded(1, self._limits.queue) from None
            except (*_DEAD, StopAsyncIteration) as error:
                logger.warning("attempt %d: a replica died, %d images left: %r", attempt + 1, len(left), error)
                await asyncio.sleep(0.2 * 2**attempt)
            finally:
                with suppress(RayServeException, RayError):  # a request that was never given to a replica
                    stream.cancel()
        after = {"Retry-After": "5"}
        raise ApiError(503, "replicas died one after the other; try again", "replica_died", headers=after)


class _Told:
    """What a client has been told, so that a second replica's events begin where the first one's ended."""

    def __init__(self) -> None:
        self.accepted = False
        self._seen: set[tuple[object, ...]] = set()

    def first(self, number: int, event: Event) -> bool:
        """Whether an event is new."""
        kind = type(event).__name__
        place = event.index if isinstance(event, Partial) else event.step if isinstance(event, Step) else 0
        key: tuple[object, ...] = (number, kind, place)
        if isinstance(event, Accepted):
            key, self.accepted = (kind,), True
        new = key not in self._seen
        self._seen.add(key)
        return new


def _entry(name: str, path: str, manifest: str) -> Entry:
    return Entry(name, Path(path), Manifest.model_validate_json(manifest))


@serve.ingress()
class Api:
    """A replica that speaks HTTP."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, engines: DeploymentHandle[Any], setup: Mapping[str, Any]) -> None:
        self._setup = Setup(**setup)
        entries = [_entry(*told[:3]) for told in await engines.status.remote()]  # when the first of them is ready
        self._catalog = Catalog(entries, Path(self._setup.loras) if self._setup.loras else None)
        self._limits = Limits.of(self._setup.limits)
        self._maker = RayMaker(engines, self._catalog, self._limits)
        self._following: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> Any:
        """The application; Ray asks for it in the replica."""
        self._following = asyncio.get_running_loop().create_task(self._maker.follow())
        return create_app(
            self._maker, self._catalog, self._limits, RayMetrics(), tokens=self._setup.tokens or read_tokens(None),
            public_url=self._setup.public_url,
        )


def build(arguments: Arguments) -> serve.Application:
    """The application for `serve run` and `serve deploy`.

    Updates without a failed request: deploy again with other folders in `bundles`. Ray starts a new replica before an
    old one goes, which takes the resources of one more; where new ones fail, the old ones stay. In a configuration
    file, another `user_config` of `Engines` has replicas load new bundles beside the old ones, in place.
    """
    catalog, limits = arguments.catalog(), Limits.of(arguments.limits)  # what is wrong with them is said here
    batch = max(entry.manifest.batch for entry in catalog)
    setup = arguments.model_dump(include=set(Setup.model_fields))
    # `deployment` makes a decorator where it is given no class: its annotation says so of all calls.
    deployment: Any = serve.deployment
    engines = deployment(Engines, name="Engines").options(
        max_ongoing_requests=2 * batch,  # one batch runs, the next one gathers
        max_queued_requests=int(limits.queue), health_check_period_s=5, graceful_shutdown_timeout_s=limits.drain,
        user_config={"bundles": arguments.bundles}, max_surge_percent=1, max_constructor_retry_count=_RETRIES,
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": arguments.gpus}, **arguments.scaling(batch),
    )  # fmt: skip
    api = deployment(Api, name="Api").options(
        max_ongoing_requests=int(limits.connections), graceful_shutdown_timeout_s=limits.drain,
        max_surge_percent=100, ray_actor_options={"num_cpus": 0},
    )  # fmt: skip
    return api.bind(engines.bind(setup), setup)
