"""Loading base models and tokenizers, with errors in one line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ptp.errors import ConfigError
from ptp.layer_kinds import context_length
from ptp.processes import local_rank

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_base_model(name: str, dtype: str | torch.dtype = "auto", on_gpu: bool = True) -> PreTrainedModel:
    """Any causal LM by hub id or local path, on the GPU if there is one and `on_gpu`. dtype: see `to_dtype`."""
    with _loading("base model", name):
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", trust_remote_code=False)
    # Of several processes on a machine, each has its own GPU.
    device = f"cuda:{local_rank()}" if on_gpu and torch.cuda.is_available() else "cpu"
    to_dtype(model, dtype)
    if is_quantized(model):
        return model  # where transformers has put it; what was quantised for a device cannot be moved
    return model.to(device)  # type: ignore[arg-type] # transformers' wrapped `to` loses its self


def to_dtype(model: PreTrainedModel, dtype: str | torch.dtype) -> PreTrainedModel:
    """The model in another dtype: a torch dtype, a name in `DTYPES`, or "auto" for the one it has."""
    if dtype == "auto":
        return model
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ConfigError(f"dtype must be auto, {', '.join(DTYPES)}; got '{dtype}'")
        dtype = DTYPES[dtype]
    cast_parameters(model, dtype)
    model.config.dtype = dtype
    return model


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters but no buffers: a rotary embedding's frequencies stay in float32, as transformers keeps them.

    Quantised weights stay what they are.
    """
    for parameter in module.parameters():
        if not is_packed(parameter):
            parameter.data = parameter.data.to(dtype)


def is_packed(weight: Tensor) -> bool:
    """Whether a weight is quantised: integers, or bytes that hold two numbers each (bitsandbytes)."""
    return not weight.is_floating_point() or hasattr(weight, "quant_state")


def is_quantized(model: nn.Module) -> bool:
    """Whether transformers has loaded a model with weights of 8 or 4 bits."""
    return getattr(model, "is_quantized", False)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a base model."""
    with _loading("tokenizer of", name):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def vocabulary_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what each token id means to a tokenizer."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def load_config(name: str) -> PreTrainedConfig:
    """The configuration of a base model, without its weights."""
    with _loading("base model", name):
        return AutoConfig.from_pretrained(name, trust_remote_code=False)


def load_end_tokens(name: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end tokens of a base model, without loading it; many chat models have several."""
    try:
        eos = GenerationConfig.from_pretrained(name).eos_token_id
    except OSError:
        eos = load_config(name).get_text_config().eos_token_id
    eos = tokenizer.eos_token_id if eos is None else eos
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def load_context_length(name: str) -> int | None:
    """Positions a base model was made for, without loading it; None if its config does not say."""
    return context_length(load_config(name))


@contextmanager
def _loading(what: str, name: str) -> Iterator[None]:
    """Errors of transformers as one line. A path that does not exist is no hub id, of which its message would speak."""
    if name.startswith(("/", ".", "~")) and not Path(name).exists():
        raise ConfigError(f"cannot load the {what} '{name}': there is no such directory")
    try:
        yield
    except (ImportError, OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"the {what} '{name}' needs Python code of its own, which is not run from here; if you trust it, load "
                "the model in Python with trust_remote_code=True and wrap it there (PTPModel)"
            ) from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        missing = isinstance(error, OSError) and not Path(name).exists()
        nor_here = f" (nor is there a directory {name} here)" if missing else ""
        raise ConfigError(f"cannot load the {what} '{name}': {reason}{nor_here}") from error
