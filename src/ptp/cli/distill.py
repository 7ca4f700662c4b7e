"""`ptp distill MODEL DATASET`: set up an experiment directory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ptp.cli.common import console, note, run
from ptp.config import Mode, Tracker, Turns
from ptp.errors import ConfigError


def command(
    model: Annotated[str, typer.Argument(help="Base model: hub id or local path.")],
    dataset: Annotated[str, typer.Argument(help="Dataset: hub id, or a local file or folder.")],
    mode: Annotated[
        Optional[Mode], typer.Option(help="What the adapter learns from (default: asked).", show_default=False)
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing; take what suits the data.")] = False,
    output_dir: Annotated[
        Optional[Path], typer.Option(help="Experiment directory (default: experiments/<model>_<dataset>_<mode>).")
    ] = None,
    config: Annotated[Optional[str], typer.Option(help="The dataset's configuration.")] = None,
    split: Annotated[Optional[str], typer.Option(help='Its split, such as "train" or "train[:5000]".')] = None,
    revision: Annotated[Optional[str], typer.Option(help="Its revision on the hub.")] = None,
    column: Annotated[Optional[str], typer.Option(help="Column of the chats or texts (default: found).")] = None,
    prompt_scheme: Annotated[
        Optional[str],
        typer.Option(help='Format string over the columns that makes a prompt, such as "{question}" (default: found).'),
    ] = None,
    user_turn: Annotated[
        Optional[bool],
        typer.Option(
            help="Put the prompt scheme into the chat template as the user's turn (default: if there is a template).",
            show_default=False,
        ),
    ] = None,
    turns: Annotated[Turns, typer.Option(help="Which turns of the assistant get a prompt.")] = "each",
    drop_system: Annotated[bool, typer.Option("--drop-system", help="Leave system messages out.")] = False,
    chat_template: Annotated[
        Optional[Path], typer.Option(help="File with a chat template, in place of the tokenizer's own.")
    ] = None,
    window: Annotated[int, typer.Option(min=1, help="L, positions predicted together.")] = 16,
    windows_per_sequence: Annotated[
        Optional[int], typer.Option(min=1, help="N, windows on a packed sequence (default: N·L covers it once).")
    ] = None,
    max_length: Annotated[
        Optional[int],
        typer.Option(
            min=8, help="Tokens of a sequence, prompt and completion (default: 1024, or the model's context)."
        ),
    ] = None,
    num_prompts: Annotated[
        Optional[int], typer.Option(min=1, help="Use the first so many prompts (default: all).")
    ] = None,
    completions_per_prompt: Annotated[int, typer.Option(min=1, help="Completions to sample of each prompt.")] = 1,
    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of the gated LoRA.")] = 32,
    tracker: Annotated[Tracker, typer.Option(help="Where training reports to.")] = "tensorboard",
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.7,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = 50,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens that together reach this mass.")] = 0.95,
    settings: Annotated[
        Optional[list[str]], typer.Option("--set", help="Any other setting, as section.key=value; may be repeated.")
    ] = None,
) -> None:
    """Set up an experiment that makes MODEL parallel on DATASET: asks on a terminal, or takes flags.

    In prompt-distill and prompt-scheme-distill the base model answers the dataset's chats, or prompts made from its
    columns, and the adapter learns from the answers. In full-chat and fixed it learns from the chats' assistant turns,
    or from texts, as they are.
    """
    if mode is None and not yes and not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ConfigError("no terminal to ask on: give --mode, or --yes for what suits the data")

    from ptp.cli.questions import ask, ask_to_write, show
    from ptp.experiment import ExperimentConfig, apply_override, check_new
    from ptp.stages.distill import Answers, Example, distill, survey

    template = str(chat_template.resolve()) if chat_template else None
    answers = Answers(
        mode=mode,
        column=column,
        prompt_scheme=prompt_scheme,
        user_turn=user_turn,
        turns=turns,
        drop_system=drop_system,
        window=window,
        windows_per_sequence=windows_per_sequence,
        max_length=max_length,
        num_prompts=num_prompts,
        completions_per_prompt=completions_per_prompt,
        lora_rank=lora_rank,
        tracker=tracker,
    )
    # Paths are kept absolute: commands may be run from anywhere.
    model, dataset = (str(Path(name).resolve()) if Path(name).exists() else name for name in (model, dataset))
    if output_dir is not None:
        check_new(output_dir)
    data = {"path": dataset, "config": config, "split": split, "revision": revision, "chat_template": template}
    with console.status("looking at model and data"):
        found = survey(model, data)
    asking = mode is None and not yes
    if asking:
        answers = ask(found, answers)
    values: dict[str, Any] = answers.settings(found)
    values["base_model"] = model
    values["data"] |= {key: value for key, value in data.items() if value is not None}
    values["sampling"] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    for setting in settings or []:
        apply_override(values, setting)
    experiment_config = ExperimentConfig(**values)
    name = f"{Path(model).name}_{Path(dataset).name.partition('.')[0]}_{experiment_config.data.mode}"
    directory = output_dir or Path("experiments") / name

    def approve(example: Example) -> None:
        if not asking:
            note(f"{found.described}; mode {experiment_config.data.mode}")
        show(example)
        if asking and not ask_to_write(directory):
            raise typer.Exit(1)

    distill(directory, experiment_config, approve)
    print(directory)
    note(f"next: {'ptp_pregenerate' if experiment_config.data.distils else 'ptp_train'} {directory}")


def main() -> None:
    """Entry point of `ptp_distill`."""
    run(lambda: typer.run(command))
