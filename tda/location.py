"""Where things are and how they are read: file: and s3: URLs through fsspec, Zarr v3 groups through one function.

Credentials and endpoint of an S3 server come from the standard AWS environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_ENDPOINT_URL, AWS_DEFAULT_REGION), never from a configuration file or a URL.
"""

from __future__ import annotations

import json
import os
import uuid
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast
from urllib.parse import urlsplit

import fsspec
import zarr
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from fsspec.implementations.local import LocalFileSystem
from tenacity import Retrying
from zarr.abc.store import Store
from zarr.storage import FsspecStore

from tda.errors import InputError, StoreUnreachable
from tda.patience import is_transient, patience
from tda.read_store import ReadStore

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Mode = Literal["r", "r+", "a", "w", "w-"]


def resolve(url: str, base: str | os.PathLike[str] | None = None) -> str:
    """Return the absolute form of a store's URL, without a slash at its end.

    "./store", "file:./store" and "file:///abs/store" give "file:///abs/store"; "s3://bucket/prefix/" gives "s3://bucket/prefix".
    What follows file: is a path as it is: "%20" in it is no space, so that what was resolved stays itself when it is resolved again.

    Args:
        url: what the user typed. A relative path is taken from `base`.
        base: the folder of relative paths; the current directory when absent.

    Raises:
        InputError: the URL is empty, names no bucket, carries credentials, or has a scheme other than file: and s3:.
    """
    if not url.strip():
        raise InputError("store URL is empty; write a folder such as file:./store, or s3://bucket/prefix")
    scheme, colon, rest = url.strip().partition(":")
    if colon and scheme == "s3":
        return _resolve_s3(url.strip())
    if colon and scheme == "file":
        return _resolve_file(rest, url, base)
    if colon and scheme.isalnum() and len(scheme) > 1 and "/" not in scheme:
        raise InputError(f"store URL {url!r} has the scheme {scheme!r}; supported are file: and s3:")
    return _resolve_file(url.strip(), url, base)


def join(url: str, *parts: Any) -> str:
    """Return `url` with `parts` below it.

    Raises:
        InputError: a part is no text, empty, absolute, or contains "..": ids and names never lead out of their store.
    """
    for part in parts:
        if not isinstance(part, str) or not part or set("\\\0") & set(part) or any(piece in ("", ".", "..") for piece in part.split("/")):
            raise InputError(f"{part!r} cannot be a name below {url}: names are relative and contain neither '..' nor empty parts")
    return "/".join([url.removesuffix("/"), *parts])


def exists(url: str) -> bool:
    """Whether an object, a file or a folder is at `url`."""
    fs, path = _filesystem(url)
    with _readable(url):
        return bool(fs.exists(path))


def read_bytes(url: str) -> bytes:
    """The bytes of one object.

    Raises:
        FileNotFoundError: nothing is at `url`.
        InputError: the store refuses or cannot be reached.
    """
    fs, path = _filesystem(url)
    with _readable(url):
        return bytes(fs.cat_file(path))


def read_range(url: str, start: int, stop: int) -> bytes:
    """The bytes [start, stop) of one object; only they are fetched.

    Raises:
        FileNotFoundError: nothing is at `url`.
        InputError: the store refuses or cannot be reached.
    """
    fs, path = _filesystem(url)
    with _readable(url):
        return bytes(fs.cat_file(path, start=start, end=stop))


def read_json(url: str) -> dict[str, Any]:
    """The JSON object stored at `url`.

    Raises:
        FileNotFoundError: nothing is at `url`.
        InputError: what is stored is not a JSON object, or the store refuses or cannot be reached.
    """
    return _json_object(url, read_bytes(url))


def read_json_many(urls: Sequence[str]) -> list[dict[str, Any] | None]:
    """The JSON objects at `urls`, fetched side by side where the store allows it; None where nothing is stored.

    What is stored but is no JSON object is given as {}: one damaged object must not hide the others. `read_json` says what is wrong.

    Raises:
        InputError: the store refuses or cannot be reached.
    """
    if not urls:
        return []
    fs = _filesystem(urls[0])[0]
    paths = [_filesystem(url)[1] for url in urls]
    with _readable(urls[0]):
        # What failed is dropped here and read again below, one by one: absent gives None, everything else its error.
        found: dict[str, bytes] = fs.cat(paths, on_error="omit")
    values = [found.get(path) or _bytes_or_none(url) for url, path in zip(urls, paths, strict=True)]
    return [None if data is None else _json_or_empty(url, data) for url, data in zip(urls, values, strict=True)]


def list_names(url: str) -> list[str]:
    """The sorted names of what is directly below `url`; empty when nothing is there."""
    fs, path = _filesystem(url)
    with _readable(url):
        try:
            children = fs.ls(path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
    names = {str(child).rstrip("/").rsplit("/", 1)[-1] for child in children if str(child).rstrip("/") != path.rstrip("/")}
    return sorted(names)


def find(url: str) -> dict[str, int]:
    """The bytes of every object below `url`, by its name there; no temporary files. Empty when nothing is there."""
    fs, path = _filesystem(url)
    with _readable(url):
        found = fs.find(path, detail=True)
    root = path.rstrip("/") + "/"
    sizes = {str(name).removeprefix(root): int(told["size"]) for name, told in found.items()}
    return {name: size for name, size in sizes.items() if not name.endswith(".partial")}


def open_group(url: str, mode: Mode = "r", sums: dict[str, list[Any]] | None = None) -> zarr.Group:
    """Open a Zarr v3 group through fsspec; the only place that decides how arrays reach a store.

    Opened for reading, a group that was sealed (`seal`) brings the metadata of everything below it along: one request.
    Opened for writing, metadata is always read afresh, so that arrays created meanwhile are seen.

    Args:
        url: the group's absolute URL.
        mode: as in zarr: "r" read, "r+" read and write, "a" also create, "w" replace, "w-" create or fail.
        sums: is given bytes and SHA-256 of every object that is read through the group, by its name there.

    Raises:
        FileNotFoundError: nothing is at `url` and the mode does not create.
        InputError: the store refuses or cannot be reached.
    """
    with _readable(url):
        store: Store = _zarr_store(url, read_only=mode == "r")
        return zarr.open_group(
            ReadStore(store, sums) if mode == "r" or sums is not None else store,
            mode=mode,
            zarr_format=3,
            use_consolidated=None if mode == "r" else False,
        )


def seal(url: str) -> None:
    """Copy the metadata of all arrays below a group into the group's own, so that opening it is one request.

    Call it once, when the last array has been created: arrays created later are invisible to readers. Chunks may still be written.
    """
    with _readable(url), warnings.catch_warnings():
        # Zarr warns that other implementations may ignore the copy; the arrays' own metadata stays in place for them.
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part", category=UserWarning)
        zarr.consolidate_metadata(_zarr_store(url, read_only=False), zarr_format=3)


class _PatientLocalFileSystem(LocalFileSystem):  # type: ignore[misc]  # fsspec is untyped
    """Local files, read again where a network file system has a bad moment.

    Written, they appear whole or not at all, and reach the disk: a writer killed halfway leaves only a *.partial file.
    """

    protocol = ("tda-file",)

    def cat_file(self, path: str, *arguments: Any, **options: Any) -> bytes:
        """The bytes of a file, or of a part of it."""
        return bytes(Retrying(**patience())(super().cat_file, path, *arguments, **options))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        """Write one whole file: beside its place, through to the disk, then renamed."""
        if mode != "overwrite":
            super().pipe_file(path, value, mode=mode)
            return
        Retrying(**patience())(self._replace, path, value)

    def _replace(self, path: str, value: bytes) -> None:
        target = Path(self._strip_protocol(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.partial")
        try:
            with partial.open("xb") as file:
                file.write(value)
                file.flush()
                # A receipt that reaches the disk before its chunk would hide the loss of the chunk in a power cut.
                os.fsync(file.fileno())
            partial.replace(target)
            _sync_folder(target.parent)
        finally:
            partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _zarr_store(url: str, *, read_only: bool) -> FsspecStore:
    if url.startswith("s3://"):
        return FsspecStore(_s3(asynchronous=True), read_only=read_only, path=url.removeprefix("s3://"))
    fs = AsyncFileSystemWrapper(_PatientLocalFileSystem(), asynchronous=True)
    return FsspecStore(fs, read_only=read_only, path=url.removeprefix("file://"))


def _filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    if url.startswith("s3://"):
        return _s3(), url.removeprefix("s3://")
    if url.startswith("file:///"):
        return _PatientLocalFileSystem(), url.removeprefix("file://")
    raise InputError(f"{url!r} is not an absolute file: or s3: URL; pass it through tda.location.resolve first")


def _s3(**more: Any) -> fsspec.AbstractFileSystem:
    from tda import s3  # s3fs is not worth importing for a file: store

    return s3.PatientS3(**s3.options(), **more)


@contextmanager
def _readable(url: str) -> Iterator[None]:
    """Turn refusals and unreachable servers into one line; what is merely absent stays a FileNotFoundError."""
    try:
        yield
    except (InputError, FileNotFoundError, FileExistsError):
        raise
    except PermissionError as error:
        raise InputError(
            f"{url} may not be read ({_one_line(error)}); check its permissions or the AWS credentials in the environment"
        ) from error
    except Exception as error:
        # botocore's errors share no base class with OSError, and importing botocore for their names costs 0.3 s.
        foreign = type(error).__module__.partition(".")[0] in ("botocore", "aiobotocore", "aiohttp")
        if not (foreign or (url.startswith("s3:") and is_transient(error))):
            raise
        raise StoreUnreachable(
            f"{url} cannot be reached ({_one_line(error)}); check AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and the network"
        ) from error


def _resolve_s3(url: str) -> str:
    parts = urlsplit(url)
    if not parts.netloc:
        raise InputError(f"store URL {url!r} names no bucket; write s3://bucket/prefix")
    if "@" in parts.netloc:
        raise InputError(
            f"store URL s3://...@{parts.netloc.rpartition('@')[2]} carries credentials; put them into the AWS environment variables"
        )
    key = "/".join(piece for piece in parts.path.split("/") if piece)
    if parts.query or parts.fragment or ".." in key.split("/"):
        raise InputError(f"store URL {url!r} is not of the form s3://bucket/prefix")
    return f"s3://{parts.netloc}/{key}".rstrip("/")


def _resolve_file(path: str, url: str, base: str | os.PathLike[str] | None) -> str:
    if path.startswith("//"):
        host, slash, tail = path[2:].partition("/")
        if host not in ("", "localhost") or not slash:
            raise InputError(f"store URL {url!r} names the host {host!r}; write file:./folder or file:///absolute/folder")
        path = "/" + tail
    if not path or "\0" in path:
        raise InputError(f"store URL {url!r} names no folder; write file:./store")
    folder = Path(base) if base is not None else Path.cwd()
    # Not Path.resolve: a link that the user typed stays in what is printed and stored.
    return "file://" + os.path.abspath(folder / Path(path).expanduser())  # noqa: PTH100


def _bytes_or_none(url: str) -> bytes | None:
    try:
        return read_bytes(url)
    except FileNotFoundError:
        return None


def _json_or_empty(url: str, data: bytes) -> dict[str, Any]:
    try:
        return _json_object(url, data)
    except InputError:
        return {}


def _json_object(url: str, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise InputError(f"{url} is not JSON ({_one_line(error)}); it was damaged, or not written by tda") from error
    if not isinstance(value, dict):
        raise InputError(f"{url} holds a JSON {type(value).__name__}, not an object; it was not written by tda")
    return cast("dict[str, Any]", value)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
