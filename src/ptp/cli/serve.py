"""`ptp serve DIR`: answer OpenAI's API over HTTP, several clients at a time."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from ptp.cli.common import STARTER, AdapterArgument, BudgetOption, note
from ptp.errors import ConfigError


def command(
    directory: AdapterArgument = STARTER,
    host: Annotated[str, typer.Option(help="Address to listen on; others than this one need a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str, typer.Option(envvar="PTP_API_KEY", help="Key that clients must send.", show_default=False)
    ] = "",
    name: Annotated[
        Optional[str], typer.Option(help="The model's name for clients (default: the directory's).", show_default=False)
    ] = None,
    max_batch_size: Annotated[int, typer.Option(min=1, help="Texts decoded together.")] = 8,
    max_queue: Annotated[int, typer.Option(min=0, help="Texts that may wait; further ones are turned away.")] = 64,
    max_prompt_tokens: Annotated[
        Optional[int], typer.Option(min=1, help="Longest prompt (default: the model's context).", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest text that may be asked for.")] = 2048,
    budget: BudgetOption = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the checkpoint's own.")] = "auto",
) -> None:
    """Answer OpenAI's API, and show a page to try it; unless asked otherwise, sample by the adapter's own rule."""
    try:
        from ptp.server.api import is_loopback
        from ptp.server.run import bind, make_service, serve
    except ImportError as error:
        raise ConfigError(
            f"a server needs the package {error.name}; pip install fastapi uvicorn openai prometheus-client"
        ) from None
    from ptp.decoding.decoder import Decoder
    from ptp.model.adapter import find_adapter, read_settings, resolve_base_model
    from ptp.model.loading import load_tokenizer
    from ptp.model.ptp_model import PTPModel

    if not (is_loopback(host) or api_key):
        raise ConfigError(f"other machines reach {host}: give a key with --api-key or PTP_API_KEY, or keep 127.0.0.1")
    adapter = find_adapter(directory)
    # Before a large model is loaded for nothing.
    with bind(host, port) as listening:
        tokenizer = load_tokenizer(resolve_base_model(adapter, read_settings(adapter).base_model))
        service = make_service(
            Decoder(PTPModel.from_pretrained(adapter, dtype=dtype), budget=budget),
            tokenizer,
            name or directory.resolve().name,
            host=host,
            api_key=api_key,
            num_slots=max_batch_size,
            max_waiting=max_queue,
            max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=max_new_tokens,
        )
        serve(service, listening, announce=note)
