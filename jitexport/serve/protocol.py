"""uvicorn's HTTP protocol with two time limits that it lacks: for headers to arrive, and for answers to be taken."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from jitexport.serve.settings import Limits


def timed_protocol(limits: Limits) -> type[H11Protocol]:
    """The protocol of a server with these limits."""

    class TimedProtocol(H11Protocol):
        """Ends connections whose client sends headers, or takes what was written, more slowly than it may."""

        _headers: asyncio.TimerHandle | None = None
        _writing: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
            super().connection_made(transport)
            self._headers = self.loop.call_later(limits.reading, self._too_slow)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            waits = self.conn.their_state is h11.IDLE and self.cycle is not None and self.cycle.response_complete
            if self.conn.their_state is not h11.IDLE:
                self._headers = _stop(self._headers)
            elif waits and self._headers is None:  # the beginning of a further request
                self._headers = self.loop.call_later(limits.reading, self._too_slow)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._writing = _stop(self._writing) or self.loop.call_later(limits.sending, self._too_slow)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._writing = _stop(self._writing)

        def connection_lost(self, exc: Exception | None) -> None:
            self._headers, self._writing = _stop(self._headers), _stop(self._writing)
            super().connection_lost(exc)

        def _too_slow(self) -> None:
            self.logger.info("a connection ends: its client is too slow")
            self.transport.abort()

    return TimedProtocol


def _stop(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """What there is then: none."""
    if timer is not None:
        timer.cancel()
    return None
