"""A tiny chat model behind a real server on loopback, asked by the real `openai` client."""

from collections.abc import Callable, Iterator
from copy import deepcopy

import openai
import pytest
import torch
from model_server import NAME, Alone, running
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ptp.config import PTPConfig
from ptp.decoding.decoder import Decoder
from ptp.decoding.requests import make_request
from ptp.model.ptp_model import PTPModel
from ptp.sampling import SamplingRule
from ptp.server.api import Service
from ptp.server.run import make_service


@pytest.fixture(scope="session")
def tokenizer(chat_experiment: Callable, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    directory = tmp_path_factory.mktemp("chat")
    chat_experiment(directory)
    return AutoTokenizer.from_pretrained(directory / "model")


@pytest.fixture(scope="session")
def base_model(tiny_llama: Callable, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    base_model = tiny_llama(vocab_size=len(tokenizer), context=256)
    # It writes few tokens, so that drafts are often right by chance; two of them are the bytes of "é".
    written = [*tokenizer.convert_tokens_to_ids([*"abcxyz.,+12", "Ã", "©"]), *base_model.generation_config.eos_token_id]
    unwritten = torch.ones(len(tokenizer), dtype=torch.bool).index_fill(0, torch.tensor(written), False)
    with torch.no_grad():
        base_model.lm_head.weight[unwritten] = 0
    return base_model


@pytest.fixture(scope="session")
def decoder(base_model: PreTrainedModel, random_adapter: Callable) -> Decoder:
    model = random_adapter(PTPModel(deepcopy(base_model), PTPConfig(window=5)), std=0.3)
    model.rule = SamplingRule(temperature=0.7, top_k=4)
    model.survival = (0.7, 0.5, 0.3, 0.2)
    return Decoder(model, budget=10)


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


@pytest.fixture(scope="session")
def alone(decoder: Decoder, tokenizer: PreTrainedTokenizerBase) -> Alone:
    """Tokens and text that the decoder alone writes behind a prompt."""

    def write(prompt_ids: list[int], max_new_tokens: int, seed: int, sequence: int = 0) -> tuple[list[int], str]:
        request = make_request(decoder.model.base_model, prompt_ids, max_new_tokens, seed, sequence)
        token_ids = decoder.answer(request).token_ids
        return token_ids, tokenizer.decode(token_ids, skip_special_tokens=True)

    return write
