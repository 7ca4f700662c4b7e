from pathlib import Path

import pytest
from chats import HEADERS, TEMPLATES
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from ptp.chat.prompts import check_system, prompt_ids, system, user
from ptp.data.chats import encode, render
from ptp.demo import make_tokenizer
from ptp.errors import ConfigError, DataError


def templated(template: str) -> PreTrainedTokenizerBase:
    tokenizer = make_tokenizer([*HEADERS, "one and two are three, of course"] * 9, 300)
    tokenizer.chat_template = template
    return tokenizer


ZEPHYR = templated((TEMPLATES / "zephyr.jinja").read_text())
WRITTEN = [token for token in range(len(ZEPHYR)) if ZEPHYR.decode([token]).isalpha()]
each_template = pytest.mark.parametrize("file", sorted(TEMPLATES.glob("*.jinja")), ids=lambda file: file.stem)


@given(st.lists(st.sampled_from(WRITTEN), min_size=1, max_size=12), st.booleans())
def test_the_next_prompt_begins_with_the_tokens_of_the_last_answer(answer: list[int], ends: bool) -> None:
    first = prompt_ids(ZEPHYR, [user("one?")])
    known = [*first, *answer, *[ZEPHYR.eos_token_id] * ends]
    chat = [user("one?"), {"role": "assistant", "content": ZEPHYR.decode(answer)}, user("two?")]
    ids = prompt_ids(ZEPHYR, chat, known)
    assert ids[: len(known)] == known
    assert ZEPHYR.decode(ids) == render(ZEPHYR, chat, generation_prompt=True)


def test_tokens_of_an_answer_need_not_be_those_of_its_text() -> None:
    chat = [user("one?"), {"role": "assistant", "content": "three"}, user("two?")]
    letters = [ZEPHYR.convert_tokens_to_ids(letter) for letter in "three"]
    known = [*prompt_ids(ZEPHYR, chat[:1]), *letters]
    assert prompt_ids(ZEPHYR, chat, known)[: len(known)] == known != prompt_ids(ZEPHYR, chat)[: len(known)]


@each_template
def test_every_template_asks_for_the_next_answer_as_it_writes_chats(file: Path) -> None:
    tokenizer = templated(file.read_text())
    chat = [user("one?"), {"role": "assistant", "content": "three"}, user("two?")]
    known = [*prompt_ids(tokenizer, chat[:1]), *encode(tokenizer, "three")]
    ids = prompt_ids(tokenizer, chat, known)
    assert tokenizer.decode(ids) == tokenizer.decode(prompt_ids(tokenizer, chat))
    assert tokenizer.decode(ids) == tokenizer.decode(encode(tokenizer, render(tokenizer, chat, generation_prompt=True)))


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content | upper }}{{ eos_token }}{% endfor %}",
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
    ],
    ids=["changes answers", "changes the beginning"],
)
def test_a_template_that_rewrites_the_chat_is_followed(template: str) -> None:
    tokenizer = templated(template)
    chat = [user("one?"), {"role": "assistant", "content": "three"}, user("two?")]
    known = [*prompt_ids(tokenizer, chat[:1]), *encode(tokenizer, "three")]
    assert prompt_ids(tokenizer, chat, known) == prompt_ids(tokenizer, chat)


def test_a_system_message_is_told_where_the_template_has_a_place_for_it() -> None:
    check_system(ZEPHYR, "Add.")
    assert "<|system|>\nAdd." in ZEPHYR.decode(prompt_ids(ZEPHYR, [system("Add."), user("one?")]))
    with pytest.raises(ConfigError, match="leaves system messages out"):
        check_system(templated("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"), "Add.")
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('No system here') }}{% endif %}x"
    with pytest.raises(ConfigError, match="No system here"):
        check_system(templated(refusing), "Add.")


def test_a_user_who_says_nothing_is_not_answered() -> None:
    assert user(" one?\n") == {"role": "user", "content": "one?"}
    with pytest.raises(DataError, match="empty"):
        user(" \n")
