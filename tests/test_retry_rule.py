"""Reads and writes are tried again after the same failures, though neither side may import the rule of the other."""

import errno

import pytest
from aiohttp import ClientPayloadError, ServerDisconnectedError
from botocore.exceptions import ClientError, EndpointConnectionError, IncompleteReadError, NoCredentialsError, ReadTimeoutError
from urllib3.exceptions import IncompleteRead

from infra import storage
from tda import patience


def refused(code: str) -> OSError:
    """As s3fs raises what S3 answers with this code."""
    error = OSError(errno.EINVAL, code)
    error.__cause__ = ClientError({"Error": {"Code": code}}, "PutObject")
    return error


@pytest.mark.parametrize(
    ("error", "again"),
    [
        *((OSError(number, "x"), True) for number in patience.ERRNOS | storage.TRANSIENT_ERRNOS),
        *((refused(code), True) for code in patience.CODES | storage.DAMAGED),
        (refused("NoSuchBucket"), False),
        (PermissionError(errno.EACCES, "x"), False),
        (OSError(errno.ENOSPC, "x"), False),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (ClientPayloadError(), True),
        (ServerDisconnectedError(), True),
        (IncompleteRead(1, 2), True),
        (IncompleteReadError(actual_bytes=1, expected_bytes=2), True),
        (EndpointConnectionError(endpoint_url="x"), True),
        (ReadTimeoutError(endpoint_url="x"), True),
        (NoCredentialsError(), False),
        (ValueError(), False),
    ],
)
def test_both_sides_try_again_after_the_same_failures(error: Exception, again: bool) -> None:
    assert patience.is_transient(error) is again
    assert storage.is_transient(error) is again


def test_both_rules_name_the_same() -> None:
    assert (patience.ERRNOS, patience.KINDS, patience.CODES) == (storage.TRANSIENT_ERRNOS, storage.TRANSIENT_KINDS, storage.DAMAGED)
