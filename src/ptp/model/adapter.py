"""Adapter directories: what training writes and decoding loads (METHOD §2; docs/formats.md).

adapter_config.json         PEFT's LoRA configuration, with its gate (aLoRA)
adapter_model.safetensors   LoRA weights under PEFT's names
auxiliary.safetensors       the embedding of u, and what corrects and reads the windows' states (`ptp.model.proposal`)
custom_generate/            the code by which transformers' `generate` decodes with the adapter
ptp_config.json             our settings: PTPConfig, sampling rule, acceptance profile, calibration of confidences, base
                            model and its hash
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ptp.calibration import Calibration
from ptp.config import PTPConfig
from ptp.errors import AdapterError
from ptp.files import write_atomically
from ptp.model.gated_lora import GatedLoRA, lora_layers
from ptp.model.hub import download, is_hub_id
from ptp.model.loading import is_packed
from ptp.records import Record
from ptp.sampling import SamplingRule

SETTINGS = "ptp_config.json"
LORA_WEIGHTS = "adapter_model.safetensors"
AUXILIARY_WEIGHTS = "auxiliary.safetensors"
PEFT_CONFIG = "adapter_config.json"
FILES = (PEFT_CONFIG, LORA_WEIGHTS, AUXILIARY_WEIGHTS, SETTINGS)
"""All that decoding needs of an adapter."""

CODE = ("custom_generate/generate.py", "custom_generate/requirements.txt")
"""Beside them, what transformers' `generate` runs."""

BEFORE = {1: {"pick": "exact", "chain": 0, "continuation": False}, 2: {"continuation": False}}
"""What adapters of earlier format versions do not say."""

NO_TOKEN = -1
"""What would open the gate in PEFT by itself, were it in a text: it is opened by `alora_offsets` alone."""

FINGERPRINT_SAMPLES = 512


class AdapterSettings(Record):
    """Contents of ptp_config.json.

    base_model: hub id, or a path that is tried relative to the adapter directory first. base_fingerprint: see
    `fingerprint`. rule: the sampling rule of the training data. survival, continued: the acceptance profile, s_1 … s_L
    of windows and of continued drafts. second: the chance that the second candidate is right where a draft is wrong.
    calibration: of the drafts' confidences.
    """

    format_version: int = 3
    base_model: str
    base_fingerprint: str
    config: PTPConfig
    rule: SamplingRule | None = None
    survival: tuple[float, ...]
    continued: tuple[float, ...] = ()
    second: float = 0.0
    calibration: Calibration = Calibration()


def fingerprint(base_model: nn.Module) -> str:
    """A hash of a model's weights: names, shapes and a fixed sample of values of every parameter.

    Values are compared in bfloat16, so that one model loaded in float32 and in bfloat16 is the same model. Of quantised
    weights name and type count, for bitsandbytes packs them anew when they are first used.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(_base_parameters(base_model).items()):
        if is_packed(parameter):
            digest.update(f"{name}{parameter.dtype}".encode())
            continue
        flat = parameter.detach().flatten()
        stride = max(1, flat.numel() // FINGERPRINT_SAMPLES)
        sample = flat[::stride][:FINGERPRINT_SAMPLES].to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def find_adapter(directory: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The adapter in an adapter directory or an experiment directory, or the files of a hub id in the hub's cache.

    revision, token: the hub's. Raises `AdapterError` when there is none.
    """
    name, directory = Path(directory).as_posix(), Path(directory)
    # Below a directory that is there, a name that is not is a slip, and nobody else's adapter is meant.
    if not directory.parent.exists() and is_hub_id(name):
        directory = download(name, FILES, revision, token)
    for candidate in (directory, directory / "adapter"):
        if (candidate / SETTINGS).is_file():
            return candidate
    if not directory.is_dir():
        raise AdapterError(f"no such directory: {directory}; expected an experiment or adapter directory")
    if (directory / PEFT_CONFIG).is_file():
        raise AdapterError(
            f"{name} is an adapter of PEFT without {SETTINGS}, which holds window, variant and sampling rule: wrap its "
            f"base model in PTPModel(base_model, PTPConfig(lora_rank=..., window=...)), read it by load_adapter "
            f"({AUXILIARY_WEIGHTS} beside it holds its added_weights()) and write all by save_pretrained"
        )
    raise AdapterError(f"{name} holds no adapter ({SETTINGS} or adapter/{SETTINGS}); train one with ptp_train")


def read_settings(adapter: Path) -> AdapterSettings:
    """ptp_config.json, checked. Raises `AdapterError` if it is corrupt."""
    try:
        stored = dict(json.loads((adapter / SETTINGS).read_text()))
        if unsaid := BEFORE.get(stored.get("format_version", 0)):
            stored["config"] = unsaid | stored.get("config", {})
        return AdapterSettings(**stored)
    except (ValueError, TypeError) as error:
        raise AdapterError(f"{adapter / SETTINGS} is not a valid adapter configuration: {error}") from None


def resolve_base_model(adapter: Path, base_model: str) -> str:
    """A base model's path relative to the adapter directory if there is such a directory, else as it stands."""
    nearby = adapter / base_model
    return str(nearby.resolve()) if nearby.is_dir() else base_model


def refer_to_base_model(adapter: Path, name: str) -> str:
    """What to write down so that `resolve_base_model` finds a model again, also when both directories move together."""
    return os.path.relpath(name, adapter) if name and Path(name).is_dir() else name


def save_adapter(
    directory: Path,
    base_model: nn.Module,
    added: Mapping[str, Tensor],
    settings: AdapterSettings,
    is_main_process: bool = True,
) -> None:
    """Write an adapter directory; each file appears whole or not at all, the settings last.

    added: what of the adapter is no LoRA, by name. Every process calls it that holds a shard of the weights, and the
    main one writes.
    """
    lora_weights, auxiliary_weights = gathered(_lora_weights(base_model)), gathered(added)
    if not is_main_process:
        return
    directory.mkdir(parents=True, exist_ok=True)
    write_weights(directory / LORA_WEIGHTS, lora_weights)
    write_weights(directory / AUXILIARY_WEIGHTS, auxiliary_weights)
    lora = LoraConfig(
        r=settings.config.lora_rank,
        lora_alpha=settings.config.lora_alpha,  # type: ignore[arg-type] # PEFT only divides it by r
        target_modules=sorted(lora_layers(base_model)),
        task_type="CAUSAL_LM",
        alora_invocation_tokens=[NO_TOKEN],
        base_model_name_or_path=settings.base_model,
        inference_mode=True,
    )
    lora.save_pretrained(str(directory))
    write_code(directory)
    write_settings(directory, settings)


def load_weights(directory: Path, base_model: nn.Module, added: Mapping[str, Tensor], config: PTPConfig) -> None:
    """Fill gated layers and what else there is from an adapter directory; every key must match in name and shape."""
    check_peft_config(directory, config)
    fill(directory / LORA_WEIGHTS, _lora_weights(base_model))
    fill(directory / AUXILIARY_WEIGHTS, added)


def write_code(directory: Path) -> None:
    """What lets transformers' `generate` decode with the adapter in a directory."""
    for name in CODE:
        write_atomically(directory / name, (Path(__file__).parent / name).read_bytes())


def check_peft_config(directory: Path, config: PTPConfig) -> None:
    """Raises `AdapterError` if adapter_config.json, where there is one, means another update than scale · B·A.

    Names and shapes of weights would not tell: PEFT's rsLoRA, for one, scales by another power of the rank.
    """
    path = directory / PEFT_CONFIG
    if not path.is_file():
        return
    try:
        lora = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise AdapterError(f"{path} is corrupt ({error}); restore it, or save the adapter again") from None
    unlike = [name for name in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern") if lora.get(name)]
    if unlike:
        raise AdapterError(f"{path}: {unlike[0]}={lora[unlike[0]]} is not supported; train a plain LoRA")
    if lora.get("lora_alpha", config.lora_alpha) != config.lora_alpha:
        raise AdapterError(
            f"{path} says lora_alpha={lora['lora_alpha']}, the PTPConfig {config.lora_alpha:g}; make them the same"
        )


def weights_hash(adapter: Path) -> str:
    """A hash of an adapter's weights, as they are stored."""
    digest = hashlib.sha256()
    for name in (LORA_WEIGHTS, AUXILIARY_WEIGHTS):
        with (adapter / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def lora_parameters(base_model: nn.Module) -> list[nn.Parameter]:
    """The weights of the gated layers."""
    return [weight for layer in lora_layers(base_model).values() for weight in (layer.lora_A, layer.lora_B)]


def write_settings(directory: Path, settings: AdapterSettings) -> None:
    """ptp_config.json, whole or not at all."""
    text = json.dumps(settings.model_dump(mode="json"), indent=2) + "\n"
    _write(directory / SETTINGS, lambda path: Path(path).write_text(text))


def gathered(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights whole, in float32 on the CPU; of those that are shards, all processes ask at the same time."""
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().float().cpu().contiguous()
        for name, tensor in weights.items()
    }


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """A safetensors file of `gathered` weights, whole or not at all."""
    _write(path, lambda temporary: save_file(dict(weights), temporary, metadata={"format": "pt"}))


def fill(path: Path, parameters: Mapping[str, Tensor]) -> None:
    """Read weights from a file into parameters, or this process's shards of them.

    Raises `AdapterError` unless every key matches in name and shape.
    """
    try:
        stored = load_file(path)
    except FileNotFoundError:
        raise AdapterError(f"{path} is missing: the adapter directory is incomplete") from None
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is corrupt ({error}); train again or restore it from a checkpoint") from None
    missing, unknown = sorted(parameters.keys() - stored.keys()), sorted(stored.keys() - parameters.keys())
    if missing or unknown:
        raise AdapterError(
            f"{path} does not fit the model: {len(missing)} keys missing (first: {missing[:1]}), "
            f"{len(unknown)} unknown (first: {unknown[:1]})"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != stored[name].shape:
                raise AdapterError(
                    f"{path}: {name} has shape {tuple(stored[name].shape)}, expected {tuple(parameter.shape)}"
                )
            value = stored[name].to(parameter.device, parameter.dtype)
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            parameter.copy_(value)


def _lora_weights(base_model: nn.Module) -> dict[str, Tensor]:
    """The LoRA's parameters under PEFT's names."""
    return {
        f"base_model.model.{name}.{which}.weight": getattr(layer, which)
        for name, layer in lora_layers(base_model).items()
        for which in ("lora_A", "lora_B")
    }


def _base_parameters(base_model: nn.Module) -> dict[str, Tensor]:
    """Parameters under the names they have in the unwrapped model."""
    wrapped = {id(p) for layer in lora_layers(base_model).values() for p in (layer.lora_A, layer.lora_B)}
    return {
        _plain_name(base_model, name): parameter
        for name, parameter in base_model.named_parameters()
        if id(parameter) not in wrapped
    }


def _plain_name(base_model: nn.Module, name: str) -> str:
    module, _, leaf = name.rpartition(".")
    parent, _, child = module.rpartition(".")
    if child == "base" and isinstance(base_model.get_submodule(parent), GatedLoRA):
        return f"{parent}.{leaf}"
    return name


def _write(path: Path, write: Any) -> None:
    """The file appears whole or not at all; who writes more than one says what a full disk means for them."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(temporary)
        # Both this file and safetensors' would be for the user alone.
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _umask() -> int:
    """Permissions that this process takes from new files; it can only be asked by setting it."""
    os.umask(mask := os.umask(0))
    return mask
