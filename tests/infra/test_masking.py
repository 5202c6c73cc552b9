"""What counts as a secret, and that none is left in a text, in an error or in a log record."""

import errno
import logging
import sys

import pytest
from pydantic import Secret, SecretStr

from infra import masking
from infra.cluster import ShardFailed

masking.remember()


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "_REVEALED", set())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://ghp_abc@host/x.git", "https://***@host/x.git"),
        ("see postgres://me:hunter2@ss@host/db", "see postgres://***@host/db"),
        ("GET https://host/a@b?page=2", "GET https://host/a@b?page=2"),
        ("https://host/x?api_key=abc&page=2", "https://host/x?api_key=***&page=2"),
        ("https://host/x?page=2&token=abc key=word", "https://host/x?page=2&token=*** key=word"),
        ("'https://b.s3/k?X-Amz-Credential=AK/1&X-Amz-Signature=ff'", "'https://b.s3/k?X-Amz-Credential=***&X-Amz-Signature=***'"),
        ("https://h/x?AWSAccessKeyId=AK&sig=q%3D&monkey=1", "https://h/x?AWSAccessKeyId=***&sig=***&monkey=1"),
    ],
)
def test_secrets_in_urls_are_masked_and_the_rest_stays(text: str, shown: str) -> None:
    assert masking.masked(text) == shown


def test_masking_a_long_text_takes_as_long_as_reading_it() -> None:
    encoded = "a" * 300_000  # an error may quote an image; by the square of this, the test would take minutes
    assert masking.masked(f"{encoded} ftp://me@host") == f"{encoded} ftp://***@host"


def test_values_of_the_environment_that_are_named_like_secrets_are_masked_but_not_paths(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "GITHUB_TOKEN", "DB_PASSWORD", "WANDB_API_KEY"):
        monkeypatch.setenv(name, f"value-of-{name.lower()}")
        assert masking.masked(f"refused: value-of-{name.lower()}!") == "refused: ***!"
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "admin:hunter22")
    assert masking.masked("wrong password 'hunter22'") == "wrong password '***'"
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path))
    assert str(tmp_path) in masking.masked(f"cannot read {tmp_path}")


def test_what_was_read_out_of_a_block_is_masked_from_then_on() -> None:
    kept = SecretStr("correct horse")
    assert masking.masked("correct horse") == "correct horse"
    kept.get_secret_value()
    Secret[dict]({"url": "https://hooks.example.org/T0/B1"}).get_secret_value()
    assert masking.masked("correct horse: https://hooks.example.org/T0/B1") == "***: ***"


def test_an_error_loses_its_secrets_and_keeps_what_it_is() -> None:
    masking.learn("hunter22")
    full = OSError(errno.ENOSPC, "no room for hunter22", "/mnt/hunter22")
    failed = ShardFailed("scores", 3, full)
    failed.__cause__ = full
    found = masking.hide(failed)
    assert isinstance(found, ShardFailed)
    assert (found.stage, found.shard, found.cause.errno) == ("scores", 3, errno.ENOSPC)
    assert "hunter22" not in f"{found} {found.cause} {found.__cause__!r}"


def test_an_error_whose_text_is_fixed_becomes_another_one() -> None:
    class FixedError(ValueError):
        def __str__(self) -> str:
            return "hunter22"

    masking.learn("hunter22")
    found = masking.hide(FixedError())
    assert (type(found), str(found)) == (RuntimeError, "FixedError: ***")
    error = KeyError("missing")
    error.__cause__ = FixedError()
    found = masking.hide(error)
    assert (type(found), found.__cause__, found.__context__) == (KeyError, None, None)


def test_no_log_record_holds_a_secret_neither_in_its_arguments_nor_in_its_traceback(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = logging.getLogRecordFactory()
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # put back afterwards
    masking.learn("hunter22")
    masking.mask_logs()
    try:
        try:
            int("hunter22")
        except ValueError:
            logging.getLogger("tests.masking").exception("it said %s of %d", "hunter22", 3)
    finally:
        logging.setLogRecordFactory(before)
    assert "it said *** of 3" in caplog.text
    assert "invalid literal for int() with base 10: '***'" in caplog.text
    assert "hunter22" not in caplog.text
