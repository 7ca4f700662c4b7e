"""Adapters leave for the hub and come back; the hub itself is replaced at its client's boundary."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from transformers import LlamaForCausalLM

from ptp import AdapterError, PTPConfig, PTPModel, SamplingRule
from ptp.model import hub
from ptp.model.adapter import CODE, FILES, PEFT_CONFIG, SETTINGS, find_adapter, weights_hash
from ptp.model.card import measured_runs
from ptp.model.repository import write_repository

REPOSITORY, BASE = "someone/parallel-llama", "someone/llama"
PUSHED = sorted([*FILES, *CODE, "README.md"])

MEASUREMENT = {
    "budget": 12,
    "num_prompts": 24,
    "num_tokens": 1974,
    "num_calls": 1026,
    "tokens_per_call": 1.9239766,
    "standard_error": 0.0415,
    "simulated": 2.37,
    "simulated_short": 2.35,
}


@pytest.fixture
def model(tiny_llama: Callable, random_adapter: Callable) -> PTPModel:
    model = random_adapter(PTPModel(tiny_llama(), PTPConfig(window=4, lora_rank=2)))
    model.rule = SamplingRule(temperature=0.7, top_p=0.95)
    return model


@pytest.fixture
def experiment(model: PTPModel, tmp_path: Path) -> Path:
    """An adapter with files around it that must not leave the machine."""
    directory = tmp_path / "experiment"
    model.save_pretrained(directory / "adapter")
    for name in ("adapter/optimizer.pt", "adapter/training.json", "checkpoints/checkpoint-1/model.safetensors"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("{}")
    return directory


class Hub:
    """What the client was asked for; keeps the folders that it was handed."""

    def __init__(self, root: Path) -> None:
        self.root, self.created, self.downloads = root, list[Any](), list[Any]()

    def create_repo(self, api: HfApi, repo_id: str, **options: Any) -> None:
        self.created.append((repo_id, options, api.token))

    def upload_folder(self, api: HfApi, *, repo_id: str, folder_path: Path, **_: Any) -> SimpleNamespace:
        shutil.copytree(folder_path, self.root / repo_id)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def snapshot_download(self, repo_id: str, **options: Any) -> str:
        self.downloads.append((repo_id, options))
        return str(self.root / repo_id)

    def files(self, repo_id: str = REPOSITORY) -> list[str]:
        folder = self.root / repo_id
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub(tmp_path / "hub")
    monkeypatch.setattr(HfApi, "create_repo", lambda api, *args, **options: fake.create_repo(api, *args, **options))
    monkeypatch.setattr(HfApi, "upload_folder", lambda api, **options: fake.upload_folder(api, **options))
    monkeypatch.setattr(hub, "snapshot_download", fake.snapshot_download)
    return fake


def bench_line(adapter: Path, **changes: Any) -> dict[str, Any]:
    """A line of bench.jsonl, in the fields a card reads."""
    figures = {"num_questions": 80, "tokens_per_call": 2.909, "acceptance_rate": 0.75, "speedup": 1.478}
    easier = figures | {"num_questions": 20, "tokens_per_call": 3.5, "acceptance_rate": None, "speedup": 2.0}
    line = {
        "date": "2026-11-23T19:23:08+00:00",
        "command": ["/home/someone/bin/ptp", "bench", "/home/someone/experiment", "--prompts", "question.jsonl"],
        "hardware": "A Processor, 2 cores",
        "versions": {"torch": "2.13.0"},
        "num_threads": 1,
        "adapter": weights_hash(adapter),
        "dtype": "float32",
        "sampling": SamplingRule(temperature=0.2).model_dump(mode="json"),
        "budget": 24,
        "max_new_tokens": 128,
        "prompts": "/home/someone/question.jsonl",
        "verdicts": {"identical": 79, "near-tie": 1, "mismatch": 0},
        "results": {"overall": {"PTP": figures, "plain loop": {}}, "summarization": {"PTP": easier, "plain loop": {}}},
    }
    return line | changes


def write_lines(experiment: Path, *lines: dict[str, Any]) -> None:
    (experiment / "bench.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def card(experiment: Path, tmp_path: Path) -> ModelCard:
    folder = tmp_path / f"folder-{len(list(tmp_path.iterdir()))}"
    write_repository(experiment / "adapter", folder, REPOSITORY, BASE)
    return ModelCard.load(folder / "README.md")


def window_logits(model: PTPModel) -> torch.Tensor:
    with torch.no_grad(), model.gate.opened(0):
        return model.base_model(torch.tensor([[3, 4, 5]])).logits


# There and back


def test_a_pushed_adapter_comes_back_by_its_id(model: PTPModel, fake_hub: Hub, tiny_llama: Callable) -> None:
    url = model.push_to_hub(REPOSITORY, base_model=BASE, private=True, token="hf_key")
    assert url == f"https://hub/{REPOSITORY}/commit/1"
    assert fake_hub.created == [(REPOSITORY, {"private": True, "exist_ok": True}, "hf_key")]
    loaded = PTPModel.from_pretrained(REPOSITORY, tiny_llama(), revision="v1", token="hf_key")
    assert fake_hub.downloads == [
        (REPOSITORY, {"revision": "v1", "token": "hf_key", "allow_patterns": list(FILES)}),
    ]
    assert torch.equal(window_logits(loaded), window_logits(model))
    assert (loaded.rule, loaded.ptp_config) == (model.rule, model.ptp_config)


def test_only_the_adapter_and_its_card_are_pushed(
    experiment: Path, fake_hub: Hub, tiny_llama: Callable, tmp_path: Path
) -> None:
    PTPModel.from_pretrained(experiment, tiny_llama()).push_to_hub(REPOSITORY, base_model=BASE)
    assert fake_hub.files() == PUSHED
    write_repository(experiment / "adapter", tmp_path / "folder", REPOSITORY, BASE)
    folder = tmp_path / "hub" / REPOSITORY
    for name in PUSHED:
        assert (tmp_path / "folder" / name).read_bytes() == (folder / name).read_bytes(), name


def test_the_base_model_is_known_by_its_id_and_no_path_leaves_the_machine(tiny_llama: Callable, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model = PTPModel(LlamaForCausalLM.from_pretrained(tmp_path / "base"), PTPConfig(window=4, lora_rank=2))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="give its hub id"):
        write_repository(tmp_path / "adapter", tmp_path / "folder", REPOSITORY)
    assert not (tmp_path / "folder").exists()
    write_repository(tmp_path / "adapter", tmp_path / "folder", REPOSITORY, BASE)
    assert json.loads((tmp_path / "folder" / SETTINGS).read_text())["base_model"] == BASE
    assert json.loads((tmp_path / "folder" / PEFT_CONFIG).read_text())["base_model_name_or_path"] == BASE
    for path in (tmp_path / "folder").rglob("*.[jmp]*"):
        assert b"../base" not in path.read_bytes()


def test_an_adapter_made_before_there_was_code_is_pushed_with_it(experiment: Path, tmp_path: Path) -> None:
    shutil.rmtree(experiment / "adapter" / "custom_generate")
    write_repository(experiment / "adapter", tmp_path / "folder", REPOSITORY, BASE)
    assert (tmp_path / "folder" / CODE[0]).is_file()


@pytest.fixture
def cached(experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The adapter in the hub's cache, laid out by hand."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    repository, commit = tmp_path / "cache" / f"models--{REPOSITORY.replace('/', '--')}", "a" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    write_repository(experiment / "adapter", repository / "snapshots" / commit, REPOSITORY, BASE)
    return repository / "snapshots" / commit


def test_a_download_that_is_cached_needs_no_network(cached: Path) -> None:
    assert find_adapter(REPOSITORY) == cached
    with pytest.raises(AdapterError, match="no such directory: someone/other; nor could it be fetched") as missing:
        find_adapter("someone/other")
    assert "\n" not in str(missing.value)


def test_generate_by_id_writes_the_same(cached: Path, tiny_llama: Callable) -> None:
    model, ids = tiny_llama(), torch.tensor([[3, 4, 5]])
    plain = model.generate(ids, max_new_tokens=12)
    named = {"custom_generate": REPOSITORY, "trust_remote_code": True, "budget": 8}
    out = model.generate(ids, max_new_tokens=12, return_dict_in_generate=True, **named)
    assert torch.equal(out.sequences, plain)
    assert out.generations[0].num_draft_tokens > 0


def test_a_directory_and_a_slip_in_its_name_ask_nothing_of_the_hub(
    experiment: Path, fake_hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(experiment.parent.parent)
    directory = f"{experiment.parent.name}/{experiment.name}"
    assert find_adapter(directory) == Path(directory) / "adapter"
    with pytest.raises(AdapterError, match="no such directory"):
        find_adapter(f"{experiment.parent.name}/misspelt")
    assert fake_hub.downloads == []


@pytest.mark.parametrize("name", ["no-owner", "a/b/c", "../up", "", "a b/c"])
def test_a_name_that_is_no_repository_s_is_refused(experiment: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(AdapterError, match="owner/name"):
        write_repository(experiment / "adapter", tmp_path / "folder", name, BASE)


def test_a_folder_that_is_there_is_not_written_over(experiment: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(AdapterError, match="is there already"):
        write_repository(experiment / "adapter", tmp_path / "folder", REPOSITORY, BASE)


def test_what_the_hub_says_is_one_line(model: PTPModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("401 Unauthorized\nInvalid username or password.")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(AdapterError, match=r"cannot push to someone/parallel-llama: 401 Unauthorized$"):
        model.push_to_hub(REPOSITORY, base_model=BASE)


# The card


def test_a_card_without_measurements_says_so_and_gives_no_figure(experiment: Path, tmp_path: Path) -> None:
    found = card(experiment, tmp_path)
    assert "## Measured\n\nNot measured.\n" in found.content
    assert found.data.eval_results is None
    assert found.data.base_model == BASE
    assert "custom_generate" in found.data.tags
    assert "license" not in found.data.to_dict()


def test_a_card_shows_what_was_measured_and_how(experiment: Path, tmp_path: Path) -> None:
    adapter = experiment / "adapter"
    (adapter / "measurement.json").write_text(json.dumps(MEASUREMENT))
    write_lines(experiment, bench_line(adapter))
    found = card(experiment, tmp_path)
    text = found.content
    held_out = SamplingRule(temperature=0.7, top_p=0.95)
    assert f"| held-out prompts | 24 | {held_out} | 12 | 1.92 | not measured | not measured |" in text
    rule = SamplingRule(temperature=0.2)
    assert f"| question.jsonl | 80 | {rule} | 24 | 2.91 | 75 % | 1.48x |" in text
    assert f"| question.jsonl: summarization | 20 | {rule} | 24 | 3.50 | not measured | 2.00x |" in text
    for said in ("A Processor, 2 cores", "torch 2.13.0", "float32", "79 identical, 1 near-tie, 0 mismatch"):
        assert said in text
    assert "`ptp bench experiment --prompts question.jsonl`" in text
    assert "/home" not in text
    results = {(result.dataset_name, result.metric_type): result.metric_value for result in found.data.eval_results}
    assert results == {
        ("held-out prompts", "tokens_per_call"): 1.924,
        ("question.jsonl", "tokens_per_call"): 2.909,
        ("question.jsonl", "speedup"): 1.478,
        ("question.jsonl: summarization", "tokens_per_call"): 3.5,
        ("question.jsonl: summarization", "speedup"): 2.0,
    }


def test_measurements_of_other_weights_are_not_shown(experiment: Path, tiny_llama: Callable, fake_hub: Hub) -> None:
    adapter = experiment / "adapter"
    (adapter / "measurement.json").write_text(json.dumps(MEASUREMENT))
    old = bench_line(adapter)
    del old["adapter"]
    write_lines(experiment, old, bench_line(adapter) | {"adapter": "another"})
    assert [run.prompts for run in measured_runs(adapter)] == ["held-out prompts"]
    changed = PTPModel.from_pretrained(experiment, tiny_llama())
    with torch.no_grad():
        next(changed.auxiliary.parameters()).add_(1)
    changed.push_to_hub(REPOSITORY, base_model=BASE)
    assert "Not measured." in (fake_hub.root / REPOSITORY / "README.md").read_text()


def test_of_runs_under_the_same_conditions_the_last_counts(experiment: Path) -> None:
    adapter = experiment / "adapter"
    lines = [bench_line(adapter, date=date, budget=budget) for date, budget in [("1", 8), ("2", 24), ("3", 8)]]
    write_lines(experiment, *lines)
    found = sorted((run.budget, run.conditions["measured"]) for run in measured_runs(adapter))
    assert found == [(8, "3"), (24, "2")]


def test_what_was_counted_and_then_timed_is_shown_once(experiment: Path) -> None:
    adapter = experiment / "adapter"
    (adapter / "measurement.json").write_text(json.dumps(MEASUREMENT))
    rule = SamplingRule(temperature=0.7, top_p=0.95).model_dump(mode="json")
    timed = bench_line(adapter, date="1", budget=12, prompts=None, sampling=rule)
    write_lines(experiment, timed, timed | {"budget": 8})
    assert [(run.budget, run.conditions["measured"]) for run in measured_runs(adapter)] == [(12, "1"), (8, "1")]
    write_lines(experiment, timed | {"prompts": "question.jsonl"})
    assert [run.prompts for run in measured_runs(adapter)] == ["held-out prompts", "question.jsonl"]


def test_a_card_names_a_dataset_of_the_hub_and_no_local_one(experiment: Path, tmp_path: Path) -> None:
    (experiment / "runs").mkdir()
    for path, expected in [("someone/prompts", ["someone/prompts"]), ("/home/someone/prompts.jsonl", None)]:
        config = {"data": {"path": path, "mode": "prompt-distill"}}
        (experiment / "adapter" / "training.json").write_text(json.dumps({"config": config, "step": 600}))
        run = {"config": config, "command": ["/home/someone/bin/ptp_train", "DIR"], "versions": {"torch": "2.13.0"}}
        (experiment / "runs" / "train.json").write_text(json.dumps(run))
        found = card(experiment, tmp_path)
        assert found.data.datasets == expected
        assert "/home" not in found.content
        for said in ("optimiser steps: 600", "mode `prompt-distill`", "command: `ptp_train DIR`", "torch 2.13.0"):
            assert said in found.content


def test_the_run_of_another_training_is_not_shown(experiment: Path, tmp_path: Path) -> None:
    (experiment / "adapter" / "training.json").write_text(json.dumps({"config": {}, "step": 600}))
    (experiment / "runs").mkdir()
    run = {"config": {"model": {}}, "command": ["ptp_train", "DIR"], "versions": {"torch": "2.13.0"}}
    (experiment / "runs" / "train.json").write_text(json.dumps(run))
    assert "2.13.0" not in card(experiment, tmp_path).content
