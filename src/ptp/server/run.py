"""A server from a decoder: what `ptp serve` runs, and what tests run in a thread."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

import uvicorn
from transformers import PreTrainedTokenizerBase

from ptp.decoding.decoder import Decoder
from ptp.errors import ConfigError
from ptp.server.api import Service, create_app
from ptp.server.bodies import limits_of
from ptp.server.engine import Engine
from ptp.server.metrics import Metrics

GRACE_SECONDS = 20
"""In which texts in the making may end when the server is asked to."""

MAX_CONNECTIONS = 1024
"""Open at a time; more are answered 503 before anything of them is read."""


class Server(uvicorn.Server):
    """uvicorn's, which takes no more requests from the moment it is asked to end."""

    def __init__(self, service: Service, announce: Callable[[str], None]) -> None:
        config = uvicorn.Config(
            create_app(service),
            log_level="warning",
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=GRACE_SECONDS,
            # No header may say that a request came from elsewhere, and none need say what answers it.
            proxy_headers=False,
            server_header=False,
        )
        super().__init__(config)
        self.engine, self.announce = service.engine, announce

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.engine.is_alive and self.engine.num_open:
            self.announce(f"\nending: texts in the making have {GRACE_SECONDS} s; Ctrl-C again ends now")
        self.engine.close()
        super().handle_exit(sig, frame)


def make_service(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    host: str = "127.0.0.1",
    api_key: str = "",
    num_slots: int = 8,
    max_waiting: int = 64,
    max_prompt_tokens: int | None = None,
    max_new_tokens: int = 2048,
) -> Service:
    """Everything the routes need. Raises `ConfigError` if the tokenizer cannot decode piece by piece."""
    if not tokenizer.is_fast:
        raise ConfigError(f"{type(tokenizer).__name__} is no fast tokenizer, which streaming needs")
    metrics = Metrics(name)
    engine = Engine(decoder, tokenizer.backend_tokenizer, metrics, num_slots, max_waiting)
    limits = limits_of(decoder, max_prompt_tokens, max_new_tokens)
    return Service(name, decoder, tokenizer, engine, limits, metrics, host, api_key)


def bind(host: str, port: int) -> socket.socket:
    """A socket for `serve` to listen on. Raises `ConfigError` if the address is taken or not this machine's."""
    listening = None
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind)
        # Else a port could not be used for minutes after a server had it.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except (OSError, UnicodeError) as error:
        if listening:
            listening.close()
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot listen on {host} port {port}: {reason}") from None
    return listening


def serve(service: Service, listening: socket.socket, announce: Callable[[str], None]) -> None:
    """Serve on a bound socket until a signal ends it. announce: told the address once it may be called, and
    that the server ends while texts are in the making."""
    listening.listen()
    host, port = listening.getsockname()[:2]
    announce(f"{service.name} answers at http://{f'[{host}]' if ':' in host else host}:{port}; Ctrl-C ends it")
    with suppress(KeyboardInterrupt):
        asyncio.run(Server(service, announce).serve(sockets=[listening]))
