"""The real `openai` client gets the decoder's own texts, and every field as OpenAI's API has it."""

import json
import re
from collections import Counter
from collections.abc import Callable

import httpx2
import openai
import pytest
from model_server import NAME, Alone, running
from pages import ROOT, blocks, commands
from transformers import PreTrainedTokenizerBase

from ptp.decoding.decoder import Decoder
from ptp.server.api import Service

CHAT = [{"role": "user", "content": "1+1?"}]
PROMPT = "And 2 more"


def chat_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]


def streamed(client: openai.OpenAI, **options: object) -> tuple[str, list]:
    """The joined text of a chat's stream, and its chunks."""
    chunks = list(client.chat.completions.create(model=NAME, messages=CHAT, stream=True, **options))
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices), chunks


# Texts


@pytest.mark.parametrize("seed", [0, 7, -3, 2**62])
def test_an_answer_is_the_decoder_s_own_text_for_the_seed(
    client: openai.OpenAI, alone: Alone, tokenizer: PreTrainedTokenizerBase, seed: int
) -> None:
    token_ids, text = alone(chat_ids(tokenizer), 60, seed)
    answer = client.chat.completions.create(model=NAME, messages=CHAT, seed=seed, max_tokens=60)
    (choice,) = answer.choices
    assert choice.message.content == text == streamed(client, seed=seed, max_completion_tokens=60)[0]
    assert choice.message.role == "assistant"
    assert choice.finish_reason == ("length" if len(token_ids) == 60 else "stop")
    counts = (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens)
    assert counts == (len(chat_ids(tokenizer)), len(token_ids), len(chat_ids(tokenizer)) + len(token_ids))
    assert choice.ptp["num_calls"] == len(token_ids) - choice.ptp["num_accepted_tokens"]
    assert choice.ptp["seed"] == seed


def test_a_stream_has_a_chunk_for_each_call_and_counts_tokens_if_asked(client: openai.OpenAI) -> None:
    _, chunks = streamed(client, seed=3, max_tokens=40, stream_options={"include_usage": True})
    first, *calls, usage = chunks
    assert (first.choices[0].delta.role, usage.choices) == ("assistant", [])
    reports = [chunk.choices[0].ptp for chunk in calls]
    total = reports[-1]["total"]
    assert [report["total"] for report in reports[:-1]] == [None] * (len(calls) - 1)
    assert total["num_calls"] == len(calls)
    assert usage.usage.completion_tokens == sum(report["num_tokens"] for report in reports)
    assert total["num_accepted_tokens"] == sum(report["num_accepted"] for report in reports)
    assert total["num_draft_tokens"] == sum(report["num_drafts"] for report in reports) > 0
    for chunk in calls:
        delta, report = chunk.choices[0].delta.content, chunk.choices[0].ptp
        assert "".join(piece for piece, _, _ in report["pieces"]) == delta
    assert [chunk.choices[0].finish_reason for chunk in calls] == [None] * (len(calls) - 1) + [
        calls[-1].choices[0].finish_reason
    ]
    assert {chunk.id for chunk in chunks} == {first.id}
    assert len(streamed(client, seed=3, max_tokens=40)[1]) == len(chunks) - 1


def test_a_stream_is_server_sent_events_and_ends_with_done(url: str) -> None:
    body = {"messages": CHAT, "stream": True, "max_tokens": 4}
    answer = httpx2.post(f"{url}/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done, end = answer.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert all(json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk" for event in events)


@pytest.mark.parametrize("stream", [False, True])
def test_choices_are_the_sequences_of_the_seed(client: openai.OpenAI, alone: Alone, tokenizer, stream: bool) -> None:
    expected = [alone(tokenizer(PROMPT)["input_ids"], 20, 5, sequence) for sequence in range(3)]
    options = {"model": NAME, "prompt": PROMPT, "seed": 5, "n": 3, "max_tokens": 20}
    if stream:
        found: Counter = Counter()
        texts = ["", "", ""]
        for chunk in client.completions.create(stream=True, **options):
            (choice,) = chunk.choices
            texts[choice.index] += choice.text
            found[choice.index] += choice.finish_reason is not None
        assert found == {0: 1, 1: 1, 2: 1}
    else:
        answer = client.completions.create(**options)
        texts = [choice.text for choice in answer.choices]
        assert answer.usage.prompt_tokens == len(tokenizer(PROMPT)["input_ids"])
        assert answer.usage.completion_tokens == sum(len(token_ids) for token_ids, _ in expected)
    assert texts == [text for _, text in expected]


def test_prompts_may_be_texts_or_token_ids_one_or_several(client: openai.OpenAI, alone: Alone, tokenizer) -> None:
    prompts = [PROMPT, "3+1"]
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    expected = [alone(one, 16, 2, number)[1] for number, one in enumerate(ids)]
    for given, number in ((PROMPT, 1), (ids[0], 1), (prompts, 2), (ids, 2)):
        answer = client.completions.create(model=NAME, prompt=given, seed=2)
        assert [choice.text for choice in answer.choices] == expected[:number]


def test_a_seed_that_is_not_given_is_drawn_and_told(client: openai.OpenAI) -> None:
    answers = [client.completions.create(model=NAME, prompt=PROMPT, max_tokens=20) for _ in range(2)]
    seeds = [answer.choices[0].ptp["seed"] for answer in answers]
    assert len(set(seeds)) == 2
    again = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=20, seed=seeds[0])
    assert again.choices[0].text == answers[0].choices[0].text


@pytest.mark.parametrize("budget", [0, 2])
def test_a_budget_changes_the_calls_and_not_the_text(client: openai.OpenAI, budget: int) -> None:
    plain, drafted = (
        client.completions.create(model=NAME, prompt=PROMPT, max_tokens=60, seed=11, extra_body=extra).choices[0]
        for extra in ({"ptp": {"budget": budget}}, {})
    )
    assert plain.text == drafted.text
    assert drafted.ptp["num_accepted_tokens"] > 0
    if budget == 0:
        assert (plain.ptp["num_draft_tokens"], plain.ptp["tokens_per_call"]) == (0, 1)
    assert plain.ptp["tokens_per_second"] > 0


# Sampling and its end


def test_what_is_not_asked_for_is_sampled_by_the_adapter_s_rule(client: openai.OpenAI, decoder: Decoder) -> None:
    rule = decoder.rule
    asked = {"temperature": rule.temperature, "top_p": rule.top_p, "extra_body": {"top_k": rule.top_k, "min_p": 0}}
    default, same = (
        client.completions.create(model=NAME, prompt=PROMPT, seed=3, max_tokens=50, **options).choices[0].text
        for options in ({}, asked)
    )
    assert default == same


def test_sampling_is_each_request_s_own(client: openai.OpenAI) -> None:
    def text(seed: int, **options: object) -> str:
        answer = client.completions.create(model=NAME, prompt=PROMPT, seed=seed, max_tokens=30, **options)
        return answer.choices[0].text

    assert text(1, temperature=0) == text(2, temperature=0) != text(1) != text(2)
    assert text(1, extra_body={"top_k": 1}) == text(1, temperature=0)
    assert text(1, top_p=1e-6) == text(1, temperature=0)
    assert text(1, extra_body={"min_p": 1.0}) == text(1, temperature=0)
    assert text(1, temperature=0, extra_body={"repetition_penalty": 3.0}) != text(1, temperature=0)
    assert text(1, extra_body={"top_k": -1}) != text(1)


def test_a_biased_token_is_written_or_never_written(client: openai.OpenAI, tokenizer) -> None:
    token = tokenizer.convert_tokens_to_ids("Z")
    wanted = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=8, logit_bias={str(token): 100})
    assert wanted.choices[0].text == "Z" * 8
    token = tokenizer.convert_tokens_to_ids("b")
    texts = [
        client.completions.create(model=NAME, prompt=PROMPT, max_tokens=60, seed=1, logit_bias=bias).choices[0].text
        for bias in ({}, {str(token): -100})
    ]
    assert "b" in texts[0]
    assert "b" not in texts[1]


def test_an_end_token_may_be_put_off_or_ignored(client: openai.OpenAI) -> None:
    def lengths(**extra: object) -> list[int]:
        answer = client.completions.create(
            model=NAME, prompt=PROMPT, seed=0, n=8, max_tokens=60, logprobs=0, extra_body=extra
        )
        return [len(choice.logprobs.tokens) for choice in answer.choices]

    free = lengths()
    assert min(free) < 50
    assert min(lengths(min_tokens=50)) > 50
    assert set(lengths(ignore_eos=True)) == {60}


def test_a_text_ends_before_a_stop_string_however_it_is_sent(client: openai.OpenAI) -> None:
    options = {"seed": 4, "max_tokens": 100, "extra_body": {"ignore_eos": True}}
    whole, chunks = streamed(client, **options)
    assert len(whole) > 20
    for stop in (whole[7:10], [whole[5:8], "never", whole[12:14]], whole[:1]):
        stops = [stop] if isinstance(stop, str) else stop
        end = min(whole.find(one) for one in stops if one in whole)
        text, chunks = streamed(client, stop=stop, **options)
        answer = client.chat.completions.create(model=NAME, messages=CHAT, stop=stop, **options)
        assert text == answer.choices[0].message.content == whole[:end]
        assert answer.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens < 100


def test_a_stop_string_that_never_comes_changes_nothing(client: openai.OpenAI) -> None:
    whole, _ = streamed(client, seed=4, max_tokens=30)
    assert streamed(client, seed=4, max_tokens=30, stop=[whole[-2:] + "#", "never"])[0] == whole


# Log-probabilities


def test_logprobs_of_a_chat_cover_every_token_and_sum_to_its_text(client: openai.OpenAI) -> None:
    options = {"model": NAME, "messages": CHAT, "seed": 3, "max_tokens": 30, "logprobs": True, "top_logprobs": 3}
    answer = client.chat.completions.create(**options)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for token in content:
        assert len(token.top_logprobs) == 3
        values = [top.logprob for top in token.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert token.logprob <= values[0] <= 0
        assert token.bytes == (None if "�" in token.token else list(token.token.encode()))
    streamed_content = [
        token
        for chunk in client.chat.completions.create(stream=True, **options)
        for token in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert [token.token for token in streamed_content] == [token.token for token in content]
    assert [token.logprob for token in streamed_content] == pytest.approx([token.logprob for token in content])
    assert (
        client.chat.completions.create(**{**options, "top_logprobs": None, "logprobs": None}).choices[0].logprobs
        is None
    )
    chosen = client.chat.completions.create(**{**options, "top_logprobs": None}).choices[0].logprobs.content
    assert [(token.logprob, token.top_logprobs) for token in chosen] == [(token.logprob, []) for token in content]


def test_logprobs_of_a_completion_say_where_each_token_begins(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=NAME, prompt=PROMPT, seed=3, max_tokens=30, logprobs=2)
    (choice,) = answer.choices
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == answer.usage.completion_tokens
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    for token, offset, best in zip(logprobs.tokens, logprobs.text_offset, logprobs.top_logprobs, strict=True):
        # Half a character before it is shown with it.
        assert "�" in token or choice.text[offset:].lstrip("�").startswith(token)
        assert 1 <= len(best) <= 2  # half characters share a text


# Refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 100}, "more texts than the 72"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop: List should have at most 4 items"),
        ({"ptp": {"bugdet": 3}}, "ptp.bugdet: Extra inputs are not permitted"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 201}, "200 at most"),
        ({"min_tokens": 30, "max_tokens": 20}, "min_new_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"seed": True}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a" * 300]}, "stop"),
        ({"top_logprobs": 2}, "logprobs to be true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"9999999": 1}}, "bias"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"tools": [{"type": "function"}]}, "tools is not served here"),
        ({"response_format": {"type": "json_object"}}, "response_format is not served here"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is not served here"),
        ({"best_of": 3}, "best_of is not served here"),
        ({"temprature": 1}, "temprature is no field"),
        ({"ptp": {"budget": -1}}, "ptp"),
        ({"ptp": {"buget": 1}}, "ptp"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "unknown role 'robot'"),
        ({"messages": [{"role": "user"}]}, "neither content nor tool calls"),
        ({"messages": [{"role": "user", "content": "long " * 300}]}, "this server takes 255"),
    ],
    ids=str,
)
def test_a_bad_value_is_refused_by_name(url: str, options: dict[str, object], words: str) -> None:
    answer = httpx2.post(f"{url}/v1/chat/completions", json={"messages": CHAT, **options})
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]
    assert "\n" not in error["message"]


def test_what_asks_for_nothing_is_no_reason_to_refuse(client: openai.OpenAI) -> None:
    nothing = {"tools": [], "frequency_penalty": 0, "presence_penalty": 0.0, "response_format": {"type": "text"}}
    nothing |= {"user": "me", "metadata": {"a": "b"}, "store": False, "n": None, "stop": None, "logprobs": False}
    answer = client.chat.completions.create(model=NAME, messages=CHAT, max_tokens=3, extra_body=nothing)
    assert answer.choices[0].finish_reason


def test_what_is_not_there_is_not_found(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'other' here; this server has 'tiny'") as caught:
        client.chat.completions.create(model="other", messages=CHAT)
    assert caught.value.code == "model_not_found"
    for path in ("/v1/embeddings", "/docs", "/openapi.json", "/v1/models/other"):
        answer = httpx2.get(f"{url}{path}")
        assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")
    assert httpx2.get(f"{url}/v1/completions").status_code == 405


def test_the_model_is_listed_with_what_it_takes(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model == client.models.retrieve(NAME)
    assert (model.id, model.max_model_len) == (NAME, 256)
    assert model.ptp["sampling"] == {"temperature": 0.7, "top_k": 4, "top_p": 1, "min_p": 0}


def test_a_model_without_a_chat_template_says_so(new_service: Callable[..., Service], tokenizer) -> None:
    service, template = new_service(), tokenizer.chat_template
    tokenizer.chat_template = None
    try:
        with running(service) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.BadRequestError, match="this model has no chat template: use /v1/completions"):
                client.chat.completions.create(model=NAME, messages=CHAT)
            assert client.completions.create(model=NAME, prompt=PROMPT).choices[0].finish_reason
            assert not client.models.retrieve(NAME).ptp["has_chat_template"]
    finally:
        tokenizer.chat_template = template


# Metrics


def counts(url: str) -> dict[str, float]:
    """Every sample by its name and its labels other than the model's."""
    text = httpx2.get(f"{url}/metrics").text
    found = re.findall(r'^([\w:]+)\{(?:(.+),)?model_name="tiny"(?:,(.+))?\} (\S+)$', text, re.MULTILINE)
    return {name + (before or after): float(value) for name, before, after, value in found}


def test_metrics_are_the_sums_over_all_answers(new_service: Callable[..., Service]) -> None:
    with running(new_service()) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        options = {"model": NAME, "prompt": PROMPT, "n": 2, "max_tokens": 15}
        stops = [None, None, "a", "x"]
        answers = [client.completions.create(**options, seed=seed, stop=stop) for seed, stop in enumerate(stops)]
        found = counts(url)
    choices = [choice for answer in answers for choice in answer.choices]
    assert found["vllm:spec_decode_num_draft_tokens_total"] == sum(each.ptp["num_draft_tokens"] for each in choices)
    accepted = sum(each.ptp["num_accepted_tokens"] for each in choices)
    assert found["vllm:spec_decode_num_accepted_tokens_total"] == accepted > 0
    place = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    per_place = [value for name, value in found.items() if name.startswith(place)]
    assert per_place == sorted(per_place, reverse=True)
    assert sum(per_place) == accepted
    assert 0 < found["vllm:spec_decode_num_drafts_total"] <= found["ptp:text_calls_total"]
    assert found["ptp:text_calls_total"] == sum(each.ptp["num_calls"] for each in choices)
    assert found["vllm:generation_tokens_total"] == sum(answer.usage.completion_tokens for answer in answers)
    assert found["vllm:prompt_tokens_total"] == 2 * sum(answer.usage.prompt_tokens for answer in answers)
    reasons = Counter(choice.finish_reason for choice in choices)
    for reason, number in reasons.items():
        assert found[f'vllm:request_success_totalfinished_reason="{reason}"'] == number
    assert len(reasons) == 2
    assert found["vllm:time_to_first_token_seconds_count"] == found["vllm:e2e_request_latency_seconds_count"] == 8
    assert found["vllm:num_requests_running"] == found["vllm:num_requests_waiting"] == 0


# Docs


def test_what_the_page_of_the_server_shows_runs_as_it_stands(url: str, capsys: pytest.CaptureFixture) -> None:
    page, there = ROOT / "docs" / "serve.md", "http://127.0.0.1:8000"
    for code in blocks(page, "python"):
        exec(code.replace(there, url), {})
        assert capsys.readouterr().out
    asked = [command.words for shell in blocks(page, "sh") for command in commands(shell) if command.words[0] == "curl"]
    assert asked
    for _, address, _, header, _, body in asked:
        name, _, value = header.partition(": ")
        answer = httpx2.post(address.replace(there, url), content=body, headers={name: value})
        assert answer.json()["choices"][0]["ptp"]["seed"] == json.loads(body)["seed"]
