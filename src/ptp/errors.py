"""Errors a user can act on.

    PTPError (ValueError)      one clear line: what arrived, what was expected, what to do
    ├── ConfigError            a setting: unknown key, wrong type, value out of range
    ├── DataError              prompts, completions, stores
    ├── AdapterError           adapter files: missing, corrupt, made for another base model
    └── DecodingError          a request the decoder cannot serve: empty prompt, prompt too long

Command line programs print the line and leave with exit code 2. Broken invariants of our own code are
`AssertionError`s and keep their traceback.
"""


class PTPError(ValueError):
    """Base of all errors that are the input's fault, not the program's."""


class ConfigError(PTPError):
    """A setting is unknown, of the wrong type or out of range."""


class DataError(PTPError):
    """Prompts, completions or a store cannot be used as they are."""


class AdapterError(PTPError):
    """An adapter directory is missing, corrupt, or belongs to another base model."""


class DecodingError(PTPError):
    """A generation request cannot be served."""


class Terminated(SystemExit):
    """Training was asked to stop by SIGTERM, and has saved a checkpoint first."""
