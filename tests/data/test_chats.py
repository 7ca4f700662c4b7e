import json
import os
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ptp.data.chats import TemplateError, chat_document, chat_prompts, encode, render, to_messages, to_tools
from ptp.errors import ConfigError, DataError

TEMPLATES = Path(__file__).parents[1] / "fixtures" / "chat_templates"
ASSETS = Path(os.environ.get("PTP_ASSETS", Path(__file__).parents[3] / "shared" / "assets"))

LLAMA_3_WORDS = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "Hello! How can I help you today? I think that the answer is 42.\n\nThe user asked the assistant.\n",
    "USER: hi ASSISTANT: hello there\n<think>\n\n</think>\n\n<|user|>\nhi\n<|assistant|>\nhello\n\n\n  \n",
    "système élève naïve\n\n\n\nassistant assistant user user \n \n hello hello hello",
] * 3


@dataclass(frozen=True)
class Family:
    """A chat template, the kind of tokenizer its models have, and what they generate.

    answer(content, is_last): the text of an assistant turn from the end of the generation prompt on.
    """

    special: tuple[str, ...]
    end: str
    answer: Callable[[str, bool], str]
    bos: str | None = None
    sentencepiece: bool = False
    system: bool = True
    nfc: bool = False


def chatml(content: str, is_last: bool) -> str:
    return f"{content}<|im_end|>"


def qwen(content: str, is_last: bool) -> str:
    return f"<think>\n\n</think>\n\n{content.lstrip(chr(10))}<|im_end|>" if is_last else f"{content}<|im_end|>"


LLAMA_3 = Family(
    ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"),
    "<|eot_id|>",
    lambda content, is_last: f"{content.strip()}<|eot_id|>",
    bos="<|begin_of_text|>",
)
CHATML = Family(("<|im_start|>", "<|im_end|>"), "<|im_end|>", chatml)
FAMILIES = {
    "llama-3": LLAMA_3,
    "llama-3.1": LLAMA_3,
    "qwen-3": Family(("<|im_start|>", "<|im_end|>"), "<|im_end|>", qwen, nfc=True),
    "gemma-3": Family(
        ("<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
        lambda content, is_last: f"{content.strip()}<end_of_turn>",
        bos="<bos>",
        sentencepiece=True,
    ),
    # The system message stands in the last turn, if that is the user's: see the tests below.
    "mistral-v3": Family(
        ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]"),
        "</s>",
        lambda content, is_last: f" {content.strip()}</s>",
        bos="<s>",
        sentencepiece=True,
        system=False,
    ),
    "chatml": CHATML,
    "chatml-generation": CHATML,
    "vicuna": Family(
        ("<s>", "</s>"), "</s>", lambda content, is_last: f" {content}</s>", bos="<s>", sentencepiece=True
    ),
    "zephyr": Family(("<s>", "</s>"), "</s>", lambda content, is_last: f"{content}</s>", bos="<s>", sentencepiece=True),
}


def byte_level(special: tuple[str, ...], nfc: bool) -> Tokenizer:
    """A tokenizer as Llama 3 and Qwen have it: their splitting into words, byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(LLAMA_3_WORDS, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def sentencepiece(special: tuple[str, ...]) -> Tokenizer:
    """A tokenizer as Llama 2, Mistral and Gemma have it: ▁ for spaces, no splitting, bytes for unknown characters."""
    tokenizer = Tokenizer(models.BPE())
    # Trained on words alone: no piece holds a space but its first character, none a line end.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    texts = [line for text in CORPUS for line in text.splitlines()]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    trained = json.loads(tokenizer.to_str())["model"]
    vocab = {
        token: place for place, token in enumerate([*trained["vocab"], *(f"<0x{byte:02X}>" for byte in range(256))])
    }
    merges = [tuple(merge) for merge in trained["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """A small tokenizer with a template of tests/fixtures; like the models', it begins plain text with the BOS."""
    family = FAMILIES[name]
    backend = sentencepiece(family.special) if family.sentencepiece else byte_level(family.special, family.nfc)
    if family.bos:
        place = backend.token_to_id(family.bos)
        backend.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, place)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=family.bos,
        eos_token=family.end,
        chat_template=(TEMPLATES / f"{name}.jinja").read_text(),
        clean_up_tokenization_spaces=False,
    )


def with_template(name: str, template: str) -> PreTrainedTokenizerFast:
    tokenizer = tokenizer_of(name)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def chat(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    return [{"role": "system", "content": system}] * (system is not None) + to_messages(list(contents))


def spoken(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], **options: Any) -> list[str]:
    """The text of every span."""
    ends = options.pop("end_token_ids", [tokenizer.eos_token_id])
    ids, spans = chat_document(tokenizer, messages, ends, **options)
    return [tokenizer.decode(ids[first:last]) for first, last in spans]


def error_of(call: Callable[[], object], kind: type[Exception] = DataError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- Messages ---------------------------------------------------------------------------------------------------------

HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    "value",
    [
        HI,
        [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
        [{"from": "prompter", "value": "Hi"}, {"from": "Bard", "value": "Hello"}],
        ["Hi", "Hello"],
        ("Hi", "Hello"),
    ],
)
def test_every_form_of_a_chat_gives_the_same_messages(value: object) -> None:
    assert to_messages(value) == HI


def test_what_arrow_fills_in_is_left_out_and_all_else_kept() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}], "name": None}
    answer = {"role": "ipython", "content": ["1"], "tool_call_id": "a", "tool_calls": []}
    parts = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}], "tool_calls": None}
    assert to_messages([parts, call, answer]) == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "tool", "content": ["1"], "tool_call_id": "a"},
    ]


def test_texts_in_parts_are_shown_as_texts() -> None:
    # Qwen 3's template would show nothing of a list, Llama's the list as Python writes it.
    parts = [[{"type": "text", "text": "Hi"}], [{"type": "text", "text": "Hello"}, {"type": "text", "text": "you"}]]
    messages = to_messages(
        [{"role": role, "content": content} for role, content in zip(("user", "gpt"), parts, strict=True)]
    )
    assert messages == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello\nyou"}]


def test_an_unknown_role_is_named_with_the_known_ones_and_the_remedy() -> None:
    value = [{"from": "human", "value": "Hi"}, {"from": "narrator", "value": "Hello"}]
    message = error_of(lambda: to_messages(value))
    assert all(part in message for part in ("message 2", "'narrator'", "data.roles", "human", "gpt"))
    assert [turn["role"] for turn in to_messages(value, {"Narrator": "assistant"})] == ["user", "assistant"]
    assert [turn["role"] for turn in to_messages(value[:1], {"human": "assistant"})] == ["assistant"]
    assert "'writer'" in error_of(lambda: to_messages(value, {"narrator": "writer"}), ConfigError)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Hi", "expected a list of messages; got str"),
        (None, "expected a list of messages; got NoneType"),
        (["Hi", {"role": "user", "content": "Hi"}], "message 1: expected the keys role and content"),
        ([{"speaker": "A", "text": "Hi"}], "got keys speaker, text"),
    ],
)
def test_what_is_no_chat_is_refused(value: object, expected: str) -> None:
    assert expected in error_of(lambda: to_messages(value))


def test_tools_are_read_from_a_list_or_from_json() -> None:
    tool = {"type": "function", "function": {"name": "f", "description": None}}
    lean = {"type": "function", "function": {"name": "f"}}
    assert to_tools([tool]) == to_tools(json.dumps([tool])) == [lean]
    assert to_tools(None) is to_tools("") is to_tools("[]") is None
    assert "not valid JSON" in error_of(lambda: to_tools("[{"))
    assert "expected a list of JSON objects" in error_of(lambda: to_tools('"f"'))


# --- Prompts ----------------------------------------------------------------------------------------------------------


def roles(prompts: list[list[dict[str, Any]]]) -> list[str]:
    return ["".join(message["role"][0] for message in prompt) for prompt in prompts]


def of_roles(letters: str) -> list[dict[str, Any]]:
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": names[letter], "content": letter} for letter in letters]


@pytest.mark.parametrize(
    ("messages", "each"),
    [
        ("sua", ["su"]),
        ("suaua", ["su", "suau"]),
        ("uau", ["u", "uau"]),
        ("uata", ["u", "uat"]),
        ("uat", ["u", "uat"]),
        # Nothing was asked before these assistant turns.
        ("aua", ["au"]),
        ("sa", []),
        ("uaa", ["u"]),
        ("s", []),
        ("", []),
    ],
)
def test_a_prompt_ends_wherever_the_assistant_is_to_answer(messages: str, each: list[str]) -> None:
    assert roles(chat_prompts(of_roles(messages), "each")) == each
    assert roles(chat_prompts(of_roles(messages), "first")) == each[:1]


# --- Rendering --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        (
            "llama-3",
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            "llama-3.1",
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
            "Today Date: 26 Jul 2024\n\nBe kind.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            "qwen-3",
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("gemma-3", "<bos><start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n<start_of_turn>model\n"),
        ("mistral-v3", "<s>[INST] Be kind.\n\nHi[/INST]"),
        (
            "chatml",
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("vicuna", "<s>Be kind. USER: Hi ASSISTANT:"),
        ("zephyr", "<|system|>\nBe kind.</s>\n<|user|>\nHi</s>\n<|assistant|>\n"),
    ],
)
def test_prompts_are_what_the_model_was_trained_on(name: str, prompt: str) -> None:
    tokenizer = tokenizer_of(name)
    text = render(tokenizer, chat("Hi", system="Be kind."), generation_prompt=True)
    assert text == prompt


@pytest.mark.parametrize("name", FAMILIES)
def test_no_beginning_is_doubled(name: str) -> None:
    tokenizer, bos = tokenizer_of(name), FAMILIES[name].bos
    ids = encode(tokenizer, text := render(tokenizer, chat("Hi"), generation_prompt=True))
    assert ids == tokenizer.apply_chat_template(chat("Hi"), add_generation_prompt=True, return_dict=False)
    if bos:
        assert ids.count(tokenizer.bos_token_id) == text.count(bos) <= 1
        assert tokenizer(text)["input_ids"] == [tokenizer.bos_token_id, *ids]  # what would go wrong


@pytest.mark.parametrize("name", ["gemma-3", "mistral-v3"])
def test_a_template_that_raises_says_why_in_one_line(name: str) -> None:
    message = error_of(lambda: render(tokenizer_of(name), of_roles("uu"), generation_prompt=True), TemplateError)
    assert "roles must alternate user/assistant/user/assistant" in message


def test_whatever_a_template_raises_is_one_line() -> None:
    for template in ("{{ messages[0]['content'] + 1 }}", "{{ 1 / 0 }}", "{% if %}", "{{ raise_exception('a\nb') }}"):
        tokenizer = with_template("chatml", template)
        error_of(lambda tokenizer=tokenizer: render(tokenizer, HI, generation_prompt=True), TemplateError)
    error_of(lambda: render(tokenizer_of("chatml"), [], generation_prompt=True), TemplateError)


def test_a_message_without_content_is_refused_rather_than_written_as_nothing() -> None:
    messages = to_messages([{"role": "user", "content": None}])
    message = error_of(lambda: render(tokenizer_of("llama-3"), messages, generation_prompt=True), TemplateError)
    assert "neither content nor tool calls" in message


def test_a_missing_template_is_named() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    assert "--chat-template" in error_of(lambda: render(tokenizer, HI, generation_prompt=True))


# --- Spans ------------------------------------------------------------------------------------------------------------

WORDS = [
    "Hello",
    "think",
    "assistant",
    "USER:",
    "é",
    "e\u0301",
    "🙂",
    "名",
    ">",
    "answer",
    "\ue000",
    "\n",
    "\n\n",
    " ",
    "  ",
    "1",
]
"""Parts of contents: words that templates write too, characters of several bytes, white space of all kinds."""
CONTENTS = st.lists(st.sampled_from(WORDS), max_size=4).map("".join)
CHATS = st.lists(st.tuples(CONTENTS, CONTENTS), min_size=1, max_size=4).map(lambda turns: sum(turns, ()))


@pytest.mark.parametrize("name", FAMILIES)
@given(contents=CHATS, system=st.none() | CONTENTS, is_open=st.booleans())
def test_spans_are_what_the_assistant_generates(
    name: str, contents: tuple[str, ...], system: str | None, is_open: bool
) -> None:
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    messages = chat(*contents, *(["And?"] if is_open else []), system=system if family.system else None)
    ids, spans = chat_document(tokenizer, messages, [tokenizer.eos_token_id])
    text = render(tokenizer, messages, generation_prompt=False)
    assert ids == encode(tokenizer, text)
    flat = [edge for span in spans for edge in span]
    assert flat == sorted(set(flat))
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(spans) == len(answers)  # an empty answer still has its end token
    for place, (first, last) in zip(answers, spans, strict=True):
        prompt = encode(tokenizer, render(tokenizer, messages[:place], generation_prompt=True))
        expected = family.answer(messages[place]["content"], place == len(messages) - 1)
        found = tokenizer.decode(ids[first:last])
        if family.nfc:
            expected = unicodedata.normalize("NFC", expected)
        if family.sentencepiece:  # such a tokenizer begins text after a special token with a space of its own
            expected, found = expected.lstrip(" "), found.lstrip(" ")
        if ids[:first] == prompt:
            assert found == expected
        else:  # the token before the span reaches from the generation prompt into the answer
            assert ids[: first - 1] == prompt[: first - 1]
            assert expected.endswith(found) and len(found) < len(expected)
            assert set(tokenizer.decode(ids[first - 1])) <= set("\n ")


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_is_found_among_words_that_the_template_writes_too(name: str) -> None:
    tokenizer, family = tokenizer_of(name), FAMILIES[name]
    contents = ["think", "think", "assistant", "assistant", "ASSISTANT:", ">"]
    found = spoken(tokenizer, chat(*contents))
    expected = [family.answer(content, place == 2) for place, content in enumerate(contents[1::2])]
    assert [text.strip(" ") for text in found] == [text.strip(" ") for text in expected]


def test_a_token_that_reaches_into_the_answer_is_outside() -> None:
    for name in ("chatml", "chatml-generation"):
        tokenizer = tokenizer_of(name)
        ids, [(first, last)] = chat_document(tokenizer, chat("Hi", "\nHello"), [tokenizer.eos_token_id])
        assert tokenizer.decode(ids[first - 1]) == "\n\n"  # a line end of the header, and one of the answer
        assert tokenizer.decode(ids[first:last]) == "Hello<|im_end|>"


def test_offsets_without_their_leading_space_do_not_deceive() -> None:
    backend = Tokenizer.from_str(tokenizer_of("chatml").backend_tokenizer.to_str())
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=template)
    ids, [(first, last)] = chat_document(tokenizer, chat("Hi", "hello"), [tokenizer.eos_token_id])
    assert tokenizer.decode(ids[first - 1]) == " hello"
    assert tokenizer.decode(ids[first:last]) == "<|im_end|>"


@pytest.mark.parametrize(
    "marked",
    ["{{ m.content }}", "{{ m.content + '<|im_end|>' }}", "{{ m.content + '<|im_end|>\n' }}"],
    ids=["content", "with the end token", "and the line end"],
)
def test_markers_may_stand_before_or_after_the_end_token(marked: str) -> None:
    rest = "<|im_end|>\n".removeprefix(marked[12:-4].strip("'") if "+" in marked else "")
    template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    template += "{%- generation -%}" + marked + "{%- endgeneration -%}"
    template += "{{ '" + rest + "' }}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    tokenizer = with_template("chatml", template)
    assert spoken(tokenizer, chat("Hi", "Hello", "And", "")) == ["Hello<|im_end|>", "<|im_end|>"]


@pytest.mark.parametrize("name", ["chatml", "chatml-generation", "vicuna"])
def test_without_an_end_token_a_span_is_the_answer_alone(name: str) -> None:
    # A base model whose end token the template does not write, as Qwen's base models with ChatML.
    tokenizer = tokenizer_of(name)
    messages = chat("Hi", "Hello ", "And", "", "And", "hello!")
    assert [text.lstrip(" ") for text in spoken(tokenizer, messages, end_token_ids=[]) if text.strip()] == [
        "Hello ",
        "hello!",
    ]


def test_the_last_turn_may_be_left_unclosed() -> None:
    template = (TEMPLATES / "vicuna.jinja").read_text()
    tokenizer = with_template("vicuna", template.replace("+ eos_token", "+ ('' if loop.last else eos_token)"))
    assert spoken(tokenizer, chat("Hi", "Hello", "And", "hello")) == [" Hello</s>", " hello"]


PLAIN = "{% for m in messages %}{{ m.role + ':' + m.content + ('</s>' if m.role == 'user' else '\n') }}{% endfor %}"
PLAIN_PROMPT = "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
"""Closes the user's turns with an end token, the assistant's with a line end."""


def test_an_end_token_of_another_turn_closes_nothing() -> None:
    tokenizer = with_template("vicuna", PLAIN + PLAIN_PROMPT)
    assert spoken(tokenizer, chat("Hi", "Hello", "And", "hello")) == ["Hello", "hello"]
    headless = with_template("vicuna", PLAIN.replace("m.role + ':' +", ""))
    assert [text.strip(" ") for text in spoken(headless, chat("Hi", "  ", "And", "hello"))] == ["", "hello"]


def test_a_token_that_reaches_from_the_answer_into_the_template_is_outside() -> None:
    tokenizer = with_template("chatml", PLAIN + PLAIN_PROMPT)
    assert ".\n" in [tokenizer.decode(token) for token in encode(tokenizer, "Hello.\n")]
    assert spoken(tokenizer, chat("Hi", "Hello.")) == ["Hello"]


def test_any_of_several_end_tokens_closes_a_turn() -> None:
    end = "(eos_token if loop.last and message['role'] == 'assistant' else '<|im_end|>')"
    template = (TEMPLATES / "chatml.jinja").read_text().replace("'<|im_end|>'", end)
    tokenizer = with_template("chatml", template)
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    ends = tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])
    assert spoken(tokenizer, chat("Hi", "a", "And", "b"), end_token_ids=ends) == ["a<|im_end|>", "b</s>"]


@pytest.mark.parametrize("name", ["llama-3.1", "qwen-3", "chatml", "zephyr"])
def test_an_assistant_turn_that_opens_a_chat_answers_nothing(name: str) -> None:
    tokenizer = tokenizer_of(name)
    for opening in ("a", "sa"):
        found = spoken(tokenizer, [*of_roles(opening), *chat("Hi", "Hello")])
        assert [text.endswith("Hello" + FAMILIES[name].end) for text in found] == [True]


# Tools and reasoning

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL_CHAT = to_messages(
    [
        {"role": "user", "content": "How is Oslo?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "rain", "tool_call_id": "abcdefghi"},
        {"role": "assistant", "content": "It rains.", "tool_calls": None},
    ]
)
CALLS = {
    "llama-3.1": '{"name": "weather", "parameters": {"city": "Oslo"}}<|eot_id|>',
    "qwen-3": '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>',
    "mistral-v3": '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo"}, "id": "abcdefghi"}]</s>',
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_tool_calls_are_generated_and_their_results_are_not(name: str, tools: Any) -> None:
    tokenizer = tokenizer_of(name)
    call, answer = (re.sub("  +", " ", text).strip(" ") for text in spoken(tokenizer, TOOL_CHAT, tools=tools))
    assert call.replace("] [", "][") == CALLS[name].replace("] [", "][")
    assert answer == FAMILIES[name].answer("It rains.", True).strip(" ")
    text = render(tokenizer, TOOL_CHAT, generation_prompt=False, tools=tools)
    assert "rain" in text.replace("It rains", "") and ("The weather in a city." in text) == bool(tools)


def test_a_content_before_tool_calls_belongs_to_the_turn() -> None:
    messages = [TOOL_CHAT[0], {**TOOL_CHAT[1], "content": "Let me see."}, *TOOL_CHAT[2:]]
    assert spoken(tokenizer_of("qwen-3"), messages)[0] == "Let me see.\n" + CALLS["qwen-3"]


def test_a_tool_call_may_end_the_chat() -> None:
    assert spoken(tokenizer_of("llama-3.1"), TOOL_CHAT[:2]) == [CALLS["llama-3.1"]]


def test_a_tool_call_that_no_end_token_closes_is_refused() -> None:
    # An end token after the tool's result would take the result with it.
    template = (TEMPLATES / "llama-3.1.jinja").read_text()
    tokenizer = with_template("llama-3.1", "{%- set builtin_tools = [] %}" + template)
    message = error_of(lambda: chat_document(tokenizer, TOOL_CHAT, [tokenizer.eos_token_id]), TemplateError)
    assert "no end token of the model closes a tool call" in message


def test_reasoning_is_generated_in_the_last_turn_and_gone_from_earlier_ones() -> None:
    contents = ["Hi", "<think>\nGreet.\n</think>\n\nHello", "And?", "<think>\nMore.\n</think>\n\nthink"]
    expected = ["Hello<|im_end|>", "<think>\nMore.\n</think>\n\nthink<|im_end|>"]
    assert spoken(tokenizer_of("qwen-3"), chat(*contents)) == expected
    messages = chat("Hi", "Hello", "And?", "think")
    messages[1]["reasoning_content"], messages[3]["reasoning_content"] = "Greet.", "More."
    assert spoken(tokenizer_of("qwen-3"), messages) == expected


def test_a_template_that_rewrites_what_was_said_is_refused_with_a_remedy() -> None:
    def error(name: str, messages: list[dict[str, Any]], **options: Any) -> str:
        tokenizer = tokenizer_of(name)
        return error_of(lambda: chat_document(tokenizer, messages, [tokenizer.eos_token_id], **options), TemplateError)

    # Mistral shows a system message only while a user's turn is the last, and tools in the last user's turn.
    assert "--drop-system" in error("mistral-v3", chat("Hi", "Hello", system="Be kind."))
    assert "prompt-distill" in error("mistral-v3", [*TOOL_CHAT, *chat("Hi", "Hello")], tools=TOOLS)


@pytest.mark.parametrize(
    ("shown", "messages"),
    [
        ("{{ m.content | length }}", HI),
        ("{{ m.content }}{{ m.content | length }}", HI),
        ("{{ (m.content or '') | length }}{{ m.content }}", TOOL_CHAT),
    ],
)
def test_a_template_that_hides_where_an_answer_ends_is_refused(shown: str, messages: list[dict[str, Any]]) -> None:
    tokenizer = with_template("chatml", "{% for m in messages %}" + shown + "<|im_end|>{% endfor %}")
    message = error_of(lambda: chat_document(tokenizer, messages, [tokenizer.eos_token_id]), TemplateError)
    assert "does not show where a message stands" in message


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast = False

    assert "a fast tokenizer is needed" in error_of(lambda: chat_document(Slow(), HI, []))  # type: ignore[arg-type]


# Real tokenizers and chats


@pytest.mark.parametrize("name", ["vicuna", "zephyr"])
@pytest.mark.parametrize("model", ["stories260K", "babyllama"])
def test_real_chats_keep_every_answer(name: str, model: str) -> None:
    dialogues = ASSETS / "corpora" / "dialogues"
    if not dialogues.is_dir():
        pytest.skip(f"{dialogues} is absent; set PTP_ASSETS to the folder that holds corpora/dialogues")
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "models" / model)
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    with (dialogues / "schema-guided-dev.jsonl").open() as lines:
        chats = [json.loads(line)["messages"] for line, _ in zip(lines, range(20), strict=False)]
    chats += [row["conversations"] for row in json.loads((dialogues / "sharegpt-format-sample.json").read_text())[::25]]
    for value in chats:
        messages = to_messages(value)
        contents = [message["content"] for message in messages if message["role"] == "assistant"]
        assert [text.strip() for text in spoken(tokenizer, messages)] == [f"{content}</s>" for content in contents]
