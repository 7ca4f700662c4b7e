import json
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from ptp.config import DataConfig, Mode
from ptp.data.documents import Documents, write_documents
from ptp.demo import make_tokenizer
from ptp.errors import DataError
from ptp.experiment import Experiment, ExperimentConfig
from ptp.stages.prepare import prepare


class Tokenised(Exception):
    """Rows are being tokenised."""


@pytest.fixture(scope="module")
def inputs(chat_experiment: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    chat_experiment(directory)
    return directory


@pytest.fixture
def experiment_of(chat_experiment: Callable, inputs: Path, tmp_path: Path) -> Callable[..., Experiment]:
    """An experiment of its own for each name, with changes to the settings of its data."""

    def make(name: str, mode: Mode = "prompt-distill", **changes: object) -> Experiment:
        return with_data(Experiment(tmp_path / name, chat_experiment(inputs, mode)), **changes)

    return make


@pytest.fixture
def experiment(experiment_of: Callable) -> Experiment:
    return experiment_of("experiment")


@pytest.fixture
def cached_only(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, tokenising raises."""

    def forbid(*_: object) -> None:
        raise Tokenised

    return lambda: monkeypatch.setattr("ptp.stages.prepare.write_documents", forbid)


def with_data(experiment: Experiment, /, **changes: object) -> Experiment:
    data = DataConfig(**(experiment.config.data.model_dump() | changes))
    return changed(experiment, data=data)


def changed(experiment: Experiment, **changes: object) -> Experiment:
    config = experiment.config.model_dump() | {
        name: value if isinstance(value, str) else value.model_dump() for name, value in changes.items()
    }
    return Experiment(experiment.directory, ExperimentConfig(**config))


def content(documents: Documents) -> list[tuple[list[int], tuple[tuple[int, int], ...], int, int]]:
    return [(d.ids.tolist(), d.spans, d.group, d.number) for d in documents]


def write_rows(path: Path, column: str, values: list[Any]) -> str:
    path.write_text("".join(json.dumps({column: value}) + "\n" for value in values))
    return str(path)


# When the cache serves


@pytest.mark.parametrize("mode", ["prompt-distill", "prompt-scheme-distill", "full-chat", "fixed"])
def test_a_second_run_tokenises_nothing_again(experiment_of: Callable, cached_only: Callable, mode: Mode) -> None:
    experiment = experiment_of("experiment", mode)
    first = prepare(experiment)
    before = {path: path.stat().st_mtime_ns for path in experiment.cache.rglob("*")}
    cached_only()
    second = prepare(experiment)
    assert content(second.documents) == content(first.documents)
    assert (second.left_out, second.fingerprint) == (first.left_out, first.fingerprint)
    assert {path: path.stat().st_mtime_ns for path in experiment.cache.rglob("*")} == before


def test_data_renamed_copied_or_touched_is_the_same_data(
    experiment: Experiment, inputs: Path, cached_only: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "chats.jsonl"
    shutil.copy(inputs / "chats.jsonl", path)
    prepare(with_data(experiment, path=str(path)))
    cached_only()
    os.utime(path, (0, 0))
    prepare(with_data(experiment, path=str(path)))
    renamed = path.rename(tmp_path / "renamed.jsonl")
    prepare(with_data(experiment, path=str(renamed)))
    prepare(with_data(experiment, path=str(inputs / "chats.jsonl")))
    monkeypatch.chdir(tmp_path)
    prepare(with_data(experiment, path="renamed.jsonl"))


def test_a_model_or_template_copied_elsewhere_is_the_same(
    experiment: Experiment, inputs: Path, cached_only: Callable, tmp_path: Path
) -> None:
    shutil.copytree(inputs / "model", tmp_path / "copy")
    shutil.copy(inputs / "model" / "chat_template.jinja", tmp_path / "template.jinja")
    fingerprint = prepare(experiment).fingerprint
    cached_only()
    assert prepare(changed(experiment, base_model=str(tmp_path / "copy"))).fingerprint == fingerprint
    assert prepare(with_data(experiment, chat_template=str(tmp_path / "template.jinja"))).fingerprint == fingerprint


# When it does not


def test_one_changed_byte_of_the_data_is_other_data(experiment: Experiment, inputs: Path, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    shutil.copy(inputs / "chats.jsonl", path)
    there = with_data(experiment, path=str(path))
    before = prepare(there)
    stat = path.stat()
    path.write_text(path.read_text().replace("And 2 more?", "And 9 more?", 1))
    # As a copy that keeps times leaves it: neither size nor date tell.
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    after = prepare(there)
    assert after.fingerprint != before.fingerprint
    assert content(after.documents) != content(before.documents)


@pytest.mark.parametrize(
    "change",
    [
        {"turns": "first"},
        {"drop_system": True},
        {"roles": {"narrator": "user"}},
        {"mode": "full-chat"},
        {"mode": "prompt-scheme-distill", "prompt_scheme": "{messages[1][content]}"},
        {"split": "train[:12]"},
        {"split": "train[12:]"},
    ],
    ids=str,
)
def test_every_setting_of_the_data_counts(experiment: Experiment, change: dict[str, Any]) -> None:
    before = prepare(experiment).fingerprint
    assert prepare(with_data(experiment, **change)).fingerprint != before


def test_lengths_count_where_they_shape_documents(experiment_of: Callable) -> None:
    for mode, matters in (("prompt-distill", "pregenerate"), ("full-chat", "train"), ("fixed", "train")):
        experiment = experiment_of(mode, mode)
        before = prepare(experiment).fingerprint
        config = experiment.config
        shorter = {
            "pregenerate": config.pregenerate.model_copy(update={"max_prompt_tokens": 60}),
            "train": config.train.model_copy(update={"sequence_length": 90}),
        }
        for section, settings in shorter.items():
            same = prepare(changed(experiment, **{section: settings})).fingerprint == before
            assert same == (section != matters), (mode, section)


def test_another_tokenizer_template_or_end_token_counts(experiment: Experiment, inputs: Path, tmp_path: Path) -> None:
    found = {prepare(experiment).fingerprint}
    for what in ("tokenizer", "template", "end token"):
        copy = tmp_path / what
        shutil.copytree(inputs / "model", copy)
        if what == "tokenizer":
            tokenizer = make_tokenizer(["other words"], 280)
            tokenizer.chat_template = (inputs / "model" / "chat_template.jinja").read_text()
            tokenizer.save_pretrained(copy)
        elif what == "template":
            path = copy / "chat_template.jinja"
            path.write_text(path.read_text().replace("<|user|>", "<|you|>"))
        else:
            path = copy / "generation_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [1, 2]}))
        found.add(prepare(changed(experiment, base_model=str(copy))).fingerprint)
    assert len(found) == 4


def test_splits_never_share(experiment: Experiment) -> None:
    parts = [prepare(with_data(experiment, split=split)).documents for split in ("train[:9]", "train[9:]", "train")]
    first, second, both = ([group for _, _, group, _ in content(part)] for part in parts)
    assert first + second == both
    assert len(list(experiment.cache.iterdir())) == 3


def test_experiments_never_share(experiment_of: Callable) -> None:
    one, other = experiment_of("one"), experiment_of("other")
    prepare(one)
    assert not other.directory.exists()
    prepare(other)
    shutil.rmtree(one.directory)
    assert len(prepare(other).documents) == 48


# What is kept, and what is said


def test_what_is_left_out_is_counted_on_every_run(experiment_of: Callable, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "texts.jsonl", "text", ["", "a", "x" * 100, "b", "y" * 200])
    experiment = experiment_of("experiment", "prompt-scheme-distill", path=path)
    experiment = changed(
        experiment, pregenerate=experiment.config.pregenerate.model_copy(update={"max_prompt_tokens": 20})
    )
    for _ in range(2):
        prepared = prepare(experiment)
        assert prepared.left_out == Counter({"longer than 20 tokens": 2})
        # A prompt keeps the number it has among all.
        assert prepared.documents.numbers.tolist() == [0, 1, 3]


def test_data_of_which_nothing_can_be_used_is_counted_in_one_line(experiment_of: Callable, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "texts.jsonl", "text", ["x" * 100, "y" * 100, "z" * 300])
    experiment = experiment_of("experiment", "prompt-scheme-distill", path=path)
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            prepare(experiment)
        assert str(caught.value) == (f"no row of {path} gives anything to use (3 rows: 3 longer than 64 tokens)")


def test_malformed_data_is_named_by_its_line_and_nothing_is_kept(experiment_of: Callable, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"\n')
    experiment = experiment_of("experiment", "fixed", path=str(path))
    with pytest.raises(DataError, match=r"texts.jsonl, line 2: not valid JSON"):
        prepare(experiment)
    assert not experiment.cache.exists()


def test_a_bad_row_stops_with_its_number_and_nothing_is_kept(experiment_of: Callable, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "chats.jsonl", "messages", [[{"role": "user", "content": "a"}], [{"role": "user"}], 3])
    experiment = experiment_of("experiment", "prompt-distill", path=path)
    with pytest.raises(DataError, match="row 3: expected a list of messages; got int"):
        prepare(experiment)
    assert list(experiment.cache.iterdir()) == []


def test_tokenising_that_is_stopped_leaves_nothing_behind(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(what: str, done: int, total: int, tokens: int = 0) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(experiment, stop)
    assert list(experiment.cache.iterdir()) == []
    reports: list[tuple[str, int, int]] = []
    assert len(prepare(experiment, lambda *report: reports.append(report)).documents) == 48
    assert reports == [("rows tokenised", 0, 24), ("rows tokenised", 24, 24)]


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "left_out.json"])
def test_a_damaged_cache_is_made_anew_by_doing_what_the_message_says(experiment: Experiment, name: str) -> None:
    before = prepare(experiment)
    (path,) = experiment.cache.rglob(name)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"the cache {path.parent} is damaged; remove it and run the command again"):
        prepare(experiment)
    shutil.rmtree(path.parent)
    assert content(prepare(experiment).documents) == content(before.documents)


def _prepare_together(experiment: Experiment, barrier: Barrier) -> None:
    # A pool of threads does not survive a fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    prepare(experiment)


def test_processes_that_prepare_the_same_data_at_once_both_end_well(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2, timeout=60)

    def write_together(*arguments: Any) -> None:
        write_documents(*arguments)
        barrier.wait()

    with monkeypatch.context() as patched:
        patched.setattr("ptp.stages.prepare.write_documents", write_together)
        processes = [context.Process(target=_prepare_together, args=(experiment, barrier)) for _ in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    (written,) = experiment.cache.iterdir()
    assert not written.name.startswith(".")
    assert content(prepare(experiment).documents) == content(Documents.load(written))
