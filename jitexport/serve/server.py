"""One process that serves: a socket, uvicorn, signals."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import uvicorn

from jitexport.errors import InputError
from jitexport.serve.app import create_app
from jitexport.serve.catalog import Catalog
from jitexport.serve.engine import Engine
from jitexport.serve.jobs import Event, Job
from jitexport.serve.metrics import Metrics
from jitexport.serve.protocol import timed_protocol
from jitexport.serve.settings import Limits
from jitexport.serve.store import Store

logger = logging.getLogger(__name__)


class LocalMaker:
    """The engine of this process, as the application sees it."""

    def __init__(self, engine: Engine, stopping: Callable[[], bool] = lambda: False) -> None:
        self._engine = engine
        self._stopping = stopping

    def events(self, jobs: Sequence[Job]) -> AsyncGenerator[tuple[int, Event], None]:
        """See `Engine.events`."""
        return self._engine.events(jobs)

    async def is_ready(self) -> bool:
        """See `Engine.ready`."""
        return self._engine.ready and not self._stopping()

    def is_loaded(self, name: str) -> bool:
        """See `Store.is_loaded`."""
        return self._engine.store.is_loaded(name)


class _Server(uvicorn.Server):
    """uvicorn's server with signals of our own: it ends with 0 after draining, and SIGHUP updates."""

    def __init__(self, config: uvicorn.Config, update: Callable[[], object]) -> None:
        super().__init__(config)
        self._update = update

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT drain, a second one does not wait; SIGHUP updates. What was ignored stays ignored."""
        handlers = {signal.SIGTERM: self.handle_exit, signal.SIGINT: self.handle_exit, signal.SIGHUP: self._hang_up}
        handlers = {number: handler for number, handler in handlers.items() if not _ignored(number)}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True

    def _hang_up(self, sig: int, frame: FrameType | None) -> None:
        threading.Thread(target=self._update, name="update", daemon=True).start()


def _ignored(number: int) -> bool:
    return signal.getsignal(number) == signal.SIG_IGN


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
        InputError: it cannot.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, OverflowError, UnicodeError) as error:
        raise InputError(
            f"cannot listen at {host}, port {port}", found=error, remedy="--host and --port; --port 0 takes a free one"
        ) from error


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(
    catalog: Catalog, limits: Limits, *, host: str = "127.0.0.1", port: int = 8000, tokens: Sequence[str] = (),
    public_url: str | None = None, memory: int | None = None, device: str | None = None, threads: int | None = None,
    listening: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve until a signal ends it.

    Args:
        memory: see `Store`.
        device, threads: as `jitexport.load` takes them.
        listening: told the server's address when connections are taken, which is before it is ready.

    Raises:
        InputError: it cannot listen there, or a bundle does not fit.
        JitExportError: a bundle cannot be loaded.
    """
    metrics = Metrics()
    store = Store(catalog, metrics, budget=memory, device=device, threads=threads)
    engine = Engine(catalog, store, limits, metrics)
    server: _Server | None = None
    maker = LocalMaker(engine, lambda: server is not None and server.should_exit)
    app = create_app(maker, catalog, limits, metrics, tokens=tokens, public_url=public_url)
    config = uvicorn.Config(
        app, http=timed_protocol(limits), ws="none", loop="asyncio", lifespan="off", log_config=None, access_log=False,
        server_header=False, limit_concurrency=limits.connections, timeout_graceful_shutdown=round(limits.drain),
        timeout_keep_alive=limits.idle,
    )
    server = _Server(config, engine.update)
    with listen(host, port) as listener:
        if not tokens and not is_loopback(host):
            logger.warning("no token: whoever reaches %s can make images; --token-file FILE", host)
        name = f"[{host}]" if ":" in host else host
        listening(f"http://{name}:{listener.getsockname()[1]}")
        _run(server, engine, listener)
    if engine.failure is not None:
        raise engine.failure


def _run(server: _Server, engine: Engine, listener: socket.socket) -> None:
    def when_ready() -> None:
        if engine.failure is not None:
            server.should_exit = True
        else:
            logger.info("ready")

    engine.start(when_ready)
    try:
        asyncio.run(server.serve(sockets=[listener]))
    finally:
        # Requests have been answered or given up by now; what still computes is nobody's.
        engine.give_up()
        engine.stop()
