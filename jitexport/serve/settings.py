"""How a server is set up."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jitexport.errors import InputError

TOKEN_VARIABLE = "JITEXPORT_TOKEN"
#: A number of replicas, or LEAST-MOST.
REPLICAS = r"^[1-9]\d{0,3}(-[1-9]\d{0,3})?$"


@dataclass(frozen=True)
class Limits:
    """What a server takes, and for how long.

    Attributes:
        prompt: characters of a prompt.
        n: images of a request.
        body: bytes of a request.
        queue: images that wait, over all bundles.
        connections: at once.
        request: seconds from a request's arrival to its last byte.
        reading: seconds for a request to arrive whole, its headers and then its body.
        sending: seconds for a client to take what was written to it.
        idle: seconds that a connection stays open between requests. Longer than clients keep theirs (httpx 5 s, many
            proxies 60 s): who closes first must be the one who sends, or a request meets a closing connection.
        drain: seconds that a stopping server gives the work it has taken.
        batch_wait: seconds that an image waits for others to be made with, where nothing else runs.
        url_seconds, url_bytes: for how long images stay at their addresses, and of what size in all.
    """

    prompt: int = 4000
    n: int = 10
    body: int = 64 * 1024
    queue: int = 64
    connections: int = 512
    request: float = 600.0
    reading: float = 10.0
    sending: float = 60.0
    idle: int = 75
    drain: float = 60.0
    batch_wait: float = 0.005
    url_seconds: float = 3600.0
    url_bytes: int = 256 * 1024 * 1024

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Limits:
        """From values by name, as they come from a configuration file."""
        return cls(**values)

    def __post_init__(self) -> None:
        if wrong := [name for name, value in vars(self).items() if value < (0 if name == "batch_wait" else 1)]:
            raise InputError("a limit must be at least 1", found=", ".join(f"{n}={getattr(self, n)}" for n in wrong))


def check_replicas(text: str) -> None:
    """Refuse what is no number of replicas, nor LEAST-MOST.

    Raises:
        InputError: it is neither.
    """
    if not re.fullmatch(REPLICAS, text):
        raise InputError("--ray takes a number of replicas", found=text, expected="2, or 1-8")


def read_tokens(file: Path | None, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The bearer tokens that open the server: a line each of a file, else the environment's; none for no check.

    Raises:
        InputError: the file cannot be read, or has no token.
    """
    if file is None:
        return tuple(environment.get(TOKEN_VARIABLE, "").split())
    try:
        tokens = tuple(file.read_text(encoding="ascii").split())
    except (OSError, UnicodeError) as error:
        raise InputError("the file of tokens cannot be read", found=error, remedy="--token-file FILE") from error
    if not tokens:
        raise InputError("the file of tokens is empty", found=str(file), expected="a token on each line")
    return tokens
