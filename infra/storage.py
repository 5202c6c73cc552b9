"""Everything that writes to, or checks, a store: a folder (file:) or a bucket (s3:).

A write is whole or it is not there: a reader never sees half an object, whatever is killed and whenever. On a file system
that takes a temporary file, a rename and two fsyncs; on S3 a PUT is whole by itself. Transient failures are retried with
growing, jittered pauses. S3 credentials and endpoint come from the standard AWS environment and appear in no message.
"""

import errno
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from infra.settings import Settings

T = TypeVar("T")

# What is worth another try is the same here and in tda.patience, which neither may import from the other: whoever opens a run in a
# notebook needs no infra, and what writes no tda. tests/test_retry_rule.py holds the two equal.
TRANSIENT_ERRNOS = {
    errno.EAGAIN, errno.EBUSY, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.EINTR, errno.EIO,
    errno.ENETUNREACH, errno.EPIPE, errno.ESTALE, errno.ETIMEDOUT, getattr(errno, "EREMOTEIO", errno.EIO),
}  # fmt: skip
#: By name: they are not worth importing for a file: store.
TRANSIENT_KINDS = {
    "HTTPClientError", "ConnectionError", "IncompleteReadError", "ResponseStreamingError", "ResponseParserError", "ClientPayloadError",
    "ClientConnectionError", "IncompleteRead",
}  # fmt: skip
#: S3's codes for a body that was damaged on its way; s3fs gives them the errno of refusals.
DAMAGED = {"BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"}
SINGLE_PUT_LIMIT = 5 * 2**30  # bytes; S3 takes no larger object in one PUT
SWEEPS = 3  # how often a writer begins again because another process swept its temporary file away
CREATOR_KEY = "tda-creator"


class StoreError(OSError):
    """A store cannot be used. The message is one line: which store, what is wrong, the way out."""


def write_bytes(url: str, data: bytes) -> None:
    """Write one object, replacing what was there, atomically.

    Raises:
        StoreError: the write failed for good, or kept failing after the retries.
    """
    protocol, path = split(url)
    if protocol == "file":
        _retried(url, lambda: _replace_file(Path(path), data))
    else:
        _retried(url, lambda: _put(path, data))


def write_json(url: str, obj: Any) -> None:
    """Write an object as UTF-8 JSON, readable by eye. NaN and infinities are refused (ValueError): they are not JSON."""
    write_bytes(url, (json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def create_once(url: str, data: bytes) -> bool:
    """Write one object unless it exists; of any number of racing callers exactly one gets True.

    Raises:
        StoreError: as write_bytes.
    """
    protocol, path = split(url)
    if protocol == "file":
        return _retried(url, lambda: _link_file(Path(path), data))
    # Named before the first attempt: when an answer is lost and the retry finds the object there, its metadata tell whose it is.
    creator = uuid.uuid4().hex
    return _retried(url, lambda: _put_new(path, data, creator))


def delete(url: str) -> None:
    """Delete one object; that it is absent already is fine.

    Raises:
        StoreError: as write_bytes.
    """
    protocol, path = split(url)
    if protocol == "file":
        _retried(url, lambda: Path(path).unlink(missing_ok=True))
    else:
        _retried(url, lambda: _absent_is_fine(lambda: _s3().rm_file(path)))


def delete_tree(url: str) -> None:
    """Delete everything below a URL; that it is absent already is fine. A whole bucket or file system is refused.

    Raises:
        StoreError: as write_bytes; or the URL names a whole bucket or file system.
    """
    protocol, path = split(url)
    if "/" not in path.strip("/"):
        raise StoreError(f"{url}: a whole bucket or file system is never deleted; name a folder inside it")
    if protocol == "file":
        _retried(url, lambda: _absent_is_fine(lambda: shutil.rmtree(path)))
    else:
        _retried(url, lambda: _absent_is_fine(lambda: _s3().rm(path, recursive=True)))


def sweep(url: str) -> None:
    """Delete the temporary files that killed writers left below a folder; on S3 there are none, since every write is one PUT.

    A writer still at work below the folder may lose its file: it writes another.
    """
    protocol, path = split(url)
    if protocol == "file":
        for partial in Path(path).rglob(".*.partial"):
            partial.unlink(missing_ok=True)


def check_store(url: str) -> None:
    """Make sure that a run could write to a store, without creating it.

    file: the folder is writable, or absent while its parent is there and writable. s3: the bucket is there and the credentials
    may write; one probe object is written and deleted again.

    Raises:
        StoreError: one line that names the store, what is wrong with it and the way out.
    """
    protocol, path = split(url)
    if protocol == "file":
        _check_folder(url, Path(path))
    else:
        _check_bucket(url, path)


def split(url: str) -> tuple[str, str]:
    """Split a URL into ("file", absolute path) or ("s3", "bucket/key"); a bare path counts as file:.

    Raises:
        StoreError: empty, another scheme, an S3 URL without a bucket, or a path that climbs with "..".
    """
    scheme, colon, rest = url.partition(":")
    if not url:
        raise StoreError("the store's URL is empty; use file:./store or s3://bucket/prefix")
    if scheme == "s3":
        path = rest.strip("/")
        if not rest.startswith("//") or not path:
            raise StoreError(f"{url}: names no bucket; use s3://bucket/prefix")
        if "@" in path.split("/")[0]:
            raise StoreError("the store's URL carries credentials; put them into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        if ".." in path.split("/"):
            raise StoreError(f'{url}: ".." has no meaning in a bucket; write the key out')
        return "s3", path
    if scheme == "file":
        return "file", str(Path(rest.removeprefix("//")).absolute())
    if colon and "/" not in scheme:
        raise StoreError(f'{url}: scheme "{scheme}" is not supported; use file:./store or s3://bucket/prefix')
    return "file", str(Path(url).absolute())


def _retried(url: str, operation: Callable[[], T], again: Callable[[BaseException], bool] | None = None) -> T:
    settings = Settings()
    attempts = Retrying(
        retry=retry_if_exception(again or is_transient),
        stop=stop_after_attempt(settings.storage_attempts),
        wait=wait_exponential_jitter(multiplier=settings.storage_wait, max=10.0, jitter=settings.storage_wait),
        reraise=True,
    )
    with _as_store_error(url):
        return attempts(operation)


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: a busy or absent server, a broken connection; not a refusal."""
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError) and error.errno in TRANSIENT_ERRNOS:
        return True
    response = getattr(error.__cause__, "response", None)
    if isinstance(response, dict) and response.get("Error", {}).get("Code") in DAMAGED:
        return True
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return type(error).__module__.partition(".")[0] in ("botocore", "aiobotocore", "aiohttp", "urllib3") and bool(kinds & TRANSIENT_KINDS)


@contextmanager
def _as_store_error(url: str) -> Iterator[None]:
    try:
        yield
    except StoreError:
        raise
    except _failures() as error:
        raise StoreError(f"{url}: {explain(url, error)}") from error


def explain(url: str, error: BaseException) -> str:
    """What is wrong with a store and the way out, in one line, from the exception it raised."""
    said = " ".join(str(getattr(error, "strerror", None) or error).split()).rstrip(".")
    if not url.startswith("s3:"):
        return f"{said}; choose another folder with --store or free this one"
    bucket = split(url)[1].split("/")[0]
    name = type(error).__name__
    if name in {"NoCredentialsError", "PartialCredentialsError"}:
        return "no S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if isinstance(error, PermissionError):
        refusal = f'S3 refuses access to bucket "{bucket}" ({said or "forbidden"})'
        return f"{refusal}; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy"
    if isinstance(error, FileNotFoundError):
        return f'bucket "{bucket}" does not exist; create it, or name another in "store"'
    if is_transient(error):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
        return f"no answer from S3 at {endpoint} ({name}: {said}); check AWS_ENDPOINT_URL and the network"
    return f"S3 said: {said or name}; check the URL, AWS_ENDPOINT_URL and AWS_DEFAULT_REGION"


def _failures() -> tuple[type[Exception], ...]:
    """What file systems and S3 raise; botocore is imported only by the time something has failed."""
    from botocore.exceptions import BotoCoreError

    return (OSError, BotoCoreError)


def _s3(**options: Any) -> Any:
    """The s3fs file system; listings are not cached, since other processes write to the same store."""
    import fsspec

    settings = Settings()
    timeouts = {"connect_timeout": settings.connect_timeout, "read_timeout": settings.storage_timeout}
    config = timeouts | {"retries": {"total_max_attempts": 1}}
    file_system = fsspec.filesystem("s3", config_kwargs=config, use_listings_cache=False, **options)
    file_system.retries = 1  # neither botocore nor s3fs tries again: _retried does
    return file_system


def _put(path: str, data: bytes) -> None:
    if len(data) > SINGLE_PUT_LIMIT:
        raise OSError(errno.EFBIG, f"{len(data)} bytes do not fit into one PUT (limit {SINGLE_PUT_LIMIT}); store it as a Zarr array")
    _s3().pipe_file(path, data, chunksize=SINGLE_PUT_LIMIT)


def _put_new(path: str, data: bytes, creator: str) -> bool:
    file_system = _s3()
    try:
        file_system.pipe_file(path, data, mode="create", chunksize=SINGLE_PUT_LIMIT, Metadata={CREATOR_KEY: creator})
    except FileExistsError:
        pass
    except OSError as error:
        # radosgw's 412 arrives as a bare EINVAL, which other refusals share: only an object that is really there counts.
        if error.errno != errno.EINVAL or not file_system.exists(path):
            raise
    else:
        return True
    return bool(file_system.metadata(path).get(CREATOR_KEY) == creator)


def _replace_file(path: Path, data: bytes) -> None:
    def write() -> None:
        with _complete_beside(path, data) as partial:
            partial.replace(path)

    _unless_swept(write)
    _sync_folder(path.parent)


def _link_file(path: Path, data: bytes) -> bool:
    def write() -> bool:
        with _complete_beside(path, data) as partial:
            try:
                path.hardlink_to(partial)
            except FileExistsError:
                return False
        return True

    made = _unless_swept(write)
    if made:
        _sync_folder(path.parent)
    return made


def _unless_swept(write: Callable[[], T]) -> T:
    """Write again where another process swept the temporary file away; a folder that cannot be written to says so at the last try."""
    for _ in range(SWEEPS):
        try:
            return write()
        except FileNotFoundError:
            continue
    return write()


@contextmanager
def _complete_beside(path: Path, data: bytes) -> Iterator[Path]:
    """A temporary file in the folder of `path` that holds all the data and has reached the disk; gone afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut: the folder's own entry has to reach the disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _absent_is_fine(operation: Callable[[], None]) -> None:
    try:
        operation()
    except FileNotFoundError:
        return


def _check_folder(url: str, path: Path) -> None:
    folder = path if path.exists() else path.parent
    if not folder.exists():
        raise StoreError(f"{url}: {folder} does not exist; create it (mkdir -p {folder}) or choose another store")
    if not folder.is_dir():
        raise StoreError(f"{url}: {folder} is not a folder; choose another store")
    try:  # a real write: permission bits say nothing to root, on read-only mounts or over a quota
        with _complete_beside(folder / "probe", b"probe"):
            pass
    except OSError as error:
        raise StoreError(f"{url}: cannot write to {folder} ({error.strerror}); make it writable or choose another store") from error


def _check_bucket(url: str, path: str) -> None:
    probe = f"{path}/.tda-probe-{uuid.uuid4().hex}"
    # Whether somebody answers is asked once: the user waits for it.
    _retried(url, lambda: _s3().pipe_file(probe, b"probe"), lambda error: is_transient(error) and not _unanswered(error))
    delete(f"s3://{probe}")


def _unanswered(error: BaseException) -> bool:
    return type(error).__name__ in {"EndpointConnectionError", "ConnectTimeoutError"}
