import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptp.config import DataConfig, Endpoint, PregenerateConfig, PTPConfig, SchemeTurn, TrainConfig
from ptp.errors import ConfigError
from ptp.records import Record


def error_of(record: type[Record], **values: object) -> str:
    with pytest.raises(ConfigError) as caught:
        record(**values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Every field differs from its default.
DATA = DataConfig(
    path="data.jsonl",
    mode="prompt-scheme-distill",
    config="main",
    split="train",
    revision="abc",
    column="chat",
    prompt_scheme=(SchemeTurn(role="user", content="{q}"), SchemeTurn(role="assistant", content="```\n")),
    turns="first",
    drop_system=True,
    roles={"narrator": "assistant"},
    tools="functions",
    chat_template="template.jinja",
)


def test_settings_survive_json() -> None:
    for record in (DATA, PregenerateConfig(engine=Endpoint(url="http://h/v1", model="m")), TrainConfig(), PTPConfig()):
        assert type(record)(**record.model_dump(mode="json")) == record


@pytest.mark.parametrize(
    ("mode", "distils"),
    [("prompt-distill", True), ("prompt-scheme-distill", True), ("full-chat", False), ("fixed", False)],
)
def test_the_base_model_answers_in_the_modes_that_distil(mode: str, distils: bool) -> None:
    assert DataConfig(path="data", mode=mode).distils == distils


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "fix"}, "mode: input should be 'prompt-distill', 'prompt-scheme-distill', 'full-chat' or 'fixed'"),
        ({"mode": "fixed", "turns": "last"}, "turns: input should be 'each' or 'first'; got 'last'"),
        ({"mode": "fixed", "colum": "a"}, "unknown key 'colum' in DataConfig; did you mean 'column'?"),
        ({}, "DataConfig needs 'mode'"),
    ],
)
def test_a_wrong_setting_of_the_data_is_explained(values: dict[str, object], message: str) -> None:
    assert error_of(DataConfig, path="data", **values).startswith(message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"max_steps": 10, "num_epochs": 2},
            "give one of train.max_steps and train.num_epochs, the other null; got 10",
        ),
        # The number of steps has a default.
        ({"num_epochs": 2}, "give one of train.max_steps and train.num_epochs, the other null; got 2000 and 2"),
        ({"max_steps": None}, "give one of train.max_steps and train.num_epochs, the other null; got None and None"),
        ({"max_steps": 0}, "max_steps: "),
        ({"max_steps": None, "num_epochs": 0}, "num_epochs: "),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: "),
        ({"dtype": "int8"}, "dtype: input should be 'float32', 'bfloat16' or 'float16'; got 'int8'"),
    ],
)
def test_a_wrong_setting_of_training_is_explained(values: dict[str, object], message: str) -> None:
    assert error_of(TrainConfig, **values).startswith(message)


@given(st.floats(0.01, 20), st.integers(1, 64), st.integers(1, 8), st.integers(1, 16), st.integers(1, 10**6))
def test_epochs_take_the_steps_that_read_each_sequence_so_often(
    num_epochs: float, batch_size: int, accumulation: int, num_processes: int, num_sequences: int
) -> None:
    config = TrainConfig(
        max_steps=None, num_epochs=num_epochs, batch_size=batch_size, gradient_accumulation_steps=accumulation
    )
    num_steps = config.num_steps(num_sequences, num_processes)
    exact = num_epochs * num_sequences / (batch_size * accumulation * num_processes)
    assert num_steps >= 1
    assert num_steps == 1 or abs(num_steps - exact) <= 0.5
    assert num_steps > 1 or exact <= 1.5
    assert TrainConfig(max_steps=7, batch_size=batch_size).num_steps(num_sequences) == 7


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "pregenerate.batch_size must be auto or a positive number of rows; got 0"),
        ({"batch_size": -3}, "pregenerate.batch_size must be auto or a positive number of rows; got -3"),
        ({"batch_size": "many"}, "batch_size"),
        (
            {"max_prompt_tokens": 63, "max_length": 64},
            "pregenerate.max_prompt_tokens is 63, which leaves no room for a completion in pregenerate.max_length 64",
        ),
        ({"max_new_tokens": 1}, "max_new_tokens: "),
        ({"shard_size": 0}, "shard_size: "),
        ({"completions_per_prompt": 0}, "completions_per_prompt: "),
        ({"engine": {"url": "http://host/v1"}}, "Endpoint needs 'model'"),
        ({"engine": {"url": "http://host/v1", "model": "m", "concurrency": 0}}, "concurrency: "),
    ],
)
def test_a_wrong_setting_of_pregeneration_is_explained(values: dict[str, object], message: str) -> None:
    assert error_of(PregenerateConfig, **values).startswith(message)


def test_the_longest_prompt_leaves_room_for_two_tokens() -> None:
    # One token has nothing after it to predict.
    assert PregenerateConfig(max_prompt_tokens=62, max_length=64).max_prompt_tokens == 62


@pytest.mark.parametrize(("variant", "num_drafts"), [("categorical", 5), ("one_hot", 4)])
def test_a_window_drafts_at_every_position_but_the_one_of_a_token_that_is_known(variant: str, num_drafts: int) -> None:
    config = PTPConfig(variant=variant, window=5)
    assert config.num_drafts == num_drafts
    assert config.lead == config.window - num_drafts


@pytest.mark.parametrize(
    "url", ["host:8000/v1", "localhost", "ftp://host/v1", "http://", "http://host:port/v1", "http://[::1/v1", ""]
)
def test_an_address_without_a_server_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="url must be the server's base address"):
        Endpoint(url=url, model="base")


def test_a_key_in_place_of_its_variable_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError, match="name of an environment variable") as caught:
        Endpoint(url="http://host/v1", model="base", api_key_env="sk-secret")
    assert "secret" not in str(caught.value)
