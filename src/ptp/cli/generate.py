"""`ptp generate [DIR]`: a chat on a terminal, or the answer to one prompt, several tokens per call."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from ptp.cli.common import STARTER, AdapterArgument, BudgetOption, console, run
from ptp.errors import DecodingError

COMPLETION_TOKENS, ANSWER_TOKENS = 128, 1024
"""Most tokens to write unless told: a text may go on for ever, an answer ends by itself."""

STARTER_NAME = "a small model that comes with ptp and completes Python functions"
STARTER_HINT = "type the beginning of one, such as: def fibonacci(n):"
"""How a chat with the package's own model begins."""


def command(
    directory: AdapterArgument = STARTER,
    prompt: Annotated[
        Optional[str],
        typer.Option(
            help="Text to answer; left out on a terminal, a chat (default: standard input).", show_default=False
        ),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Complete the text as it is, without the model's chat template.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Names the stream of u: same seed, same text.")] = 0,
    max_new_tokens: Annotated[
        Optional[int],
        typer.Option(help=f"Most tokens to write (default: {ANSWER_TOKENS}; {COMPLETION_TOKENS} without a template)."),
    ] = None,
    min_new_tokens: Annotated[int, typer.Option(help="Tokens before which no end token is written.")] = 0,
    stop: Annotated[
        Optional[list[str]], typer.Option(help="End with the token that completes this text; may be repeated.")
    ] = None,
    budget: BudgetOption = "auto",
    temperature: Annotated[Optional[float], typer.Option(help="Instead of the adapter's own.")] = None,
    top_k: Annotated[Optional[int], typer.Option(help="Instead of the adapter's own.")] = None,
    top_p: Annotated[Optional[float], typer.Option(help="Instead of the adapter's own.")] = None,
    min_p: Annotated[Optional[float], typer.Option(help="Instead of the adapter's own.")] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1, tokens that are there already, prompt included, are less likely.")
    ] = 1.0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the checkpoint's own.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with tokens, u and counts.")] = False,
) -> None:
    """Chat on a terminal, or answer one prompt; only verified text is shown.

    A prompt is a user's turn in the model's chat template; without a template, or with --raw, a text to complete.
    """
    from transformers import TextStreamer

    from ptp.chat.figures import NO_DRAFTS
    from ptp.chat.prompts import prompt_ids as chat_prompt_ids
    from ptp.chat.prompts import user
    from ptp.chat.settings import Settings
    from ptp.decoding.decoder import Decoder
    from ptp.decoding.threads import decoding_threads
    from ptp.model.adapter import find_adapter, read_settings, resolve_base_model
    from ptp.model.loading import load_tokenizer
    from ptp.model.ptp_model import PTPModel
    from ptp.sampling import SamplingRule

    words = " ".join(str(directory).split())
    if " " in words and not os.path.exists(directory):  # noqa: PTH110 (Path's own raises where a text is too long)
        raise DecodingError(f"no such directory: {words[:60]}; a text to go on from is given as --prompt TEXT")
    adapter = find_adapter(directory)
    stored = read_settings(adapter)
    changes = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    given = {name: value for name, value in changes.items() if value is not None}
    rule = SamplingRule(**{**dict(stored.rule or SamplingRule()), **given})
    on_terminal = sys.stdout.isatty() and not as_json
    if prompt is None and not (sys.stdin.isatty() and on_terminal):
        if sys.stdin.isatty():
            raise DecodingError("no prompt: give --prompt TEXT, or a text on standard input")
        # `echo` ends its line; a prompt that is to end in a line break has two.
        prompt = sys.stdin.read().removesuffix("\n")
    if prompt == "":
        raise DecodingError("the prompt is empty; give some text to complete")
    base_model = resolve_base_model(adapter, stored.base_model)
    tokenizer = load_tokenizer(base_model)
    templated = bool(tokenizer.chat_template) and not raw
    if max_new_tokens is None:
        max_new_tokens = ANSWER_TOKENS if templated else COMPLETION_TOKENS
    settings = Settings(
        rule=rule,
        repetition_penalty=repetition_penalty,
        min_new_tokens=min_new_tokens,
        max_new_tokens=max_new_tokens,
        stop=tuple(stop or ()),
        seed=seed,
        budget=budget,
    )
    if prompt is None:
        from ptp.chat.chat import Chat
        from ptp.cli.chat import converse

        with console.status(f"loading {directory}"):
            model = PTPModel.from_pretrained(adapter, dtype=dtype)
        with decoding_threads(model.base_model.num_parameters()):
            with console.status("getting ready"):
                chat = Chat(model, tokenizer, settings, templated)
            if directory == STARTER:
                converse(chat, STARTER_NAME, STARTER_HINT)
            else:
                converse(chat, f"{Path(base_model).name} with the adapter in {directory}")
        return
    model = PTPModel.from_pretrained(adapter, dtype=dtype)
    prompt_ids = chat_prompt_ids(tokenizer, [user(prompt)]) if templated else list(tokenizer(prompt)["input_ids"])
    request = settings.request(model.base_model, tokenizer, prompt_ids)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if on_terminal else None
    if on_terminal and not templated:
        # A completion is read behind what it completes; standard output has the completion alone.
        console.print(prompt, style="dim", end="", soft_wrap=True)
    with decoding_threads(model.base_model.num_parameters()):
        out = Decoder(model, rule, budget).answer(request, streamer)
    text = tokenizer.decode(out.token_ids, skip_special_tokens=True)
    if not as_json:
        if not on_terminal:
            print(text)
        console.print(
            f"{len(out.token_ids)} tokens, {out.num_calls} calls, {out.tokens_per_call:.2f} tokens per call",
            style="dim",
        )
        if budget == "auto" and not out.num_draft_tokens:
            console.print(NO_DRAFTS.format("--budget 12"), style="dim", soft_wrap=True)
        return
    record = {
        "prompt_ids": prompt_ids,
        "token_ids": out.token_ids,
        "u": out.u,
        "text": text,
        "num_calls": out.num_calls,
        "num_draft_tokens": out.num_draft_tokens,
        "num_accepted_tokens": out.num_accepted_tokens,
        "tokens_per_call": out.tokens_per_call,
        "sampling": rule.model_dump(mode="json"),
        "options": {
            "min_new_tokens": min_new_tokens,
            "repetition_penalty": repetition_penalty,
            "stop_strings": stop or [],
        },
        "seed": seed,
        "base_model": base_model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "finish_reason": out.finish_reason,
    }
    print(json.dumps(record))


def main() -> None:
    """Entry point of `ptp_generate`."""
    run(lambda: typer.run(command))
