"""A client that does not take what it asked for."""

import asyncio
import socket
import threading

import pytest
import uvicorn

from jitexport.serve.protocol import timed_protocol
from jitexport.serve.settings import Limits


@pytest.fixture
def server():
    """(port, what became of its answers): a server that writes without end, and gives a client a second to read."""
    ends = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        gone = asyncio.create_task(receive())
        await receive()  # the request's end; what follows is the client's going
        try:
            while not gone.done() or gone.result()["type"] != "http.disconnect":
                await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
                if gone.done() and gone.result()["type"] != "http.disconnect":
                    gone = asyncio.create_task(receive())
        finally:
            ends.append(True)

    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app, http=timed_protocol(Limits(reading=1, sending=1)), ws="none", lifespan="off", log_config=None
    )
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    yield listener.getsockname()[1], ends
    running.should_exit = running.force_exit = True
    thread.join()
    listener.close()


def connect(port):
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(30)
    connection.connect(("127.0.0.1", port))
    return connection


def test_one_that_reads_nothing_is_cut_off(server):
    port, ends = server
    with connect(port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        for _ in range(200):
            if ends:
                break
            threading.Event().wait(0.05)
        assert ends
        with pytest.raises(ConnectionError):
            while connection.recv(65536):
                pass
            raise ConnectionError  # closed in order, which is as good


def test_one_that_reads_is_not(server):
    port, ends = server
    with connect(port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        read = 0
        while read < 50_000_000:
            read += len(connection.recv(1 << 20))
        assert not ends


def test_one_that_says_nothing_is_cut_off_and_one_that_waits_between_requests_has_its_own_time(server):
    port, _ = server
    with connect(port) as connection:
        assert connection.recv(1) == b""
