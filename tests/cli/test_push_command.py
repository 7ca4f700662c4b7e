from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import Result, check_refused, typed
from huggingface_hub import HfApi

from ptp import PTPConfig, PTPModel
from ptp.cli.main import main

REPOSITORY = "someone/parallel-llama"


@pytest.fixture
def adapter(tiny_llama: Callable, tmp_path: Path) -> Path:
    PTPModel(tiny_llama(), PTPConfig(window=4, lora_rank=2)).save_pretrained(tmp_path / "experiment" / "adapter")
    return tmp_path / "experiment"


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the hub gets: names of repository and of files, and whether it is private."""
    uploads: list[Any] = []

    def upload_folder(_: HfApi, *, repo_id: str, folder_path: Path, **__: Any) -> SimpleNamespace:
        uploads.append((repo_id, sorted(path.name for path in folder_path.rglob("*") if path.is_file())))
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    monkeypatch.setattr(HfApi, "create_repo", lambda _, repo_id, private, exist_ok: uploads.append((repo_id, private)))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return uploads


def push(*arguments: object) -> Result:
    return typed(main, "push", *arguments)


def test_push_uploads_an_experiment_s_adapter(adapter: Path, uploads: list[Any]) -> None:
    result = push(adapter, REPOSITORY, "--base-model", "someone/llama", "--private")
    assert (result.code, result.out) == (0, f"https://hub/{REPOSITORY}/commit/1\n")
    assert uploads[0] == (REPOSITORY, True)
    assert uploads[1][1] == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "auxiliary.safetensors",
        "generate.py",
        "ptp_config.json",
        "requirements.txt",
    ]


def test_push_to_a_folder_uploads_nothing(adapter: Path, uploads: list[Any], tmp_path: Path) -> None:
    result = push(adapter, REPOSITORY, "--base-model", "someone/llama", "--to", tmp_path / "folder")
    assert result.code == 0
    assert uploads == []
    assert f"# {REPOSITORY}" in (tmp_path / "folder" / "README.md").read_text()


def test_a_base_model_without_a_name_is_asked_for(adapter: Path, uploads: list[Any]) -> None:
    check_refused(push(adapter, REPOSITORY), "hub id", "base-model")
    assert uploads == []
