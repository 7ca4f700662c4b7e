import random
from itertools import pairwise

import pytest

from ptp.decoding.acceptance import simulated_tokens_per_call
from ptp.decoding.allocation import Profile, allocate, fixed

PROFILES = {
    "falling": (0.8, 0.6, 0.4, 0.25, 0.15, 0.1),
    "high": (0.97, 0.94, 0.9, 0.87, 0.83, 0.8),
    "certain": (1.0, 1.0, 1.0, 1.0),
    "ends early": (0.7, 0.4, 0.0, 0.0),
    "one draft": (0.6,),
}


def played(survival: tuple[float, ...], budget: int, lead: int, num_calls: int = 20_000) -> float:
    """Tokens per call of a chain of calls whose drafts are accepted by chance, as the profile says."""
    rng = random.Random(0)
    rates = [now / before if before else 0.0 for before, now in pairwise([1.0, *survival])]
    profile = Profile(survival, lead)
    plans = [allocate(rates[:m], profile, fixed(budget), 10**6) for m in range(len(survival) + 1)]
    at_hand, num_tokens = 0, 0
    for _ in range(num_calls):
        plan, accepted = plans[at_hand], 0
        while accepted < plan.num_drafts and rng.random() < rates[accepted]:
            accepted += 1
        num_tokens += accepted + 1
        at_hand = plan.widths[accepted]
    return num_tokens / num_calls


@pytest.mark.parametrize("lead", [0, 1])
@pytest.mark.parametrize("budget", [1, 3, 4, 8, 24])
@pytest.mark.parametrize("profile", PROFILES)
def test_the_simulation_is_what_a_chain_of_calls_plays(profile: str, budget: int, lead: int) -> None:
    survival = PROFILES[profile]
    assert simulated_tokens_per_call(survival, budget, lead) == pytest.approx(played(survival, budget, lead), rel=0.02)


@pytest.mark.parametrize("lead", [0, 1])
def test_without_a_budget_or_a_draft_that_survives_a_call_yields_its_bonus_token(lead: int) -> None:
    for survival in PROFILES.values():
        assert simulated_tokens_per_call(survival, 0, lead) == 1
    assert simulated_tokens_per_call((0.0,) * 6, 24, lead) == 1


@pytest.mark.parametrize("lead", [0, 1])
@pytest.mark.parametrize("profile", PROFILES)
def test_a_much_larger_budget_yields_more_up_to_a_window_and_the_bonus_token(profile: str, lead: int) -> None:
    survival = PROFILES[profile]
    found = [simulated_tokens_per_call(survival, budget, lead) for budget in (0, 4, 12, 48)]
    assert all(after >= before - 1e-9 for before, after in pairwise(found))
    assert found[-1] <= 1 + sum(survival) + 1e-9
    # With room for every branch, each call finds the drafts of a whole window.
    assert simulated_tokens_per_call(survival, 200, lead) == pytest.approx(1 + sum(survival), rel=1e-3)


@pytest.mark.parametrize("lead", [0, 1])
@pytest.mark.parametrize("profile", PROFILES)
def test_the_first_call_of_a_text_has_no_drafts_so_short_texts_have_fewer_tokens_in_a_call(
    profile: str, lead: int
) -> None:
    found = [simulated_tokens_per_call(PROFILES[profile], 8, lead, num_calls) for num_calls in (1, 2, 10, 1000)]
    assert found[0] == 1
    assert all(after > before for before, after in pairwise(found))
    assert found[-1] == simulated_tokens_per_call(PROFILES[profile], 8, lead)
