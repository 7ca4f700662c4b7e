from collections.abc import Callable, Sequence
from copy import deepcopy
from threading import Thread

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation import BaseStreamer

from ptp.config import PTPConfig
from ptp.decoding.decoder import Decoder
from ptp.decoding.plain import decode_plainly
from ptp.decoding.requests import Request, make_request
from ptp.decoding.verification import processed, verify
from ptp.demo import make_tokenizer
from ptp.errors import DecodingError
from ptp.model.ptp_model import PTPModel
from ptp.sampling import SamplingRule

PROMPT = [5, 3, 0, 4]


@pytest.fixture(scope="module")
def base(tiny_llama: Callable) -> PreTrainedModel:
    return tiny_llama(300, layers=1)


@pytest.fixture(scope="module")
def decoder(base: PreTrainedModel, random_adapter: Callable) -> Decoder:
    return Decoder(random_adapter(PTPModel(deepcopy(base), PTPConfig(window=6))))


@pytest.mark.parametrize(
    ("drafts", "true_tokens", "verified"),
    [
        ([7, 4, 4], [7, 4, 9, 2], ([7, 4, 9], 2, None)),
        ([7, 1, 4], [7, 1, 4, 2], ([7, 1], 2, "stop")),
        ([7, 4, 4], [1, 4, 9, 2], ([1], 0, "stop")),
        ([], [3], ([3], 0, None)),
        ([7, 4], [7, 4, 2], ([7, 4, 2], 2, None)),
        ([7, 4, 3, 8], [7, 4, 3, 8, 6], ([7, 4, 3, 8, 6], 4, "length")),
    ],
)
def test_drafts_count_up_to_the_first_difference_or_the_end_of_the_text(
    drafts: list[int], true_tokens: list[int], verified: tuple
) -> None:
    request = Request(PROMPT, 5, frozenset([1]), torch.zeros(5))
    asked = iter(true_tokens)
    found = verify(asked, drafts, PROMPT, request)
    assert (found.token_ids, found.num_accepted, found.finish_reason) == verified
    assert list(asked) == true_tokens[len(found.token_ids) :], "tokens behind the end were asked for"


class Forbids(LogitsProcessor):
    """The last token, written into the scores it is given."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill_(1, input_ids[0, -1:], -torch.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_processors_get_a_float32_copy_and_where_there_are_none_nothing_is_copied(dtype: torch.dtype) -> None:
    logits = torch.randn(6).to(dtype)
    before = logits.clone()
    assert processed(logits, torch.tensor(PROMPT), LogitsProcessorList()) is logits
    scores = processed(logits, torch.tensor(PROMPT), LogitsProcessorList([Forbids()]))
    assert torch.equal(scores, before.float().index_fill(0, torch.tensor(PROMPT[-1]), -torch.inf))
    assert torch.equal(logits, before)


class Repeats(StoppingCriteria):
    """The last token stands somewhere before; a criterion must not see what is not verified."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __call__(self, input_ids: Tensor, scores: None, **kwargs: object) -> Tensor:
        self.asked.append(input_ids[0].tolist())
        return torch.tensor([self.asked[-1][-1] in self.asked[-1][:-1]])


def test_a_stopping_criterion_is_asked_after_each_token_as_in_plain_decoding(
    decoder: Decoder, base: PreTrainedModel
) -> None:
    for seed in range(5):
        plain, parallel = Repeats(), Repeats()
        request = make_request(base, PROMPT, 40, seed, stopping=[plain])
        expected = decode_plainly(base, request, SamplingRule())
        found = decoder.generate(PROMPT, 40, seed, stopping=[parallel])
        assert found.token_ids == expected
        assert plain.asked == parallel.asked
        assert [*PROMPT, *expected].count(expected[-1]) == 2
        assert found.finish_reason == "stop"
    assert len(decoder.generate(PROMPT, 40, stopping=[MaxLengthCriteria(10)]).token_ids) == 6


def test_no_end_token_is_written_before_the_fewest_tokens_are(decoder: Decoder) -> None:
    ends = range(0, 300, 2)
    for fewest in (0, 1, 8):
        written = decoder.generate(PROMPT, 30, end_token_ids=ends, min_new_tokens=fewest)
        assert written.finish_reason == "stop"
        assert len(written.token_ids) > fewest
        assert [token % 2 == 0 for token in written.token_ids] == [False] * (len(written.token_ids) - 1) + [True]
    with pytest.raises(DecodingError, match=r"min_new_tokens must lie in \[0, max_new_tokens = 5\]; got 6"):
        decoder.generate(PROMPT, 5, min_new_tokens=6)


# Streamers


class Recorder(BaseStreamer):
    def __init__(self, fails_at: int | None = None) -> None:
        self.got: list[list] = []
        self.fails_at = fails_at

    def put(self, value: Tensor) -> None:
        if len(self.got) == self.fails_at:
            raise OSError("the reader is gone")
        self.got.append(value.tolist())

    def end(self) -> None:
        self.got.append([])


def expected_stream(tokens: Sequence[int]) -> list[list]:
    return [[PROMPT], *([token] for token in tokens), []]


def test_a_streamer_gets_what_generate_gives_it(decoder: Decoder, base: PreTrainedModel) -> None:
    ours, theirs = Recorder(), Recorder()
    found = decoder.generate(PROMPT, 20, seed=1, streamer=ours)
    assert ours.got == expected_stream(found.token_ids)
    ids = torch.tensor([PROMPT])
    whole = base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, streamer=theirs)
    assert theirs.got == expected_stream(whole[0, len(PROMPT) :].tolist())


def test_text_streamers_show_the_text(decoder: Decoder, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = make_tokenizer(["a b c", "ab\n\n"], 270)
    found = decoder.generate(PROMPT, 30, seed=2, end_token_ids=[], streamer=TextStreamer(tokenizer, skip_prompt=True))
    expected = tokenizer.decode(found.token_ids)
    assert capsys.readouterr().out == f"{expected}\n"
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    settings = {"seed": 2, "end_token_ids": [], "streamer": streamer}
    thread = Thread(target=decoder.generate, args=(PROMPT, 30), kwargs=settings)
    thread.start()
    assert "".join(streamer) == expected
    thread.join()


def test_a_streamer_that_fails_ends_its_own_text_and_no_other(decoder: Decoder) -> None:
    expected = decoder.generate(PROMPT, 20).token_ids
    for place in range(4):
        with pytest.raises(OSError, match="the reader is gone"):
            decoder.generate(PROMPT, 20, streamer=Recorder(fails_at=place))
        assert decoder.generate(PROMPT, 20).token_ids == expected
