"""What is shown of a text is never taken back, and is what the tokenizer makes of the whole."""

from itertools import takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ptp.streaming import TextStream


def byte_tokenizer() -> Tokenizer:
    """A token for each byte, whose id is the byte, and three of several bytes behind them."""
    letters = {letter: byte for byte, letter in byte_letters().items()}
    more = {"ab": 256, "Ã©": 257, "Ġx": 258}
    tokenizer = Tokenizer(models.BPE(letters | more, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


def byte_letters() -> dict[int, str]:
    """How byte-level tokenizers write each byte: as itself where it can be seen, else as a letter from 256 up."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in seen]
    letters = {byte: chr(byte) for byte in seen} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}
    assert set(letters.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    return letters


TOKENIZER = byte_tokenizer()
END = TOKENIZER.token_to_id("<|end|>")
TOKENS = st.lists(st.sampled_from([*b"ab c\n", *"é😀".encode(), 256, 257, 258, END]), max_size=30)


def written(token_ids: list[int], stop: list[str] = [], prompt: list[int] = []) -> tuple[list[str], TextStream]:  # noqa: B006
    """The text shown with each token, and in the end."""
    stream, shown = TextStream(TOKENIZER, prompt, stop), []
    for place, token in enumerate(token_ids):
        shown.append("".join(piece.text for piece in stream.push(token, place + 1, True)))
        if stream.is_stopped:
            return shown, stream
    return [*shown, "".join(piece.text for piece in stream.end(len(token_ids), True))], stream


@given(TOKENS)
def test_the_pieces_join_to_what_the_tokenizer_makes_of_the_whole(token_ids: list[int]) -> None:
    assert "".join(written(token_ids)[0]) == TOKENIZER.decode(token_ids)


@given(TOKENS)
def test_no_half_character_is_shown_before_the_end(token_ids: list[int]) -> None:
    shown, so_far = written(token_ids)[0], ""
    whole = TOKENIZER.decode(token_ids)
    for text in shown[:-1]:
        so_far += text
        assert whole.startswith(so_far)


@given(TOKENS, st.lists(st.text("abé cx\n😀", min_size=1, max_size=5), min_size=1, max_size=4))
def test_a_text_ends_before_the_first_stop_string_to_be_whole(token_ids: list[int], stop: list[str]) -> None:
    shown, stream = written(token_ids, stop)
    unstopped, so_far = written(token_ids)[0], ""
    expected = None
    for text in unstopped:
        so_far += text
        places = [so_far.find(each) for each in stop if each in so_far]
        if places:
            expected = so_far[: min(places)]
            break
    assert "".join(shown) == (so_far if expected is None else expected)
    assert stream.is_stopped == (expected is not None)


@given(TOKENS, st.lists(st.text("ab c", min_size=1, max_size=4), min_size=1, max_size=3))
def test_no_more_is_held_back_than_may_be_a_stop_string(token_ids: list[int], stop: list[str]) -> None:
    stream, shown, received = TextStream(TOKENIZER, [], stop), "", ""
    plain = TextStream(TOKENIZER, [])
    for token in token_ids:
        shown += "".join(piece.text for piece in stream.push(token, 1, True))
        if stream.is_stopped:
            return
        received += "".join(piece.text for piece in plain.push(token, 1, True))
        held = received[len(shown) :]
        assert received.startswith(shown)
        assert not held or any(each.startswith(held) for each in stop)


def test_a_stop_string_across_tokens_and_calls_is_never_shown() -> None:
    assert written([*b"ab\nc\nab"], ["\nab"])[0] == ["a", "b", "", "\nc", "", "", ""]


def test_pieces_keep_the_call_that_wrote_them_when_they_are_shown_later() -> None:
    stream = TextStream(TOKENIZER, [], ["abx"])
    assert stream.push(ord("a"), 1, True) == stream.push(ord("b"), 2, False) == []
    pieces = stream.push(ord("c"), 3, True)
    assert [(piece.text, piece.call, piece.accepted) for piece in pieces] == [
        ("a", 1, True),
        ("b", 2, False),
        ("c", 3, True),
    ]


def test_special_tokens_are_not_shown() -> None:
    assert "".join(written([*b"ab", END])[0]) == "ab"


def test_the_first_token_reads_as_it_does_behind_its_prompt() -> None:
    tokenizer = Tokenizer(models.BPE({"▁one": 0, "▁two": 1}, merges=[]))
    tokenizer.decoder = decoders.Metaspace()
    (piece,) = TextStream(tokenizer, [0]).push(1, 1, True)
    assert piece.text == " two"


def test_a_tokenizer_that_takes_back_what_it_wrote_ends_no_text() -> None:
    tokenizer = Tokenizer(models.BPE({letter: place for place, letter in enumerate("abcd")}, merges=[]))
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "xyz")])
    stream = TextStream(tokenizer, [])
    shown = [piece.text for token in range(4) for piece in stream.push(token, 1, True)]
    assert shown[0] == "a"
    assert "".join(takewhile(str.isascii, shown)).endswith("cd")


@pytest.mark.parametrize("stop", [["a"], ["b", "a"]])
def test_nothing_is_shown_of_a_text_that_begins_with_a_stop_string(stop: list[str]) -> None:
    shown, stream = written([*b"abc"], stop)
    assert (shown, stream.is_stopped) == ([""], True)
