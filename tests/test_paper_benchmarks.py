"""The scripts of benchmarks/paper: they run, and measure what they say."""

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from trainings import CONFIG, RULE

from ptp.config import PTPConfig
from ptp.data.documents import Document, Documents
from ptp.data.packing import collate
from ptp.decoding.decoder import Decoder
from ptp.decoding.requests import make_request
from ptp.experiment import Experiment
from ptp.model.ptp_model import PTPModel
from ptp.sampling import SamplingRule, pick, warp
from ptp.stages.distill import distill
from ptp.stages.pregenerate import pregenerate
from ptp.training.objective import make_stream

SCRIPTS = Path(__file__).parent.parent / "benchmarks" / "paper"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a script as its folder's, where it finds what it shares with the others."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module


@pytest.fixture(scope="module")
def experiment(tiny_experiment: Callable, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    directory = tmp_path_factory.mktemp("paper")
    made = distill(directory / "experiment", tiny_experiment(directory))
    pregenerate(made)
    return made


@pytest.mark.parametrize(
    ("name", "arguments", "rows"),
    [
        ("independent", ["--windows", "40"], 4),
        ("embeddings", ["--embeddings", "binary", "none"], 2),
        ("sizes", ["--sizes", "66k"], 1),
        ("mismatched", [], 4),
    ],
)
def test_a_script_ends_in_a_table_and_one_line_of_json(
    name: str, arguments: list[str], rows: int, experiment: Experiment, script: Callable, capsys: pytest.CaptureFixture
) -> None:
    script(name).main([str(experiment.directory), "model.lora_rank=1", "--steps", "2", "--seeds", "1", *arguments])
    lines = capsys.readouterr().out.splitlines()
    table = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    assert len(table) == 2 + rows
    assert len({len(row) for row in table}) == 1
    assert json.loads(lines[-1])["config"]["train"]["max_steps"] == 2
    assert json.loads(lines[-1])["config"]["model"]["lora_rank"] == 1
    assert not experiment.checkpoints.exists()


def test_a_pair_is_impossible_by_its_second_token_alone(script: Callable) -> None:
    independent = script("independent")
    possible = torch.tensor([[True, True, False, True], [False, True, True, False]])
    everything = torch.ones_like(possible)
    # PP, PI, IP: the second is impossible. IP, PP, PI: so is the third, after something impossible.
    assert independent.count_pairs(possible, everything) == independent.Pairs(6, 2, 2, 1)
    # An end token as the second draft: only one pair of each window belongs to the text.
    ended = torch.tensor([[True, True, False, False]] * 2)
    assert independent.count_pairs(possible, ended) == independent.Pairs(2, 0, 1, 0)


def test_a_token_is_possible_where_the_rule_gives_it_mass(script: Callable) -> None:
    logits = torch.tensor([5.0, 4.0, 1.0, -9.0])
    tokens = torch.arange(4)
    found = script("independent").possible_tokens(logits.expand(4, -1), tokens, SamplingRule(top_k=2))
    assert found[0].tolist() == [True, True, False, False]
    assert found[1].tolist() == [True, True, True, False]


def test_the_base_model_s_own_text_has_no_impossible_pair(script: Callable, tiny_llama: Callable) -> None:
    teacher, rule, context = tiny_llama(), RULE, torch.tensor([5, 6, 7])
    text = context
    for _ in range(6):
        text = torch.cat([text, pick(warp(teacher(text[None]).logits[0, -1:], rule), torch.rand(1))])
    judged = script("independent").judge(teacher, [context, context], torch.stack([text[3:]] * 2), rule)
    assert judged[0].all()
    logits = teacher(text[None]).logits[0, -2]
    unlikely = logits.argmin()
    text[-1] = unlikely
    judged = script("independent").judge(teacher, [context, text[:1]], torch.stack([text[3:]] * 2), rule)
    assert judged[0][0].tolist() == [True] * 4 + [False]


@pytest.mark.parametrize("variant", ["one_hot", "categorical"])
def test_windows_are_proposed_as_the_decoder_proposes_them(
    variant: str, script: Callable, tiny_llama: Callable, random_adapter: Callable
) -> None:
    config = PTPConfig(variant=variant, pick="exact", chain=0, window=4, lora_rank=2)
    model = random_adapter(PTPModel(tiny_llama(), config)).eval()
    model.rule = RULE
    rng = np.random.default_rng(0)
    documents = [Document(rng.integers(3, 40, size=20).astype(np.int32), ((5, 20),), number=n) for n in range(3)]
    batch = collate([make_stream(Documents.of(documents), CONFIG.model_copy(update={"beta": 1.0}), 4)[0]])
    for start, u, proposed in zip(
        batch["starts"][0].tolist(),
        batch["z"][0],
        script("independent").proposed_windows(model, batch, RULE)[0],
        strict=True,
    ):
        context = batch["ids"][0, start - int(batch["positions"][0, start]) : start]
        session = Decoder(model, RULE, budget=config.window).session()
        # One number more: a decoder does not draft the last token of a text.
        request = replace(make_request(model.base_model, context, 6, seed=0, end_token_ids=[]), u=F.pad(u, (0, 1)))
        text = session.enter(request)
        ((_, first),) = session.step()
        assert [*first.token_ids, *text.drafts] == proposed.tolist()


def test_stored_intervals_are_those_of_their_rule_and_agree_with_no_other(
    script: Callable, experiment: Experiment
) -> None:
    mismatched = script("mismatched")
    documents = mismatched.training_data(experiment).training
    teacher = mismatched.load_base_model(experiment.base_model).eval()
    rule = experiment.config.sampling
    same = mismatched.under_rule(documents, teacher, rule)
    assert mismatched.agreement(documents, documents) == pytest.approx(1)
    assert mismatched.agreement(same, documents) == pytest.approx(1, abs=1e-3)
    others = mismatched.other_rules(rule).values()
    shares = [mismatched.agreement(mismatched.under_rule(documents, teacher, other), documents) for other in others]
    assert 1 > shares[0] > shares[1] > mismatched.agreement(mismatched.uninformative(documents), documents)


def test_agreement_is_the_share_of_an_interval_that_lies_in_the_true_one(script: Callable) -> None:
    true = Document(np.zeros(5, np.int32), ((1, 5),), np.float32([0.25, 0.5, 0, 0]), np.float32([0.75, 1, 0.5, 0.5]))
    # Twice as wide as the true one; empty, which does not count; half in it; inside it.
    used = replace(true, lower=np.float32([0, 0.3, 0.25, 0.1]), upper=np.float32([1, 0.3, 0.75, 0.2]))
    found = script("mismatched").agreement(Documents.of([used]), Documents.of([true]))
    assert found == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)
