import pytest


@pytest.fixture(autouse=True)
def quiet(no_foreign_bars: None) -> None:
    """Every test here runs commands."""
