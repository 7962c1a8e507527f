"""`jitexport serve --ray`: the application on the cluster that RAY_ADDRESS names, or on one that is started here."""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
from collections.abc import Callable

import ray
from ray import serve

from jitexport.errors import BackendError
from jitexport.serve.ray_app import Arguments, build

NAME = "jitexport"


def run(arguments: Arguments, *, host: str, port: int, listening: Callable[[str], None]) -> None:
    """Serve until a signal ends it.

    Args:
        port: 0 takes a free one.
        listening: told the address once requests are answered.

    Raises:
        JitExportError: a bundle cannot be served.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone unless it is asked for
    application = build(arguments)
    port = port or _free(host)
    if address := os.environ.get("RAY_ADDRESS"):
        ray.init(address=address, log_to_driver=False)
    else:  # room for one replica more, as an update needs it: Ray counts processors, it does not bind to them
        most = int(arguments.replicas.rpartition("-")[2])
        processors = max(os.cpu_count() or 1, math.ceil((most + 1) * arguments.cpus))
        ray.init(include_dashboard=False, log_to_driver=False, num_cpus=processors)
    try:
        serve.start(http_options={"host": host, "port": port})
        try:
            serve.run(application, name=NAME, route_prefix="/")
        except RuntimeError as error:  # Ray's own form of whatever a replica raised
            raise BackendError(
                "Ray cannot serve this", found=error, remedy="see the replicas' logs, in Ray's folder of logs"
            ) from error
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):  # Ray has put its own in the place of what was there
            signal.signal(number, lambda *_: stop.set())
        listening(f"http://{host}:{port}")
        stop.wait()
        serve.shutdown()
    finally:
        ray.shutdown()


def _free(host: str) -> int:
    """A port that nobody listens at now."""
    with socket.create_server((host, 0)) as found:
        return found.getsockname()[1]
