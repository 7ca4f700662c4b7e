from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptp.config import PTPConfig
from ptp.decoding.decoder import Decoder, Generation, Step
from ptp.decoding.plain import decode_plainly
from ptp.decoding.requests import Request, make_request
from ptp.evaluation.verify import Comparison, Verification, compare, verify
from ptp.model.ptp_model import PTPModel
from ptp.sampling import SamplingRule, interval, warp

RULE = SamplingRule()
PROMPT = [3, 4]


@pytest.fixture(scope="module")
def base(tiny_llama: Callable) -> PreTrainedModel:
    return tiny_llama(6)


@torch.no_grad()
def edges(base: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Lower and upper edge of every token's interval after the prompt, (V,) each."""
    distribution = warp(base(input_ids=torch.tensor([PROMPT])).logits[0, -1], RULE)
    pairs = [interval(distribution, torch.tensor(token)) for token in range(base.config.vocab_size)]
    return torch.stack([lower for lower, _ in pairs]), torch.stack([upper for _, upper in pairs])


def request_at(base: PreTrainedModel, u: float) -> Request:
    """A request whose first token is chosen by u."""
    request = make_request(base, PROMPT, 3, seed=0, end_token_ids=[])
    return replace(request, u=torch.cat([torch.tensor([u]), request.u[1:]]))


def verdict(base: PreTrainedModel, u: float, token: int) -> str:
    """Of a decoder that wrote `token` where plain decoding wrote what u picks."""
    request = request_at(base, u)
    plain = decode_plainly(base, request, RULE)
    assert plain[0] != token
    return compare(base, request, RULE, [token, *plain[1:]], plain)


def test_the_same_text_is_identical(base: PreTrainedModel) -> None:
    request = request_at(base, 0.3)
    plain = decode_plainly(base, request, RULE)
    assert compare(base, request, RULE, list(plain), plain) == "identical"


def test_the_neighbouring_token_at_an_interval_s_edge_is_a_near_tie(base: PreTrainedModel) -> None:
    _, upper = edges(base)
    for token in range(base.config.vocab_size - 1):
        # u picks the next token; rounding could have picked this one.
        assert verdict(base, float(upper[token]) + 1e-7, token) == "near-tie"


def test_a_difference_in_the_middle_of_an_interval_is_a_mismatch(base: PreTrainedModel) -> None:
    lower, upper = edges(base)
    widest = int((upper - lower).argmax())
    for token in set(range(base.config.vocab_size)) - {widest}:
        assert verdict(base, float(lower[widest] + upper[widest]) / 2, token) == "mismatch"


def test_a_token_far_from_u_is_a_mismatch_even_where_two_others_tie(base: PreTrainedModel) -> None:
    lower, upper = edges(base)
    u = float(upper[0]) + 1e-7
    far = [token for token in range(2, base.config.vocab_size) if float(lower[token]) - u > 0.01]
    assert far
    assert {verdict(base, u, token) for token in far} == {"mismatch"}


@pytest.mark.parametrize(
    ("rule", "scores", "u", "near", "far"),
    [
        (SamplingRule(temperature=0), [3.0, 3.00001, 1.0], 0.5, (0, 1), 2),
        # Which of two tokens is the second likeliest decides where all that follow lie.
        (SamplingRule(top_k=2), [3.0, 2.0, 2.00001], 0.95, (1, 2), 0),
        (SamplingRule(order="probability"), [2.0, 2.00001, 1.0], 0.2, (0, 1), 2),
        (SamplingRule(top_p=0.5), [3.0, 3.00001], 0.5, (0, 1), None),
    ],
)
def test_what_rounding_cuts_off_or_orders_otherwise_is_a_near_tie(
    rule: SamplingRule, scores: list[float], u: float, near: tuple[int, int], far: int | None
) -> None:
    class Fixed(torch.nn.Module):
        dtype, device = torch.float32, torch.device("cpu")

        def forward(self, input_ids: torch.Tensor, logits_to_keep: int) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.tensor([[scores]]))

    request = Request(PROMPT, 1, frozenset(), torch.tensor([u]))
    assert compare(Fixed(), request, rule, [near[0]], [near[1]]) == "near-tie"
    assert compare(Fixed(), request, rule, [near[1]], [near[0]]) == "near-tie"
    if far is not None:
        assert compare(Fixed(), request, rule, [far], [near[1]]) == "mismatch"


def test_a_text_that_stops_early_or_goes_on_is_a_mismatch(base: PreTrainedModel) -> None:
    request = request_at(base, 0.3)
    plain = decode_plainly(base, request, RULE)
    assert compare(base, request, RULE, plain[:-1], plain) == "mismatch"
    assert compare(base, request, RULE, [*plain, 3], plain) == "mismatch"


def test_the_context_of_the_first_difference_decides(base: PreTrainedModel) -> None:
    request = request_at(base, 0.3)
    plain = decode_plainly(base, request, RULE)
    with torch.no_grad():
        logits = base(input_ids=torch.tensor([[*PROMPT, *plain[:2]]])).logits[0, -1]
    lower, upper = interval(warp(logits, RULE), torch.tensor(plain[2]))
    assert upper - lower > 1e-3
    request = replace(request, u=torch.cat([request.u[:2], (lower + upper).view(1) / 2]))
    wrong = [*plain[:2], (plain[2] + 1) % base.config.vocab_size]
    assert compare(base, request, RULE, wrong, plain) == "mismatch"


def comparison(num_tokens: int, num_calls: int, seconds: list[tuple[float, float]], verdict: str) -> Comparison:
    share = num_tokens // num_calls
    steps = [Step([5] * share, [0.5] * share, share - 1, share) for _ in range(num_calls)]
    tokens = [5] * num_tokens
    request = Request(PROMPT, num_tokens, frozenset(), torch.zeros(num_tokens))
    generation = Generation(tokens, [0.5] * num_tokens, steps, "length")
    return Comparison(request, generation, tokens, seconds, verdict)


def test_speed_up_is_the_mean_over_prompts_of_the_ratio_of_median_times() -> None:
    verification = Verification(
        [
            comparison(8, 2, [(4.0, 1.0), (100.0, 50.0), (2.0, 0.5)], "identical"),
            comparison(12, 6, [(3.0, 1.5)], "near-tie"),
        ]
    )
    assert [c.speedup for c in verification.comparisons] == [4.0, 2.0]
    assert verification.speedup == 3.0
    assert verification.tokens_per_call == 20 / 8
    assert verification.overhead == pytest.approx(20 / 8 / 3 - 1)
    assert verification.tokens_per_second(parallel=False) == [2.0, 4.0]
    assert verification.tokens_per_second(parallel=True) == [8.0, 8.0]
    assert [verification.count(v) for v in ("identical", "near-tie", "mismatch")] == [1, 1, 0]


def test_a_decoder_is_verified_prompt_by_prompt_with_its_own_u(tiny_llama: Callable, random_adapter: Callable) -> None:
    model = random_adapter(PTPModel(tiny_llama(6), PTPConfig(window=4)))
    prompts = [[3], [3, 4, 5], [3]]
    comparisons = list(
        verify(Decoder(model, RULE, 8), tiny_llama(6), prompts, max_new_tokens=10, seed=2, repetitions=2)
    )
    assert [c.verdict for c in comparisons] == ["identical"] * 3
    assert [c.request.prompt_ids for c in comparisons] == prompts
    assert all(len(c.seconds) == 2 and min(min(pair) for pair in c.seconds) > 0 for c in comparisons)
    assert all(c.generation.token_ids == c.plain_ids for c in comparisons)
    # Equal prompts have their own sequence number, and so their own u.
    assert comparisons[0].generation.u[0] != comparisons[2].generation.u[0]


def test_a_decoder_that_writes_something_else_is_found_out(tiny_llama: Callable) -> None:
    other = PTPModel(tiny_llama(6, seed=1), PTPConfig(window=4))
    comparisons = list(verify(Decoder(other, RULE, 8), tiny_llama(6), [[3, 4]], max_new_tokens=20, repetitions=1))
    assert [c.verdict for c in comparisons] == ["mismatch"]
