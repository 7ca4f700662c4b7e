"""The routes: OpenAI's API, health, metrics and a page (docs/serve.md).

    body ── read, prepare ──► requests ── engine ──► calls, in a queue of this HTTP request ── writer ──► answer, chunks

A client that goes away is noticed at once, whether its answer streams or not, and its texts are given up.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import logging
import re
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from ipaddress import ip_address
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from openai.types import Model
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from transformers import PreTrainedTokenizerBase

from ptp.decoding.decoder import Decoder
from ptp.errors import PTPError
from ptp.server.answers import ChatWriter, CompletionWriter, Writer
from ptp.server.bodies import Body, ChatBody, CompletionBody, Limits, Prepared, prepare
from ptp.server.engine import Answer, Call, Closing, Engine, Failure, QueueFull
from ptp.server.errors import APIError, closing, failed, queue_full
from ptp.server.metrics import Metrics

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 4 * 2**20
"""Of a request; read no further."""

BODY_SECONDS = 60
"""In which a body must have come."""

LAST = {"Connection": "close"}
"""Sent where a body was not read to its end, behind which no other request can be found."""

CLIENT_GONE = 499
"""Status of an answer that nobody waits for any more, as nginx logs it."""


@dataclass(frozen=True)
class Service:
    """What the routes serve. api_key: asked for where it is not empty. host: the address that is listened on."""

    name: str
    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    limits: Limits
    metrics: Metrics
    host: str = "127.0.0.1"
    api_key: str = ""


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach what listens there."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def create_app(service: Service) -> FastAPI:
    """The server, for uvicorn or any other ASGI server to run."""
    # One at a time: a tokenizer is not made for several threads, and the event loop stays free.
    preparing = ThreadPoolExecutor(1, thread_name_prefix="ptp-prepare")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        service.engine.stop()
        preparing.shutdown(cancel_futures=True)

    # FastAPI's own pages of the API load scripts from elsewhere.
    app = FastAPI(
        lifespan=lifespan,
        dependencies=[Depends(_check_host)] if is_loopback(service.host) else [],
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    app.add_exception_handler(APIError, lambda _, error: error.response)
    app.add_exception_handler(HTTPException, _http_error)  # type: ignore[arg-type]
    app.add_exception_handler(ClientDisconnect, lambda *_: Response(status_code=CLIENT_GONE))
    app.add_exception_handler(Exception, lambda *_: failed().response)
    app.include_router(_routes(service, preparing), dependencies=[Depends(partial(_check_key, service))])
    app.include_router(_open_routes(service))
    return app


def _http_error(_: Request, error: HTTPException) -> JSONResponse:
    return APIError(error.status_code, str(error.detail), headers=dict(error.headers or {})).response


async def _check_host(request: Request) -> None:
    """A page elsewhere may have its own name lead here, and then read what a browser of this machine gets."""
    host = request.headers.get("host", "")
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        name = ""
    if not is_loopback(name):
        raise APIError(400, f"this server listens on this machine alone, and not as {host[:80]!r}")


async def _check_key(service: Service, request: Request) -> None:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    given = key.strip() if scheme.lower() == "bearer" else ""
    if service.api_key and not hmac.compare_digest(given.encode(), service.api_key.encode()):
        raise APIError(
            401, "the API key is missing or wrong", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
        )


def _open_routes(service: Service) -> APIRouter:
    """What needs no key: nothing of it is anybody's."""
    router, (page, headers) = APIRouter(), _page()

    @router.get("/")
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers=headers)

    @router.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if service.engine.is_alive else 503)

    return router


def _routes(service: Service, preparing: ThreadPoolExecutor) -> APIRouter:
    router, created = APIRouter(), int(time.time())

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def model_card() -> dict[str, object]:
        card = Model(id=service.name, object="model", created=created, owned_by="ptp").model_dump()
        limits, rule = service.limits, service.decoder.rule
        return card | {
            "max_model_len": limits.max_prompt_tokens + 1,
            "ptp": {
                "has_chat_template": bool(service.tokenizer.chat_template),
                "max_prompt_tokens": limits.max_prompt_tokens,
                "max_new_tokens": limits.max_new_tokens,
                "sampling": rule.model_dump(mode="json", exclude={"order"}),
            },
        }

    @router.get("/v1/models")
    async def models() -> dict[str, object]:
        return {"object": "list", "data": [model_card()]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, object]:
        _check_model(service, name)
        return model_card()

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _answer(service, preparing, request, ChatBody, ChatWriter)

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(service, preparing, request, CompletionBody, CompletionWriter)

    return router


def _check_model(service: Service, name: str | None) -> None:
    if name is not None and name != service.name:
        raise APIError(
            404, f"there is no model {name[:80]!r} here; this server has {service.name!r}", "model", "model_not_found"
        )


async def _read(request: Request) -> bytes:
    """The body, as long as it is JSON, not too large and not too slow."""
    # Other kinds a page of any site may send without asking this server first.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise APIError(400, "the body must be sent as Content-Type: application/json")
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                data += part
                if len(data) > MAX_BODY_BYTES:
                    raise APIError(413, f"the body is larger than {MAX_BODY_BYTES} bytes", headers=LAST)
    except TimeoutError:
        raise APIError(408, f"the body did not come in {BODY_SECONDS} s", headers=LAST) from None
    return bytes(data)


async def _answer(
    service: Service, preparing: ThreadPoolExecutor, request: Request, kind: type[Body], writing: type[Writer]
) -> Response:
    """Answer a request to write, whole or as a stream."""
    body = kind.read(await _read(request))
    _check_model(service, body.model)
    engine = service.engine
    try:
        engine.check_room()
        work = partial(prepare, body, service.decoder, service.tokenizer, service.limits, engine.max_open)
        prepared = await asyncio.get_running_loop().run_in_executor(preparing, work)
        answers = _Answers(engine, request, prepared)
    except QueueFull:
        service.metrics.rejected.inc()
        raise queue_full() from None
    except Closing:
        raise closing() from None
    except PTPError as error:
        raise APIError(400, str(error)) from None
    writer = writing(service.name, service.tokenizer, prepared.num_prompt_tokens, prepared.seed)
    if not body.stream:
        async with answers:
            return await _whole(answers, writer)
    await answers.__aenter__()
    wants_usage = bool(body.stream_options and body.stream_options.include_usage)
    events = _events(answers, writer, wants_usage)
    return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


class _ClientGone(Exception):
    """Nobody waits for the answer any more."""


class _Answers:
    """The answers to one HTTP request, open until the block ends or its client goes away."""

    def __init__(self, engine: Engine, request: Request, prepared: Prepared) -> None:
        loop = asyncio.get_running_loop()
        self.engine, self.request = engine, request
        self.queue: asyncio.Queue[tuple[int, Call | Failure] | None] = asyncio.Queue()

        def listener(index: int) -> Callable[[Call | Failure], None]:
            def tell(event: Call | Failure) -> None:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(self.queue.put_nowait, (index, event))

            return tell

        self.answers = [Answer(one, prepared.stops, listener(index)) for index, one in enumerate(prepared.requests)]
        engine.submit(self.answers)

    async def __aenter__(self) -> _Answers:
        self.watch = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.watch.cancel()
        self.engine.cancel(self.answers)

    async def _watch(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        self.engine.cancel(self.answers)
        self.queue.put_nowait(None)

    async def calls(self) -> AsyncIterator[tuple[int, Call]]:
        """Calls with the index of their choice, until every choice has ended. Raises `APIError` if one fails."""
        num_open = len(self.answers)
        while num_open:
            found = await self.queue.get()
            if found is None:
                raise _ClientGone
            index, event = found
            if isinstance(event, Failure):
                raise closing() if event.is_closing else failed()
            num_open -= event.finish_reason is not None
            yield index, event


async def _whole(answers: _Answers, writer: Writer) -> Response:
    choices: list[list[Call]] = [[] for _ in answers.answers]
    try:
        async for index, call in answers.calls():
            choices[index].append(call)
    except _ClientGone:
        return Response(status_code=CLIENT_GONE)
    return Response(_json(writer.whole(choices)), media_type="application/json")


def _json(answer: BaseModel) -> str:
    # As what they are: our choices have a field that openai's types do not declare.
    return answer.model_dump_json(exclude_unset=True, serialize_as_any=True)


async def _events(answers: _Answers, writer: Writer, wants_usage: bool) -> AsyncIterator[str]:
    """Server-sent events: a chunk for each call, usage if wanted, and the end."""
    try:
        for index in range(len(answers.answers)):
            if first := writer.begin(index):
                yield f"data: {_json(first)}\n\n"
        async for index, call in answers.calls():
            yield f"data: {_json(writer.chunk(index, call))}\n\n"
        if wants_usage:
            yield f"data: {_json(writer.usage_chunk())}\n\n"
        yield "data: [DONE]\n\n"
    except _ClientGone:
        return
    except APIError as error:
        # The status has gone out already; openai's client raises what stands here.
        yield f"data: {bytes(error.response.body).decode()}\n\n"
    finally:
        await answers.__aexit__()


def _page() -> tuple[str, dict[str, str]]:
    """The page and its headers: nothing is run or shown in it but what it holds itself."""
    page = files("ptp.server").joinpath("page.html").read_text(encoding="utf-8")

    def hashed(tag: str) -> str:
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"

    policy = (
        f"default-src 'none'; script-src {hashed('script')}; style-src {hashed('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
