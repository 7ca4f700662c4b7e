import itertools
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import PATIENCE, disk_with_room_for_files_of, forking
from endpoint_server import Reply, Script, Server, completion, serving
from transformers import LlamaForCausalLM

from ptp.cli import pregenerate as pregenerate_command
from ptp.data.documents import Documents, content_group
from ptp.data.store import CompletionStore
from ptp.data.teacher import sample_completions
from ptp.errors import ConfigError, DataError
from ptp.experiment import Experiment, ExperimentConfig
from ptp.model.loading import load_base_model, load_tokenizer
from ptp.sampling import SamplingRule, interval, pick, uniform, warp
from ptp.stages.distill import distill
from ptp.stages.pregenerate import import_completions, pregenerate
from ptp.stages.prepare import prepare
from ptp.stages.train import train

END = 1
ENDS = {END, *range(200, 212)}
"""So many that completions of a random model end early and late."""


@pytest.fixture(scope="module")
def config(tiny_experiment: Callable, tmp_path_factory: pytest.TempPathFactory) -> ExperimentConfig:
    directory = tmp_path_factory.mktemp("inputs")
    config = tiny_experiment(directory)
    path = directory / "model" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": sorted(ENDS)}))
    return config


@pytest.fixture
def experiment(config: ExperimentConfig, tmp_path: Path) -> Experiment:
    return distill(tmp_path / "experiment", config)


@pytest.fixture(scope="module")
def finished(config: ExperimentConfig, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """An experiment whose completions were sampled without a stop; not to be changed."""
    experiment = distill(tmp_path_factory.mktemp("finished") / "experiment", config)
    pregenerate(experiment)
    return experiment


def changed(experiment: Experiment, *overrides: str) -> Experiment:
    return Experiment.load(experiment.directory, overrides)


def stored(experiment: Experiment) -> Documents:
    return CompletionStore(experiment.completions).load()


def shards(experiment: Experiment) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(experiment.completions.glob("shard-*"))}


def files(directory: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in directory.rglob("*") if path.is_file()}


def refuse_to_load(*_: object) -> None:
    raise AssertionError("the base model is loaded")


# --- what is stored ---


@pytest.mark.parametrize(
    "rule",
    [
        SamplingRule(temperature=0.7, top_k=50, top_p=0.95),
        SamplingRule(),
        SamplingRule(temperature=0),
        SamplingRule(temperature=1.4, top_k=3, order="probability"),
        SamplingRule(temperature=0.9, top_p=0.5),
    ],
    ids=str,
)
@torch.no_grad()
def test_pick_of_u_gives_every_stored_token(config: ExperimentConfig, tmp_path: Path, rule: SamplingRule) -> None:
    settings = config.pregenerate.model_copy(update={"completions_per_prompt": 2, "seed": 11})
    experiment = distill(tmp_path, config.model_copy(update={"sampling": rule, "pregenerate": settings}))
    pregenerate(experiment)
    model: LlamaForCausalLM = load_base_model(experiment.base_model).eval()
    documents = stored(experiment)
    assert documents.numbers.tolist() == list(range(48))
    for document in documents:
        start, end = document.prompt_length, len(document)
        ids = torch.from_numpy(document.ids).long()
        distribution = warp(model(input_ids=ids[None]).logits[0, start - 1 : end - 1], rule)
        u = uniform(11, document.number, torch.arange(start, end))
        assert torch.equal(pick(distribution, u), ids[start:])
        lower, upper = torch.from_numpy(document.lower), torch.from_numpy(document.upper)
        assert ((lower <= u) & (u < upper)).all()
        for edge, exact in zip((lower, upper), interval(distribution, ids[start:]), strict=True):
            torch.testing.assert_close(edge, exact, atol=1e-5, rtol=0)


def test_every_prompt_is_completed_as_far_as_it_may_be(finished: Experiment) -> None:
    prompts, completions, settings = prepare(finished).documents, stored(finished), finished.config.pregenerate
    assert completions.numbers.tolist() == prompts.numbers.tolist() == list(range(24))
    for prompt, document in zip(prompts, completions, strict=True):
        assert document.spans == ((len(prompt), len(document)),)
        assert document.ids[: len(prompt)].tolist() == prompt.ids.tolist()
        assert document.group == prompt.group
        assert document.finished == (document.ids[-1] in ENDS)
        assert not ENDS & set(document.ids[len(prompt) : -1].tolist())
        longest = min(settings.max_length, len(prompt) + settings.max_new_tokens)
        assert document.finished or len(document) == longest
    assert 5 < sum(document.finished for document in completions) < 24


def test_completions_of_a_prompt_differ_and_share_its_group(experiment: Experiment) -> None:
    several = changed(experiment, "pregenerate.completions_per_prompt=4")
    pregenerate(several)
    prompts, completions = prepare(several).documents, stored(several)
    assert completions.numbers.tolist() == list(range(4 * len(prompts)))
    texts = {}
    for document in completions:
        assert document.group == prompts[document.number // 4].group
        texts.setdefault(document.number // 4, set()).add(tuple(document.ids.tolist()))
    # Two that end after a token or two may come out alike.
    assert all(len(found) > 1 for found in texts.values())
    assert sum(len(found) for found in texts.values()) > 0.9 * len(completions)


def test_the_seed_and_nothing_else_decides(experiment: Experiment, finished: Experiment, tmp_path: Path) -> None:
    pregenerate(experiment)
    assert shards(experiment) == shards(finished)
    settings = experiment.config.pregenerate.model_copy(update={"seed": 1})
    other = distill(tmp_path / "other", experiment.config.model_copy(update={"pregenerate": settings}))
    pregenerate(other)
    assert not {bytes(d.ids) for d in stored(other)} & {bytes(d.ids) for d in stored(finished)}


@pytest.mark.parametrize("batch_size", ["1", "2", "7", "auto"])
def test_completions_do_not_depend_on_the_batch_size(
    experiment: Experiment, finished: Experiment, batch_size: str
) -> None:
    pregenerate(changed(experiment, f"pregenerate.batch_size={batch_size}"))
    for document, expected in zip(stored(experiment), stored(finished), strict=True):
        assert document.ids.tolist() == expected.ids.tolist()
        np.testing.assert_allclose(document.lower, expected.lower, atol=1e-5)
        np.testing.assert_allclose(document.upper, expected.upper, atol=1e-5)


def test_a_batch_too_large_for_the_gpu_is_halved(
    experiment: Experiment, finished: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def sample(*arguments: Any, batch_size: int, **settings: Any) -> Any:
        sizes.append(batch_size)
        if batch_size > 2:
            raise torch.cuda.OutOfMemoryError
        return sample_completions(*arguments, batch_size=batch_size, **settings)

    monkeypatch.setattr("ptp.stages.pregenerate.sample_completions", sample)
    pregenerate(changed(experiment, "pregenerate.batch_size=8"))
    assert sizes == [8, 4, 2, 2, 2, 2, 2]
    assert [d.ids.tolist() for d in stored(experiment)] == [d.ids.tolist() for d in stored(finished)]


def test_num_prompts_takes_the_first_so_many(experiment: Experiment, finished: Experiment) -> None:
    pregenerate(changed(experiment, "pregenerate.num_prompts=12"))
    assert [d.ids.tolist() for d in stored(experiment)] == [d.ids.tolist() for d in stored(finished)[:12]]


def test_prompts_are_tokenised_once(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(experiment)
    monkeypatch.setattr("ptp.stages.prepare.write_documents", None)
    pregenerate(experiment)


def test_progress_counts_completions_and_tokens(experiment: Experiment) -> None:
    experiment = changed(experiment, "pregenerate.completions_per_prompt=2", "pregenerate.shard_size=10")
    prepare(experiment)
    reports: list[tuple[str, int, int, int]] = []
    pregenerate(experiment, lambda what, done, total, tokens=0: reports.append((what, done, total, tokens)))
    done = [done for _, done, _, _ in reports]
    assert {(what, total) for what, _, total, _ in reports} == {("completions", 48)}
    assert done == sorted(done)
    assert set(done) >= {0, 10, 20, 30, 40, 48}
    assert sum(tokens for *_, tokens in reports) == sum(len(d) - d.prompt_length for d in stored(experiment))


# --- stopped and started again ---


@pytest.mark.parametrize("stop", [0, 1, 3, 4])
def test_a_killed_run_goes_on_to_the_same_store_byte_for_byte(
    experiment: Experiment, finished: Experiment, stop: int
) -> None:
    def kill(what: str, done: int, total: int, tokens: int = 0) -> None:
        # In the middle of a shard: some of its tokens are sampled.
        if tokens and len(shards(experiment)) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pregenerate(experiment, kill)
    before = files(experiment.completions)
    assert len(shards(experiment)) == stop
    reports: list[tuple[str, int, int]] = []
    pregenerate(experiment, lambda what, done, total, tokens=0: reports.append((what, done, total)))
    assert reports[0] == ("completions", 5 * stop, 24)
    assert files(experiment.completions).items() >= before.items(), "what was stored is left as it was"
    assert shards(experiment) == shards(finished)


def test_a_finished_run_is_left_as_it_is(finished: Experiment) -> None:
    before = files(finished.completions)
    pregenerate(finished)
    assert files(finished.completions) == before


def test_a_file_that_was_being_written_is_no_shard(experiment: Experiment, finished: Experiment) -> None:
    pregenerate(experiment)
    shard = experiment.completions / "shard-00003.safetensors"
    shard.rename(shard.with_name(f".{shard.name}.123.tmp"))
    store = CompletionStore(experiment.completions)
    assert not store.holds(3)
    assert len(store.load()) == 19
    pregenerate(experiment)
    assert shards(experiment) == shards(finished)


def test_a_full_disk_is_one_line_and_what_is_stored_is_kept(experiment: Experiment) -> None:
    experiment = changed(experiment, "pregenerate.completions_per_prompt=4", "pregenerate.shard_size=32")
    pregenerate(experiment)
    whole = shards(experiment)
    first, *others = whole
    # Room for the record of the run, not for a shard.
    room = 200 + (experiment.directory / "runs" / "pregenerate.json").stat().st_size
    assert room < min(map(len, whole.values()))
    for name in others:
        (experiment.completions / name).unlink()
    with disk_with_room_for_files_of(room), pytest.raises(DataError) as caught:
        pregenerate(experiment)
    message = str(caught.value)
    assert message.startswith(f"cannot write {experiment.completions / others[0]}: ")
    assert message.endswith("File too large; what is stored so far is kept")
    assert "\n" not in message
    assert shards(experiment) == {first: whole[first]}
    assert not list(experiment.directory.rglob(".*"))
    pregenerate(experiment)
    assert shards(experiment) == whole


def shard_numbers(experiment: Experiment) -> set[int]:
    return {int(path.stem.removeprefix("shard-")) for path in experiment.completions.glob("shard-*.safetensors")}


@pytest.mark.slow
def test_killed_at_20_random_moments_the_store_is_that_of_an_uninterrupted_run(
    config: ExperimentConfig, tmp_path: Path
) -> None:
    start = forking(pregenerate_command.command)
    settings = config.pregenerate.model_copy(update={"max_new_tokens": None, "max_length": 64, "shard_size": 2})
    lengths = config.train.model_copy(update={"sequence_length": 64})
    config = config.model_copy(update={"pregenerate": settings, "train": lengths})
    begun = time.monotonic()
    for name in ("warm", "whole"):
        whole, begun = distill(tmp_path / name, config), time.monotonic()
        process = start(whole.directory)
        process.join(PATIENCE)
        assert process.exitcode == 0
    usual = time.monotonic() - begun
    expected = shards(whole)
    assert len(expected) == 12

    moments, stages = random.Random(0), Counter[int]()
    directories = (tmp_path / str(number) for number in itertools.count())
    experiment = distill(next(directories), config)
    while stages.total() < 20:
        before = files(experiment.completions) if experiment.completions.exists() else {}
        process = start(experiment.directory)
        process.join(moments.uniform(0, usual))
        if process.exitcode is None:
            seen = shards(experiment)
            process.kill()
            process.join(PATIENCE)
            stages[len(seen)] += 1
            left = shards(experiment)
            assert left.items() >= seen.items(), "what was there at the kill is there after it"
            assert left.items() <= expected.items(), "only whole shards bear the name of one"
            assert {p: f for p, f in files(experiment.completions).items() if p in before} == before, "written once"
        else:
            assert process.exitcode == 0
            assert shards(experiment) == expected
            experiment = distill(next(directories), config)
    process = start(experiment.directory)
    process.join(PATIENCE)
    assert process.exitcode == 0
    assert shards(experiment) == expected
    assert len(stages) > 3, f"kills by number of shards there: {stages}"


# --- many processes ---


def test_three_processes_make_the_completions_that_one_makes(
    experiment: Experiment, finished: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    made = {}
    for rank in (2, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        before = shards(experiment)
        pregenerate(experiment)
        made[rank] = shards(experiment).keys() - before.keys()
    names = list(shards(finished))
    assert made == {rank: set(names[rank::3]) for rank in range(3)}
    assert shards(experiment) == shards(finished)


def test_another_number_of_processes_goes_on_with_the_store(
    experiment: Experiment, finished: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    pregenerate(experiment)
    assert shard_numbers(experiment) == {1, 4}
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    pregenerate(experiment)
    assert shards(experiment) == shards(finished)


@pytest.mark.slow
def test_torchrun_makes_the_completions_that_one_process_makes(experiment: Experiment, finished: Experiment) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    command = [*torchrun, "-m", "ptp.cli.main", "pregenerate", str(experiment.directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    assert shards(experiment) == shards(finished)
    assert not list(experiment.directory.rglob(".*"))


# --- what is refused ---


@pytest.mark.parametrize(
    ("override", "changed_fields"),
    [
        ("sampling.temperature=0.9", "rule"),
        ("sampling.order=probability", "rule"),
        ("pregenerate.seed=1", "seed"),
        ("pregenerate.max_new_tokens=8", "max_new_tokens"),
        ("pregenerate.max_length=40", "max_length"),
        ("pregenerate.completions_per_prompt=2", "completions_per_prompt"),
        ("pregenerate.num_prompts=12", "num_prompts"),
        ("pregenerate.shard_size=6", "shard_size"),
        ("data.prompt_scheme=x {text}", "prompts_fingerprint"),
        ("pregenerate.max_prompt_tokens=31", "prompts_fingerprint"),
    ],
)
def test_settings_changed_after_pregeneration_are_refused(
    finished: Experiment, override: str, changed_fields: str
) -> None:
    before = files(finished.completions) | files(finished.directory / "runs")
    with pytest.raises(DataError, match=f"holds completions made with another {changed_fields} "):
        pregenerate(changed(finished, override))
    assert files(finished.completions) | files(finished.directory / "runs") == before


def test_another_base_model_is_refused(finished: Experiment, tiny_experiment: Callable, tmp_path: Path) -> None:
    other = changed(finished, f"base_model={tiny_experiment(tmp_path, seed=1).base_model}")
    with pytest.raises(DataError, match="made with another base_fingerprint"):
        pregenerate(other)


def test_too_few_prompts_are_said_before_anything_is_sampled(
    tiny_experiment: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = distill(tmp_path / "experiment", tiny_experiment(tmp_path, num_prompts=9))
    monkeypatch.setattr("ptp.stages.pregenerate.load_base_model", refuse_to_load)
    with pytest.raises(DataError, match="9 documents are too few to hold any out; give at least 10"):
        pregenerate(experiment)
    assert not experiment.completions.exists()


def test_prompts_of_which_none_is_short_enough_are_counted(
    finished: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptp.stages.pregenerate.load_base_model", refuse_to_load)
    with pytest.raises(DataError, match=r"gives anything to use \(24 rows: 24 longer than 3 tokens\)"):
        pregenerate(changed(finished, "pregenerate.max_prompt_tokens=3"))
    monkeypatch.setattr("ptp.stages.pregenerate.load_context_length", lambda name: 4)
    with pytest.raises(DataError, match="none of the 24 prompts fits into the model's context of 4 tokens"):
        pregenerate(finished)


def test_prompts_too_long_for_the_model_s_context_are_left_out_and_counted(
    experiment: Experiment, finished: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = prepare(finished).documents.lengths
    context = int(np.median(lengths)) + 2
    num_fitting = int((lengths <= context - 2).sum())
    assert 10 <= num_fitting < 24
    monkeypatch.setattr("ptp.stages.pregenerate.load_context_length", lambda name: context)
    done = pregenerate(experiment)
    assert done.left_out == Counter({f"too long for the model's context of {context} tokens": 24 - num_fitting})
    # A prompt that is left out takes its number with it: the others' completions stay what they are.
    all_of_them = {d.number: d.ids.tolist() for d in stored(finished)}
    assert len(stored(experiment)) == num_fitting
    assert all(d.ids.tolist() == all_of_them[d.number] for d in stored(experiment))


@pytest.mark.parametrize("mode", ["fixed", "full-chat"])
def test_modes_that_train_on_the_dataset_s_own_text_have_nothing_to_pregenerate(
    chat_experiment: Callable, tmp_path: Path, mode: str
) -> None:
    experiment = distill(tmp_path / "experiment", chat_experiment(tmp_path, mode))
    for stage in (pregenerate, lambda experiment: import_completions(experiment, tmp_path / "texts.jsonl")):
        with pytest.raises(ConfigError, match=f"data.mode {mode} trains on .* go on with ptp_train"):
            stage(experiment)
    assert not experiment.completions.exists()


# --- an endpoint as the engine ---


@pytest.fixture
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def served(finished: Experiment) -> Script:
    """A server that writes what the base model wrote by our own rule."""
    documents = list(stored(finished))
    by_prompt = {tuple(d.ids[: d.prompt_length].tolist()): d.ids[d.prompt_length :].tolist() for d in documents}
    assert len(by_prompt) == len(documents)

    def reply(body: dict[str, Any], before: int) -> Reply:
        ids = by_prompt[tuple(body["prompt"])]
        reason = "stop" if ids[-1] in ENDS else "length"
        return Reply(completion(token_ids=ids, finish_reason=reason, prompt_token_ids=body["prompt"]))

    return reply


def by_endpoint(experiment: Experiment, server: Server, *overrides: str) -> Experiment:
    engine = json.dumps({"url": server.url, "model": "base", "max_retries": 0, "concurrency": 1})
    return changed(experiment, f"pregenerate.engine={engine}", *overrides)


@pytest.mark.usefixtures("no_proxy")
def test_an_endpoint_s_completions_are_stored_without_intervals(
    experiment: Experiment, finished: Experiment, served: Script
) -> None:
    with serving(served) as server:
        served_by = by_endpoint(experiment, server)
        done = pregenerate(served_by)
        assert {body["max_tokens"] for body in server.bodies} == {16}
        assert [body["seed"] for body in server.bodies] == list(range(24))
    assert not done.left_out
    for document, expected in zip(stored(experiment), stored(finished), strict=True):
        assert document.lower is None and document.upper is None
        assert document.ids.tolist() == expected.ids.tolist()
        fields = ("spans", "group", "number", "finished")
        assert [getattr(document, name) for name in fields] == [getattr(expected, name) for name in fields]
    provenance = CompletionStore(experiment.completions).provenance
    assert (provenance.source, provenance.base_fingerprint) == ("endpoint base", "")
    # The answers have gone from the journals into the shards.
    assert {path.suffix for path in experiment.completions.iterdir()} == {".json", ".safetensors"}


@pytest.mark.usefixtures("no_proxy")
def test_training_computes_the_intervals_that_an_endpoint_does_not_give(
    experiment: Experiment, finished: Experiment, served: Script, tmp_path: Path
) -> None:
    with serving(served) as server:
        pregenerate(by_endpoint(experiment, server))
    stores = (experiment.completions, finished.completions)
    results = []
    for name, store in zip(("computed", "stored"), stores, strict=True):
        copy = distill(tmp_path / name, experiment.config)
        copy.completions.symlink_to(store)
        # An embedding that is smooth in u: the bits of the default one show rounding.
        results.append(train(changed(copy, "train.max_steps=2", "model.auxiliary=linear")))
        assert (copy.adapter / "adapter_model.safetensors").exists()
    computed, known = results
    assert computed.num_masked == known.num_masked == 0
    assert computed.validation_loss == pytest.approx(known.validation_loss, rel=1e-5)
    assert computed.survival == pytest.approx(known.survival, abs=1e-2)


@pytest.mark.usefixtures("no_proxy")
def test_after_a_failure_in_the_middle_of_a_shard_only_what_is_missing_is_asked_for(
    experiment: Experiment, served: Script, tmp_path: Path
) -> None:
    def breaks_down(body: dict[str, Any], before: int) -> Reply:
        return served(body, before) if body["seed"] < 8 else Reply({"error": {"message": "no memory"}}, status=500)

    with serving(breaks_down) as server:
        with pytest.raises(DataError) as caught:
            pregenerate(by_endpoint(experiment, server))
        message = str(caught.value)
        assert message.startswith(f"endpoint {server.url}: ")
        assert message.endswith("500 no memory; 3 of 5 completions are kept; run the command again to go on")
        assert "\n" not in message
        assert shard_numbers(experiment) == {0}
        server.script, num_asked = served, len(server.bodies)
        pregenerate(by_endpoint(experiment, server))
        assert [body["seed"] for body in server.bodies[num_asked:]] == list(range(8, 24))
        whole = distill(tmp_path / "whole", experiment.config)
        pregenerate(by_endpoint(whole, server))
    assert shards(experiment) == shards(whole)


@pytest.mark.usefixtures("no_proxy")
def test_answers_that_cannot_be_used_are_left_out_and_counted(experiment: Experiment, served: Script) -> None:
    def withholds(body: dict[str, Any], before: int) -> Reply:
        if body["seed"] in (3, 5, 6, 7, 8, 9):
            return Reply(completion(text="", finish_reason="content_filter"))
        return served(body, before)

    with serving(withholds) as server:
        done = pregenerate(by_endpoint(experiment, server))
    assert done.left_out == Counter({"withheld by the server's content filter": 6})
    # All of the second shard's five are among them.
    assert shard_numbers(experiment) == {0, 1, 2, 3, 4}
    assert stored(experiment).numbers.tolist() == [0, 1, 2, 4, *range(10, 24)]
    train(changed(experiment, "train.max_steps=2"))


@pytest.mark.usefixtures("no_proxy")
@pytest.mark.parametrize(("max_length", "longest"), [(40, 40), (500, 96)], ids=["asked for", "the model's context"])
def test_no_more_tokens_are_asked_for_than_there_is_room(experiment: Experiment, max_length: int, longest: int) -> None:
    def full(body: dict[str, Any], before: int) -> Reply:
        assert len(body["prompt"]) + body["max_tokens"] == longest
        return Reply(completion(token_ids=[7] * body["max_tokens"], finish_reason="length"))

    lengths = (f"pregenerate.max_length={max_length}", "train.sequence_length=500", "pregenerate.max_new_tokens=null")
    with serving(full) as server:
        pregenerate(by_endpoint(experiment, server, *lengths))
    assert set(stored(experiment).lengths.tolist()) == {longest}
    assert not any(document.finished for document in stored(experiment))


@pytest.mark.usefixtures("no_proxy")
def test_several_answers_to_a_prompt_are_asked_for_with_seeds_of_their_own(experiment: Experiment) -> None:
    def by_seed(body: dict[str, Any], before: int) -> Reply:
        return Reply(completion(token_ids=[10 + body["seed"], END], finish_reason="stop"))

    with serving(by_seed) as server:
        several = by_endpoint(experiment, server, "pregenerate.completions_per_prompt=3", "pregenerate.seed=7")
        pregenerate(several)
    prompts, completions = prepare(experiment).documents, stored(experiment)
    assert completions.numbers.tolist() == list(range(72))
    for document in completions:
        assert document.ids[-2:].tolist() == [17 + document.number, END]
        assert document.group == prompts[document.number // 3].group


# --- completions of one's own ---


def rows(count: int = 24) -> list[dict[str, str]]:
    return [{"prompt": f"def f{number}(x):", "completion": f" return x + {number}"} for number in range(count)]


def write(path: Path, content: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def test_completions_of_one_s_own_are_imported_with_an_end_token(experiment: Experiment, tmp_path: Path) -> None:
    tokenizer, mine = load_tokenizer(experiment.base_model), rows()
    mine[1]["prompt"] = mine[0]["prompt"]
    done = import_completions(experiment, write(tmp_path / "mine.jsonl", mine))
    assert not done.left_out
    documents = stored(experiment)
    assert documents.numbers.tolist() == list(range(24))
    for row, document in zip(mine, documents, strict=True):
        prompt_ids = tokenizer(row["prompt"])["input_ids"]
        assert document.prompt_length == len(prompt_ids)
        assert document.ids[: len(prompt_ids)].tolist() == prompt_ids
        assert tokenizer.decode(document.ids[len(prompt_ids) :]) == row["completion"] + "</s>"
        assert document.spans == ((len(prompt_ids), len(document)),)
        assert (document.lower, document.finished) == (None, True)
        assert document.group == content_group(row["prompt"])
    assert documents.groups[0] == documents.groups[1] != documents.groups[2]


def test_imported_completions_train(experiment: Experiment, tmp_path: Path) -> None:
    import_completions(experiment, write(tmp_path / "mine.jsonl", rows()))
    result = train(changed(experiment, "train.max_steps=2"))
    # Text that the model did not write has tokens that top-k and top-p would not let it write.
    assert result.num_masked > 0
    assert (experiment.adapter / "adapter_model.safetensors").exists()


def test_rows_that_cannot_be_used_are_left_out_and_counted(experiment: Experiment, tmp_path: Path) -> None:
    mine = rows()
    mine[2]["completion"] = ""
    mine[4]["completion"] = "x" * 100
    mine[5]["prompt"] = "y" * 100
    done = import_completions(experiment, write(tmp_path / "mine.jsonl", mine))
    assert done.left_out == Counter(
        {"longer than 48 tokens": 2, "empty, or a text that no tokens give back exactly": 1}
    )
    assert stored(experiment).numbers.tolist() == [0, 1, 3, *range(6, 24)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"text": "a"}], "row 1: expected texts 'prompt' and 'completion'; it has: text"),
        ([*rows(2), {"prompt": "a"}], "row 3: expected texts 'prompt' and 'completion'"),
        ([{"prompt": ["a"], "completion": "b"}], "row 1: expected texts 'prompt' and 'completion'"),
        ([{"prompt": "a", "completion": ""}] * 12, "none of 12 completions can be used; left out: 12 empty"),
        (rows(9), "9 documents are too few to hold any out"),
    ],
    ids=["columns", "missing", "no text", "nothing", "too few"],
)
def test_what_cannot_be_imported_is_one_line_and_leaves_nothing(
    experiment: Experiment, tmp_path: Path, content: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        import_completions(experiment, write(tmp_path / "mine.jsonl", content))
    assert "\n" not in str(caught.value)
    assert not experiment.completions.exists()


def test_nothing_is_imported_into_a_store_that_is_there(finished: Experiment, tmp_path: Path) -> None:
    before = files(finished.completions)
    with pytest.raises(DataError, match=f"{finished.completions} already holds completions; remove it, or set up"):
        import_completions(finished, write(tmp_path / "mine.jsonl", rows()))
    assert files(finished.completions) == before


def test_nothing_is_sampled_into_an_imported_store(experiment: Experiment, tmp_path: Path) -> None:
    import_completions(experiment, write(tmp_path / "mine.jsonl", rows()))
    with pytest.raises(DataError, match=r"made with another source \(file; now base model\) and base_fingerprint"):
        pregenerate(experiment)
    assert len(stored(experiment)) == 24
