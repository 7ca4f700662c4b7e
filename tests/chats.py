"""A tiny chat model with an adapter: what it writes is letters, and no special token but its end."""

from collections.abc import Callable
from pathlib import Path

import torch

from ptp.chat.chat import Chat
from ptp.chat.settings import Settings
from ptp.config import PTPConfig
from ptp.demo import make_tokenizer
from ptp.model.loading import load_base_model, load_tokenizer
from ptp.model.ptp_model import PTPModel
from ptp.sampling import SamplingRule

TEMPLATES = Path(__file__).with_name("fixtures") / "chat_templates"
HEADERS = ["<|system|>\n", "<|user|>\n", "<|assistant|>\n"]
RULE = SamplingRule(temperature=0.7, top_k=20)


def write_chat(
    directory: Path, tiny_llama: Callable, random_adapter: Callable, context: int = 1024, templated: bool = True
) -> Path:
    """A directory that holds model/ and adapter/."""
    texts = [f"{number} and {number + 1} are {2 * number + 1}, of course" for number in range(24)]
    tokenizer = make_tokenizer(HEADERS + texts, 300)
    if templated:
        tokenizer.chat_template = (TEMPLATES / "zephyr.jinja").read_text()
    model = tiny_llama(vocab_size=len(tokenizer), context=context)
    with torch.no_grad():
        for token in range(len(tokenizer)):
            text = tokenizer.decode([token])
            if token != tokenizer.eos_token_id and not (text.isascii() and text.isalnum()):
                # Of the likeliest 20 among so many none has a logit of 0.
                model.lm_head.weight[token] = 0
    tokenizer.save_pretrained(directory / "model")
    model.save_pretrained(directory / "model")
    ptp = random_adapter(PTPModel(load_base_model(str(directory / "model")), PTPConfig(window=4, lora_rank=2)))
    ptp.rule, ptp.survival = RULE, (0.6, 0.3, 0.1)
    ptp.save_pretrained(directory / "adapter")
    return directory


def open_chat(directory: Path, templated: bool = True, **settings: object) -> Chat:
    model = PTPModel.from_pretrained(directory)
    chosen = Settings(**{"rule": RULE, "max_new_tokens": 24, "budget": 12, **settings})
    return Chat(model, load_tokenizer(str(directory / "model")), chosen, templated)


def said(chat: Chat, text: str) -> str:
    """The answer to a text."""
    return "".join(piece.text for piece in chat.answer(text))
