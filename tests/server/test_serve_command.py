"""`ptp serve` as it is typed."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import httpx2
import openai
import pytest
from command_line import check_refused, typed
from model_server import Alone
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptp.cli.main import main
from ptp.decoding.decoder import Decoder
from ptp.errors import ConfigError
from ptp.server.run import bind, make_service


@pytest.fixture(scope="module")
def directory(
    base_model: PreTrainedModel,
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """An adapter beside its base model."""
    root = tmp_path_factory.mktemp("served")
    base_model.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    decoder.model.base_model.config.name_or_path = str(root / "base")
    decoder.model.save_pretrained(root / "adapter")
    return root / "adapter"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2"])
def test_others_are_let_in_with_a_key_alone(directory: Path, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PTP_API_KEY", raising=False)
    check_refused(
        typed(main, "serve", directory, "--host", host, "--port", 0), f"other machines reach {host}", "PTP_API_KEY"
    )


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(directory: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        check_refused(typed(main, "serve", directory, "--port", port), f"cannot listen on 127.0.0.1 port {port}")
    with pytest.raises(ConfigError, match=r"cannot listen on no\.such\.host\.invalid port 0"):
        bind("no.such.host.invalid", 0)


def test_what_is_not_installed_is_named(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("ptp.server")]:
        monkeypatch.delitem(sys.modules, name)
    with patch.dict(sys.modules, {"prometheus_client": None}):
        check_refused(typed(main, "serve", directory), "prometheus_client", "pip install fastapi uvicorn openai")


def test_a_directory_without_an_adapter_is_refused(tmp_path: Path) -> None:
    check_refused(typed(main, "serve", tmp_path, "--port", 0), "holds no adapter")


def test_a_tokenizer_that_cannot_stream_is_refused(decoder: Decoder) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ConfigError, match="Slow is no fast tokenizer"):
        make_service(decoder, Slow(), "slow")


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_server_answers_until_it_is_asked_to_end_and_then_ends_what_it_has_begun(
    directory: Path, alone: Alone, tokenizer: PreTrainedTokenizerBase, stop: signal.Signals
) -> None:
    program = [sys.executable, "-c", "from ptp.cli.main import main; main()"]
    command = [*program, "serve", str(directory), "--port", "0", "--name", "mine", "--budget", "8"]
    environment = os.environ | {"PTP_API_KEY": "sesame", "COLUMNS": "200"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            said = ""
            while not (found := re.search(r"mine answers at (http://127\.0\.0\.1:\d+); Ctrl-C ends it", said)):
                line = process.stderr.readline()
                assert line, said
                said += line
            assert httpx2.get(f"{found[1]}/v1/models").status_code == 401
            with openai.OpenAI(base_url=f"{found[1]}/v1", api_key="sesame", max_retries=20) as client:
                options = {"model": "mine", "prompt": "1+1", "seed": 3, "max_tokens": 60}
                stream = client.completions.create(stream=True, **options)
                texts = [next(stream).choices[0].text]
                process.send_signal(stop)
                texts += [chunk.choices[0].text for chunk in stream]
            assert "".join(texts) == alone(tokenizer("1+1")["input_ids"], 60, 3)[1]
            assert process.wait(60) in (0, -stop)
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()
