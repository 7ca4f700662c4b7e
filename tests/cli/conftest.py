from collections.abc import Iterator

import pytest
from transformers.utils import logging as transformers_logging


@pytest.fixture(scope="package", autouse=True)
def no_foreign_bars() -> Iterator[None]:
    """Programs switch other libraries' bars off before these are imported, which is too late here."""
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()
