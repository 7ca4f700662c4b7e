"""The model card of an adapter, from what was measured of it and stored beside it; where nothing was, it says so.

adapter/training.json      what the weights were trained on       (docs/formats.md, Adapter directory)
adapter/measurement.json   after training, on held-out prompts
bench.jsonl                `ptp bench` of these very weights       (docs/formats.md, `ptp bench`)
runs/train.json            command and versions of that training
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ptp.model.adapter import read_settings, weights_hash
from ptp.model.hub import is_hub_id
from ptp.sampling import SamplingRule

TAGS = ["parallel-token-prediction", "speculative-decoding", "custom_generate", "lora"]
HELD_OUT = "held-out prompts"
OVERALL, METHOD = "overall", "PTP"
"""As bench.jsonl calls all tasks together, and decoding with an adapter."""


@dataclass(frozen=True)
class Task:
    """What decoding reached on a task. tokens_per_call: τ. acceptance_rate: accepted over drafted tokens, or null."""

    name: str
    num_questions: int
    tokens_per_call: float
    acceptance_rate: float | None = None
    speedup: float | None = None


@dataclass(frozen=True)
class Run:
    """One measurement, and how it was made. conditions: by name, all that is known of it."""

    prompts: str
    tasks: list[Task]
    rule: SamplingRule
    budget: int | str
    conditions: dict[str, str]


def model_card(adapter: Path, repo_id: str, base_model: str) -> str:
    """The README.md of an adapter's repository."""
    metadata = {
        "base_model": base_model,
        "base_model_relation": "adapter",
        "datasets": [dataset] if (dataset := _dataset(adapter)) else None,
        "model_name": repo_id.partition("/")[2],
    }
    data = dataset or ("not on the hub" if _data(adapter) else "not known")
    return measured_card(adapter, _template("card.md.j2"), metadata, data, repo_id=repo_id, base_model=base_model)


def measured_card(adapter: Path, head: str, metadata: Mapping[str, Any], data: str, **values: Any) -> str:
    """A card: a head, what was measured of an adapter (`measured_runs`, and no other figures), and how it was trained.

    head: a template with `values`, and with `card_data` for the metadata in front. data: what it was trained on.
    """
    settings, runs = read_settings(adapter), measured_runs(adapter)
    training = _read_json(adapter / "training.json")
    last_run = _read_json(adapter.parent / "runs" / "train.json")
    if not training or last_run.get("config") != training["config"]:
        last_run = {}
    card = ModelCard.from_template(
        ModelCardData(
            library_name="parallel-token-prediction",
            pipeline_tag="text-generation",
            tags=TAGS,
            eval_results=list(_eval_results(runs)) or None,
            **metadata,
        ),
        template_str=head + _template("figures.md.j2"),
        settings=settings,
        runs=runs,
        data=data,
        mode=_data(adapter).get("mode"),
        steps=training.get("step"),
        command=_command(last_run["command"]) if last_run else None,
        versions=_versions(last_run),
        **values,
    )
    return str(card).rstrip() + "\n"


def _template(name: str) -> str:
    return (resources.files("ptp.model") / name).read_text(encoding="utf-8")


def _data(adapter: Path) -> dict[str, Any]:
    """The settings of the data that an adapter was trained on, if they are known."""
    return dict(_read_json(adapter / "training.json").get("config", {}).get("data", {}))


def _dataset(adapter: Path) -> str | None:
    """The hub's name of the data. A path of this machine would mean nothing to others, who have no business with it."""
    path = _data(adapter).get("path", "")
    return path if is_hub_id(path) and not (adapter.parent / path).exists() else None


def measured_runs(adapter: Path) -> list[Run]:
    """What was measured of the weights that the adapter has now; of runs under the same conditions, the last.

    What training counted on the held-out prompts is left out where they were timed too.
    """
    rule = read_settings(adapter).rule or SamplingRule()
    lines, weights, last = adapter.parent / "bench.jsonl", weights_hash(adapter), dict[str, Run]()
    for line in lines.read_text(encoding="utf-8").splitlines() if lines.is_file() else ():
        bench = json.loads(line)
        if bench.get("adapter") == weights:
            same = [bench[name] for name in ("prompts", "sampling", "budget", "dtype", "max_new_tokens")]
            last[json.dumps(same)] = _bench(bench)
    timed = list(last.values())
    counted = [_held_out(found, rule)] if (found := _read_json(adapter / "measurement.json")) else []
    known = [(run.prompts, run.rule, run.budget) for run in timed]
    return [run for run in counted if (run.prompts, run.rule, run.budget) not in known] + timed


def _held_out(found: Mapping[str, Any], rule: SamplingRule) -> Run:
    error = found["standard_error"]
    conditions = {
        "measured": "after training; calls were counted, nothing was timed",
        "tokens": f"{found['num_tokens']:,} in {found['num_calls']:,} calls",
        "standard error of τ": "not known" if error is None else f"{error:.2f}",
    }
    task = Task(HELD_OUT, found["num_prompts"], found["tokens_per_call"])
    return Run(HELD_OUT, [task], rule, found["budget"], conditions)


def _bench(bench: Mapping[str, Any]) -> Run:
    prompts = HELD_OUT if bench["prompts"] is None else Path(bench["prompts"]).name
    tasks = []
    for name, methods in bench["results"].items():
        figures = methods[METHOD]
        tasks.append(
            Task(
                prompts if name == OVERALL else f"{prompts}: {name}",
                figures["num_questions"],
                figures["tokens_per_call"],
                figures["acceptance_rate"],
                figures["speedup"],
            )
        )
    conditions = {
        "measured": bench["date"],
        "command": f"`{_command(bench['command'])}`",
        "hardware": f"{bench['hardware']}; {bench['num_threads']} threads of torch",
        "versions": _versions(bench) or "not known",
        "dtype": bench["dtype"],
        "most new tokens": str(bench["max_new_tokens"]),
        "texts against plain decoding": ", ".join(f"{n} {verdict}" for verdict, n in bench["verdicts"].items()),
    }
    return Run(prompts, tasks, SamplingRule(**bench["sampling"]), bench["budget"], conditions)


def _eval_results(runs: list[Run]) -> Iterator[EvalResult]:
    for run in runs:
        args = {"budget": run.budget, "sampling": run.rule.model_dump(mode="json")}
        for task in run.tasks:
            figures = {"tokens_per_call": task.tokens_per_call, "speedup": task.speedup}
            for metric, value in figures.items():
                if value is not None:
                    yield EvalResult(
                        task_type="text-generation",
                        dataset_type=run.prompts,
                        dataset_name=task.name,
                        # Results are put together by this and the type.
                        dataset_config=task.name,
                        metric_type=metric,
                        metric_name={"tokens_per_call": "tokens per call (τ)", "speedup": "speed-up"}[metric],
                        metric_value=round(value, 3),
                        metric_args=args,
                    )


def _command(words: list[str]) -> str:
    """A command as it was typed, but for where on the machine things lay."""
    return shlex.join([Path(word).name if Path(word).is_absolute() else word for word in words])


def _versions(record: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
