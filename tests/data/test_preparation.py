import datetime
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from ptp.config import DataConfig, SchemeTurn
from ptp.data import preparation as module
from ptp.data.documents import Document
from ptp.data.preparation import Preparation, batches, cut_spans, fill
from ptp.demo import make_tokenizer
from ptp.errors import ConfigError, DataError

TEMPLATES = Path(__file__).parents[1] / "fixtures" / "chat_templates"
BOS, END, OTHER_END = 0, 1, 2
"""Of `tokenizer_of`: <s>, </s> and <pad>, which stands for a further end token of the model."""

ENDS = [END, OTHER_END]
HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
MORE = [*HI, {"role": "user", "content": "More"}, {"role": "assistant", "content": "No"}]
SYSTEM = {"role": "system", "content": "Be kind."}


@cache
def tokenizer_of(template: str = "zephyr") -> PreTrainedTokenizerFast:
    """The demo's tokenizer, which begins a plain text with <s>, with one of the templates of tests/fixtures."""
    tokenizer = make_tokenizer(["Hi Hello More No. What is 1? Be kind."], 262)
    marks = ["<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]
    tokenizer.add_tokens(marks, special_tokens=True)
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    return tokenizer


def preparation(
    mode: str, template: str = "zephyr", max_tokens: int = 1000, ends: list[int] = ENDS, **data: Any
) -> Preparation:
    if mode in ("prompt-distill", "full-chat"):
        data = {"column": "messages", **data}
    return Preparation(DataConfig(path="data", mode=mode, **data), tokenizer_of(template), max_tokens, ends)


def texts_of(documents: list[Document], template: str = "zephyr") -> list[str]:
    return [tokenizer_of(template).decode(document.ids) for document in documents]


def trained_of(document: Document) -> list[str]:
    return [tokenizer_of().decode(document.ids[first:last]) for first, last in document.spans]


def chats(*conversations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"messages": messages} for messages in conversations]


def error_of(call: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- Prompts from a scheme --------------------------------------------------------------------------------------------


def test_a_scheme_is_filled_with_columns_and_begins_as_the_model_s_texts_do() -> None:
    prepared = preparation("prompt-scheme-distill", prompt_scheme="{{}} {n:02d}: {q}\n")
    rows = [{"q": "one", "n": 1, "unused": None}, {"q": "{two}", "n": 2}]
    documents = list(prepared.documents(rows))
    assert texts_of(documents) == ["<s>{} 01: one\n", "<s>{} 02: {two}\n"]
    assert [document.ids.tolist().count(BOS) for document in documents] == [1, 1]
    assert all((document.spans, document.finished) == ((), False) for document in documents)
    assert documents[0].ids.dtype == np.int32


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("zephyr", "<|system|>\nBe kind.</s>\n<|user|>\nWhat is 1?</s>\n<|assistant|>\n```python\n"),
        ("vicuna", "<s>Be kind. USER: What is 1? ASSISTANT:```python\n"),
        ("mistral-v3", "<s>[INST] Be kind.\n\nWhat is 1?[/INST]```python\n"),
    ],
)
def test_a_scheme_of_turns_leaves_the_assistant_s_last_one_open_after_what_it_begins_with(
    template: str, prompt: str
) -> None:
    turns = (
        SchemeTurn(role="system", content="Be kind."),
        SchemeTurn(role="user", content="What is {n}?"),
        SchemeTurn(role="assistant", content="```{language}\n"),
    )
    rows = [{"n": 1, "language": "python"}]
    opened = list(preparation("prompt-scheme-distill", template, prompt_scheme=turns).documents(rows))
    assert texts_of(opened, template) == [prompt]
    # Without the turn the prompt ends where the template says that an answer begins.
    closed = list(preparation("prompt-scheme-distill", template, prompt_scheme=turns[:2]).documents(rows))
    assert texts_of(closed, template) == [prompt.removesuffix("```python\n")]


def test_an_assistant_s_turn_that_is_filled_with_nothing_is_open_too() -> None:
    turns = (SchemeTurn(role="user", content="Hi"), SchemeTurn(role="assistant", content="{begin}"))
    prepared = preparation("prompt-scheme-distill", prompt_scheme=turns)
    assert texts_of(list(prepared.documents([{"begin": ""}]))) == ["<|user|>\nHi</s>\n<|assistant|>\n"]


def test_a_missing_column_is_named_with_those_there_are() -> None:
    rows = [{"text": "a"}, {"x": 1, "prompt": "a"}]
    for scheme in ("{text}", (SchemeTurn(role="user", content="{text}"),)):
        prepared = preparation("prompt-scheme-distill", prompt_scheme=scheme)
        message = error_of(lambda prepared=prepared: list(prepared.documents(rows)))
        assert message == "row 2 has no column 'text' for the prompt scheme; it has: prompt, x"


def test_system_messages_are_dropped_before_it_is_decided_what_is_answered() -> None:
    roles = {"s": "system", "u": "user", "a": "assistant"}
    chat = [{"role": roles[letter], "content": f"{letter}{place}"} for place, letter in enumerate("suasua")]
    prompts = texts_of(list(preparation("prompt-distill", drop_system=True).documents(chats(chat))))
    said = [[message["content"] for message in chat if message["content"] in prompt] for prompt in prompts]
    assert said == [["u1"], ["u1", "a2", "u4"]]


def test_a_cell_without_a_value_is_empty_in_a_prompt_and_a_chat_without_one_is_counted() -> None:
    assert fill("{a}: {b}", {"a": "q", "b": None}, 1) == "q: "
    for mode in ("prompt-distill", "full-chat"):
        prepared = preparation(mode)
        assert list(prepared.documents([{"messages": None}])) == []
        assert prepared.left_out.total() == 1


@pytest.mark.parametrize("scheme", ["{text", "text}", "{}", "{0}", "{text.foo}", "{text!x}", "{n[0]}", "{none[0]}"])
def test_a_scheme_that_cannot_be_filled_is_an_error_of_one_line(scheme: str) -> None:
    assert "scheme" in error_of(lambda: fill(scheme, {"text": "a", "n": 1, "none": None}, 1))


def test_prompts_are_left_out_by_their_length_and_the_others_keep_their_number() -> None:
    prepared = preparation("prompt-scheme-distill", max_tokens=4, prompt_scheme="{text}")
    documents = list(prepared.documents([{"text": text} for text in ("xyz", "xyzxyz", "xy", "xyzxy")]))
    assert texts_of(documents) == ["<s>xyz", "<s>xy"]
    assert [document.number for document in documents] == [0, 2]
    assert prepared.left_out == {"longer than 4 tokens": 2}


def test_a_prompt_of_no_token_is_counted_as_empty() -> None:
    prepared = preparation("prompt-scheme-distill", prompt_scheme="{text}")
    prepared.tokenizer = make_tokenizer(["a"], 259)
    prepared.tokenizer.backend_tokenizer.post_processor = None
    assert [document.number for document in prepared.documents([{"text": ""}, {"text": "a"}])] == [1]
    assert prepared.left_out == {"empty": 1}


# --- Prompts from chats -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["zephyr", "chatml", "vicuna", "mistral-v3", "llama-3", "gemma-3"])
def test_a_chat_s_prompts_are_its_beginnings_as_transformers_writes_them(template: str) -> None:
    documents = list(preparation("prompt-distill", template).documents(chats(MORE)))
    tokenizer = tokenizer_of(template)
    expected = [
        tokenizer.apply_chat_template(MORE[:end], add_generation_prompt=True, return_dict=False) for end in (1, 3)
    ]
    assert [document.ids.tolist() for document in documents] == expected
    assert all(document.ids.tolist().count(BOS) <= 1 for document in documents)


def test_every_turn_or_the_first_is_answered_and_system_messages_stay_unless_dropped() -> None:
    rows = chats([SYSTEM, *MORE])
    first, second = "<|user|>\nHi</s>\n", "<|assistant|>\nHello</s>\n<|user|>\nMore</s>\n"
    system, opened = "<|system|>\nBe kind.</s>\n", "<|assistant|>\n"
    for settings_, expected in [
        ({}, [system + first + opened, system + first + second + opened]),
        ({"turns": "first"}, [system + first + opened]),
        ({"drop_system": True}, [first + opened, first + second + opened]),
    ]:
        documents = list(preparation("prompt-distill", **settings_).documents(rows))
        assert texts_of(documents) == expected


def test_prompts_of_one_chat_are_held_out_together_and_those_of_another_are_not() -> None:
    documents = list(preparation("prompt-distill").documents(chats(MORE, HI, MORE)))
    groups = [document.group for document in documents]
    assert groups[:2] == [groups[0]] * 2 == groups[3:]
    assert groups[2] != groups[0]


def test_what_gives_no_prompt_is_counted_by_its_reason_and_the_others_keep_their_number() -> None:
    prepared = preparation("prompt-distill", "mistral-v3", max_tokens=20)
    refused = [HI[0], HI[0]]
    documents = list(prepared.documents(chats(HI, [], [SYSTEM], refused, [{**HI[0], "content": "long " * 20}], HI)))
    reasons = sorted(prepared.left_out.items())
    assert [(reason.partition(":")[0], count) for reason, count in reasons] == [
        ("longer than 20 tokens", 1),
        ("nothing to answer", 2),
        ("the chat template refuses the chat", 1),
    ]
    assert "roles must alternate" in reasons[2][0]
    assert [document.number for document in documents] == [0, 3]


@pytest.mark.parametrize("mode", ["prompt-distill", "full-chat"])
def test_what_does_not_fit_the_settings_names_its_row_and_the_remedy(mode: str) -> None:
    strange = [HI[0], {"role": "narrator", "content": "Hm"}]
    rows = [*chats(HI, strange)]
    message = error_of(lambda: list(preparation(mode).documents(rows)))
    assert message.startswith("row 2: message 2 has the unknown role 'narrator'")
    assert message.endswith("map it in data.roles")
    assert list(preparation(mode, roles={"narrator": "assistant"}).documents(rows))
    message = error_of(lambda: list(preparation(mode, column="chat").documents(rows)))
    assert message == "row 1 has no column 'chat' (data.column); it has: messages"
    message = error_of(lambda: list(preparation(mode).documents([*chats(HI), {"messages": "Hi"}])))
    assert message == "row 2: expected a list of messages; got str"
    with pytest.raises(ConfigError, match=r"data\.roles maps to 'writer'"):
        list(preparation(mode, roles={"narrator": "writer"}).documents(rows))


TOOL = {"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {}}}


@pytest.mark.parametrize("mode", ["prompt-distill", "full-chat"])
@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tools_of_a_column_are_shown_by_the_template(mode: str, tools: object) -> None:
    rows = [{"messages": HI, "functions": tools}, {"messages": HI, "functions": None}]
    with_tools, without = texts_of(
        list(preparation(mode, "mistral-v3", tools="functions").documents(rows)), "mistral-v3"
    )
    assert with_tools.count('[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "add"') == 1
    assert "AVAILABLE_TOOLS" not in without
    assert "AVAILABLE_TOOLS" not in texts_of(list(preparation(mode, "mistral-v3").documents(rows)), "mistral-v3")[0]


@pytest.mark.parametrize("mode", ["prompt-distill", "full-chat"])
def test_tools_that_cannot_be_read_name_their_row(mode: str) -> None:
    prepared = preparation(mode, tools="functions")
    message = error_of(lambda: list(prepared.documents([{"messages": HI, "functions": "[{"}])))
    assert message.startswith("row 1: tool definitions: not valid JSON")
    message = error_of(lambda: list(prepared.documents(chats(HI))))
    assert message == "row 1 has no column 'functions' (data.tools); it has: messages"


@pytest.mark.parametrize("mode", ["prompt-distill", "full-chat"])
def test_messages_may_hold_more_than_json_can(mode: str) -> None:
    times = [{**message, "timestamp": datetime.datetime(2023, 4, 9)} for message in HI]
    assert texts_of(list(preparation(mode).documents(chats(times)))) == texts_of(
        list(preparation(mode).documents(chats(HI)))
    )


def test_without_a_chat_template_chats_are_refused() -> None:
    for mode in ("prompt-distill", "full-chat"):
        prepared = preparation(mode)
        prepared.tokenizer = make_tokenizer(["a"], 259)
        assert "no chat template" in error_of(lambda prepared=prepared: list(prepared.documents(chats(HI))))


# --- Chats ------------------------------------------------------------------------------------------------------------


def test_what_the_assistant_says_is_trained_up_to_its_end_token() -> None:
    (document,) = preparation("full-chat").documents(chats([SYSTEM, *MORE]))
    assert texts_of([document]) == [
        "<|system|>\nBe kind.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n"
        "<|user|>\nMore</s>\n<|assistant|>\nNo</s>\n"
    ]
    assert trained_of(document) == ["Hello</s>", "No</s>"]
    assert document.finished
    assert document.prompt_length == document.spans[0][0]


def test_a_chat_too_long_is_cut_off_and_given_no_end_token() -> None:
    (whole,) = preparation("full-chat").documents(chats(MORE))
    seen = set()
    for max_tokens in range(1, len(whole) + 1):
        prepared = preparation("full-chat", max_tokens=max_tokens)
        documents = list(prepared.documents(chats(MORE)))
        if max_tokens <= whole.spans[0][0]:
            assert documents == []
            assert prepared.left_out == {f"no assistant turn in {max_tokens} tokens": 1}
            continue
        (document,) = documents
        assert document.ids.tolist() == whole.ids[:max_tokens].tolist()
        trained = [place for begin, end in whole.spans for place in range(begin, end) if place < max_tokens]
        assert [place for begin, end in document.spans for place in range(begin, end)] == trained
        assert document.finished == (int(whole.ids[trained[-1]]) == END)
        seen.add(document.finished)
    assert seen == {True, False}


def test_a_chat_without_an_assistant_s_answer_is_counted() -> None:
    prepared = preparation("full-chat")
    assert texts_of(list(prepared.documents(chats(HI[:1], HI, [SYSTEM])))) == [
        "<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n"
    ]
    assert prepared.left_out == {"no assistant turn": 2}


def test_a_chat_that_the_template_refuses_is_counted_with_its_words() -> None:
    prepared = preparation("full-chat", "mistral-v3")
    assert len(list(prepared.documents(chats([HI[0], *HI], HI)))) == 1
    ((reason, count),) = prepared.left_out.items()
    assert reason.startswith("the chat template refuses the chat: After the optional system message")
    assert count == 1


def test_system_messages_of_chats_can_be_dropped() -> None:
    with_system, without = chats([SYSTEM, *HI]), chats(HI)
    (dropped,) = preparation("full-chat", drop_system=True).documents(with_system)
    (never,) = preparation("full-chat").documents(without)
    assert (dropped.ids.tolist(), dropped.spans, dropped.group) == (never.ids.tolist(), never.spans, never.group)


# --- Texts ------------------------------------------------------------------------------------------------------------

LETTERS = st.text(st.sampled_from("ab é\n🙂"), min_size=1, max_size=40)


@given(st.lists(LETTERS, max_size=4), st.integers(2, 12))
@settings(max_examples=60)
def test_pieces_cover_texts_exactly_and_only_the_end_of_a_text_ends(texts: list[str], max_tokens: int) -> None:
    documents = list(preparation("fixed", max_tokens=max_tokens).documents({"text": text} for text in texts))
    tokens = [token for document in documents for token in document.ids.tolist()]
    assert tokens == [token for text in texts for token in [*tokenizer_of()(text)["input_ids"], END]]
    assert all(0 < len(document) <= max_tokens for document in documents)
    assert sum(len(document) < max_tokens for document in documents) <= len(texts)
    # Every token is trained that stands after another, and the end token is one of them or stands alone.
    assert all(document.spans == ((1, len(document)),) for document in documents)
    assert all(END not in document.ids[:-1] for document in documents)
    assert sum(document.ids[-1] == END for document in documents) == len(texts)
    assert all(document.finished == (document.ids[-1] == END) for document in documents)
    assert [document.number for document in documents] == list(range(len(documents)))


def test_a_text_ends_with_the_model_s_own_end_token_and_with_no_second_one() -> None:
    rows = [{"text": "ab"}, {"text": "ab</s>"}]
    for ends, expected in [
        ([END], ["<s>ab</s>", "<s>ab</s>"]),
        # The tokenizer's own, if the model has several.
        ([OTHER_END, END], ["<s>ab</s>", "<s>ab</s>"]),
        ([OTHER_END], ["<s>ab<pad>", "<s>ab</s><pad>"]),
        ([], ["<s>ab", "<s>ab</s>"]),
    ]:
        assert texts_of(list(preparation("fixed", ends=ends).documents(rows))) == expected


def test_texts_without_content_are_counted() -> None:
    prepared = preparation("fixed")
    assert texts_of(list(prepared.documents([{"text": ""}, {"text": "ab"}, {"text": None}]))) == ["<s>ab</s>"]
    assert prepared.left_out == {"empty": 2}


def test_a_text_of_one_token_has_nothing_to_predict() -> None:
    prepared = preparation("fixed", ends=[])
    prepared.tokenizer = make_tokenizer(["a"], 259)
    prepared.tokenizer.backend_tokenizer.post_processor = None
    assert len(list(prepared.documents([{"text": "a"}, {"text": "ab"}]))) == 1
    assert prepared.left_out == {"empty": 1}


def test_the_column_of_texts_is_named_when_it_is_missing_or_holds_something_else() -> None:
    prepared = preparation("fixed", column="story")
    message = error_of(lambda: list(prepared.documents([{"story": "a"}, {"text": "b"}])))
    assert message == "row 2 has no column 'story' (data.column); it has: text"
    message = error_of(lambda: list(prepared.documents([{"story": HI}])))
    assert message == "row 1: column 'story' holds list; expected text"


def test_pieces_of_one_text_are_held_out_one_by_one_and_equal_pieces_together() -> None:
    documents = list(preparation("fixed", max_tokens=8).documents([{"text": "0123456789" * 9}, {"text": "0123456"}]))
    first = [tuple(document.ids.tolist()) for document in documents]
    assert len(set(first)) > 3
    assert len({document.group for document in documents}) == len(set(first))


# --- All of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["prompt-scheme-distill", "fixed"])
def test_texts_tokenised_together_are_those_tokenised_alone(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"text {number} " * (number % 4)} for number in range(20)]
    whole = preparation(mode)
    expected = list(whole.documents(rows))
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 30)
    parts = preparation(mode)
    found = list(parts.documents(rows))
    assert [(d.ids.tolist(), d.group, d.number) for d in found] == [
        (d.ids.tolist(), d.group, d.number) for d in expected
    ]
    assert parts.left_out == whole.left_out


def test_rows_are_read_as_documents_are_asked_for() -> None:
    read = []

    def rows() -> Any:
        for number in range(10**9):
            read.append(number)
            yield {"messages": HI}

    assert next(iter(preparation("full-chat").documents(rows()))).number == 0
    assert len(read) < 10


@given(st.lists(st.text(max_size=9)), st.integers(1, 20))
def test_batches_hold_every_text_in_order_and_no_more_than_they_need(texts: list[str], num_characters: int) -> None:
    found = list(batches(texts, num_characters))
    assert [text for batch in found for text in batch] == texts
    assert all(batch for batch in found)
    sizes = [sum(map(len, batch)) for batch in found]
    assert all(size >= num_characters for size in sizes[:-1])
    assert all(size - len(batch[-1]) < num_characters for size, batch in zip(sizes, found, strict=True))


@given(st.lists(st.integers(0, 30), max_size=8).map(sorted), st.integers(0, 30))
def test_cut_spans_hold_the_trained_tokens_before_the_cut(edges: list[int], length: int) -> None:
    spans = list(zip(edges[::2], edges[1::2], strict=False))
    found = [place for first, last in cut_spans(spans, length) for place in range(first, last)]
    assert found == [place for first, last in spans for place in range(first, last) if place < length]
