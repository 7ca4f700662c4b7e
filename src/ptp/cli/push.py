"""`ptp push DIR OWNER/NAME`: put an adapter on the hub, with what was measured of it."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Optional

import typer

from ptp.cli.common import note


def command(
    directory: Annotated[Path, typer.Argument(help="Experiment or adapter directory.")],
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository, made if it is not there.")],
    base_model: Annotated[
        Optional[str], typer.Option(help="The base model's hub id, if it was trained from a path.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    to: Annotated[Optional[Path], typer.Option(help="Only write what would be pushed, into this new folder.")] = None,
) -> None:
    """Push an adapter to the Hugging Face Hub: its files, a model card of what was measured, and nothing else."""
    from ptp.model.adapter import find_adapter
    from ptp.model.hub import upload
    from ptp.model.repository import write_repository

    adapter = find_adapter(directory)
    if to is not None:
        write_repository(adapter, to, repo_id, base_model)
        note(f"wrote {to}; look at README.md, then push it with: hf upload {repo_id} {to}")
        return
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "repository"
        write_repository(adapter, folder, repo_id, base_model)
        print(upload(folder, repo_id, private=private or None))
