"""The process that listens: until a signal, then until what was begun is answered."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from eim_jax.config import ConfigError
from eim_jax.serving.app import make_app
from eim_jax.serving.service import Service
from eim_jax.utils.console import console

_LOOK = 0.05  # seconds between two looks at whether all requests are answered
_SLOW = 5  # seconds that clients have to read what was written, once all is answered
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Server(uvicorn.Server):
    """uvicorn's server that takes signals itself: the first lets requests end, the second ends at once.

    Args:
      service: whose arms answer.
      listening: the bound socket.
    """

    def __init__(self, service: Service, listening: socket.socket) -> None:
        self.gate, self._service, self._socket = make_app(service), service, listening
        # uvicorn's own refusal of what is no HTTP stays; a log line a request would hide what matters.
        config = uvicorn.Config(
            self.gate,
            loop="asyncio",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_SLOW,
        )
        super().__init__(config)
        self._ending: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to `run_until_stopped`."""
        yield

    def drain(self) -> None:
        """Refuses new requests, and ends once those under way are answered; a second call ends at once."""
        if self._ending is not None:
            self.should_exit = self.force_exit = True
            return
        self.gate.draining = True
        count = self.gate.active
        console.print(f"stopping: {count} requests under way are answered, new ones refused; again: at once")
        self._ending = asyncio.get_running_loop().create_task(self._end_when_answered())

    async def _end_when_answered(self) -> None:
        while self.gate.active:
            await asyncio.sleep(_LOOK)
        self.should_exit = True

    async def run_until_stopped(self, *, signals: bool = True) -> None:
        """Serves until `drain`, or SIGTERM or SIGINT.

        Args:
          signals: takes the two signals; only the main thread can.
        """
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT) if signals else ()
        for number in numbers:
            loop.add_signal_handler(number, self.drain)
        try:
            await self.serve(sockets=[self._socket])
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket bound to an address, before anything expensive is loaded.

    Args:
      host: a name or an address.
      port: 0 takes a free one.

    Raises:
      ConfigError: it cannot be had; the message names the flag.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise ConfigError(f"--host={host} --port={port}: {error.strerror or error}: choose another --port") from error
    return listening


def serve(service: Service, listening: socket.socket, say: Callable[[str], None]) -> bool:
    """Serves until a signal.

    Args:
      service: whose arms answer.
      listening: from `listen`.
      say: is told the address.

    Returns:
      whether all that was begun is answered; False: a second signal ended it at once.
    """
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    server = Server(service, listening)
    listening.listen()  # from now on nobody is turned away
    say(f"http://{shown}:{port}")
    asyncio.run(server.run_until_stopped())
    return not server.force_exit
