"""`ptp` and its subcommands. Heavy imports happen inside the commands, so that `ptp --help` answers at once."""

from __future__ import annotations

import typer

from ptp.cli import bench, demo, distill, generate, pregenerate, push, serve, train, verify
from ptp.cli.common import run

app = typer.Typer(
    help="Parallel Token Prediction: several tokens per call from any Hugging Face language model, losslessly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for name, module in {
    "demo": demo,
    "distill": distill,
    "pregenerate": pregenerate,
    "train": train,
    "generate": generate,
    "verify": verify,
    "bench": bench,
    "serve": serve,
    "push": push,
}.items():
    app.command(name)(module.command)


def main() -> None:
    """Entry point of `ptp`."""
    run(app)


if __name__ == "__main__":
    main()
