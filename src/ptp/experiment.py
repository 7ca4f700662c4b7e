"""An experiment directory: its files and their settings (docs/formats.md).

experiment.yaml    base model, dataset, prompt scheme, and the sampling rule that every stage uses
pregenerate.yaml   how completions are sampled          completions/  their store
train.yaml         PTP model and training               checkpoints/, adapter/
README.md          the next commands                    report.html
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, model_validator

from ptp.config import PregenerateConfig, PTPConfig, TrainConfig
from ptp.data.store import write_atomically
from ptp.errors import ConfigError, DataError
from ptp.records import Record, unknown_key
from ptp.sampling import SamplingRule


class ExperimentConfig(Record):
    """All settings of an experiment, as its three files hold them together."""

    base_model: str
    dataset: str
    prompt_scheme: str = "{text}"
    sampling: SamplingRule
    pregenerate: PregenerateConfig = PregenerateConfig()
    model: PTPConfig = PTPConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _distillation(self) -> ExperimentConfig:
        if self.train.distillation > 0 and self.model.variant != "categorical":
            raise ValueError("train.distillation needs model.variant categorical: a one_hot window has no distribution")
        return self


FILES: dict[str, tuple[str, ...]] = {
    "experiment.yaml": ("base_model", "dataset", "prompt_scheme", "sampling"),
    "pregenerate.yaml": ("pregenerate",),
    "train.yaml": ("model", "train"),
}


SECTIONS: dict[str, type[Record]] = {
    "pregenerate": PregenerateConfig,
    "model": PTPConfig,
    "train": TrainConfig,
    "sampling": SamplingRule,
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
        """Write the settings files of a new experiment. Refuses to overwrite one."""
        existing = [name for name in FILES if (self.directory / name).exists()]
        if existing:
            raise ConfigError(
                f"{self.directory} already holds an experiment ({existing[0]}); choose another with --output-dir"
            )
        self.directory.mkdir(parents=True, exist_ok=True)
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
    def dataset(self) -> Path:
        return Path(self.resolve(self.config.dataset))

    @property
    def completions(self) -> Path:
        return self.directory / "completions"

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.directory / "adapter"

    def record_run(self, stage: str) -> None:
        """Keep what a run used: resolved settings, command and versions, in runs/<stage>.json."""
        import torch
        import transformers

        run = {
            "command": sys.argv,
            "config": self.config.model_dump(mode="json"),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
        (self.directory / "runs").mkdir(exist_ok=True)
        write_atomically(self.directory / "runs" / f"{stage}.json", json.dumps(run, indent=2).encode() + b"\n")


def apply_override(settings: dict[str, Any], override: str) -> None:
    """Set one dotted key in nested settings; the value is read as YAML."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"an override has the form section.key=value; got '{override}'")
    *sections, key = path.split(".")
    target = settings
    record: type[BaseModel] = ExperimentConfig
    for section in sections:
        field = record.model_fields.get(section)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            raise ConfigError(unknown_key(section, record.model_fields, record.__name__))
        if not isinstance(target.setdefault(section, {}), dict):
            raise ConfigError(f"{section} must hold settings by name; got {target[section]!r}")
        target, record = target[section], field.annotation
    if key not in record.model_fields:
        for section, config in SECTIONS.items():
            if not sections and key in config.model_fields:
                raise ConfigError(f"'{key}' belongs to a section; did you mean '{section}.{key}={text}'?")
        raise ConfigError(unknown_key(key, record.model_fields, record.__name__))
    target[key] = text if record.model_fields[key].annotation is str else parse_value(text)


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
