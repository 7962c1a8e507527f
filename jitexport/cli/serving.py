"""Bundles behind an address."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from jitexport.cli.options import Json
from jitexport.console import echo
from jitexport.errors import InputError, needed
from jitexport.serve.settings import Limits, check_replicas, read_tokens


@dataclass(frozen=True)
class Server:
    """Where a server listens, what it serves beside the bundles, what it takes, and what it runs on."""

    host: Annotated[str, typer.Option(help="Address to listen at; by default only this machine can reach it.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000
    loras: Annotated[Path | None, typer.Option(help="Folder of adapters, NAME.safetensors each.")] = None
    memory: Annotated[float | None, typer.Option(min=0, help="GB of bundles that are loaded at once.")] = None
    token_file: Annotated[
        Path | None, typer.Option(help="Bearer tokens, one a line; by default JITEXPORT_TOKEN of the environment.")
    ] = None
    public_url: Annotated[str | None, typer.Option(help="The server's address as clients see it.")] = None
    queue: Annotated[int, typer.Option(min=1, help="Images that may wait.")] = Limits.queue
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that a request may take.")] = 600
    drain: Annotated[float, typer.Option(min=1, help="Seconds for what was taken when the server stops.")] = 60
    batch_wait: Annotated[float, typer.Option(min=0, help="Milliseconds that an image waits for others.")] = 5
    max_images: Annotated[int, typer.Option(min=1, help="Images of a request.")] = Limits.n
    max_prompt: Annotated[int, typer.Option(min=1, help="Characters of a prompt.")] = Limits.prompt
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = Limits.body
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the bundles' own by default.")] = None
    threads: Annotated[int | None, typer.Option(min=1, help="That an image computes on, on a CPU.")] = None
    trust: Annotated[bool, typer.Option("--trust", help="FOLDER may be OWNER/NAME on a hub.")] = False
    ray: Annotated[
        str | None, typer.Option(help="Serve on Ray: a number of replicas, or LEAST-MOST that follow the load.")
    ] = None

    def limits(self) -> Limits:
        """What the server takes, and for how long.

        Raises:
            InputError: one is too low.
        """
        return Limits(
            prompt=self.max_prompt, n=self.max_images, body=self.max_body, queue=self.queue, request=self.timeout,
            drain=self.drain, batch_wait=self.batch_wait / 1000,
        )  # fmt: skip

    @property
    def budget(self) -> int | None:
        """Bytes of bundles that are loaded at once."""
        return None if self.memory is None else round(self.memory * 1e9)


def serve(
    bundles: Annotated[list[str], typer.Argument(metavar="BUNDLE", help="FOLDER or NAME=FOLDER each.")],
    server: Server = Server(),
    as_json: Json = False,
) -> None:
    """Serve bundles over HTTP, as OpenAI's images API."""
    limits = server.limits()
    for name in ("uvicorn", "jitexport"):
        logging.getLogger(name).setLevel(logging.INFO)
    if server.public_url is not None and not server.public_url.startswith(("http://", "https://")):
        raise InputError("a public URL begins with http:// or https://", found=server.public_url)
    with needed("serving needs libraries that are not installed", "serve"):
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    tokens = read_tokens(server.token_file)
    run = _serve_here if server.ray is None else _serve_on_ray
    run(bundles, server, limits, tokens, lambda url: echo(json.dumps({"url": url}) if as_json else url))


def _serve_here(
    bundles: list[str], server: Server, limits: Limits, tokens: tuple[str, ...], listening: Callable[[str], None]
) -> None:
    """In this process."""
    from jitexport.serve.catalog import Catalog
    from jitexport.serve.server import serve as run

    run(
        Catalog.of(bundles, server.loras, trust=server.trust), limits, host=server.host, port=server.port,
        tokens=tokens, public_url=server.public_url, memory=server.budget, device=server.device,
        threads=server.threads, listening=listening,
    )  # fmt: skip


def _serve_on_ray(
    bundles: list[str], server: Server, limits: Limits, tokens: tuple[str, ...], listening: Callable[[str], None]
) -> None:
    """On a cluster."""
    assert server.ray is not None  # else it is not asked for
    check_replicas(server.ray)
    with needed("serving on Ray needs a library that is not installed", "ray"):
        from jitexport.serve import ray_app, ray_local
    arguments = ray_app.Arguments(
        bundles=bundles if server.trust else [_absolute(bundle) for bundle in bundles],  # replicas run elsewhere
        loras=str(server.loras.absolute()) if server.loras else None, trust=server.trust, limits=asdict(limits),
        tokens=list(tokens), public_url=server.public_url, memory=server.budget, replicas=server.ray,
        device=server.device, gpus=float(server.device is not None and server.device.startswith("cuda")),
        threads=server.threads, cpus=server.threads or 1,
    )  # fmt: skip
    ray_local.run(arguments, host=server.host, port=server.port, listening=listening)


def _absolute(bundle: str) -> str:
    name, _, path = bundle.rpartition("=")
    return f"{name or Path(path).resolve().name}={Path(path).absolute()}"
