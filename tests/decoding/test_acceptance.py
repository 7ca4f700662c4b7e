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


def played(profile: Profile, budget: int, num_calls: int = 20_000) -> float:
    """Tokens per call of a chain of calls whose drafts are accepted by chance, as the profile says."""
    rng = random.Random(0)
    drafts: list[float] = []
    num_tokens = 0
    for _ in range(num_calls):
        seconds = [(1 - rate) * profile.second for rate in drafts]
        plan, accepted = allocate(drafts, profile, fixed(budget), 10**6, seconds), 0
        while accepted < plan.num_drafts and rng.random() < drafts[accepted]:
            accepted += 1
        goes_on = accepted in plan.seconds and rng.random() < profile.second
        num_tokens += accepted + goes_on + 1
        drafts = profile.rates(0 if goes_on else plan.widths[accepted])
    return num_tokens / num_calls


def profile_of(name: str, lead: int, continued: bool = False, second: float = 0.0) -> Profile:
    """A profile; its continued drafts are somewhat worse, where there are such."""
    survival = PROFILES[name]
    return Profile(survival, lead, tuple(s * 0.9**w for w, s in enumerate(survival, 1)) if continued else (), second)


@pytest.mark.parametrize(
    ("lead", "continued", "second"), [(0, False, 0.0), (1, False, 0.0), (0, True, 0.0), (0, True, 0.4)]
)
@pytest.mark.parametrize("budget", [1, 3, 4, 8, 24])
@pytest.mark.parametrize("name", PROFILES)
def test_the_simulation_is_what_a_chain_of_calls_plays(
    name: str, budget: int, lead: int, continued: bool, second: float
) -> None:
    profile = profile_of(name, lead, continued, second)
    assert simulated_tokens_per_call(profile, budget) == pytest.approx(played(profile, budget), rel=0.02)


@pytest.mark.parametrize("budget", [1, 3, 4, 8, 24])
@pytest.mark.parametrize("name", PROFILES)
def test_continued_drafts_make_up_for_positions_that_there_are_not(name: str, budget: int) -> None:
    found = [simulated_tokens_per_call(profile_of(name, 0, continued), budget) for continued in (False, True)]
    assert found[1] >= found[0] - 1e-9
    assert found[1] > found[0] or name not in ("falling", "high")


@pytest.mark.parametrize("lead", [0, 1])
def test_without_a_budget_or_a_draft_that_survives_a_call_yields_its_bonus_token(lead: int) -> None:
    for survival in PROFILES.values():
        assert simulated_tokens_per_call(Profile(survival, lead), 0) == 1
        assert simulated_tokens_per_call(Profile(survival, lead, survival), 0) == 1
    assert simulated_tokens_per_call(Profile((0.0,) * 6, lead), 24) == 1
    assert simulated_tokens_per_call(Profile((0.0,) * 6, lead, (0.0,) * 6), 24) == 1


@pytest.mark.parametrize("lead", [0, 1])
@pytest.mark.parametrize("profile", PROFILES)
def test_a_much_larger_budget_yields_more_up_to_a_window_and_the_bonus_token(profile: str, lead: int) -> None:
    survival = PROFILES[profile]
    found = [simulated_tokens_per_call(Profile(survival, lead), budget) for budget in (0, 4, 12, 48)]
    assert all(after >= before - 1e-9 for before, after in pairwise(found))
    assert found[-1] <= 1 + sum(survival) + 1e-9
    # With room for every branch, each call finds the drafts of a whole window.
    assert simulated_tokens_per_call(Profile(survival, lead), 200) == pytest.approx(1 + sum(survival), rel=1e-3)


@pytest.mark.parametrize(("lead", "continued"), [(0, False), (1, False), (0, True)])
@pytest.mark.parametrize("name", PROFILES)
def test_the_first_call_of_a_text_has_no_drafts_so_short_texts_have_fewer_tokens_in_a_call(
    name: str, lead: int, continued: bool
) -> None:
    profile = profile_of(name, lead, continued)
    found = [simulated_tokens_per_call(profile, 8, num_calls) for num_calls in (1, 2, 10, 1000)]
    assert found[0] == 1
    assert all(after > before for before, after in pairwise(found))
    assert found[-1] == simulated_tokens_per_call(profile, 8)
