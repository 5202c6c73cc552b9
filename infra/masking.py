"""Secrets do not leave the process: not in a message, not in a log record, not in what a flow tells Prefect's server of its errors.

What counts as one: names and passwords in URLs, keys and tokens in their queries, the values of environment variables that are named like
secrets, and, from `remember` on, what this process reads out of a secret of pydantic's, as those of Prefect's blocks and settings are.
"""

import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "***"
#: Shorter values are words that occur anywhere.
SHORTEST = 6
# From "://" on: a search for what stands before it would take the square of the length of a long word.
_USER = re.compile(r"://[^/\s?#'\"<>]+@")
_IN_QUERY = re.compile(
    r"(?P<key>[?&;](?:[\w.-]*[_.-])?(?:AWSAccessKeyId|(?:access|api|auth|private|secret|session|shared)?[_-]?(?:key|token)|secret|sig|signature|"
    r"password|passwd|pwd|credentials?|auth)=)[^&;\s#'\"<>]+",
    re.IGNORECASE,
)
_NAMED = re.compile(
    r"(^|_)(password|passwd|passphrase|secret|token|api_?key|access_?key(_id)?|secret_?key|private_?key|credentials?|auth_string)$",
    re.IGNORECASE,
)
_REVEALED: set[str] = set()
_MADE_RECORD = logging.getLogRecordFactory()


def masked(text: str) -> str:
    """A text without secrets."""
    text = _USER.sub(f"://{HIDDEN}@", text)
    text = _IN_QUERY.sub(rf"\g<key>{HIDDEN}", text)
    for value in sorted(_known(), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return text


def hide(error: BaseException) -> BaseException:
    """The same exception without secrets, nor any in those that it came from; another one where its text cannot be changed."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        _change(each)
        each = each.__cause__ or each.__context__
        if each is not None and _leaks(each) and not _change(each):
            error.__cause__ = error.__context__ = each = None  # what cannot be changed is not told
    return RuntimeError(masked(f"{type(error).__name__}: {error}")) if _leaks(error) else error


def _leaks(error: BaseException) -> bool:
    return masked(str(error)) != str(error)


def _change(error: BaseException) -> bool:
    """Take the secrets out of an exception's own texts; whether that went."""
    if not _leaks(error):
        return True
    error.args = tuple(_hidden(part) for part in error.args)
    for name in ("strerror", "filename", "filename2", "message", "cause"):
        value = getattr(error, name, None)
        if isinstance(value, str | BaseException):
            try:
                setattr(error, name, _hidden(value))
            except AttributeError:
                continue
    return not _leaks(error)


def _hidden(part: Any) -> Any:
    return masked(part) if isinstance(part, str) else hide(part) if isinstance(part, BaseException) else part


def mask_logs() -> None:
    """From now on, log records of this process, which Prefect sends to its server, and the traceback that ends it hold no secret."""
    logging.setLogRecordFactory(_record)
    sys.excepthook = _excepthook


def remember() -> None:
    """From now on, remember what this process reads out of a secret of pydantic's: what nobody has read cannot be told."""
    from pydantic import Secret, SecretBytes, SecretStr

    for kind in (Secret, SecretStr, SecretBytes):
        if not hasattr(kind.get_secret_value, "remembers"):
            kind.get_secret_value = _remembering(kind.get_secret_value)  # type: ignore[method-assign]


def learn(secret: Any) -> None:
    """Remember a secret, or all texts in a table of secrets."""
    _REVEALED.update(_texts(secret))


def _remembering(read: Any) -> Any:
    def get_secret_value(self: Any) -> Any:
        value = read(self)
        learn(value)
        return value

    get_secret_value.remembers = True  # type: ignore[attr-defined]
    return get_secret_value


def _record(*arguments: Any, **options: Any) -> logging.LogRecord:
    record = _MADE_RECORD(*arguments, **options)
    try:
        text = record.getMessage()
        hidden = masked(text)
        if record.exc_info and record.exc_info[0] is not None:  # formatters take it from exc_text where it is there
            record.exc_text = masked("".join(traceback.format_exception(*record.exc_info)).rstrip("\n"))
    except Exception:  # noqa: BLE001  (whoever handles the record says what is wrong with it)
        return record
    if hidden != text:
        record.msg, record.args = hidden, ()
    return record


def _excepthook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    sys.stderr.write(masked("".join(traceback.format_exception(kind, error, trace))))


def _known() -> set[str]:
    """The secrets that this process knows of."""
    found = {value for name, value in os.environ.items() if _NAMED.search(name) and not _is_path(value)} | _REVEALED
    found |= {value.rpartition(":")[2] for value in found if "://" not in value}  # name:password
    return {value for value in found if len(value) >= SHORTEST}


def _is_path(value: str) -> bool:
    """A variable may name the file of a secret, and messages that file."""
    return value.startswith(("/", "~")) and os.path.exists(os.path.expanduser(value))  # noqa: PTH110, PTH111


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str | bytes):
        yield value if isinstance(value, str) else value.decode(errors="replace")
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
