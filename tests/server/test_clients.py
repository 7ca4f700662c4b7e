"""Clients that vanish, crowd, lie or send rubbish: the server lives, and answers the others as ever."""

import http.client
import json
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from unittest.mock import patch
from urllib.parse import urlsplit

import httpx2
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_server import NAME, Alone, running, wait_for

from ptp.decoding.session import Session
from ptp.server import api
from ptp.server.api import Service, is_loopback

CHAT = [{"role": "user", "content": "1+1?"}]
PROMPT = "And 2 more"
LONG = {"prompt": PROMPT, "max_tokens": 200, "ignore_eos": True, "seed": 1}


def still_answers(url: str, alone: Alone, tokenizer) -> None:
    answer = httpx2.post(f"{url}/v1/completions", json={"prompt": PROMPT, "max_tokens": 10, "seed": 9})
    assert answer.json()["choices"][0]["text"] == alone(tokenizer(PROMPT)["input_ids"], 10, 9)[1]


def connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=60)


def send_raw(
    url: str, body: bytes, headers: dict[str, str] | None = None, path: str = "completions"
) -> httpx2.Response:
    return httpx2.post(
        f"{url}/v1/{path}", content=body, headers={"Content-Type": "application/json", **(headers or {})}
    )


# Clients that go away


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_frees_its_slot(new_service: Callable, alone, tokenizer, stream: bool) -> None:
    service, real = new_service(num_slots=1), Session.step
    counted = []

    def step(session: Session) -> object:
        counted.append(1)
        if len(counted) > 5:
            # So slow that the text cannot end before its client is missed.
            wait_for(lambda: service.engine._running and all(a.is_cancelled for a in service.engine._running.values()))
        return real(session)

    with running(service) as url:
        body = json.dumps({**LONG, "stream": stream}).encode()
        with patch.object(Session, "step", step), closing(connect(url)) as client:
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            wait_for(lambda: len(counted) > 5)
            client.close()
            wait_for(lambda: service.engine.num_open == 0)
        assert len(counted) == 6
        still_answers(url, alone, tokenizer)


def test_a_client_that_stops_reading_a_stream_gets_no_more_of_it(new_service: Callable) -> None:
    service = new_service(num_slots=1)
    with running(service) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        for _ in range(5):
            stream = client.completions.create(
                model=NAME, prompt=PROMPT, stream=True, max_tokens=200, extra_body={"ignore_eos": True}
            )
            next(iter(stream))
            stream.close()
        wait_for(lambda: service.engine.num_open == 0)
        finished = httpx2.get(f"{url}/metrics").text
        assert 'finished_reason="abort"' in finished


# Crowds


def test_whoever_finds_the_queue_full_is_told_to_come_again(new_service: Callable, alone, tokenizer) -> None:
    service, real = new_service(num_slots=1, max_waiting=1), Session.step
    with running(service) as url, ThreadPoolExecutor(2) as pool:
        held = []

        def step(session: Session) -> object:
            wait_for(lambda: bool(held))
            return real(session)

        with patch.object(Session, "step", step):
            taken = [pool.submit(httpx2.post, f"{url}/v1/completions", json=LONG, timeout=60) for _ in range(2)]
            wait_for(lambda: service.engine.num_open == 2)
            answer = httpx2.post(f"{url}/v1/completions", json=LONG)
            held.append(1)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert [one.result().status_code for one in taken] == [200, 200]
        assert "ptp:requests_rejected_total{" in httpx2.get(f"{url}/metrics").text
        still_answers(url, alone, tokenizer)


@pytest.mark.slow
def test_two_hundred_clients_at_once_each_get_their_own_text(new_service: Callable, alone: Alone, tokenizer) -> None:
    prompts = [f"{number}+{number % 7}?" for number in range(200)]

    def ask(client: openai.OpenAI, number: int) -> str | None:
        options = {"model": NAME, "seed": number, "max_tokens": 10 + number % 30}
        if number % 10 == 3:
            # Gone after its first chunk.
            stream = client.completions.create(prompt=prompts[number], stream=True, **options)
            next(iter(stream))
            return stream.close()
        if number % 3 == 0:
            chunks = client.completions.create(prompt=prompts[number], stream=True, **options)
            return "".join(chunk.choices[0].text for chunk in chunks)
        return client.completions.create(prompt=prompts[number], **options).choices[0].text

    service = new_service(num_slots=16, max_waiting=200)
    limits = httpx2.Limits(max_connections=200, max_keepalive_connections=0)
    with (
        running(service) as url,
        openai.OpenAI(
            base_url=f"{url}/v1",
            api_key="none",
            max_retries=0,
            timeout=120,
            http_client=openai.DefaultHttpxClient(limits=limits),
        ) as client,
        ThreadPoolExecutor(200) as pool,
    ):
        found = list(pool.map(lambda number: ask(client, number), range(200)))
        wait_for(lambda: service.engine.num_open == 0)
        for number, text in enumerate(found):
            expected = alone(tokenizer(prompts[number])["input_ids"], 10 + number % 30, number)[1]
            assert text in (expected, None) if number % 10 == 3 else text == expected


# Failures


@pytest.mark.parametrize("stream", [False, True])
def test_a_decoder_that_fails_is_a_500_and_the_server_goes_on(
    service: Service, url: str, alone, tokenizer, stream
) -> None:
    def fail(session: Session) -> None:
        raise RuntimeError("the GPU has fallen off")

    kind = openai.APIError if stream else openai.InternalServerError
    with (
        patch.object(Session, "step", fail),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(kind, match="the decoder failed on this request") as caught,
    ):
        answer = client.completions.create(model=NAME, prompt=PROMPT, stream=stream)
        assert stream, "an answer without a stream is refused at once"
        list(answer)
    assert "fallen off" not in str(caught.value)
    still_answers(url, alone, tokenizer)
    assert httpx2.get(f"{url}/health").status_code == 200


def test_a_fault_of_the_server_s_own_is_a_500_without_its_inside(url: str, alone: Alone, tokenizer) -> None:
    with patch.object(api, "prepare", side_effect=RuntimeError("a secret path")):
        answer = httpx2.post(f"{url}/v1/completions", json={"prompt": PROMPT})
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.json()["error"]["type"] == "server_error"
    still_answers(url, alone, tokenizer)


def test_a_server_that_closes_answers_503(new_service: Callable) -> None:
    service = new_service()
    with running(service) as url:
        service.engine.close()
        answer = httpx2.post(f"{url}/v1/completions", json={"prompt": PROMPT})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
        assert httpx2.get(f"{url}/health").status_code == 503


# Bodies


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": "a", "metadata": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}",
        b'{"prompt": "a", "seed": ' + b"9" * 100_000 + b"}",
        b'{"prompt": "a", "max_tokens": ' + b"9" * 10_000 + b"}",
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": [99999999]}',
        b'{"prompt": [-1]}',
        b'{"prompt": [1.5]}',
        b'{"prompt": [true]}',
        b'{"prompt": [[]]}',
        b'{"prompt": []}',
        b'{"prompt": [99999999999999999999999999]}',
        b'{"prompt": ["a", 1]}',
        b'{"prompt": "a", "stop": [1]}',
        b'{"prompt": "a", "logit_bias": {"-1": 1}}',
        b'{"prompt": "a", "logit_bias": {"\\u0661": 1}}',
        b'{"prompt": "a", "' + b"x" * 100_000 + b'": 1}',
        b'{"prompt": "' + b"a+" * 100_000 + b'"}',
    ],
    ids=lambda body: body[:40].decode(errors="replace"),
)
def test_a_malformed_body_is_a_400_of_one_short_line(url: str, body: bytes) -> None:
    answer = send_raw(url, body)
    message = answer.json()["error"]["message"]
    assert answer.status_code == 400, message
    assert "\n" not in message
    assert len(message) < 400


def test_the_server_is_whole_after_all_that(url: str, service: Service, alone: Alone, tokenizer) -> None:
    still_answers(url, alone, tokenizer)
    assert service.engine.num_open == 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [
    *("prompt", "messages", "model", "stream", "stream_options", "n", "seed", "max_tokens", "stop", "temperature"),
    *("top_p", "top_k", "logprobs", "logit_bias", "ptp", "tools", "min_tokens", "repetition_penalty"),
]


@settings(max_examples=40)
@given(
    st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4),
    st.sampled_from(["completions", "chat/completions"]),
)
def test_no_json_is_worse_than_a_400(url: str, body: dict[str, object], path: str) -> None:
    whole = {"prompt": [5], "messages": CHAT, "max_tokens": 1, **body}
    whole.pop("messages" if path == "completions" else "prompt")
    answer = send_raw(url, json.dumps(whole).encode(), path=path)
    assert answer.status_code in (200, 400, 404), answer.text
    assert answer.status_code == 200 or set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_that_is_too_large_is_refused_whatever_it_says_of_its_length(url: str) -> None:
    def parts() -> object:
        for _ in range(6):
            yield b'"' + b"a" * 2**20

    for content in (b"a" * (5 * 2**20), parts()):
        try:
            answer = httpx2.post(f"{url}/v1/completions", content=content, headers={"Content-Type": "application/json"})
        except httpx2.TransportError:
            continue  # hung up on before all was sent
        assert answer.status_code == 413
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_body_that_never_comes_is_waited_for_only_so_long(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "BODY_SECONDS", 0.1)
    with closing(connect(url)) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        assert b" 408 " in client.recv(1000)


def test_a_page_of_another_site_cannot_ask_without_this_server_s_leave(url: str) -> None:
    body = json.dumps({"prompt": PROMPT, "max_tokens": 1}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a"):
        assert send_raw(url, body, {"Content-Type": kind}).status_code == 400
    asked = httpx2.options(
        f"{url}/v1/completions", headers={"Origin": "http://evil", "Access-Control-Request-Method": "POST"}
    )
    assert asked.status_code == 405
    answer = send_raw(url, body, {"Origin": "http://evil"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", ""])
def test_a_name_that_is_not_this_machine_s_is_no_way_in(url: str, host: str) -> None:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port)
    with closing(connection):
        connection.request("GET", "/v1/models", headers={"Host": host})
        assert connection.getresponse().status == 400


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1234", "[::1]:8000", "[::1]"])
def test_this_machine_has_several_names(url: str, host: str) -> None:
    assert httpx2.get(f"{url}/health", headers={"Host": host}).status_code == 200


def test_loopback_is_told_from_what_others_reach() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "127.8.9.1", "::1", "localhost")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "192.168.0.1", "example.org", "")] == [False] * 5


# Keys


@pytest.fixture(scope="module")
def locked(new_service: Callable):
    with running(new_service(api_key="open sesame é")) as url:
        yield url


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny", "/metrics"])
@pytest.mark.parametrize("given", [None, "", "Bearer", "Bearer open", "Basic open sesame", "Bearer open sesame"])
def test_without_the_key_nothing_is_told(locked: str, path: str, given: str | None) -> None:
    answer = httpx2.get(f"{locked}{path}", headers={} if given is None else {"Authorization": given})
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"


def test_with_the_key_all_is_as_ever_and_page_and_health_need_none(new_service: Callable) -> None:
    with running(new_service(api_key="sesame")) as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="sesame", max_retries=0) as client:
            assert client.chat.completions.create(model=NAME, messages=CHAT).choices
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="other", max_retries=0) as stranger,
            pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"),
        ):
            stranger.chat.completions.create(model=NAME, messages=CHAT)
        for path in ("/", "/health"):
            assert httpx2.get(f"{url}{path}").status_code == 200


def test_a_stranger_s_body_is_not_read(locked: str) -> None:
    with closing(connect(locked)) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000000\r\n\r\n"
        )
        assert b" 401 " in client.recv(1000)


# Rubbish on the wire


def test_rubbish_on_the_wire_harms_nobody(url: str, alone: Alone, tokenizer) -> None:
    for rubbish in (
        b"\0" * 1000,
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"",
    ):
        with closing(connect(url)) as client:
            client.sendall(rubbish)
    still_answers(url, alone, tokenizer)
