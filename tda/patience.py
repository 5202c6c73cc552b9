"""Trying a store again: which failures pass by themselves, how often something is tried, and how long is waited between.

For reads, and for Zarr chunks, wherever they lie; infra.storage does the same, by the same rule, for single objects that are written.
Both read the environment: TDA_STORAGE_ATTEMPTS (8) attempts in all, TDA_STORAGE_WAIT (0.2) seconds before the second, then twice as long
each time, with jitter, 10 s at most; TDA_STORAGE_TIMEOUT (60) seconds without a byte, or TDA_CONNECT_TIMEOUT (10) without a connection,
count as a failure.
"""

from __future__ import annotations

import errno
import os
from typing import Any

from tenacity import retry_if_exception, stop_after_attempt, wait_exponential_jitter

from tda.errors import InputError

#: What file systems, s3fs (which translates most of S3's error codes to these) and sockets say where another try may go well.
ERRNOS = {
    errno.EAGAIN, errno.EBUSY, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.EINTR, errno.EIO,
    errno.ENETUNREACH, errno.EPIPE, errno.ESTALE, errno.ETIMEDOUT, getattr(errno, "EREMOTEIO", errno.EIO),
}  # fmt: skip
#: By name, since importing botocore and aiohttp takes 0.3 s: a connection that broke, a body or an answer that was cut short.
KINDS = {
    "HTTPClientError", "ConnectionError", "IncompleteReadError", "ResponseStreamingError", "ResponseParserError", "ClientPayloadError",
    "ClientConnectionError", "IncompleteRead",
}  # fmt: skip
#: S3's codes for a request whose body was damaged on its way: s3fs gives them the errno of refusals.
CODES = {"BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"}
LONGEST_WAIT = 10.0


class Truncated(ConnectionError):  # noqa: N818  (reads as what happened)
    """Fewer bytes came than the store announced, or others."""


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: a busy or absent server, a broken connection, a cut answer; not a refusal."""
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError) and error.errno in ERRNOS:
        return True
    response = getattr(error.__cause__, "response", None)
    if isinstance(response, dict) and response.get("Error", {}).get("Code") in CODES:
        return True
    mro = {kind.__name__ for kind in type(error).__mro__}
    return type(error).__module__.partition(".")[0] in ("botocore", "aiobotocore", "aiohttp", "urllib3") and bool(mro & KINDS)


def patience() -> dict[str, Any]:
    """The arguments of tenacity.Retrying and AsyncRetrying.

    Raises:
        InputError: the environment holds no numbers.
    """
    wait = number("TDA_STORAGE_WAIT", 0.2)
    return {
        "retry": retry_if_exception(is_transient),
        "stop": stop_after_attempt(int(number("TDA_STORAGE_ATTEMPTS", 8))),
        "wait": wait_exponential_jitter(multiplier=wait, max=LONGEST_WAIT, jitter=wait),
        "reraise": True,
    }


def number(name: str, default: float) -> float:
    """A setting from the environment, at least 0.

    Raises:
        InputError: it is no such number.
    """
    text = os.environ.get(name, "")
    try:
        value = float(text or default)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise InputError(f"{name} must be a number that is not negative, got {text!r}; correct or unset it")
    return value
