"""Settings from the environment (prefix TDA_): what belongs to a machine or a person rather than to a run."""

import os

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """How patiently storage and cluster are waited for."""

    model_config = SettingsConfigDict(env_prefix="TDA_", extra="ignore", frozen=True)

    storage_attempts: int = Field(default=8, ge=1)
    """Attempts of one read or write before it counts as failed (TDA_STORAGE_ATTEMPTS)."""
    storage_wait: float = Field(default=0.2, ge=0.0)
    """Seconds before the second attempt; it doubles, with jitter, up to 10 s (TDA_STORAGE_WAIT)."""
    storage_timeout: float = Field(default=60.0, gt=0.0)
    """Seconds without a byte from S3 until an attempt counts as failed (TDA_STORAGE_TIMEOUT)."""
    traceback: bool = False
    """Whether an expected error is told with its traceback (TDA_TRACEBACK=1)."""
    connect_timeout: float = Field(default=10.0, gt=0.0)
    """Seconds until a silent S3 endpoint or scheduler counts as unreachable (TDA_CONNECT_TIMEOUT)."""
    worker_timeout: float = Field(default=600.0, gt=0.0)
    """Seconds until workers that Slurm, Kubernetes or ssh were asked for have to be there (TDA_WORKER_TIMEOUT)."""


def quiet_prefect() -> None:
    """Keep Prefect from phoning home, from talking over the progress bars and from waiting long; call it before Prefect is imported.

    Whoever set one of these variables already keeps their value.
    """
    for name, value in {
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_LOGGING_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_SERVER_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",
        # A server that is gone, or hangs, is waited for as long as one takes to start again: twice 14 s, or 20 s for each of 8 requests.
        "PREFECT_CLIENT_MAX_RETRIES": "3",
        "PREFECT_API_REQUEST_TIMEOUT": "20",
    }.items():
        os.environ.setdefault(name, value)
