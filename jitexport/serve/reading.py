"""A request's body, within its limits, and whether its client is still there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from jitexport.serve.errors import ApiError
from jitexport.serve.settings import Limits

Item = TypeVar("Item")
_CLOSE = {"Connection": "close"}


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def read_body(request: Request, limits: Limits) -> bytes:
    """The bytes of a JSON body.

    Raises:
        ApiError: 415, another type (which a form of a foreign page could send); 413, too large; 408, too slow.
        ClientGone: the client went away meanwhile.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" or request.headers.get("content-encoding", "identity") != "identity":
        raise ApiError(
            415, f"the body is {kind[:60]!a}; application/json without compression is expected",
            "unsupported_media_type", headers=_CLOSE,
        )
    too_large = ApiError(413, f"a body has at most {limits.body} bytes here", "body_too_large", headers=_CLOSE)
    if int(request.headers.get("content-length", 0)) > limits.body:  # h11 has refused what is no number
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.reading):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.body:
                    raise too_large
    except TimeoutError:
        raise ApiError(
            408, f"the body did not arrive within {limits.reading:g} s", "too_slow", headers=_CLOSE
        ) from None
    except ClientDisconnect:
        raise ClientGone from None
    return bytes(body)


async def attended(
    request: Request, events: AsyncIterator[Item], every: float | None = None
) -> AsyncGenerator[Item | None, None]:
    """The items, as long as the client is there; None where none has come for `every` seconds.

    Raises:
        ClientGone: it went away.
    """
    gone = asyncio.ensure_future(_gone(request))
    following: asyncio.Future[Item] | None = None
    try:
        while True:
            following = following or asyncio.ensure_future(anext(events))
            both: set[asyncio.Future[Any]] = {following, gone}
            await asyncio.wait(both, timeout=every, return_when=asyncio.FIRST_COMPLETED)
            if following.done():
                try:
                    item = following.result()
                except StopAsyncIteration:
                    return
                following = None
                yield item
            elif gone.done():
                raise ClientGone
            else:
                yield None
    finally:
        for task in (gone, following):
            if task is not None:
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
