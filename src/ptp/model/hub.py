"""Adapters on the Hugging Face Hub, reached through its own client; the rest of the package sees directories."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HTTPError, RevisionResolutionError

from ptp.errors import AdapterError

OWNED = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"


def is_hub_id(name: str) -> bool:
    """Whether a name could be that of a hub's repository, `owner/name`, rather than a path."""
    return re.fullmatch(OWNED, name) is not None


def download(
    repo_id: str, patterns: Sequence[str], revision: str | None = None, token: str | bool | None = None
) -> Path:
    """The files of a repository that fit the patterns, in the hub's cache; without network, what is there already.

    Raises `AdapterError` if there are none to be had.
    """
    with _one_line(f"no such directory: {repo_id}; nor could it be fetched as an adapter from the hub"):
        return Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=list(patterns)))


def upload(folder: Path, repo_id: str, private: bool | None = None, token: str | bool | None = None) -> str:
    """Put a folder's files into a repository, which is made if it is not there; returns the commit's address.

    Raises `AdapterError` if the hub refuses.
    """
    with _one_line(f"cannot push to {repo_id}"):
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload adapter").commit_url


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """The client's errors as `AdapterError`."""
    try:
        yield
    except (OSError, ValueError, HTTPError, RevisionResolutionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise AdapterError(f"{what}: {reason}") from error
