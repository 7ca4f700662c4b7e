"""Parallel Token Prediction: several tokens per call from any Hugging Face language model, losslessly."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptp.config import PTPConfig
    from ptp.decoding.custom_generate import custom_generate, generate_of_repository
    from ptp.decoding.decoder import Decoder, Generation
    from ptp.errors import AdapterError, ConfigError, DataError, DecodingError, PTPError
    from ptp.model.ptp_model import PTPModel
    from ptp.sampling import SamplingRule

_HOMES = {
    "AdapterError": "ptp.errors",
    "ConfigError": "ptp.errors",
    "DataError": "ptp.errors",
    "Decoder": "ptp.decoding.decoder",
    "DecodingError": "ptp.errors",
    "Generation": "ptp.decoding.decoder",
    "PTPConfig": "ptp.config",
    "PTPError": "ptp.errors",
    "PTPModel": "ptp.model.ptp_model",
    "SamplingRule": "ptp.sampling",
    "custom_generate": "ptp.decoding.custom_generate",
    "generate_of_repository": "ptp.decoding.custom_generate",
}

__all__ = [
    "AdapterError",
    "ConfigError",
    "DataError",
    "Decoder",
    "DecodingError",
    "Generation",
    "PTPConfig",
    "PTPError",
    "PTPModel",
    "SamplingRule",
    "custom_generate",
    "generate_of_repository",
]


def __getattr__(name: str) -> Any:
    # Loaded when first used, so that `ptp --help` does not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'ptp' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
