import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ptp.chat.streaming import TokenTexts
from ptp.errors import DataError

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(LETTERS)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=AddedToken("</s>", special=True))


def byte_fallback() -> PreTrainedTokenizerFast:
    """As SentencePiece has it: words begin with a mark, and bytes are tokens where there is no other."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁a", "▁the", "n", "é"]
    tokenizer = Tokenizer(
        models.BPE({piece: number for number, piece in enumerate(pieces)}, merges=[], byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


BYTES, PIECES = byte_level(), byte_fallback()


@given(st.lists(st.integers(0, len(BYTES) - 1), max_size=24))
def test_the_pieces_of_a_text_are_the_text(token_ids: list[int]) -> None:
    texts = TokenTexts(BYTES)
    pieces = [texts.add(token) for token in token_ids] + [texts.rest()]
    assert "".join(pieces) == texts.text == BYTES.decode(token_ids, skip_special_tokens=True)


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=12))
def test_no_part_of_a_character_is_shown(text: str) -> None:
    texts = TokenTexts(BYTES)
    pieces = [texts.add(token) for token in BYTES(text)["input_ids"]]
    assert "".join(pieces) == text
    # A replacement character comes from the text alone.
    assert sum(piece.count("\N{REPLACEMENT CHARACTER}") for piece in pieces) == text.count("\N{REPLACEMENT CHARACTER}")


def test_an_end_token_adds_nothing() -> None:
    texts = TokenTexts(BYTES)
    assert [texts.add(token) for token in [LETTERS.index("a"), BYTES.eos_token_id]] == ["a", ""]


@given(st.lists(st.integers(0, len(PIECES) - 1), max_size=24))
def test_bytes_that_are_no_text_break_nothing(token_ids: list[int]) -> None:
    texts = TokenTexts(PIECES)
    for token in token_ids:
        texts.add(token)
    texts.rest()
    assert texts.text == PIECES.decode(token_ids)


def test_bytes_that_undo_a_letter_break_nothing() -> None:
    texts = TokenTexts(PIECES)
    pieces = [texts.add(token) for token in [0x6E, 0xE2, 256]]
    assert pieces[0] == "n"
    assert pieces[2].endswith("a")


def test_a_tokenizer_that_cannot_stream_is_refused() -> None:
    class Slow(PreTrainedTokenizerFast):
        is_fast = False

    with pytest.raises(DataError, match="a fast tokenizer is needed"):
        TokenTexts(Slow(tokenizer_object=BYTES.backend_tokenizer))
