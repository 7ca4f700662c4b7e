"""`ptp generate DIR --prompt TEXT`: write a text, several tokens per call."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from ptp.cli.common import BudgetOption, console, run
from ptp.errors import DecodingError


def command(
    directory: Annotated[Path, typer.Argument(help="Experiment or adapter directory.")],
    prompt: Annotated[
        Optional[str], typer.Option(help="Text to complete (default: standard input).", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Names the stream of u: same seed, same text.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to write.")] = 128,
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
    """Complete a prompt; only verified text is printed, on a terminal as it comes."""
    from transformers import GenerationConfig, TextStreamer

    from ptp.decoding.decoder import Decoder
    from ptp.decoding.options import request_from
    from ptp.model.adapter import find_adapter, read_settings, resolve_base_model
    from ptp.model.loading import load_tokenizer
    from ptp.model.ptp_model import PTPModel
    from ptp.sampling import SamplingRule

    adapter = find_adapter(directory)
    settings = read_settings(adapter)
    trained_rule = settings.rule or SamplingRule()
    changes = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    rule = SamplingRule(**{**trained_rule.model_dump(), **{k: v for k, v in changes.items() if v is not None}})
    options = {"min_new_tokens": min_new_tokens, "repetition_penalty": repetition_penalty, "stop_strings": stop or []}
    if prompt is None:
        if sys.stdin.isatty():
            raise DecodingError("no prompt: give --prompt TEXT, or a text on standard input")
        prompt = sys.stdin.read()
    if not prompt:
        raise DecodingError("the prompt is empty; give some text to complete")
    base_model = resolve_base_model(adapter, settings.base_model)
    tokenizer = load_tokenizer(base_model)
    model = PTPModel.from_pretrained(adapter, dtype=dtype)
    prompt_ids = tokenizer(prompt)["input_ids"]
    config = GenerationConfig(**options)
    # Not among them: a configuration refuses a length in words of its own.
    config.max_new_tokens = max_new_tokens
    request = request_from(config, model.base_model, rule, prompt_ids, seed=seed, tokenizer=tokenizer)
    streams = sys.stdout.isatty() and not as_json
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if streams else None
    out = Decoder(model, rule, budget).answer(request, streamer)
    text = tokenizer.decode(out.token_ids, skip_special_tokens=True)
    if not as_json:
        if not streams:
            print(text)
        console.print(
            f"{len(out.token_ids)} tokens, {out.num_calls} calls, {out.tokens_per_call:.2f} tokens per call",
            style="dim",
        )
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
        "options": options,
        "seed": seed,
        "base_model": base_model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "finish_reason": out.finish_reason,
    }
    print(json.dumps(record))


def main() -> None:
    """Entry point of `ptp_generate`."""
    run(lambda: typer.run(command))
