"""benchmarks/recipe.py: what it compares can be trained, and what it measures is decoding."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ptp.experiment import Experiment
from ptp.stages.distill import distill
from ptp.stages.pregenerate import pregenerate

SCRIPTS = Path(__file__).parent.parent / "benchmarks"
SHORT = ["--steps", "2", "--num-prompts", "2", "--max-new-tokens", "12", "--budget", "6"]
SMALL = ["model.lora_rank=1", "model.chain_size=8", "train.windows_per_sequence=8", "model.lora_targets=all-linear"]


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("recipe")


@pytest.fixture(scope="module")
def folder(tiny_experiment: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bench whose base model and completions are there."""
    folder = tmp_path_factory.mktemp("bench")
    made = distill(folder / "code", tiny_experiment(folder))
    pregenerate(made)
    (folder / "code" / "teacher").mkdir()
    (folder / "code" / "prompts.jsonl").touch()
    return folder


def test_every_arm_is_a_setting_that_can_be_trained(recipe: Any, folder: Path) -> None:
    experiment = Experiment.load(folder / "code")
    configs = {arm: recipe.changed_by(arm, 0, experiment, []).config for arm in recipe.ARMS}
    differing = {config.model_dump_json() for config in configs.values()}
    # What the tiny experiment is already, an arm does not change.
    assert len(differing) >= len(configs) - 6
    assert configs["paper"].train.kl_share(configs["paper"].model) == 0
    assert configs["recipe"].train.kl_share(configs["recipe"].model) == 1


def test_a_bench_measures_decoding_keeps_its_runs_and_lets_arms_join(
    recipe: Any, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = [str(folder), *SMALL, *SHORT, "--seeds", "1", "--arms"]
    recipe.main([*arguments, "recipe", "probability order"])
    capsys.readouterr()
    recipe.main([*arguments, "paper", "recipe"])
    out = capsys.readouterr().out
    runs = [json.loads(line) for line in (folder / "code" / "recipe.jsonl").read_text().splitlines()]
    assert [run["arm"] for run in runs] == ["recipe", "probability order", "paper"]
    for run in runs:
        assert run["num_wrong"] == 0
        assert list(run["tau"]) == ["0.7", "greedy", "1"]
        assert all(1 <= tau <= 7 for tau in run["tau"].values())
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("|")]
    assert {row[0] for row in rows[2:]} == {"recipe", "paper"}
    assert out.splitlines()[-1] == "texts that were not those of plain decoding: 0"


def test_a_share_of_the_documents_is_trained_on_fewer(
    recipe: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}
    train = recipe.train

    def counted(experiment: Experiment, documents: Any) -> Any:
        seen[arm] = len(documents)
        return train(experiment, documents)

    monkeypatch.setattr(recipe, "train", counted)
    monkeypatch.setitem(recipe.SHARES, "a tenth of the completions", 0.3)
    for arm in ("recipe", "a tenth of the completions"):
        recipe.main([str(folder), *SMALL, *SHORT, "--seeds", "1", "--steps", "1", "--arms", arm])
    assert 0 < seen["a tenth of the completions"] < 0.4 * seen["recipe"]


def test_a_base_model_of_the_assets_needs_them(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PTP_ASSETS", raising=False)
    with pytest.raises(SystemExit, match="PTP_ASSETS"):
        recipe.main([str(tmp_path), "--teacher", "stories260K"])
