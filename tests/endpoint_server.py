"""An OpenAI-compatible server on loopback that answers by a script, with any fault one wishes."""

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What the server does with a request. drop: close the connection; delay: seconds before; short: bytes missing."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    drop: bool = False
    short: int = 0


Script = Callable[[dict[str, Any], int], Reply]
"""From the request's body, and how often its prompt came before, to what the server does."""


class Server(ThreadingHTTPServer):
    """Records the requests it gets, their times and how many were open at once."""

    request_queue_size = 128

    def __init__(self, script: Script) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = script
        self.lock = threading.Lock()
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.times: list[float] = []
        self.open = self.most_open = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def prompts(self) -> Counter[tuple[int, ...]]:
        return Counter(tuple(body["prompt"]) for body in self.bodies)

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is no fault here."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def do_POST(self) -> None:
        server = self.server
        assert self.path == "/v1/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            before = server.prompts[tuple(body["prompt"])]
            server.bodies.append(body)
            server.keys.append(self.headers["Authorization"])
            server.times.append(time.monotonic())
            server.open += 1
            server.most_open = max(server.open, server.most_open)
        try:
            reply = server.script(body, before)
            time.sleep(reply.delay)
        finally:
            with server.lock:
                server.open -= 1
        if reply.drop:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        for name, value in {"Content-Type": "application/json", **reply.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) + reply.short))
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = bool(reply.short)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(script: Script) -> Iterator[Server]:
    with Server(script) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def completion(**choice: object) -> dict[str, Any]:
    """A reply as vLLM writes it."""
    choice = {"index": 0, "text": "", "finish_reason": "stop", "logprobs": None, "stop_reason": None, **choice}
    return {"id": "cmpl-0", "object": "text_completion", "created": 0, "model": "base", "choices": [choice]}
