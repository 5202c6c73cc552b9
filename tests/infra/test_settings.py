"""Settings come from the environment and never overrule what a person set."""

import os

import pytest
from pydantic import ValidationError

from infra.settings import Settings, quiet_prefect


def test_the_environment_sets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDA_CONNECT_TIMEOUT", "1.5")
    monkeypatch.setenv("TDA_STORAGE_ATTEMPTS", "2")
    assert (Settings().connect_timeout, Settings().storage_attempts) == (1.5, 2)


def test_senseless_values_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDA_STORAGE_ATTEMPTS", "0")
    with pytest.raises(ValidationError, match="storage_attempts"):
        Settings()


def test_prefect_is_quiet_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_LOGGING_LEVEL", "DEBUG")
    monkeypatch.delenv("DO_NOT_TRACK", raising=False)
    quiet_prefect()
    assert os.environ["PREFECT_LOGGING_LEVEL"] == "DEBUG"
    assert os.environ["DO_NOT_TRACK"] == "1"
