"""Images at addresses that cannot be guessed, in memory, for a while."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass

from jitexport.serve.settings import Limits


@dataclass(frozen=True)
class _Kept:
    data: bytes
    media_type: str
    until: float


class Addresses:
    """What `response_format: url` gives. Names are drawn here; no file is ever read or written."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._kept: OrderedDict[str, _Kept] = OrderedDict()  # the oldest first, which is also the first to expire
        self._bytes = 0

    def put(self, data: bytes, form: str) -> str:
        """Keep an image; its name."""
        name = f"{secrets.token_urlsafe(24)}.{form}"
        self._kept[name] = _Kept(data, f"image/{form}", time.monotonic() + self._limits.url_seconds)
        self._bytes += len(data)
        self._expire()
        return name

    def get(self, name: str) -> tuple[bytes, str] | None:
        """An image and its media type; None where it never was, or is no more."""
        self._expire()
        kept = self._kept.get(name)
        return None if kept is None else (kept.data, kept.media_type)

    def _expire(self) -> None:
        now = time.monotonic()
        while self._kept and (self._bytes > self._limits.url_bytes or next(iter(self._kept.values())).until < now):
            _, kept = self._kept.popitem(last=False)
            self._bytes -= len(kept.data)
