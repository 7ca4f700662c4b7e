import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from chats import RULE, open_chat, said, write_chat
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ptp.chat.chat import Chat
from ptp.chat.figures import FEWEST, Figures, plain_speed
from ptp.data.sources import load_source
from ptp.decoding.decoder import Decoder
from ptp.decoding.plain import decode_plainly
from ptp.errors import ConfigError, DataError, DecodingError
from ptp.model.ptp_model import PTPModel
from ptp.sampling import SamplingRule, uniform


@pytest.fixture(scope="module")
def directory(tiny_llama: Callable, random_adapter: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat(tmp_path_factory.mktemp("chat"), tiny_llama, random_adapter)


@pytest.fixture
def chat(directory: Path) -> Chat:
    return open_chat(directory, min_new_tokens=20)


def ids_read(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets the number of positions of every call to come."""
    counts: list[int] = []
    read = PTPModel.read

    def counted(self: PTPModel, inputs: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        counts.append(inputs.shape[1])
        return read(self, inputs, *arguments, **options)

    monkeypatch.setattr(PTPModel, "read", counted)
    return counts


def check_plain(chat: Chat) -> None:
    """Every answer is what the base model alone writes behind the same prompt with the same u."""
    for turn in chat.turns:
        plain = decode_plainly(chat.model.base_model, turn.request, chat.settings.rule)
        assert turn.token_ids == plain[: len(turn.token_ids)]


# What is written


def test_every_answer_of_a_chat_is_what_the_base_model_alone_would_have_written(chat: Chat) -> None:
    answers = [said(chat, text) for text in ("1 and 2?", "and 3?", "of course")]
    assert all(len(turn.token_ids) >= 20 for turn in chat.turns)
    check_plain(chat)
    assert [message["content"] for message in chat.messages] == [
        *("1 and 2?", answers[0], "and 3?", answers[1], "of course", answers[2])
    ]
    prompt = chat.tokenizer.decode(chat.turns[2].request.prompt_ids)
    assert prompt.startswith(f"<|user|>\n1 and 2?</s>\n<|assistant|>\n{answers[0]}</s>\n<|user|>\nand 3?</s>\n")


def test_a_next_turn_computes_only_what_is_new(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    said(chat, "1 and 2? " * 40)
    counts = ids_read(chat, monkeypatch)
    said(chat, "and?")
    turn = chat.turns[1]
    num_prompt = len(turn.request.prompt_ids)
    num_new = num_prompt - len(chat.turns[0].request.prompt_ids) - len(chat.turns[0].token_ids)
    assert num_prompt > 150
    assert num_new < 30
    # The last token written has no keys yet.
    assert turn.num_reused == num_prompt - num_new - 1
    assert counts[0] <= num_new + 1 + 12


def test_a_long_prompt_counts_what_was_cached_before_it_was_read(chat: Chat) -> None:
    said(chat, "1 and 2? " * 150)
    assert len(chat.turns[0].request.prompt_ids) > 512
    assert chat.turns[0].num_reused == 0


def test_the_same_texts_under_the_same_seed_give_the_same_chat(directory: Path, chat: Chat) -> None:
    texts = ["1 and 2?", "and 3?"]
    answers = [said(chat, text) for text in texts]
    assert [said(open_chat(directory, min_new_tokens=20), text) for text in texts[:1]] == answers[:1]
    chat.reset()
    assert [said(chat, text) for text in texts] == answers
    chat.reset()
    chat.set("seed", "1")
    assert [said(chat, text) for text in texts] != answers


def test_no_two_answers_share_a_u(chat: Chat) -> None:
    for number in range(3):
        said(chat, "1 and 2?")
        request = chat.turns[number].request
        places = len(request.prompt_ids) + torch.arange(len(request.u))
        assert request.u.tolist() == uniform(0, number, places).tolist()


def test_without_a_template_each_text_is_completed_by_itself(directory: Path) -> None:
    chat = open_chat(directory, templated=False)
    for text in ("1 and", "2 and"):
        ids = chat.tokenizer(text)["input_ids"]
        answer = said(chat, text)
        assert chat.turns[-1].request.prompt_ids == ids
    decoder = Decoder(chat.model, RULE, budget=0)
    alone = decoder.generate(ids, max_new_tokens=24, sequence=1)
    assert answer == chat.tokenizer.decode(alone.token_ids, skip_special_tokens=True)
    with pytest.raises(ConfigError, match="/system has no effect"):
        chat.tell("Add.")


def test_the_system_message_comes_first_until_it_is_taken_away(chat: Chat) -> None:
    def begins(start: str) -> bool:
        return chat.tokenizer.decode(chat.turns[-1].request.prompt_ids).startswith(f"{start}<|user|>\n1 and 2?</s>")

    said(chat, "1 and 2?")
    assert begins("")
    chat.tell("Add.")
    said(chat, "and 3?")
    assert begins("<|system|>\nAdd.</s>\n")
    chat.reset()
    said(chat, "1 and 2?")
    assert begins("<|system|>\nAdd.</s>\n")
    chat.tell(None)
    said(chat, "and 3?")
    assert begins("")
    check_plain(chat)


# Answers that end early


def test_a_stopped_answer_stays_and_the_chat_goes_on(chat: Chat) -> None:
    calls = iter([False, False, False, True])
    shown = "".join(piece.text for piece in chat.answer("1 and 2?", lambda: next(calls)))
    assert len(chat.turns[0].steps) == 3
    assert chat.turns[0].finish_reason is None
    assert chat.messages[1] == {"role": "assistant", "content": shown}
    said(chat, "and 3?")
    prompt = chat.tokenizer.decode(chat.turns[1].request.prompt_ids)
    assert prompt.startswith(f"<|user|>\n1 and 2?</s>\n<|assistant|>\n{shown}</s>\n<|user|>\nand 3?</s>\n")
    known = [*chat.turns[0].request.prompt_ids, *chat.turns[0].token_ids]
    assert chat.turns[1].num_reused == len(known) - 1
    check_plain(chat)


def test_an_answer_stopped_before_its_first_token_was_never_asked_for(chat: Chat) -> None:
    assert list(chat.answer("1 and 2?", lambda: True)) == []
    assert (chat.messages, chat.turns, chat.session.texts) == ([], [], [])
    expected = said(chat, "of course")
    chat.reset()
    assert said(chat, "of course") == expected


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError, DecodingError])
@pytest.mark.parametrize("call", [0, 3])
def test_a_call_that_is_broken_off_leaves_the_chat_whole(
    chat: Chat, error: type[BaseException], call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, calls = PTPModel.read, iter(range(1000))

    def broken(self: PTPModel, *arguments: object, **options: object) -> torch.Tensor:
        if next(calls) == call:
            raise error("broken off")
        return read(self, *arguments, **options)

    chat.set("temperature", "0.5")
    monkeypatch.setattr(PTPModel, "read", broken)
    with pytest.raises(error):
        said(chat, "1 and 2?")
    assert [len(turn.steps) for turn in chat.turns] == [call] * (call > 0)
    assert len(chat.messages) == 2 * (call > 0)
    said(chat, "and 3?")
    assert len(chat.turns[-1].token_ids) >= 20
    check_plain(chat)


def test_a_full_context_is_one_line_and_the_chat_stays_as_it_was(
    tiny_llama: Callable, random_adapter: Callable, tmp_path: Path
) -> None:
    directory = write_chat(tmp_path, tiny_llama, random_adapter, context=64)
    chat = open_chat(directory, max_new_tokens=20, min_new_tokens=20)
    with pytest.raises(DecodingError, match="context is 64: shorten the message"):
        said(chat, "1 and 2? " * 20)
    said(chat, "1?")
    assert not chat.is_full
    messages = list(chat.messages)
    with pytest.raises(DecodingError, match="context is 64: /reset begins a new one") as raised:
        said(chat, "of course 1 and 2 and 3 and 4 and")
    assert "\n" not in str(raised.value)
    assert chat.messages == messages
    chat.reset()
    chat.set("max_new_tokens", "99")
    chat.set("min_new_tokens", "60")
    said(chat, "1?")
    assert chat.is_full
    check_plain(chat)


# Settings


def test_a_setting_holds_from_the_next_answer_on_and_the_cache_stays(chat: Chat) -> None:
    said(chat, "1 and 2?")
    chat.set("temperature", "0")
    said(chat, "and 3?")
    assert chat.turns[1].num_reused > len(chat.turns[0].request.prompt_ids)
    plain = decode_plainly(chat.model.base_model, chat.turns[1].request, SamplingRule(temperature=0, top_k=20))
    assert chat.turns[1].token_ids == plain


def test_a_budget_that_is_set_changes_the_calls_and_not_the_text(chat: Chat) -> None:
    answer = said(chat, "1 and 2?")
    chat.set("budget", "0")
    chat.reset()
    assert said(chat, "1 and 2?") == answer
    assert chat.figures.num_drafts == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", "-1"), ("max_new_tokens", "0"), ("min_new_tokens", "99"), ("repetition_penalty", "0")],
)
def test_a_value_that_cannot_be_changes_nothing(chat: Chat, name: str, value: str) -> None:
    before, session = chat.settings, chat.session
    with pytest.raises((ConfigError, DecodingError)):
        chat.set(name, value)
    assert (chat.settings, chat.session) == (before, session)


# Figures


def test_figures_count_calls_and_time_all_but_an_answer_s_first(chat: Chat) -> None:
    for text in ("1 and 2?", "and 3?"):
        said(chat, text)
    figures, steps = chat.figures, [step for turn in chat.turns for step in turn.steps]
    assert figures.num_tokens == sum(len(turn.token_ids) for turn in chat.turns)
    assert figures.num_calls == len(steps)
    assert figures.timed_tokens == figures.num_tokens - sum(len(turn.steps[0].token_ids) for turn in chat.turns)
    assert figures.timed_seconds == sum(sum(turn.seconds[1:]) for turn in chat.turns)
    assert figures.num_drafts == sum(step.num_drafts for step in steps) > 0


def test_a_line_says_no_speed_that_was_not_measured() -> None:
    figures = Figures(30, 12, 20, 18, 28, 2.0)
    assert figures.described(7.0) == "30 tokens, 12 calls, 2.50 tokens per call, 14.0 tokens/s, 2.00x plain decoding"
    assert figures.described(None) == "30 tokens, 12 calls, 2.50 tokens per call, 14.0 tokens/s"
    assert Figures(1, 1, 0, 0, 0, 0.0).described(7.0) == "1 token, 1 call, 1.00 tokens per call"


def test_plain_decoding_is_timed_once_for_the_settings(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[object] = []
    monkeypatch.setattr("ptp.chat.chat.plain_speed", lambda *arguments: timed.append(arguments) or 5.0)
    chat.measure_plain_speed()
    assert not timed
    for _ in range(2):
        said(chat, "1 and 2?")
        chat.measure_plain_speed()
    assert timed == [(chat.model.base_model, chat.turns[0].request, RULE)]
    chat.set("temperature", "0")
    chat.measure_plain_speed()
    assert len(timed) == 2


def test_plain_decoding_takes_the_time_between_its_tokens(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    chat.set("max_new_tokens", "500")
    said(chat, "1 and 2?")
    request = chat.turns[0].request
    clock = iter(range(1000))
    monkeypatch.setattr("ptp.chat.figures.time.perf_counter", lambda: next(clock) / 50)
    assert plain_speed(chat.model.base_model, request, RULE) == pytest.approx(50)
    assert next(clock) == 65


def test_where_there_is_room_for_few_tokens_plain_decoding_has_no_figure(chat: Chat) -> None:
    chat.set("min_new_tokens", "0")
    for room, timed in ((FEWEST, False), (FEWEST + 1, True)):
        chat.set("max_new_tokens", str(room))
        said(chat, "1 and 2?")
        chat.measure_plain_speed()
        assert (chat.plain_speed is not None) == timed


# Saving


def test_a_saved_chat_is_openai_s_messages_and_a_data_set(chat: Chat, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    with pytest.raises(DataError, match="nothing to save"):
        chat.save(file)
    chat.tell("Add.")
    answer = said(chat, "1 und 2 für mich?")
    chat.save(file)
    messages = [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "1 und 2 für mich?"},
        {"role": "assistant", "content": answer},
    ]
    assert json.loads(file.read_text(encoding="utf-8")) == {"messages": messages}
    assert "für" in file.read_text(encoding="utf-8")
    assert load_source(str(file)).rows[0]["messages"] == messages


def test_a_file_that_is_there_is_replaced_only_if_told(chat: Chat, tmp_path: Path) -> None:
    said(chat, "1 and 2?")
    file = tmp_path / "chat.json"
    file.write_text("mine")
    with pytest.raises(DataError, match="/save --overwrite replaces it"):
        chat.save(file)
    assert file.read_text() == "mine"
    chat.save(file, overwrite=True)
    assert json.loads(file.read_text())["messages"] == chat.messages
    with pytest.raises(DataError, match="no file"):
        chat.save(tmp_path, overwrite=True)
    with pytest.raises(DataError, match="no directory"):
        chat.save(file / "below")
    assert list(tmp_path.iterdir()) == [file]


def test_text_comes_call_by_call_and_a_call_s_own_token_last(chat: Chat) -> None:
    pieces = chat.answer("1 and 2?")
    first = list(islice(pieces, 3))
    assert not chat.turns, "text comes before the answer is whole"
    every = [*first, *pieces]
    for number, step in enumerate(chat.turns[0].steps, start=1):
        of_call = [piece for piece in every if piece.call == number]
        assert [piece.accepted for piece in of_call] == [True] * step.num_accepted + [False] * (
            len(of_call) - step.num_accepted
        )


def test_a_completion_goes_on_with_the_space_that_an_answer_does_not_begin_with(chat: Chat) -> None:
    words = Tokenizer(models.WordLevel({f"▁w{number}": number for number in range(len(chat.tokenizer))}))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    completed = said(Chat(chat.model, tokenizer, chat.settings, templated=False), "w5 w6")
    assert completed.startswith(" w")
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert said(Chat(chat.model, tokenizer, chat.settings, templated=True), "w5 w6") == completed[1:]


def test_a_stop_string_ends_the_answer_with_the_token_that_completes_it(chat: Chat) -> None:
    answer = said(chat, "1 and 2?")
    stop = answer[4:6]
    chat.set("min_new_tokens", "0")
    chat.set("stop", stop)
    chat.reset()
    cut = said(chat, "1 and 2?")
    assert stop in cut
    assert answer.startswith(cut)
    assert len(cut) < len(answer)
    assert chat.turns[0].finish_reason == "stop"


def test_a_tokenizer_that_cannot_stream_is_refused(chat: Chat) -> None:
    class Slow(PreTrainedTokenizerFast):
        is_fast = False

    with pytest.raises(DataError, match="a fast tokenizer is needed"):
        Chat(chat.model, Slow(tokenizer_object=chat.tokenizer.backend_tokenizer), chat.settings, templated=False)
