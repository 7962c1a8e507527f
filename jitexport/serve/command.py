"""`jitexport serve`: what the command line hands over."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from jitexport.console import echo
from jitexport.errors import InputError, MissingDependencyError
from jitexport.serve.settings import Limits, read_tokens


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

    def listening(url: str) -> None:
        echo(json.dumps({"url": url, "bundles": [entry.name for entry in catalog]}) if as_json else url)

    from jitexport.serve.catalog import Catalog
    from jitexport.serve.server import serve

    catalog = Catalog.of(bundles, loras, trust=trust)
    serve(
        catalog, limits, host=host, port=port, tokens=tokens, public_url=public_url,
        memory=None if memory is None else round(memory * 1e9), device=device, threads=threads, listening=listening,
    )  # fmt: skip
