import pytest

from ptp.config import PTPConfig
from ptp.errors import ConfigError, PTPError
from ptp.records import Record, unknown_key
from ptp.sampling import SamplingRule


class Experiment(Record):
    name: str
    rule: SamplingRule = SamplingRule()


def message(record: type[Record], values: dict) -> str:
    with pytest.raises(ConfigError) as error:
        record(**values)
    return str(error.value)


@pytest.mark.parametrize(
    ("record", "values", "expected"),
    [
        (SamplingRule, {"temprature": 1}, "unknown key 'temprature' in SamplingRule; did you mean 'temperature'?"),
        (PTPConfig, {"lora_rang": 8}, "unknown key 'lora_rang' in PTPConfig; did you mean 'lora_rank'?"),
        (
            SamplingRule,
            {"xyz": 1},
            "unknown key 'xyz' in SamplingRule; known keys: temperature, top_k, top_p, min_p, order",
        ),
        (
            Experiment,
            {"name": "a", "rule": {"topk": 3}},
            "unknown key 'topk' in SamplingRule; did you mean 'top_k'?",
        ),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(record: type[Record], values: dict, expected: str) -> None:
    assert message(record, values) == expected


@pytest.mark.parametrize(
    ("record", "values", "expected"),
    [
        (
            SamplingRule,
            {"top_k": 1.5},
            "top_k: input should be a valid integer, got a number with a fractional part; got 1.5",
        ),
        (PTPConfig, {"window": 0}, "window: input should be greater than or equal to 1; got 0"),
        (PTPConfig, {"lora_alpha": -1.0}, "lora_alpha: input should be greater than 0; got -1.0"),
        (PTPConfig, {"variant": "onehot"}, "variant: input should be 'one_hot' or 'categorical'; got 'onehot'"),
        (Experiment, {"name": "a", "rule": {"top_p": 1.3}}, "top_p must lie in (0, 1]; got 1.3"),
        (Experiment, {"name": ["a"]}, "name: input should be a valid string; got ['a']"),
        (Experiment, {}, "Experiment needs 'name'"),
    ],
)
def test_a_bad_value_says_what_arrived_and_what_was_expected(record: type[Record], values: dict, expected: str) -> None:
    assert message(record, values) == expected


@pytest.mark.parametrize("value", ["a\nb", 3, None, [0, "x"], {"a": 1}, [0, 0], [0, 5], []])
def test_a_bad_order_is_one_line_that_says_what_is_possible(value: object) -> None:
    line = message(SamplingRule, {"order": value})
    assert len(line.splitlines()) == 1
    assert line.startswith("order")


@pytest.mark.parametrize(
    ("record", "values"),
    [
        (SamplingRule, {"a\nb": 1}),
        (SamplingRule, {"temperature": "hot\nand cold"}),
        (PTPConfig, {"lora_targets": "q_proj\n"}),
        (PTPConfig, {"auxiliary_size": None, "window": "x", "unknown": 1}),
    ],
)
def test_an_error_is_one_line_even_for_several_faults(record: type[Record], values: dict) -> None:
    assert len(message(record, values).splitlines()) == 1


def test_a_setting_error_is_the_input_s_fault() -> None:
    assert issubclass(ConfigError, PTPError)
    assert issubclass(PTPError, ValueError)


def test_a_record_cannot_be_changed_and_is_hashable() -> None:
    rule = SamplingRule(top_k=3)
    with pytest.raises(ValueError, match="frozen"):
        rule.top_k = 4
    assert {rule: 1}[SamplingRule(top_k=3)] == 1


def test_without_a_near_key_the_known_ones_are_listed() -> None:
    assert unknown_key("zzz", ["alpha", "beta"], "here") == "unknown key 'zzz' in here; known keys: alpha, beta"


@pytest.mark.parametrize(("variant", "lead", "num_drafts"), [("categorical", 0, 16), ("one_hot", 1, 15)])
def test_a_one_hot_window_spends_its_first_position_on_the_bonus_token(
    variant: str, lead: int, num_drafts: int
) -> None:
    config = PTPConfig(variant=variant, window=16)
    assert (config.lead, config.num_drafts) == (lead, num_drafts)
