"""A model behind a real server on loopback."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ptp.server.api import Service
from ptp.server.run import Server, bind

NAME = "tiny"

Alone = Callable[..., tuple[list[int], str]]


@contextmanager
def running(service: Service) -> Iterator[str]:
    """A server of the service in a thread, on a free port; yields its address."""
    with bind("127.0.0.1", 0) as listening:
        server = Server(service, lambda _: None)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Until it holds; fails if it never does."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)
