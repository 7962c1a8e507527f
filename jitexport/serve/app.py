"""The application: routes of the images API, of health and metrics, and the page."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from importlib import resources
from typing import Protocol

from fastapi import FastAPI, Request
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from jitexport._version import __version__
from jitexport.serve import answers, schema
from jitexport.serve.addresses import Addresses
from jitexport.serve.catalog import Catalog, Entry
from jitexport.serve.errors import ApiError, of_failure
from jitexport.serve.jobs import Accepted, Event, Failed, Finished, Job
from jitexport.serve.metrics import Metrics
from jitexport.serve.reading import ClientGone, attended, read_body
from jitexport.serve.settings import Limits

logger = logging.getLogger(__name__)

FILES = "/v1/images/files"
#: Without a token: what is asked of every server, the page, and images whose address is known.
OPEN = ("/", "/health", "/ready")
#: Seconds after which a silent stream says that it is alive, so that nothing in between closes it.
PING = 15.0
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_GONE = 499  # as nginx counts them; nobody reads the answer


class Maker(Protocol):
    """What makes images: the engine in this process, or one elsewhere."""

    def events(self, jobs: Sequence[Job]) -> AsyncGenerator[tuple[int, Event], None]:
        """See `Engine.events`."""

    async def is_ready(self) -> bool:
        """Whether a real image was made with what is served, and more are taken."""

    def is_loaded(self, name: str) -> bool:
        """Whether a bundle is in memory."""


def create_app(
    maker: Maker, catalog: Catalog, limits: Limits, metrics: Metrics, *, tokens: Sequence[str] = (),
    public_url: str | None = None,
) -> FastAPI:
    """The application.

    Args:
        metrics: shown at /metrics, where they are not read elsewhere.
        tokens: one of them opens the server; none: it is open.
        public_url: what the server's addresses begin with, as clients see it; by default as a request has it.
    """
    app = FastAPI(title="jitexport", version=__version__, docs_url=None, redoc_url=None)
    Images(maker, catalog, limits, metrics, public_url).add_to(app)
    _add_status(app, maker, catalog, metrics)
    app.exception_handler(ApiError)(_answer)
    app.exception_handler(HTTPException)(_answer_of_routes)
    app.add_exception_handler(ClientGone, lambda request, error: Response(status_code=_GONE))
    app.add_exception_handler(Exception, lambda request, error: _answer(request, of_failure(error)))
    app.add_middleware(Guard, tokens=tuple(tokens), metrics=metrics)
    return app


def _answer(request: Request, error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, error.headers)


def _answer_of_routes(request: Request, error: HTTPException) -> Response:
    known = f"this server has POST /v1/images/generations, GET /v1/models, /health, /ready, /metrics; {error.detail}"
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    return _answer(request, ApiError(error.status_code, known, code, headers=dict(error.headers or {})))


class Guard:
    """Bearer tokens, and headers for browsers."""

    def __init__(self, app: ASGIApp, tokens: Sequence[str], metrics: Metrics) -> None:
        self.app = app
        self._tokens = [token.encode() for token in tokens]
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._may_enter(scope):
            await self.app(scope, receive, send)
            return
        self._metrics.refusals.labels("token").inc()
        error = ApiError(
            401, "this server needs a token: Authorization: Bearer TOKEN", "invalid_api_key",
            headers={"WWW-Authenticate": "Bearer", "Connection": "close"},
        )
        await JSONResponse(error.body(), error.status, error.headers)(scope, receive, send)

    def _may_enter(self, scope: Scope) -> bool:
        path = scope["path"]
        if not self._tokens or path in OPEN or path.startswith(f"{FILES}/"):
            return True
        kind, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        given_bytes = given.strip().encode("latin-1")
        matches = [hmac.compare_digest(given_bytes, token) for token in self._tokens]  # all, in the same time
        return kind.lower() == "bearer" and any(matches)


class Images:
    """The routes that make images and hand them out."""

    def __init__(
        self, maker: Maker, catalog: Catalog, limits: Limits, metrics: Metrics, public_url: str | None
    ) -> None:
        self.maker = maker
        self.catalog = catalog
        self.limits = limits
        self.metrics = metrics
        self.public_url = public_url and public_url.rstrip("/")
        self.addresses = Addresses(limits)

    def add_to(self, app: FastAPI) -> None:
        """Put the routes into an application."""
        body = {"content": {"application/json": {"schema": schema.ImageRequest.model_json_schema()}}, "required": True}
        app.post("/v1/images/generations", response_model=None, openapi_extra={"requestBody": body})(self.generate)
        app.get(f"{FILES}/{{name}}", response_model=None)(self.file)

    async def generate(self, request: Request) -> Response:
        """Make images."""
        begun, entry = time.monotonic(), None
        status: int | None = 500
        try:
            asked = schema.parse(await read_body(request, self.limits))
            entry = schema.choose(asked, self.catalog)
            jobs = schema.jobs(asked, entry, list(self.catalog.loras()), self.limits)
            if asked.stream:
                response = await self._stream(request, entry, jobs, begun)
                status = None  # counted at its end
                return response
            address = self._addressed(request) if asked.response_format == "url" else None
            made = await self._all(request, jobs)
            status = 200
            return JSONResponse(answers.images(jobs, made, entry, address), headers={"Cache-Control": "no-store"})
        except ApiError as error:
            status = error.status
            raise
        except ClientGone:
            status = _GONE
            raise
        finally:
            if status is not None:
                self._count(entry, status, begun)

    def _count(self, entry: Entry | None, status: int, begun: float) -> None:
        name, seconds = entry.name if entry else "", time.monotonic() - begun
        logger.info("%s: %d, %.3f s", name or "a request", status, seconds)
        self.metrics.requests.labels(name, str(status)).inc()
        if status == 200:
            self.metrics.request_seconds.labels(name).observe(seconds)
        elif 400 <= status < 500 and status != _GONE:
            self.metrics.refusals.labels("request").inc()

    async def _all(self, request: Request, jobs: Sequence[Job]) -> list[Finished]:
        """The images of all jobs.

        Raises:
            ApiError: one of them failed.
            ClientGone: nobody waits.
        """
        made: dict[int, Finished] = {}
        events = self.maker.events(jobs)
        async with aclosing(events), aclosing(attended(request, events)) as told:
            async for item in told:
                assert item is not None  # without a limit of time there is always one
                i, event = item
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Finished):
                    made[i] = event
        return [made[i] for i in range(len(jobs))]

    async def _stream(self, request: Request, entry: Entry, jobs: Sequence[Job], begun: float) -> Response:
        """Events; a request that is not taken has an ordinary error."""
        events = self.maker.events(jobs)
        accepted = await anext(events)
        assert isinstance(accepted[1], Accepted)
        body = self._told(request, entry, jobs, events, begun)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(body, media_type="text/event-stream", headers=headers)

    async def _told(
        self, request: Request, entry: Entry, jobs: Sequence[Job], events: AsyncGenerator[tuple[int, Event], None],
        begun: float,
    ) -> AsyncIterator[bytes]:
        status = _GONE
        try:
            async with aclosing(events), aclosing(attended(request, events, PING)) as told:
                async for item in told:
                    if item is None:
                        yield b": alive\n\n"
                        continue
                    i, event = item
                    if isinstance(event, Failed):
                        raise event.error
                    if not isinstance(event, Accepted):  # which came before
                        yield answers.event(jobs[i], i, entry, event)
            status = 200
        except ClientGone:
            return
        except Exception as error:
            if not isinstance(error, ApiError):
                logger.exception("a stream failed")
            answer = of_failure(error)
            status = answer.status
            yield answers.error_event(answer)
        finally:
            self._count(entry, status, begun)

    def _addressed(self, request: Request) -> Callable[[bytes, str], str]:
        base = self.public_url or str(request.base_url).rstrip("/")
        return lambda data, form: f"{base}{FILES}/{self.addresses.put(data, form)}"

    async def file(self, name: str) -> Response:
        """An image that was given an address."""
        found = self.addresses.get(name)
        if found is None:
            raise ApiError(404, "no image is at this address, or it is no longer kept", "not_found")
        headers = {"Cache-Control": "private, max-age=3600", "X-Content-Type-Options": "nosniff"}
        return Response(found[0], media_type=found[1], headers=headers)


def _add_status(app: FastAPI, maker: Maker, catalog: Catalog, metrics: Metrics) -> None:
    page = resources.files("jitexport.serve").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/", response_model=None, include_in_schema=False)
    async def show_page() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_POLICY, "Cache-Control": "no-cache"})

    @app.get("/v1/models", response_model=None)
    async def list_models() -> Response:
        """Served bundles."""
        return JSONResponse(answers.models(catalog, maker.is_loaded))

    @app.get("/v1/models/{name}", response_model=None)
    async def get_model(name: str) -> Response:
        """One of them."""
        found = [model for model in answers.models(catalog, maker.is_loaded)["data"] if model["id"] == name]
        if not found:
            raise ApiError(404, "no bundle of this name is served", "model_not_found", "model")
        return JSONResponse(found[0])

    @app.get("/health", response_model=None)
    async def health() -> Response:
        """Alive: the event loop answers."""
        return JSONResponse({"status": "alive"})

    @app.get("/ready", response_model=None)
    async def ready() -> Response:
        """Ready: a real image was made with every bundle that fits into memory."""
        if await maker.is_ready():
            return JSONResponse({"status": "ready"})
        raise ApiError(503, "not ready: bundles are being loaded, or the server stops", "not_ready")

    if metrics.text() is not None:

        @app.get("/metrics", response_model=None)
        async def show_metrics() -> Response:
            """For Prometheus."""
            return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
