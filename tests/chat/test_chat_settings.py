import pytest

from ptp.chat.settings import Settings
from ptp.errors import ConfigError
from ptp.sampling import SamplingRule

SETTINGS = Settings(rule=SamplingRule(order="probability"), max_new_tokens=64)


@pytest.mark.parametrize(
    ("name", "typed", "value"),
    [
        ("temperature", "0.7", 0.7),
        ("top_k", "50", 50),
        ("top-p", "0.95", 0.95),
        ("min_p", "0.1", 0.1),
        ("repetition_penalty", "1.2", 1.2),
        ("min_new_tokens", "3", 3),
        ("max-new-tokens", "7", 7),
        ("seed", "9", 9),
        ("budget", "12", 12),
        ("budget", "auto", "auto"),
        ("stop", r'"\n\n" END', ("\n\n", "END")),
        ("stop", "off", ()),
    ],
)
def test_every_setting_can_be_typed_and_changes_alone(name: str, typed: str, value: object) -> None:
    before, after = dict(SETTINGS.named()), dict(SETTINGS.changed(name, typed).named())
    assert after == before | {name.replace("-", "_"): value}


def test_every_setting_shown_can_be_set() -> None:
    assert {name for name, _ in SETTINGS.named()} == {
        *("temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
        *("min_new_tokens", "max_new_tokens", "stop", "seed", "budget"),
    }


def test_the_order_of_the_rule_stays_the_adapter_s() -> None:
    assert SETTINGS.changed("temperature", "0.5").rule == SamplingRule(temperature=0.5, order="probability")
    with pytest.raises(ConfigError, match="unknown key 'order'"):
        SETTINGS.changed("order", "vocabulary")


@pytest.mark.parametrize(
    ("name", "typed", "words"),
    [
        ("temprature", "1", "did you mean 'temperature'"),
        ("temperature", "warm", "got 'warm'"),
        ("top_p", "1.3", r"top_p must lie in \(0, 1\]; got 1.3"),
        ("budget", "-1", "budget must be auto or a number from 0 up; got '-1'"),
        ("budget", "much", "budget must be auto or a number from 0 up; got 'much'"),
        ("seed", "-1", "seed must be a number from 0 up; got '-1'"),
        ("max_new_tokens", "many", "got 'many'"),
        ("stop", "'a", "no closing quotation"),
    ],
)
def test_a_wrong_name_or_value_is_one_line(name: str, typed: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        SETTINGS.changed(name, typed)
    assert "\n" not in str(raised.value)
