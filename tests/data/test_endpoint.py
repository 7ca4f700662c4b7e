import json
import os
import resource
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from endpoint_server import Reply, Script, Server, completion, serving
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ptp.config import Endpoint
from ptp.data.endpoint import Answer, Outcome, Request, complete, retokenize
from ptp.demo import make_tokenizer
from ptp.errors import ConfigError, DataError
from ptp.sampling import SamplingRule

ASSETS = Path(os.environ.get("PTP_ASSETS", Path(__file__).parents[3] / "shared" / "assets"))
TOKENIZER = make_tokenizer(["def f(x):\n    return x + 1\n"], 300)
END = 1
ONE, TWO, OTHER = 40, 41, 42
"""Ordinary tokens."""
RULE = SamplingRule(temperature=0.7, top_k=50, top_p=0.95)


def sampled(prompt: Sequence[int]) -> list[int]:
    """The completion of a prompt, another one for each."""
    return [*prompt[1:], ONE, *prompt[1:], END]


def good(body: dict[str, Any], before: int = 0) -> Reply:
    ids = sampled(body["prompt"])
    text = TOKENIZER.decode(ids[:-1])
    return Reply(completion(text=text, token_ids=ids, prompt_token_ids=body["prompt"]))


def always(reply: Reply) -> Script:
    return lambda body, before: reply


def faulty_once(reply: Reply) -> Script:
    """Every prompt meets the fault once."""
    return lambda body, before: good(body) if before else reply


def requests(count: int) -> list[Request]:
    return [Request(number, (0, 50 + number, 60), 16, seed=1000 + number) for number in range(count)]


def expected(count: int) -> list[Answer]:
    return [Answer(r.number, tuple(sampled(r.prompt_ids)), True) for r in requests(count)]


@pytest.fixture(autouse=True)
def short_pauses_and_no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("ptp.data.endpoint.FIRST_PAUSE", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "completions" / "journal.jsonl"


def ask(
    server: Server | str,
    journal: Path,
    asked: int | Sequence[Request] = 3,
    *,
    rule: SamplingRule = RULE,
    end_token_ids: Sequence[int] = (END,),
    progress: Callable[[int, int], None] = lambda done, total: None,
    **settings: Any,
) -> Outcome:
    url = server if isinstance(server, str) else server.url
    endpoint = Endpoint(url=url, **{"model": "base", "max_retries": 2, **settings})
    asked = requests(asked) if isinstance(asked, int) else asked
    return complete(endpoint, asked, rule, TOKENIZER, end_token_ids, journal, progress)


def answer_to(journal: Path, end_token_ids: Sequence[int] = (END,), **choice: object) -> Answer | str:
    """The answer made of one choice, or why there is none."""
    with serving(always(Reply(completion(**choice)))) as server:
        outcome = ask(server, journal, 1, end_token_ids=end_token_ids)
    return outcome.answers[0] if outcome.answers else next(iter(outcome.left_out))


def error_of(server: Server | str, journal: Path, asked: int = 3, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        ask(server, journal, asked, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what is asked ---


def test_completions_come_back_in_order_of_number_as_the_server_sampled_them(journal: Path) -> None:
    seen: list[tuple[int, int]] = []
    with serving(good) as server:
        outcome = ask(server, journal, 20, progress=lambda done, total: seen.append((done, total)))
    assert outcome == Outcome(expected(20), Counter())
    assert seen == [(done, 20) for done in range(21)]


def test_prompt_rule_length_and_seed_reach_the_server_as_they_are(journal: Path) -> None:
    with serving(good) as server:
        ask(server, journal, 1)
    sent = server.bodies[0]
    assert sent["prompt"] == [0, 50, 60]
    assert (sent["model"], sent["max_tokens"], sent["seed"]) == ("base", 16, 1000)
    assert (sent["temperature"], sent["top_k"], sent["top_p"]) == (0.7, 50, 0.95)
    # Or a server takes them from the model's generation_config.
    assert (sent["min_p"], sent["repetition_penalty"]) == (0, 1)


def test_a_warper_that_is_off_is_switched_off_at_the_server_too(journal: Path) -> None:
    with serving(good) as server:
        ask(server, journal, 1, rule=SamplingRule(temperature=0))
    assert {key: server.bodies[0][key] for key in ("temperature", "top_k", "top_p")} == {
        "temperature": 0,
        "top_k": -1,
        "top_p": 1,
    }


def test_the_key_is_read_from_the_environment(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTER_KEY", "secret")
    with serving(good) as server:
        ask(server, journal, 1, api_key_env="CLUSTER_KEY")
    assert server.keys == ["Bearer secret"]


def test_a_server_without_a_key_needs_none(journal: Path) -> None:
    with serving(good) as server:
        assert ask(server, journal).answers == expected(3)


def test_no_more_requests_are_in_flight_than_allowed(journal: Path) -> None:
    def slow(body: dict[str, Any], before: int) -> Reply:
        return Reply(good(body).body, delay=0.02)

    with serving(slow) as server:
        assert ask(server, journal, 40, concurrency=7).answers == expected(40)
    assert server.most_open == 7


# --- faults that pass ---


@pytest.mark.parametrize(
    "fault",
    [
        Reply(drop=True),
        Reply({"error": {"message": "busy"}}, status=429),
        Reply({"error": {"message": "oops"}}, status=500),
        Reply(b"<html>bad gateway</html>", status=502, headers={"Content-Type": "text/html"}),
        Reply(delay=0.6),
        Reply(completion(token_ids=[ONE]), short=10),
        Reply(b'{"id": "cmpl-0", "choices": [{"text": "ab'),
        Reply(b""),
        Reply(b"<html>hello</html>", headers={"Content-Type": "text/html"}),
        Reply([1, 2]),
        Reply({"choices": []}),
        Reply({"choices": None}),
        Reply(completion(token_ids=["a"])),
        Reply(completion(token_ids=[1.5])),
        Reply(completion(text=None)),
        Reply(completion(text="cut by a restart", finish_reason="abort")),
    ],
    ids=[
        "dropped",
        "429",
        "500",
        "502",
        "slow",
        "truncated body",
        "truncated JSON",
        "nothing",
        "a page",
        "a list",
        "no choice",
        "choices null",
        "ids of text",
        "ids of floats",
        "text null",
        "aborted",
    ],
)
def test_after_a_fault_that_passes_the_answers_are_the_same(journal: Path, fault: Reply) -> None:
    with serving(faulty_once(fault)) as server:
        assert ask(server, journal, 3, timeout=0.3) == Outcome(expected(3), Counter())
    assert set(server.prompts.values()) == {2}


def test_the_server_says_how_long_to_wait(journal: Path) -> None:
    with serving(faulty_once(Reply({}, status=429, headers={"Retry-After": "0.3"}))) as server:
        ask(server, journal, 1)
    first, second = server.times
    assert 0.3 <= second - first < 3


def test_a_malformed_reply_is_not_asked_for_again_for_ever(journal: Path) -> None:
    with serving(always(Reply({"choices": [{"finish_reason": "stop"}]}))) as server:
        message = error_of(server, journal, 1)
    assert message == (
        f"endpoint {server.url}: replies are no completions (choices.0.text Field required); "
        "0 of 1 completions are kept; run the command again to go on"
    )
    assert len(server.bodies) == 3


def test_an_endpoint_that_is_down_is_an_error_that_says_what_is_kept(journal: Path) -> None:
    with serving(good) as server:
        ask(server, journal, 2)
    message = error_of(server.url, journal, 3)
    assert message.startswith(f"endpoint {server.url}: Connection error. ")
    assert message.endswith("; 2 of 3 completions are kept; run the command again to go on")


def test_a_server_that_stays_silent_is_an_error(journal: Path) -> None:
    with serving(always(Reply(delay=0.3))) as server:
        assert "Request timed out; 0 of 1" in error_of(server, journal, 1, timeout=0.05)
    assert len(server.bodies) == 3


def test_an_endpoint_that_breaks_down_keeps_what_it_answered(journal: Path) -> None:
    def breaks_down(body: dict[str, Any], before: int) -> Reply:
        return good(body) if body["prompt"][1] < 54 else Reply({"error": {"message": "CUDA\nerror"}}, status=500)

    with serving(breaks_down) as server:
        message = error_of(server, journal, 10, concurrency=1)
    assert "500 CUDA error" in message
    assert "4 of 10 completions are kept" in message
    with serving(good) as server:
        assert ask(server, journal, 10).answers == expected(10)
    assert len(server.bodies) == 6


# --- faults that do not pass ---


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (401, {"error": "Unauthorized"}, r'401 {"error": "Unauthorized"}; the key is read from .* OPENAI_API_KEY'),
        (
            404,
            {"error": {"message": "The model `base` does not exist."}},
            "404 The model `base` does not exist.; url is",
        ),
        (400, {"error": {"message": "This model's\nmaximum context"}}, "prompt 0: 400 This model's maximum context;"),
        (405, b"", "405 Method Not Allowed"),
    ],
    ids=str,
)
def test_what_the_server_refuses_ends_at_once_with_its_words(
    journal: Path, status: int, body: object, message: str
) -> None:
    with serving(always(Reply(body, status=status))) as server, pytest.raises(DataError, match=message) as caught:
        ask(server, journal, 5, concurrency=1)
    assert str(caught.value).startswith(f"endpoint {server.url}: ")
    assert "\n" not in str(caught.value)
    # A 400 may be about settings that can be left out, which takes a second try.
    assert len(server.bodies) == (2 if status == 400 else 1)


def test_a_long_page_in_place_of_words_is_cut(journal: Path) -> None:
    with serving(always(Reply(b"<p>\n" * 10_000, status=403))) as server:
        assert len(error_of(server, journal)) < 600


def test_min_p_reaches_the_server_as_a_setting_it_must_know(journal: Path) -> None:
    rule = SamplingRule(min_p=0.1)

    def without_min_p(body: dict[str, Any], before: int) -> Reply:
        return Reply({"error": {"message": "unknown: min_p"}}, status=400) if "min_p" in body else good(body)

    with serving(good) as server:
        ask(server, journal, 1, rule=rule)
    assert server.bodies[0]["min_p"] == 0.1
    journal.unlink()
    with serving(without_min_p) as server, pytest.raises(DataError, match="unknown: min_p"):
        ask(server, journal, 1, rule=rule)
    with serving(without_min_p) as server:
        assert ask(server, journal, 1).answers == expected(1)


@pytest.mark.parametrize("status", [400, 422])
def test_a_strict_server_is_asked_without_the_settings_it_does_not_know(journal: Path, status: int) -> None:
    known = {"model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "seed"}

    def strict(body: dict[str, Any], before: int) -> Reply:
        if set(body) <= known:
            return good(body)
        return Reply({"error": {"message": f"unknown: {sorted(set(body) - known)}"}}, status=status)

    with serving(strict) as server:
        assert ask(server, journal, 6, concurrency=1).answers == expected(6)
    assert len(server.bodies) == 7
    assert server.bodies[-1]["top_k"] == 50


def test_a_server_that_does_not_know_top_k_cannot_sample_by_it(journal: Path) -> None:
    def strict(body: dict[str, Any], before: int) -> Reply:
        return Reply({"message": "unknown: top_k"}, status=400) if "top_k" in body else good(body)

    with serving(strict) as server:
        assert "400 unknown: top_k" in error_of(server, journal)
        assert ask(server, journal, rule=SamplingRule()).answers == expected(3)


def test_a_server_that_adds_to_the_prompt_is_refused(journal: Path) -> None:
    def doubled(body: dict[str, Any], before: int) -> Reply:
        return Reply(completion(token_ids=[ONE, END], prompt_token_ids=[0, *body["prompt"]]))

    with serving(doubled) as server:
        assert "sent 3 tokens (0, 50, 60 …), the server saw 4 tokens (0, 0, 50, 60 …)" in error_of(server, journal, 1)


# --- what is kept of an answer ---


def test_ids_are_kept_to_the_first_end_token(journal: Path) -> None:
    assert answer_to(journal, token_ids=[ONE, END, TWO, END], finish_reason="length") == Answer(0, (ONE, END), True)


def test_a_completion_cut_at_its_length_is_not_finished(journal: Path) -> None:
    assert answer_to(journal, token_ids=[ONE, TWO], finish_reason="length") == Answer(0, (ONE, TWO), False)


@pytest.mark.parametrize(
    ("stop", "ends", "answer"),
    [
        ({}, [END], Answer(0, (ONE, END), True)),
        ({}, [OTHER], Answer(0, (ONE, OTHER), True)),
        ({}, [OTHER, END], Answer(0, (ONE, END), True)),
        ({}, [OTHER, TWO], Answer(0, (ONE,), False)),
        ({"stop_reason": OTHER}, [END, OTHER], Answer(0, (ONE, OTHER), True)),
        ({"matched_stop": OTHER}, [END, OTHER], Answer(0, (ONE, OTHER), True)),
        ({"stop_reason": TWO}, [END], Answer(0, (ONE,), False)),
        ({"stop_reason": "\n\n"}, [END], Answer(0, (ONE,), False)),
    ],
    ids=["one", "not the tokenizer's", "the tokenizer's", "unknown", "vLLM", "SGLang", "no end token", "a text"],
)
def test_the_end_token_that_ids_leave_out_is_put_back(
    journal: Path, stop: dict[str, object], ends: list[int], answer: Answer
) -> None:
    assert answer_to(journal, ends, token_ids=[ONE], **stop) == answer


def test_no_more_tokens_are_kept_than_were_asked_for(journal: Path) -> None:
    assert answer_to(journal, token_ids=[ONE] * 20, finish_reason="length") == Answer(0, (ONE,) * 16, False)


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ({"token_ids": [ONE, len(TOKENIZER)]}, "token ids outside the vocabulary"),
        ({"token_ids": [-1]}, "token ids outside the vocabulary"),
        ({"token_ids": [], "finish_reason": "length"}, "empty"),
        ({"text": "", "finish_reason": "length"}, "empty"),
        ({"text": "caf\ufffd!"}, "text that no tokens give back exactly"),
        ({"text": "ca", "finish_reason": "content_filter"}, "withheld by the server's content filter"),
    ],
)
def test_an_answer_that_cannot_be_used_is_left_out_and_counted(
    journal: Path, choice: dict[str, object], reason: str
) -> None:
    def one_is_bad(body: dict[str, Any], before: int) -> Reply:
        return Reply(completion(**choice)) if body["prompt"][1] == 51 else good(body)

    with serving(one_is_bad) as server:
        outcome = ask(server, journal)
        again = ask(server, journal)
    assert outcome == again == Outcome([expected(3)[0], expected(3)[2]], Counter({reason: 1}))
    assert len(server.bodies) == 3


@pytest.mark.parametrize("ids_of_server", [{}, {"token_ids": None}, {"token_ids": []}], ids=str)
def test_text_of_a_server_without_ids_is_tokenised(journal: Path, ids_of_server: dict[str, object]) -> None:
    text = "return x + 1 # é你"
    ids = tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])
    assert answer_to(journal, text=text, **ids_of_server) == Answer(0, (*ids, END), True)


def test_a_text_cut_within_a_character_keeps_its_whole_ones(journal: Path) -> None:
    ids = tuple(TOKENIZER("x + 你", add_special_tokens=False)["input_ids"])
    assert answer_to(journal, text="x + 你\ufffd", finish_reason="length") == Answer(0, ids, False)


def test_an_end_token_in_the_text_ends_it(journal: Path) -> None:
    ids = tuple(TOKENIZER("x", add_special_tokens=False)["input_ids"])
    assert answer_to(journal, text="x</s>y", finish_reason="length") == Answer(0, (*ids, END), True)


@given(st.text(max_size=12), st.text(max_size=12))
def test_tokens_found_for_a_text_give_prompt_and_text_back(prompt: str, text: str) -> None:
    prompt_ids = TOKENIZER(prompt)["input_ids"]
    ids = retokenize(text, prompt_ids, TOKENIZER)
    if ids is None:
        assert "\ufffd" in text
    else:
        assert TOKENIZER.decode([*prompt_ids, *ids]) == f"{TOKENIZER.decode(prompt_ids)}{text}"


@pytest.mark.parametrize("name", ["stories260K", "babyllama"])
def test_a_tokenizer_that_marks_where_a_text_begins_finds_the_ids_that_go_on(name: str) -> None:
    if not (ASSETS / "models" / name).is_dir():
        pytest.skip(f"{ASSETS / 'models' / name} is absent; set PTP_ASSETS to the folder that holds models/{name}")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(ASSETS / "models" / name)
    ids = tokenizer("Once upon a time, there was a girl.\nThen she said")["input_ids"]
    text = tokenizer.decode(ids)
    for cut in range(1, len(ids)):
        continuation = text[len(tokenizer.decode(ids[:cut])) :]
        assert retokenize(continuation, ids[:cut], tokenizer) == ids[cut:]
        # This is what the ids are not.
        assert tokenizer(continuation, add_special_tokens=False)["input_ids"] != ids[cut:]


# --- the journal ---


class Kill(Exception):
    """Ends the program."""


def kill_after(count: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done >= count:
            raise Kill

    return progress


@pytest.mark.parametrize("concurrency", [1, 5])
@pytest.mark.parametrize("count", [0, 1, 7, 19])
def test_a_killed_run_goes_on_with_what_is_missing(journal: Path, count: int, concurrency: int) -> None:
    with serving(good) as server, pytest.raises(Kill):
        ask(server, journal, 20, concurrency=concurrency, progress=kill_after(count))
    kept = {json.loads(line)["number"] for line in journal.read_text().splitlines()} if count else set()
    seen: list[int] = []
    with serving(good) as server:
        assert ask(server, journal, 20, progress=lambda done, total: seen.append(done)).answers == expected(20)
    assert len(kept) >= count
    assert server.prompts == Counter(r.prompt_ids for r in requests(20) if r.number not in kept)
    assert seen[0] == len(kept)


def test_one_at_a_time_no_prompt_is_asked_twice_across_a_kill(journal: Path) -> None:
    with serving(good) as server:
        with pytest.raises(Kill):
            ask(server, journal, 12, concurrency=1, progress=kill_after(5))
        assert ask(server, journal, 12, concurrency=1).answers == expected(12)
    assert set(server.prompts.values()) == {1}


def test_a_line_cut_anywhere_by_a_kill_costs_that_answer_only(journal: Path) -> None:
    with serving(good) as server:
        ask(server, journal, 3, concurrency=1)
        whole = journal.read_bytes()
        last = whole.rindex(b"\n", 0, -1) + 1
        for cut in (last + 1, (last + len(whole)) // 2, len(whole) - 1):
            journal.write_bytes(whole[:cut])
            server.bodies.clear()
            assert ask(server, journal).answers == expected(3)
            assert server.prompts == {(0, 52, 60): 1}
            assert journal.read_bytes() == whole


def test_when_all_is_answered_no_server_is_needed(journal: Path) -> None:
    with serving(good) as server:
        ask(server, journal)
    assert ask(server.url, journal).answers == expected(3)


def test_more_prompts_may_be_added(journal: Path) -> None:
    with serving(good) as server:
        ask(server, journal, 2)
        assert ask(server, journal, 5).answers == expected(5)
        assert ask(server, journal, requests(5)[1:3]).answers == expected(5)[1:3]
    assert len(server.bodies) == 5


@pytest.mark.parametrize("line", [b"{", b"", b"[]", b'{"number": 0}', b'{"number":"0","key":"","ids":[1]}', b"\xff"])
def test_a_corrupt_line_is_named(journal: Path, line: bytes) -> None:
    with serving(good) as server:
        ask(server, journal)
        first, rest = journal.read_bytes().split(b"\n", 1)
        journal.write_bytes(first + b"\n" + line + b"\n" + rest)
        assert f"{journal}, line 2: not a completion" in error_of(server, journal)


@pytest.mark.parametrize(
    "change",
    [
        {"asked": [Request(0, (0, 50, 61), 16, 1000)]},
        {"asked": [Request(0, (0, 50, 60), 17, 1000)]},
        {"asked": [Request(0, (0, 50, 60), 16, 1001)]},
        {"rule": SamplingRule(temperature=0.7, top_k=50)},
        {"rule": SamplingRule(temperature=0.7, top_k=50, top_p=0.95, min_p=0.1)},
        {"model": "another"},
    ],
    ids=["prompt", "length", "seed", "rule", "min-p", "model"],
)
def test_completions_of_other_requests_are_never_taken(journal: Path, change: dict[str, Any]) -> None:
    with serving(good) as server:
        ask(server, journal, 1)
        with pytest.raises(DataError, match="line 1: made with another prompt, model, seed, length or sampling rule"):
            ask(server, journal, **{"asked": 1, **change})


def test_a_full_disk_loses_nothing(journal: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with serving(good) as server:
        ask(server, journal, 4)
        size = journal.stat().st_size
        # Room for two lines more and a part of a third.
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + size // 2 + 10, hard))
        try:
            message = error_of(server, journal, 10)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert f"cannot write {journal}: File too large; 6 of 10 completions are kept" in message
        # Nor may what another request in flight writes then follow a part of a line.
        assert journal.read_bytes().endswith(b"\n")
        assert ask(server, journal, 10).answers == expected(10)


def test_without_the_openai_package_it_is_named(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ConfigError, match="pip install openai"):
        ask("http://127.0.0.1:1/v1", journal)
