"""`jitexport serve`: what the command line hands over."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jitexport.console import echo
from jitexport.errors import InputError, MissingDependencyError
from jitexport.serve.settings import REPLICAS, Limits, read_tokens


def run(
    bundles: Sequence[str], limits: Limits, *, host: str, port: int, loras: Path | None, memory: float | None,
    token_file: Path | None, public_url: str | None, device: str | None, threads: int | None, trust: bool,
    replicas: str | None, as_json: bool,
) -> None:
    """Serve bundles until a signal ends it.

    Args:
        memory: GB of loaded bundles.
        replicas: on a Ray cluster, a number of them, or LEAST-MOST; None for this process alone.

    Raises:
        InputError: arguments that do not fit.
        MissingDependencyError: an extra is not installed.
        JitExportError: a bundle cannot be served.
    """
    for name in ("uvicorn", "jitexport"):
        logging.getLogger(name).setLevel(logging.INFO)
    if public_url is not None and not public_url.startswith(("http://", "https://")):
        raise InputError("a public URL begins with http:// or https://", found=public_url)
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "serving needs libraries that are not installed", found=error, remedy="pip install 'jitexport[serve]'"
        ) from error
    tokens = read_tokens(token_file)
    budget = None if memory is None else round(memory * 1e9)

    def listening(url: str) -> None:
        echo(json.dumps({"url": url}) if as_json else url)

    if replicas is not None:
        _run_on_ray(
            listening, host=host, port=port, bundles=list(bundles), loras=loras and str(loras.absolute()),
            replicas=replicas, gpus=float(device is not None and device.startswith("cuda")), cpus=threads or 1,
            memory=budget, device=device, threads=threads, tokens=list(tokens), public_url=public_url, trust=trust,
            limits=asdict(limits),
        )  # fmt: skip
        return
    from jitexport.serve.catalog import Catalog
    from jitexport.serve.server import serve

    serve(
        Catalog.of(bundles, loras, trust=trust), limits, host=host, port=port, tokens=tokens, public_url=public_url,
        memory=budget, device=device, threads=threads, listening=listening,
    )  # fmt: skip


def _run_on_ray(listening: Callable[[str], None], *, host: str, port: int, **arguments: Any) -> None:
    if not re.fullmatch(REPLICAS, arguments["replicas"]):
        raise InputError("--ray takes a number of replicas", found=arguments["replicas"], expected="2, or 1-8")
    try:
        from jitexport.serve import ray_app, ray_local
    except ImportError as error:
        raise MissingDependencyError(
            "serving on Ray needs a library that is not installed", found=error, remedy="pip install 'jitexport[ray]'"
        ) from error
    if not arguments["trust"]:  # replicas run elsewhere
        arguments["bundles"] = [_absolute(bundle) for bundle in arguments["bundles"]]
    ray_local.run(ray_app.Arguments(**arguments), host=host, port=port, listening=listening)


def _absolute(bundle: str) -> str:
    name, _, path = bundle.rpartition("=")
    return f"{name or Path(path).resolve().name}={Path(path).absolute()}"
