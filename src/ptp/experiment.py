"""An experiment directory: its files and their settings (docs/formats.md).

experiment.yaml    base model, dataset, and the sampling rule that every stage uses
pregenerate.yaml   how completions are sampled          completions/  their store
train.yaml         PTP model and training               checkpoints/, tensorboard/, adapter/
README.md          the next commands                    cache/        tokenised data
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, model_validator

from ptp.config import DataConfig, PregenerateConfig, PTPConfig, TrainConfig
from ptp.errors import ConfigError, DataError
from ptp.files import write_atomically
from ptp.records import Record, unknown_key
from ptp.sampling import SamplingRule


class ExperimentConfig(Record):
    """All settings of an experiment, as its three files hold them together."""

    base_model: str
    data: DataConfig
    sampling: SamplingRule
    pregenerate: PregenerateConfig = PregenerateConfig()
    model: PTPConfig = PTPConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _lengths(self) -> ExperimentConfig:
        if self.data.distils and self.pregenerate.max_length > self.train.sequence_length:
            raise ValueError(
                f"train.sequence_length is {self.train.sequence_length} and cannot hold completions of "
                f"pregenerate.max_length {self.pregenerate.max_length}; raise the one or lower the other"
            )
        return self

    @model_validator(mode="after")
    def _distillation(self) -> ExperimentConfig:
        if self.train.kl_share(self.model) > 0 and self.model.variant != "categorical":
            raise ValueError("train.distillation needs model.variant categorical: a one_hot window has no distribution")
        return self

    @model_validator(mode="after")
    def _fsdp(self) -> ExperimentConfig:
        if self.train.fsdp and self.model.trains_all:
            raise ValueError(
                "train.fsdp shares out a frozen base model between processes; where all weights train, each process "
                "needs them whole: set train.fsdp to false"
            )
        if self.train.fsdp and self.train.optimizer != "adamw":
            raise ValueError(
                f"train.fsdp, for several GPUs and torchrun, needs an optimizer that steps on parts of matrices; got "
                f"{self.train.optimizer}: set train.optimizer=adamw train.learning_rate=1e-3"
            )
        return self

    @model_validator(mode="after")
    def _inverse(self) -> ExperimentConfig:
        if not self.train.inverse:
            return self
        if self.model.variant != "categorical":
            raise ValueError(
                "train.objective inverse_autoregressive needs model.variant categorical: a one_hot window has no "
                "distribution to draw u under"
            )
        if self.model.chain or self.model.pick != "exact":
            raise ValueError(
                "train.objective inverse_autoregressive draws u under the windows' own distributions, which neither a "
                f"chain nor a soft pick has: set model.chain to 0 and model.pick to exact; got {self.model.chain} and "
                f"{self.model.pick}"
            )
        if not self.sampling.gives_all_tokens:
            raise ValueError(
                "train.objective inverse_autoregressive needs an interval for every token: set sampling.top_k to 0, "
                f"sampling.top_p to 1, sampling.min_p to 0 and sampling.temperature above 0; got {self.sampling}"
            )
        return self

    @model_validator(mode="after")
    def _all_weights(self) -> ExperimentConfig:
        if not self.model.trains_all:
            return self
        what = "model.student" if self.model.student is not None else "model.trained=all"
        if not (self.data.distils or self.train.inverse):
            raise ValueError(
                f"{what} needs the base model's completions, whose intervals it learns from; data.mode "
                f"{self.data.mode} has none: choose prompt-distill or prompt-scheme-distill, or train without a "
                "teacher by train.objective=inverse_autoregressive"
            )
        if self.train.kl_share(self.model) > 0:
            raise ValueError(
                f"train.distillation needs the base model's logits, which training with {what} does not compute: set "
                "it to 0"
            )
        if self.train.dtype == "float16":
            raise ValueError(f"{what} cannot be trained in train.dtype float16; choose bfloat16 or float32")
        return self


PACKAGE = "parallel-token-prediction"

FILES: dict[str, tuple[str, ...]] = {
    "experiment.yaml": ("base_model", "data", "sampling"),
    "pregenerate.yaml": ("pregenerate",),
    "train.yaml": ("model", "train"),
}


@dataclass(frozen=True)
class Experiment:
    """An experiment directory and its settings."""

    directory: Path
    config: ExperimentConfig

    @classmethod
    def load(cls, directory: str | Path, overrides: Sequence[str] = ()) -> Experiment:
        """Read a directory, with dotted overrides ("train.learning_rate=3e-4") on top.

        Raises `DataError` for a missing directory, `ConfigError` for anything wrong in the files or overrides.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise DataError(f"no such experiment directory: {directory}; set one up with ptp_distill")
        settings: dict[str, Any] = {}
        for name in FILES:
            settings |= _read_yaml(directory / name)
        for override in overrides:
            apply_override(settings, override)
        return cls(directory, ExperimentConfig(**settings))

    def write(self) -> None:
        """Write the settings files of a new experiment."""
        check_new(self.directory)
        values = self.config.model_dump(mode="json")
        for name, keys in FILES.items():
            text = yaml.safe_dump({key: values[key] for key in keys}, sort_keys=False)
            write_atomically(self.directory / name, text.encode())

    def resolve(self, path: str) -> str:
        """A path of the settings relative to the experiment directory, if it exists there; else as it stands."""
        nearby = self.directory / path
        return str(nearby) if nearby.exists() else path

    @property
    def base_model(self) -> str:
        return self.resolve(self.config.base_model)

    @property
    def cache(self) -> Path:
        return self.directory / "cache"

    @property
    def completions(self) -> Path:
        return self.directory / "completions"

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def events(self) -> Path:
        """tensorboard's."""
        return self.directory / "tensorboard"

    @property
    def adapter(self) -> Path:
        return self.directory / "adapter"

    def check_inside(self, *names: str) -> None:
        """Raises `ConfigError` if what a stage is about to write to leads out of the directory by a link.

        No setting names a place to write to, but a directory that comes from somebody else may hold links.
        """
        root = self.directory.resolve()
        for name in names:
            for path in (self.directory / name, *(self.directory / name).rglob("*")):
                if path.is_symlink() and not path.resolve().is_relative_to(root):
                    raise ConfigError(
                        f"{path} is a link to {path.resolve()}, and nothing is written outside {self.directory}; put "
                        "the whole experiment there, or replace the link by a copy"
                    )

    def record_run(self, stage: str, data_fingerprint: str) -> None:
        """Keep what a run used, in runs/<stage>.json: command, resolved settings, data, versions and commit."""
        self.check_inside("runs")
        run = {
            "command": sys.argv,
            "config": self.config.model_dump(mode="json"),
            "data_fingerprint": data_fingerprint,
            "versions": versions(),
            "commit": _commit(),
        }
        write_atomically(self.directory / "runs" / f"{stage}.json", json.dumps(run, indent=2).encode() + b"\n")


def versions() -> dict[str, str]:
    """Of Python, this package and the libraries that numbers depend on."""
    packages = {name: metadata.version(name) for name in (PACKAGE, "torch", "transformers")}
    return {"python": platform.python_version()} | packages


def _commit() -> str | None:
    """The commit of this program, if it runs from its repository."""
    if shutil.which("git") is None:
        return None
    # Asked of this folder: installed below somebody else's repository, it has no commit there.
    command = ["git", "-C", str(Path(__file__).parent), "log", "-1", "--format=%H", "--", "."]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def check_new(directory: Path) -> None:
    """Raises `ConfigError` if a directory already holds an experiment."""
    existing = [name for name in FILES if (directory / name).exists()]
    if existing:
        raise ConfigError(f"{directory} already holds an experiment ({existing[0]}); choose another with --output-dir")


def apply_override(settings: dict[str, Any], override: str) -> None:
    """Set one dotted key in nested settings; the value is read as YAML."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"an override has the form section.key=value; got '{override}'")
    *sections, key = path.split(".")
    target = settings
    record: type[BaseModel] = ExperimentConfig
    for section in sections:
        inner = _record_in(record, section)
        if inner is None:
            raise ConfigError(unknown_key(section, record.model_fields, record.__name__))
        if target.get(section) is None:
            target[section] = {}
        if not isinstance(target[section], dict):
            raise ConfigError(f"{section} must hold settings by name; got {target[section]!r}")
        target, record = target[section], inner
    if key not in record.model_fields:
        for section in [] if sections else ExperimentConfig.model_fields:
            if (inner := _record_in(ExperimentConfig, section)) is not None and key in inner.model_fields:
                raise ConfigError(f"'{key}' belongs to a section; did you mean '{section}.{key}={text}'?")
        raise ConfigError(unknown_key(key, record.model_fields, record.__name__))
    target[key] = _value(text, record.model_fields[key].annotation)


def _record_in(record: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The record that a setting is, or may be in place of null; None for a plain value and an unknown key."""
    field = record.model_fields.get(key)
    kinds = () if field is None else (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _value(text: str, annotation: Any) -> Any:
    """The value of an override: YAML; but where the setting takes text, null and lists only if it takes them too."""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    if str not in kinds:
        return parse_value(text)
    if text == "null" and NoneType in kinds:
        return None
    with suppress(yaml.YAMLError):
        if isinstance(value := yaml.safe_load(text), list) and any(get_origin(kind) is tuple for kind in kinds):
            return value
    return text


def parse_value(text: str) -> Any:
    """A YAML scalar or list; also reads 3e-4 as a number, which YAML 1.1 does not."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"not a value: '{text}'") from None
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(
            f"{path} is missing: {path.parent} is not an experiment directory (set one up with ptp_distill)"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected settings by name; got {type(content).__name__}")
    for key in content:
        if key not in FILES[path.name]:
            raise ConfigError(unknown_key(str(key), FILES[path.name], str(path)))
    return content
