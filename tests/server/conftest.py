"""A tiny chat model behind a real server on loopback, asked by the real `openai` client."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ptp.config import PTPConfig
from ptp.decoding.decoder import Decoder
from ptp.decoding.requests import make_request
from ptp.model.ptp_model import PTPModel
from ptp.sampling import SamplingRule
from ptp.server.api import Service
from ptp.server.run import Server, listen, make_service

NAME = "tiny"


@pytest.fixture(scope="session")
def tokenizer(chat_experiment: Callable, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    directory = tmp_path_factory.mktemp("chat")
    chat_experiment(directory)
    return AutoTokenizer.from_pretrained(directory / "model")


@pytest.fixture(scope="session")
def decoder(tiny_llama: Callable, random_adapter: Callable, tokenizer: PreTrainedTokenizerBase) -> Decoder:
    base_model = tiny_llama(vocab_size=len(tokenizer), context=256)
    # It writes few tokens, so that drafts are often right by chance; two of them are the bytes of "é".
    written = [*tokenizer.convert_tokens_to_ids([*"abcxyz.,+12", "Ã", "©"]), *base_model.generation_config.eos_token_id]
    unwritten = torch.ones(len(tokenizer), dtype=torch.bool).index_fill(0, torch.tensor(written), False)
    with torch.no_grad():
        base_model.lm_head.weight[unwritten] = 0
    model = random_adapter(PTPModel(base_model, PTPConfig(window=5)), std=0.3)
    model.rule = SamplingRule(temperature=0.7, top_k=4)
    model.survival = (0.7, 0.5, 0.3, 0.2)
    return Decoder(model, budget=10)


@contextmanager
def running(service: Service) -> Iterator[str]:
    """A server of the service in a thread, on a free port; yields its address."""
    with listen("127.0.0.1", 0) as listening:
        server = Server(service)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def new_service(decoder: Decoder, tokenizer: PreTrainedTokenizerBase) -> Callable[..., Service]:
    """Makes a service; its settings as for `make_service`."""

    def make(**settings: object) -> Service:
        return make_service(decoder, tokenizer, NAME, **{"max_new_tokens": 200, **settings})

    return make


@pytest.fixture(scope="module")
def service(new_service: Callable[..., Service]) -> Service:
    return new_service()


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with running(service) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


Alone = Callable[..., tuple[list[int], str]]


@pytest.fixture(scope="session")
def alone(decoder: Decoder, tokenizer: PreTrainedTokenizerBase) -> Alone:
    """Tokens and text that the decoder alone writes behind a prompt."""

    def write(prompt_ids: list[int], max_new_tokens: int, seed: int, sequence: int = 0) -> tuple[list[int], str]:
        request = make_request(decoder.model.base_model, prompt_ids, max_new_tokens, seed, sequence)
        token_ids = decoder.answer(request).token_ids
        return token_ids, tokenizer.decode(token_ids, skip_special_tokens=True)

    return write


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Until it holds; fails if it never does."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


def model_directory(root: Path, decoder: Decoder, tokenizer: PreTrainedTokenizerBase) -> Path:
    """An adapter directory beside its base model."""
    decoder.model.base_model.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    decoder.model.save_pretrained(root / "adapter")
    return root / "adapter"
