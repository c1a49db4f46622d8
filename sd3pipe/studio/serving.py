"""The server: a port that is free, and an end on Ctrl-C that waits for nobody who only watches."""

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable, Generator

import uvicorn
from starlette.types import ASGIApp

from sd3pipe import stopping
from sd3pipe.errors import ParameterError

_TRIES = 100
_GRACE_SECONDS = 2


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket bound to the port, or to the next free one. Raises ParameterError."""
    try:
        family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ParameterError(f"--host {host}: is no address of this machine ({error.strerror})") from error
    for number in range(port, min(port + _TRIES, 65536)):
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, number))
            sock.listen()  # before anybody is told the address; on some systems two may bind, but not listen
            return sock
        except OSError as error:
            sock.close()
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise ParameterError(f"--host {host}: cannot be bound ({error.strerror})") from error
    raise ParameterError(f"--port {port}: no free port among the {_TRIES} from there: name another")


class _Server(uvicorn.Server):
    """Waits without waking until it is told to end."""

    def __init__(self, config: uvicorn.Config, closing: Callable[[], None]) -> None:
        super().__init__(config)
        self._closing = closing
        self._end = asyncio.Event()

    async def main_loop(self) -> None:
        loop = asyncio.get_running_loop()

        def end(signal_number: int) -> None:
            loop.call_soon_threadsafe(self._end.set)

        with stopping.handing_on(end):
            await self._end.wait()
        self._closing()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield  # sd3pipe listens already


def serve(app: ASGIApp, sock: socket.socket, closing: Callable[[], None]) -> None:
    """Serves until it is asked to stop; `closing` is told first, in the loop, so that streams end."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        http="h11",
        ws="none",
        loop="asyncio",
        server_header=False,
        date_header=False,  # which would wake the server each second
        proxy_headers=False,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )
    asyncio.run(_Server(config, closing).serve([sock]))
