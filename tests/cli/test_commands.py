"""The commands as they are typed: in this process where that is enough, as programs where it is not."""

import io
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from command_line import PATIENCE, Result, check_refused, files, notes, program, typed
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ptp.cli import distill, generate, main, pregenerate, train
from ptp.decoding.acceptance import simulated_tokens_per_call
from ptp.decoding.allocation import Profile
from ptp.decoding.decoder import Decoder
from ptp.decoding.requests import Request, make_request
from ptp.evaluation import experiment_bench
from ptp.evaluation import verify as verify_module
from ptp.evaluation.experiment_report import verify_experiment
from ptp.experiment import Experiment
from ptp.model.ptp_model import PTPModel
from ptp.sampling import uniform
from ptp.stages.train import read_training_result, validation_prompts
from ptp.training.metrics import WindowMetrics

PROMPT = "def f3(x, y):"
KEYS = {
    "prompt_ids",
    "token_ids",
    "u",
    "text",
    "num_calls",
    "num_draft_tokens",
    "num_accepted_tokens",
    "tokens_per_call",
    "sampling",
    "options",
    "seed",
    "base_model",
    "dtype",
    "finish_reason",
}


@pytest.fixture(scope="module")
def root(tiny_experiment: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ and prompts.jsonl, other/ with another model, and experiment/, made by the commands from start to end."""
    root = tmp_path_factory.mktemp("commands")
    tiny_experiment(root)
    tiny_experiment(root / "other", seed=1)
    settings = [
        "pregenerate.max_prompt_tokens=32",
        "pregenerate.max_new_tokens=16",
        "train.dtype=float32",
        "train.learning_rate=3e-4",
    ]
    flags = ["--yes", "--top-k", 40, "--window", 4, "--windows-per-sequence", 32, "--max-length", 48, "--lora-rank", 2]
    flags += [word for setting in settings for word in ("--set", setting)]
    made = typed(distill.main, root / "model", root / "prompts.jsonl", "--output-dir", root / "experiment", *flags)
    assert (made.code, made.out) == (0, f"{root / 'experiment'}\n")
    assert typed(pregenerate.main, root / "experiment").code == 0
    assert typed(train.main, root / "experiment", "train.max_steps=3", "train.save_every=2").code == 0
    return root


@pytest.fixture
def experiment(root: Path) -> Path:
    return root / "experiment"


@pytest.fixture
def damaged(root: Path) -> Iterator[Path]:
    """A copy of the experiment, beside it, to be damaged."""
    shutil.copytree(root / "experiment", root / "damaged")
    yield root / "damaged"
    shutil.rmtree(root / "damaged")


def generated(directory: Path, *arguments: object, prompt: str = PROMPT) -> dict[str, object]:
    result = typed(generate.main, directory, "--prompt", prompt, "--json", *arguments)
    assert result.code == 0, result.err
    assert result.out.count("\n") == 1
    return json.loads(result.out)


def test_help_does_not_wait_for_torch() -> None:
    code = """
import sys
from ptp.cli.main import main
sys.argv = ["ptp", "--help"]
try:
    main()
except SystemExit as exit:
    assert not exit.code, exit.code
heavy = {"torch", "transformers", "peft", "numpy", "datasets", "openai", "fastapi", "questionary", "tensorboard"}
slow = heavy & set(sys.modules)
assert not slow, slow
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("demo", "distill", "pregenerate", "train", "generate", "verify", "bench", "serve"):
        assert name in done.stdout


@pytest.mark.parametrize("name", ["ptp", "ptp_distill", "ptp_pregenerate", "ptp_train", "ptp_generate"])
def test_every_command_is_installed_and_has_help(name: str) -> None:
    result = program(name, "--help")
    assert (result.code, result.err) == (0, "")
    assert "Usage" in result.out


def test_the_stages_keep_data_off_standard_error_and_progress_off_standard_output(experiment: Path) -> None:
    for command in (pregenerate.main, train.main):
        result = typed(command, experiment, *(["train.max_steps=3"] if command is train.main else []))
        assert (result.code, result.out) == (0, "")
    assert "goes on from step 3\n" in result.err
    assert "adapter of step" in result.err
    assert (experiment / "adapter" / "training.json").is_file()


def test_options_and_settings_reach_the_experiment_s_files(experiment: Path, root: Path) -> None:
    text = "".join(path.read_text() for path in experiment.glob("*.yaml"))
    for line in ("top_k: 40", "temperature: 0.7", "learning_rate: 0.0003", "window: 4", f"base_model: {root}/model"):
        assert line in text


def test_generate_prints_one_json_object_with_every_field(experiment: Path) -> None:
    record = generated(experiment, "--seed", 3, "--max-new-tokens", 20)
    assert set(record) == KEYS
    assert record["sampling"] == {"temperature": 0.7, "top_k": 40, "top_p": 0.95, "min_p": 0, "order": "vocabulary"}
    assert record["options"] == {"min_new_tokens": 0, "repetition_penalty": 1, "stop_strings": []}
    assert (record["seed"], record["dtype"]) == (3, "float32")
    assert 0 < len(record["token_ids"]) == len(record["u"]) <= 20
    assert record["tokens_per_call"] == len(record["token_ids"]) / record["num_calls"]
    assert 0 <= record["num_accepted_tokens"] <= record["num_draft_tokens"]
    assert record["finish_reason"] == ("length" if len(record["token_ids"]) == 20 else "stop")
    start = len(record["prompt_ids"])
    places = torch.arange(start, start + len(record["u"]))
    assert record["u"] == uniform(3, 0, places).tolist()


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ([], (0.7, 40, 0.95)),
        (["--temperature", 1.3, "--top-k", 0, "--top-p", 1], (1.3, 0, 1.0)),
        (["--temperature", 0.9, "--top-k", 15], (0.9, 15, 0.95)),
    ],
)
def test_plain_transformers_finds_every_u_in_its_token_s_interval(
    experiment: Path, root: Path, options: list[object], rule: tuple[float, int, float]
) -> None:
    temperature, top_k, top_p = rule
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    model = AutoModelForCausalLM.from_pretrained(root / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    for seed in range(3):
        record = generated(experiment, "--seed", seed, "--max-new-tokens", 40, *options)
        prompt_ids, token_ids = record["prompt_ids"], record["token_ids"]
        assert prompt_ids == tokenizer(PROMPT)["input_ids"]
        assert record["text"] == tokenizer.decode(token_ids, skip_special_tokens=True)
        ids = torch.tensor([prompt_ids + token_ids])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1]
        edges = warpers(ids, logits).double().softmax(-1).cumsum(-1)
        for token, u, upper in zip(token_ids, record["u"], edges.tolist(), strict=True):
            lower = upper[token - 1] if token else 0.0
            assert lower < upper[token]
            assert lower - 1e-6 <= u < upper[token] + 1e-6


def test_a_text_ends_with_the_token_that_completes_one_of_several_stop_strings(experiment: Path, root: Path) -> None:
    whole = generated(experiment, "--max-new-tokens", 40, "--min-new-tokens", 40)
    assert len(whole["token_ids"]) == 40
    assert whole["finish_reason"] == "length"
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    texts = [tokenizer.decode(whole["token_ids"][:length]) for length in range(41)]
    # From the midst of what is written, and without parts of letters.
    stop = next(text for text in (whole["text"][place : place + 2] for place in range(12, 40)) if text.isascii())
    cut = generated(experiment, "--max-new-tokens", 40, "--min-new-tokens", 40, "--stop", "no such", "--stop", stop)
    length = next(length for length, text in enumerate(texts) if stop in text)
    assert cut["token_ids"] == whole["token_ids"][:length]
    assert cut["finish_reason"] == "stop"
    assert cut["options"] == {"min_new_tokens": 40, "repetition_penalty": 1, "stop_strings": ["no such", stop]}


def test_a_terminal_shows_the_verified_text_as_it_comes_and_the_same_text(
    experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        writes: ClassVar[list[str]] = []

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            self.writes.append(text)
            return super().write(text)

    settings = ["--max-new-tokens", 60, "--min-new-tokens", 60]
    texts = (generated(experiment, *settings, "--seed", seed)["text"] for seed in range(9))
    seed, expected = next((seed, text) for seed, text in enumerate(texts) if len(text.split()) > 3)
    monkeypatch.setattr("command_line.io", SimpleNamespace(StringIO=Terminal))
    result = typed(generate.main, experiment, "--prompt", PROMPT, *settings, "--seed", seed)
    assert result.code == 0, result.err
    assert result.out == f"{expected}\n"
    assert result.err.startswith(PROMPT)
    assert sum(bool(text.strip()) and text in expected for text in Terminal.writes) > 1


def test_the_budget_changes_the_calls_not_the_text(experiment: Path) -> None:
    plain, parallel = (generated(experiment, "--budget", budget) for budget in (0, 24))
    assert plain["token_ids"] == parallel["token_ids"]
    assert plain["tokens_per_call"] == 1
    assert (plain["num_draft_tokens"], plain["num_accepted_tokens"]) == (0, 0)
    assert parallel["num_draft_tokens"] > 0


def test_an_adapter_directory_and_a_prompt_on_standard_input_will_do(experiment: Path) -> None:
    expected = generated(experiment)
    result = typed(generate.main, experiment / "adapter", "--json", stdin=PROMPT)
    assert json.loads(result.out) == expected
    result = typed(generate.main, experiment, "--prompt", PROMPT)
    assert result.out == f"{expected['text']}\n"
    assert "tokens per call" in result.err


def test_a_rule_the_adapter_was_not_trained_for_is_pointed_out(
    experiment: Path, caplog: pytest.LogCaptureFixture
) -> None:
    generated(experiment, "--temperature", 0.7)
    assert not caplog.messages
    generated(experiment, "--temperature", 0.8)
    assert [message[:27] for message in caplog.messages] == ["the adapter was trained for"]


def test_verify_reports_a_lossless_adapter(experiment: Path) -> None:
    result = typed(main.main, "verify", experiment, "--max-new-tokens", 12, "--report")
    assert result.code == 0, result.err
    lines = dict(line.rsplit("  ", 1) for line in result.out.splitlines())
    figures = {name.strip(): value.strip() for name, value in lines.items()}
    assert figures["prompts"] == "2 (of 32 asked for; no more are held out)"
    assert (figures["mismatches"], figures["near-ties"]) == ("0", "0")
    assert float(figures["tokens per call"]) >= 1
    assert "<html" in (experiment / "report.html").read_text()


def test_verify_fails_on_a_mismatch(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "compare", lambda *_: "mismatch")
    result = typed(main.main, "verify", experiment, "--max-new-tokens", 4)
    assert result.code == 1
    assert "mismatches        2" in result.out


# ptp bench

SHORT = ("--max-new-tokens", 8, "--repetitions", 2)


def test_bench_shows_every_method_and_keeps_the_figures_and_the_picture(damaged: Path) -> None:
    result = typed(main.main, "bench", damaged, *SHORT)
    assert result.code == 0, result.err
    for name in ("PTP", "plain loop", "generate", "prompt lookup"):
        assert any(line.startswith(name) for line in result.out.splitlines())
    assert "2 identical, 0 near-tie, 0 mismatch of 2 prompts" in result.out
    assert "assisted" not in result.out
    (line,) = (damaged / "bench.jsonl").read_text().splitlines()
    plain = json.loads(line)["results"]["overall"]["plain loop"]
    assert (plain["num_questions"], plain["tokens_per_call"], plain["speedup"]) == (2, 1.0, 1.0)
    assert (damaged / "bench.svg").read_text().startswith("<svg")


def test_bench_prints_one_json_line_about_a_file_s_tasks(damaged: Path, root: Path, tmp_path: Path) -> None:
    rows = [
        {"question_id": 1, "category": "rag", "turns": ["def f(x):"]},
        {"question_id": 2, "category": "coding", "turns": ["def g(x):", "Shorter."]},
        {"question_id": 3, "category": "rag", "turns": ["x" * 100]},
        {"question_id": 4, "category": "stem", "turns": ["def h(x):", "x" * 100]},
    ]
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--prompts", tmp_path / "question.jsonl", "--assistant", root / "model", "--plot", tmp_path / "p.svg")
    for _ in range(2):
        result = typed(main.main, "bench", damaged, "--json", "--seed", 3, *options, *SHORT)
        assert result.code == 0, result.err
        assert result.out.count("\n") == 1
        # A question whose second turn is too long keeps its first.
        assert "2 prompts left out: no room for 8 tokens" in result.err
    assert (damaged / "bench.jsonl").read_text().splitlines()[-1] == result.out.rstrip()
    assert len((damaged / "bench.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "p.svg").exists()
    bench = json.loads(result.out)
    assert list(bench["results"]) == ["overall", "rag", "multi-turn"]
    assert all("assisted" in methods for methods in bench["results"].values())
    assert (bench["num_prompts"], bench["num_left_out"]) == (4, 2)
    assert bench["results"]["multi-turn"]["PTP"]["num_questions"] == 2
    assert bench["verdicts"] == {"identical": 4, "near-tie": 0, "mismatch": 0}
    assert (bench["seed"], bench["dtype"], bench["sampling"]["top_k"]) == (3, "float32", 40)


def test_bench_asks_what_verify_asks_and_finds_the_same(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[int], list[float]]] = []

    def spy(model: object, request: Request, *texts: object) -> str:
        asked.append((request.prompt_ids, request.u.tolist()))
        return "identical"

    for module in (experiment_bench, verify_module):
        monkeypatch.setattr(module, "compare", spy)
    result = typed(main.main, "bench", damaged, "--json", *SHORT)
    verified = verify_experiment(Experiment.load(damaged), num_prompts=24, max_new_tokens=8, budget=24)
    # Between the two prompts of each is the one that verify warms up with.
    assert asked[:2] == asked[-2:]
    assert json.loads(result.out)["results"]["overall"]["PTP"]["tokens_per_call"] == verified.tokens_per_call


def test_bench_fails_on_a_mismatch_but_shows_what_was_measured(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment_bench, "compare", lambda *_: "mismatch")
    result = typed(main.main, "bench", damaged, *SHORT)
    assert result.code == 1
    assert "2 mismatch of 2 prompts" in result.out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompts", "nowhere.jsonl"], ["no such file", "nowhere.jsonl"]),
        (["--max-new-tokens", 90], ["none of the 2 prompts", "90 tokens", "context of 96", "--max-new-tokens"]),
        (["--dtype", "float8"], ["dtype must be", "got 'float8'"]),
        (["--assistant", "./nowhere"], ["./nowhere", "no such directory"]),
        (["--column", "text"], ["--column", "--prompts"]),
    ],
)
def test_what_bench_cannot_measure_is_refused(experiment: Path, options: list[object], words: list[str]) -> None:
    before = files(experiment)
    check_refused(typed(main.main, "bench", experiment, *options), *words)
    assert files(experiment) == before


@pytest.mark.parametrize("text", ["def fibonacci(n): # of", "Once upon\na time\n", "word " * 100])
def test_a_text_in_place_of_a_directory_is_told_where_it_goes(text: str) -> None:
    check_refused(typed(main.main, "generate", text), "no such directory", " ".join(text.split())[:59], "--prompt")


def test_as_a_program_generate_prints_the_object_alone(experiment: Path) -> None:
    result = program("ptp_generate", experiment, "--prompt", PROMPT, "--json")
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out) == generated(experiment)


def test_as_a_program_a_bad_input_is_one_line(damaged: Path) -> None:
    path = damaged / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    check_refused(program("ptp_generate", damaged, "--prompt", PROMPT), str(path), "corrupt")


@pytest.mark.parametrize("name", ["pregenerate", "train", "verify", "bench"])
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.leanring_rate=1", ["leanring_rate", "did you mean 'learning_rate'?"]),
        ("modle.window=3", ["modle", "did you mean 'model'?"]),
        ("learning_rate=1", ["did you mean 'train.learning_rate=1'?"]),
        ("pregenerate.engine.ulr=x", ["ulr", "did you mean 'url'?"]),
        ("train.max_steps=many", ["max_steps", "got 'many'"]),
        ("train.max_steps", ["section.key=value"]),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_every_command(
    experiment: Path, name: str, override: str, words: list[str]
) -> None:
    before = files(experiment)
    check_refused(typed(main.main, name, experiment, override), *words)
    assert files(experiment) == before


def test_overrides_count_for_one_run(damaged: Path) -> None:
    settings = {path: path.read_bytes() for path in damaged.glob("*.yaml")}
    overrides = ["train.max_steps=4", "train.report_to=[]"]
    assert typed(train.main, damaged, *overrides).code == 0
    run = json.loads((damaged / "runs" / "train.json").read_text())
    assert run["command"] == ["ptp", str(damaged), *overrides]
    assert run["config"]["train"]["max_steps"] == 4
    assert {path: path.read_bytes() for path in damaged.glob("*.yaml")} == settings
    result = typed(main.main, "verify", damaged, "sampling.temperature=0.9")
    check_refused(result, "the completions were sampled with temperature 0.7", "says temperature 0.9")


def test_an_unknown_setting_in_a_file_is_refused(damaged: Path) -> None:
    (damaged / "pregenerate.yaml").write_text("pregenerate: {seeed: 3}\n")
    before = files(damaged)
    check_refused(typed(pregenerate.main, damaged), "seeed", "did you mean 'seed'?")
    check_refused(typed(main.main, "verify", damaged), "seeed")
    assert files(damaged) == before


@pytest.mark.parametrize("name", ["pregenerate", "train", "verify", "bench", "generate"])
def test_a_missing_directory_is_refused_and_not_made(tmp_path: Path, name: str) -> None:
    check_refused(typed(main.main, name, tmp_path / "nowhere"), str(tmp_path / "nowhere"), "no such")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "x" * 200], ["prompt has 201 tokens", "context is 96"]),
        (["--prompt", ""], ["prompt"]),
        ([], ["prompt"]),
        (["--prompt", "x", "--top-p", 1.3], ["top_p must lie in (0, 1]; got 1.3"]),
        (["--prompt", "x", "--min-p", 1.3], ["min_p must lie in [0, 1]; got 1.3"]),
        (["--prompt", "x", "--min-new-tokens", 200], ["min_new_tokens must lie in [0, max_new_tokens = 128]; got 200"]),
        (["--prompt", "x", "--repetition-penalty", 0], ["has to be a strictly positive float, but is 0.0"]),
        (["--prompt", "x", "--stop", ""], ["a stop string is empty"]),
        (["--prompt", "x", "--temperature", -1], ["temperature must be 0 (greedy) or a number from", "got -1"]),
        (["--prompt", "x", "--top-k", -2], ["top_k must be 0 (off) or a positive count", "got -2"]),
        (["--prompt", "x", "--max-new-tokens", 0], ["max_new_tokens must be at least 1; got 0"]),
        (["--prompt", "x", "--dtype", "float8"], ["dtype must be auto", "got 'float8'"]),
    ],
    ids=[
        *(
            "too long",
            "empty",
            "empty standard input",
            "top-p",
            "min-p",
            "too few tokens",
            "penalty",
            "empty stop string",
        ),
        *("temperature", "top-k", "no tokens", "dtype"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(
    experiment: Path, arguments: list[object], words: list[str]
) -> None:
    before = files(experiment)
    check_refused(typed(generate.main, experiment, *arguments), *words)
    assert files(experiment) == before


@pytest.mark.parametrize("options", [["--budget", -1], ["--seed", -1], ["--top-k", "many"], ["--bugdet", 3]])
def test_an_option_out_of_range_is_named(experiment: Path, options: list[object]) -> None:
    result = typed(generate.main, experiment, "--prompt", "x", *options)
    assert (result.code, result.out) == (2, "")
    assert str(options[0]) in result.err
    assert "Traceback" not in result.err


def test_an_adapter_for_another_base_model_is_refused(root: Path, damaged: Path) -> None:
    path = damaged / "adapter" / "ptp_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"base_model": str(root / "other" / "model")}))
    before = files(damaged)
    check_refused(typed(generate.main, damaged, "--prompt", PROMPT), "was made for", "got")
    check_refused(typed(main.main, "verify", damaged), "was made for", "got")
    assert files(damaged) == before


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "auxiliary.safetensors", "ptp_config.json"])
def test_a_corrupt_adapter_is_refused_by_file(damaged: Path, name: str) -> None:
    path = damaged / "adapter" / name
    path.write_bytes(path.read_bytes()[:-100])
    before = files(damaged)
    check_refused(typed(generate.main, damaged, "--prompt", PROMPT), str(path))
    assert files(damaged) == before


def test_a_base_model_that_is_gone_is_named(damaged: Path) -> None:
    path = damaged / "adapter" / "ptp_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model": "../../gone"}))
    check_refused(typed(generate.main, damaged, "--prompt", PROMPT), "../../gone")


# The end of a training


def measured_line(result: Result) -> str:
    assert (result.code, result.out) == (0, ""), result.err
    (line,) = [line for line in result.err.splitlines() if line.startswith("tokens per call at budget")]
    return line


@pytest.mark.parametrize("budget", [0, 9])
def test_the_tokens_per_call_that_training_prints_are_those_of_decoding_held_out_prompts(
    damaged: Path, budget: int
) -> None:
    line = measured_line(typed(train.main, damaged, "train.max_steps=3", f"train.budget={budget}"))
    experiment, model = Experiment.load(damaged), PTPModel.from_pretrained(damaged)
    decoder = Decoder(model, experiment.config.sampling, budget=budget)
    num_tokens = num_calls = 0
    for number, prompt in enumerate(validation_prompts(experiment, 32)):
        for step in decoder.steps(make_request(model.base_model, prompt, 128, seed=0, sequence=number)):
            num_tokens, num_calls = num_tokens + len(step.token_ids), num_calls + 1
    simulated = simulated_tokens_per_call(Profile.of(model, model.ptp_config.lead), budget)
    assert f"budget {budget}: measured {num_tokens / num_calls:.2f} (" in line
    assert f"tokens {num_tokens:,})" in line
    assert line.endswith(f"simulated from the windows {simulated:.2f}")
    kept = json.loads((damaged / "adapter" / "measurement.json").read_text())
    assert (kept["budget"], kept["num_tokens"], kept["num_calls"]) == (budget, num_tokens, num_calls)
    assert (kept["tokens_per_call"], kept["simulated"]) == (num_tokens / num_calls, simulated)
    # `ptp verify` finds the same.
    assert (
        kept["tokens_per_call"]
        == verify_experiment(experiment, num_prompts=32, max_new_tokens=128, budget=budget).tokens_per_call
    )


def test_windows_that_promise_too_much_are_found_out(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = typed(train.main, damaged, "train.max_steps=3").err
    assert "measured lies" not in honest
    monkeypatch.setattr(WindowMetrics, "survival", (0.99, 0.98, 0.97))
    result = typed(train.main, damaged, "train.max_steps=3")
    measured_line(result)
    assert re.search(r"^measured lies \d+% below simulated; why that usually happens:\n- ", result.err, re.MULTILINE)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory\nof the device"), MemoryError()])
def test_a_training_whose_decoding_fails_is_done_all_the_same(
    damaged: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    assert (damaged / "adapter" / "measurement.json").is_file()
    monkeypatch.setattr(Decoder, "generate", fail)
    result = typed(train.main, damaged, "train.max_steps=4")
    assert (result.code, result.out) == (0, "")
    reason = str(error).partition("\n")[0] or "MemoryError"
    assert f"tokens per call not measured, but the adapter is whole: {reason}\n" in result.err
    assert read_training_result(Experiment.load(damaged)).config["train"]["max_steps"] == 4
    # That of the adapter before would be no measurement of this one.
    assert not (damaged / "adapter" / "measurement.json").exists()


def test_who_does_not_want_it_measured_gets_the_adapter_at_once(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Decoder, "generate", lambda *_, **__: pytest.fail("a prompt is decoded"))
    result = typed(train.main, damaged, "train.max_steps=4", "--no-measure")
    assert (result.code, result.out) == (0, "")
    assert "tokens per call" not in result.err
    assert not (damaged / "adapter" / "measurement.json").exists()


def test_of_several_processes_the_first_measures(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Decoder, "generate", lambda *_, **__: pytest.fail("a prompt is decoded"))
    monkeypatch.setattr(train, "rank", lambda: 1)
    result = typed(train.main, damaged, "train.max_steps=3")
    assert (result.code, result.out) == (0, "")
    assert "adapter of step" not in result.err


def test_a_student_is_not_decoded_with_and_that_is_said(damaged: Path) -> None:
    shutil.rmtree(damaged / "checkpoints")
    shutil.rmtree(damaged / "adapter")
    student = "model.student={hidden_size: 8, num_layers: 1, num_heads: 1}"
    result = typed(train.main, damaged, "train.max_steps=1", student)
    assert (result.code, result.out) == (0, ""), result.err
    assert "tokens per call not measured: nothing decodes with a model whose weights all learnt yet" in result.err
    assert not (damaged / "adapter" / "measurement.json").exists()


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_completions_of_one_s_own_are_imported_and_train(damaged: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"def f{n}(x):", "completion": f" return x + {n}"} for n in range(24)]
    rows[7]["completion"] = ""
    mine = write_rows(tmp_path / "mine.jsonl", rows)
    check_refused(typed(pregenerate.main, damaged, "--completions", mine), "already holds completions; remove it")
    for name in ("completions", "checkpoints", "adapter"):
        shutil.rmtree(damaged / name)
    other = write_rows(tmp_path / "other.jsonl", [{"question": "a", "answer": "b"}])
    check_refused(
        typed(pregenerate.main, damaged, "--completions", other),
        f"{other}, row 1: expected texts 'prompt' and 'completion'; it has: question, answer",
    )
    result = typed(pregenerate.main, damaged, "--completions", mine)
    assert (result.code, result.out) == (0, "")
    said, left_out, hint = notes(result)
    assert hint == f"next: ptp_train {damaged}"
    assert said.startswith(f"23 completions in {damaged}/completions: ")
    assert left_out == "left out: 1 empty, or a text that no tokens give back exactly"
    assert typed(train.main, damaged, "train.max_steps=2").code == 0
    assert (damaged / "adapter" / "training.json").is_file()


def test_what_is_left_out_is_said_as_the_template_says_it(chat_experiment: Callable, tmp_path: Path) -> None:
    config = chat_experiment(tmp_path)
    template = (tmp_path / "model" / "chat_template.jinja").read_text()
    refusal = "after [/INST] comes [bold]no[/] 7"
    refuses = f"{{% if messages[1].content.startswith('7') %}}{{{{ raise_exception('{refusal}') }}}}{{% endif %}}"
    (tmp_path / "refuses.jinja").write_text(refuses + template)
    set_up = typed(
        distill.main,
        *(config.base_model, config.data.path, "--yes", "--chat-template", tmp_path / "refuses.jinja"),
        *("--output-dir", tmp_path / "new [a]", "--set", "pregenerate.max_prompt_tokens=64"),
    )
    assert set_up.code == 0, set_up.err
    result = typed(pregenerate.main, tmp_path / "new [a]")
    assert result.code == 0, result.err
    announced, said, _ = notes(result)
    assert said.startswith(f"46 completions in {tmp_path}/new [a]/completions: ")
    assert announced == (
        f"46 prompts, 1 completions of each; 0 of 46 stored; left out: 2 the chat template refuses the chat: {refusal}"
    )


def test_prompts_of_which_none_is_short_enough_are_counted_in_one_line(damaged: Path) -> None:
    result = typed(pregenerate.main, damaged, "pregenerate.max_prompt_tokens=4")
    check_refused(result, "gives anything to use (24 rows: 24 longer than 4 tokens)")


def test_an_endpoint_that_is_down_is_one_line(damaged: Path) -> None:
    shutil.rmtree(damaged / "completions")
    engine = "pregenerate.engine={url: http://127.0.0.1:9/v1, model: base, max_retries: 0}"
    result = typed(pregenerate.main, damaged, engine)
    announced, _, error = result.err.partition("\n")
    assert announced == "24 prompts, 1 completions of each; 0 of 24 stored; left out: none"
    check_refused(
        replace(result, err=error),
        "endpoint http://127.0.0.1:9/v1: Connection error",
        "0 of 24 completions are kept; run the command again to go on",
    )
    # What came to nothing binds nobody: the base model may sample instead.
    assert typed(pregenerate.main, damaged).code == 0


def test_the_help_says_what_is_taken_where_nothing_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    for name, *defaults in (
        ("distill", "(default: asked)", "(default: found)", "(default: if there is a template)"),
        ("generate", "(default: standard input)"),
    ):
        text = " ".join(typed(main.main, name, "--help").out.replace("│", " ").split())
        assert all(default in text for default in defaults), text


def test_a_stopped_command_leaves_without_a_traceback(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ptp.stages.pregenerate.pregenerate", stop)
    result = typed(pregenerate.main, experiment)
    assert result.code == 130
    assert result.err == "stopped; what is done is kept, and the same command goes on from there\n"


def lines_of(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stderr is not None
    return iter(process.stderr.readline, "")


def test_a_training_that_is_told_to_end_says_so_in_one_line_and_goes_on_from_the_step_it_was_at(
    root: Path, damaged: Path
) -> None:
    settings = ["train.max_steps=40", "train.save_every=30", "train.log_every=1", "train.report_to=[]"]
    shutil.rmtree(damaged / "checkpoints")
    shutil.copytree(damaged, root / "whole")
    command = [sys.executable, "-m", "ptp.cli.main", "train", str(damaged), *settings, "--no-measure"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    lines = lines_of(process)
    assert any("step 3/40 " in line for line in lines)
    process.send_signal(signal.SIGTERM)
    rest = [line for line in lines if "step" not in line]
    assert process.wait(PATIENCE) == 143
    assert rest == ["stopped; what is done is kept, and the same command goes on from there\n"]
    (checkpoint,) = (damaged / "checkpoints").glob("checkpoint-*")
    assert 3 <= int(checkpoint.name.removeprefix("checkpoint-")) < 30
    for directory in (damaged, root / "whole"):
        assert typed(train.main, directory, *settings, "--no-measure").code == 0
    for name in ("adapter_model.safetensors", "auxiliary.safetensors"):
        assert (damaged / "adapter" / name).read_bytes() == (root / "whole" / "adapter" / name).read_bytes()
    shutil.rmtree(root / "whole")


def test_events_that_a_full_disk_does_not_take_are_one_line_too(damaged: Path) -> None:
    """They are the first file that grows so large, and a thread writes them."""
    shutil.rmtree(damaged / "checkpoints")
    command = [sys.executable, "-m", "ptp.cli.main", "train", str(damaged), "train.max_steps=60", "train.log_every=1"]
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (3_000, 3_000))
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, preexec_fn=limit, check=False)
    assert done.returncode == 2
    (line,) = (line for line in done.stderr.splitlines() if not line.startswith("step "))
    assert line.startswith("error: training stopped ([Errno 27] File too large): there is no checkpoint yet; mend that")
